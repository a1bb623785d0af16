/* Merge on eviction: the value of each slot that goes is folded into the kept slot whose key is most alike,
 * weighted by likeness and by the norms of both values; keys stay as they were written. Source: kvpress's
 * MergingPress, which names Bolya et al. (arXiv:2210.09461) and D2O (arXiv:2406.13035) as what it is like;
 * threshold and fraction as there. A kept value becomes (v + sum w v_e) / (1 + sum w), written here as v + sum w
 * (v_e - v) / (1 + sum w): equal values then stay equal to the last bit. Deviations: a fraction below 1 counts
 * ranks where kvpress interpolates a quantile, which turns NaN beside a slot under the threshold; of keys that are
 * equally alike the newer is taken (there: whichever topk lists first). */
#include "policy/policy.h"

#include <math.h>
#include <string.h>

#define EPSILON 1e-6f
enum { NOBODY = -1 };

static const kvs_param_info params_info[] = {
    {"threshold", "cosine of keys below which a slot is dropped; above 1: all are", 0, 0, 2},
    {"fraction", "share of what goes, the most alike first, that is folded in", 1, 1e-3, 1},
};

/* What is known of each slot; of one that goes, like is the cosine to `into`, of one that stays the weight it took in. */
typedef struct merge_work {
    float *key_scale, *value_norm, *like; /* [n] */
    int32_t *into;                        /* [n] */
    uint32_t *rank;                       /* [n] */
    float *sum;                           /* [n][head_dim] what a kept slot is moved by */
} merge_work;

static merge_work lay_out(const kvs_policy_view *v)
{
    float *const at = v->work;
    const size_t n = v->n_slots;
    return (merge_work){
        at, at + n, at + 2 * n, (int32_t *)(void *)(at + 3 * n), (uint32_t *)(void *)(at + 4 * n), at + 5 * n};
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    return (size_t)n_slots * (5 + (size_t)head_dim);
}

static float norm(const float *x, uint32_t n)
{
    return sqrtf(kvs_dot(x, x, n));
}

/* The kept slot whose key is most alike to slot i's. */
static void find_nearest(const kvs_policy_view *v, const uint8_t *keep, uint32_t i, const merge_work *w)
{
    const uint32_t dh = v->head_dim;
    const float *const key = v->keys + (size_t)i * dh;
    float most = -INFINITY;
    w->into[i] = NOBODY;
    for (uint32_t k = 0; k < v->n_slots; k++) {
        if (keep[k] == 0)
            continue;
        const float like = kvs_dot(key, v->keys + (size_t)k * dh, dh) * w->key_scale[k];
        if (like >= most) {
            most = like;
            w->into[i] = (int32_t)k;
        }
    }
    w->like[i] = most * w->key_scale[i];
}

/* The least likeness that is folded in: threshold, or that of the last one of the fraction. */
static float least_like(const double *params, const uint8_t *keep, uint32_t n, const merge_work *w)
{
    const float threshold = (float)params[0];
    uint32_t n_gone = 0;
    for (uint32_t i = 0; i < n; i++)
        if (keep[i] == 0)
            w->rank[n_gone++] = kvs_score_key(w->like[i]);
    const uint32_t n_merged = n_gone - (uint32_t)ceil((1 - params[1]) * (n_gone - 1));
    if (params[1] >= 1 || n_gone == 0)
        return threshold;
    uint32_t n_ties;
    const uint32_t last = kvs_kth_largest(w->rank, n_gone, n_merged, &n_ties);
    float least = INFINITY;
    for (uint32_t i = 0; i < n; i++)
        if (keep[i] == 0 && kvs_score_key(w->like[i]) >= last && w->like[i] < least)
            least = w->like[i];
    return least > threshold ? least : threshold;
}

/* Adds what slot i moves its kept slot by; values of kept slots are as they were. */
static void add(const kvs_policy_view *v, uint32_t i, const merge_work *w, uint8_t *changed)
{
    const uint32_t dh = v->head_dim, k = (uint32_t)w->into[i];
    const float *const from = v->values + (size_t)i * dh, *const into = v->values + (size_t)k * dh;
    const float weight = w->like[i] * w->value_norm[i] / (w->value_norm[i] + w->value_norm[k] + EPSILON);
    if (!(weight > 0))
        return;
    float *const sum = w->sum + (size_t)k * dh;
    if (!changed[k]) {
        memset(sum, 0, dh * sizeof *sum);
        w->like[k] = 0;
    }
    changed[k] = 1;
    w->like[k] += weight;
    for (uint32_t d = 0; d < dh; d++)
        sum[d] += weight * (from[d] - into[d]);
}

static void merge(const double *params, const kvs_policy_view *view, const float *scores, const uint8_t *keep,
                  float *keys_raw, float *values, uint8_t *changed)
{
    (void)keys_raw;
    (void)scores;
    const uint32_t n = view->n_slots, dh = view->head_dim;
    const merge_work w = lay_out(view);
    for (uint32_t i = 0; i < n; i++) {
        w.key_scale[i] = 1.0f / fmaxf(norm(view->keys + (size_t)i * dh, dh), EPSILON);
        w.value_norm[i] = norm(view->values + (size_t)i * dh, dh);
    }
    for (uint32_t i = 0; i < n; i++)
        if (keep[i] == 0)
            find_nearest(view, keep, i, &w);
    const float least = least_like(params, keep, n, &w);
    for (uint32_t i = 0; i < n; i++)
        if (keep[i] == 0 && w.into[i] != NOBODY && w.like[i] >= least)
            add(view, i, &w, changed);
    for (uint32_t k = 0; k < n; k++)
        for (uint32_t d = 0; changed[k] && d < dh; d++)
            values[(size_t)k * dh + d] += w.sum[(size_t)k * dh + d] / (1.0f + w.like[k]);
}

const kvs_dispose_ops kvs_dispose_merge = {
    .info = {.name = "merge",
             .doc = "each value that goes is folded into the kept slot whose key is most alike",
             .source = "NVIDIA/kvpress MergingPress",
             .exactness = "exact; a fraction below 1 counts ranks",
             .params = params_info,
             .n_params = 2},
    .needs = KVS_POLICY_NEEDS_KEYS | KVS_POLICY_NEEDS_VALUES,
    .merge = merge,
    .work_of = work_of,
};

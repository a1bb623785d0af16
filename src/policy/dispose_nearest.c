/* Elastic Cache's merging (arXiv:2407.18121): each slot that goes joins the kept slot that stands nearest, which
 * becomes the plain mean of itself and all that joined it. Of two as near the older, as the repository's argmin.
 * keys=1 merges keys too, as the paper does; it averages them as they stand, each rotated to a position of its
 * own, where the mean is a rotation of nothing. Here keys are averaged before rotation and stand where the kept
 * slot does. keys=0 leaves them as they were written. Deviation: a slot that took others in at an earlier eviction
 * counts as one. The preset `elastic` is the paper's pruning of a prompt with it. */
#include "policy/policy.h"

#include <string.h>

static const kvs_param_info params_info[] = {
    {"keys", "1: keys are merged too, before rotation", 1, 0, 1},
};

static bool writes_keys(const double *params)
{
    return params[0] != 0;
}

/* Means of keys, means of values, and how many joined. */
static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    return (size_t)n_slots * (2 * (size_t)head_dim + 1);
}

/* Adds what row `from` moves row `into` by, relative to it: equal rows then stay equal to the last bit. */
static void add(const float *rows, uint32_t from, uint32_t into, uint32_t n, float *sum)
{
    for (uint32_t d = 0; d < n; d++)
        sum[(size_t)into * n + d] += rows[(size_t)from * n + d] - rows[(size_t)into * n + d];
}

static void move(float *rows, uint32_t row, uint32_t n, const float *sum, float n_in)
{
    for (uint32_t d = 0; d < n; d++)
        rows[(size_t)row * n + d] += sum[(size_t)row * n + d] / (n_in + 1);
}

/* The kept slot nearest to i, given the last one before and the first one behind it (n: there is none). */
static uint32_t nearest(const int32_t *pos, uint32_t i, uint32_t before, uint32_t behind, uint32_t n)
{
    if (before == n || behind == n)
        return before == n ? behind : before;
    return pos[i] - pos[before] <= pos[behind] - pos[i] ? before : behind;
}

static void merge(const double *params, const kvs_policy_view *view, const float *scores, const uint8_t *keep,
                  float *keys_raw, float *values, uint8_t *changed)
{
    (void)params;
    (void)scores;
    const uint32_t n = view->n_slots, dh = view->head_dim;
    float *const n_in = view->work, *const value_sum = n_in + n, *const key_sum = value_sum + (size_t)n * dh;
    memset(view->work, 0, ((size_t)n * dh * (keys_raw != NULL ? 2 : 1) + n) * sizeof *view->work);
    for (uint32_t i = 0, before = n, behind = 0; i < n; i++) {
        if (keep[i] != 0) {
            before = i;
            continue;
        }
        for (behind = behind > i ? behind : i; behind < n && keep[behind] == 0;)
            behind++;
        const uint32_t into = nearest(view->pos, i, before, behind, n);
        changed[into] = 1;
        n_in[into]++;
        add(values, i, into, dh, value_sum);
        if (keys_raw != NULL)
            add(keys_raw, i, into, dh, key_sum);
    }
    for (uint32_t k = 0; k < n; k++) {
        if (!changed[k])
            continue;
        move(values, k, dh, value_sum, n_in[k]);
        if (keys_raw != NULL)
            move(keys_raw, k, dh, key_sum, n_in[k]);
    }
}

const kvs_dispose_ops kvs_dispose_nearest = {
    .info = {.name = "nearest",
             .doc = "each slot that goes joins the kept slot that stands nearest, which becomes their mean",
             .source = "arXiv:2407.18121",
             .exactness = "exact but for keys, which are averaged before rotation",
             .params = params_info,
             .n_params = 1},
    .needs = KVS_POLICY_NEEDS_KEYS_RAW | KVS_POLICY_NEEDS_VALUES,
    .merge = merge,
    .writes_keys = writes_keys,
    .work_of = work_of,
};

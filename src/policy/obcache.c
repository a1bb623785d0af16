/* OBCache: how much the attention output moves, to first order and squared, where a slot's value, its key, or both are
 * set to zero. Source: arXiv:2510.07651; formulas and settings as in a public derivative of its code (KVScoreTracker):
 * with A probabilities, s scores before the softmax, o outputs, summed over the observed queries and the group's heads,
 *   V: A^2 |v|^2;  K: (A s)^2 |v - o|^2;  VK: V + K + 2 A^2 s <v, v - o>.
 * H2O's variant is the default (acc=1): of a prompt the newest `window` queries count, sums stay with their slots. Between
 * evictions too only the newest `window` are seen here (256 sees the whole of a chunk). acc=0, kernel=7: SnapKV's; window=1,
 * recent=0, acc=0: TOVA's. p=1, vnorm=0: the plain sum of attention. */
#include "policy/policy.h"

#include <math.h>

enum { PARAM_WINDOW, PARAM_RECENT, PARAM_ACC, PARAM_KERNEL, PARAM_P, PARAM_VNORM };

static const kvs_param_info params_info[] = {
    {"window", "newest queries that count", 16, 1, KVS_POLICY_WINDOW_MAX},
    {"recent", "newest slots that stay", 16, 0, 1e6},
    {"acc", "1: sums stay with their slots from one eviction to the next", 1, 0, 1},
    {"kernel", "slots of which the largest score counts, odd", 1, 1, 1023},
    {"p", "power of attention and norm, 1 or 2", 2, 1, 2},
    {"vnorm", "0: the values' norm is left out", 1, 0, 1},
};
enum { N_PARAMS = 4, N_PARAMS_V = 6 };

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[PARAM_WINDOW];
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    return (size_t)n_slots + head_dim;
}

/* First row of the window that no eviction has counted. */
static uint32_t first_row(const double *params, const kvs_policy_view *view)
{
    uint32_t r = 0;
    while (params[PARAM_ACC] != 0 && r < view->n_window && view->window_pos[r] < view->n_tokens_last)
        r++;
    return r;
}

typedef struct keys_and_values {
    bool key, value;
} kinds;

static void add_row(kinds which, const kvs_policy_view *view, const float *prob, const float *logit, float *o,
                    float *sum)
{
    const uint32_t n = view->n_slots, dh = view->head_dim;
    for (uint32_t d = 0; d < dh; d++)
        o[d] = 0;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t d = 0; d < dh; d++)
            o[d] += prob[i] * view->values[(size_t)i * dh + d];
    for (uint32_t i = 0; i < n; i++) {
        if (prob[i] == 0)
            continue; /* and the score may be -inf */
        const float *const v = view->values + (size_t)i * dh;
        float far = 0, along = 0, own = 0;
        for (uint32_t d = 0; d < dh; d++) {
            const float away = v[d] - o[d];
            far += away * away;
            along += v[d] * away;
            own += v[d] * v[d];
        }
        const float a = prob[i] * prob[i], s = logit[i];
        sum[i] += a * s * s * far;
        if (which.value)
            sum[i] += a * (own + 2 * s * along);
    }
}

static void add_attention(const double *params, const kvs_policy_view *view, const float *prob, float *sum)
{
    for (uint32_t i = 0; i < view->n_slots; i++)
        sum[i] += params[PARAM_P] < 2 ? prob[i] : prob[i] * prob[i];
}

static float norm_of(const double *params, const float *v, uint32_t n)
{
    float sum = 0;
    for (uint32_t d = 0; d < n; d++)
        sum += params[PARAM_P] < 2 ? fabsf(v[d]) : v[d] * v[d];
    return sum;
}

static void score_by(kinds which, const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots, n_recent = (uint32_t)params[PARAM_RECENT];
    float *const sum = view->work, *const o = sum + n;
    for (uint32_t i = 0; i < n; i++)
        sum[i] = params[PARAM_ACC] != 0 ? view->carry[i] : 0;
    for (uint32_t r = first_row(params, view) * view->group; r < view->n_window * view->group; r++) {
        const float *const prob = view->window_prob + (size_t)r * n;
        if (which.key)
            add_row(which, view, prob, view->window_logit + (size_t)r * n, o, sum);
        else
            add_attention(params, view, prob, sum);
    }
    for (uint32_t i = 0; params[PARAM_ACC] != 0 && i < n; i++)
        view->carry[i] = sum[i];
    for (uint32_t i = 0; !which.key && params[PARAM_VNORM] != 0 && i < n; i++)
        sum[i] *= norm_of(params, view->values + (size_t)i * view->head_dim, view->head_dim);
    kvs_pool_max(sum, n, (uint32_t)params[PARAM_KERNEL] | 1u, scores);
    for (uint32_t i = n > n_recent ? n - n_recent : 0; i < n; i++)
        scores[i] = INFINITY;
}

static void score_v(const double *params, const kvs_policy_view *view, float *scores)
{
    score_by((kinds){.value = true}, params, view, scores);
}

static void score_k(const double *params, const kvs_policy_view *view, float *scores)
{
    score_by((kinds){.key = true}, params, view, scores);
}

static void score_vk(const double *params, const kvs_policy_view *view, float *scores)
{
    score_by((kinds){.key = true, .value = true}, params, view, scores);
}

#define OBCACHE                                                                                                        \
    .abi = KVS_POLICY_ABI, .source = "arXiv:2510.07651", .schedule = "full", .position = "keep",                       \
    .exactness = "exact formula with +protect=none; of the queries since the last eviction only the newest are seen",  \
    .scope = KVS_SCOPE_HEAD, .params = params_info, .window_of = window_of, .work_of = work_of
#define OBCACHE_NEEDS (KVS_POLICY_NEEDS_WINDOW | KVS_POLICY_NEEDS_VALUES | KVS_POLICY_NEEDS_CARRY)

const kvs_policy_ops kvs_policy_obcache_v = {
    OBCACHE,
    .name = "obcache-v",
    .doc = "how far the output moves where a slot's value is set to zero",
    .needs = OBCACHE_NEEDS,
    .n_params = N_PARAMS_V,
    .score = score_v,
};

const kvs_policy_ops kvs_policy_obcache_k = {
    OBCACHE,
    .name = "obcache-k",
    .doc = "how far the output moves where a slot's key is set to zero",
    .needs = OBCACHE_NEEDS | KVS_POLICY_NEEDS_LOGITS,
    .n_params = N_PARAMS,
    .score = score_k,
};

const kvs_policy_ops kvs_policy_obcache_vk = {
    OBCACHE,
    .name = "obcache-vk",
    .doc = "how far the output moves where a slot's key and value are set to zero",
    .needs = OBCACHE_NEEDS | KVS_POLICY_NEEDS_LOGITS,
    .n_params = N_PARAMS,
    .score = score_vk,
};

/* ---- as a second scorer ---- */

/* A is the base score divided by the sum of all: V's formula for one observed query that attends so. */
static void rescore(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    const uint32_t n = view->n_slots, dh = view->head_dim;
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        scores[i] = scores[i] > 0 ? scores[i] : 0; /* NaN too */
        sum += isinf(scores[i]) ? 0 : (double)scores[i];
    }
    for (uint32_t i = 0; i < n; i++) {
        if (isinf(scores[i]))
            continue; /* what the base keeps whatever happens */
        const float *const v = view->values + (size_t)i * dh;
        const double a = sum > 0 ? (double)scores[i] / sum : 0;
        scores[i] = (float)(a * a * (double)kvs_dot(v, v, dh));
    }
}

const kvs_rescore_ops kvs_rescore_obcache_v = {
    .info = {.name = "obcache-v",
             .doc = "how far the output moves where a slot's value is set to zero",
             .source = "arXiv:2510.07651",
             .exactness = "exact formula with the base score, divided by its sum, for the attention"},
    .needs = KVS_POLICY_NEEDS_VALUES,
    .rescore = rescore,
};

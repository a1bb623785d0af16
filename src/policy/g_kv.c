/* G-KV: what the newest rows attend to, remembered from eviction to eviction with decay, less how much a key repeats others.
 * Source: arXiv:2512.00504 and microsoft/G-KV (score_based.py, its G-KV setting in scripts/inference.sh): window 16; the local score is the mean over its rows of the
 * group's largest probability, divided by its maximum; the global one max(alpha old, local), alpha 0.8; then
 * lambda global - (1 - lambda) R / max R, lambda 0.5, R as R-KV's. Global scores move with their slots. smooth=1 is
 * alpha old + (1 - alpha) local, smooth=2 alpha old + local. There every 128 tokens (+schedule=every:128). */
#include "policy/policy.h"

#include <math.h>

enum { SMOOTH_MAX = 0, SMOOTH_MEAN = 1, SMOOTH_SUM = 2 };

static const kvs_param_info params_info[] = {
    {"alpha", "what is left of the old score at each eviction", 0.8, 0, 1},
    {"lambda", "weight of attention against redundancy", 0.5, 0, 1},
    {"window", "newest rows, which stay", 16, 1, KVS_POLICY_WINDOW_MAX},
    {"kernel", "slots of which the largest score counts, odd", 1, 1, 1023},
    {"smooth", "0 the larger of old and new, 1 their mean, 2 their sum", 0, 0, 2},
    {"norm", "1: new scores are divided by the largest", 1, 0, 1},
};

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[2];
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    return n_slots + kvs_key_redundancy_work(n_slots, head_dim);
}

static void divide_by_largest(float *x, uint32_t n)
{
    float most = 0;
    for (uint32_t i = 0; i < n; i++)
        most = x[i] > most ? x[i] : most;
    for (uint32_t i = 0; most > 0 && i < n; i++)
        x[i] /= most;
}

/* A slot that no eviction has seen has no old score. */
static float smooth(const double *params, float old, float local)
{
    const float alpha = (float)params[0];
    switch ((int)params[4]) {
    case SMOOTH_MEAN:
        return old == 0 ? local : alpha * old + (1 - alpha) * local;
    case SMOOTH_SUM:
        return alpha * old + local;
    default:
        return alpha * old > local ? alpha * old : local;
    }
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots - kvs_window_slots(view);
    const float lambda = (float)params[1];
    float *const other = view->work, *const work = other + view->n_slots;
    kvs_window_max(view, scores);
    if (params[5] != 0)
        divide_by_largest(scores, n);
    for (uint32_t i = 0; i < view->n_slots; i++)
        view->carry[i] = i < n ? smooth(params, view->carry[i], scores[i]) : 0;
    kvs_pool_max(view->carry, n, (uint32_t)params[3] | 1u, scores);
    if (lambda < 1) {
        kvs_key_redundancy(view, 0.5f, other, work);
        if (params[5] != 0)
            divide_by_largest(other, n);
        for (uint32_t i = 0; i < n; i++)
            scores[i] = lambda * scores[i] - (1 - lambda) * other[i];
    }
    for (uint32_t i = n; i < view->n_slots; i++)
        scores[i] = INFINITY;
}

const kvs_policy_ops kvs_policy_g_kv = {
    .abi = KVS_POLICY_ABI,
    .name = "g-kv",
    .doc = "what the newest rows attend to, remembered with decay, less how much a key repeats others",
    .source = "arXiv:2512.00504",
    .exactness = "exact with +schedule=every:128, except: redundancy as R-KV's paper has it",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_WINDOW | KVS_POLICY_NEEDS_KEYS | KVS_POLICY_NEEDS_CARRY,
    .params = params_info,
    .n_params = 6,
    .signed_scores = true,
    .score = score,
    .window_of = window_of,
    .work_of = work_of,
};

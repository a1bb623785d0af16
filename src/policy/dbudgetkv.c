/* DBudgetKV (later ReFreeKV): sinks and as many of the newest slots as it takes until the rest has hardly any attention: no budget
 * of its own. Source: arXiv:2502.16886: slots in a fixed order (the first m, then from the newest back); of the mean attention of
 * the last k rows, F_i is the root of the sum of squares of the first i; the smallest i with 1 - F_i / F < T stays; the
 * first two layers are left alone. T = 0.01, m = 4, k = 1. The group's heads are averaged (the paper pads heads of a batch).
 * A session's budget caps it: past that it is sinks and the newest. */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"threshold", "share of the attention's norm that may be lost (T)", 0.01, 0, 1},
    {"sinks", "first tokens that come first (m)", 4, 0, 1e6},
    {"rows", "newest rows whose attention counts (k)", 1, 1, KVS_POLICY_WINDOW_MAX},
    {"skip", "lowest layers that are left alone", 2, 0, 1e6},
};

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[2];
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)head_dim;
    return n_slots;
}

/* What the order puts before: sinks, what stays, what goes. */
enum { GOES = 0, STAYS = 1, SINK = 2 };

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots;
    float *const mean = view->work;
    uint32_t n_sinks = 0;
    while (n_sinks < n && view->pos[n_sinks] < (int32_t)params[1])
        n_sinks++;
    /* Mean over the rows that could see the slot. */
    kvs_window_mean(view, mean);
    double all = 0, so_far = 0;
    for (uint32_t i = 0, first = 0; i < n; i++) {
        while (first < view->n_window && view->window_pos[first] < view->pos[i])
            first++;
        const uint32_t n_rows = view->n_window - first;
        mean[i] = n_rows == 0 ? 0 : mean[i] * ((float)view->n_window / (float)n_rows);
        all += (double)mean[i] * (double)mean[i];
    }
    const bool skip = view->layer < (uint32_t)params[3];
    bool enough = false;
    for (uint32_t k = 0; k < n; k++) {
        const uint32_t i = k < n_sinks ? k : n - 1 - (k - n_sinks);
        scores[i] = k < n_sinks ? SINK : enough ? GOES : STAYS;
        so_far += (double)mean[i] * (double)mean[i];
        enough = enough || (!skip && all > 0 && 1 - sqrt(so_far / all) < params[0]);
    }
}

static uint32_t target_by_score(const double *params, const kvs_policy_view *view, const float *scores,
                                uint32_t n_default)
{
    (void)params;
    uint32_t n = 0;
    for (uint32_t i = 0; i < view->n_slots; i++)
        n += scores[i] > GOES;
    return kvs_min_u32(n, n_default);
}

const kvs_policy_ops kvs_policy_dbudgetkv = {
    .abi = KVS_POLICY_ABI,
    .name = "dbudgetkv",
    .doc = "sinks and as many of the newest as hold nearly all attention",
    .source = "arXiv:2502.16886",
    .exactness = "exact below the budget with +protect=none +schedule=after_prefill; the budget caps it",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_WINDOW,
    .params = params_info,
    .n_params = 4,
    .score = score,
    .target_by_score = target_by_score,
    .window_of = window_of,
    .work_of = work_of,
};

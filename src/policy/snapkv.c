/* SnapKV: the mean attention that the newest rows (the observation window) give each slot, smoothed over neighbours; the
 * window itself stays. Source: Li et al., arXiv:2404.14469; window 64, average pooling of 5 and the mean over the group's heads
 * as kvpress's SnapKVPress (the paper's repository: window 32, kernel 5 to 7, average or maximum). */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"window", "rows of the observation window", 64, 1, KVS_POLICY_WINDOW_MAX},
    {"kernel", "slots pooled, odd", 5, 1, 1023},
    {"max", "1: the largest of the neighbours instead of their mean", 0, 0, 1},
};

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[0];
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)head_dim;
    return n_slots;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    /* The window's own slots take no part in the pooling, as in kvpress: they are kept, not compared. */
    const uint32_t n_window = kvs_window_slots(view), n = view->n_slots - n_window;
    const uint32_t kernel = (uint32_t)params[1] | 1u;
    kvs_window_mean(view, view->work);
    if (params[2] != 0)
        kvs_pool_max(view->work, n, kernel, scores);
    else
        kvs_pool_average(view->work, n, kernel, scores);
    for (uint32_t i = n; i < view->n_slots; i++)
        scores[i] = INFINITY;
}

const kvs_policy_ops kvs_policy_snapkv = {
    .abi = KVS_POLICY_ABI,
    .name = "snapkv",
    .doc = "what the newest rows attend to, smoothed over neighbours",
    .source = "arXiv:2404.14469",
    .exactness = "exact with +protect=none +schedule=after_prefill; in a budget the window is the newest rows that ran",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_WINDOW,
    .params = params_info,
    .n_params = 3,
    .score = score,
    .window_of = window_of,
    .work_of = work_of,
};

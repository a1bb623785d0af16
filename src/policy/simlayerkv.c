/* SimLayerKV: layers whose newest queries look at little but the first and the newest tokens keep only those. Source: Zhang
 * et al., arXiv:2410.13846 and kvpress's SimLayerKVPress: a layer is lazy where the mean over heads and the last rows of
 * the attention on the first 4 and the newest 1,024 slots is over a threshold. kvpress has no default for it; 0.9 is
 * ours. A session's budget caps the others: past it they too are the first and the newest. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"threshold", "attention on first and newest above which a layer is lazy; 1: none is", 0.9, 0, 1},
    {"initial", "first tokens that stay", 4, 0, 1e6},
    {"recent", "newest slots that stay", 1024, 1, 1e6},
    {"rows", "newest rows whose attention counts", 1, 1, KVS_POLICY_WINDOW_MAX},
};

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[3];
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)head_dim;
    return n_slots;
}

#define STAYS 2.0f

static bool stays(const double *params, const kvs_policy_view *view, uint32_t i)
{
    return view->pos[i] < (int32_t)params[1] || i + (uint32_t)params[2] >= view->n_slots;
}

/* What is between first and newest gets the attention that it has all together: averaged over the heads of a layer it is
 * what the layer's laziness goes by, and among themselves these slots tie. */
static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots;
    double between = 0;
    kvs_window_mean(view, view->work);
    for (uint32_t i = 0; i < n; i++)
        between += stays(params, view, i) ? 0 : (double)view->work[i];
    for (uint32_t i = 0; i < n; i++)
        scores[i] = stays(params, view, i) ? STAYS : (float)between;
}

static uint32_t target_by_score(const double *params, const kvs_policy_view *view, const float *scores,
                                uint32_t n_default)
{
    uint32_t n = 0;
    bool lazy = false;
    for (uint32_t i = 0; i < view->n_slots; i++) {
        n += scores[i] == STAYS;
        lazy = lazy || (scores[i] != STAYS && 1 - (double)scores[i] > params[0]);
    }
    return kvs_min_u32(lazy ? n : view->n_slots, n_default);
}

const kvs_policy_ops kvs_policy_simlayerkv = {
    .abi = KVS_POLICY_ABI,
    .name = "simlayerkv",
    .doc = "layers that look at little but the first and the newest keep only those",
    .source = "arXiv:2410.13846",
    .exactness =
        "exact below the budget with +protect=none +schedule=after_prefill, threshold ours; the budget caps it",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_LAYER,
    .needs = KVS_POLICY_NEEDS_WINDOW,
    .params = params_info,
    .n_params = 4,
    .score = score,
    .target_by_score = target_by_score,
    .window_of = window_of,
    .work_of = work_of,
};

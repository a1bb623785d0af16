/* TOVA: what the newest query attends to, averaged over the heads of a layer, one set a layer. Source: Oren et al.,
 * arXiv:2401.06104 and its repository (tova_cache.py): no window, no sinks, and the newest slot may go like any other;
 * last=1 keeps it, as kvpress's TOVAPress. */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"last", "1: the newest slot stays whatever its attention (kvpress)", 0, 0, 1},
};

static uint32_t window_of(const double *params)
{
    (void)params;
    return 1;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    kvs_window_mean(view, scores);
    if (params[0] != 0)
        scores[view->n_slots - 1] = INFINITY;
}

const kvs_policy_ops kvs_policy_tova = {
    .abi = KVS_POLICY_ABI,
    .name = "tova",
    .doc = "what the newest query attends to, one set a layer",
    .source = "arXiv:2401.06104",
    .exactness = "exact with +protect=none +schedule=step; else several slots go by one query",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_LAYER,
    .needs = KVS_POLICY_NEEDS_WINDOW,
    .params = params_info,
    .n_params = 1,
    .score = score,
    .window_of = window_of,
};

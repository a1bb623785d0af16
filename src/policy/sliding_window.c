/* Keep the newest share. Source: arXiv 2511.04686's script, "SlidingWindowSimple" (keep_ratio 0.7). */
#include "policy/policy.h"

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = (float)i;
}

const kvs_policy_ops kvs_policy_sliding_window = {
    .abi = KVS_POLICY_ABI,
    .name = "sliding_window",
    .doc = "keep the newest share",
    .source = "arXiv:2511.04686",
    .exactness = "exact with +protect=none; protects sinks, system prompt and markers by default",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_SHARED,
    .keep = "0.7",
    .score = score,
};

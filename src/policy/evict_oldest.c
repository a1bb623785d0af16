/* Drop the oldest share of the cache. Source: arXiv 2511.04686's script, "EvictOldest" (discard_prefix_ratio 0.25), which
 * drops the sinks too: +protect=none or --paper-compat gives that; by default sinks, system prompt and markers stay. */
#include "policy/policy.h"

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = (float)i;
}

const kvs_policy_ops kvs_policy_evict_oldest = {
    .abi = KVS_POLICY_ABI,
    .name = "evict_oldest",
    .doc = "drop the oldest quarter",
    .source = "arXiv:2511.04686",
    .exactness = "exact with +protect=none; protects sinks, system prompt and markers by default",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_SHARED,
    .keep = "0.75",
    .score = score,
};

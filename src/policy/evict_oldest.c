/* Drop the oldest share of the cache. Source: arXiv 2511.04686's script, "EvictOldest" (discard_prefix_ratio 0.25), which
 * drops the sinks too: +protect=none or --paper-compat gives that; by default sinks, system prompt and markers stay. */
#include "policy/policy.h"

#include <math.h>

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = (float)i;
}

/* The script counts what it drops, floor(n * 0.25), where the others count what they keep: 10 slots leave 8, not 7.
 * The share dropped is rounded to 12 digits, since 1 - 0.9 is a little below 0.1. */
static uint32_t target(const double *params, const kvs_policy_view *view, uint32_t n_default)
{
    const double keep_share = params[0]; /* behind the preset's own parameters: none */
    if (keep_share <= 0)
        return n_default;
    const double discard = floor((1.0 - keep_share) * 1e12 + 0.5) / 1e12;
    return view->n_slots - (uint32_t)(view->n_slots * discard);
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
    .target = target,
};

/* The full cache: never evicts. What does not fit its budget is an error that names the tokens, not an eviction.
 * Source: arXiv 2511.04686, "Baseline". */
#include "policy/policy.h"

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = 0.0f;
}

const kvs_policy_ops kvs_policy_baseline = {
    .abi = KVS_POLICY_ABI,
    .name = "baseline",
    .doc = "keep everything",
    .source = "arXiv:2511.04686",
    .exactness = "exact",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_SHARED,
    .never_evicts = true,
    .score = score,
};

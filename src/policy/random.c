/* Keep a uniformly random share: the control that shows what a scorer is worth. Source: arXiv 2511.04686's script, "Random"
 * (keep_ratio 0.7). The draw depends on (seed, event, pos) only, so all heads keep the same set. */
#include "policy/policy.h"

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = (float)(kvs_hash3(view->seed, view->event, (uint64_t)view->pos[i]) >> 40);
}

const kvs_policy_ops kvs_policy_random = {
    .abi = KVS_POLICY_ABI,
    .name = "random",
    .doc = "keep a uniformly random share",
    .source = "arXiv:2511.04686",
    .exactness = "exact with +protect=none, apart from the generator",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_SHARED,
    .keep = "0.7",
    .score = score,
};

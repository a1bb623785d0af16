/* KVzip: a slot matters if the model attends to it while it is made to repeat the context. Source: Kim et al.,
 * arXiv:2505.23416 and its repository: the largest attention that any row of the repetition and any head of the group gives
 * the slot; one threshold over all layers and heads. */
#include "policy/policy.h"

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    const uint32_t n = view->n_slots;
    for (uint32_t i = 0; i < n; i++) {
        scores[i] = view->probe[i];
        for (uint32_t g = 1; g < view->group; g++) {
            const float p = view->probe[(size_t)g * n + i];
            scores[i] = p > scores[i] ? p : scores[i];
        }
    }
}

const kvs_policy_ops kvs_policy_kvzip = {
    .abi = KVS_POLICY_ABI,
    .name = "kvzip",
    .doc = "what the model attends to while it repeats the context",
    .source = "arXiv:2505.23416",
    .exactness = "exact for one eviction of a whole context; later ones repeat what the fullest head still holds",
    .schedule = "full",
    .position = "keep",
    .probe = "repeat",
    .budget = "global",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_PROBE,
    .score = score,
};

/* Keys of small norm are the ones that get attention: keep those. Source: Devoto et al., arXiv:2406.11430 and kvpress's
 * KnormPress: score -|k|_2. Layers 0 and 1 keep everything in its repository, which is +budget=skip here; kvpress skips none. */
#include "policy/policy.h"

#include <math.h>

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    const uint32_t dh = view->head_dim;
    for (uint32_t i = 0; i < view->n_slots; i++) {
        float sum = 0;
        for (uint32_t d = 0; d < dh; d++)
            sum += view->keys[(size_t)i * dh + d] * view->keys[(size_t)i * dh + d];
        scores[i] = -sqrtf(sum);
    }
}

const kvs_policy_ops kvs_policy_knorm = {
    .abi = KVS_POLICY_ABI,
    .name = "knorm",
    .doc = "keys of small norm",
    .source = "arXiv:2406.11430",
    .exactness = "exact with +protect=none; its repository leaves two layers alone: +budget=skip",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_KEYS,
    .signed_scores = true,
    .score = score,
};

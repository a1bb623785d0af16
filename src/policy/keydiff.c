/* KeyDiff: keys least like the mean direction of all keys stay. Source: Park et al., arXiv:2504.15364 and kvpress's
 * KeyDiffPress: score -cos(k, anchor), anchor the mean of the unit keys as they stand (rotated). A key of norm 0 has
 * cosine 0, as there. */
#include "policy/policy.h"

#include <math.h>

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    return (size_t)n_slots + head_dim;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    const uint32_t n = view->n_slots, dh = view->head_dim;
    float *const anchor = view->work, *const inverse = view->work + dh;
    for (uint32_t d = 0; d < dh; d++)
        anchor[d] = 0;
    for (uint32_t i = 0; i < n; i++) {
        const float *const key = view->keys + (size_t)i * dh;
        float square = 0;
        for (uint32_t d = 0; d < dh; d++)
            square += key[d] * key[d];
        inverse[i] = square > 0 ? 1.0f / sqrtf(square) : 0.0f;
        for (uint32_t d = 0; d < dh; d++)
            anchor[d] += key[d] * inverse[i];
    }
    float square = 0; /* the anchor's length divides out: its sum serves as well as its mean */
    for (uint32_t d = 0; d < dh; d++)
        square += anchor[d] * anchor[d];
    const float scale = square > 0 ? 1.0f / sqrtf(square) : 0.0f;
    for (uint32_t i = 0; i < n; i++) {
        float dot = 0;
        for (uint32_t d = 0; d < dh; d++)
            dot += view->keys[(size_t)i * dh + d] * anchor[d];
        scores[i] = -(dot * inverse[i] * scale);
    }
}

const kvs_policy_ops kvs_policy_keydiff = {
    .abi = KVS_POLICY_ABI,
    .name = "keydiff",
    .doc = "keys least like the mean of all",
    .source = "arXiv:2504.15364",
    .exactness = "exact with +protect=none",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_KEYS,
    .signed_scores = true,
    .score = score,
    .work_of = work_of,
};

/* CriticalKV: half of what stays goes by the base score, the other half by that score times the L1 norm of what the value becomes
 * behind the output projection. Source: Feng et al., arXiv:2502.03805 and kvpress's CriticalKVPress: first stage 0.5, epsilon
 * 1e-4, the norm's mean over the group's heads. With AdaKV's sharing out (CriticalAdaKV) each head's own share is halved. */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"first", "share of what stays that goes by the base score alone", 0.5, 0, 1},
    {"epsilon", "added to the base score before it is multiplied", 1e-4, 0, 1},
};

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)head_dim;
    return n_slots;
}

static void rescore(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots;
    const uint32_t n_first = kvs_min_u32(n, (uint32_t)(params[0] * view->n_keep));
    uint32_t *const keys = (uint32_t *)(void *)view->work, n_ties = 0;
    for (uint32_t i = 0; i < n; i++)
        keys[i] = kvs_score_key(scores[i]);
    const uint32_t least = n_first == 0 ? UINT32_MAX : kvs_kth_largest(keys, n, n_first, &n_ties);
    for (uint32_t i = n; i-- > 0;) {
        const bool tie = keys[i] == least && n_ties > 0;
        n_ties -= tie;
        float norm = 0;
        for (uint32_t g = 0; g < view->group; g++)
            norm += view->out_norm[(size_t)g * n + i];
        scores[i] = keys[i] > least || tie ? INFINITY : (scores[i] + (float)params[1]) * (norm / (float)view->group);
    }
}

const kvs_rescore_ops kvs_rescore_critical = {
    .info = {.name = "critical",
             .doc = "half of the room by what the values become behind the output projection",
             .source = "arXiv:2502.03805",
             .exactness = "exact for scores that are not negative",
             .params = params_info,
             .n_params = 2},
    .needs = KVS_POLICY_NEEDS_OUT_NORM,
    .after_budget = true,
    .rescore = rescore,
    .work_of = work_of,
};

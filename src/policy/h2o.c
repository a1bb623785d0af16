/* H2O: heavy hitters by the attention mass they received so far, and the newest. Source: Zhang et al., arXiv:2306.14048;
 * half of what stays is recent, as there (recent=0.5). norm=1 divides by the number of queries that could see the slot.
 * Below it kvpress's ObservedAttentionPress, which is that with recent=0. */
#include "policy/policy.h"

#include <math.h>

#define H2O_PARAMS(recent, norm)                                                                                       \
    {                                                                                                                  \
        {"recent", "share of what stays that is the newest", recent, 0, 1},                                            \
            {"norm", "1: divided by the number of queries that could see the slot", norm, 0, 1},                       \
    }
static const kvs_param_info heavy[] = H2O_PARAMS(0.5, 0), observed[] = H2O_PARAMS(0, 1);

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots, n_recent = (uint32_t)(params[0] * view->n_keep);
    for (uint32_t i = 0; i < n; i++) {
        const float seen = params[1] != 0 ? (float)(view->n_tokens - view->pos[i]) : 1.0f;
        scores[i] = i + n_recent >= n ? INFINITY : view->mass_sum[i] / seen;
    }
}

const kvs_policy_ops kvs_policy_h2o = {
    .abi = KVS_POLICY_ABI,
    .name = "h2o",
    .doc = "heavy hitters by attention received so far, and the newest",
    .source = "arXiv:2306.14048",
    .exactness = "exact with +protect=none; evicts a chunk at a time instead of a token at a time (+schedule=step)",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_MASS_SUM,
    .params = heavy,
    .n_params = 2,
    .score = score,
};

const kvs_policy_ops kvs_policy_observed_attention = {
    .abi = KVS_POLICY_ABI,
    .name = "observed_attention",
    .doc = "the mean attention received from the queries that could see the slot",
    .source = "NVIDIA/kvpress ObservedAttentionPress",
    .exactness = "exact with +protect=none +schedule=after_prefill",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_MASS_SUM,
    .params = observed,
    .n_params = 2,
    .score = score,
};

/* BaKlaVa over StreamingLLM: a fixed share for each KV head from a profile (budget_baklava.c), in which the first slots
 * and the newest stay. Source: Gulhan et al., arXiv:2502.13176. Any other scorer: +budget=baklava:file=PATH. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"sinks", "tokens kept at the start", 4, 0, 1e6},
};

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    kvs_score_streaming((uint32_t)params[0], view, scores);
}

const kvs_policy_ops kvs_policy_baklava = {
    .abi = KVS_POLICY_ABI,
    .name = "baklava",
    .doc = "sinks and the newest, as many in each head as a profile says; needs file=PATH",
    .source = "arXiv:2502.13176",
    .exactness = "reconstructed: head inputs, classes and search grid of the profile are ours",
    .schedule = "full",
    .position = "keep",
    .budget = "baklava",
    .scope = KVS_SCOPE_HEAD,
    .params = params_info,
    .n_params = 1,
    .score = score,
};

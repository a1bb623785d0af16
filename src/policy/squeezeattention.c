/* SqueezeAttention over StreamingLLM: which layers get how much is the budget stage's (budget_squeeze.c), what a layer
 * keeps is the first slots and the newest. Source: Wang et al., arXiv:2404.04793, whose inner policy is free; it takes
 * sliding windows, StreamingLLM or H2O, by model. Any other scorer: +budget=squeeze. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"sinks", "tokens kept at the start", 4, 0, 1e6},
};

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    kvs_score_streaming((uint32_t)params[0], view, scores);
}

const kvs_policy_ops kvs_policy_squeezeattention = {
    .abi = KVS_POLICY_ABI,
    .name = "squeezeattention",
    .doc = "sinks and the newest; layers that change the hidden state least keep fewer",
    .source = "arXiv:2404.04793",
    .exactness = "groups of layers from all rows so far, not the first prompt's; the best three groups",
    .schedule = "full",
    .position = "keep",
    .budget = "squeeze:p=0.38",
    .scope = KVS_SCOPE_LAYER,
    .params = params_info,
    .n_params = 1,
    .score = score,
};

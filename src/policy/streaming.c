/* Keep the first tokens (attention sinks) and the newest, drop what lies between.
 * Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453. The paper assigns
 * positions within the cache, which is mode rerotate, the default here. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"sinks", "tokens kept at the start", 4, 0, 1e6},
};

void kvs_score_streaming(uint32_t n_sinks, const kvs_policy_view *view, float *scores)
{
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = view->pos[i] < (int32_t)n_sinks ? 2e9f : (float)i;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    kvs_score_streaming((uint32_t)params[0], view, scores);
}

const kvs_policy_ops kvs_policy_streaming = {
    .abi = KVS_POLICY_ABI,
    .name = "streaming",
    .doc = "attention sinks and the newest tokens",
    .source = "arXiv:2309.17453",
    .exactness = "exact with +protect=none; evicts a chunk at a time instead of a token at a time",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_SHARED,
    .params = params_info,
    .n_params = 1,
    .score = score,
};

/* KVCompose: each head keeps its own best tokens by what the repeated context attends to; layers share the room by the curve
 * of their heads' ranked scores. Source: arXiv:2509.05165 as kvpress's KVComposePress: per query head the largest
 * attention of any row, its mean over the group, plus the mean over the KV heads of the layer. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"add_mean", "1: plus the mean over the KV heads of the layer", 1, 0, 1},
};

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    const uint32_t n = view->n_slots;
    for (uint32_t i = 0; i < n; i++) {
        float sum = 0;
        for (uint32_t g = 0; g < view->group; g++)
            sum += view->probe[(size_t)g * n + i];
        scores[i] = sum / (float)view->group;
    }
}

/* Heads that hold other tokens than the first one cannot be averaged slot by slot: they stay as they are. */
static void score_layer(const double *params, const kvs_policy_view *views, float *const *scores)
{
    const uint32_t n_heads = views->n_kv_heads, n = views->n_slots;
    for (uint32_t h = 1; h < n_heads; h++)
        if (views[h].n_slots != n)
            return;
    for (uint32_t i = 0; params[0] != 0 && i < n; i++) {
        float sum = 0;
        for (uint32_t h = 0; h < n_heads; h++)
            sum += scores[h][i];
        for (uint32_t h = 0; h < n_heads; h++)
            scores[h][i] += sum / (float)n_heads;
    }
}

const kvs_policy_ops kvs_policy_kvcompose = {
    .abi = KVS_POLICY_ABI,
    .name = "kvcompose",
    .doc = "what the context attends to when it is said again, layers sharing by ranks",
    .source = "arXiv:2509.05165",
    .exactness =
        "exact for one eviction of a whole context; the mean over heads is left out where they hold different tokens",
    .schedule = "full",
    .position = "keep",
    .probe = "context",
    .budget = "composite",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_PROBE,
    .params = params_info,
    .n_params = 1,
    .score = score,
    .score_layer = score_layer,
};

const kvs_policy_ops kvs_policy_kvcompose_ragged = {
    .abi = KVS_POLICY_ABI,
    .name = "kvcompose-ragged",
    .doc = "the same, each head keeping as many as its scores deserve",
    .source = "arXiv:2509.05165",
    .exactness =
        "exact for one eviction of a whole context; the mean over heads is left out where they hold different tokens",
    .schedule = "full",
    .position = "keep",
    .probe = "context",
    .budget = "global",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_PROBE,
    .params = params_info,
    .n_params = 1,
    .score = score,
    .score_layer = score_layer,
};

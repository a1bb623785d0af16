/* Gist, recent, and between them what the latest forward attended to most. Source: arXiv 2511.04686's script,
 * "SlidingWindowGistAttentive" (keep 0.9, gist 512, recent 2048); if gist and recent already exceed the target, recency
 * comes first, then the gist's prefix. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"gist", "tokens kept at the start", 512, 0, 1e9},
    {"recent", "newest tokens kept", 2048, 0, 1e9},
};

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const double n = view->n_slots;
    for (uint32_t i = 0; i < view->n_slots; i++) {
        if (i >= n - params[1])
            scores[i] = 2e9f + (float)i * 256.0f; /* recency first */
        else if ((double)i < params[0])
            scores[i] = 1e9f - (float)i * 64.0f;
        else
            scores[i] = view->mass_sum[i];
    }
}

const kvs_policy_ops kvs_policy_sliding_window_gist_attentive = {
    .abi = KVS_POLICY_ABI,
    .name = "sliding_window_gist_attentive",
    .doc = "gist, recent, and the most attended tokens between",
    .source = "arXiv:2511.04686",
    .exactness =
        "exact with +protect=none; before a turn, without scores, the script draws at random and this skips the check",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_SHARED,
    .needs = KVS_POLICY_NEEDS_MASS_LAST,
    .keep = "0.9",
    .params = params_info,
    .n_params = 2,
    .score = score,
};

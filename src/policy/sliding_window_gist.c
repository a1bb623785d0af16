/* Keep the first `gist` tokens and the newest `recent`. Source: arXiv 2511.04686, "SlidingWindowGist"; the paper's run is
 * gist 2000, recent 0. No-op while gist + recent hold all there is. First means first in the cache, as in the script. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"gist", "tokens kept at the start", 2000, 0, 1e9},
    {"recent", "newest tokens kept", 0, 0, 1e9},
};

/* Gist outranks recent, and within both the end that the window is anchored to outranks the other, so that a target
 * below gist + recent (the budget is smaller) shortens the recent window first. */
static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const double gist = params[0];
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = (double)i < gist ? 1.2e7f - (float)i : (float)i;
}

static uint32_t target(const double *params, const kvs_policy_view *view, uint32_t n_default)
{
    (void)n_default;
    const double want = params[0] + params[1];
    if (want < 1)
        return 1; /* both 0: the script keeps the last token */
    return want > view->n_slots ? view->n_slots : (uint32_t)want;
}

const kvs_policy_ops kvs_policy_sliding_window_gist = {
    .abi = KVS_POLICY_ABI,
    .name = "sliding_window_gist",
    .doc = "the first tokens (gist) and the newest",
    .source = "arXiv:2511.04686",
    .exactness = "exact with +protect=none",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_SHARED,
    .params = params_info,
    .n_params = 2,
    .score = score,
    .target = target,
};

/* SAGE-KV: sinks, what the last query attends to most, and the newest. Source: Wang et al., arXiv:2503.08879: after the prompt
 * one choice a head by the last token's attention; sinks and recent tokens are kept beside it. Sizes are not given there as
 * shares: recent=0.5 is ours, sinks 4 as a public fork. The group's heads are averaged (reduce=1: their maximum), which the
 * paper leaves open. Every eviction scores anew, where the paper afterwards only lets the recent part slide: a
 * conversation has more than one prompt. */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"sinks", "first tokens that stay", 4, 0, 1e6},
    {"recent", "share of what stays that is the newest", 0.5, 0, 1},
    {"reduce", "the group's heads: 0 their mean, 1 their maximum", 0, 0, 1},
};

static uint32_t window_of(const double *params)
{
    (void)params;
    return 1;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots, n_recent = (uint32_t)(params[1] * view->n_keep);
    if (params[2] != 0)
        kvs_window_max(view, scores);
    else
        kvs_window_mean(view, scores);
    for (uint32_t i = 0; i < n; i++)
        if (view->pos[i] < (int32_t)params[0] || i + n_recent >= n || i + 1 == n)
            scores[i] = INFINITY;
}

const kvs_policy_ops kvs_policy_sage_kv = {
    .abi = KVS_POLICY_ABI,
    .name = "sage-kv",
    .doc = "sinks, what the last query attends to most, and the newest",
    .source = "arXiv:2503.08879",
    .exactness = "exact rule, reconstructed sizes; every eviction scores anew",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_WINDOW,
    .params = params_info,
    .n_params = 3,
    .score = score,
    .window_of = window_of,
};

/* Lookahead Q-Cache: a few tokens are generated on a cheaply compressed cache and thrown away; what their queries attend
 * to stays. Source: arXiv:2505.20334 and its repository: 8 lookahead rows, sums smoothed by the largest of 7 neighbours;
 * stage one keeps by the window of 32 rows before. LAQ++ adds the last 8 prompt rows to the judges and keeps them. Heads of a group are
 * summed (the repository keeps a set for each query head). */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"window", "prompt rows that judge too, and stay", 0, 0, 128},
    {"kernel", "slots pooled, odd", 7, 1, 1023},
    {"first", "rows that judge in the first stage", 32, 1, 128},
};
static const kvs_param_info params_info_pp[] = {
    {"window", "prompt rows that judge too, and stay", 8, 0, 128},
    {"kernel", "slots pooled, odd", 7, 1, 1023},
    {"first", "rows that judge in the first stage", 32, 1, 128},
};

static uint32_t window_of(const double *params)
{
    return (uint32_t)(params[2] > params[0] ? params[2] : params[0]);
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)head_dim;
    return n_slots;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots;
    uint32_t n_ahead = 0; /* rows beyond what was said: the second stage */
    while (n_ahead < view->n_window && view->window_pos[view->n_window - 1 - n_ahead] >= view->n_tokens)
        n_ahead++;
    const uint32_t n_judges =
        kvs_min_u32(view->n_window, n_ahead > 0 ? n_ahead + (uint32_t)params[0] : (uint32_t)params[2]);
    const uint32_t begin = (view->n_window - n_judges) * view->group, end = view->n_window * view->group;
    for (uint32_t i = 0; i < n; i++)
        view->work[i] = 0;
    for (uint32_t r = begin; r < end; r++)
        for (uint32_t i = 0; i < n; i++)
            view->work[i] += view->window_prob[(size_t)r * n + i];
    const uint32_t n_kept = n_ahead > 0 ? (uint32_t)params[0] : (uint32_t)params[2];
    const uint32_t n_free = n > n_kept ? n - n_kept : 0;
    kvs_pool_max(view->work, n_free, (uint32_t)params[1] | 1u, scores);
    for (uint32_t i = n_free; i < n; i++)
        scores[i] = INFINITY;
}

#define LAQ(symbol, text, params_of)                                                                                   \
    const kvs_policy_ops symbol = {                                                                                    \
        .abi = KVS_POLICY_ABI,                                                                                         \
        .name = text,                                                                                                  \
        .doc = "what a few generated and discarded tokens attend to",                                                  \
        .source = "arXiv:2505.20334",                                                                                  \
        .exactness = "exact with +protect=none +schedule=after_prefill, apart from one set a group of query heads",    \
        .schedule = "full",                                                                                            \
        .position = "keep",                                                                                            \
        .probe = "lookahead",                                                                                          \
        .scope = KVS_SCOPE_HEAD,                                                                                       \
        .needs = KVS_POLICY_NEEDS_WINDOW,                                                                              \
        .params = params_of,                                                                                           \
        .n_params = 3,                                                                                                 \
        .score = score,                                                                                                \
        .window_of = window_of,                                                                                        \
        .work_of = work_of,                                                                                            \
    }

LAQ(kvs_policy_laq, "laq", params_info);
LAQ(kvs_policy_laqpp, "laq++", params_info_pp);

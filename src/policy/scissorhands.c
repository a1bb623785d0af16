/* Scissorhands: slots to which many of the newest queries give less than an even share of attention go first. Source: Liu et
 * al., arXiv:2305.17118, algorithm 2: over a history of w queries it counts how often a token's attention is below 1/t, never
 * drops the newest r, and drops those with the highest counts. r = 10 as there; its w = 400 is over the longest window here
 * (256). t is the number of slots that the query sees. Counts of the group's query heads are added up. Its unequal budgets of
 * layers are left out (+budget=pyramid has others). Equal counts keep the newer. */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"history", "newest queries that count (w)", 256, 1, 256},
    {"recent", "newest slots that stay (r)", 10, 0, 1e6},
};

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[0];
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots, n_recent = (uint32_t)params[1];
    for (uint32_t i = 0; i < n; i++)
        scores[i] = 0;
    for (uint32_t r = 0; r < view->n_window; r++) {
        uint32_t n_seen = 0;
        while (n_seen < n && view->pos[n_seen] <= view->window_pos[r])
            n_seen++;
        const float even = 1.0f / (float)kvs_max_u32(n_seen, 1);
        for (uint32_t g = 0; g < view->group; g++) {
            const float *const p = view->window_prob + ((size_t)r * view->group + g) * n;
            for (uint32_t i = 0; i < n_seen; i++)
                scores[i] -= p[i] < even ? 1.0f : 0.0f;
        }
    }
    for (uint32_t i = n > n_recent ? n - n_recent : 0; i < n; i++)
        scores[i] = INFINITY;
}

const kvs_policy_ops kvs_policy_scissorhands = {
    .abi = KVS_POLICY_ABI,
    .name = "scissorhands",
    .doc = "slots that many of the newest queries give less than an even share go first",
    .source = "arXiv:2305.17118",
    .exactness =
        "exact with +protect=none, except: history of 256 queries instead of 400, equal budgets for all layers",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_WINDOW,
    .params = params_info,
    .n_params = 2,
    .signed_scores = true,
    .score = score,
    .window_of = window_of,
};

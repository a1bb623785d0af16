/* EpiCache's block prefill: whenever the cache is full, a slot is worth the largest attention that any row of a patched
 * prompt and any head of the group gives it; the heads of a layer share its room by one threshold. Source: Kim et al.,
 * arXiv:2509.17396 and its repository (level "pair"; "uniform" is +budget=uniform). Rows share their attention over the
 * cached keys alone. This is one episode without words of its own; src/session/episodes.c makes several out of a history,
 * gives each its words, and sends a question to the nearest.
 * Not as there: first tokens, system prompt and markers are protected (+protect=none lifts that), and a block is a chunk
 * of the budget, not 2,048 tokens. */
#include "policy/policy.h"

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    const uint32_t n = view->n_slots;
    for (uint32_t i = 0; i < n; i++)
        scores[i] = view->probe[i];
    for (uint32_t g = 1; g < view->group; g++) {
        const float *const from = view->probe + (size_t)g * n;
        for (uint32_t i = 0; i < n; i++)
            scores[i] = from[i] > scores[i] ? from[i] : scores[i];
    }
}

const kvs_policy_ops kvs_policy_epicache = {
    .abi = KVS_POLICY_ABI,
    .name = "epicache",
    .doc = "what a request to extract the essential attends to; several episodes: --episodes (docs/epicache.md)",
    .source = "arXiv:2509.17396",
    .exactness =
        "exact for one episode without words, except that sinks, system and markers are protected and that a head "
        "holding less than its even share leaves the rest of it unused",
    .schedule = "full",
    .position = "keep",
    .probe = "extract",
    .budget = "ada:floor=0",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_PROBE,
    .score = score,
};

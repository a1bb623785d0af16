/* Presets whose heads have one of two roles from a file (budget_roles.c): the paper's sinks, window and share. Retrieval
 * heads keep all they hold; where the budget is less than that, the first 4 tokens and the newest (no paper says what
 * then).
 *   duo         Xiao et al., arXiv:2410.10819: sinks 128, recent 256, half of the heads stream (GQA)
 *   prulong     Bhaskar et al., arXiv:2506.17121: sinks 128, recent 1024, 70 % of the heads stream
 *   kvzip-head  Kim et al., arXiv:2505.23416, head level: 60 % of the heads keep all, the others the system prompt (by
 *               +protect=system) and the query, for which the newest 64 stand (reconstructed: turns have no border here) */
#include "policy/policy.h"

enum { SINKS = 4 };

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    kvs_score_streaming(SINKS, view, scores);
}

const kvs_policy_ops kvs_policy_duo = {
    .abi = KVS_POLICY_ABI,
    .name = "duo",
    .doc = "retrieval heads keep all, streaming heads sinks and the newest; needs file=PATH",
    .source = "arXiv:2410.10819",
    .exactness = "roles as the file says; heads are cut at evictions, not at every row",
    .schedule = "full",
    .position = "keep",
    .budget = "roles:share=0.5,sinks=128,recent=256",
    .scope = KVS_SCOPE_HEAD,
    .score = score,
};

const kvs_policy_ops kvs_policy_prulong = {
    .abi = KVS_POLICY_ABI,
    .name = "prulong",
    .doc = "as duo with PruLong's window and share; needs file=PATH",
    .source = "arXiv:2506.17121",
    .exactness = "roles as the file says; heads are cut at evictions, not at every row",
    .schedule = "full",
    .position = "keep",
    .budget = "roles:share=0.7,sinks=128,recent=1024",
    .scope = KVS_SCOPE_HEAD,
    .score = score,
};

const kvs_policy_ops kvs_policy_kvzip_head = {
    .abi = KVS_POLICY_ABI,
    .name = "kvzip-head",
    .doc = "heads that repeating a text needs least keep sinks and the newest only; needs file=PATH",
    .source = "arXiv:2505.23416",
    .exactness = "reconstructed: the newest 64 tokens stand for the query",
    .schedule = "full",
    .position = "keep",
    .budget = "roles:share=0.4,sinks=4,recent=64",
    .scope = KVS_SCOPE_HEAD,
    .score = score,
};

/* Head roles: streaming heads keep the first slots and the newest, retrieval heads share all other room.
 * Sources: DuoAttention, Xiao et al., arXiv:2410.10819 (sinks 128, recent 256; half of the heads stream where KV heads are
 * shared); PruLong, Bhaskar et al., arXiv:2506.17121; KVzip's head level, Kim et al., arXiv:2505.23416. The file has a score for
 * each KV head; the lowest of them stream (equal scores: the lower head), as many as share says, rounded.
 * In a streaming head the first `sinks` slots come before the newest and these before all others, whatever the scorer
 * says; in a retrieval head the scorer chooses where all do not fit. A streaming head never gets more than an even share:
 * in a small budget its newest are fewer. What retrieval heads cannot take, since they hold all they have, stays free.
 * Heads are cut when the schedule evicts, not at every row; a head gets at most 16 even shares. */
#include "policy/budget_deal.h"

#include <math.h>

enum { SHARE_MAX = 16 };
/* Below what is protected (+inf), above what any scorer gives. */
#define SINK   3.3e38f
#define RECENT 3.2e38f

static const kvs_param_info params_info[] = {
    {"share", "part of all heads that stream", 0.5, 0, 1},
    {"sinks", "first slots that a streaming head keeps", 128, 0, 1e6},
    {"recent", "newest slots that a streaming head keeps", 256, 1, 1e6},
};

static const char *const kinds[] = {"duo", "prulong", "kvzip-head", NULL};

static const kvs_profile_want file = {.kinds = kinds,
                                      .doc = "scores of KV heads, by kvasir profile duo or kvzip-head",
                                      .heads = true,
                                      .min = 0,
                                      .max = 1};

/* How many heads come before this one. */
static uint32_t rank_of(const double *score, uint32_t n, uint32_t head)
{
    uint32_t before = 0;
    for (uint32_t h = 0; h < n; h++)
        before += score[h] < score[head] || (h < head && score[h] == score[head]);
    return before;
}

/* ctx: [heads] 1 where the head streams. */
static bool streams(const void *ctx, uint32_t head)
{
    return ((const uint32_t *)ctx)[head] != 0;
}

static double alike(const void *ctx, uint32_t head)
{
    (void)ctx;
    (void)head;
    return 1;
}

static uint32_t stream(const double *params, const kvs_budget_view *v, uint32_t head)
{
    const uint32_t n = v->n_slots[head], n_most = kvs_min_u32(n, v->n_even[head]);
    const uint32_t sinks = kvs_min_u32((uint32_t)params[1], n);
    const uint32_t keep = kvs_min_u32(n_most, sinks + (uint32_t)params[2]);
    float *const scores = v->scores + head * v->stride;
    for (uint32_t i = 0; i < n; i++)
        if ((i < sinks || n - i <= (uint32_t)params[2]) && scores[i] != __builtin_inff())
            scores[i] = i < sinks ? SINK : RECENT;
    return kvs_max_u32(keep, kvs_min_u32(n, v->n_protected[head]));
}

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    const uint32_t n = v->n_layers * v->n_kv_heads;
    const uint32_t n_streaming = (uint32_t)nearbyint(params[0] * n);
    uint32_t *const role = v->keys;
    for (uint32_t h = 0; h < n; h++) {
        role[h] = rank_of(v->profile->heads, n, h) < n_streaming;
        if (role[h])
            n_keep[h] = stream(params, v, h);
    }
    const kvs_budget_deal_plan plan = {.weight = alike, .ctx = role, .share_max = SHARE_MAX, .left_out = streams};
    kvs_budget_deal(v, &plan, n_keep);
}

const kvs_budget_ops kvs_budget_roles = {
    .info = {.name = "roles",
             .doc = "streaming heads keep sinks and recent, retrieval heads share the rest",
             .source = "arXiv:2410.10819",
             .exactness = "exact at an eviction up to 16 even shares a head",
             .params = params_info,
             .n_params = 3},
    .scope = KVS_SCOPE_HEAD,
    .share_max = SHARE_MAX,
    .file = &file,
    .allocate = allocate,
};

/* CaM, cache merging: the value of a slot that goes is shared out over the next kept ones by the toss of a coin,
 * likelier the more attention the slot received beside theirs: p = clamp(A / mean A of those slots, 0, 1), then v
 * / m is added to each of the m. What the m slots weigh in is then the slot's own weight on average. Source: Zhang
 * et al., ICML 2024 (openreview LCTmppB165), in the batched form of kvpress's CAMPress: `next` 32 (the paper's
 * repository: 16), and of what goes the best scored are merged, as many as tokens were said since the last
 * eviction; the rest is dropped (all=1: none is). Deviations: A counts the rows of prompts too, where kvpress
 * counts decoding only; the coin is keyed by (seed, event, layer, head, pos). */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"next", "kept slots that a value is shared out over", 32, 1, 65536},
    {"all", "1: all that goes, 0: at most as many as were said since the last eviction", 0, 0, 1},
};

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)head_dim;
    return 2 * (size_t)n_slots;
}

/* Marks what may be merged: of the slots that go the best scored, ties to the newer. */
static void choose(const double *params, const kvs_policy_view *v, const float *scores, const uint8_t *keep,
                   uint32_t *chosen, uint32_t *keys)
{
    uint32_t n_gone = 0;
    for (uint32_t i = 0; i < v->n_slots; i++) {
        chosen[i] = keep[i] == 0;
        if (chosen[i])
            keys[n_gone++] = kvs_score_key(scores[i]);
    }
    const int64_t n_said = v->n_tokens - v->n_tokens_last;
    if (params[1] != 0 || n_said >= (int64_t)n_gone || n_said <= 0)
        return;
    uint32_t n_ties;
    const uint32_t least = kvs_kth_largest(keys, n_gone, (uint32_t)n_said, &n_ties);
    for (uint32_t i = v->n_slots; i-- > 0;) {
        const uint32_t key = kvs_score_key(scores[i]);
        const bool tie = chosen[i] && key == least && n_ties > 0;
        n_ties -= tie;
        chosen[i] = chosen[i] && (key > least || tie);
    }
}

/* Heads that the coin falls on, drawn from what tells this slot and event apart from all others. */
static bool toss(const kvs_policy_view *v, uint32_t i, double p)
{
    const uint64_t head = (uint64_t)v->layer * v->n_kv_heads + v->kv_head;
    const uint64_t bits = kvs_hash3(kvs_hash3(v->seed, v->event, head), (uint64_t)v->pos[i], 0);
    return (double)(bits >> 11) * 0x1p-53 < p;
}

/* The chance that slot i is merged into the n kept ones at `into`. */
static double chance(const kvs_policy_view *v, uint32_t i, const uint32_t *into, uint32_t n)
{
    double sum = 0;
    for (uint32_t k = 0; k < n; k++)
        sum += (double)v->mass_sum[into[k]];
    const double own = (double)v->mass_sum[i] * n;
    return own <= 0 ? 0 : own >= sum ? 1 : own / sum;
}

static void merge(const double *params, const kvs_policy_view *view, const float *scores, const uint8_t *keep,
                  float *keys_raw, float *values, uint8_t *changed)
{
    (void)keys_raw;
    const uint32_t n = view->n_slots, dh = view->head_dim, n_next = (uint32_t)params[0];
    uint32_t *const chosen = (uint32_t *)(void *)view->work, *const kept = chosen + n, n_kept = 0;
    choose(params, view, scores, keep, chosen, kept);
    for (uint32_t i = 0; i < n; i++)
        if (keep[i] != 0)
            kept[n_kept++] = i;
    for (uint32_t i = 0, at = 0; i < n; i++) {
        at += keep[i] != 0; /* kept slots up to here */
        const uint32_t m = kvs_min_u32(n_next, n_kept - at);
        if (!chosen[i] || m == 0 || !toss(view, i, chance(view, i, kept + at, m)))
            continue;
        for (uint32_t k = at; k < at + m; k++) {
            changed[kept[k]] = 1;
            for (uint32_t d = 0; d < dh; d++)
                values[(size_t)kept[k] * dh + d] += values[(size_t)i * dh + d] / (float)m;
        }
    }
}

const kvs_dispose_ops kvs_dispose_cam = {
    .info = {.name = "cam",
             .doc = "each value that goes is added to the next kept ones, by chance",
             .source = "openreview LCTmppB165",
             .exactness =
                 "exact as kvpress's batched form, apart from the generator; attention counts from the first token",
             .params = params_info,
             .n_params = 2},
    .needs = KVS_POLICY_NEEDS_MASS_SUM | KVS_POLICY_NEEDS_VALUES,
    .merge = merge,
    .work_of = work_of,
};

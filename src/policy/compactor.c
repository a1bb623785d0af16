/* Compactor and its two parts, each a preset. Source: Chari and Van Durme, arXiv:2507.08143 as kvpress's CompactorPress,
 * LeverageScorePress and NonCausalAttnPress write it.
 *   leverage: keys before rotation, centred, through a random sketch to 48 dims (0: none); score x (X^T X + 0.01 I)^-1 x^T,
 *     the share of an own direction that a key holds.
 *   non_causal_attention: within each chunk of 256 tokens every query meets every key, the future ones too; softmax of q k
 *     without 1/sqrt(head_dim), summed over queries, mean over the group, times |v|; then the mean of 3 neighbours.
 *   compactor: the first 8 and the last 4 tokens stay; for the rest blend z(leverage) + z(attention), blend the share that goes.
 * z is (x - mean) / deviation over all heads and slots of a layer, the deviation 1e-6 at least.
 * Deviations: one sketch for all heads, from the session's seed. A chunk's attention is computed once, when its last query
 * has run, over the chunk's slots then held, and stays with them: queries are not kept longer. The paper's
 * singular vectors are kvpress's Cholesky factor here too. */
#include "policy/dense.h"
#include "policy/policy.h"

#include <math.h>
#include <string.h>

#define JITTER        1e-2 /* of the diagonal, ten times more at each of 5 tries: LeverageScorePress's */
#define DEVIATION_MIN 1e-6

enum { TRIES = 5, POOL = 3, DIMS_MAX = 512 };

/* ---- leverage ---- */

static size_t leverage_work(uint32_t n_dims, uint32_t n_slots, uint32_t head_dim)
{
    const size_t dh = head_dim, k = n_dims != 0 ? n_dims : head_dim;
    return 4 * k * k + k * k + n_slots * (dh + k) + dh * k;
}

/* Of slots [begin, end), in out [n_slots]; n_dims 0: without a sketch. */
static void leverages(const kvs_policy_view *view, uint32_t n_dims, uint32_t begin, uint32_t end, float *out)
{
    const uint32_t n = end - begin, dh = view->head_dim, k = n_dims != 0 ? n_dims : dh;
    double *const moments = (double *)(void *)view->work, *const factor = moments + (size_t)k * k;
    float *const inverse = (float *)(void *)(factor + (size_t)k * k), *const centred = inverse + (size_t)k * k;
    float *const sketched = centred + (size_t)n * dh, *const sketch = sketched + (size_t)n * k;
    const float *const keys = view->keys_raw + (size_t)begin * dh;
    for (uint32_t d = 0; d < dh; d++) {
        double sum = 0;
        for (uint32_t i = 0; i < n; i++)
            sum += (double)keys[(size_t)i * dh + d];
        for (uint32_t i = 0; i < n; i++)
            centred[(size_t)i * dh + d] = (float)((double)keys[(size_t)i * dh + d] - sum / n);
    }
    const float *x = centred;
    if (n_dims != 0) {
        kvs_sketch(view->seed, dh, k, sketch);
        kvs_project(sketch, dh, k, centred, n, sketched);
        x = sketched;
    }
    memset(moments, 0, (size_t)k * k * sizeof *moments);
    kvs_add_moments(moments, k, x, NULL, n);
    double jitter = JITTER;
    for (uint32_t t = 0; t < TRIES; t++, jitter *= 10) {
        memcpy(factor, moments, (size_t)k * k * sizeof *factor);
        for (uint32_t d = 0; d < k; d++)
            factor[(size_t)d * k + d] += jitter;
        if (kvs_cholesky(factor, k)) {
            kvs_invert_lower(factor, k, inverse);
            kvs_norms_under(inverse, k, x, n, out + begin);
            return;
        }
    }
    for (uint32_t i = begin; i < end; i++) /* keys that are not finite */
        out[i] = 0;
}

/* ---- attention within chunks ---- */

/* Tokens [sinks + c chunk, sinks + (c + 1) chunk) are chunk c; it is whole once `recent` more were said. */
typedef struct chunking {
    uint32_t sinks, recent, chunk;
} chunking;

static uint64_t whole_at(const chunking *c, uint64_t n_tokens)
{
    const uint64_t first = (uint64_t)c->sinks + c->recent + c->chunk;
    return n_tokens <= first ? first : first + (n_tokens - first + c->chunk - 1) / c->chunk * c->chunk;
}

/* Index of the first slot with pos at or behind `pos`. */
static uint32_t slot_at(const kvs_policy_view *view, int64_t pos)
{
    uint32_t i = view->n_slots;
    while (i > 0 && view->pos[i - 1] >= pos)
        i--;
    return i;
}

/* Attention that the queries of tokens [begin, end) give the slots of the same tokens, times |v|, into out at those slots.
 * row: [window] scratch. Queries that are no longer there count nothing. */
static void chunk_mass(const kvs_policy_view *view, int64_t begin, int64_t end, float *row, float *out)
{
    const uint32_t dh = view->head_dim, first = slot_at(view, begin), n = slot_at(view, end) - first;
    for (uint32_t i = 0; i < n; i++)
        out[first + i] = 0;
    const uint32_t first_pair = view->n_slots - view->n_pair;
    if (n == 0 || first < first_pair)
        return;
    const float scale = sqrtf((float)dh);
    for (uint32_t q = 0; q < view->n_window * view->group; q++) {
        const int32_t pos = view->window_pos[q / view->group];
        if (pos < begin || pos >= end)
            continue;
        const float *const pair = view->window_pair + (size_t)q * view->n_pair + (first - first_pair);
        float most = -INFINITY, sum = 0;
        for (uint32_t i = 0; i < n; i++) {
            row[i] = pair[i] * scale;
            most = row[i] > most ? row[i] : most;
        }
        view->exp_scale(row, n, most, 1);
        for (uint32_t i = 0; i < n; i++)
            sum += row[i];
        const float share = 1 / sum;
        for (uint32_t i = 0; i < n; i++)
            out[first + i] += row[i] * share;
    }
    kvs_row_norms(view->values + (size_t)first * dh, dh, n, row);
    for (uint32_t i = 0; i < n; i++)
        out[first + i] = out[first + i] / (float)view->group * row[i];
}

static void observe_chunk(const chunking *c, const kvs_policy_view *view)
{
    const int64_t end = view->n_tokens - c->recent;
    chunk_mass(view, end - c->chunk, end, view->work, view->carry);
}

/* Attention of slots [begin, end) into out: what was observed, and the chunk that is not whole yet. */
static void attention(const chunking *c, const kvs_policy_view *view, uint32_t begin, uint32_t end, float *out)
{
    float *const row = view->work, *const mass = row + c->chunk;
    const int64_t last = view->n_tokens - c->recent, inside = last - c->sinks;
    int64_t from = c->sinks + (inside > 0 ? inside / c->chunk * c->chunk : 0);
    if (inside > 0 && from == last) { /* whole just now: look, unless observe has */
        from -= c->chunk;
        bool seen = false;
        for (uint32_t i = slot_at(view, from); i < end; i++)
            seen |= view->carry[i] != 0;
        if (!seen)
            observe_chunk(c, view);
        from = last;
    }
    memcpy(mass, view->carry, view->n_slots * sizeof *mass);
    if (from < last)
        chunk_mass(view, from, last, row, mass);
    kvs_pool_average(mass + begin, end - begin, POOL, out + begin);
}

static size_t attention_work(uint32_t chunk, uint32_t n_slots)
{
    return (size_t)chunk + n_slots;
}

/* ---- over a layer ---- */

/* Mean and deviation (n - 1 below, as torch) of what is finite in the scores of all heads of a layer. */
static void spread_of(const kvs_policy_view *views, bool of_part, float *const *scores, double *mean, double *deviation)
{
    double sum = 0, square = 0;
    size_t n = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t h = 0; h < views[0].n_kv_heads; h++) {
            const float *const x = of_part ? views[h].part : scores[h];
            for (uint32_t i = 0; i < views[h].n_slots; i++) {
                if (!isfinite(x[i]))
                    continue;
                n += pass == 0;
                sum += pass == 0 ? (double)x[i] : 0;
                square += pass == 0 ? 0 : ((double)x[i] - *mean) * ((double)x[i] - *mean);
            }
        }
        *mean = n > 0 ? sum / (double)n : 0;
    }
    *deviation = n > 1 ? sqrt(square / (double)(n - 1)) : 0;
    if (*deviation < DEVIATION_MIN)
        *deviation = DEVIATION_MIN;
}

/* scores = z(scores) + blend z(part); of a part only where there is one. Infinite scores stay. */
static void blend_layer(const kvs_policy_view *views, float *const *scores, double blend)
{
    double mean, deviation, part_mean = 0, part_deviation = 1;
    spread_of(views, false, scores, &mean, &deviation);
    const bool parts = views[0].part != NULL;
    if (parts)
        spread_of(views, true, scores, &part_mean, &part_deviation);
    for (uint32_t h = 0; h < views[0].n_kv_heads; h++) {
        const double share = views[h].n_slots > 0 ? (double)views[h].n_keep / views[h].n_slots : 1;
        const double weight = blend >= 0 ? blend : share < 1 ? 1 - share : 0;
        for (uint32_t i = 0; i < views[h].n_slots; i++) {
            double z = ((double)scores[h][i] - mean) / deviation;
            if (parts && isfinite(z))
                z += weight * (((double)views[h].part[i] - part_mean) / part_deviation);
            scores[h][i] = (float)z;
        }
    }
}

/* ---- leverage, the preset ---- */

static const kvs_param_info leverage_params[] = {
    {"sketch", "dims of the random sketch, 0: none", 48, 0, DIMS_MAX},
};

static size_t leverage_work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    return leverage_work((uint32_t)params[0], n_slots, head_dim);
}

static void leverage_score(const double *params, const kvs_policy_view *view, float *scores)
{
    leverages(view, (uint32_t)params[0], 0, view->n_slots, scores);
}

static void z_score_layer(const double *params, const kvs_policy_view *views, float *const *scores)
{
    (void)params;
    blend_layer(views, scores, 0);
}

const kvs_policy_ops kvs_policy_leverage = {
    .abi = KVS_POLICY_ABI,
    .name = "leverage",
    .doc = "keys that have a direction of their own",
    .source = "arXiv:2507.08143",
    .exactness = "exact as kvpress's LeverageScorePress with +protect=none, apart from the sketch's generator",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_KEYS_RAW,
    .params = leverage_params,
    .n_params = 1,
    .score = leverage_score,
    .signed_scores = true,
    .score_layer = z_score_layer,
    .work_of = leverage_work_of,
};

/* ---- non_causal_attention, the preset ---- */

static const kvs_param_info attention_params[] = {
    {"chunk", "tokens whose queries and keys all meet", 256, 1, KVS_POLICY_WINDOW_MAX},
};

static chunking attention_chunking(const double *params)
{
    return (chunking){0, 0, (uint32_t)params[0]};
}

static uint32_t attention_window_of(const double *params)
{
    return (uint32_t)params[0];
}

static size_t attention_work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)head_dim;
    return attention_work((uint32_t)params[0], n_slots);
}

static uint64_t attention_observe_at(const double *params, uint64_t n_tokens)
{
    const chunking c = attention_chunking(params);
    return whole_at(&c, n_tokens);
}

static void attention_observe(const double *params, const kvs_policy_view *view)
{
    const chunking c = attention_chunking(params);
    observe_chunk(&c, view);
}

static void attention_score(const double *params, const kvs_policy_view *view, float *scores)
{
    const chunking c = attention_chunking(params);
    attention(&c, view, 0, view->n_slots, scores);
}

const kvs_policy_ops kvs_policy_non_causal_attention = {
    .abi = KVS_POLICY_ABI,
    .name = "non_causal_attention",
    .doc = "what all queries of a chunk attend to in it, later keys too",
    .source = "arXiv:2507.08143",
    .exactness = "exact as kvpress's NonCausalAttnPress with +protect=none where nothing was evicted before",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_PAIRS | KVS_POLICY_NEEDS_VALUES | KVS_POLICY_NEEDS_CARRY,
    .params = attention_params,
    .n_params = 1,
    .score = attention_score,
    .signed_scores = true,
    .score_layer = z_score_layer,
    .observe = attention_observe,
    .observe_at = attention_observe_at,
    .window_of = attention_window_of,
    .work_of = attention_work_of,
};

/* ---- compactor ---- */

static const kvs_param_info params_info[] = {
    {"sinks", "first tokens, which stay", 8, 0, 4096},
    {"recent", "newest tokens, which stay", 4, 0, 64},
    {"chunk", "tokens whose queries and keys all meet", 256, 1, KVS_POLICY_WINDOW_MAX - 64},
    {"sketch", "dims of the random sketch, 0: none", 48, 0, DIMS_MAX},
    {"blend", "weight of leverage beside attention, -1: the share that goes", -1, -1, 1000},
};

static chunking chunking_of(const double *params)
{
    return (chunking){(uint32_t)params[0], (uint32_t)params[1], (uint32_t)params[2]};
}

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[1] + (uint32_t)params[2];
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    const size_t a = leverage_work((uint32_t)params[3], n_slots, head_dim);
    const size_t b = attention_work((uint32_t)params[2], n_slots);
    return a > b ? a : b;
}

static uint64_t observe_at(const double *params, uint64_t n_tokens)
{
    const chunking c = chunking_of(params);
    return whole_at(&c, n_tokens);
}

static void observe(const double *params, const kvs_policy_view *view)
{
    const chunking c = chunking_of(params);
    observe_chunk(&c, view);
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const chunking c = chunking_of(params);
    const uint32_t begin = kvs_sink_slots(view, c.sinks);
    const uint32_t end = kvs_max_u32(begin, slot_at(view, view->n_tokens - c.recent));
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = view->part[i] = INFINITY;
    if (begin == end)
        return;
    attention(&c, view, begin, end, scores);
    leverages(view, (uint32_t)params[3], begin, end, view->part);
}

static void score_layer(const double *params, const kvs_policy_view *views, float *const *scores)
{
    blend_layer(views, scores, params[4]);
}

const kvs_policy_ops kvs_policy_compactor = {
    .abi = KVS_POLICY_ABI,
    .name = "compactor",
    .doc = "leverage of keys and attention within chunks",
    .source = "arXiv:2507.08143",
    .exactness = "exact as kvpress's CompactorPress with +protect=none where nothing was evicted before, apart from "
                 "the sketch's generator",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_KEYS_RAW | KVS_POLICY_NEEDS_PAIRS | KVS_POLICY_NEEDS_VALUES | KVS_POLICY_NEEDS_CARRY,
    .params = params_info,
    .n_params = 5,
    .score = score,
    .signed_scores = true,
    .score_layer = score_layer,
    .observe = observe,
    .observe_at = observe_at,
    .has_part = true,
    .window_of = window_of,
    .work_of = work_of,
};

/* What a policy sees of one (layer, KV head): facts, masses, keys and values as they stand, and what the newest rows
 * attend to now. Reads only. */
#include "session/session_internal.h"

#include <math.h>
#include <string.h>

/* ---- keys and values ---- */

static void rotate_keys(const kvs_session *s, float *keys, const int32_t *by, const int32_t *less, uint32_t n)
{
    const kvs_model *m = s->model;
    const uint32_t dh = m->info.head_dim;
    float cos_sin[KVS_HEAD_DIM_MAX];
    int32_t at = 0;
    for (uint32_t i = 0; i < n; i++) {
        const int32_t turn = (by != NULL ? by[i] : 0) - (less != NULL ? less[i] : 0);
        if (turn == 0)
            continue;
        if (at != turn)
            kvs_rope_row(&m->rope, at = turn, cos_sin);
        m->kernels->rope(keys + (size_t)i * dh, 1, dh, cos_sin, m->n_freq);
    }
}

void kvs_view_rotate(const kvs_session *s, float *keys_raw, const int32_t *to, uint32_t n)
{
    rotate_keys(s, keys_raw, to, NULL, n);
}

static void read_keys_and_values(const kvs_session *s, kvs_policy_view *v, kvs_view_scratch *t)
{
    const size_t n_floats = (size_t)v->n_slots * v->head_dim;
    float *const first = t->keys != NULL ? t->keys : t->keys_raw;
    if (first == NULL && t->values == NULL)
        return;
    kvs_cache_read_kv(s->cache, v->layer, v->kv_head, first, t->values);
    if (t->keys_raw != NULL && t->keys_raw != first)
        memcpy(t->keys_raw, first, n_floats * sizeof *first);
    if (t->keys != NULL)
        rotate_keys(s, t->keys, t->rope_pos, t->key_rot, v->n_slots);
    if (t->keys_raw != NULL)
        rotate_keys(s, t->keys_raw, NULL, t->key_rot, v->n_slots);
    v->keys = t->keys;
    v->keys_raw = t->keys_raw;
    v->values = t->values;
}

/* ---- what values become behind the output projection ---- */

_Static_assert((int)KVS_NORM_DIM_MAX >= (int)KVS_HEAD_DIM_MAX, "the norm takes every head size");

size_t kvs_view_out_rows(const kvs_model *m)
{
    const kvs_model_info *i = &m->info;
    const size_t n_rows = kvs_round_up(i->n_embd, KVS_NORM_ROWS);
    return i->n_heads / i->n_kv_heads * n_rows * i->head_dim + (size_t)i->n_heads * i->head_dim;
}

/* The columns of the output projection that read this head's group, widened: [group][rows][head_dim], the rows behind the last zero. */
static uint32_t read_out_rows(const kvs_session *s, const kvs_policy_view *v, kvs_view_scratch *t)
{
    const kvs_model *m = s->model;
    const kvs_weight *const w = &m->layers[v->layer].attn_out;
    const uint32_t dh = v->head_dim, group = v->group;
    const uint32_t n_rows = (uint32_t)kvs_round_up(w->n_out, KVS_NORM_ROWS);
    float *const row = t->out_rows + (size_t)group * n_rows * dh;
    for (uint32_t r = 0; r < n_rows; r++) {
        if (r < w->n_out)
            kvs_weight_row(w, r, row);
        for (uint32_t g = 0; g < group; g++) {
            float *const at = t->out_rows + ((size_t)g * n_rows + r) * dh;
            if (r < w->n_out)
                memcpy(at, row + ((size_t)v->kv_head * group + g) * dh, dh * sizeof *at);
            else
                memset(at, 0, dh * sizeof *at);
        }
    }
    return n_rows;
}

/* |W v| of each slot from the rows' products with each other, W^T W: dim^2 steps a slot instead of n_rows dim. */
static void read_lengths(const float *rows, uint32_t n_rows, uint32_t dim, const float *values, uint32_t n,
                         double *gram, float *length)
{
    for (size_t i = 0; i < (size_t)dim * dim; i++)
        gram[i] = 0;
    for (uint32_t r = 0; r < n_rows; r++)
        for (uint32_t i = 0; i < dim; i++)
            for (uint32_t j = 0; j < dim; j++)
                gram[(size_t)i * dim + j] += (double)rows[(size_t)r * dim + i] * (double)rows[(size_t)r * dim + j];
    for (uint32_t k = 0; k < n; k++) {
        const float *const v = values + (size_t)k * dim;
        double square = 0;
        for (uint32_t i = 0; i < dim; i++) {
            double sum = 0;
            for (uint32_t j = 0; j < dim; j++)
                sum += gram[(size_t)i * dim + j] * (double)v[j];
            square += sum * (double)v[i];
        }
        length[k] = square > 0 ? (float)sqrt(square) : 0.0f;
    }
}

static void read_out(const kvs_session *s, kvs_policy_view *v, kvs_view_scratch *t)
{
    const uint32_t dh = v->head_dim, n_rows = read_out_rows(s, v, t);
    for (uint32_t g = 0; g < v->group; g++) {
        const float *const rows = t->out_rows + (size_t)g * n_rows * dh;
        const size_t at = (size_t)g * v->n_slots;
        if (t->out_norm != NULL)
            s->model->kernels->product_norm(rows, n_rows, dh, t->values, v->n_slots, t->out_norm + at);
        if (t->out_length != NULL)
            read_lengths(rows, n_rows, dh, t->values, v->n_slots, t->out_gram, t->out_length + at);
    }
    v->out_norm = t->out_norm;
    v->out_length = t->out_length;
}

/* ---- the window ---- */

/* Where a logged row's token stands now: as far before the next one as it was said before it. */
static int32_t rope_of_row(const kvs_session *s, int32_t rope_next, uint64_t token_idx)
{
    return rope_next + (int32_t)((int64_t)token_idx - (int64_t)s->n_tokens);
}

/* Copies the live ones of the physical scores of one row and head, and turns them into probabilities of the slots that
 * are not newer than the row. */
static void soften(const kvs_kernels *kernels, const kvs_policy_view *v, const kvs_page_view *pages, uint32_t n_pages,
                   const float *physical, int32_t row_pos, double own, float *logit, float *prob)
{
    uint32_t n = 0;
    for (uint32_t p = 0; p < n_pages; p++)
        for (uint64_t bits = pages[p].live; bits != 0; bits &= bits - 1)
            prob[n++] = physical[(size_t)p * KVS_PAGE_SLOTS + (uint32_t)__builtin_ctzll(bits)];
    uint32_t n_seen = n;
    while (n_seen > 0 && v->pos[n_seen - 1] > row_pos)
        prob[--n_seen] = -INFINITY;
    if (logit != NULL)
        memcpy(logit, prob, n * sizeof *prob);
    for (uint32_t i = n_seen; i < n; i++)
        prob[i] = 0;
    if (n_seen == 0)
        return;
    uint32_t best;
    const double held = kernels->logsumexp(prob, n_seen, &best);
    const double high = held > own ? held : own, low = held > own ? own : held;
    const double lse = high + log1p(exp(low - high));
    const float most = prob[best];
    kernels->exp_scale(prob, n_seen, most, (float)exp((double)most - lse));
}

/* Page in which the newest n live slots begin. */
static uint32_t page_of_newest(const kvs_page_view *pages, uint32_t n_pages, uint32_t n)
{
    uint32_t p = n_pages;
    for (uint32_t have = 0; p > 0 && have < n;)
        have += (uint32_t)__builtin_popcountll(pages[--p].live);
    return p;
}

/* The newest n live ones of a row's physical scores, oldest first. */
static void copy_newest(const kvs_page_view *pages, uint32_t n_pages, const float *physical, uint32_t n, float *out)
{
    for (uint32_t p = n_pages; n > 0 && p-- > 0;) {
        uint64_t bits = pages[p].live;
        if ((bits & (bits + 1)) == 0) { /* no gaps: the usual page */
            const uint32_t live = (uint32_t)__builtin_popcountll(bits), take = kvs_min_u32(live, n);
            n -= take;
            memcpy(out + n, physical + (size_t)p * KVS_PAGE_SLOTS + live - take, take * sizeof *out);
            continue;
        }
        while (n > 0 && bits != 0) {
            const uint32_t s = 63u - (uint32_t)__builtin_clzll(bits);
            bits ^= 1ull << s;
            out[--n] = physical[(size_t)p * KVS_PAGE_SLOTS + s];
        }
    }
}

/* Queries of the log against one head's slots. */
typedef struct window_reader {
    const kvs_session *s;
    kvs_view_scratch *t;
    uint32_t layer, kv_head, n_rows, n_pages, n_physical;
    size_t stride, width; /* of a row of scores; of a row's queries */
} window_reader;

static window_reader open_window(const kvs_session *s, kvs_view_scratch *t, uint32_t layer, uint32_t kv_head,
                                 uint32_t n_rows)
{
    const kvs_model_info *info = &s->model->info;
    const uint32_t n_physical = kvs_cache_n_physical(s->cache, layer, kv_head);
    kvs_cache_views(s->cache, layer, kv_head, t->pages, NULL);
    return (window_reader){.s = s,
                           .t = t,
                           .layer = layer,
                           .kv_head = kv_head,
                           .n_rows = n_rows,
                           .n_pages = kvs_cache_n_pages(s->cache, layer, kv_head),
                           .n_physical = n_physical,
                           .stride = kvs_round_up(n_physical, KVS_TILE_SLOTS),
                           .width = (size_t)(info->n_heads / info->n_kv_heads) * info->head_dim};
}

static void read_query(const window_reader *w, uint32_t row, uint64_t token_idx, int32_t rope_pos)
{
    const kvs_model *m = w->s->model;
    float cos_sin[KVS_HEAD_DIM_MAX], *const q = w->t->query + row * w->width;
    kvs_rope_row(&m->rope, rope_pos, cos_sin);
    memcpy(q, kvs_query_log_row(&w->s->queries, w->layer, w->kv_head, token_idx), w->width * sizeof *q);
    m->kernels->rope(q, m->info.n_heads / m->info.n_kv_heads, m->info.head_dim, cos_sin, m->n_freq);
}

/* Scores of rows from `row` on into t->physical, from the first slot of a page: how many rows it did. */
static uint32_t score_rows(const window_reader *w, uint32_t row, uint32_t first_page)
{
    const kvs_model *m = w->s->model;
    const kvs_attn_job job = {
        .pages = w->t->pages,
        .limit0 = w->n_physical,
        .n_rows = kvs_min_u32(KVS_ATTN_ROWS_MAX, w->n_rows - row),
        .group = m->info.n_heads / m->info.n_kv_heads,
        .head_dim = m->info.head_dim,
        .kv_f32 = w->s->options.kv_type == KVS_KV_F32,
        .scale = 1.0f / __builtin_sqrtf((float)m->info.head_dim),
        .q = w->t->query + row * w->width,
        .q_stride = w->width,
        .rope = &m->rope,
    };
    m->kernels->attend_scores(&job, first_page * KVS_PAGE_SLOTS, w->n_physical, w->t->physical, w->stride, w->t->most);
    return job.n_rows;
}

static float *own_at(const kvs_session *s, uint32_t head, uint32_t row, uint32_t g)
{
    const uint32_t group = s->model->info.n_heads / s->model->info.n_kv_heads;
    return s->probe.own + ((size_t)head * s->probe.chunk_tokens + row) * group + g;
}

static void own_rows_task(void *ctx, uint32_t head, uint32_t thread)
{
    const kvs_session *s = ctx;
    const uint32_t n_kv_heads = s->model->info.n_kv_heads, group = s->model->info.n_heads / n_kv_heads;
    const uint32_t n = s->probe.n_own;
    kvs_view_scratch *t = &s->scratch.threads[thread];
    const window_reader w = open_window(s, t, head / n_kv_heads, head % n_kv_heads, n);
    const kvs_head_slots slots = {.rope_pos = t->rope_pos};
    const uint32_t n_live = kvs_cache_read_head(s->cache, w.layer, w.kv_head, &slots);
    for (uint32_t r = 0; r < n; r++)
        read_query(&w, r, s->n_tokens + r, t->rope_pos[n_live - n + r]);
    const uint32_t first_page = page_of_newest(t->pages, w.n_pages, n);
    for (uint32_t row = 0, n_done; row < n; row += n_done) {
        n_done = score_rows(&w, row, first_page);
        for (uint32_t r = 0; r < n_done * group; r++) {
            copy_newest(t->pages, w.n_pages, t->physical + r * w.stride, n, t->prob);
            *own_at(s, head, row + r / group, r % group) =
                (float)s->model->kernels->logsumexp(t->prob, row + r / group + 1, NULL);
        }
    }
}

void kvs_view_own_rows(kvs_session *s, uint32_t n)
{
    s->probe.n_own = n;
    kvs_pool_run(s->model->pool, own_rows_task, s, s->scratch.n_heads);
}

/* Rows of the window that were said have themselves in the cache. */
static double own_of_row(const kvs_session *s, const kvs_policy_view *v, uint32_t row, uint32_t g)
{
    const uint32_t n_said = v->n_window - kvs_min_u32(v->n_window, s->probe.n_own);
    if (row < n_said || s->probe.n_own == 0)
        return -(double)INFINITY;
    return (double)*own_at(s, v->layer * v->n_kv_heads + v->kv_head, row - n_said, g);
}

static void read_window(const kvs_session *s, kvs_policy_view *v, kvs_view_scratch *t)
{
    const uint32_t group = v->group;
    const window_reader w = open_window(s, t, v->layer, v->kv_head, s->queries.n_valid);
    v->n_window = w.n_rows;
    v->window_pos = t->window_pos;
    for (uint32_t r = 0; r < w.n_rows; r++) {
        const uint64_t token_idx = s->n_tokens + s->queries.n_ahead - w.n_rows + r;
        read_query(&w, r, token_idx, rope_of_row(s, v->rope_next, token_idx));
        t->window_pos[r] = (int32_t)token_idx;
    }
    v->n_pair = t->pair == NULL ? 0 : kvs_window_slots(v);
    const uint32_t first_page = t->prob != NULL ? 0 : page_of_newest(t->pages, w.n_pages, v->n_pair);
    for (uint32_t row = 0, n_done; row < w.n_rows; row += n_done) {
        n_done = score_rows(&w, row, first_page);
        for (uint32_t r = 0; r < n_done * group; r++) {
            const size_t query = (size_t)row * group + r, at = query * v->n_slots;
            const float *const physical = t->physical + r * w.stride;
            if (t->pair != NULL)
                copy_newest(t->pages, w.n_pages, physical, v->n_pair, t->pair + query * v->n_pair);
            if (t->prob != NULL)
                soften(s->model->kernels, v, t->pages, w.n_pages, physical, t->window_pos[row + r / group],
                       own_of_row(s, v, row + r / group, r % group), t->logit == NULL ? NULL : t->logit + at,
                       t->prob + at);
        }
    }
    v->window_pair = t->pair;
    v->window_prob = t->prob;
    v->window_logit = t->logit;
    v->window_query = t->query;
}

/* ---- the view ---- */

kvs_policy_view kvs_view_facts(const kvs_session *s, uint32_t layer, uint32_t head, kvs_view_scratch *t)
{
    const kvs_model_info *info = &s->model->info;
    kvs_head_slots slots = {
        .pos = t->pos, .rope_pos = t->rope_pos, .key_rot = t->key_rot, .token = t->token, .flags = t->flags};
    for (int i = 0; i < KVS_SIDE_COUNT; i++)
        slots.side[i] = t->side[i];
    const uint32_t n = kvs_cache_read_head(s->cache, layer, head, &slots);
    return (kvs_policy_view){
        .layer = layer,
        .kv_head = head,
        .n_layers = info->n_layers,
        .n_kv_heads = info->n_kv_heads,
        .group = info->n_heads / info->n_kv_heads,
        .head_dim = info->head_dim,
        .n_slots = n,
        .n_tokens = (int64_t)s->n_tokens,
        .pos = t->pos,
        .rope_pos = t->rope_pos,
        .token = t->token,
        .flags = t->flags,
        .mass_sum = t->side[KVS_SIDE_SUM],
        .mass_ema = t->side[KVS_SIDE_EMA],
        .mass_max = t->side[KVS_SIDE_MAX],
        .carry = t->side[KVS_SIDE_CARRY],
        .rope_theta = s->model->theta,
        .n_freq = s->model->n_freq,
        .rope_next = kvs_cache_next_rope(s->cache, layer, head),
        .n_tokens_last = (int64_t)s->n_tokens_evicted_at,
        .sentence_ends = s->sentence_ends,
        .exp_scale = s->model->kernels->exp_scale,
        .work = t->work,
        .seed = s->options.seed,
        .event = s->n_evictions,
    };
}

kvs_policy_view kvs_view_kv(const kvs_session *s, uint32_t layer, uint32_t head, kvs_view_scratch *t)
{
    kvs_policy_view v = kvs_view_facts(s, layer, head, t);
    read_keys_and_values(s, &v, t);
    return v;
}

kvs_policy_view kvs_view_contents(const kvs_session *s, uint32_t layer, uint32_t head, kvs_view_scratch *t)
{
    kvs_policy_view v = kvs_view_kv(s, layer, head, t);
    if (t->out_rows != NULL)
        read_out(s, &v, t);
    return v;
}

kvs_policy_view kvs_view_head(const kvs_session *s, uint32_t layer, uint32_t head, kvs_view_scratch *t)
{
    kvs_policy_view v = kvs_view_contents(s, layer, head, t);
    if (t->query != NULL)
        read_window(s, &v, t);
    if (s->probe.most != NULL)
        v.probe = s->probe.most + ((size_t)layer * v.n_kv_heads + head) * v.group * s->scratch.n_slots;
    const kvs_query_log *q = &s->queries;
    if (q->sum != NULL) {
        const size_t at = ((size_t)layer * q->n_kv_heads + head) * q->group * q->head_dim;
        v.n_queries = q->n_stats;
        v.query_sum = q->sum + at;
        v.query_square = q->square + at * q->head_dim;
    }
    return v;
}

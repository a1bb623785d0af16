/* The watch: a second look at rows that have been attended, in arrays of its own. */
#include "session/watch.h"

#include "session/session_internal.h"

#include <math.h>
#include <string.h>

/* One thread's part of the block. */
typedef struct watch_scratch {
    kvs_page_view *pages;
    int32_t *pos;
    uint32_t *physical, *hits; /* [live slots] where they stand; [n_tokens] which of them are asked about */
    float *scores, *live, *most;
} watch_scratch;

static void *part(uint8_t *base, size_t *at, size_t n, size_t size)
{
    void *const here = base == NULL ? NULL : base + *at;
    *at += kvs_round_up(n * size, KVS_ALIGN);
    return here;
}

static size_t lay_out(const kvs_watch *w, uint8_t *base, watch_scratch *t)
{
    size_t at = 0;
    t->pages = part(base, &at, w->n_slots / KVS_PAGE_SLOTS, sizeof *t->pages);
    t->pos = part(base, &at, w->n_slots, sizeof *t->pos);
    t->physical = part(base, &at, w->n_slots, sizeof *t->physical);
    t->hits = part(base, &at, (size_t)w->options.n_tokens + 1, sizeof *t->hits);
    t->scores = part(base, &at, (size_t)KVS_ATTN_ROWS_MAX * w->group * w->n_slots, sizeof *t->scores);
    t->live = part(base, &at, w->n_slots, sizeof *t->live);
    t->most = part(base, &at, (size_t)KVS_ATTN_ROWS_MAX * w->group, sizeof *t->most);
    return at;
}

kvs_status kvs_watch_create(const kvs_session *s, const kvs_watch_options *o, kvs_watch **out, kvs_error *err)
{
    *out = NULL;
    for (uint32_t i = 1; i < o->n_tokens; i++)
        if (o->tokens[i] <= o->tokens[i - 1])
            return kvs_error_set(err, KVS_EINVAL, "watched tokens must ascend: %d follows %d", o->tokens[i],
                                 o->tokens[i - 1]);
    const kvs_model_info *i = &s->model->info;
    kvs_watch *w = kvs_alloc(s->allocator, 1, sizeof *w);
    if (w == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a watch");
    *w = (kvs_watch){.options = *o,
                     .n_layers = i->n_layers,
                     .n_heads = i->n_heads,
                     .n_kv_heads = i->n_kv_heads,
                     .head_dim = i->head_dim,
                     .n_embd = i->n_embd,
                     .group = i->n_heads / i->n_kv_heads,
                     .n_threads = kvs_pool_n_threads(s->model->pool),
                     .n_slots = kvs_cache_pages_bound(s->cache) * KVS_PAGE_SLOTS,
                     .allocator = s->allocator};
    watch_scratch t;
    w->thread_bytes = lay_out(w, NULL, &t);
    const size_t heads = (size_t)w->n_layers * w->n_heads;
    w->mass = kvs_alloc(w->allocator, heads, sizeof *w->mass);
    w->query_square = kvs_alloc(w->allocator, heads * w->head_dim, sizeof *w->query_square);
    w->hidden = kvs_alloc(w->allocator, (size_t)w->n_layers * w->n_embd, sizeof *w->hidden);
    w->threads = kvs_alloc(w->allocator, w->n_threads, w->thread_bytes);
    if (w->mass == NULL || w->query_square == NULL || w->hidden == NULL || w->threads == NULL) {
        kvs_watch_free(&w);
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a watch over %zu heads", heads);
    }
    *out = w;
    return KVS_OK;
}

void kvs_watch_free(kvs_watch **watch)
{
    kvs_watch *w = *watch;
    if (w == NULL)
        return;
    *watch = NULL;
    void *const all[] = {w->mass, w->query_square, w->hidden, w->threads};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        kvs_free(w->allocator, all[i]);
    kvs_free(w->allocator, w);
}

void kvs_session_watch(kvs_session *s, kvs_watch *w)
{
    s->watch = w;
}

/* ---- rows ---- */

static const float *queries_of(const kvs_watch *w, const kvs_attend_run *run, const kvs_forward *f, uint32_t head,
                               uint32_t row)
{
    return f->qkv + (run->row0 + row) * f->qkv_width + (size_t)head * w->group * w->head_dim;
}

static void add_queries(kvs_watch *w, const kvs_attend_run *run, const kvs_forward *f, uint32_t layer, uint32_t head)
{
    const size_t n = (size_t)w->group * w->head_dim;
    double *const sum = w->query_square + ((size_t)layer * w->n_kv_heads + head) * n;
    for (uint32_t r = 0; r < run->n_rows; r++) {
        if (run->token_idx + r < w->options.from_query)
            continue;
        const float *q = queries_of(w, run, f, head, r);
        for (size_t c = 0; c < n; c++)
            sum[c] += (double)q[c] * (double)q[c];
    }
}

/* Fills t with the live slots of one head; how many of them are asked about. */
static uint32_t find_slots(const kvs_watch *w, const kvs_cache *c, uint32_t layer, uint32_t head, watch_scratch *t,
                           uint32_t *n_live)
{
    const kvs_head_slots facts = {.pos = t->pos};
    const uint32_t n_pages = kvs_cache_n_pages(c, layer, head);
    uint32_t n = 0, n_hits = 0, next = 0;
    kvs_cache_views(c, layer, head, t->pages, NULL);
    kvs_cache_read_head(c, layer, head, &facts);
    for (uint32_t p = 0; p < n_pages; p++)
        for (uint64_t bits = t->pages[p].live; bits != 0; bits &= bits - 1, n++) {
            t->physical[n] = p * KVS_PAGE_SLOTS + (uint32_t)__builtin_ctzll(bits);
            while (next < w->options.n_tokens && w->options.tokens[next] < t->pos[n])
                next++;
            if (next < w->options.n_tokens && w->options.tokens[next] == t->pos[n])
                t->hits[n_hits++] = n;
        }
    *n_live = n;
    return n_hits;
}

/* What one query gives to the hits among the n_seen oldest live slots. */
static double mass_of(const kvs_kernels *kernels, const watch_scratch *t, const float *scores, uint32_t n_seen,
                      uint32_t n_hits)
{
    for (uint32_t i = 0; i < n_seen; i++)
        t->live[i] = scores[t->physical[i]];
    const double lse = kernels->logsumexp(t->live, n_seen, NULL);
    double sum = 0;
    for (uint32_t i = 0; i < n_hits && t->hits[i] < n_seen; i++)
        sum += exp((double)t->live[t->hits[i]] - lse);
    return sum;
}

static void add_mass(kvs_watch *w, const kvs_attend_run *run, const kvs_forward *f, uint32_t layer, uint32_t head,
                     uint32_t first, watch_scratch *t)
{
    const kvs_session *s = run->session;
    const kvs_model *m = s->model;
    const uint32_t n_physical = kvs_cache_n_physical(s->cache, layer, head);
    const size_t stride = kvs_round_up(n_physical, KVS_TILE_SLOTS);
    double *const mass = w->mass + (size_t)layer * w->n_heads + (size_t)head * w->group;
    uint32_t n_live;
    const uint32_t n_hits = find_slots(w, s->cache, layer, head, t, &n_live);
    for (uint32_t row = first; row < run->n_rows && n_hits > 0; row += KVS_ATTN_ROWS_MAX) {
        const kvs_attn_job job = {
            .pages = t->pages,
            .limit0 = n_physical - run->n_rows + row + 1,
            .n_rows = kvs_min_u32(KVS_ATTN_ROWS_MAX, run->n_rows - row),
            .group = w->group,
            .head_dim = w->head_dim,
            .kv_f32 = s->options.kv_type == KVS_KV_F32,
            .scale = 1.0f / __builtin_sqrtf((float)w->head_dim),
            .q = queries_of(w, run, f, head, row),
            .q_stride = f->qkv_width,
            .rope = &m->rope,
        };
        m->kernels->attend_scores(&job, 0, n_physical, t->scores, stride, t->most);
        for (uint32_t r = 0; r < job.n_rows; r++)
            for (uint32_t g = 0; g < w->group; g++)
                mass[g] += mass_of(m->kernels, t, t->scores + (r * w->group + g) * stride,
                                   n_live - (run->n_rows - row - r) + 1, n_hits);
    }
}

void kvs_watch_rows(const kvs_attend_run *run, const kvs_forward *f, uint32_t layer, uint32_t head, uint32_t thread)
{
    kvs_watch *w = run->watch;
    watch_scratch t;
    lay_out(w, w->threads + thread * w->thread_bytes, &t);
    add_queries(w, run, f, layer, head);
    const uint64_t from = w->options.from_answer;
    const uint32_t first = from <= run->token_idx ? 0 : kvs_min_u32(run->n_rows, (uint32_t)(from - run->token_idx));
    if (first < run->n_rows && w->options.n_tokens > 0)
        add_mass(w, run, f, layer, head, first, &t);
}

/* ---- channels ---- */

kvs_status kvs_watch_key_channels(const kvs_watch *w, const kvs_session *s, uint32_t layer, uint32_t kv_head,
                                  double *score, kvs_error *err)
{
    const size_t n = kvs_cache_n_live(s->cache, layer, kv_head), dh = w->head_dim;
    uint8_t *const block = kvs_alloc(s->allocator, n + 1, dh * sizeof(float) + 4 * sizeof(int32_t) + 1);
    if (block == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %zu keys", n);
    kvs_view_scratch t = {.keys = (float *)(void *)block};
    t.pos = (int32_t *)(void *)(t.keys + n * dh);
    t.rope_pos = t.pos + n;
    t.key_rot = t.rope_pos + n;
    t.token = t.key_rot + n;
    t.flags = (uint8_t *)(t.token + n);
    const kvs_policy_view v = kvs_view_contents(s, layer, kv_head, &t);
    const double *const square = w->query_square + ((size_t)layer * w->n_kv_heads + kv_head) * w->group * dh;
    for (size_t c = 0; c < dh; c++) {
        double keys = 0, queries = 0;
        for (size_t i = 0; i < v.n_slots; i++)
            keys += (double)v.keys[i * dh + c] * (double)v.keys[i * dh + c];
        for (size_t g = 0; g < w->group; g++)
            queries += sqrt(square[g * dh + c]) / w->group;
        score[c] = sqrt(keys) * queries;
    }
    kvs_free(s->allocator, block);
    return KVS_OK;
}

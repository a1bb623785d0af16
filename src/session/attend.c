/* Attention of one layer over all sessions of a step: rotates queries and keys to where each head's next slot stands,
 * stores keys and values in their pages, attends, and records attention mass where a policy asked for it. */
#include "session/session_internal.h"

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

enum {
    SCORE_RANGE_SLOTS = 512, /* slots one thread scores when few heads must feed many threads */
    OUTPUT_DIMS_MIN = 16,    /* dims one thread sums up then */
    STORE_ROWS_ALONE = 2,    /* storing so few rows takes less time than waking the other threads */
};

typedef struct layer_task {
    const kvs_attend_ctx *ctx;
    kvs_forward *f;
    uint32_t layer;
    const uint32_t *block_begin; /* prefix sums of blocks per (run, head) */
} layer_task;

/* Thread scratch: page views, side pointers, sums of weights, then what the kernels need. */
typedef struct thread_scratch {
    kvs_page_view *views;
    float **side[KVS_SIDE_COUNT];
    float *l; /* [KVS_ATTN_ROWS_MAX][group] */
    void *kernel;
} thread_scratch;

static uint32_t max_pages(const kvs_attend_run *runs, uint32_t n_runs)
{
    uint32_t pages = 1;
    for (uint32_t i = 0; i < n_runs; i++)
        pages = kvs_max_u32(pages, kvs_cache_pages_max(runs[i].session->cache));
    return pages;
}

static size_t l_bytes(uint32_t group)
{
    return kvs_round_up((size_t)KVS_ATTN_ROWS_MAX * group * sizeof(float), KVS_ALIGN);
}

static size_t views_bytes(uint32_t pages)
{
    return kvs_round_up(pages * sizeof(kvs_page_view), KVS_ALIGN) +
           KVS_SIDE_COUNT * kvs_round_up(pages * sizeof(float *), KVS_ALIGN);
}

size_t kvs_attend_scratch_bytes(const kvs_model *m, uint32_t n_pages)
{
    const uint32_t slots = n_pages * KVS_PAGE_SLOTS;
    const uint32_t group = m->info.n_heads / m->info.n_kv_heads;
    const size_t per_thread =
        views_bytes(n_pages) + l_bytes(group) + kvs_attn_scratch_bytes(group, m->info.head_dim, slots);
    /* The slot behind the threads' own holds the score and weight rows of all heads of one row, and each range's maxima;
     * or, where threads take blocks of rows, whose turn it is to record. */
    const size_t n_ranges = slots / SCORE_RANGE_SLOTS + 1;
    const size_t split = (size_t)m->info.n_heads * (2 * (size_t)slots + n_ranges + KVS_ALIGN) * sizeof(float);
    const size_t turns = (size_t)KVS_STEP_ROWS_MAX * m->info.n_kv_heads * sizeof(atomic_uint);
    const size_t shared = split > turns ? split : turns;
    return per_thread > shared ? per_thread : shared;
}

static void *shared_scratch(const kvs_forward *f)
{
    return (uint8_t *)f->attn_scratch + kvs_pool_n_threads(f->model->pool) * f->attn_scratch_bytes;
}

static thread_scratch scratch_of(const layer_task *t, uint32_t thread)
{
    uint8_t *at = (uint8_t *)t->f->attn_scratch + thread * t->f->attn_scratch_bytes;
    const uint32_t pages = max_pages(t->ctx->runs, t->ctx->n_runs);
    thread_scratch s = {.views = (kvs_page_view *)(void *)at};
    at += kvs_round_up(pages * sizeof(kvs_page_view), KVS_ALIGN);
    for (int i = 0; i < KVS_SIDE_COUNT; i++) {
        s.side[i] = (float **)(void *)at;
        at += kvs_round_up(pages * sizeof(float *), KVS_ALIGN);
    }
    s.l = (float *)(void *)at;
    s.kernel = at + l_bytes(t->f->model->info.n_heads / t->f->model->info.n_kv_heads);
    return s;
}

static size_t qkv_width(const kvs_model_info *i)
{
    return (size_t)(i->n_heads + 2 * i->n_kv_heads) * i->head_dim;
}

/* ---- storing ---- */

/* Rotation for rope position `pos`: from the table, or computed into buf. */
static const float *rope_row(const kvs_model *m, int32_t pos, float *buf)
{
    if (m->rope_like_ggml) {
        kvs_rope_row_ggml(m, pos, buf);
        return buf;
    }
    if (pos >= 0 && (uint32_t)pos < m->rope.n_pos)
        return m->rope.rows + (size_t)pos * 2 * m->rope.n_freq;
    kvs_rope_row(&m->rope, pos, buf);
    return buf;
}

/* One unit in the last place up or down, by a hash of where the number stands. */
static void nudge(float *x, uint32_t n, uint64_t seed, uint64_t at)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] = nextafterf(x[i], kvs_hash3(seed, at, i) & 1 ? INFINITY : -INFINITY);
}

void kvs_session_perturb(kvs_session *s, uint64_t seed)
{
    s->perturb_seed = seed;
}

/* Task: one (run, KV head). Rotates its queries and keys in place and writes keys and values. */
static void store_task(void *ctx, uint32_t task, uint32_t thread)
{
    (void)thread;
    const layer_task *t = ctx;
    const kvs_model *m = t->f->model;
    const kvs_model_info *i = &m->info;
    const kvs_attend_run *run = &t->ctx->runs[task / i->n_kv_heads];
    const uint32_t head = task % i->n_kv_heads, group = i->n_heads / i->n_kv_heads, dh = i->head_dim;
    kvs_cache *c = run->session->cache;
    const uint32_t slot0 = kvs_cache_n_physical(c, t->layer, head) - run->n_rows;
    const int32_t rope0 = kvs_cache_next_rope(c, t->layer, head) - (int32_t)run->n_rows;
    const bool kv_f32 = run->session->options.kv_type == KVS_KV_F32;
    float rope_buf[512];
    for (uint32_t r = 0; r < run->n_rows; r++) {
        float *row = t->f->qkv + (run->row0 + r) * qkv_width(i);
        float *q = row + (size_t)head * group * dh;
        float *k = row + (size_t)(i->n_heads + head) * dh;
        float *v = row + (size_t)(i->n_heads + i->n_kv_heads + head) * dh;
        if (run->session->perturb_seed != 0 && t->layer == 0) {
            const uint64_t at = run->session->n_tokens - run->n_rows + r;
            nudge(q, group * dh, run->session->perturb_seed, at * 3);
            nudge(k, dh, run->session->perturb_seed, at * 3 + 1);
            nudge(v, dh, run->session->perturb_seed, at * 3 + 2);
        }
        if (run->use == KVS_ROWS_SAID || run->use == KVS_ROWS_LOG)
            kvs_query_log_write(&run->session->queries, t->layer, head, run->token_idx + r, q);
        if (run->use == KVS_ROWS_SAID)
            kvs_query_log_count(&run->session->queries, t->layer, head, run->token_idx + r, q);
        const float *cos_sin = rope_row(m, rope0 + (int32_t)r, rope_buf);
        m->kernels->rope(q, group, dh, cos_sin, m->n_freq);
        m->kernels->rope(k, 1, dh, cos_sin, m->n_freq);
        void *k_page, *v_page;
        uint32_t slot;
        kvs_cache_locate(c, t->layer, head, slot0 + r, &k_page, &v_page, &slot);
        kvs_page_write(k_page, v_page, slot, k, v, dh, kv_f32);
    }
}

/* ---- attending ---- */

static kvs_attn_job make_job(const layer_task *t, const kvs_attend_run *run, uint32_t head, uint32_t row,
                             uint32_t n_rows, const kvs_page_view *views)
{
    const kvs_model *m = t->f->model;
    const kvs_model_info *i = &m->info;
    const uint32_t group = i->n_heads / i->n_kv_heads, dh = i->head_dim;
    return (kvs_attn_job){
        .pages = views,
        .limit0 = kvs_cache_n_physical(run->session->cache, t->layer, head) - run->n_rows + row + 1,
        .n_rows = n_rows,
        .group = group,
        .head_dim = dh,
        .kv_f32 = run->session->options.kv_type == KVS_KV_F32,
        .scale = 1.0f / __builtin_sqrtf((float)dh),
        .q = t->f->qkv + (run->row0 + row) * qkv_width(i) + (size_t)head * group * dh,
        .q_stride = qkv_width(i),
        .out = t->f->att + (size_t)(run->row0 + row) * i->n_heads * dh + (size_t)head * group * dh,
        .out_stride = (size_t)i->n_heads * dh,
        .rope = &m->rope,
    };
}

/* ---- recording attention mass ---- */

/* Adds rows [row_begin, ...) of a job that has been attended to the masses that the run's policy reads. first: no row of
 * this step was recorded before. */
static void record(const layer_task *t, const kvs_attend_run *run, uint32_t head, const kvs_attn_job *job,
                   uint32_t row_begin, bool first, const thread_scratch *s)
{
    const uint32_t needs = kvs_policy_needs(&run->session->policy);
    if (first && run->tap_reset) {
        const uint32_t n_pages = kvs_cache_n_pages(run->session->cache, t->layer, head);
        for (uint32_t p = 0; p < n_pages; p++)
            memset(s->side[KVS_SIDE_SUM][p], 0, KVS_PAGE_SLOTS * sizeof(float));
    }
    const bool sum = (needs & (KVS_POLICY_NEEDS_MASS_LAST | KVS_POLICY_NEEDS_MASS_SUM)) != 0;
    const kvs_attn_tap tap = {
        .row_begin = row_begin,
        .sum = sum ? s->side[KVS_SIDE_SUM] : NULL,
        .ema = needs & KVS_POLICY_NEEDS_MASS_EMA ? s->side[KVS_SIDE_EMA] : NULL,
        .max = needs & KVS_POLICY_NEEDS_MASS_MAX ? s->side[KVS_SIDE_MAX] : NULL,
        .ema_decay = 0.05f, /* a memory of about 20 queries; evaluation.md leaves the constant open */
    };
    t->f->model->kernels->attend_tap(job, &tap, s->kernel);
}

/* How many blocks of rows of a (run, head) have been recorded. */
static atomic_uint *turn_of(const layer_task *t, const kvs_attend_run *run, uint32_t head)
{
    atomic_uint *const turns = shared_scratch(t->f);
    return &turns[(uint32_t)(run - t->ctx->runs) * t->f->model->info.n_kv_heads + head];
}

/* Blocks of one head are attended in any order but recorded in that of their rows, since sums round. Tasks are handed
 * out in order: the earliest that is not done waits for nobody. */
static void record_in_turn(const layer_task *t, const kvs_attend_run *run, uint32_t head, const kvs_attn_job *job,
                           uint32_t row, const thread_scratch *s)
{
    atomic_uint *const turn = turn_of(t, run, head);
    const uint32_t first_block = run->tap_from / KVS_ATTN_ROWS_MAX, block = row / KVS_ATTN_ROWS_MAX - first_block;
    while (atomic_load_explicit(turn, memory_order_acquire) != block)
        sched_yield();
    record(t, run, head, job, block == 0 ? run->tap_from - row : 0, block == 0, s);
    atomic_store_explicit(turn, block + 1, memory_order_release);
}

/* Task: a block of rows of one (run, KV head). */
static void attend_task(void *ctx, uint32_t task, uint32_t thread)
{
    const layer_task *t = ctx;
    const uint32_t n_kv_heads = t->f->model->info.n_kv_heads;
    uint32_t low = 0, high = t->ctx->n_runs - 1; /* the run whose blocks hold this task */
    while (low < high) {
        const uint32_t mid = (low + high + 1) / 2;
        if (t->block_begin[mid] <= task)
            low = mid;
        else
            high = mid - 1;
    }
    const kvs_attend_run *run = &t->ctx->runs[low];
    const uint32_t in_run = task - t->block_begin[low];
    const uint32_t head = in_run % n_kv_heads, row = in_run / n_kv_heads * KVS_ATTN_ROWS_MAX;
    const thread_scratch s = scratch_of(t, thread);
    const uint32_t n_rows = kvs_min_u32(KVS_ATTN_ROWS_MAX, run->n_rows - row);
    const bool recorded = run->tap_from < row + n_rows;
    kvs_cache_views(run->session->cache, t->layer, head, s.views, recorded ? (float ***)s.side : NULL);
    kvs_attn_job job = make_job(t, run, head, row, n_rows, s.views);
    if (recorded) {
        job.l = s.l;
        kvs_attn_weights_in_scratch(&job, s.kernel);
    }
    t->f->model->kernels->attend(&job, s.kernel);
    if (recorded)
        record_in_turn(t, run, head, &job, row, &s);
}

/* ---- one row over few heads: threads share a head ---- */

static uint32_t div_up(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

static uint32_t gcd(uint32_t a, uint32_t b)
{
    while (b != 0) {
        const uint32_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

typedef struct split_task {
    layer_task layer;
    uint32_t n_ranges, n_slots;
    uint32_t n_whole, n_parts; /* heads that one thread sums up, and parts of the dims of each of the others */
    size_t stride;             /* of a score row */
    float *scores, *weights, *m_part;
} split_task;

static void split_scores_task(void *ctx, uint32_t task, uint32_t thread)
{
    const split_task *t = ctx;
    const uint32_t head = task / t->n_ranges, range = task % t->n_ranges;
    const kvs_attend_run *run = t->layer.ctx->runs;
    const thread_scratch s = scratch_of(&t->layer, thread);
    kvs_cache_views(run->session->cache, t->layer.layer, head, s.views, NULL);
    const kvs_attn_job job = make_job(&t->layer, run, head, 0, 1, s.views);
    const uint32_t begin = range * SCORE_RANGE_SLOTS;
    const uint32_t n = kvs_min_u32(t->n_slots, job.limit0);
    if (begin >= n) {
        for (uint32_t g = 0; g < job.group; g++)
            t->m_part[(size_t)(range * t->layer.f->model->info.n_kv_heads + head) * job.group + g] = -__builtin_inff();
        return;
    }
    t->layer.f->model->kernels->attend_scores(
        &job, begin, kvs_min_u32(n, begin + SCORE_RANGE_SLOTS), t->scores + (size_t)head * job.group * t->stride,
        t->stride, t->m_part + (size_t)(range * t->layer.f->model->info.n_kv_heads + head) * job.group);
}

static void split_output_task(void *ctx, uint32_t task, uint32_t thread)
{
    const split_task *t = ctx;
    const kvs_model_info *i = &t->layer.f->model->info;
    const bool whole = task < t->n_whole;
    const uint32_t head = whole ? task : t->n_whole + (task - t->n_whole) / t->n_parts;
    const uint32_t part = whole ? 0 : (task - t->n_whole) % t->n_parts;
    const uint32_t dims =
        whole ? i->head_dim : div_up(div_up(i->head_dim, t->n_parts), OUTPUT_DIMS_MIN) * OUTPUT_DIMS_MIN;
    if (part * dims >= i->head_dim)
        return;
    const kvs_attend_run *run = t->layer.ctx->runs;
    const thread_scratch s = scratch_of(&t->layer, thread);
    const bool recorded = run->tap_from == 0 && part == 0; /* it goes through all slots */
    kvs_cache_views(run->session->cache, t->layer.layer, head, s.views, recorded ? (float ***)s.side : NULL);
    kvs_attn_job job = make_job(&t->layer, run, head, 0, 1, s.views);
    float m[64];
    for (uint32_t g = 0; g < job.group; g++) {
        m[g] = -__builtin_inff();
        for (uint32_t r = 0; r < t->n_ranges; r++) {
            const float x = t->m_part[(size_t)(r * i->n_kv_heads + head) * job.group + g];
            m[g] = x > m[g] ? x : m[g];
        }
    }
    if (recorded) {
        job.l = s.l;
        job.weights = t->weights + (size_t)head * job.group * t->stride; /* other parts still read the scores */
        job.weights_stride = t->stride;
    }
    const uint32_t begin = part * dims;
    t->layer.f->model->kernels->attend_output(&job, t->scores + (size_t)head * job.group * t->stride, t->stride, m,
                                              begin, kvs_min_u32(i->head_dim, begin + dims), s.kernel);
    if (recorded)
        record(&t->layer, run, head, &job, 0, true, &s);
}

/* Few heads and one row cannot keep the threads busy by themselves once there is much to read. */
static bool worth_splitting(const kvs_attend_ctx *ctx, const kvs_forward *f, uint32_t layer)
{
    const kvs_model_info *i = &f->model->info;
    const uint32_t n_threads = kvs_pool_n_threads(f->model->pool);
    const uint32_t group = i->n_heads / i->n_kv_heads; /* NOLINT(clang-analyzer-core.DivideZero): checked at open */
    return ctx->n_runs == 1 && ctx->runs[0].n_rows == 1 && n_threads > 1 && group <= 64 &&
           i->n_kv_heads % n_threads != 0 && kvs_cache_n_physical(ctx->runs[0].session->cache, layer, 0) > 256;
}

static void attend_split(const layer_task *layer)
{
    kvs_forward *f = layer->f;
    const kvs_model_info *i = &f->model->info;
    split_task t = {.layer = *layer};
    for (uint32_t h = 0; h < i->n_kv_heads; h++)
        t.n_slots = kvs_max_u32(t.n_slots, kvs_cache_n_physical(layer->ctx->runs[0].session->cache, layer->layer, h));
    t.n_ranges = (t.n_slots + SCORE_RANGE_SLOTS - 1) / SCORE_RANGE_SLOTS;
    /* As many whole heads as give every thread equally many; the rest is cut until it does too. Each part repeats the
     * exponentials of its head, so whole heads come first and cost least. */
    const uint32_t n_threads = kvs_pool_n_threads(f->model->pool), n_rest = i->n_kv_heads % n_threads;
    t.n_whole = i->n_kv_heads - n_rest;
    t.n_parts = n_rest == 0 ? 1 : kvs_min_u32(div_up(i->head_dim, OUTPUT_DIMS_MIN), n_threads / gcd(n_threads, n_rest));
    t.stride = kvs_round_up(t.n_slots, KVS_TILE_SLOTS);
    t.scores = shared_scratch(f);
    t.weights = t.scores + (size_t)i->n_heads * t.stride;
    t.m_part = t.weights + (size_t)i->n_heads * t.stride;
    kvs_pool_run(f->model->pool, split_scores_task, &t, i->n_kv_heads * t.n_ranges);
    kvs_pool_run(f->model->pool, split_output_task, &t, t.n_whole + n_rest * t.n_parts);
}

/* ---- probes ---- */

static void judge_task(void *ctx, uint32_t task, uint32_t thread)
{
    const layer_task *t = ctx;
    const uint32_t n_kv_heads = t->f->model->info.n_kv_heads;
    const kvs_attend_run *run = &t->ctx->runs[task / n_kv_heads];
    if (run->use == KVS_ROWS_JUDGE)
        kvs_probe_record(run, t->f, t->layer, task % n_kv_heads, thread);
}

static void watch_task(void *ctx, uint32_t task, uint32_t thread)
{
    const layer_task *t = ctx;
    const uint32_t n_kv_heads = t->f->model->info.n_kv_heads;
    const kvs_attend_run *run = &t->ctx->runs[task / n_kv_heads];
    if (run->watch != NULL)
        kvs_watch_rows(run, t->f, t->layer, task % n_kv_heads, thread);
}

/* Blocks of rows, whole heads each. */
static void attend_blocks(const layer_task *t, uint32_t n_blocks)
{
    const kvs_attend_ctx *a = t->ctx;
    const uint32_t n_kv_heads = t->f->model->info.n_kv_heads;
    for (uint32_t r = 0; r < a->n_runs; r++)
        for (uint32_t h = 0; h < n_kv_heads && a->runs[r].tap_from < a->runs[r].n_rows; h++)
            atomic_init(turn_of(t, &a->runs[r], h), 0);
    kvs_pool_run(t->f->model->pool, attend_task, (void *)(uintptr_t)t, n_blocks);
}

/* ---- the hook ---- */

void kvs_attend(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows)
{
    const kvs_attend_ctx *a = ctx;
    kvs_pool *pool = f->model->pool;
    const uint32_t n_kv_heads = f->model->info.n_kv_heads;
    uint32_t begin[KVS_STEP_ROWS_MAX], n_blocks = 0;
    for (uint32_t r = 0; r < a->n_runs; r++) {
        begin[r] = n_blocks;
        n_blocks += (a->runs[r].n_rows + KVS_ATTN_ROWS_MAX - 1) / KVS_ATTN_ROWS_MAX * n_kv_heads;
    }
    layer_task t = {.ctx = a, .f = f, .layer = layer, .block_begin = begin};
    if (n_rows <= STORE_ROWS_ALONE)
        for (uint32_t task = 0; task < a->n_runs * n_kv_heads; task++)
            store_task(&t, task, 0);
    else
        kvs_pool_run(pool, store_task, &t, a->n_runs * n_kv_heads);
    if (worth_splitting(a, f, layer))
        attend_split(&t);
    else
        attend_blocks(&t, n_blocks);
    if (a->judged)
        kvs_pool_run(pool, judge_task, &t, a->n_runs * n_kv_heads);
    if (a->watched)
        kvs_pool_run(pool, watch_task, &t, a->n_runs * n_kv_heads);
}

/* Kvasir's own kernels. Variants: q4_1, q4_0, q8_0 (the type's own integer arithmetic), f32 (weights in f32), q4_1/f32,
 * q8_0/f32 (weights widened, f32 arithmetic), attention. */
#include "reference.h"
#include "kernels/kernels.h"

#include <ggml.h>
#include <stdio.h>
#include <string.h>

enum { SCORE_RANGE_SLOTS = 512, OUTPUT_DIMS_MIN = 16, GROUP = REFERENCE_HEADS / REFERENCE_KV_HEADS };

static const struct variant {
    const char *name;
    kvs_weight_type type;
    enum ggml_type file_type;
    bool native;
} variants[] = {
    {"q4_1", KVS_WEIGHT_Q4_1, GGML_TYPE_Q4_1, true},      {"q4_0", KVS_WEIGHT_Q4_0, GGML_TYPE_Q4_0, true},
    {"q8_0", KVS_WEIGHT_Q8_0, GGML_TYPE_Q8_0, true},      {"f32", KVS_WEIGHT_F32, GGML_TYPE_F32, false},
    {"q4_1/f32", KVS_WEIGHT_Q4_1, GGML_TYPE_Q4_1, false}, {"q8_0/f32", KVS_WEIGHT_Q8_0, GGML_TYPE_Q8_0, false},
    {"attention", KVS_WEIGHT_F32, GGML_TYPE_F32, false},
};

static struct {
    const struct variant *variant;
    const kvs_kernels *k;
    kvs_pool *pool;
    kvs_weight weights[REFERENCE_SHAPES][REFERENCE_LAYERS];
    const float *x;
    float *y;
    uint32_t n_rows;
    void *scratch;

    reference_attention attention;
    kvs_page_view *views; /* [layers][KV heads][n_pages] */
    uint32_t n_pages;
    uint16_t *kv;
    void *thread_scratch[64];
    float *scores, *m_part; /* [heads][score_stride]; [ranges][heads] */
    uint32_t score_stride;
    kvs_rope_table rope;
    uint32_t layer; /* the one in work */
} own;

static bool open(const char *variant, uint32_t n_threads, const char **why)
{
    *why = "Kvasir has no such variant";
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        if (strcmp(variants[i].name, variant) == 0)
            own.variant = &variants[i];
    own.k = kvs_kernels_get(kvs_cpu_masked(0));
    own.pool = kvs_pool_create(kvs_allocator_default(), n_threads);
    return own.variant != NULL && own.pool != NULL;
}

/* ---- products ---- */

static kvs_weight make_weight(uint32_t shape, uint32_t layer)
{
    const reference_shape *s = &reference_shapes[shape];
    kvs_weight w = {.type = own.variant->type, .n_out = s->n_out, .n_in = s->n_in};
    w.raw_row_bytes = ggml_row_size(own.variant->file_type, s->n_in);
    w.packed_bytes = kvs_weight_packed_bytes(w.type, w.n_out, w.n_in);
    w.packed = reference_alloc(w.packed_bytes);
    void *const raw = reference_quantise((int)own.variant->file_type, shape, layer);
    kvs_weight_pack(&w, raw, 0, w.n_out);
    reference_free(raw);
    return w;
}

static bool products(uint32_t n_rows, const float *x, float *y, const char **why)
{
    (void)why;
    size_t scratch_bytes = 1;
    for (uint32_t s = 0; s < REFERENCE_SHAPES; s++)
        for (uint32_t l = 0; l < reference_shapes[s].n_layers; l++) {
            kvs_weight *w = &own.weights[s][l];
            if (w->packed == NULL)
                *w = make_weight(s, l);
            const size_t need = kvs_matmul_scratch_bytes(w, n_rows, kvs_pool_n_threads(own.pool));
            scratch_bytes = need > scratch_bytes ? need : scratch_bytes;
        }
    reference_free(own.scratch);
    own.scratch = reference_alloc(scratch_bytes);
    own.x = x, own.y = y, own.n_rows = n_rows;
    return true;
}

static void product_run(uint32_t shape)
{
    kvs_affinity saved;
    kvs_pool_enter(own.pool, &saved);
    for (uint32_t l = 0; l < reference_shapes[shape].n_layers; l++) {
        const kvs_weight *w = &own.weights[shape][l];
        (own.variant->native ? kvs_matmul_native : kvs_matmul_f32)(own.k, own.pool, w, own.x, w->n_in, own.y, w->n_out,
                                                                   own.n_rows, own.scratch);
    }
    kvs_pool_leave(&saved);
}

/* ---- attention ---- */

static void fill_head(uint32_t layer, uint32_t kv_head)
{
    const size_t page_halfs = (size_t)KVS_PAGE_SLOTS * REFERENCE_HEAD_DIM;
    const size_t first = ((size_t)layer * REFERENCE_KV_HEADS + kv_head) * own.n_pages;
    for (uint32_t p = 0; p < own.n_pages; p++) {
        uint16_t *const k = own.kv + (first + p) * 2 * page_halfs, *const v = k + page_halfs;
        kvs_page_view *view = &own.views[first + p];
        *view = (kvs_page_view){.k = k, .v = v};
        for (uint32_t s = 0; s < KVS_PAGE_SLOTS && p * KVS_PAGE_SLOTS + s < own.attention.n_slots; s++) {
            float key[REFERENCE_HEAD_DIM], value[REFERENCE_HEAD_DIM];
            reference_key_value(layer, kv_head, p * KVS_PAGE_SLOTS + s, key, value);
            kvs_page_write(k, v, s, key, value, REFERENCE_HEAD_DIM, false);
            view->live |= UINT64_C(1) << s;
        }
    }
}

static bool attention(const reference_attention *a, const char **why)
{
    (void)why;
    own.attention = *a;
    own.n_pages = (a->n_slots + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
    own.score_stride = own.n_pages * KVS_PAGE_SLOTS;
    reference_free(own.kv), reference_free(own.views), reference_free(own.scores), reference_free(own.m_part);
    const size_t n_views = (size_t)a->n_layers * REFERENCE_KV_HEADS * own.n_pages;
    own.views = reference_alloc(n_views * sizeof *own.views);
    own.kv = reference_alloc(n_views * 2 * KVS_PAGE_SLOTS * REFERENCE_HEAD_DIM * sizeof *own.kv);
    own.scores = reference_alloc((size_t)REFERENCE_HEADS * own.score_stride * sizeof *own.scores);
    own.m_part = reference_alloc((own.score_stride / SCORE_RANGE_SLOTS + 1) * REFERENCE_HEADS * sizeof *own.m_part);
    for (uint32_t l = 0; l < a->n_layers; l++)
        for (uint32_t h = 0; h < REFERENCE_KV_HEADS; h++)
            fill_head(l, h);
    for (uint32_t t = 0; t < kvs_pool_n_threads(own.pool); t++) {
        reference_free(own.thread_scratch[t]);
        own.thread_scratch[t] = reference_alloc(kvs_attn_scratch_bytes(GROUP, REFERENCE_HEAD_DIM, own.score_stride));
    }
    return true;
}

static kvs_attn_job make_job(uint32_t kv_head, uint32_t row)
{
    const reference_attention *a = &own.attention;
    const size_t stride = REFERENCE_HEADS * REFERENCE_HEAD_DIM;
    const size_t at = row * stride + (size_t)kv_head * GROUP * REFERENCE_HEAD_DIM;
    return (kvs_attn_job){.pages = own.views + ((size_t)own.layer * REFERENCE_KV_HEADS + kv_head) * own.n_pages,
                          .limit0 = a->n_slots - a->n_rows + row + 1,
                          .n_rows = kvs_min_u32(KVS_ATTN_ROWS_MAX, a->n_rows - row),
                          .group = GROUP,
                          .head_dim = REFERENCE_HEAD_DIM,
                          .scale = 0.125f,
                          .q = a->q + at,
                          .q_stride = stride,
                          .out = a->out + at,
                          .out_stride = stride,
                          .rope = &own.rope};
}

static void attend_task(void *ctx, uint32_t task, uint32_t thread)
{
    (void)ctx;
    const kvs_attn_job job = make_job(task % REFERENCE_KV_HEADS, task / REFERENCE_KV_HEADS * KVS_ATTN_ROWS_MAX);
    own.k->attend(&job, own.thread_scratch[thread]);
}

static uint32_t n_ranges(void)
{
    return (own.attention.n_slots + SCORE_RANGE_SLOTS - 1) / SCORE_RANGE_SLOTS;
}

static void scores_task(void *ctx, uint32_t task, uint32_t thread)
{
    (void)ctx, (void)thread;
    const uint32_t head = task / n_ranges(), range = task % n_ranges(), begin = range * SCORE_RANGE_SLOTS;
    const kvs_attn_job job = make_job(head, 0);
    own.k->attend_scores(&job, begin, kvs_min_u32(own.attention.n_slots, begin + SCORE_RANGE_SLOTS),
                         own.scores + (size_t)head * GROUP * own.score_stride, own.score_stride,
                         own.m_part + ((size_t)range * REFERENCE_KV_HEADS + head) * GROUP);
}

/* Heads that one thread sums up whole, and into how many parts the dims of each of the others are cut. */
static uint32_t n_whole_heads(void)
{
    return REFERENCE_KV_HEADS - REFERENCE_KV_HEADS % kvs_pool_n_threads(own.pool);
}

static uint32_t n_parts(void)
{
    const uint32_t n_threads = kvs_pool_n_threads(own.pool), n_rest = REFERENCE_KV_HEADS - n_whole_heads();
    const uint32_t common = n_rest != 0 && n_threads % n_rest == 0 ? n_rest : 1; /* of at most three heads */
    return kvs_min_u32(REFERENCE_HEAD_DIM / OUTPUT_DIMS_MIN, n_threads / common);
}

static void output_task(void *ctx, uint32_t task, uint32_t thread)
{
    (void)ctx;
    const bool whole = task < n_whole_heads();
    const uint32_t cut = whole ? 0 : task - n_whole_heads();
    const uint32_t head = whole ? task : n_whole_heads() + cut / n_parts(), part = whole ? 0 : cut % n_parts();
    const uint32_t each = (REFERENCE_HEAD_DIM / OUTPUT_DIMS_MIN + n_parts() - 1) / n_parts() * OUTPUT_DIMS_MIN;
    const uint32_t dims = whole ? REFERENCE_HEAD_DIM : each, begin = part * dims;
    if (begin >= REFERENCE_HEAD_DIM)
        return;
    const kvs_attn_job job = make_job(head, 0);
    float m[GROUP];
    for (uint32_t g = 0; g < GROUP; g++) {
        m[g] = own.m_part[(size_t)head * GROUP + g];
        for (uint32_t r = 1; r < n_ranges(); r++) {
            const float top = own.m_part[((size_t)r * REFERENCE_KV_HEADS + head) * GROUP + g];
            m[g] = top > m[g] ? top : m[g];
        }
    }
    own.k->attend_output(&job, own.scores + (size_t)head * GROUP * own.score_stride, own.score_stride, m, begin,
                         kvs_min_u32(REFERENCE_HEAD_DIM, begin + dims), own.thread_scratch[thread]);
}

/* One row is shared out as src/session/attend.c does it. */
static void attention_run(void)
{
    kvs_affinity saved;
    kvs_pool_enter(own.pool, &saved);
    for (own.layer = 0; own.layer < own.attention.n_layers; own.layer++) {
        if (own.attention.n_rows == 1 && REFERENCE_KV_HEADS % kvs_pool_n_threads(own.pool) != 0) {
            kvs_pool_run(own.pool, scores_task, NULL, REFERENCE_KV_HEADS * n_ranges());
            kvs_pool_run(own.pool, output_task, NULL,
                         n_whole_heads() + (REFERENCE_KV_HEADS - n_whole_heads()) * n_parts());
        } else {
            kvs_pool_run(own.pool, attend_task, NULL,
                         REFERENCE_KV_HEADS * ((own.attention.n_rows + KVS_ATTN_ROWS_MAX - 1) / KVS_ATTN_ROWS_MAX));
        }
    }
    kvs_pool_leave(&saved);
}

static void describe(char *text, uint32_t text_bytes)
{
    snprintf(text, text_bytes, "Kvasir %s, %s", KVS_VERSION_STRING, kvs_cpu_isa_name(kvs_cpu_masked(0)));
}

const reference_engine reference_kvasir = {"kvasir", open, products, product_run, attention, attention_run, describe};

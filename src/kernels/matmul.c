/* Drivers of the products with a weight matrix: they share out panels over the pool, lay out scratch, handle the last
 * partial panel and the types without a packed form. The arithmetic is in matmul_{ref,avx2,avx512,avx512vnni}.c. */
#include "kernels/matmul.h"

/* K-block of the f32 path: two widened panels of it are 64 KiB, within the second-level cache of any AVX2 machine. */
enum { K_BLOCK = 512, TASKS_PER_THREAD = 4 };

struct job {
    const struct kvs_matmul_kernels *kernels;
    const kvs_weight *w;
    const float *x;
    size_t x_stride;
    float *y;
    size_t y_stride;
    uint32_t n_rows;
    uint32_t panels_per_task; /* even wherever pairs count */
    uint32_t n_splits;        /* of the rows, when panels alone would leave threads idle */
    bool round;               /* activations to the weights' f16 or bf16 first */
    uint8_t *acts;            /* rearranged or quantised activations */
    uint8_t *thread_scratch;
    size_t thread_bytes;
};

const struct kvs_matmul_kernels *kvs_matmul_kernels_get(uint32_t cpu)
{
#if defined(__x86_64__)
    if (cpu & KVS_CPU_VNNI)
        return &kvs_matmul_kernels_avx512vnni;
    if (cpu & KVS_CPU_AVX512)
        return &kvs_matmul_kernels_avx512;
    if (cpu & KVS_CPU_AVX2)
        return &kvs_matmul_kernels_avx2;
#elif defined(__aarch64__)
    if (cpu & KVS_CPU_DOTPROD)
        return &kvs_matmul_kernels_neondot;
    if (cpu & KVS_CPU_NEON)
        return &kvs_matmul_kernels_neon;
#endif
    (void)cpu;
    return &kvs_matmul_kernels_ref;
}

/* ---- scratch ---- */

static size_t other_panels_bytes(const kvs_weight *w)
{
    return w->type == KVS_WEIGHT_OTHER ? 2 * kvs_panel_bytes(KVS_WEIGHT_F32, w->n_in) : 0;
}

/* Per thread: widened panels, accumulators of a panel pair, and for OTHER one widened row. */
static size_t f32_thread_bytes(const kvs_weight *w, uint32_t n_rows)
{
    const size_t widened = w->type == KVS_WEIGHT_OTHER
                               ? other_panels_bytes(w) + kvs_round_up((size_t)w->n_in * sizeof(float), KVS_ALIGN)
                               : (size_t)2 * K_BLOCK * KVS_PANEL * sizeof(float);
    return widened + ((size_t)n_rows + KVS_F32_TILE_ROWS_MAX) * 2 * KVS_PANEL * sizeof(float);
}

static size_t f32_acts_bytes(const kvs_weight *w, uint32_t n_rows)
{
    return kvs_round_up(((size_t)n_rows + KVS_F32_TILE_ROWS_MAX) * w->n_in * sizeof(float), KVS_ALIGN);
}

static size_t native_acts_bytes(const kvs_weight *w, uint32_t n_rows)
{
    if (w->type == KVS_WEIGHT_OTHER)
        return n_rows * kvs_round_up(w->act_row_bytes, KVS_ALIGN);
    return kvs_round_up(n_rows, KVS_ACT_TILE) / KVS_ACT_TILE * (w->n_in / KVS_QBLOCK) * sizeof(struct kvs_act_block);
}

size_t kvs_matmul_scratch_bytes(const kvs_weight *w, uint32_t n_rows, uint32_t n_threads)
{
    const size_t f32 = f32_acts_bytes(w, n_rows) + n_threads * f32_thread_bytes(w, n_rows);
    const size_t native = native_acts_bytes(w, n_rows);
    return kvs_round_up(f32 > native ? f32 : native, KVS_ALIGN);
}

/* ---- sharing out ---- */

static uint32_t n_panels_of(const kvs_weight *w)
{
    return (w->n_out + KVS_PANEL - 1) / KVS_PANEL;
}
static uint32_t div_up(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

/* Sets panels_per_task (a multiple of two) and n_splits for n_tiles tiles of rows; returns the number of tasks. */
static uint32_t share_out(struct job *j, const kvs_pool *pool, uint32_t n_tiles)
{
    const uint32_t n_pairs = div_up(n_panels_of(j->w), 2), wanted = kvs_pool_n_threads(pool) * TASKS_PER_THREAD;
    j->panels_per_task = 2 * kvs_max_u32(1, n_pairs / wanted);
    j->n_splits = kvs_max_u32(1, kvs_min_u32(n_tiles, wanted / (2 * n_pairs)));
    return div_up(n_panels_of(j->w), j->panels_per_task) * j->n_splits;
}

/* Panels and tiles of one task. */
struct share {
    uint32_t panel_begin, n_panels, tile_begin, tile_end;
};

static struct share share_of(const struct job *j, uint32_t task, uint32_t n_tiles)
{
    const uint32_t begin = task / j->n_splits * j->panels_per_task, split = task % j->n_splits;
    return (struct share){begin, kvs_min_u32(j->panels_per_task, n_panels_of(j->w) - begin),
                          (uint32_t)((uint64_t)n_tiles * split / j->n_splits),
                          (uint32_t)((uint64_t)n_tiles * (split + 1) / j->n_splits)};
}

/* ---- f32, few rows ---- */

static void copy_rows(float *y, size_t y_stride, const float *src, size_t src_stride, uint32_t n_rows, uint32_t n_cols)
{
    for (uint32_t r = 0; r < n_rows; r++)
        memcpy(y + r * y_stride, src + r * src_stride, n_cols * sizeof *y);
}

/* Whole panels go to y directly; the last partial one through a buffer, so that nothing beyond n_out is written. */
static uint32_t n_whole_panels(const kvs_weight *w, const struct share *s)
{
    return kvs_min_u32(s->n_panels, w->n_out / KVS_PANEL - kvs_min_u32(s->panel_begin, w->n_out / KVS_PANEL));
}

static void few_task(void *ctx, uint32_t task, uint32_t thread)
{
    const struct job *j = ctx;
    (void)thread;
    const struct share s = share_of(j, task, 1);
    const uint32_t n_whole = n_whole_panels(j->w, &s);
    float *y = j->y + (size_t)s.panel_begin * KVS_PANEL;
    struct kvs_panels p = kvs_weight_panels(j->w, s.panel_begin, n_whole);
    if (n_whole != 0)
        j->kernels->f32_few(&p, j->x, j->x_stride, j->n_rows, y, j->y_stride);
    if (n_whole == s.n_panels)
        return;
    float edge[KVS_F32_FEW_ROWS * KVS_PANEL];
    p = kvs_weight_panels(j->w, s.panel_begin + n_whole, 1);
    j->kernels->f32_few(&p, j->x, j->x_stride, j->n_rows, edge, KVS_PANEL);
    copy_rows(y + (size_t)n_whole * KVS_PANEL, j->y_stride, edge, KVS_PANEL, j->n_rows, j->w->n_out % KVS_PANEL);
}

static void round_task(void *ctx, uint32_t task, uint32_t thread)
{
    const struct job *j = ctx;
    (void)task, (void)thread;
    for (uint32_t r = 0; r < j->n_rows; r++)
        j->kernels->round(j->w->type, j->x + r * j->x_stride, j->w->n_in,
                          (float *)(void *)j->acts + (size_t)r * j->w->n_in);
}

/* ---- f32, many rows ---- */

/* One tile of activations as [n_in][row_tile], padded with zero rows. */
static void interleave_task(void *ctx, uint32_t task, uint32_t thread)
{
    const struct job *j = ctx;
    (void)thread;
    const uint32_t row_tile = j->kernels->row_tile, n_in = j->w->n_in, row0 = task * row_tile;
    float *dst = (float *)(void *)j->acts + (size_t)row0 * n_in;
    const uint32_t n_rows = kvs_min_u32(row_tile, j->n_rows - row0);
    if (n_rows < row_tile)
        memset(dst, 0, (size_t)row_tile * n_in * sizeof *dst);
    for (uint32_t r = 0; r < n_rows; r++) {
        const float *src = j->x + (row0 + r) * j->x_stride;
        for (size_t k = 0; k < n_in; k++)
            dst[k * row_tile + r] = src[k];
    }
    if (j->round)
        j->kernels->round(j->w->type, dst, row_tile * n_in, dst);
}

/* Two panels of weights k_begin .. k_begin + n_k as f32; where they stand is left in w[2]. */
static void pair_weights(const struct job *j, uint32_t panel, uint32_t n_panels, uint32_t k_begin, uint32_t n_k,
                         float *buffer, const float **w)
{
    for (uint32_t i = 0; i < n_panels; i++) {
        const struct kvs_panels p = kvs_weight_panels(j->w, panel + i, 1);
        if (j->w->type == KVS_WEIGHT_F32) {
            w[i] = (const float *)(const void *)p.base + (size_t)k_begin * KVS_PANEL;
            continue;
        }
        float *out = buffer + (size_t)i * K_BLOCK * KVS_PANEL;
        j->kernels->widen(&p, k_begin, n_k, out);
        w[i] = out;
    }
    if (n_panels == 1)
        w[1] = w[0];
}

static void other_pair_weights(const struct job *j, uint32_t panel, float *buffer, float *row_buffer, const float **w)
{
    const uint32_t n_in = j->w->n_in;
    for (uint32_t i = 0; i < 2 * KVS_PANEL; i++) {
        const uint32_t row = panel * KVS_PANEL + i;
        float *dst = buffer + (size_t)(i / KVS_PANEL) * n_in * KVS_PANEL + i % KVS_PANEL;
        if (row < j->w->n_out)
            kvs_weight_row(j->w, row, row_buffer);
        else
            memset(row_buffer, 0, n_in * sizeof *row_buffer);
        for (size_t k = 0; k < n_in; k++)
            dst[k * KVS_PANEL] = row_buffer[k];
    }
    w[0] = buffer;
    w[1] = buffer + (size_t)n_in * KVS_PANEL;
}

/* The last K-block writes straight to y where the tile is whole there. y: the pair's first output. */
static void tiles_step(const struct job *j, const struct share *s, const float *const *w, uint32_t k_begin,
                       uint32_t n_k, uint32_t n_outs, float *acc, float *y)
{
    const uint32_t row_tile = j->kernels->row_tile;
    const bool last = k_begin + n_k == j->w->n_in;
    for (uint32_t t = s->tile_begin; t < s->tile_end; t++, acc += (size_t)row_tile * 2 * KVS_PANEL) {
        const float *x = (const float *)(void *)j->acts + ((size_t)t * j->w->n_in + k_begin) * row_tile;
        const uint32_t n_rows = kvs_min_u32(row_tile, j->n_rows - t * row_tile);
        float *const at = y + (size_t)t * row_tile * j->y_stride;
        const bool direct = last && n_rows == row_tile && n_outs == 2 * KVS_PANEL;
        j->kernels->f32_tile(w[0], w[1], x, n_k, n_rows, k_begin == 0 ? NULL : acc, direct ? at : acc,
                             direct ? j->y_stride : 2 * KVS_PANEL);
        if (last && !direct)
            copy_rows(at, j->y_stride, acc, 2 * KVS_PANEL, n_rows, n_outs);
    }
}

/* Two panels x the task's rows: weights are widened one K-block at a time and used for all rows; accumulators wait in
 * memory between K-blocks, which continues the same chain. */
static void tile_pair(const struct job *j, const struct share *s, uint32_t panel, uint32_t n_panels, uint8_t *scratch)
{
    const uint32_t n_in = j->w->n_in, n0 = panel * KVS_PANEL;
    const uint32_t n_outs = kvs_min_u32(n_panels * KVS_PANEL, j->w->n_out - n0);
    float *const y = j->y + n0;
    const float *w[2];
    float *acc = (float *)(void *)scratch;
    float *buffer = acc + ((size_t)j->n_rows + KVS_F32_TILE_ROWS_MAX) * 2 * KVS_PANEL;
    if (j->w->type == KVS_WEIGHT_OTHER) {
        other_pair_weights(j, panel, buffer, buffer + (size_t)2 * n_in * KVS_PANEL, w);
        tiles_step(j, s, w, 0, n_in, n_outs, acc, y);
    } else {
        /* equal K-blocks in whole quantisation blocks */
        const uint32_t n_steps = div_up(n_in, K_BLOCK);
        const uint32_t step = div_up(div_up(n_in, KVS_QBLOCK), n_steps) * KVS_QBLOCK;
        for (uint32_t k = 0; k < n_in; k += step) {
            const uint32_t n_k = kvs_min_u32(step, n_in - k);
            pair_weights(j, panel, n_panels, k, n_k, buffer, w);
            tiles_step(j, s, w, k, n_k, n_outs, acc, y);
        }
    }
}

static void tile_task(void *ctx, uint32_t task, uint32_t thread)
{
    const struct job *j = ctx;
    const struct share s = share_of(j, task, div_up(j->n_rows, j->kernels->row_tile));
    for (uint32_t i = 0; i < s.n_panels; i += 2)
        tile_pair(j, &s, s.panel_begin + i, kvs_min_u32(2, s.n_panels - i),
                  j->thread_scratch + thread * j->thread_bytes);
}

static void run_f32(struct job j, kvs_pool *pool)
{
    if (j.w->type != KVS_WEIGHT_OTHER && j.n_rows <= KVS_F32_FEW_ROWS) {
        if (j.round) {
            kvs_pool_run(pool, round_task, &j, 1);
            j.x = (const float *)(const void *)j.acts;
            j.x_stride = j.w->n_in;
        }
        kvs_pool_run(pool, few_task, &j, share_out(&j, pool, 1));
        return;
    }
    const uint32_t n_tiles = div_up(j.n_rows, j.kernels->row_tile);
    j.thread_scratch = j.acts + f32_acts_bytes(j.w, j.n_rows);
    j.thread_bytes = f32_thread_bytes(j.w, j.n_rows);
    kvs_pool_run(pool, interleave_task, &j, n_tiles);
    kvs_pool_run(pool, tile_task, &j, share_out(&j, pool, n_tiles));
}

void kvs_matmul_f32(const kvs_kernels *k, kvs_pool *pool, const kvs_weight *w, const float *x, size_t x_stride,
                    float *y, size_t y_stride, uint32_t n_rows, void *scratch)
{
    if (n_rows == 0 || w->n_out == 0)
        return;
    run_f32((struct job){.kernels = k->matmul,
                         .w = w,
                         .x = x,
                         .x_stride = x_stride,
                         .y = y,
                         .y_stride = y_stride,
                         .n_rows = n_rows,
                         .acts = scratch},
            pool);
}

/* ---- native ---- */

static struct kvs_act_block *act_tile(const struct job *j, uint32_t tile)
{
    return (struct kvs_act_block *)(void *)j->acts + (size_t)tile * (j->w->n_in / KVS_QBLOCK);
}

static void quantise_task(void *ctx, uint32_t task, uint32_t thread)
{
    const struct job *j = ctx;
    (void)thread;
    for (uint32_t r = task * KVS_ACT_TILE; r < kvs_min_u32((task + 1) * KVS_ACT_TILE, j->n_rows); r++)
        (kvs_is_k(j->w->type) ? j->kernels->quantise_k : j->kernels->quantise)(j->x + r * j->x_stride, j->w->n_in,
                                                                               act_tile(j, task), r % KVS_ACT_TILE);
}

/* One row: all panels in a stream. Many: a panel at a time stays in the first-level cache while the tiles pass. */
static void native_task(void *ctx, uint32_t task, uint32_t thread)
{
    const struct job *j = ctx;
    (void)thread;
    const struct share s = share_of(j, task, div_up(j->n_rows, KVS_ACT_TILE));
    const uint32_t n_whole = n_whole_panels(j->w, &s), step = j->n_rows <= KVS_ACT_TILE ? n_whole : 1;
    for (uint32_t i = 0; i < n_whole; i += step) {
        const struct kvs_panels p = kvs_weight_panels(j->w, s.panel_begin + i, kvs_min_u32(step, n_whole - i));
        for (uint32_t t = s.tile_begin; t < s.tile_end; t++)
            j->kernels->native(&p, act_tile(j, t), kvs_min_u32(KVS_ACT_TILE, j->n_rows - t * KVS_ACT_TILE),
                               j->y + (size_t)t * KVS_ACT_TILE * j->y_stride + (size_t)(s.panel_begin + i) * KVS_PANEL,
                               j->y_stride);
    }
    if (n_whole == s.n_panels)
        return;
    const struct kvs_panels p = kvs_weight_panels(j->w, s.panel_begin + n_whole, 1);
    for (uint32_t t = s.tile_begin; t < s.tile_end; t++) {
        float edge[KVS_ACT_TILE * KVS_PANEL];
        const uint32_t n_rows = kvs_min_u32(KVS_ACT_TILE, j->n_rows - t * KVS_ACT_TILE);
        j->kernels->native(&p, act_tile(j, t), n_rows, edge, KVS_PANEL);
        copy_rows(j->y + (size_t)t * KVS_ACT_TILE * j->y_stride + (size_t)(s.panel_begin + n_whole) * KVS_PANEL,
                  j->y_stride, edge, KVS_PANEL, n_rows, j->w->n_out % KVS_PANEL);
    }
}

static void other_quantise_task(void *ctx, uint32_t task, uint32_t thread)
{
    const struct job *j = ctx;
    (void)thread;
    j->w->from_float(j->x + task * j->x_stride, j->acts + task * kvs_round_up(j->w->act_row_bytes, KVS_ALIGN),
                     j->w->n_in);
}

static void other_task(void *ctx, uint32_t task, uint32_t thread)
{
    const struct job *j = ctx;
    (void)thread;
    const struct share s = share_of(j, task, 1);
    const uint32_t n_end = kvs_min_u32((s.panel_begin + s.n_panels) * KVS_PANEL, j->w->n_out);
    const size_t act_bytes = kvs_round_up(j->w->act_row_bytes, KVS_ALIGN);
    for (uint32_t n = s.panel_begin * KVS_PANEL; n < n_end; n++)
        for (uint32_t r = 0; r < j->n_rows; r++)
            j->w->vec_dot((int)j->w->n_in, j->y + r * j->y_stride + n, 0,
                          (const uint8_t *)j->w->raw + n * j->w->raw_row_bytes, 0, j->acts + r * act_bytes, 0, 1);
}

void kvs_matmul_native(const kvs_kernels *k, kvs_pool *pool, const kvs_weight *w, const float *x, size_t x_stride,
                       float *y, size_t y_stride, uint32_t n_rows, void *scratch)
{
    if (n_rows == 0 || w->n_out == 0)
        return;
    struct job j = {.kernels = k->matmul,
                    .w = w,
                    .x = x,
                    .x_stride = x_stride,
                    .y = y,
                    .y_stride = y_stride,
                    .n_rows = n_rows,
                    .round = w->type == KVS_WEIGHT_F16 || w->type == KVS_WEIGHT_BF16,
                    .acts = scratch};
    if (kvs_dense_bytes(w->type) != 0) {
        run_f32(j, pool);
        return;
    }
    if (w->type == KVS_WEIGHT_OTHER) {
        kvs_pool_run(pool, other_quantise_task, &j, n_rows);
        kvs_pool_run(pool, other_task, &j, share_out(&j, pool, 1));
        return;
    }
    const uint32_t n_tiles = div_up(n_rows, KVS_ACT_TILE);
    kvs_pool_run(pool, quantise_task, &j, n_tiles); /* one tile: no hand-over to the pool */
    kvs_pool_run(pool, native_task, &j, share_out(&j, pool, n_tiles));
}

/* How fast attention over pages is, per instruction set. Decode: one row over all 90 (layer, KV head) of a model shaped
 * like SmolLM2-135M (group 3, head_dim 64, f16); every head has its own pages. Prefill: eight rows a call, over 30
 * heads. Prints CSV: the best of seven repeats, their median beside it (far apart: the machine was busy), and the rate
 * of the best.
 *
 *     bench_attention [threads]
 */
#include "kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    HEADS = 90,
    GROUP = 3,
    DIM = 64,
    N_POS = 8192,
    DEPTH_MAX = 7680,
    PAGES = DEPTH_MAX / KVS_PAGE_SLOTS,
    CHUNK_PAGES = 4,
    REPEATS = 7
};

typedef enum scene { SCENE_DENSE, SCENE_HALF, SCENE_ROTATED, SCENE_WORST, SCENE_COUNT } scene;
static const char *const scene_name[] = {"dense", "half_live", "rotated_uniform", "rotated_every_2nd"};

typedef struct bench {
    const kvs_kernels *k;
    kvs_page_view *pages;        /* [HEADS][PAGES] */
    int32_t *rope_pos, *key_rot; /* [PAGES][64] */
    float *q, *out;              /* [HEADS][KVS_ATTN_ROWS_MAX][GROUP * DIM] */
    void *scratch[64];
    kvs_rope_table rope;
    uint32_t depth, rows;
} bench;

static void *take(size_t n, size_t size_bytes)
{
    void *const p = kvs_alloc(kvs_allocator_default(), n, size_bytes);
    if (!p) {
        fprintf(stderr, "bench_attention: out of memory\n");
        exit(1);
    }
    return p;
}

static void fill_pages(bench *b)
{
    kvs_rng rng = {1};
    const size_t page_halfs = (size_t)KVS_PAGE_SLOTS * DIM;
    uint16_t *const kv = take((size_t)HEADS * PAGES * 2 * page_halfs, sizeof *kv);
    for (size_t i = 0; i < (size_t)HEADS * PAGES * 2 * page_halfs; i += 4) {
        const uint64_t bits = kvs_rng_next(&rng) & UINT64_C(0x83ff83ff83ff83ff); /* 2^-2 to 2^-1, either sign */
        const uint64_t four = bits | UINT64_C(0x3400340034003400);
        memcpy(kv + i, &four, sizeof four);
    }
    b->pages = take((size_t)HEADS * PAGES, sizeof *b->pages);
    b->rope_pos = take(DEPTH_MAX, sizeof *b->rope_pos);
    b->key_rot = take(DEPTH_MAX, sizeof *b->key_rot);
    for (size_t p = 0; p < (size_t)HEADS * PAGES;
         p++) { /* where a cache has them: a chunk's pages of a head together */
        const size_t head = p / PAGES, page = p % PAGES;
        const size_t block = (page / CHUNK_PAGES * HEADS + head) * CHUNK_PAGES + page % CHUNK_PAGES;
        b->pages[p] = (kvs_page_view){.k = kv + block * page_halfs,
                                      .v = kv + ((size_t)HEADS * PAGES + block) * page_halfs,
                                      .rope_pos = b->rope_pos + p % PAGES * KVS_PAGE_SLOTS,
                                      .key_rot = b->key_rot + p % PAGES * KVS_PAGE_SLOTS};
    }
    const size_t n_q = (size_t)HEADS * KVS_ATTN_ROWS_MAX * GROUP * DIM;
    b->q = take(n_q, sizeof *b->q), b->out = take(n_q, sizeof *b->out);
    for (size_t i = 0; i < n_q; i++)
        b->q[i] = (float)kvs_rng_double(&rng) - 0.5f;
}

static void fill_rope(bench *b)
{
    static double theta[DIM / 2];
    float *const rows = take((size_t)N_POS * DIM, sizeof *rows);
    for (uint32_t i = 0; i < DIM / 2; i++) {
        theta[i] = pow(1e5, -2.0 * i / DIM);
        for (uint32_t pos = 0; pos < N_POS; pos++) {
            rows[(size_t)pos * DIM + i] = (float)cos(pos * theta[i]);
            rows[(size_t)pos * DIM + DIM / 2 + i] = (float)sin(pos * theta[i]);
        }
    }
    b->rope = (kvs_rope_table){.rows = rows, .n_pos = N_POS, .n_freq = DIM / 2, .theta = theta};
}

static void set_scene(bench *b, scene s)
{
    kvs_rng rng = {2};
    for (int32_t i = 0; i < DEPTH_MAX; i++) {
        b->key_rot[i] = i;
        b->rope_pos[i] = s == SCENE_ROTATED ? i - 100 : s == SCENE_WORST ? i - i / 2 : i;
    }
    for (size_t p = 0; p < (size_t)HEADS * PAGES; p++) {
        b->pages[p].live = s == SCENE_HALF ? kvs_rng_next(&rng) : UINT64_MAX;
        b->pages[p].rotated = s == SCENE_ROTATED || s == SCENE_WORST;
    }
}

static void one_head(void *ctx, uint32_t head, uint32_t thread)
{
    const bench *const b = ctx;
    const size_t at = (size_t)head * KVS_ATTN_ROWS_MAX * GROUP * DIM;
    const kvs_attn_job job = {.pages = b->pages + (size_t)head * PAGES,
                              .limit0 = b->depth - b->rows + 1,
                              .n_rows = b->rows,
                              .group = GROUP,
                              .head_dim = DIM,
                              .scale = 0.125f,
                              .q = b->q + at,
                              .q_stride = GROUP * DIM,
                              .out = b->out + at,
                              .out_stride = GROUP * DIM,
                              .rope = &b->rope};
    b->k->attend(&job, b->scratch[thread]);
}

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Milliseconds of one pass over n_heads: the best, and the median. */
static double best_ms(bench *b, kvs_pool *pool, uint32_t n_heads, double *median)
{
    double ms[REPEATS];
    kvs_pool_run(pool, one_head, b, n_heads);
    for (int i = 0; i < REPEATS; i++) {
        const uint64_t start = kvs_now_ns();
        kvs_pool_run(pool, one_head, b, n_heads);
        ms[i] = (double)(kvs_now_ns() - start) / 1e6;
    }
    qsort(ms, REPEATS, sizeof ms[0], by_size);
    *median = ms[REPEATS / 2];
    return ms[0];
}

static void bench_level(bench *b, kvs_pool *pool, uint32_t cpu)
{
    const uint32_t depths[] = {512, 2048, 7680}, threads = kvs_pool_n_threads(pool);
    b->k = kvs_kernels_get(cpu);
    for (int s = 0; s < SCENE_COUNT; s++) {
        set_scene(b, (scene)s);
        for (size_t d = 0; d < (cpu ? 3 : 1); d++) { /* the plain twin is not for speed: one depth shows it */
            b->depth = depths[d], b->rows = 1;
            double median;
            const double ms = best_ms(b, pool, HEADS, &median), bytes = (double)depths[d] * HEADS * DIM * 2 * 2;
            printf("%s,decode,%s,%u,%u,%.3f,%.3f,ms,%.2f,GB/s\n", kvs_cpu_isa_name(cpu), scene_name[s], depths[d],
                   threads, ms, median, bytes / ms / 1e6);
            b->rows = KVS_ATTN_ROWS_MAX;
            const uint32_t heads = cpu ? 30 : 2;
            const double prefill_ms = best_ms(b, pool, heads, &median);
            const double flop = (double)depths[d] * KVS_ATTN_ROWS_MAX * GROUP * DIM * 4 * heads;
            printf("%s,prefill,%s,%u,%u,%.3f,%.3f,ms,%.2f,GFLOP/s\n", kvs_cpu_isa_name(cpu), scene_name[s], depths[d],
                   threads, prefill_ms, median, flop / prefill_ms / 1e6);
        }
    }
}

static void bench_vocab(uint32_t cpu)
{
    enum { VOCAB = 49152, RUNS = 21 };
    float *const p = take(VOCAB, sizeof *p), *const q = take(VOCAB, sizeof *q);
    kvs_rng rng = {3};
    for (uint32_t i = 0; i < VOCAB; i++) {
        p[i] = 20.0f * (float)kvs_rng_double(&rng);
        q[i] = p[i] + (float)kvs_rng_double(&rng);
    }
    double lse_us[RUNS], pair_us[RUNS];
    for (int i = 0; i < RUNS; i++) {
        kvs_dist_pair out;
        uint64_t start = kvs_now_ns();
        kvs_kernels_get(cpu)->logsumexp(p, VOCAB, NULL);
        lse_us[i] = (double)(kvs_now_ns() - start) / 1e3;
        start = kvs_now_ns();
        kvs_kernels_get(cpu)->dist_pair(&out, p, q, VOCAB);
        pair_us[i] = (double)(kvs_now_ns() - start) / 1e3;
    }
    qsort(lse_us, RUNS, sizeof lse_us[0], by_size), qsort(pair_us, RUNS, sizeof pair_us[0], by_size);
    printf("%s,logsumexp,vocab,%d,1,%.1f,%.1f,us,,\n", kvs_cpu_isa_name(cpu), VOCAB, lse_us[0], lse_us[RUNS / 2]);
    printf("%s,dist_pair,vocab,%d,1,%.1f,%.1f,us,,\n", kvs_cpu_isa_name(cpu), VOCAB, pair_us[0], pair_us[RUNS / 2]);
    kvs_free(kvs_allocator_default(), p), kvs_free(kvs_allocator_default(), q);
}

int main(int argc, char **argv)
{
    const uint32_t threads = argc > 1 ? (uint32_t)atoi(argv[1]) : kvs_cores_available();
    if (threads < 1 || threads > 64) {
        fprintf(stderr, "bench_attention: threads must be 1 to 64, not %s\n", argc > 1 ? argv[1] : "0");
        return 2;
    }
    const uint32_t levels[] = {KVS_CPU_AVX2 | KVS_CPU_AVX512, KVS_CPU_AVX2, 0};
    static bench b;
    fill_pages(&b);
    fill_rope(&b);
    for (uint32_t t = 0; t < threads; t++)
        b.scratch[t] = take(kvs_attn_scratch_bytes(GROUP, DIM, DEPTH_MAX), 1);
    kvs_pool *const pool = kvs_pool_create(kvs_allocator_default(), threads);
    if (!pool)
        return 1;
    printf("isa,phase,scene,depth,threads,best,median,unit,rate,rate_unit\n");
    for (size_t l = 0; l < sizeof levels / sizeof levels[0]; l++) {
        if ((kvs_cpu_flags() & levels[l]) != levels[l])
            continue;
        bench_level(&b, pool, levels[l]);
        bench_vocab(levels[l]);
    }
    kvs_pool_free(pool);
    return 0;
}

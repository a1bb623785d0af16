/* What evicting costs, on a cache shaped like SmolLM2-135M's: 30 layers of 3 KV heads of 64 dims in f16, 8,192 slots in
 * each, one thread, best of five.
 *   1. One eviction of each preset: scoring, selecting, moving.
 *   2. Compaction of a randomly kept share against a memcpy of the bytes that moved.
 *   3. One decoded token's attention over a randomly kept share, different in each head: as evicted, and laid together,
 *      against as many slots that were never scattered; keys where they were written, and re-rotated to their ranks.
 *   4. With a model: what each preset adds to a turn (recording attention, selecting, moving) as a share of it.
 *
 *     bench_evict [threads [part]]     threads is for part 4 only
 * The model is $KVASIR_MODEL, else the one that scripts/setup fetched; without one part 4 is left out. */
#include "session/session_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    LAYERS = 30,
    KV_HEADS = 3,
    HEADS = LAYERS * KV_HEADS,
    GROUP = 3,
    DIM = 64,
    SLOTS = 8192,
    REPEATS = 9,
    STEP = 256
};

static void die(const char *what, const char *why)
{
    fprintf(stderr, "bench_evict: %s: %s\n", what, why);
    exit(1);
}

static void *take(size_t n, size_t size_bytes)
{
    void *const p = kvs_alloc(kvs_allocator_default(), n, size_bytes);
    if (p == NULL)
        die("memory", "none left");
    return p;
}

/* Time of this thread alone: what else the machine runs must not count. */
static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double since_ms(uint64_t t0)
{
    return (double)(cpu_ns() - t0) / 1e6;
}

/* ---- a session without a model behind it ------------------------------------------------------------------------ */

static kvs_model shape;

static void shape_init(void)
{
    shape.allocator = kvs_allocator_default();
    shape.info = (kvs_model_info){.n_layers = LAYERS,
                                  .n_heads = KV_HEADS * GROUP,
                                  .n_kv_heads = KV_HEADS,
                                  .head_dim = DIM,
                                  .vocab_size = 49152,
                                  .window_tokens = SLOTS};
    shape.kernels = kvs_kernels_get(kvs_cpu_masked(0));
    if ((shape.pool = kvs_pool_create(shape.allocator, 1)) == NULL)
        die("threads", "none");
}

static void session_open(kvs_session *s, const char *spec, const char *position)
{
    kvs_error err;
    *s = (kvs_session){.model = &shape, .allocator = shape.allocator, .chunk_tokens = STEP, .mass_lost = -1};
    s->options.seed = 1;
    s->uniform = s->layer_uniform = true;
    if (kvs_policy_parse(spec, position, false, &s->policy, &err) != KVS_OK)
        die(spec, err.message);
    const kvs_cache_config config = {.n_layers = LAYERS,
                                     .n_kv_heads = KV_HEADS,
                                     .head_dim = DIM,
                                     .side_mask = kvs_side_mask(&s->policy),
                                     .budget_tokens = SLOTS,
                                     .allocator = s->allocator};
    if (kvs_cache_create(&config, &s->cache, &err) != KVS_OK || kvs_evict_scratch_create(s, &err) != KVS_OK)
        die(spec, err.message);
}

static void session_close(kvs_session *s)
{
    kvs_cache_free(&s->cache);
    kvs_evict_scratch_free(s);
}

/* Turns of a marker of 4 tokens, 60 tokens, a marker of 8, 120 tokens; random keys, values and masses in every page. */
static void fill(kvs_session *s, uint32_t n_slots)
{
    int32_t pos[STEP], token[STEP];
    uint8_t flags[STEP];
    kvs_error err;
    kvs_rng rng = {7};
    kvs_cache_clear(s->cache);
    for (uint32_t at = 0; at < n_slots; at += STEP) {
        const uint32_t n = kvs_min_u32(STEP, n_slots - at);
        for (uint32_t i = 0; i < n; i++) {
            const uint32_t in_turn = (at + i) % 192;
            pos[i] = (int32_t)(at + i);
            token[i] = (int32_t)kvs_rng_below(&rng, 49152);
            flags[i] = in_turn < 4 || (in_turn >= 64 && in_turn < 72) ? KVS_TOKEN_TEMPLATE : KVS_TOKEN_USER;
        }
        if (kvs_cache_append(s->cache, pos, token, flags, n, &err) != KVS_OK)
            die("append", err.message);
    }
    s->n_tokens = n_slots;
    static kvs_page_view views[SLOTS / KVS_PAGE_SLOTS + 1];
    static float *sides[KVS_SIDE_COUNT][SLOTS / KVS_PAGE_SLOTS + 1];
    float **side[KVS_SIDE_COUNT] = {sides[0], sides[1], sides[2], sides[3]};
    for (uint32_t h = 0; h < HEADS; h++) {
        const uint32_t n_pages = kvs_cache_n_pages(s->cache, h / KV_HEADS, h % KV_HEADS);
        kvs_cache_views(s->cache, h / KV_HEADS, h % KV_HEADS, views, side);
        for (uint32_t p = 0; p < n_pages; p++) {
            for (uint32_t slot = 0; slot < KVS_PAGE_SLOTS; slot++)
                for (int k = 0; k < KVS_SIDE_COUNT; k++)
                    if (sides[k][p] != NULL)
                        sides[k][p][slot] = (float)kvs_rng_double(&rng);
            uint64_t *kv[2] = {(uint64_t *)(uintptr_t)views[p].k, (uint64_t *)(uintptr_t)views[p].v};
            for (size_t i = 0; i < (size_t)KVS_PAGE_SLOTS * DIM / 4; i++) /* f16 from 2^-2 to 2^-1, either sign */
                for (int b = 0; b < 2; b++)
                    kv[b][i] = (kvs_rng_next(&rng) & UINT64_C(0x83ff83ff83ff83ff)) | UINT64_C(0x3400340034003400);
        }
    }
}

/* ---- 1. one eviction of each preset ----------------------------------------------------------------------------- */

static void keep_event(void *ctx, const kvs_event *event)
{
    *(kvs_event *)ctx = *event;
}

static void bench_preset(const char *spec)
{
    kvs_session s;
    session_open(&s, spec, NULL);
    double score = INFINITY, select = INFINITY, move = INFINITY, all = INFINITY;
    kvs_event event = {0};
    kvs_session_on_event(&s, keep_event, &event);
    for (int i = 0; i < REPEATS; i++) {
        bool progress;
        kvs_error err;
        s.uniform = s.layer_uniform = true;
        s.n_evictions = 0;
        fill(&s, SLOTS);
        const uint64_t t0 = cpu_ns();
        if (kvs_evict(&s, NULL, 0, "bench", "bench", &progress, &err) != KVS_OK || !progress)
            die(spec, "evicts nothing");
        all = fmin(all, since_ms(t0));
        score = fmin(score, (double)event.score_ns / 1e6);
        select = fmin(select, (double)event.select_ns / 1e6);
        move = fmin(move, (double)event.move_ns / 1e6);
    }
    printf("evict,%s,%u,%u,%.2f,%.2f,%.2f,%.2f,%.2f\n", spec, event.n_before, event.n_after, score, select,
           score + select, move, all);
    fflush(stdout);
    session_close(&s);
}

/* A profile of the model, which there is none of here. */
static bool needs_file(const kvs_policy *p)
{
    return p->budget != NULL && p->budget->file != NULL;
}

static void bench_presets(void)
{
    printf("part,preset,slots_before,slots_after,score_ms,select_ms,score_and_select_ms,move_ms,cpu_ms\n");
    for (uint32_t i = 0; i < kvs_policy_count(); i++) {
        /* Scorers that read keys or queries need a model's: part 4 has them. */
        kvs_policy p;
        if (!kvs_policy_at(i)->never_evicts &&
            kvs_policy_parse(kvs_policy_at(i)->name, NULL, false, &p, NULL) == KVS_OK &&
            (kvs_policy_needs(&p) & ~(uint32_t)KVS_POLICY_NEEDS_MASS) == 0 && !needs_file(&p))
            bench_preset(p.ops->name);
    }
    bench_preset("attention_top:acc=1,scope=1");
    bench_preset("attention_top:acc=1,scope=2");
    bench_preset("attention_top:acc=1,scope=2,keep=0.5");
}

/* ---- 2. compaction ---------------------------------------------------------------------------------------------- */

static uint8_t keep[HEADS][SLOTS];

/* A random share of every head, each its own, as many in each. */
static void draw_keep(double share)
{
    kvs_rng rng = {9};
    for (uint32_t h = 0; h < HEADS; h++) {
        uint32_t left = (uint32_t)(SLOTS * share + 0.5);
        for (uint32_t i = 0; i < SLOTS; i++) {
            keep[h][i] = kvs_rng_below(&rng, SLOTS - i) < left;
            left -= keep[h][i];
        }
    }
}

/* Milliseconds that dropping the others takes; rerotate: and standing at ranks. */
static double scatter_ms(kvs_session *s, bool rerotate)
{
    static int32_t rank[SLOTS];
    for (uint32_t i = 0; i < SLOTS; i++)
        rank[i] = (int32_t)i;
    const uint64_t t0 = cpu_ns();
    for (uint32_t h = 0; h < HEADS; h++) {
        kvs_cache_keep(s->cache, h / KV_HEADS, h % KV_HEADS, keep[h]);
        if (rerotate)
            kvs_cache_set_rope(s->cache, h / KV_HEADS, h % KV_HEADS, rank,
                               (int32_t)kvs_cache_n_live(s->cache, h / KV_HEADS, h % KV_HEADS));
    }
    return since_ms(t0);
}

static double compact_ms(kvs_session *s)
{
    const uint64_t t0 = cpu_ns();
    for (uint32_t h = 0; h < HEADS; h++)
        kvs_cache_compact(s->cache, h / KV_HEADS, h % KV_HEADS);
    return since_ms(t0);
}

/* Bytes of keys and values that must be read to gather what is kept: a line of keys holds two dims of 16 slots, so one
 * slot costs its whole tile. */
static size_t bytes_to_read(void)
{
    size_t bytes = 0;
    for (uint32_t h = 0; h < HEADS; h++)
        for (uint32_t i = 0; i < SLOTS; i += KVS_TILE_SLOTS) {
            uint32_t n = 0;
            for (uint32_t k = 0; k < KVS_TILE_SLOTS; k++)
                n += keep[h][i + k];
            bytes += (n > 0 ? (size_t)KVS_TILE_SLOTS * DIM * 2 : 0) + (size_t)n * DIM * 2;
        }
    return bytes;
}

static double memcpy_ms(uint8_t *to, const uint8_t *from, size_t n_bytes)
{
    const uint64_t t0 = cpu_ns();
    memcpy(to, from, n_bytes);
    return since_ms(t0);
}

static void bench_compaction(void)
{
    static const double shares[] = {0.25, 0.5, 0.9, 0.99};
    kvs_session s;
    session_open(&s, "random", "keep");
    const size_t all = (size_t)HEADS * SLOTS * DIM * 2 * 2;
    uint8_t *from = take(1, all), *to = take(1, all);
    memset(from, 1, all);
    memset(to, 1, all);
    printf("part,kept_share,drop_ms,slots_moved,bytes_moved,compact_ms,memcpy_ms,compact_per_memcpy,"
           "compact_per_memcpy_of_lines_touched\n");
    for (size_t i = 0; i < sizeof shares / sizeof *shares; i++) {
        double drop = INFINITY, compact = INFINITY, copy = INFINITY, copy_lines = INFINITY;
        size_t n_moved = 0, bytes = 0;
        draw_keep(shares[i]);
        for (int r = 0; r < REPEATS; r++) {
            fill(&s, SLOTS);
            drop = fmin(drop, scatter_ms(&s, false));
            const uint64_t before = kvs_cache_meter_now(s.cache)->n_slots_moved;
            compact = fmin(compact, compact_ms(&s));
            n_moved = (size_t)(kvs_cache_meter_now(s.cache)->n_slots_moved - before);
            bytes = n_moved * DIM * 2 * 2;
            copy = fmin(copy, memcpy_ms(to, from, bytes));
            copy_lines = fmin(copy_lines, memcpy_ms(to, from, (bytes_to_read() + bytes) / 2));
        }
        printf("compact,%.2f,%.2f,%zu,%zu,%.2f,%.2f,%.2f,%.2f\n", shares[i], drop, n_moved, bytes, compact, copy,
               compact / copy, compact / copy_lines);
        fflush(stdout);
    }
    kvs_free(s.allocator, from);
    kvs_free(s.allocator, to);
    session_close(&s);
}

/* ---- 3. attention over what was kept ---------------------------------------------------------------------------- */

static kvs_rope_table rope_table(void)
{
    static double theta[DIM / 2];
    float *const rows = take((size_t)SLOTS * DIM, sizeof *rows);
    for (uint32_t i = 0; i < DIM / 2; i++) {
        theta[i] = pow(1e5, -2.0 * i / DIM);
        for (uint32_t pos = 0; pos < SLOTS; pos++) {
            rows[(size_t)pos * DIM + i] = (float)cos(pos * theta[i]);
            rows[(size_t)pos * DIM + DIM / 2 + i] = (float)sin(pos * theta[i]);
        }
    }
    return (kvs_rope_table){.rows = rows, .n_pos = SLOTS, .n_freq = DIM / 2, .theta = theta};
}

/* One token's attention over all heads: milliseconds, best of REPEATS. */
static double attend_ms(const kvs_session *s, const kvs_rope_table *rope)
{
    static kvs_page_view views[HEADS][SLOTS / KVS_PAGE_SLOTS + 1];
    static float q[GROUP * DIM], out[GROUP * DIM];
    static void *scratch;
    if (scratch == NULL)
        scratch = take(kvs_attn_scratch_bytes(GROUP, DIM, SLOTS), 1);
    for (uint32_t i = 0; i < GROUP * DIM; i++)
        q[i] = (float)(i % 7) / 7 - 0.5f;
    for (uint32_t h = 0; h < HEADS; h++)
        kvs_cache_views(s->cache, h / KV_HEADS, h % KV_HEADS, views[h], NULL);
    double best = INFINITY;
    for (int r = 0; r < REPEATS; r++) {
        const uint64_t t0 = cpu_ns();
        for (uint32_t h = 0; h < HEADS; h++) {
            const kvs_attn_job job = {.pages = views[h],
                                      .limit0 = kvs_cache_n_physical(s->cache, h / KV_HEADS, h % KV_HEADS),
                                      .n_rows = 1,
                                      .group = GROUP,
                                      .head_dim = DIM,
                                      .scale = 0.125f,
                                      .q = q,
                                      .q_stride = GROUP * DIM,
                                      .out = out,
                                      .out_stride = GROUP * DIM,
                                      .rope = rope};
            shape.kernels->attend(&job, scratch);
        }
        best = fmin(best, since_ms(t0));
    }
    return best;
}

static void bench_attention(void)
{
    static const double shares[] = {0.25, 0.5, 0.9};
    static const char *const modes[] = {"keep", "rerotate"};
    const kvs_rope_table rope = rope_table();
    kvs_session s;
    session_open(&s, "random", "keep");
    printf("part,mode,kept_share,slots,dense_ms,scattered_ms,compacted_ms,scattered_per_dense,compacted_per_dense\n");
    for (int m = 0; m < 2; m++)
        for (size_t i = 0; i < sizeof shares / sizeof *shares; i++) {
            fill(&s, (uint32_t)(SLOTS * shares[i] + 0.5));
            const double dense = attend_ms(&s, &rope);
            fill(&s, SLOTS);
            draw_keep(shares[i]);
            scatter_ms(&s, m == 1);
            const double scattered = attend_ms(&s, &rope);
            compact_ms(&s);
            const double compacted = attend_ms(&s, &rope);
            printf("attend,%s,%.2f,%u,%.2f,%.2f,%.2f,%.2f,%.2f\n", modes[m], shares[i], kvs_cache_n_live(s.cache, 0, 0),
                   dense, scattered, compacted, scattered / dense, compacted / dense);
            fflush(stdout);
        }
    session_close(&s);
    kvs_free(s.allocator, (void *)(uintptr_t)rope.rows);
}

/* ---- 4. a preset's share of a turn ------------------------------------------------------------------------------ */

enum { PROMPT = 192, ANSWER = 64, TURNS = 3 };

static const kvs_kernels *kernels; /* the model's own */
static uint64_t tap_ns;

static void timed_tap(const kvs_attn_job *job, const kvs_attn_tap *tap, void *scratch)
{
    const uint64_t t0 = kvs_now_ns();
    kernels->attend_tap(job, tap, scratch);
    tap_ns += kvs_now_ns() - t0;
}

static void say(kvs_session *s, uint32_t n, uint8_t flag, kvs_rng *rng, float *logits)
{
    int32_t tokens[PROMPT];
    uint8_t flags[PROMPT];
    kvs_error err;
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)kvs_rng_below(rng, s->model->info.vocab_size);
        flags[i] = flag;
    }
    if (kvs_session_extend(s, tokens, flags, n, logits, &err) != KVS_OK)
        die(kvs_session_policy(s), err.message);
}

static void bench_turns(const kvs_model *m, kvs_session *full, const char *spec, uint32_t budget)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = spec;
    o.budget_tokens = budget;
    kvs_session *s;
    kvs_error err;
    if (kvs_session_fork(full, &o, &s, &err) != KVS_OK)
        die(spec, err.message);
    float *const logits = take(m->info.vocab_size, sizeof *logits);
    kvs_rng rng = {11};
    kvs_usage before, after;
    kvs_session_get_usage(s, &before);
    tap_ns = 0;
    const uint64_t t0 = kvs_now_ns();
    for (uint32_t t = 0; t < TURNS; t++) {
        kvs_session_turn_begin(s, NULL);
        say(s, 4, KVS_TOKEN_TEMPLATE, &rng, NULL);
        say(s, PROMPT, KVS_TOKEN_USER, &rng, logits);
        for (uint32_t i = 0; i < ANSWER; i++)
            say(s, 1, KVS_TOKEN_ASSISTANT, &rng, logits);
        kvs_session_turn_end(s, NULL);
    }
    const double turn = (double)(kvs_now_ns() - t0) / 1e6 / TURNS, tap = (double)tap_ns / 1e6 / TURNS;
    kvs_session_get_usage(s, &after);
    const double select = (double)(after.score_ns + after.select_ns - before.score_ns - before.select_ns) / 1e6 / TURNS;
    const double move = (double)(after.move_ns - before.move_ns) / 1e6 / TURNS;
    printf("turn,%s,%u,%.1f,%.1f,%.2f,%.2f,%.2f,%.1f\n", spec, budget,
           (double)(after.n_evictions - before.n_evictions) / TURNS, turn, tap, select, move,
           100 * (tap + select + move) / turn);
    fflush(stdout);
    kvs_free(kvs_allocator_default(), logits);
    kvs_session_free(&s);
}

static void bench_overhead(uint32_t n_threads)
{
    char path[1024];
    const char *const home = getenv("HOME"), *const env = getenv("KVASIR_MODEL");
    snprintf(path, sizeof path, "%s/.cache/kvasir/models/SmolLM2-135M-Instruct.Q4_1.gguf", home != NULL ? home : "");
    if (env != NULL)
        snprintf(path, sizeof path, "%s", env);
    if (access(path, R_OK) != 0) {
        printf("turn: left out, no model at %s\n", path);
        return;
    }
    kvs_model_options mo;
    kvs_model_options_default(&mo);
    mo.n_threads = n_threads;
    kvs_model *m;
    kvs_error err;
    if (kvs_model_open(path, &mo, &m, &err) != KVS_OK)
        die(path, err.message);
    kernels = m->kernels;
    kvs_kernels timed = *kernels;
    timed.attend_tap = timed_tap;
    m->kernels = &timed;
    static const uint32_t budgets[] = {1024, 4096};
    printf("part,preset,budget_tok,evictions,turn_ms,tap_ms,score_and_select_ms,move_ms,share_percent\n");
    for (size_t b = 0; b < sizeof budgets / sizeof *budgets; b++) {
        kvs_session *full;
        kvs_policy p;
        if (kvs_session_create(m, NULL, &full, &err) != KVS_OK)
            die("baseline", err.message);
        kvs_rng rng = {10};
        while (kvs_session_n_tokens(full) + PROMPT < budgets[b])
            say(full, PROMPT, KVS_TOKEN_USER, &rng, NULL);
        for (uint32_t i = 0; i < kvs_policy_count(); i++)
            if (!kvs_policy_at(i)->never_evicts &&
                kvs_policy_parse(kvs_policy_at(i)->name, NULL, false, &p, NULL) == KVS_OK && !needs_file(&p))
                bench_turns(m, full, kvs_policy_at(i)->name, budgets[b]);
        bench_turns(m, full, "attention_top:acc=1,scope=2,keep=0.7", budgets[b]);
        kvs_session_free(&full);
    }
    m->kernels = kernels;
    kvs_model_close(&m);
}

int main(int argc, char **argv)
{
    const uint32_t n_threads = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 1;
    const long part = argc > 2 ? strtol(argv[2], NULL, 10) : 0;
    shape_init();
    if (part == 0 || part == 1)
        bench_presets();
    if (part == 0 || part == 2)
        bench_compaction();
    if (part == 0 || part == 3)
        bench_attention();
    if (part == 0 || part == 4)
        bench_overhead(n_threads);
    return 0;
}

/* One engine of the comparison, driven over stdin by scripts/bench-kernels, which starts one process an engine and lets
 * them take turns:
 *     reference-kernels --list              what is built in, one line an engine
 *     reference-kernels ENGINE:VARIANT THREADS
 *         products ROWS                     -> ok ERROR...    relative error of each shape against double precision
 *         attention SLOTS ROWS LAYERS       -> ok ERROR
 *         pass                              -> MS...          all layers of each shape, or of attention
 * "no WHY" answers what an engine does not have, and ends it. OMP_NUM_THREADS and OPENBLAS_NUM_THREADS must be set to THREADS. */
#include "reference.h"
#include "kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SAMPLED_ROWS = 4, SAMPLED_OUTPUTS = 64, FEW_ROWS = 8 };

const reference_shape reference_shapes[REFERENCE_SHAPES] = {
    {"qkv", 960, 576, REFERENCE_LAYERS},
    {"attn_out", 576, 576, REFERENCE_LAYERS},
    {"gate_up", 3072, 576, REFERENCE_LAYERS},
    {"ffn_down", 576, 1536, REFERENCE_LAYERS},
    {"head", 49152, 576, 1},
};
static const reference_engine *const engines[] = {
    &reference_kvasir,
    &reference_ggml,
#ifdef HAVE_OPENBLAS
    &reference_openblas,
#endif
#ifdef HAVE_ONEDNN
    &reference_onednn,
#endif
};

/* ---- the numbers everyone works on ---- */

void *reference_alloc(uint64_t n_bytes)
{
    void *const p = kvs_alloc(kvs_allocator_default(), 1, n_bytes);
    if (p == NULL) {
        fprintf(stderr, "reference-kernels: no memory for %llu bytes\n", (unsigned long long)n_bytes);
        exit(1);
    }
    return p;
}

void reference_free(void *p)
{
    kvs_free(kvs_allocator_default(), p);
}

/* n numbers in [-1, 1) that depend on (a, b) alone. */
static void uniform(uint64_t a, uint64_t b, uint32_t n, float *out)
{
    kvs_rng rng = {kvs_hash3(4, a, b)};
    for (uint32_t i = 0; i < n; i++)
        out[i] = (float)(int32_t)(kvs_rng_next(&rng) >> 32) * 0x1p-31f;
}

void reference_weights(uint32_t shape, uint32_t layer, uint32_t row_begin, uint32_t n_rows, float *out)
{
    const uint32_t n_in = reference_shapes[shape].n_in;
    for (uint32_t r = 0; r < n_rows; r++)
        uniform(shape * 100 + layer, row_begin + r, n_in, out + (size_t)r * n_in);
}

void reference_key_value(uint32_t layer, uint32_t kv_head, uint32_t slot, float *key, float *value)
{
    const kvs_kernels *k = kvs_kernels_get(kvs_cpu_masked(0));
    uint16_t half[REFERENCE_HEAD_DIM];
    float *const both[2] = {key, value};
    for (uint32_t i = 0; i < 2; i++) {
        uniform(1000 + layer * 10 + kv_head * 2 + i, slot, REFERENCE_HEAD_DIM, both[i]);
        k->f32_to_f16(half, both[i], REFERENCE_HEAD_DIM);
        k->f16_to_f32(both[i], half, REFERENCE_HEAD_DIM);
    }
}

/* ---- is it the same product? ---- */

typedef struct error_sum {
    double difference, truth; /* sums of squares */
} error_sum;

static void add_error(error_sum *e, double got, double truth)
{
    e->difference += (got - truth) * (got - truth);
    e->truth += truth * truth;
}

/* Element i of n_samples spread over [0, n): the first and the last among them. */
static uint32_t sample(uint32_t i, uint32_t n_samples, uint32_t n)
{
    return (uint32_t)((uint64_t)i * (n - 1) / (n_samples > 1 ? n_samples - 1 : 1));
}

static double product_error(uint32_t shape, uint32_t n_rows, const float *x, const float *y)
{
    const reference_shape *s = &reference_shapes[shape];
    error_sum e = {0};
    float w[2048];
    for (uint32_t i = 0; i < SAMPLED_OUTPUTS; i++) {
        const uint32_t n = sample(i, SAMPLED_OUTPUTS, s->n_out);
        reference_weights(shape, s->n_layers - 1, n, 1, w);
        for (uint32_t j = 0; j < kvs_min_u32(SAMPLED_ROWS, n_rows); j++) {
            const uint32_t r = sample(j, kvs_min_u32(SAMPLED_ROWS, n_rows), n_rows);
            double sum = 0;
            for (uint32_t k = 0; k < s->n_in; k++)
                sum += (double)w[k] * (double)x[(size_t)r * s->n_in + k];
            add_error(&e, (double)y[(size_t)r * s->n_out + n], sum);
        }
    }
    return sqrt(e.difference / e.truth);
}

/* One row and query head of the last layer in double precision. */
static void attend_exactly(const reference_attention *a, uint32_t row, uint32_t head, double *out)
{
    const uint32_t n = a->n_slots - (a->n_rows - 1 - row), layer = a->n_layers - 1;
    const uint32_t kv_head = head / (REFERENCE_HEADS / REFERENCE_KV_HEADS);
    const float *q = a->q + ((size_t)row * REFERENCE_HEADS + head) * REFERENCE_HEAD_DIM;
    double total = 0;
    memset(out, 0, REFERENCE_HEAD_DIM * sizeof *out);
    for (uint32_t s = 0; s < n; s++) {
        float key[REFERENCE_HEAD_DIM], value[REFERENCE_HEAD_DIM];
        reference_key_value(layer, kv_head, s, key, value);
        double score = 0;
        for (uint32_t d = 0; d < REFERENCE_HEAD_DIM; d++)
            score += (double)q[d] * (double)key[d];
        const double p = exp(score / 8); /* |score| <= 64 */
        total += p;
        for (uint32_t d = 0; d < REFERENCE_HEAD_DIM; d++)
            out[d] += p * (double)value[d];
    }
    for (uint32_t d = 0; d < REFERENCE_HEAD_DIM; d++)
        out[d] /= total;
}

static double attention_error(const reference_attention *a)
{
    error_sum e = {0};
    for (uint32_t j = 0; j < kvs_min_u32(SAMPLED_ROWS, a->n_rows); j++)
        for (uint32_t head = 0; head < REFERENCE_HEADS; head += 4) {
            const uint32_t r = sample(j, kvs_min_u32(SAMPLED_ROWS, a->n_rows), a->n_rows);
            double truth[REFERENCE_HEAD_DIM];
            attend_exactly(a, r, head, truth);
            for (uint32_t d = 0; d < REFERENCE_HEAD_DIM; d++)
                add_error(&e, (double)a->out[((size_t)r * REFERENCE_HEADS + head) * REFERENCE_HEAD_DIM + d], truth[d]);
        }
    return sqrt(e.difference / e.truth);
}

/* ---- the commands ---- */

typedef struct bench {
    const reference_engine *engine;
    uint32_t n_threads;
    float *x, *y;
    uint32_t n_rows; /* of the products; 0: attention is what a pass runs */
    reference_attention attention;
} bench;

static bool products(bench *b, uint32_t n_rows)
{
    const char *why = "";
    if (n_rows < 1 || n_rows > REFERENCE_ROWS_MAX || !b->engine->products(n_rows, b->x, b->y, &why)) {
        printf("no %s\n", why);
        return false;
    }
    b->n_rows = n_rows;
    printf("ok");
    for (uint32_t s = 0; s < REFERENCE_SHAPES; s++) {
        memset(b->y, 0xff, (size_t)n_rows * reference_shapes[s].n_out * sizeof *b->y); /* NaN: nobody's old result */
        b->engine->product_run(s);
        printf(" %.3g", product_error(s, n_rows, b->x, b->y));
    }
    printf("\n");
    return true;
}

static bool attention(bench *b, uint32_t n_slots, uint32_t n_rows, uint32_t n_layers)
{
    const char *why = "it has no attention";
    b->attention = (reference_attention){n_slots, n_rows, n_layers, b->x, b->y};
    if (n_rows < 1 || n_rows > REFERENCE_ROWS_MAX || n_slots < n_rows || n_layers < 1 ||
        n_layers > REFERENCE_KV_LAYERS || b->engine->attention == NULL || !b->engine->attention(&b->attention, &why)) {
        printf("no %s\n", why);
        return false;
    }
    b->n_rows = 0;
    memset(b->y, 0xff, (size_t)n_rows * REFERENCE_HEADS * REFERENCE_HEAD_DIM * sizeof *b->y);
    b->engine->attention_run();
    printf("ok %.3g\n", attention_error(&b->attention));
    return true;
}

/* One thread's work is measured in time on a core: what other processes take from it then does not count. */
static double now_ms(const bench *b)
{
    struct timespec t;
    clock_gettime(b->n_threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static double run_ms(const bench *b, uint32_t shape)
{
    const double start = now_ms(b);
    if (b->n_rows)
        b->engine->product_run(shape);
    else
        b->engine->attention_run();
    return now_ms(b) - start;
}

/* Short passes run twice and count once: the engine that ran in between has emptied the caches further than a step of
 * the same model would. */
static void pass(const bench *b)
{
    const uint32_t n = b->n_rows ? REFERENCE_SHAPES : 1, n_rows = b->n_rows ? b->n_rows : b->attention.n_rows;
    if (n_rows <= FEW_ROWS)
        for (uint32_t s = 0; s < n; s++)
            run_ms(b, s);
    for (uint32_t s = 0; s < n; s++)
        printf("%s%.6f", s ? " " : "", run_ms(b, s));
    printf("\n");
}

static void serve(bench *b)
{
    char line[128];
    uint32_t n[3];
    bool going = true;
    while (going && fgets(line, sizeof line, stdin) != NULL) {
        if (strcmp(line, "pass\n") == 0)
            pass(b);
        else if (sscanf(line, "products %u", &n[0]) == 1)
            going = products(b, n[0]);
        else if (sscanf(line, "attention %u %u %u", &n[0], &n[1], &n[2]) == 3)
            going = attention(b, n[0], n[1], n[2]);
        else
            going = printf("no such command\n") < 0;
        fflush(stdout);
    }
}

static int list(void)
{
    for (size_t i = 0; i < sizeof engines / sizeof *engines; i++) {
        char text[256];
        engines[i]->describe(text, sizeof text);
        printf("%s\t%s\n", engines[i]->name, text);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--list") == 0)
        return list();
    const unsigned long n_threads = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
    const char *omp = getenv("OMP_NUM_THREADS"), *colon = argc == 3 ? strchr(argv[1], ':') : NULL;
    if (colon == NULL || n_threads < 1 || n_threads > 64 || omp == NULL || strtoul(omp, NULL, 10) != n_threads) {
        fprintf(stderr, "usage: OMP_NUM_THREADS=N OPENBLAS_NUM_THREADS=N reference-kernels ENGINE:VARIANT N\n");
        return 2;
    }
    bench b = {.n_threads = (uint32_t)n_threads};
    for (size_t i = 0; i < sizeof engines / sizeof *engines; i++)
        if (strlen(engines[i]->name) == (size_t)(colon - argv[1]) &&
            strncmp(engines[i]->name, argv[1], (size_t)(colon - argv[1])) == 0)
            b.engine = engines[i];
    const char *why = "it is not built in";
    if (b.engine == NULL || !b.engine->open(colon + 1, (uint32_t)n_threads, &why)) {
        printf("no %s\n", why);
        return 0;
    }
    b.x = reference_alloc((uint64_t)REFERENCE_ROWS_MAX * 1536 * sizeof *b.x);
    b.y = reference_alloc((uint64_t)REFERENCE_ROWS_MAX * 49152 * sizeof *b.y);
    uniform(1, 0, REFERENCE_ROWS_MAX * 1536, b.x);
    printf("ready\n");
    fflush(stdout);
    serve(&b);
    return 0;
}

/* Times the matrix products on the shapes of SmolLM2-135M (30 layers of Q4_1, head of Q8_0) with random weights:
 *     bench_matmul [n_threads [seconds_per_case]]
 * For each instruction set, arithmetic and number of rows: the median time of all linear layers of one step and of the
 * head, GFLOP/s over both (2 per weight and row), and tokens a second. Every layer has weights of its own, so that a
 * decode step streams as many bytes as the model does. The f32 FMA peak is measured in bench form by `kvasir speed`. */
#include "kernels/matmul.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_LAYERS = 30, N_LINEAR = 4, MAX_ROWS = 256, MAX_REPEATS = 64, N_EMBD = 576, N_FF = 1536, VOCAB = 49152 };

struct bench {
    kvs_weight layers[N_LAYERS][N_LINEAR], head;
    float *x, *y;
    void *scratch;
    kvs_pool *pool;
};

/* Random codes with small positive scales: every byte of the file's form is random but the f16 ones. */
static kvs_weight random_weight(kvs_weight_type type, uint32_t n_out, uint32_t n_in, kvs_rng *rng)
{
    const size_t block_bytes = type == KVS_WEIGHT_Q4_1 ? 20 : 34, row_bytes = n_in / KVS_QBLOCK * block_bytes;
    kvs_weight w = {.type = type, .n_out = n_out, .n_in = n_in, .raw_row_bytes = row_bytes};
    w.packed_bytes = kvs_weight_packed_bytes(type, n_out, n_in);
    w.packed = kvs_alloc(kvs_allocator_default(), 1, w.packed_bytes);
    uint8_t *row = kvs_alloc(kvs_allocator_default(), 1, row_bytes);
    if (w.packed == NULL || row == NULL) {
        fprintf(stderr, "bench_matmul: no memory for %u x %u weights\n", n_out, n_in);
        exit(1);
    }
    for (uint32_t n = 0; n < n_out; n++) {
        for (size_t i = 0; i < row_bytes; i++)
            row[i] = (uint8_t)kvs_rng_next(rng);
        for (size_t b = 0; b < row_bytes; b += block_bytes) {
            const uint16_t half[2] = {(uint16_t)(0x1c00u | (kvs_rng_next(rng) & 0x3ffu)),
                                      (uint16_t)(0xa400u | (kvs_rng_next(rng) & 0x3ffu))};
            memcpy(row + b, half, type == KVS_WEIGHT_Q4_1 ? 4 : 2);
        }
        kvs_weight_pack(&w, row, n, 1);
    }
    kvs_free(kvs_allocator_default(), row);
    return w;
}

static void product(const struct bench *b, const kvs_kernels *k, const kvs_weight *w, bool native, uint32_t n_rows)
{
    (native ? kvs_matmul_native : kvs_matmul_f32)(k, b->pool, w, b->x, w->n_in, b->y, w->n_out, n_rows, b->scratch);
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median seconds of all linear layers (head false) or of the head. */
static double median_s(const struct bench *b, const kvs_kernels *k, bool head, bool native, uint32_t n_rows,
                       double seconds)
{
    double t[MAX_REPEATS];
    uint32_t n = 0;
    const uint64_t begin = kvs_now_ns();
    do {
        const uint64_t t0 = kvs_now_ns();
        if (head)
            product(b, k, &b->head, native, n_rows);
        for (uint32_t l = 0; l < N_LAYERS && !head; l++)
            for (uint32_t i = 0; i < N_LINEAR; i++)
                product(b, k, &b->layers[l][i], native, n_rows);
        t[n++] = (double)(kvs_now_ns() - t0) * 1e-9;
    } while (n < MAX_REPEATS && (n < 3 || (double)(kvs_now_ns() - begin) * 1e-9 < seconds));
    qsort(t, n, sizeof *t, compare);
    return t[n / 2];
}

static void run_isa(const struct bench *b, const kvs_kernels *k, double seconds)
{
    static const uint32_t rows[] = {1, 8, MAX_ROWS};
    for (uint32_t native = 0; native < 2; native++)
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            const uint32_t n = rows[i], n_head = n <= 8 ? n : 1; /* a prefill wants the last row's logits only */
            const double layers = median_s(b, k, false, native, n, seconds);
            const double head = median_s(b, k, true, native, n_head, seconds);
            const double flop = 2.0 * (N_LAYERS * (1536.0 * N_EMBD + 3072.0 * N_EMBD + (double)N_EMBD * N_FF) * n +
                                       (double)VOCAB * N_EMBD * n_head);
            printf("%-10s %-6s %4u %10.2f %8.2f %9.1f %10.1f\n", kvs_cpu_isa_name(k->cpu), native ? "native" : "f32", n,
                   layers * 1e3, head * 1e3, flop / (layers + head) * 1e-9, n / (layers + head));
        }
}

int main(int argc, char **argv)
{
    static const uint32_t shapes[N_LINEAR][2] = {{960, N_EMBD}, {N_EMBD, N_EMBD}, {2 * N_FF, N_EMBD}, {N_EMBD, N_FF}};
    const uint32_t n_threads = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : kvs_cores_available();
    const double seconds = argc > 2 ? strtod(argv[2], NULL) : 0.5;
    static struct bench b;
    kvs_rng rng = {1};
    size_t scratch_bytes = 0;
    for (uint32_t l = 0; l < N_LAYERS; l++)
        for (uint32_t i = 0; i < N_LINEAR; i++) {
            b.layers[l][i] = random_weight(KVS_WEIGHT_Q4_1, shapes[i][0], shapes[i][1], &rng);
            const size_t need = kvs_matmul_scratch_bytes(&b.layers[l][i], MAX_ROWS, n_threads);
            scratch_bytes = need > scratch_bytes ? need : scratch_bytes;
        }
    b.head = random_weight(KVS_WEIGHT_Q8_0, VOCAB, N_EMBD, &rng);
    b.pool = kvs_pool_create(kvs_allocator_default(), n_threads);
    b.x = kvs_alloc(kvs_allocator_default(), (size_t)MAX_ROWS * N_FF, sizeof *b.x);
    b.y = kvs_alloc(kvs_allocator_default(), (size_t)MAX_ROWS * 2 * N_FF + (size_t)8 * VOCAB, sizeof *b.y);
    b.scratch = kvs_alloc(kvs_allocator_default(), 1, scratch_bytes);
    if (b.pool == NULL || b.x == NULL || b.y == NULL || b.scratch == NULL) {
        fprintf(stderr, "bench_matmul: no memory for activations\n");
        return 1;
    }
    for (size_t i = 0; i < (size_t)MAX_ROWS * N_FF; i++)
        b.x[i] = (float)(kvs_rng_double(&rng) * 2.0 - 1.0);
    printf("%u threads; rows of one step, median ms of %d layers and of the head (1 row when there are %d)\n",
           n_threads, (int)N_LAYERS, (int)MAX_ROWS);
    printf("%-10s %-6s %4s %10s %8s %9s %10s\n", "isa", "arith", "rows", "layers_ms", "head_ms", "GFLOP/s", "tok/s");
    const uint32_t masks[] = {KVS_CPU_AVX2, KVS_CPU_AVX2 | KVS_CPU_AVX512,
                              KVS_CPU_AVX2 | KVS_CPU_AVX512 | KVS_CPU_VNNI};
    const struct kvs_matmul_kernels *last = NULL;
    for (size_t i = 0; i < sizeof masks / sizeof *masks; i++) {
        kvs_kernels k = {.cpu = kvs_cpu_masked(masks[i])};
        k.matmul = kvs_matmul_kernels_get(k.cpu);
        if (k.matmul != last)
            run_isa(&b, &k, seconds);
        last = k.matmul;
    }
    return 0;
}

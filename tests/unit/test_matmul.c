/* Products with a weight matrix: every instruction set against the plain twin bit for bit, the twin against double
 * precision with a derived bound, native against ggml's own quantisers and vec_dot, and independence of batch and
 * threads. Weights are random bytes of the real block formats with sane scales. */
#include "kernels/matmul.h"

#include <float.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const uint32_t ROWS[] = {1, 2, 3, 5, 7, 16, 33, 64};
static const struct shape {
    uint32_t n_out, n_in;
} SHAPES[] = {{49, 32}, {16, 96}, {200, 576}, {33, 1536}, {1, 64}, {97, 544}, {49, 256}};
enum { N_ROWS = sizeof ROWS / sizeof *ROWS, N_SHAPES = sizeof SHAPES / sizeof *SHAPES, MAX_ROWS = 64, PAD = 5 };

static const struct kind {
    kvs_weight_type type;
    enum ggml_type ggml;
} KINDS[] = {
    {KVS_WEIGHT_F32, GGML_TYPE_F32},   {KVS_WEIGHT_Q4_0, GGML_TYPE_Q4_0}, {KVS_WEIGHT_Q4_1, GGML_TYPE_Q4_1},
    {KVS_WEIGHT_Q8_0, GGML_TYPE_Q8_0}, {KVS_WEIGHT_Q5_0, GGML_TYPE_Q5_0}, {KVS_WEIGHT_Q5_1, GGML_TYPE_Q5_1},
    {KVS_WEIGHT_Q4_K, GGML_TYPE_Q4_K}, {KVS_WEIGHT_Q5_K, GGML_TYPE_Q5_K}, {KVS_WEIGHT_Q6_K, GGML_TYPE_Q6_K},
    {KVS_WEIGHT_F16, GGML_TYPE_F16},   {KVS_WEIGHT_BF16, GGML_TYPE_BF16}, {KVS_WEIGHT_OTHER, GGML_TYPE_IQ4_NL}};
enum { N_KINDS = sizeof KINDS / sizeof *KINDS };

static bool fits(const struct kind *kind, const struct shape *s)
{
    return s->n_in % ggml_blck_size(kind->ggml) == 0;
}

static float uniform(kvs_rng *rng)
{
    return (float)(kvs_rng_double(rng) * 2.0 - 1.0);
}

static void *must_alloc(size_t n, size_t size_bytes)
{
    void *p = kvs_alloc(kvs_allocator_default(), n, size_bytes);
    assert_non_null(p);
    return p;
}

static void release(void *p)
{
    kvs_free(kvs_allocator_default(), p);
}

/* Masks that give distinct tables on this machine, the plain one first. */
static uint32_t isa_tables(kvs_kernels *out)
{
    const uint32_t masks[] = {KVS_CPU_AVX2, KVS_CPU_AVX2 | KVS_CPU_AVX512, KVS_CPU_AVX2 | KVS_CPU_AVX512 | KVS_CPU_VNNI,
                              KVS_CPU_NEON, KVS_CPU_NEON | KVS_CPU_DOTPROD};
    uint32_t n = 0;
    memset(out, 0, 4 * sizeof *out);
    out[n++].matmul = kvs_matmul_kernels_get(0);
    for (size_t i = 0; i < sizeof masks / sizeof *masks; i++) {
        const uint32_t cpu = kvs_cpu_masked(masks[i]);
        if (cpu == 0 || kvs_matmul_kernels_get(cpu) == out[n - 1].matmul)
            continue;
        out[n].cpu = cpu;
        out[n++].matmul = kvs_matmul_kernels_get(cpu);
    }
    return n;
}

struct fixture {
    kvs_weight w;
    uint8_t *raw;
    float *x, *y, *ref;
    size_t x_stride, y_stride;
    void *scratch;
};

static kvs_weight make_weight(const struct kind *kind, const struct shape *s, kvs_rng *rng)
{
    const size_t row_bytes = ggml_row_size(kind->ggml, s->n_in);
    float *row = must_alloc(s->n_in, sizeof *row);
    uint8_t *raw = must_alloc(s->n_out, row_bytes);
    for (uint32_t n = 0; n < s->n_out; n++) {
        for (uint32_t k = 0; k < s->n_in; k++)
            row[k] = uniform(rng) * 0.3f + 0.02f;
        if (kind->ggml == GGML_TYPE_F32)
            memcpy(raw + n * row_bytes, row, row_bytes);
        else
            assert_int_equal(ggml_quantize_chunk(kind->ggml, row, raw + n * row_bytes, 0, 1, s->n_in, NULL), row_bytes);
    }
    release(row);
    kvs_weight w = {.type = kind->type, .n_out = s->n_out, .n_in = s->n_in, .raw = raw, .raw_row_bytes = row_bytes};
    if (kind->type == KVS_WEIGHT_OTHER) {
        const struct ggml_type_traits_cpu *cpu = ggml_get_type_traits_cpu(kind->ggml);
        w.to_float = ggml_get_type_traits(kind->ggml)->to_float;
        w.vec_dot = cpu->vec_dot;
        w.from_float = ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float;
        w.act_row_bytes = ggml_row_size(cpu->vec_dot_type, s->n_in);
        return w;
    }
    w.packed_bytes = kvs_weight_packed_bytes(w.type, w.n_out, w.n_in);
    w.packed = must_alloc(1, w.packed_bytes);
    /* In two calls whose border is inside a panel, as q, k and v are packed. */
    const uint32_t first = s->n_out / 3;
    kvs_weight_pack(&w, raw, 0, first);
    kvs_weight_pack(&w, raw + first * row_bytes, first, s->n_out - first);
    return w;
}

static struct fixture make_fixture(const struct kind *kind, const struct shape *s, uint64_t seed)
{
    kvs_rng rng = {seed};
    struct fixture f = {.x_stride = s->n_in + 3u, .y_stride = s->n_out + (size_t)PAD};
    f.w = make_weight(kind, s, &rng);
    f.x = must_alloc(MAX_ROWS * f.x_stride, sizeof *f.x);
    f.y = must_alloc(MAX_ROWS * f.y_stride, sizeof *f.y);
    f.ref = must_alloc(MAX_ROWS * f.y_stride, sizeof *f.ref);
    for (size_t i = 0; i < MAX_ROWS * f.x_stride; i++)
        f.x[i] = uniform(&rng) * (i % 61 == 0 ? 20.0f : 1.0f); /* outliers, as activations have */
    f.scratch = must_alloc(1, kvs_matmul_scratch_bytes(&f.w, MAX_ROWS, 3));
    return f;
}

static void free_fixture(struct fixture *f)
{
    release((void *)(uintptr_t)f->w.raw);
    release(f->w.packed);
    release(f->x);
    release(f->y);
    release(f->ref);
    release(f->scratch);
}

static void multiply(const kvs_kernels *k, kvs_pool *pool, const struct fixture *f, bool native, const float *x,
                     float *y, uint32_t n_rows)
{
    memset(f->scratch, 0xff, kvs_matmul_scratch_bytes(&f->w, n_rows, kvs_pool_n_threads(pool))); /* NaN */
    (native ? kvs_matmul_native : kvs_matmul_f32)(k, pool, &f->w, x, f->x_stride, y, f->y_stride, n_rows, f->scratch);
}

static void fill_nan(const struct fixture *f, float *y)
{
    memset(y, 0xff, MAX_ROWS * f->y_stride * sizeof *y);
}

/* Each output row equal bit for bit and nothing written beyond n_out or n_rows (the filling is left as it was). */
static void assert_same(const struct fixture *f, const float *y, const float *ref, uint32_t n_rows, const char *what)
{
    for (uint32_t r = 0; r < MAX_ROWS; r++)
        for (uint32_t n = 0; n < f->y_stride; n++) {
            const bool inside = r < n_rows && n < f->w.n_out;
            const size_t i = r * f->y_stride + n;
            uint32_t got, want = UINT32_MAX;
            memcpy(&got, y + i, sizeof got);
            if (inside)
                memcpy(&want, ref + i, sizeof want);
            if (got != want)
                fail_msg("%s: type %d, %u x %u, %u rows: y[%u][%u] = %08x, expected %08x", what, (int)f->w.type,
                         f->w.n_out, f->w.n_in, n_rows, r, n, got, want);
        }
}

static void each_fixture(void (*check)(struct fixture *f))
{
    for (uint32_t i = 0; i < N_KINDS; i++)
        for (uint32_t s = 0; s < N_SHAPES; s++) {
            if (!fits(&KINDS[i], &SHAPES[s]))
                continue;
            struct fixture f = make_fixture(&KINDS[i], &SHAPES[s], kvs_hash3(1, i, s));
            check(&f);
            free_fixture(&f);
        }
}

/* The plain twin on all rows is what every table, batch and thread count must reproduce. */
static void check_isa_batch_threads(struct fixture *f)
{
    kvs_kernels tables[4];
    const uint32_t n_tables = isa_tables(tables);
    for (uint32_t native = 0; native < 2; native++) {
        kvs_pool *one = kvs_pool_create(kvs_allocator_default(), 1);
        multiply(&tables[0], one, f, native, f->x, f->ref, MAX_ROWS);
        kvs_pool_free(one);
        for (uint32_t n_threads = 1; n_threads <= 3; n_threads++) {
            kvs_pool *pool = kvs_pool_create(kvs_allocator_default(), n_threads);
            assert_non_null(pool);
            /* the twin is slow, and its threads are those of the others */
            for (uint32_t t = n_threads > 1 && n_tables > 1; t < n_tables; t++)
                for (uint32_t i = 0; i < N_ROWS; i++) {
                    fill_nan(f, f->y);
                    multiply(&tables[t], pool, f, native, f->x, f->y, ROWS[i]);
                    assert_same(f, f->y, f->ref, ROWS[i], kvs_cpu_isa_name(tables[t].cpu));
                }
            kvs_pool_free(pool);
        }
    }
}

static void isa_batch_or_threads_change_bits(void **state)
{
    (void)state;
    each_fixture(check_isa_batch_threads);
}

/* A row alone, at another address, as the first of a batch of one. */
static void check_row_alone(struct fixture *f)
{
    kvs_kernels tables[4];
    const uint32_t n_tables = isa_tables(tables);
    kvs_pool *pool = kvs_pool_create(kvs_allocator_default(), 2);
    for (uint32_t t = 0; t < n_tables; t++)
        for (uint32_t native = 0; native < 2; native++) {
            multiply(&tables[t], pool, f, native, f->x, f->ref, MAX_ROWS);
            for (uint32_t r = 1; r < MAX_ROWS; r += 13) {
                multiply(&tables[t], pool, f, native, f->x + r * f->x_stride, f->y, 1);
                assert_memory_equal(f->y, f->ref + r * f->y_stride, f->w.n_out * sizeof *f->y);
            }
        }
    kvs_pool_free(pool);
}

static void row_alone_differs_from_batch(void **state)
{
    (void)state;
    each_fixture(check_row_alone);
}

/* |y - exact| <= (n + 1) eps sum |w x|: n fused steps of one rounding each; the weights are those of kvs_weight_row. */
static void check_f32_bound(struct fixture *f)
{
    kvs_kernels tables[4];
    (void)isa_tables(tables);
    kvs_pool *pool = kvs_pool_create(kvs_allocator_default(), 1);
    multiply(&tables[0], pool, f, false, f->x, f->y, MAX_ROWS);
    float *row = must_alloc(f->w.n_in, sizeof *row);
    for (uint32_t n = 0; n < f->w.n_out; n++) {
        kvs_weight_row(&f->w, n, row);
        for (uint32_t r = 0; r < MAX_ROWS; r++) {
            double sum = 0, abs_sum = 0;
            for (uint32_t k = 0; k < f->w.n_in; k++) {
                const double term = (double)row[k] * (double)f->x[r * f->x_stride + k];
                sum += term;
                abs_sum += fabs(term);
            }
            const double bound = (f->w.n_in + 1) * (double)FLT_EPSILON * abs_sum + (double)FLT_MIN;
            const double error = fabs((double)f->y[r * f->y_stride + n] - sum);
            if (!(error <= bound))
                fail_msg("type %d: y[%u][%u] is off by %g, bound %g", (int)f->w.type, r, n, error, bound);
        }
    }
    release(row);
    kvs_pool_free(pool);
}

static void f32_leaves_its_bound(void **state)
{
    (void)state;
    each_fixture(check_f32_bound);
}

/* Sum of the magnitudes of all terms of one native product: the activations' own numbers are ggml's (their to_float, and
 * d * sum where the type has it), a weight's are code * d and m apart, which cancel. */
static double native_abs_sum(const struct fixture *f, enum ggml_type type, const float *act, const float *row,
                             uint32_t n)
{
    const struct kvs_panels p = kvs_weight_panels(&f->w, n / KVS_PANEL, kvs_dense_bytes(f->w.type) == 0);
    const size_t code_bytes = kvs_panel_code_bytes(f->w.type);
    double abs_sum = 0, act_sum = 0;
    float d, m = 0;
    (void)type;
    for (uint32_t k = 0; k < f->w.n_in; k++) {
        if (code_bytes == 0) {
            abs_sum += fabs((double)row[k] * (double)act[k]);
            continue;
        }
        if (k % KVS_QBLOCK == 0) { /* minima are of 32 elements: one product with their sum */
            abs_sum += fabs(act_sum * (double)m);
            act_sum = 0;
        }
        if (k % KVS_SCALE_ELEMENTS == 0) {
            kvs_panel_scales_at(&p, p.base, k, n % KVS_PANEL, &d, &m);
            m = kvs_has_min(f->w.type) ? m : 0;
        }
        act_sum += (double)act[k];
        abs_sum += fabs(((double)row[k] - (double)m) * (double)act[k]);
    }
    return abs_sum + fabs(act_sum * (double)m);
}

/* Native and ggml's vec_dot add the same exact terms d code dx a (and m s) in different orders. Blocks of 32: with n of
 * them each side does at most 2 n + 11 roundings on the way of a term (ours: dw dx and two fused steps a block; ggml's:
 * the same in eight lanes, their fold, the sum of m s apart), and s itself is rounded to f16 by both alike, which the
 * magnitudes here allow for with 2^-11 of theirs. Super-blocks: the same with n super-blocks. Dense: n_in products of f16
 * or bf16, exact in f32, n_in roundings each. */
static void check_native_ggml(struct fixture *f, enum ggml_type type)
{
    const struct ggml_type_traits_cpu *cpu = ggml_get_type_traits_cpu(type);
    const uint32_t n_in = f->w.n_in;
    const bool dense = kvs_dense_bytes(f->w.type) != 0;
    const double n_steps = dense ? n_in : 2.0 * (n_in / KVS_QBLOCK / (kvs_is_k(f->w.type) ? KVS_SUPER_BLOCKS : 1));
    kvs_kernels tables[4];
    const uint32_t n_tables = isa_tables(tables);
    kvs_pool *pool = kvs_pool_create(kvs_allocator_default(), 1);
    multiply(&tables[n_tables - 1], pool, f, true, f->x, f->y, MAX_ROWS);
    uint8_t *act = must_alloc(1, ggml_row_size(cpu->vec_dot_type, n_in));
    float *row = must_alloc(n_in, sizeof *row), *rounded = must_alloc(n_in, sizeof *rounded);
    struct kvs_act_block *tile = must_alloc(n_in / KVS_QBLOCK, sizeof *tile);
    for (uint32_t r = 0; r < MAX_ROWS; r += 7) {
        const float *x = f->x + r * f->x_stride;
        ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float(x, act, n_in);
        if (dense)
            tables[0].matmul->round(f->w.type, x, n_in, rounded);
        else
            (kvs_is_k(f->w.type) ? tables[0].matmul->quantise_k : tables[0].matmul->quantise)(x, n_in, tile, 0);
        for (uint32_t k = 0; !dense && k < n_in; k++)
            rounded[k] = tile[k / KVS_QBLOCK].d[0] * (float)tile[k / KVS_QBLOCK].q[0][k % KVS_QBLOCK];
        for (uint32_t n = 0; n < f->w.n_out; n++) {
            float want;
            cpu->vec_dot((int)n_in, &want, 0, (const uint8_t *)f->w.raw + n * f->w.raw_row_bytes, 0, act, 0, 1);
            kvs_weight_row(&f->w, n, row);
            const double bound =
                2.0 * (n_steps + 11) * (double)FLT_EPSILON * native_abs_sum(f, type, rounded, row, n) + (double)FLT_MIN;
            const double error = fabs((double)f->y[r * f->y_stride + n] - (double)want);
            if (!(error <= bound))
                fail_msg("type %d: y[%u][%u] differs from vec_dot by %g, bound %g", (int)f->w.type, r, n, error, bound);
        }
    }
    release(tile);
    release(rounded);
    release(row);
    release(act);
    kvs_pool_free(pool);
}

static void native_differs_from_ggml(void **state)
{
    (void)state;
    for (uint32_t i = 1; i + 1 < N_KINDS; i++)
        for (uint32_t s = 0; s < N_SHAPES; s++) {
            if (!fits(&KINDS[i], &SHAPES[s]))
                continue;
            struct fixture f = make_fixture(&KINDS[i], &SHAPES[s], kvs_hash3(2, i, s));
            check_native_ggml(&f, KINDS[i].ggml);
            free_fixture(&f);
        }
}

/* Codes and d of every table equal ggml's q8_K bit for bit: f32 d, 256 codes, sums of sixteen. */
static void k_quantiser_differs_from_ggml(void **state)
{
    (void)state;
    enum { N_IN = 2048, SUPER = KVS_QBLOCK * KVS_SUPER_BLOCKS, BYTES = 4 + SUPER + SUPER / 16 * 2 };
    kvs_rng rng = {9};
    static float x[N_IN];
    static struct kvs_act_block tile[N_IN / KVS_QBLOCK];
    static uint8_t q8k[N_IN / SUPER * BYTES];
    assert_int_equal(ggml_row_size(GGML_TYPE_Q8_K, N_IN), sizeof q8k);
    kvs_kernels tables[4];
    const uint32_t n_tables = isa_tables(tables);
    for (uint32_t round = 0; round < 8; round++) {
        for (uint32_t i = 0; i < N_IN; i++) {
            x[i] = uniform(&rng) * exp2f((float)(round * 5) - 20.0f);
            if (i / SUPER == 1) /* ties of the rounding, and of the magnitude: the first of +-127 gives the sign */
                x[i] = i % 97 == 3 ? (i % 2 ? 127.0f : -127.0f) : (float)kvs_rng_below(&rng, 250) - 124.5f;
            if (i / SUPER == 2 && i % 3 != 0)
                x[i] = 0.0f;
        }
        ggml_get_type_traits_cpu(GGML_TYPE_Q8_K)->from_float(x, q8k, N_IN);
        for (uint32_t t = 0; t < n_tables; t++)
            for (uint32_t row = 0; row < KVS_ACT_TILE; row += 7) {
                tables[t].matmul->quantise_k(x, N_IN, tile, row);
                for (uint32_t b = 0; b < N_IN / KVS_QBLOCK; b++) {
                    const uint8_t *super = q8k + b / KVS_SUPER_BLOCKS * BYTES;
                    const uint32_t sub = b % KVS_SUPER_BLOCKS;
                    int16_t sums[2];
                    memcpy(sums, super + 4 + SUPER + (size_t)sub * 4, sizeof sums);
                    assert_memory_equal(&tile[b].d[row], super, sizeof(float));
                    assert_memory_equal(tile[b].q[row], super + 4 + (size_t)sub * KVS_QBLOCK, KVS_QBLOCK);
                    assert_int_equal(tile[b].sum_half[row], sums[0]);
                    assert_int_equal(tile[b].sum[row], sums[0] + sums[1]);
                    if (b % 2 == 0)
                        assert_int_equal(tile[b].sum_pair[row], kvs_sum_pair(tile[b].sum[row], tile[b + 1].sum[row]));
                }
            }
    }
}

/* Every bfloat, floats around the borders of rounding and NaN: the twin against ggml, each table against the twin. */
static void rounding_is_wrong(void **state)
{
    (void)state;
    enum { N = 4099 }; /* no multiple of a vector */
    static float x[N], want[N], got[N];
    kvs_kernels tables[4];
    const uint32_t n_tables = isa_tables(tables);
    for (uint32_t part = 0; part < 16; part++)
        for (uint32_t type = KVS_WEIGHT_F16; type <= KVS_WEIGHT_BF16; type++) {
            for (uint32_t i = 0; i < N; i++) {
                static const uint32_t tails[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0x1000, 0x0fff, 0x1001};
                const uint32_t bits = ((part * 4096 + i) & 0xffffu) << 16 | tails[kvs_rng_below(&(kvs_rng){i}, 8)];
                memcpy(&x[i], &bits, sizeof bits);
                if (isnan(x[i])) /* payloads differ between conversions */
                    x[i] = NAN;
                want[i] = type == KVS_WEIGHT_F16 ? ggml_fp16_to_fp32(ggml_fp32_to_fp16(x[i]))
                                                 : ggml_bf16_to_fp32(ggml_fp32_to_bf16(x[i]));
            }
            for (uint32_t t = 0; t < n_tables; t++) {
                tables[t].matmul->round((kvs_weight_type)type, x, N, got);
                for (uint32_t i = 0; i < N; i++)
                    assert_true(memcmp(&got[i], &want[i], sizeof(float)) == 0 || (isnan(got[i]) && isnan(want[i])));
            }
        }
}

/* Codes, d and s of every table equal ggml's quantisers bit for bit; ggml's q8_1 block: f16 d, f16 s, 32 codes. */
static void quantiser_differs_from_ggml(void **state)
{
    (void)state;
    enum { N_IN = 4096, N_BLOCKS = N_IN / KVS_QBLOCK, Q8_1_BYTES = 36, Q8_0_BYTES = 34 };
    kvs_rng rng = {7};
    static float x[N_IN];
    static struct kvs_act_block tile[N_BLOCKS];
    static uint8_t q81[N_BLOCKS * Q8_1_BYTES], q80[N_BLOCKS * Q8_0_BYTES];
    assert_int_equal(ggml_row_size(GGML_TYPE_Q8_1, N_IN), sizeof q81);
    assert_int_equal(ggml_row_size(GGML_TYPE_Q8_0, N_IN), sizeof q80);
    kvs_kernels tables[4];
    const uint32_t n_tables = isa_tables(tables);
    for (uint32_t round = 0; round < 8; round++) {
        for (uint32_t i = 0; i < N_IN; i++) {
            x[i] = uniform(&rng) * exp2f((float)(round * 5) - 20.0f); /* f16 subnormal scales to large ones */
            if (i / KVS_QBLOCK % 5 == 1) /* halves: ties of the rounding; amax 127 makes d 1 */
                x[i] = i % KVS_QBLOCK == 0 ? 127.0f : (float)kvs_rng_below(&rng, 250) - 124.5f;
            if (i / KVS_QBLOCK % 17 == 2)
                x[i] = 0.0f;
        }
        ggml_get_type_traits_cpu(GGML_TYPE_Q8_1)->from_float(x, q81, N_IN);
        ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float(x, q80, N_IN);
        for (uint32_t t = 0; t < n_tables; t++)
            for (uint32_t row = 0; row < KVS_ACT_TILE; row += 7) {
                tables[t].matmul->quantise(x, N_IN, tile, row);
                for (uint32_t b = 0; b < N_BLOCKS; b++) {
                    const uint8_t *one = q81 + b * Q8_1_BYTES, *zero = q80 + b * Q8_0_BYTES;
                    const float d = tile[b].d[row], s = tile[b].s[row];
                    uint16_t half[2];
                    memcpy(half, one, sizeof half);
                    assert_memory_equal(tile[b].q[row], one + 4, KVS_QBLOCK);
                    assert_memory_equal(tile[b].q[row], zero + 2, KVS_QBLOCK);
                    assert_memory_equal(&d, &(float){kvs_half_to_float(half[0])}, sizeof d);
                    assert_true(s == kvs_half_to_float(half[1]));
                    int32_t sum = 0;
                    for (uint32_t k = 0; k < KVS_QBLOCK; k++)
                        sum += tile[b].q[row][k];
                    assert_int_equal(tile[b].sum[row], sum);
                }
            }
    }
}

/* Codes of +-127 against the least and the largest of every type: the corners where 16-bit sums would saturate. */
static void extreme_codes_saturate(void **state)
{
    (void)state;
    enum { N_IN = 512, N_OUT = 16 };
    static const uint8_t fills[] = {0x00, 0xff, 0x80, 0x7f, 0x0f, 0xf0};
    kvs_kernels tables[4];
    const uint32_t n_tables = isa_tables(tables);
    kvs_pool *pool = kvs_pool_create(kvs_allocator_default(), 1);
    for (uint32_t i = 0; i < N_KINDS; i++)
        for (size_t fill = 0; fill < sizeof fills && kvs_code_bits(KINDS[i].type) != 0; fill++) {
            struct fixture f = make_fixture(&KINDS[i], &(struct shape){N_OUT, N_IN}, 3);
            uint8_t *raw = (uint8_t *)(uintptr_t)f.w.raw;
            /* all but the f16: in front, in Q6_K behind */
            const size_t block = ggml_type_size(KINDS[i].ggml), q6_k = KINDS[i].type == KVS_WEIGHT_Q6_K;
            const size_t head = q6_k ? 0 : kvs_has_min(KINDS[i].type) ? 4 : 2, tail = q6_k ? 2 : 0;
            for (size_t b = 0; b < N_OUT * f.w.raw_row_bytes / block; b++)
                memset(raw + b * block + head, fills[fill], block - head - tail);
            memset(f.w.packed, 0, f.w.packed_bytes);
            kvs_weight_pack(&f.w, raw, 0, N_OUT);
            for (uint32_t k = 0; k < f.x_stride * MAX_ROWS; k++)
                f.x[k] = k / f.x_stride % 2 ? -1.0f : 1.0f;
            multiply(&tables[0], pool, &f, true, f.x, f.ref, MAX_ROWS);
            /* All activations are 1, so the product is the sum of the widened row. d = f16(1 / 127) is within 2^-11 of
             * 1 / 127, s likewise; codes are exact. m and d q partly cancel in the widened weight, so the bound counts
             * both. */
            float row[N_IN], d, m;
            kvs_weight_row(&f.w, 3, row);
            const struct kvs_panels p = kvs_weight_panels(&f.w, 0, 1);
            double want = 0, magnitude = 0;
            for (uint32_t k = 0; k < N_IN; k++) {
                kvs_panel_scales_at(&p, p.base, k, 3, &d, &m);
                want += (double)row[k];
                magnitude += fabs((double)row[k]) + 2 * fabs((double)m);
            }
            assert_true(fabs((double)f.ref[3] - want) <= 0x1p-10 * magnitude);
            for (uint32_t t = 0; t < n_tables; t++) {
                fill_nan(&f, f.y);
                multiply(&tables[t], pool, &f, true, f.x, f.y, MAX_ROWS);
                assert_same(&f, f.y, f.ref, MAX_ROWS, kvs_cpu_isa_name(tables[t].cpu));
            }
            free_fixture(&f);
        }
    kvs_pool_free(pool);
}

/* Scales times codes are exact in f32, so that one rounding is left to us and to ggml: the bits are the same. */
static void weight_row_differs_from_ggml(void **state)
{
    (void)state;
    for (uint32_t i = 1; i < N_KINDS; i++) {
        const struct shape shape = {49, 768};
        struct fixture f = make_fixture(&KINDS[i], &shape, 11);
        float got[768], from_raw[768], want[768];
        for (uint32_t n = 0; n < shape.n_out; n++) {
            const uint8_t *raw = (const uint8_t *)f.w.raw + n * f.w.raw_row_bytes;
            ggml_get_type_traits(KINDS[i].ggml)->to_float(raw, want, shape.n_in);
            kvs_weight_row(&f.w, n, got);
            kvs_weight no_packed = f.w;
            no_packed.packed = NULL;
            kvs_weight_row(&no_packed, n, from_raw);
            assert_memory_equal(got, from_raw, sizeof got);
            for (uint32_t k = 0; k < shape.n_in; k++)
                assert_true(got[k] == want[k]);
        }
        free_fixture(&f);
    }
}

/* Every half, and floats around the borders of rounding, against ggml's conversion. */
static void half_conversion_is_wrong(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        const float f = kvs_half_to_float((uint16_t)h), want = ggml_fp16_to_fp32((ggml_fp16_t)h);
        if (isnan(want)) {
            assert_true(isnan(f));
            continue;
        }
        assert_memory_equal(&f, &want, sizeof f);
        assert_int_equal(kvs_float_to_half(f), h);
        const float next = kvs_half_to_float((uint16_t)(h + 1)), middle = f + (next - f) * 0.5f;
        const float probes[] = {middle, nextafterf(middle, f), nextafterf(middle, next)};
        for (int i = 0; i < 3 && isfinite(middle); i++)
            assert_int_equal(kvs_float_to_half(probes[i]), ggml_fp32_to_fp16(probes[i]));
    }
    assert_int_equal(kvs_float_to_half(65519.0f), ggml_fp32_to_fp16(65519.0f));
    assert_int_equal(kvs_float_to_half(65520.0f), 0x7c00);
    assert_int_equal(kvs_float_to_half(-INFINITY), 0xfc00);
    assert_true(isnan(kvs_half_to_float(kvs_float_to_half(NAN))));
}

static int setup(void **state)
{
    (void)state;
    ggml_cpu_init(); /* before it every quantised vec_dot is wrong */
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(isa_batch_or_threads_change_bits),
        cmocka_unit_test(row_alone_differs_from_batch),
        cmocka_unit_test(f32_leaves_its_bound),
        cmocka_unit_test(native_differs_from_ggml),
        cmocka_unit_test(quantiser_differs_from_ggml),
        cmocka_unit_test(k_quantiser_differs_from_ggml),
        cmocka_unit_test(rounding_is_wrong),
        cmocka_unit_test(extreme_codes_saturate),
        cmocka_unit_test(weight_row_differs_from_ggml),
        cmocka_unit_test(half_conversion_is_wrong),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}

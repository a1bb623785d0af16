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
} SHAPES[] = {{49, 32}, {16, 96}, {200, 576}, {33, 1536}, {1, 64}, {97, 544}};
enum { N_ROWS = sizeof ROWS / sizeof *ROWS, N_SHAPES = sizeof SHAPES / sizeof *SHAPES, MAX_ROWS = 64, PAD = 5 };

static const struct kind {
    kvs_weight_type type;
    enum ggml_type ggml;
} KINDS[] = {{KVS_WEIGHT_F32, GGML_TYPE_F32},
             {KVS_WEIGHT_Q4_0, GGML_TYPE_Q4_0},
             {KVS_WEIGHT_Q4_1, GGML_TYPE_Q4_1},
             {KVS_WEIGHT_Q8_0, GGML_TYPE_Q8_0},
             {KVS_WEIGHT_OTHER, GGML_TYPE_F16}};
enum { N_KINDS = sizeof KINDS / sizeof *KINDS };

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
            for (uint32_t t = 0; t < n_tables; t++)
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

/* Native and ggml's vec_dot add the same exact terms d code dx a (and m s) in different orders; with n blocks each
 * does at most 2 n + 11 roundings on the way of a term (ours: dw dx and two fused steps a block; ggml's: the same in
 * eight lanes, their fold, the sum of m s apart), so both are within (2 n + 11) eps of the sum of absolute terms. */
static void check_native_ggml(struct fixture *f, enum ggml_type type)
{
    const struct ggml_type_traits_cpu *cpu = ggml_get_type_traits_cpu(type);
    const uint32_t n_in = f->w.n_in, n_blocks = n_in / KVS_QBLOCK;
    kvs_kernels tables[4];
    const uint32_t n_tables = isa_tables(tables);
    kvs_pool *pool = kvs_pool_create(kvs_allocator_default(), 1);
    multiply(&tables[n_tables - 1], pool, f, true, f->x, f->y, MAX_ROWS);
    uint8_t *act = must_alloc(1, ggml_row_size(cpu->vec_dot_type, n_in));
    float *row = must_alloc(n_in, sizeof *row);
    struct kvs_act_block *tile = must_alloc(n_blocks, sizeof *tile);
    for (uint32_t r = 0; r < MAX_ROWS; r += 7) {
        const float *x = f->x + r * f->x_stride;
        ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float(x, act, n_in);
        tables[0].matmul->quantise(x, n_in, tile, 0);
        for (uint32_t n = 0; n < f->w.n_out; n++) {
            const uint8_t *raw = (const uint8_t *)f->w.raw + n * f->w.raw_row_bytes;
            float want;
            cpu->vec_dot((int)n_in, &want, 0, raw, 0, act, 0, 1);
            kvs_weight_row(&f->w, n, row);
            double abs_sum = 0;
            for (uint32_t b = 0; b < n_blocks; b++) {
                double m = 0;
                uint16_t half[2];
                memcpy(half, raw + b * ggml_type_size(type), sizeof half);
                if (type == GGML_TYPE_Q4_1)
                    m = (double)kvs_half_to_float(half[1]);
                for (uint32_t k = 0; k < KVS_QBLOCK; k++) /* row - m is d code */
                    abs_sum += fabs(((double)row[b * KVS_QBLOCK + k] - m) * (double)tile[b].d[0] * tile[b].q[0][k]);
                abs_sum += fabs(m * (double)tile[b].s[0]);
            }
            const double bound = 2.0 * (2.0 * n_blocks + 11) * (double)FLT_EPSILON * abs_sum + (double)FLT_MIN;
            const double error = fabs((double)f->y[r * f->y_stride + n] - (double)want);
            if (!(error <= bound))
                fail_msg("type %d: y[%u][%u] differs from vec_dot by %g, bound %g", (int)f->w.type, r, n, error, bound);
        }
    }
    release(tile);
    release(row);
    release(act);
    kvs_pool_free(pool);
}

static void native_differs_from_ggml(void **state)
{
    (void)state;
    for (uint32_t i = 1; i <= 3; i++)
        for (uint32_t s = 0; s < N_SHAPES; s++) {
            struct fixture f = make_fixture(&KINDS[i], &SHAPES[s], kvs_hash3(2, i, s));
            check_native_ggml(&f, KINDS[i].ggml);
            free_fixture(&f);
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

/* Codes of +-127 against 0, 15, -128 and 127: the corners where 16-bit sums would saturate. */
static void extreme_codes_saturate(void **state)
{
    (void)state;
    enum { N_IN = 64, N_OUT = 16, BYTES = N_OUT * N_IN / KVS_QBLOCK * 34 };
    static const uint8_t fills[] = {0x00, 0xff, 0x80, 0x7f, 0x0f, 0xf0};
    kvs_kernels tables[4];
    const uint32_t n_tables = isa_tables(tables);
    kvs_pool *pool = kvs_pool_create(kvs_allocator_default(), 1);
    for (uint32_t i = 1; i <= 3; i++)
        for (size_t fill = 0; fill < sizeof fills; fill++) {
            struct fixture f = make_fixture(&KINDS[i], &(struct shape){N_OUT, N_IN}, 3);
            uint8_t *raw = (uint8_t *)(uintptr_t)f.w.raw;
            const size_t block = ggml_type_size(KINDS[i].ggml), head = i == 2 ? 4 : 2;
            for (size_t b = 0; b < N_OUT * N_IN / KVS_QBLOCK; b++)
                memset(raw + b * block + head, fills[fill], block - head);
            kvs_weight_pack(&f.w, raw, 0, N_OUT);
            for (uint32_t k = 0; k < f.x_stride * MAX_ROWS; k++)
                f.x[k] = k / f.x_stride % 2 ? -1.0f : 1.0f;
            multiply(&tables[0], pool, &f, true, f.x, f.ref, MAX_ROWS);
            /* 32 equal products, so the block's integer sum is known in closed form through the widened row. */
            float row[N_IN];
            kvs_weight_row(&f.w, 3, row);
            double want = 0, abs_want = 0;
            for (uint32_t k = 0; k < N_IN; k++) {
                want += (double)row[k];
                abs_want += fabs((double)row[k]);
            }
            /* d = f16(1 / 127) is within 2^-11 of 1 / 127, s likewise; codes are exact. m and d q partly cancel in
             * the widened weight, so the bound counts 15 |d| per element besides. */
            double slack = 0;
            for (uint32_t b = 0; b < N_IN / KVS_QBLOCK; b++) {
                uint16_t half[2];
                memcpy(half, raw + (3 * N_IN / KVS_QBLOCK + b) * block, sizeof half);
                slack += KVS_QBLOCK * 2 * 15 * fabs((double)kvs_half_to_float(half[0]));
            }
            assert_true(fabs((double)f.ref[3] - want) <= 0x1p-10 * (abs_want + slack));
            for (uint32_t t = 0; t < n_tables; t++) {
                fill_nan(&f, f.y);
                multiply(&tables[t], pool, &f, true, f.x, f.y, MAX_ROWS);
                assert_same(&f, f.y, f.ref, MAX_ROWS, kvs_cpu_isa_name(tables[t].cpu));
            }
            free_fixture(&f);
        }
    kvs_pool_free(pool);
}

/* 1 ulp of the larger of the two terms: ggml rounds q * d before it adds m, we fuse. */
static void weight_row_differs_from_ggml(void **state)
{
    (void)state;
    for (uint32_t i = 1; i < N_KINDS; i++) {
        const struct shape shape = {49, 576};
        struct fixture f = make_fixture(&KINDS[i], &shape, 11);
        float got[576], from_raw[576], want[576];
        for (uint32_t n = 0; n < shape.n_out; n++) {
            const uint8_t *raw = (const uint8_t *)f.w.raw + n * f.w.raw_row_bytes;
            ggml_get_type_traits(KINDS[i].ggml)->to_float(raw, want, shape.n_in);
            kvs_weight_row(&f.w, n, got);
            kvs_weight no_packed = f.w;
            no_packed.packed = NULL;
            kvs_weight_row(&no_packed, n, from_raw);
            assert_memory_equal(got, from_raw, sizeof got);
            for (uint32_t k = 0; k < shape.n_in; k++) {
                uint16_t m = 0;
                if (i == 2)
                    memcpy(&m, raw + k / KVS_QBLOCK * 20 + 2, sizeof m);
                const float scale = fmaxf(fabsf(want[k]), fabsf(want[k] - kvs_half_to_float(m)));
                assert_true(i == 2 ? fabsf(got[k] - want[k]) <= FLT_EPSILON * scale : got[k] == want[k]);
            }
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
        cmocka_unit_test(extreme_codes_saturate),
        cmocka_unit_test(weight_row_differs_from_ggml),
        cmocka_unit_test(half_conversion_is_wrong),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}

/* Every instruction set's products against the plain twin, bit for bit, without ggml: so that the cross-compiled kernels
 * of another machine can be run by an emulator (scripts/test-neon). test_matmul.c has the rest. Weights are random bytes
 * of the file formats with sane scales. */
#include "kernels/matmul.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

/* Where a block's f16 scales stand; F32 has none. */
static const struct kind {
    kvs_weight_type type;
    uint32_t n_weights, n_bytes, n_halves;
} KINDS[] = {{KVS_WEIGHT_F32, 32, 128, 0},
             {KVS_WEIGHT_Q4_0, 32, 18, 1},
             {KVS_WEIGHT_Q4_1, 32, 20, 2},
             {KVS_WEIGHT_Q8_0, 32, 34, 1}};
static const struct shape {
    uint32_t n_out, n_in;
} SHAPES[] = {{49, 32}, {16, 96}, {33, 544}, {1, 64}, {40, 1536}};
static const uint32_t MASKS[] = {0,
                                 KVS_CPU_AVX2,
                                 KVS_CPU_AVX2 | KVS_CPU_AVX512,
                                 KVS_CPU_AVX2 | KVS_CPU_AVX512 | KVS_CPU_VNNI,
                                 KVS_CPU_NEON,
                                 KVS_CPU_NEON | KVS_CPU_DOTPROD};
enum {
    N_KINDS = sizeof KINDS / sizeof *KINDS,
    N_SHAPES = sizeof SHAPES / sizeof *SHAPES,
    N_MASKS = sizeof MASKS / sizeof *MASKS,
    MAX_ROWS = 19,
    N_IN_MAX = 1536,
};

static bool have(uint32_t mask)
{
    return (kvs_cpu_flags() & mask) == mask;
}

static void *must_alloc(size_t n, size_t size_bytes)
{
    void *const p = kvs_alloc(kvs_allocator_default(), n, size_bytes);
    assert_non_null(p);
    return p;
}

static void release(void *p)
{
    kvs_free(kvs_allocator_default(), p);
}

/* fill < 0: random codes, else all bytes of the codes are fill. */
static kvs_weight make_weight(const struct kind *kind, const struct shape *s, int fill, kvs_rng *rng)
{
    kvs_weight w = {.type = kind->type, .n_out = s->n_out, .n_in = s->n_in};
    w.packed_bytes = kvs_weight_packed_bytes(w.type, w.n_out, w.n_in);
    w.packed = must_alloc(1, w.packed_bytes);
    const size_t row_bytes = s->n_in / kind->n_weights * (size_t)kind->n_bytes;
    uint8_t *const row = must_alloc(1, row_bytes);
    for (uint32_t n = 0; n < s->n_out; n++) {
        for (size_t at = 0; at < row_bytes; at += kind->n_bytes) {
            for (uint32_t i = 0; i < kind->n_bytes; i++)
                row[at + i] = fill < 0 ? (uint8_t)kvs_rng_next(rng) : (uint8_t)fill;
            for (uint32_t i = 0; i < kind->n_halves; i++) { /* |scale| < 0.125, subnormal ones too */
                const uint16_t half = (uint16_t)(kvs_rng_next(rng) & 0xafffu);
                memcpy(row + at + i * sizeof half, &half, sizeof half);
            }
            for (uint32_t i = 0; kind->type == KVS_WEIGHT_F32 && i < kind->n_weights; i++) {
                const float x = (float)(kvs_rng_double(rng) * 2.0 - 1.0);
                memcpy(row + at + i * sizeof x, &x, sizeof x);
            }
        }
        kvs_weight_pack(&w, row, n, 1);
    }
    release(row);
    return w;
}

static void fill_rows(float *x, kvs_rng *rng)
{
    for (size_t i = 0; i < (size_t)MAX_ROWS * N_IN_MAX; i++)
        x[i] = (float)(kvs_rng_double(rng) * 2.0 - 1.0) * (i % 61 == 0 ? 20.0f : 1.0f);
}

/* Every count of rows up to MAX_ROWS meets each edge of a tile. */
static void check_weight(const kvs_weight *w, const float *x, kvs_pool *pool)
{
    const size_t n = (size_t)MAX_ROWS * w->n_out;
    float *const y = must_alloc(n, sizeof *y), *const want = must_alloc(n, sizeof *want);
    void *const scratch = must_alloc(1, kvs_matmul_scratch_bytes(w, MAX_ROWS, kvs_pool_n_threads(pool)));
    for (uint32_t native = 0; native < 2; native++) {
        void (*const product)(const kvs_kernels *, kvs_pool *, const kvs_weight *, const float *, size_t, float *,
                              size_t, uint32_t, void *) = native ? kvs_matmul_native : kvs_matmul_f32;
        product(kvs_kernels_get(0), pool, w, x, N_IN_MAX, want, w->n_out, MAX_ROWS, scratch);
        for (size_t m = 0; m < N_MASKS; m++) {
            for (uint32_t n_rows = 1; n_rows <= MAX_ROWS && have(MASKS[m]); n_rows++) {
                memset(y, 0xff, n * sizeof *y);
                product(kvs_kernels_get(MASKS[m]), pool, w, x, N_IN_MAX, y, w->n_out, n_rows, scratch);
                for (size_t i = 0; i < (size_t)n_rows * w->n_out; i++)
                    if (memcmp(&y[i], &want[i], sizeof *y) != 0)
                        fail_msg("%s: type %d, %u x %u, native %u, %u rows: y[%zu] is %a, expected %a",
                                 kvs_cpu_isa_name(MASKS[m]), (int)w->type, w->n_out, w->n_in, native, n_rows, i,
                                 (double)y[i], (double)want[i]);
            }
        }
    }
    release(scratch);
    release(want);
    release(y);
}

static void an_instruction_set_changes_bits(void **state)
{
    (void)state;
    kvs_rng rng = {21};
    kvs_pool *const pool = kvs_pool_create(kvs_allocator_default(), 2);
    float *const x = must_alloc((size_t)MAX_ROWS * N_IN_MAX, sizeof *x);
    fill_rows(x, &rng);
    for (size_t k = 0; k < N_KINDS; k++)
        for (size_t s = 0; s < N_SHAPES; s++) {
            kvs_weight w = make_weight(&KINDS[k], &SHAPES[s], -1, &rng);
            check_weight(&w, x, pool);
            release(w.packed);
        }
    release(x);
    kvs_pool_free(pool);
}

/* All activation codes alike, -128 as an infinity leaves it included, against weight codes at their ends. */
static void extreme_codes_overflow_a_sum(void **state)
{
    (void)state;
    enum { N_IN = 96, N_BLOCKS = N_IN / KVS_QBLOCK };
    static const int fills[] = {0x00, 0xff, 0x80, 0x7f, 0x0f, 0xf0};
    static const int8_t codes[] = {127, -127, -128};
    kvs_rng rng = {22};
    struct kvs_act_block tile[N_BLOCKS];
    float y[KVS_ACT_TILE * KVS_PANEL], want[KVS_ACT_TILE * KVS_PANEL];
    for (size_t k = 1; k < N_KINDS; k++)
        for (size_t f = 0; f < sizeof fills / sizeof *fills; f++) {
            kvs_weight w = make_weight(&KINDS[k], &(struct shape){KVS_PANEL, N_IN}, fills[f], &rng);
            const struct kvs_panels p = kvs_weight_panels(&w, 0, 1);
            for (size_t c = 0; c < sizeof codes; c++) {
                for (int b = 0; b < N_BLOCKS; b++)
                    for (int r = 0; r < KVS_ACT_TILE; r++) {
                        memset(tile[b].q[r], codes[c], KVS_QBLOCK);
                        tile[b].d[r] = 0.5f;
                        tile[b].sum[r] = KVS_QBLOCK * codes[c];
                        tile[b].s[r] = 0.5f * (float)tile[b].sum[r];
                    }
                kvs_kernels_get(0)->matmul->native(&p, tile, KVS_ACT_TILE, want, KVS_PANEL);
                for (size_t m = 1; m < N_MASKS; m++)
                    for (uint32_t n = 1; n <= KVS_ACT_TILE && have(MASKS[m]); n++) {
                        kvs_kernels_get(MASKS[m])->matmul->native(&p, tile, n, y, KVS_PANEL);
                        assert_memory_equal(y, want, n * KVS_PANEL * sizeof *y);
                    }
            }
            release(w.packed);
        }
}

static void assert_same_float(float a, float b)
{
    if (memcmp(&a, &b, sizeof a) != 0 && !(a != a && b != b))
        fail_msg("%a is not %a", (double)a, (double)b);
}

static void quantised_rows_differ(void **state)
{
    (void)state;
    enum { N_BLOCKS = N_IN_MAX / KVS_QBLOCK };
    kvs_rng rng = {23};
    float *const x = must_alloc(N_IN_MAX, sizeof *x);
    struct kvs_act_block *const want = must_alloc(N_BLOCKS, sizeof *want);
    struct kvs_act_block *const got = must_alloc(N_BLOCKS, sizeof *got);
    for (int round = 0; round < 24; round++) {
        for (uint32_t i = 0; i < N_IN_MAX; i++) {
            x[i] = (float)(kvs_rng_double(&rng) * 2.0 - 1.0) * exp2f((float)(round * 6 - 70));
            if (i / KVS_QBLOCK % 5 == 1) /* ties of the rounding: 127 makes the scale 1 */
                x[i] = i % KVS_QBLOCK == 0 ? 127.0f : (float)kvs_rng_below(&rng, 250) - 124.5f;
            if (i / KVS_QBLOCK % 7 == 2)
                x[i] = 0.0f;
            if (i % 200 == 77)
                x[i] = i % 400 == 77 ? NAN : i % 3 ? INFINITY : -INFINITY;
        }
        kvs_kernels_get(0)->matmul->quantise(x, N_IN_MAX, want, (uint32_t)round % KVS_ACT_TILE);
        for (size_t m = 1; m < N_MASKS; m++) {
            if (!have(MASKS[m]))
                continue;
            const uint32_t row = (uint32_t)round % KVS_ACT_TILE;
            kvs_kernels_get(MASKS[m])->matmul->quantise(x, N_IN_MAX, got, row);
            for (uint32_t b = 0; b < N_BLOCKS; b++) {
                assert_memory_equal(got[b].q[row], want[b].q[row], KVS_QBLOCK);
                assert_same_float(got[b].d[row], want[b].d[row]);
                assert_same_float(got[b].s[row], want[b].s[row]);
                assert_int_equal(got[b].sum[row], want[b].sum[row]);
            }
        }
    }
    release(got);
    release(want);
    release(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_instruction_set_changes_bits),
        cmocka_unit_test(extreme_codes_overflow_a_sum),
        cmocka_unit_test(quantised_rows_differ),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Elementwise kernels: every instruction set equals the plain twin bit for bit, and the plain twin stands within
 * derived bounds of double precision. EPS below is FLT_EPSILON / 2, the relative error of one rounding.
 */
#include "kernels/kernels.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define EPS (FLT_EPSILON / 2.0)

enum { N_MAX = 4099 };

static const uint32_t masks[] = {0, KVS_CPU_AVX2, KVS_CPU_AVX2 | KVS_CPU_AVX512, KVS_CPU_NEON};
static const uint32_t *const levels = masks + 1; /* beside the plain twins */
enum { N_MASKS = sizeof masks / sizeof masks[0], N_LEVELS = N_MASKS - 1 };

static bool have(uint32_t cpu)
{
    return (kvs_cpu_flags() & cpu) == cpu;
}

static float uniform(kvs_rng *rng, float low, float high)
{
    return low + (high - low) * (float)kvs_rng_double(rng);
}

/* Same bits, any NaN equal to any NaN. */
static void assert_same_bits(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0 && !(a[i] != a[i] && b[i] != b[i]))
            fail_msg("element %zu: %a is not %a", i, (double)a[i], (double)b[i]);
}

static double ulps(float got, double want)
{
    int e;
    frexp(want, &e);
    return fabs((double)got - want) / ldexp(1.0, e - 24);
}

static void exp_off_by_more_than_two_ulp(void **state)
{
    (void)state;
    double worst = 0;
    for (float x = -87.33f; x <= 88.72283f; x += 0.00037f)
        worst = fmax(worst, ulps(kvs_expf(x), exp((double)x)));
    for (float x = 1e-30f; x < 80.0f; x *= 1.0007f)
        worst = fmax(worst, fmax(ulps(kvs_expf(x), exp((double)x)), ulps(kvs_expf(-x), exp(-(double)x))));
    print_message("kvs_expf: worst error %.3f ulp\n", worst);
    assert_true(worst < 2.0);
    assert_true(kvs_expf(0.0f) == 1.0f && kvs_expf(-0.0f) == 1.0f);
    assert_true(kvs_expf(-INFINITY) == 0.0f && kvs_expf(nextafterf(-87.33f, -100)) == 0.0f);
    assert_true(kvs_expf(-FLT_MAX) == 0.0f && kvs_expf(-87.33f) > 0.0f);
    assert_true(kvs_expf(INFINITY) == INFINITY && kvs_expf(88.7229f) == INFINITY && kvs_expf(FLT_MAX) == INFINITY);
    assert_true(isfinite(kvs_expf(88.72283f)) && isnan(kvs_expf(NAN)));
}

/* swiglu shows each vector variant's exp: a / (1 + exp(-a)). */
static void exp_differs_between_instruction_sets(void **state)
{
    (void)state;
    static float a[N_MAX], b[N_MAX], want[N_MAX], got[N_MAX];
    kvs_rng rng = {7};
    for (int round = 0; round < 200; round++) {
        for (int i = 0; i < N_MAX; i++) {
            a[i] = uniform(&rng, -100, 100) * (round % 2 ? 1.0f : 0.03f);
            b[i] = 1.0f;
        }
        const float special[] = {0,          -0.0f,   INFINITY, -INFINITY, NAN,     87.33f,
                                 -88.72283f, -88.73f, 1e-40f,   FLT_MAX,   -FLT_MAX};
        memcpy(a, special, sizeof special);
        kvs_kernels_get(0)->swiglu(want, a, b, N_MAX);
        for (size_t l = 0; l < N_LEVELS; l++) {
            if (!have(levels[l]))
                continue;
            kvs_kernels_get(levels[l])->swiglu(got, a, b, N_MAX);
            assert_same_bits(got, want, N_MAX);
        }
    }
}

static void fill(float *x, uint32_t n, kvs_rng *rng, float scale)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] = uniform(rng, -1, 1) * scale;
}

static void elementwise_differs_between_instruction_sets(void **state)
{
    (void)state;
    static float x[N_MAX + 1], w[N_MAX + 1], want[N_MAX + 1], got[N_MAX + 1];
    kvs_rng rng = {11};
    const float scales[] = {1.0f, 1e18f, 1e-25f};
    for (uint32_t n = 1; n < 140; n++) {
        fill(x, n + 1, &rng, scales[n % 3]);
        fill(w, n + 1, &rng, 2.0f);
        for (size_t l = 0; l < N_LEVELS; l++) {
            if (!have(levels[l]))
                continue;
            const kvs_kernels *const ref = kvs_kernels_get(0), *const k = kvs_kernels_get(levels[l]);
            memset(want, 0, sizeof want), memset(got, 0, sizeof got);
            ref->rmsnorm(want, x + 1, w + 1, n, 1e-5f), k->rmsnorm(got, x + 1, w + 1, n, 1e-5f);
            assert_same_bits(got, want, N_MAX + 1);
            ref->swiglu(want, x + 1, w + 1, n), k->swiglu(got, x + 1, w + 1, n);
            assert_same_bits(got, want, N_MAX + 1);
            ref->add(want, x, n), k->add(got, x, n);
            assert_same_bits(got, want, N_MAX + 1);
            ref->exp_scale(want, n, x[n / 2], w[0]), k->exp_scale(got, n, x[n / 2], w[0]);
            assert_same_bits(got, want, N_MAX + 1);
            const uint32_t n_freq = n % 5 ? n / 2 : n / 3;
            ref->rope(want, 3, n, w, n_freq), k->rope(got, 3, n, w, n_freq);
            assert_same_bits(got, want, N_MAX + 1);
        }
    }
}

/* f16 has 65,536 values; to f16, all rounding boundaries: each f16 value, the midpoint to the next, and beside it. */
static void f16_conversion_rounds_wrong(void **state)
{
    (void)state;
    static uint16_t h[65536], hw[65536];
    static float f[65536], fw[65536];
    for (uint32_t i = 0; i < 65536; i++)
        h[i] = (uint16_t)i;
    kvs_kernels_get(0)->f16_to_f32(fw, h, 65536);
    for (uint32_t i = 0; i < 65536; i++) {
        const int e = (int)(i >> 10 & 31), m = (int)(i & 1023);
        const double mag = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
        assert_true(isnan(mag) ? isnan(fw[i]) : (double)fabsf(fw[i]) == mag && !signbit(fw[i]) == !(i >> 15));
    }
    for (size_t l = 0; l < N_LEVELS; l++) {
        if (have(levels[l])) {
            kvs_kernels_get(levels[l])->f16_to_f32(f, h, 65536);
            assert_memory_equal(f, fw, sizeof f);
        }
    }
    for (int variant = 0; variant < 4; variant++) { /* exact, midpoint, just below, just above */
        static float x[65536];
        for (uint32_t i = 0; i < 65536; i++) {
            const float next = (i & 0x7fff) == 0x7bff ? (i >> 15 ? -65536.0f : 65536.0f) : fw[(i + 1) & 0xffff];
            const float mid = isfinite(fw[i]) ? (fw[i] + next) / 2 : fw[i];
            x[i] = variant == 0 ? fw[i] : variant == 1 ? mid : nextafterf(mid, variant == 2 ? -INFINITY : INFINITY);
            if (variant && (i & 0x7fff) >= 0x7c00)
                x[i] = fw[i];
        }
        kvs_kernels_get(0)->f32_to_f16(h, x, 65536);
        for (uint32_t i = 0; i < 65536; i++) {
            if (isnan(fw[i]))
                continue;
            const uint32_t toward_i = variant == 0 || (variant == 1 && !(i & 1)) || (variant == 2 && !(i >> 15)) ||
                                      (variant == 3 && i >> 15) || (i & 0x7fff) == 0x7c00;
            assert_int_equal(h[i], toward_i ? i : i + 1);
        }
        for (size_t l = 0; l < N_LEVELS; l++) {
            if (have(levels[l])) {
                kvs_kernels_get(levels[l])->f32_to_f16(hw, x, 65536);
                assert_memory_equal(hw, h, sizeof h);
            }
        }
    }
}

/* Squares are all positive: a chain of n / 16 + 1 roundings and 4 folds, then division, root, reciprocal, 2 products.
 */
static void rmsnorm_off_double_precision(void **state)
{
    (void)state;
    float x[577], w[577], y[577];
    kvs_rng rng = {3};
    for (uint32_t n = 1; n <= 577; n += 16) {
        fill(x, n, &rng, 30.0f), fill(w, n, &rng, 1.0f);
        kvs_kernels_get(0)->rmsnorm(y, x, w, n, 1e-5f);
        double sum = 0;
        for (uint32_t i = 0; i < n; i++)
            sum += (double)x[i] * (double)x[i];
        const double inv = 1.0 / sqrt(sum / n + 1e-5), rel = EPS * ((n / 16 + 7) / 2.0 + 5);
        for (uint32_t i = 0; i < n; i++)
            assert_true(fabs((double)y[i] - (double)x[i] * inv * (double)w[i]) <=
                        rel * fabs((double)x[i] * inv * (double)w[i]) * 1.001 + FLT_MIN);
    }
}

/* exp is within 2 ulp = 4 EPS; then an addition, a division and a product: 7 EPS, 8 for the second order. */
static void swiglu_off_double_precision(void **state)
{
    (void)state;
    float a[999], b[999], y[999];
    kvs_rng rng = {4};
    for (int round = 0; round < 20; round++) {
        fill(a, 999, &rng, round % 2 ? 80.0f : 3.0f), fill(b, 999, &rng, 5.0f);
        kvs_kernels_get(0)->swiglu(y, a, b, 999);
        for (int i = 0; i < 999; i++) {
            const double want = (double)a[i] / (1.0 + exp(-(double)a[i])) * (double)b[i];
            assert_true(fabs((double)y[i] - want) <= 8 * EPS * fabs(want) + FLT_MIN);
        }
    }
}

static void rope_row_wrong_beyond_the_table_or_below_zero(void **state)
{
    (void)state;
    enum { N_POS = 50, N_FREQ = 32 };
    static float rows[N_POS * 2 * N_FREQ];
    double theta[N_FREQ];
    for (int i = 0; i < N_FREQ; i++)
        theta[i] = pow(1e5, -2.0 * i / (2 * N_FREQ));
    for (int pos = 0; pos < N_POS; pos++) {
        for (int i = 0; i < N_FREQ; i++) {
            rows[pos * 2 * N_FREQ + i] = (float)cos(pos * theta[i]);
            rows[pos * 2 * N_FREQ + N_FREQ + i] = (float)sin(pos * theta[i]);
        }
    }
    const kvs_rope_table t = {.rows = rows, .n_pos = N_POS, .n_freq = N_FREQ, .theta = theta};
    const int32_t positions[] = {0, 1, 49, 50, 51, 100000, -1, -49, -50, -100000, 2000000000, -2147483647 - 1};
    for (size_t j = 0; j < sizeof positions / sizeof positions[0]; j++) {
        float row[2 * N_FREQ];
        kvs_rope_row(&t, positions[j], row);
        for (int i = 0; i < N_FREQ; i++) {
            assert_true(row[i] == (float)cos((double)positions[j] * theta[i]));
            assert_true(row[N_FREQ + i] == (float)sin((double)positions[j] * theta[i]));
        }
    }
}

typedef struct dist_double {
    double kl, jsd, entropy, lse_p, lse_q;
} dist_double;

static double lse_double(const float *x, uint32_t n)
{
    double max = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < n; i++)
        max = fmax(max, (double)x[i]);
    for (uint32_t i = 0; i < n; i++)
        sum += exp((double)x[i] - max);
    return max + log(sum);
}

static dist_double dist_of(const float *p, const float *q, uint32_t n)
{
    dist_double d = {.lse_p = lse_double(p, n), .lse_q = lse_double(q, n)};
    for (uint32_t i = 0; i < n; i++) {
        const double lp = (double)p[i] - d.lse_p, lq = (double)q[i] - d.lse_q, pp = exp(lp), qq = exp(lq);
        const double lm = log((pp + qq) / 2);
        d.kl += pp > 0 ? pp * (lp - lq) : 0;
        d.jsd += (pp > 0 ? pp * (lp - lm) / 2 : 0) + (qq > 0 ? qq * (lq - lm) / 2 : 0);
        d.entropy -= pp > 0 ? pp * lp : 0;
    }
    return d;
}

/* Relative errors: exp 2 ulp = 4 EPS on an argument rounded once (|x - max| EPS, under 90 EPS), one scaling. So each p
 * is within 100 EPS of its value, a term of KL within that of |p ln(p/q)|, plus p times the rounding of the difference,
 * 2 EPS max |x|. JSD is sum of m h(t) / 2 with m = (p + q) / 2: t is within dt = 100 EPS of its value; h is t^2 near 0,
 * so a term moves by m (|t| dt + dt^2 / 2), and sum m |t| <= sqrt(sum m t^2) <= sqrt(2 JSD); farther out the slope of h
 * is ln((1 + t) / (1 - t)) <= 90. Weights under exp(-87.33) are called 0: n * exp(-87) * 90 nats at most. */
static void distance_off_double_precision(void **state)
{
    (void)state;
    static float p[N_MAX], q[N_MAX];
    kvs_rng rng = {5};
    const float noise[] = {0.0f, 1e-6f, 1e-3f, 0.1f, 3.0f, 30.0f};
    for (int round = 0; round < 60; round++) {
        const uint32_t n = round % 3 ? N_MAX : 1 + kvs_rng_below(&rng, 50);
        for (uint32_t i = 0; i < n; i++) {
            p[i] = uniform(&rng, -20, 20);
            q[i] = p[i] + uniform(&rng, -1, 1) * noise[round % 6];
        }
        kvs_dist_pair got;
        kvs_kernels_get(0)->dist_pair(&got, p, q, n);
        dist_double want = dist_of(p, q, n);
        want.jsd = fmax(want.jsd, 0); /* double's own cancellation leaves -1e-17 for equal ones */
        const double dt = 100 * EPS;
        double abs_kl = 0, max_x = 0;
        for (uint32_t i = 0; i < n; i++) {
            abs_kl += fabs(exp((double)p[i] - want.lse_p) * ((double)p[i] - want.lse_p - (double)q[i] + want.lse_q));
            max_x = fmax(max_x, fabs((double)p[i]) + fabs((double)q[i]));
        }
        assert_true(fabs(got.lse_p - want.lse_p) <= 100 * EPS && fabs(got.lse_q - want.lse_q) <= 100 * EPS);
        assert_true(fabs(got.kl - want.kl) <= 102 * EPS * abs_kl + 4 * EPS * max_x * (noise[round % 6] != 0) + 1e-12);
        assert_true(fabs(got.jsd - want.jsd) <= dt * (90 * sqrt(want.jsd) + want.jsd) + dt * dt);
        assert_true(fabs(got.entropy_p - want.entropy) <= 200 * EPS * (want.entropy + 1));
        assert_true(got.jsd >= 0 && got.jsd <= log(2.0) * (1 + 100 * EPS));
        if (noise[round % 6] == 0.0f)
            assert_true(got.jsd == 0.0 && got.kl == 0.0);
    }
}

/* Of two logits a distance x apart the entropy is x exp(-x) to the last bit, so that it shows where exp becomes 0. */
static void exp_near_its_floor_differs_between_instruction_sets(void **state)
{
    (void)state;
    for (float x = 60.0f; x < 110.0f; x = nextafterf(x, 200.0f) * (1.0f + 0x1p-12f)) {
        const float logits[2] = {0.0f, -x};
        kvs_dist_pair want, got;
        kvs_kernels_get(0)->dist_pair(&want, logits, logits, 2);
        assert_true(want.entropy_p == (double)(kvs_expf(-x) * x));
        for (size_t l = 0; l < N_LEVELS; l++) {
            if (!have(levels[l]))
                continue;
            kvs_kernels_get(levels[l])->dist_pair(&got, logits, logits, 2);
            assert_memory_equal(&got.entropy_p, &want.entropy_p, sizeof got.entropy_p);
        }
    }
}

static void distance_differs_between_instruction_sets(void **state)
{
    (void)state;
    static float p[N_MAX], q[N_MAX];
    kvs_rng rng = {9};
    for (int round = 0; round < 120; round++) {
        const uint32_t n = round < 40 ? (uint32_t)round + 1 : N_MAX - kvs_rng_below(&rng, 40);
        const float spread = round % 4 == 0 ? 200.0f : 15.0f;
        for (uint32_t i = 0; i < n; i++) {
            p[i] = round % 7 == 3 ? floorf(uniform(&rng, -3, 3)) : uniform(&rng, -spread, spread);
            q[i] = round % 2 ? p[i] + uniform(&rng, -1, 1) : uniform(&rng, -spread, spread);
            if (round % 5 == 2 && kvs_rng_below(&rng, 3) == 0)
                p[i] = -INFINITY;
        }
        kvs_dist_pair want, got;
        uint32_t want_at, got_at;
        memset(&want, 0, sizeof want), memset(&got, 0, sizeof got);
        kvs_kernels_get(0)->dist_pair(&want, p, q, n);
        const double want_lse = kvs_kernels_get(0)->logsumexp(p, n, &want_at);
        assert_true(want_at == want.argmax_p && (want_lse == want.lse_p || isnan(want_lse)));
        for (uint32_t i = 0; i < n; i++)
            assert_true(i < want_at ? p[i] < p[want_at] : p[i] <= p[want_at]);
        for (size_t l = 0; l < N_LEVELS; l++) {
            if (!have(levels[l]))
                continue;
            kvs_kernels_get(levels[l])->dist_pair(&got, p, q, n);
            const double *const a = &want.kl, *const b = &got.kl; /* five doubles in a row */
            for (int i = 0; i < 5; i++)
                assert_true(memcmp(a + i, b + i, sizeof *a) == 0 || (isnan(a[i]) && isnan(b[i])));
            assert_true(want.argmax_p == got.argmax_p && want.argmax_q == got.argmax_q);
            const double lse = kvs_kernels_get(levels[l])->logsumexp(p, n, &got_at);
            assert_true(memcmp(&lse, &want_lse, sizeof lse) == 0 || (isnan(lse) && isnan(want_lse)));
            assert_int_equal(got_at, want_at);
        }
    }
}

static void logits_all_minus_infinity_give_no_number(void **state)
{
    (void)state;
    float x[20];
    for (int i = 0; i < 20; i++)
        x[i] = -INFINITY;
    for (size_t l = 0; l < N_MASKS; l++) {
        uint32_t at = 7;
        if (have(masks[l])) {
            assert_true(kvs_kernels_get(masks[l])->logsumexp(x, 20, &at) == -INFINITY);
            assert_int_equal(at, 0);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exp_off_by_more_than_two_ulp),
        cmocka_unit_test(exp_differs_between_instruction_sets),
        cmocka_unit_test(elementwise_differs_between_instruction_sets),
        cmocka_unit_test(f16_conversion_rounds_wrong),
        cmocka_unit_test(rmsnorm_off_double_precision),
        cmocka_unit_test(swiglu_off_double_precision),
        cmocka_unit_test(rope_row_wrong_beyond_the_table_or_below_zero),
        cmocka_unit_test(distance_off_double_precision),
        cmocka_unit_test(exp_near_its_floor_differs_between_instruction_sets),
        cmocka_unit_test(distance_differs_between_instruction_sets),
        cmocka_unit_test(logits_all_minus_infinity_give_no_number),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

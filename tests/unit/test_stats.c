/* Statistics against closed forms and against scipy 1.17.1 / numpy, computed once offline on the arrays below (the
 * expression stands beside each constant; st is scipy.stats, x and y as here). */
#include "eval/stats.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 12 };
static const double x[N] = {0.42, -0.13, 0.91, 0.27, -0.35, 0.66, 1.20, 0.05, -0.08, 0.74, 0.33, 0.58};
static const double y[N] = {1.0, 0.4, 2.1, 1.4, 0.4, 1.3, 2.6, 0.9, 0.7, 1.4, 1.6, 1.1};

static kvs_stats_options options(void)
{
    kvs_stats_options opt;
    kvs_stats_options_default(&opt);
    return opt;
}

static void near(double a, double b, double tolerance)
{
    if (!(fabs(a - b) <= tolerance))
        fail_msg("%.17g is not within %g of %.17g", a, tolerance, b);
}

/* Exact in real arithmetic, so only rounding: a few units in the last place of numbers near 1. */
static const double TINY = 1e-14;

static void test_description_differs_from_numpy(void **state)
{
    (void)state;
    double scratch[N];
    near(kvs_mean(x, N), 0.38333333333333336, TINY);
    near(kvs_sd(x, N), 0.46032267997239684, TINY);                       /* x.std(ddof=1) */
    near(kvs_quantile(x, N, 0.05, scratch), -0.22899999999999998, TINY); /* np.quantile */
    near(kvs_quantile(x, N, 0.25, scratch), 0.0175, TINY);
    near(kvs_median(x, N, scratch), 0.375, TINY);
    near(kvs_quantile(x, N, 0.90, scratch), 0.8930000000000001, TINY);
    assert_true(kvs_quantile(x, N, 1.0, scratch) == 1.20 && kvs_quantile(x, N, 0.0, scratch) == -0.35);
    assert_true(isnan(kvs_mean(x, 0)) && isnan(kvs_sd(x, 1)) && isnan(kvs_median(x, 0, scratch)));
}

static void test_normal_functions_are_inverse(void **state)
{
    (void)state;
    near(kvs_normal_cdf(-3.0), 0.0013498980316300933, 1e-17);    /* st.norm.cdf(-3) */
    near(kvs_normal_quantile(1e-10), -6.361340902404056, 1e-13); /* st.norm.ppf */
    near(kvs_normal_quantile(0.025), -1.9599639845400545, TINY);
    near(kvs_normal_quantile(0.84), 0.994457883209753, TINY);
    near(kvs_normal_quantile(0.5), 0.0, 1e-16);
    assert_true(kvs_normal_quantile(0.0) == -INFINITY && kvs_normal_quantile(1.0) == INFINITY);
    assert_true(isnan(kvs_normal_quantile(-0.1)) && isnan(kvs_normal_quantile(NAN)));
    for (double p = 0.001; p < 1.0; p += 0.001)
        near(kvs_normal_cdf(kvs_normal_quantile(p)), p, TINY);
}

/* A bound of 10,000 draws scatters by sqrt(0.025 * 0.975 / 1e4) / 0.0584 = 0.027 standard errors (0.0584: normal
 * density at 1.96) and BCa's z0 adds 2 * 0.5 / sqrt(1e4) / 0.399 = 0.025: 0.037 together. Allowed: 5 of that, twice
 * over for a skewed statistic, whose long tail is thinner. References: 1e6 draws of st.bootstrap. */
static void near_bound(double bound, double reference, double lo, double hi, double skew)
{
    near(bound, reference, 5 * 0.037 * (hi - lo) / 3.92 * skew);
}

static void test_bootstrap_bounds_differ_from_scipy(void **state)
{
    (void)state;
    const kvs_stats_options opt = options();
    kvs_interval ci;
    assert_int_equal(kvs_bootstrap_mean(x, N, &opt, &ci, NULL), KVS_OK);
    near(ci.estimate, 0.38333333333333336, TINY);
    near_bound(ci.lo, 0.136667, 0.1367, 0.6342, 1); /* st.bootstrap((x,), np.mean, method='percentile') */
    near_bound(ci.hi, 0.634167, 0.1367, 0.6342, 1);
    near_bound(ci.bca_lo, 0.14, 0.14, 0.6375, 1); /* method='BCa' */
    near_bound(ci.bca_hi, 0.6375, 0.14, 0.6375, 1);
    assert_true(ci.bca_valid && ci.n == N && ci.n_draws == 10000 && ci.n_undefined == 0);

    double e[N];
    for (int i = 0; i < N; i++)
        e[i] = exp(2.0 * x[i]);
    assert_int_equal(kvs_bootstrap_mean(e, N, &opt, &ci, NULL), KVS_OK);
    near_bound(ci.lo, 1.727773, 1.7278, 4.9491, 2); /* the same of np.exp(2*x): skewed */
    near_bound(ci.hi, 4.949108, 1.7278, 4.9491, 2);
    near_bound(ci.bca_lo, 1.946865, 1.9469, 5.5240, 2);
    near_bound(ci.bca_hi, 5.523958, 1.9469, 5.5240, 2);
    assert_true(ci.bca_lo > ci.lo && ci.bca_hi > ci.hi); /* the correction follows the skew */

    assert_int_equal(kvs_bootstrap_ratio(x, y, N, &opt, &ci, NULL), KVS_OK);
    near(ci.estimate, 0.3087248322147651, TINY);    /* x.mean() / y.mean() */
    near_bound(ci.bca_lo, 0.143, 0.143, 0.4143, 2); /* paired=True, method='BCa' */
    near_bound(ci.bca_hi, 0.414286, 0.143, 0.4143, 2);
    assert_int_equal(kvs_bootstrap_median(x, N, &opt, &ci, NULL), KVS_OK);
    near(ci.estimate, 0.375, TINY);
    assert_true(ci.lo >= -0.35 && ci.lo < 0.375 && ci.hi > 0.375 && ci.hi <= 1.2);
}

static void test_bootstrap_is_reproducible_and_refuses(void **state)
{
    (void)state;
    kvs_stats_options opt = options();
    kvs_interval a, b;
    kvs_error err;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    assert_int_equal(kvs_bootstrap_mean(x, N, &opt, &a, &err), KVS_OK);
    assert_int_equal(kvs_bootstrap_mean(x, N, &opt, &b, &err), KVS_OK);
    assert_true(a.lo == b.lo && a.hi == b.hi && a.bca_lo == b.bca_lo && a.bca_hi == b.bca_hi);
    const double constant[4] = {2, 2, 2, 2};
    assert_int_equal(kvs_bootstrap_mean(constant, 4, &opt, &a, &err), KVS_OK);
    assert_true(!a.bca_valid && isnan(a.bca_lo) && a.lo == 2.0 && a.hi == 2.0);
    assert_int_equal(kvs_bootstrap_mean(x, 1, &opt, &a, &err), KVS_EINVAL);
    const double bad[3] = {1, NAN, 2};
    assert_int_equal(kvs_bootstrap_mean(bad, 3, &opt, &a, &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "x[1]"));
    opt.n_draws = 10;
    assert_int_equal(kvs_bootstrap_mean(x, N, &opt, &a, &err), KVS_EINVAL);
    opt = options();
    opt.level = 95;
    assert_int_equal(kvs_bootstrap_mean(x, N, &opt, &a, &err), KVS_EINVAL);
}

static void test_equivalence_needs_the_whole_interval_inside(void **state)
{
    (void)state;
    const kvs_stats_options opt = options();
    kvs_equivalence eq;
    assert_int_equal(kvs_tost_mean(x, N, 0.0, 0.8, &opt, &eq, NULL), KVS_OK);
    assert_true(eq.equivalent && eq.p < 0.05);
    kvs_stats_options ninety = opt;
    ninety.level = 1.0 - 2.0 * (1.0 - opt.level); /* alpha 0.05 on each side */
    kvs_interval ci;
    assert_int_equal(kvs_bootstrap_mean(x, N, &ninety, &ci, NULL), KVS_OK);
    near(ninety.level, 0.90, TINY);
    assert_true(eq.interval.lo == ci.lo && eq.interval.bca_hi == ci.bca_hi);
    assert_int_equal(kvs_tost_mean(x, N, 0.3, 0.8, &opt, &eq, NULL), KVS_OK);
    assert_true(!eq.equivalent && eq.p > 0.05);
    assert_int_equal(kvs_tost_mean(x, N, 0.8, 0.3, &opt, &eq, NULL), KVS_EINVAL);
}

static void test_sign_flip_counts_all_signs(void **state)
{
    (void)state;
    kvs_stats_options opt = options();
    kvs_test t;
    assert_int_equal(kvs_sign_flip_test(x, N, &opt, &t, NULL), KVS_OK);
    assert_true(t.exact && t.p == 0.01708984375 && t.p_greater == 0.008544921875); /* st.permutation_test, samples */
    const double ones[20] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    assert_int_equal(kvs_sign_flip_test(ones, 20, &opt, &t, NULL), KVS_OK);
    assert_true(t.exact && t.p == ldexp(2.0, -20) && t.p_greater == ldexp(1.0, -20));
    const double zeros[3] = {0, 0, 0};
    assert_int_equal(kvs_sign_flip_test(zeros, 3, &opt, &t, NULL), KVS_OK);
    assert_true(t.p == 1.0);
    assert_int_equal(kvs_sign_flip_test(x, 0, &opt, &t, NULL), KVS_EINVAL);
}

/* Eight ones among 80 differences: all signs alike has p = 2 / 256. They stand where signs reused within a 64-bit word
 * (half words) or across words would be the same. Allowed: 5 binomial deviations of 10,000 draws and the added one. */
static void test_random_sign_flips_are_independent(void **state)
{
    (void)state;
    const kvs_stats_options opt = options();
    const int at[8] = {0, 1, 2, 32, 33, 34, 64, 65};
    kvs_test t;
    double padded[80] = {0};
    for (int i = 0; i < 8; i++)
        padded[at[i]] = 1.0;
    assert_int_equal(kvs_sign_flip_test(padded, 80, &opt, &t, NULL), KVS_OK);
    const double p = 2.0 / 256;
    assert_false(t.exact);
    near(t.p, p, 5 * sqrt(p * (1 - p) / 10000) + 1e-4);
    near(t.p_greater, p / 2, 5 * sqrt(p / 2 * (1 - p / 2) / 10000) + 1e-4);
    near(t.statistic, 0.1, TINY);
}

static void test_wilcoxon_differs_from_scipy(void **state)
{
    (void)state;
    const kvs_stats_options opt = options();
    kvs_test t;
    assert_int_equal(kvs_wilcoxon_test(x, N, &opt, &t, NULL), KVS_OK);
    assert_true(t.exact && t.statistic == 67.0); /* st.wilcoxon(x, method='exact') */
    near(t.p, 0.02685546875, 1e-16);
    near(t.p_greater, 0.013427734375, 1e-16);
    /* d = np.round(np.sin(np.arange(1, 61) * 1.7) + 0.3, 1): many ties, some zeros;
     * st.wilcoxon(d, correction=True, method='approx') */
    double d[60];
    for (int i = 0; i < 60; i++)
        d[i] = round(10 * (sin((i + 1) * 1.7) + 0.3)) / 10;
    assert_int_equal(kvs_wilcoxon_test(d, 60, &opt, &t, NULL), KVS_OK);
    assert_true(!t.exact && t.statistic == 1224.5);
    near(t.p, 0.0015681609532890858, 1e-15);
    near(t.p_greater, 0.0007840804766445429, 1e-15);
    /* ties, exact by hand: ranks 1.5 1.5 3; all positive is 1 of 8 sign choices */
    const double tied[3] = {1, 1, 2}, none[2] = {0, 0};
    assert_int_equal(kvs_wilcoxon_test(tied, 3, &opt, &t, NULL), KVS_OK);
    assert_true(t.exact && t.statistic == 6.0 && t.p_greater == 0.125 && t.p == 0.25);
    assert_int_equal(kvs_wilcoxon_test(none, 2, &opt, &t, NULL), KVS_OK);
    assert_true(t.p == 1.0 && t.n == 0);
}

static void test_mcnemar_is_the_binomial(void **state)
{
    (void)state;
    kvs_test t;
    kvs_mcnemar_test(12, 5, &t);
    near(t.p, 0.143463134765625, 1e-14); /* st.binomtest(12, 17).pvalue */
    near(t.p_greater, 0.0717315673828125, 1e-14);
    kvs_mcnemar_test(5, 12, &t);
    near(t.p, 0.143463134765625, 1e-14);
    assert_true(t.p_greater > 0.9);
    kvs_mcnemar_test(3, 3, &t);
    assert_true(t.p == 1.0);
    kvs_mcnemar_test(0, 0, &t);
    assert_true(t.p == 1.0 && t.n == 0);
    kvs_mcnemar_test(10, 0, &t);
    near(t.p, ldexp(2.0, -10), 1e-15);
}

static void test_spearman_differs_from_scipy(void **state)
{
    (void)state;
    const kvs_stats_options opt = options();
    double rho;
    assert_int_equal(kvs_spearman(x, y, N, &opt, &rho, NULL), KVS_OK);
    near(rho, 0.8491280340452296, TINY); /* st.spearmanr(x, y), two ties in y */
    double falling[N];
    for (int i = 0; i < N; i++)
        falling[i] = -exp(x[i]);
    assert_int_equal(kvs_spearman(x, falling, N, &opt, &rho, NULL), KVS_OK);
    near(rho, -1.0, TINY);
    const double constant[3] = {1, 1, 1};
    assert_int_equal(kvs_spearman(x, constant, 3, &opt, &rho, NULL), KVS_OK);
    assert_true(isnan(rho));
    near(kvs_partial_correlation(0.5, 0.0, 0.0), 0.5, 0.0);
    near(kvs_partial_correlation(0.8, 0.6, 0.5), 0.5 / sqrt(0.64 * 0.75), TINY);
    assert_true(isnan(kvs_partial_correlation(0.8, 1.0, 0.8)));
}

/* Rho of a resampled pool, from rows really copied. */
static double copied_rho(const uint32_t *idx, uint32_t n)
{
    const kvs_stats_options opt = options();
    double cx[N], cy[N], rho;
    for (uint32_t i = 0; i < n; i++) {
        memcpy(cx + 3 * i, x + 3 * idx[i], 3 * sizeof *x);
        memcpy(cy + 3 * i, y + 3 * idx[i], 3 * sizeof *y);
    }
    assert_int_equal(kvs_spearman(cx, cy, 3 * n, &opt, &rho, NULL), KVS_OK);
    return rho;
}

static double copied_statistic(void *ctx, const uint32_t *idx, uint32_t n)
{
    (void)ctx;
    return copied_rho(idx, n);
}

/* Multiplicities instead of copies are exact in every draw: whole numbers and halves throughout. */
static void test_clustered_spearman_resamples_whole_clusters(void **state)
{
    (void)state;
    kvs_stats_options opt = options();
    opt.n_draws = 500;
    const uint32_t row_begin[5] = {0, 3, 6, 9, 12}, torn[3] = {0, 5, 3};
    kvs_interval fast, slow;
    assert_int_equal(kvs_spearman_clustered(x, y, row_begin, 4, &opt, &fast, NULL), KVS_OK);
    assert_int_equal(kvs_bootstrap(copied_statistic, NULL, 4, &opt, &slow, NULL), KVS_OK);
    near(fast.estimate, 0.8491280340452296, TINY);
    near(fast.lo, slow.lo, TINY);
    near(fast.hi, slow.hi, TINY);
    near(fast.bca_lo, slow.bca_lo, TINY);
    assert_true(fast.lo < fast.estimate && fast.hi > fast.lo);
    assert_int_equal(kvs_spearman_clustered(x, y, torn, 2, &opt, &fast, NULL), KVS_EINVAL);
}

static void test_auroc_counts_pairs(void **state)
{
    (void)state;
    const kvs_stats_options opt = options();
    const uint8_t label[N] = {1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0};
    double rounded[N], pairs = 0.0, auroc;
    for (int i = 0; i < N; i++)
        rounded[i] = round(x[i] * 2) / 2; /* makes ties */
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < N; j++) {
            if (label[i] && !label[j])
                pairs += rounded[i] > rounded[j] ? 1.0 : rounded[i] == rounded[j] ? 0.5 : 0.0;
        }
    }
    assert_int_equal(kvs_auroc(rounded, label, N, &opt, &auroc, NULL), KVS_OK);
    near(auroc, pairs / 36.0, TINY);
    const uint8_t all[2] = {1, 1};
    assert_int_equal(kvs_auroc(x, all, 2, &opt, &auroc, NULL), KVS_OK);
    assert_true(isnan(auroc));
}

static void test_adjusted_p_by_hand(void **state)
{
    (void)state;
    const kvs_stats_options opt = options();
    const double p[5] = {0.01, 0.04, 0.03, 0.005, 0.5};
    const double holm[5] = {0.04, 0.09, 0.09, 0.025, 0.5}; /* 5*.005, 4*.01, 3*.03, max(., 2*.04), .5 */
    const double bh[5] = {0.025, 0.05, 0.05, 0.025, 0.5};  /* st.false_discovery_control(p) */
    double adjusted[5];
    kvs_error err;
    assert_int_equal(kvs_adjust_holm(p, 5, &opt, adjusted, NULL), KVS_OK);
    for (int i = 0; i < 5; i++)
        near(adjusted[i], holm[i], TINY);
    assert_int_equal(kvs_adjust_bh(p, 5, &opt, adjusted, NULL), KVS_OK);
    for (int i = 0; i < 5; i++)
        near(adjusted[i], bh[i], TINY);
    const double bad[2] = {0.5, 1.5};
    assert_int_equal(kvs_adjust_bh(bad, 2, &opt, adjusted, &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "p[1]"));
}

static void test_sample_size_formula(void **state)
{
    (void)state;
    assert_int_equal(kvs_sample_size(1.0, 0.1), 784); /* (2.8 * 10)^2 */
    assert_int_equal(kvs_sample_size(1.0, 10.0), 30);
    assert_int_equal(kvs_sample_size(1.0, 0.0), UINT32_MAX);
}

/* A solution is optimal iff its gradient is 0 where x > 0 and not descending where x = 0 (Karush-Kuhn-Tucker). */
static void test_nnls_meets_the_optimality_conditions(void **state)
{
    (void)state;
    const double a0[18] = {1, .5, .2, .3, 1, .9, .2, .1, .8, .9, .4, .4, .5, .6, .1, .1, .9, .7};
    const double b0[6] = {1.2, -.1, -.3, 1.0, .9, .2};
    double fit[11], residual;
    assert_int_equal(kvs_nnls(a0, b0, 6, 3, fit, &residual, NULL), KVS_OK);
    near(fit[0], 1.12727273, 5e-9); /* scipy.optimize.nnls(A, b) prints these digits */
    assert_true(fit[1] == 0.0 && fit[2] == 0.0);
    near(residual, 0.7709498273971117, 1e-14);

    kvs_rng rng = {3};
    uint32_t n_bound = 0, n_free = 0;
    for (int trial = 0; trial < 50; trial++) {
        double a[40][11], b[40];
        for (int r = 0; r < 40; r++) {
            b[r] = kvs_rng_double(&rng) - 0.3;
            for (int c = 0; c < 11; c++)
                a[r][c] = kvs_rng_double(&rng) - 0.4;
            a[r][10] = trial % 2 ? a[r][3] : a[r][10]; /* a column twice must not break it */
        }
        assert_int_equal(kvs_nnls(&a[0][0], b, 40, 11, fit, &residual, NULL), KVS_OK);
        for (int c = 0; c < 11; c++) {
            double slope = 0.0;
            for (int r = 0; r < 40; r++) {
                double diff = b[r];
                for (int k = 0; k < 11; k++)
                    diff -= a[r][k] * fit[k];
                slope += a[r][c] * diff;
            }
            assert_true(fit[c] >= 0.0);
            assert_true(fit[c] > 0.0 ? fabs(slope) < 1e-8 : slope < 1e-8);
            n_free += fit[c] > 0.0;
            n_bound += fit[c] == 0.0;
        }
    }
    assert_true(n_bound > 50 && n_free > 50);
    assert_int_equal(kvs_nnls(a0, b0, 6, 33, fit, NULL, NULL), KVS_EINVAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_description_differs_from_numpy),
        cmocka_unit_test(test_normal_functions_are_inverse),
        cmocka_unit_test(test_bootstrap_bounds_differ_from_scipy),
        cmocka_unit_test(test_bootstrap_is_reproducible_and_refuses),
        cmocka_unit_test(test_equivalence_needs_the_whole_interval_inside),
        cmocka_unit_test(test_sign_flip_counts_all_signs),
        cmocka_unit_test(test_random_sign_flips_are_independent),
        cmocka_unit_test(test_wilcoxon_differs_from_scipy),
        cmocka_unit_test(test_mcnemar_is_the_binomial),
        cmocka_unit_test(test_spearman_differs_from_scipy),
        cmocka_unit_test(test_clustered_spearman_resamples_whole_clusters),
        cmocka_unit_test(test_auroc_counts_pairs),
        cmocka_unit_test(test_adjusted_p_by_hand),
        cmocka_unit_test(test_sample_size_formula),
        cmocka_unit_test(test_nnls_meets_the_optimality_conditions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

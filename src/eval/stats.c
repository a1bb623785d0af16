/* Statistics of stats.h. Description, resampling, tests that are not on ranks (those: ranks.c), and the fit. Sources:
 * Efron 1987 (BCa), Schuirmann 1987 (TOST), McNemar 1947, Acklam (normal quantile), Lawson-Hanson 1974 ch. 23 (NNLS).
 */
#include "eval/stats.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- description ---- */

double kvs_mean(const double *x, size_t n)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += x[i];
    return n > 0 ? sum / (double)n : NAN;
}

double kvs_sd(const double *x, size_t n)
{
    if (n < 2)
        return NAN;
    const double mean = kvs_mean(x, n);
    double squares = 0.0;
    for (size_t i = 0; i < n; i++)
        squares += (x[i] - mean) * (x[i] - mean);
    return sqrt(squares / (double)(n - 1));
}

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    if (isnan(x) || isnan(y))
        return (isnan(x) ? 1 : 0) - (isnan(y) ? 1 : 0);
    return (x > y) - (x < y);
}

void kvs_sort_doubles(double *x, size_t n)
{
    if (n > 1)
        qsort(x, n, sizeof *x, compare_doubles);
}

double kvs_quantile_sorted(const double *sorted, size_t n, double q)
{
    if (n == 0)
        return NAN;
    const double at = (double)(n - 1) * (q < 0.0 ? 0.0 : q > 1.0 ? 1.0 : q);
    const size_t below = (size_t)at;
    if (below + 1 >= n)
        return sorted[n - 1];
    return sorted[below] + (at - (double)below) * (sorted[below + 1] - sorted[below]);
}

double kvs_quantile(const double *x, size_t n, double q, double *scratch)
{
    if (n > 0)
        memcpy(scratch, x, n * sizeof *x);
    kvs_sort_doubles(scratch, n);
    return kvs_quantile_sorted(scratch, n, q);
}

double kvs_median(const double *x, size_t n, double *scratch)
{
    return kvs_quantile(x, n, 0.5, scratch);
}

double kvs_normal_cdf(double z)
{
    return 0.5 * erfc(-z / sqrt(2.0));
}

/* Acklam's approximation (relative error below 1.2e-9) and one Halley step against erfc, which squares it away. */
double kvs_normal_quantile(double p)
{
    static const double a[] = {-3.969683028665376e+01, 2.209460984245205e+02,  -2.759285104469687e+02,
                               1.383577518672690e+02,  -3.066479806614716e+01, 2.506628277459239e+00};
    static const double b[] = {-5.447609879822406e+01, 1.615858368580409e+02, -1.556989798598866e+02,
                               6.680131188771972e+01, -1.328068155288572e+01};
    static const double c[] = {-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e+00,
                               -2.549732539343734e+00, 4.374664141464968e+00,  2.938163982698783e+00};
    static const double d[] = {7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e+00,
                               3.754408661907416e+00};
    if (!(p >= 0.0 && p <= 1.0))
        return NAN;
    if (p == 0.0 || p == 1.0)
        return p == 0.0 ? -INFINITY : INFINITY;
    if (p > 0.5)
        return -kvs_normal_quantile(1.0 - p);
    double z;
    if (p < 0.02425) {
        const double q = sqrt(-2.0 * log(p));
        z = (((((c[0] * q + c[1]) * q + c[2]) * q + c[3]) * q + c[4]) * q + c[5]) /
            ((((d[0] * q + d[1]) * q + d[2]) * q + d[3]) * q + 1.0);
    } else {
        const double q = p - 0.5, r = q * q;
        z = (((((a[0] * r + a[1]) * r + a[2]) * r + a[3]) * r + a[4]) * r + a[5]) * q /
            (((((b[0] * r + b[1]) * r + b[2]) * r + b[3]) * r + b[4]) * r + 1.0);
    }
    const double step = (kvs_normal_cdf(z) - p) * sqrt(2.0 * M_PI) * exp(z * z / 2.0);
    return z - step / (1.0 + z * step / 2.0);
}

/* ---- shared checks ---- */

void kvs_stats_options_default(kvs_stats_options *opt)
{
    *opt = (kvs_stats_options){.seed = 20251104, .n_draws = 10000, .level = 0.95, .allocator = NULL};
}

static kvs_status no_memory(kvs_error *err, size_t n)
{
    return kvs_error_set(err, KVS_ENOMEM, "no memory for %zu numbers of statistics", n);
}

kvs_status kvs_check_finite(const char *name, const double *x, size_t n, kvs_error *err)
{
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(x[i]))
            return kvs_error_set(err, KVS_EINVAL, "%s[%zu] is %g: statistics need finite numbers", name, i, x[i]);
    }
    return KVS_OK;
}

static kvs_status check_options(const kvs_stats_options *opt, kvs_error *err)
{
    if (opt->n_draws < 100)
        return kvs_error_set(err, KVS_EINVAL, "n_draws is %u: at least 100 draws are needed", opt->n_draws);
    if (!(opt->level > 0.5 && opt->level < 1.0))
        return kvs_error_set(err, KVS_EINVAL, "level is %g: a confidence level lies between 0.5 and 1", opt->level);
    return KVS_OK;
}

/* ---- bootstrap ---- */

/* Acceleration from the jackknife: skewness of the statistic over leave-one-out sets / 6; NaN without spread. */
static double jackknife_acceleration(kvs_statistic_fn statistic, void *ctx, uint32_t n, uint32_t *idx, double *left_out)
{
    for (uint32_t out = 0; out < n; out++) {
        for (uint32_t i = 0; i + 1 < n; i++)
            idx[i] = i < out ? i : i + 1;
        left_out[out] = statistic(ctx, idx, n - 1);
    }
    const double mean = kvs_mean(left_out, n);
    double squares = 0.0, cubes = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        const double diff = mean - left_out[i];
        squares += diff * diff;
        cubes += diff * diff * diff;
    }
    return squares > 0.0 ? cubes / (6.0 * pow(squares, 1.5)) : NAN;
}

static void bca_bounds(const double *sorted, uint32_t n_draws, double acceleration, double tail, kvs_interval *out)
{
    double below = 0.0; /* ties count one half, so that a discrete statistic is not pushed to one side */
    for (uint32_t i = 0; i < n_draws; i++)
        below += sorted[i] < out->estimate ? 1.0 : sorted[i] > out->estimate ? 0.0 : 0.5;
    const double z0 = kvs_normal_quantile(below / (double)n_draws);
    double bound[2];
    for (int side = 0; side < 2; side++) {
        const double z = z0 + kvs_normal_quantile(side == 0 ? tail : 1.0 - tail);
        const double stretch = 1.0 - acceleration * z;
        bound[side] = stretch > 0.0 ? kvs_normal_cdf(z0 + z / stretch) : NAN;
    }
    out->bca_valid = isfinite(z0) && isfinite(bound[0]) && isfinite(bound[1]);
    out->bca_lo = out->bca_valid ? kvs_quantile_sorted(sorted, n_draws, bound[0]) : NAN;
    out->bca_hi = out->bca_valid ? kvs_quantile_sorted(sorted, n_draws, bound[1]) : NAN;
}

/* draws [n_draws] comes back sorted; the out->n_undefined NaNs stand last. */
static void bootstrap_run(kvs_statistic_fn statistic, void *ctx, uint32_t n, const kvs_stats_options *opt,
                          uint32_t *idx, double *draws, double *left_out, kvs_interval *out)
{
    memset(out, 0, sizeof *out);
    out->n = n;
    out->n_draws = opt->n_draws;
    for (uint32_t i = 0; i < n; i++)
        idx[i] = i;
    out->estimate = statistic(ctx, idx, n);
    kvs_rng rng = {opt->seed};
    for (uint32_t draw = 0; draw < opt->n_draws; draw++) {
        for (uint32_t i = 0; i < n; i++)
            idx[i] = kvs_rng_below(&rng, n);
        draws[draw] = statistic(ctx, idx, n);
        out->n_undefined += isnan(draws[draw]) ? 1u : 0u;
    }
    kvs_sort_doubles(draws, opt->n_draws);
    const uint32_t n_defined = opt->n_draws - out->n_undefined;
    const double tail = (1.0 - opt->level) / 2.0;
    out->lo = kvs_quantile_sorted(draws, n_defined, tail);
    out->hi = kvs_quantile_sorted(draws, n_defined, 1.0 - tail);
    const double acceleration = jackknife_acceleration(statistic, ctx, n, idx, left_out);
    out->bca_lo = out->bca_hi = NAN;
    if (n_defined > 0 && isfinite(acceleration) && isfinite(out->estimate))
        bca_bounds(draws, n_defined, acceleration, tail, out);
}

static kvs_status bootstrap_draws(kvs_statistic_fn statistic, void *ctx, uint32_t n_clusters,
                                  const kvs_stats_options *opt, double **draws, kvs_interval *out, kvs_error *err)
{
    *draws = NULL;
    KVS_TRY(check_options(opt, err));
    if (n_clusters < 2)
        return kvs_error_set(err, KVS_EINVAL, "%u clusters: a bootstrap needs at least 2", n_clusters);
    const kvs_allocator *a = opt->allocator;
    uint32_t *idx = kvs_alloc(a, n_clusters, sizeof *idx);
    double *left_out = kvs_alloc(a, n_clusters, sizeof *left_out);
    *draws = kvs_alloc(a, opt->n_draws, sizeof **draws);
    const bool ok = idx && left_out && *draws;
    if (ok) {
        bootstrap_run(statistic, ctx, n_clusters, opt, idx, *draws, left_out, out);
    } else {
        kvs_free(a, *draws);
        *draws = NULL;
    }
    kvs_free(a, idx);
    kvs_free(a, left_out);
    return ok ? KVS_OK : no_memory(err, opt->n_draws);
}

kvs_status kvs_bootstrap(kvs_statistic_fn statistic, void *ctx, uint32_t n_clusters, const kvs_stats_options *opt,
                         kvs_interval *out, kvs_error *err)
{
    double *draws;
    KVS_TRY(bootstrap_draws(statistic, ctx, n_clusters, opt, &draws, out, err));
    kvs_free(opt->allocator, draws);
    return KVS_OK;
}

typedef struct pairs {
    const double *x, *y;
    double *scratch;
} pairs;

static double mean_of(void *ctx, const uint32_t *idx, uint32_t n)
{
    const pairs *p = ctx;
    double sum = 0.0;
    for (uint32_t i = 0; i < n; i++)
        sum += p->x[idx[i]];
    return sum / (double)n;
}

static double median_of(void *ctx, const uint32_t *idx, uint32_t n)
{
    const pairs *p = ctx;
    for (uint32_t i = 0; i < n; i++)
        p->scratch[i] = p->x[idx[i]];
    kvs_sort_doubles(p->scratch, n);
    return kvs_quantile_sorted(p->scratch, n, 0.5);
}

static double ratio_of(void *ctx, const uint32_t *idx, uint32_t n)
{
    const pairs *p = ctx;
    double num = 0.0, den = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        num += p->x[idx[i]];
        den += p->y[idx[i]];
    }
    return den != 0.0 ? num / den : NAN;
}

kvs_status kvs_bootstrap_mean(const double *x, uint32_t n, const kvs_stats_options *opt, kvs_interval *out,
                              kvs_error *err)
{
    KVS_TRY(kvs_check_finite("x", x, n, err));
    pairs p = {x, NULL, NULL};
    return kvs_bootstrap(mean_of, &p, n, opt, out, err);
}

kvs_status kvs_bootstrap_median(const double *x, uint32_t n, const kvs_stats_options *opt, kvs_interval *out,
                                kvs_error *err)
{
    KVS_TRY(kvs_check_finite("x", x, n, err));
    pairs p = {x, NULL, kvs_alloc(opt->allocator, n, sizeof(double))};
    if (n > 0 && p.scratch == NULL)
        return no_memory(err, n);
    const kvs_status status = kvs_bootstrap(median_of, &p, n, opt, out, err);
    kvs_free(opt->allocator, p.scratch);
    return status;
}

kvs_status kvs_bootstrap_ratio(const double *num, const double *den, uint32_t n, const kvs_stats_options *opt,
                               kvs_interval *out, kvs_error *err)
{
    KVS_TRY(kvs_check_finite("num", num, n, err));
    KVS_TRY(kvs_check_finite("den", den, n, err));
    pairs p = {num, den, NULL};
    return kvs_bootstrap(ratio_of, &p, n, opt, out, err);
}

kvs_status kvs_tost(kvs_statistic_fn statistic, void *ctx, uint32_t n_clusters, double lo, double hi,
                    const kvs_stats_options *opt, kvs_equivalence *out, kvs_error *err)
{
    if (!(lo < hi))
        return kvs_error_set(err, KVS_EINVAL, "equivalence limits %g and %g: the first must be less", lo, hi);
    KVS_TRY(check_options(opt, err));
    if (!(opt->level > 0.75))
        return kvs_error_set(err, KVS_EINVAL, "level is %g: equivalence needs more than 0.75", opt->level);
    kvs_stats_options wide = *opt;
    wide.level = 1.0 - 2.0 * (1.0 - opt->level);
    double *draws;
    KVS_TRY(bootstrap_draws(statistic, ctx, n_clusters, &wide, &draws, &out->interval, err));
    const kvs_interval *ci = &out->interval;
    const uint32_t n_defined = ci->n_draws - ci->n_undefined;
    uint32_t n_low = 0, n_high = 0;
    for (uint32_t i = 0; i < n_defined; i++) {
        n_low += draws[i] <= lo;
        n_high += draws[i] >= hi;
    }
    out->p = (1.0 + (double)kvs_max_u32(n_low, n_high)) / (1.0 + (double)n_defined);
    const double from = ci->bca_valid ? ci->bca_lo : ci->lo, to = ci->bca_valid ? ci->bca_hi : ci->hi;
    out->equivalent = from >= lo && to <= hi; /* false for NaN */
    kvs_free(opt->allocator, draws);
    return KVS_OK;
}

kvs_status kvs_tost_mean(const double *x, uint32_t n, double lo, double hi, const kvs_stats_options *opt,
                         kvs_equivalence *out, kvs_error *err)
{
    KVS_TRY(kvs_check_finite("x", x, n, err));
    pairs p = {x, NULL, NULL};
    return kvs_tost(mean_of, &p, n, lo, hi, opt, out, err);
}

/* ---- paired tests ---- */

enum { SIGN_FLIP_EXACT_MAX = 20, SIGN_FLIP_HALF = 10 };

/* Sums of +-d over all signs of n <= 10 numbers, indexed by the mask of flipped ones. */
static void all_sign_sums(const double *d, uint32_t n, double *sums)
{
    for (uint32_t mask = 0; mask < 1u << n; mask++) {
        sums[mask] = 0.0;
        for (uint32_t i = 0; i < n; i++)
            sums[mask] += (mask >> i & 1u) ? -d[i] : d[i];
    }
}

/* Counts of sums at least as extreme; slack forgives the rounding of equal sums added in another order. */
static void count_extreme(double sum, double observed, double slack, uint64_t *two_sided, uint64_t *greater)
{
    *two_sided += fabs(sum) >= fabs(observed) - slack;
    *greater += sum >= observed - slack;
}

static double signed_total(const double *d, uint32_t n, double *magnitude)
{
    double sum = 0.0;
    *magnitude = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        sum += d[i];
        *magnitude += fabs(d[i]);
    }
    return sum;
}

static void sign_flip_exact(const double *d, uint32_t n, double observed, double slack, kvs_test *out)
{
    double low[1u << SIGN_FLIP_HALF], high[1u << SIGN_FLIP_HALF];
    const uint32_t n_low = kvs_min_u32(n, SIGN_FLIP_HALF), n_high = n - n_low;
    all_sign_sums(d, n_low, low);
    all_sign_sums(d + n_low, n_high, high);
    uint64_t two_sided = 0, greater = 0;
    for (uint32_t i = 0; i < 1u << n_high; i++) {
        for (uint32_t j = 0; j < 1u << n_low; j++)
            count_extreme(low[j] + high[i], observed, slack, &two_sided, &greater);
    }
    out->p = ldexp((double)two_sided, -(int)n);
    out->p_greater = ldexp((double)greater, -(int)n);
}

static void sign_flip_random(const double *d, uint32_t n, double observed, double slack, const kvs_stats_options *opt,
                             kvs_test *out)
{
    kvs_rng rng = {opt->seed};
    uint64_t two_sided = 0, greater = 0;
    for (uint32_t draw = 0; draw < opt->n_draws; draw++) {
        double sum = 0.0;
        uint64_t bits = 0;
        for (uint32_t i = 0; i < n; i++) {
            if (i % 64 == 0)
                bits = kvs_rng_next(&rng);
            sum += (bits >> (i % 64) & 1u) ? -d[i] : d[i];
        }
        count_extreme(sum, observed, slack, &two_sided, &greater);
    }
    out->p = (1.0 + (double)two_sided) / (1.0 + (double)opt->n_draws);
    out->p_greater = (1.0 + (double)greater) / (1.0 + (double)opt->n_draws);
}

kvs_status kvs_sign_flip_test(const double *d, uint32_t n, const kvs_stats_options *opt, kvs_test *out, kvs_error *err)
{
    KVS_TRY(check_options(opt, err));
    KVS_TRY(kvs_check_finite("d", d, n, err));
    if (n == 0)
        return kvs_error_set(err, KVS_EINVAL, "0 pairs: a sign-flip test needs at least 1");
    double magnitude;
    const double observed = signed_total(d, n, &magnitude);
    /* Two sums of n terms in different order differ by at most 2 (n - 1) eps times the sum of magnitudes. */
    const double slack = 2.0 * (double)n * DBL_EPSILON * magnitude;
    *out = (kvs_test){.statistic = observed / (double)n, .exact = n <= SIGN_FLIP_EXACT_MAX, .n = n};
    if (out->exact)
        sign_flip_exact(d, n, observed, slack, out);
    else
        sign_flip_random(d, n, observed, slack, opt, out);
    return KVS_OK;
}

/* P(X >= k) for X binomial (n, 1/2). */
static double binomial_half_upper(uint32_t k, uint32_t n)
{
    double sum = 0.0;
    for (uint32_t i = n + 1; i-- > k;)
        sum +=
            exp(lgamma((double)n + 1.0) - lgamma((double)i + 1.0) - lgamma((double)(n - i) + 1.0) - (double)n * M_LN2);
    return fmin(1.0, sum);
}

void kvs_mcnemar_test(uint32_t only_a, uint32_t only_b, kvs_test *out)
{
    const uint32_t n = only_a + only_b, more = kvs_max_u32(only_a, only_b);
    *out = (kvs_test){.statistic = (double)only_a - (double)only_b, .exact = true, .n = n};
    out->p = fmin(1.0, 2.0 * binomial_half_upper(more, n));
    out->p_greater = binomial_half_upper(only_a, n);
}

/* ---- planning and fits ---- */

uint32_t kvs_sample_size(double sd_of_differences, double delta)
{
    const double ratio = (1.96 + 0.84) * sd_of_differences / delta;
    const double n = ceil(ratio * ratio);
    return n > 30.0 ? (n < 4e9 ? (uint32_t)n : UINT32_MAX) : 30;
}

/* Normal equations of a least-squares fit and the active set of Lawson-Hanson. */
typedef struct nnls_state {
    double gram[KVS_NNLS_COLS_MAX][KVS_NNLS_COLS_MAX]; /* A'A */
    double rhs[KVS_NNLS_COLS_MAX];                     /* A'b */
    uint32_t n_cols;
    bool passive[KVS_NNLS_COLS_MAX]; /* free to be positive */
} nnls_state;

/* Solves the passive columns' equations by Cholesky; z is 0 elsewhere. False if they are linearly dependent. */
static bool nnls_solve(const nnls_state *s, double *z)
{
    double l[KVS_NNLS_COLS_MAX][KVS_NNLS_COLS_MAX], y[KVS_NNLS_COLS_MAX];
    uint32_t col[KVS_NNLS_COLS_MAX] = {0}, n = 0;
    for (uint32_t j = 0; j < s->n_cols; j++) {
        z[j] = 0.0;
        if (s->passive[j])
            col[n++] = j;
    }
    for (uint32_t i = 0; i < n; i++) {
        y[i] = s->rhs[col[i]];
        for (uint32_t j = 0; j <= i; j++) {
            double sum = s->gram[col[i]][col[j]];
            for (uint32_t k = 0; k < j; k++)
                sum -= l[i][k] * l[j][k];
            if (i == j && sum <= 1e-12 * s->gram[col[i]][col[i]])
                return false;
            l[i][j] = i == j ? sqrt(sum) : sum / l[j][j];
        }
        for (uint32_t k = 0; k < i; k++)
            y[i] -= l[i][k] * y[k];
        y[i] /= l[i][i];
    }
    for (uint32_t i = n; i-- > 0;) {
        for (uint32_t k = i + 1; k < n; k++)
            y[i] -= l[k][i] * y[k];
        y[i] /= l[i][i];
        z[col[i]] = y[i];
    }
    return true;
}

/* The bound column with the steepest descent above tol, or n_cols. */
static uint32_t nnls_steepest(const nnls_state *s, const double *x, const bool *rejected, double tol)
{
    uint32_t best = s->n_cols;
    double steepest = tol;
    for (uint32_t j = 0; j < s->n_cols; j++) {
        double slope = s->rhs[j];
        for (uint32_t k = 0; k < s->n_cols; k++)
            slope -= s->gram[j][k] * x[k];
        if (!s->passive[j] && !rejected[j] && slope > steepest) {
            steepest = slope;
            best = j;
        }
    }
    return best;
}

/* Moves x towards z until a passive column would pass 0, binds it and solves again, until z is feasible. */
static void nnls_make_feasible(nnls_state *s, double *x, double *z)
{
    for (;;) {
        double step = 1.0;
        uint32_t blocking = s->n_cols;
        for (uint32_t j = 0; j < s->n_cols; j++) {
            const double reach = x[j] > 0.0 ? x[j] / (x[j] - z[j]) : 0.0;
            if (s->passive[j] && z[j] <= 0.0 && (blocking == s->n_cols || reach < step)) {
                step = reach;
                blocking = j;
            }
        }
        if (blocking < s->n_cols)
            s->passive[blocking] = false;
        for (uint32_t j = 0; j < s->n_cols; j++)
            x[j] = s->passive[j] ? fmax(0.0, x[j] + step * (z[j] - x[j])) : 0.0;
        if (blocking == s->n_cols || !nnls_solve(s, z))
            return;
    }
}

static void nnls_normal_equations(const double *a, const double *b, size_t n_rows, nnls_state *s, double *tol)
{
    double largest = 0.0;
    for (size_t r = 0; r < n_rows; r++) {
        const double *row = a + r * s->n_cols;
        for (uint32_t i = 0; i < s->n_cols; i++) {
            s->rhs[i] += row[i] * b[r];
            for (uint32_t j = 0; j < s->n_cols; j++)
                s->gram[i][j] += row[i] * row[j];
        }
    }
    for (uint32_t i = 0; i < s->n_cols; i++)
        largest = fmax(largest, fabs(s->rhs[i]));
    *tol = 1e-10 * largest;
}

kvs_status kvs_nnls(const double *a, const double *b, size_t n_rows, uint32_t n_cols, double *x, double *residual,
                    kvs_error *err)
{
    size_t n_entries;
    if (n_cols == 0 || n_cols > KVS_NNLS_COLS_MAX || !kvs_mul_size(n_rows, n_cols, &n_entries))
        return kvs_error_set(err, KVS_EINVAL, "%u columns: a fit takes 1 to %d", n_cols, KVS_NNLS_COLS_MAX);
    KVS_TRY(kvs_check_finite("a", a, n_entries, err));
    KVS_TRY(kvs_check_finite("b", b, n_rows, err));
    nnls_state s = {.n_cols = n_cols};
    bool rejected[KVS_NNLS_COLS_MAX] = {false};
    double z[KVS_NNLS_COLS_MAX], tol;
    nnls_normal_equations(a, b, n_rows, &s, &tol);
    memset(x, 0, n_cols * sizeof *x);
    for (uint32_t round = 0;; round++) {
        const uint32_t enter = nnls_steepest(&s, x, rejected, tol);
        if (enter == n_cols)
            break;
        if (round == 30 * n_cols)
            return kvs_error_set(err, KVS_EINVAL, "no fit of %u columns after %u rounds", n_cols, round);
        s.passive[enter] = true;
        if (!nnls_solve(&s, z) || z[enter] <= 0.0) { /* dependent, or rounding alone made it look useful */
            s.passive[enter] = false;
            rejected[enter] = true;
            continue;
        }
        nnls_make_feasible(&s, x, z);
        memset(rejected, 0, sizeof rejected);
    }
    double squares = 0.0;
    for (size_t r = 0; r < n_rows; r++) {
        double diff = -b[r];
        for (uint32_t j = 0; j < n_cols; j++)
            diff += a[r * n_cols + j] * x[j];
        squares += diff * diff;
    }
    if (residual)
        *residual = sqrt(squares);
    return KVS_OK;
}

/* Statistics for paired comparisons over dialogues: description, resampling, tests, adjustment, small fits. The unit is
 * a dialogue (cluster), tokens and turns are nested in it. Every random draw comes from splitmix64 with a given seed,
 * so equal inputs give equal bytes. Inputs that are not finite are refused (EINVAL), never skipped. */
#ifndef KVS_STATS_H
#define KVS_STATS_H

#include "base/base.h"

/* EINVAL names the first entry that is NaN or infinite. */
kvs_status kvs_check_finite(const char *name, const double *x, size_t n, kvs_error *err);

/* ---- description ---- */

double kvs_mean(const double *x, size_t n); /* NaN for n = 0 */
double kvs_sd(const double *x, size_t n);   /* n - 1 in the denominator; NaN for n < 2 */
void kvs_sort_doubles(double *x, size_t n); /* ascending; NaN last */
/* Linear interpolation at (n - 1) q between order statistics (type 7); sorted ascending; NaN for n = 0. */
double kvs_quantile_sorted(const double *sorted, size_t n, double q);
/* The same of unsorted x; scratch [n]. */
double kvs_quantile(const double *x, size_t n, double q, double *scratch);
double kvs_median(const double *x, size_t n, double *scratch);

double kvs_normal_cdf(double z);
double kvs_normal_quantile(double p); /* -inf and +inf at 0 and 1; NaN outside */

/* ---- resampling ---- */

typedef struct kvs_stats_options {
    uint64_t seed;
    uint32_t n_draws;               /* bootstrap draws and random permutations */
    double level;                   /* of confidence */
    const kvs_allocator *allocator; /* NULL: default */
} kvs_stats_options;
/* 10,000 draws, level 0.95, seed 20251104. */
void kvs_stats_options_default(kvs_stats_options *opt);

/* A statistic of the clusters idx [n] (indices into the caller's data, repeats allowed). NaN: undefined there. */
typedef double (*kvs_statistic_fn)(void *ctx, const uint32_t *idx, uint32_t n);

typedef struct kvs_interval {
    double estimate;
    double lo, hi;         /* percentile */
    double bca_lo, bca_hi; /* bias-corrected and accelerated (Efron 1987); NaN when bca_valid is false */
    bool bca_valid;        /* false: all draws on one side of the estimate, or no spread in the jackknife */
    uint32_t n, n_draws;
    uint32_t n_undefined; /* draws in which the statistic was NaN: left out, so a large share is a warning */
} kvs_interval;

/* Bootstrap over n_clusters >= 2 clusters. Errors: EINVAL, ENOMEM. */
kvs_status kvs_bootstrap(kvs_statistic_fn statistic, void *ctx, uint32_t n_clusters, const kvs_stats_options *opt,
                         kvs_interval *out, kvs_error *err);
kvs_status kvs_bootstrap_mean(const double *x, uint32_t n, const kvs_stats_options *opt, kvs_interval *out,
                              kvs_error *err);
kvs_status kvs_bootstrap_median(const double *x, uint32_t n, const kvs_stats_options *opt, kvs_interval *out,
                                kvs_error *err);
/* mean(num) / mean(den), pairs resampled together. */
kvs_status kvs_bootstrap_ratio(const double *num, const double *den, uint32_t n, const kvs_stats_options *opt,
                               kvs_interval *out, kvs_error *err);

/* Equivalence by two one-sided tests at alpha = 1 - level: equivalent iff the interval of level 1 - 2 alpha (BCa, else
 * percentile) lies inside [lo, hi]. p is the larger share of draws at or outside a limit, (1 + count) / (1 + draws). */
typedef struct kvs_equivalence {
    kvs_interval interval; /* at level 1 - 2 alpha */
    double p;
    bool equivalent;
} kvs_equivalence;
kvs_status kvs_tost(kvs_statistic_fn statistic, void *ctx, uint32_t n_clusters, double lo, double hi,
                    const kvs_stats_options *opt, kvs_equivalence *out, kvs_error *err);
kvs_status kvs_tost_mean(const double *x, uint32_t n, double lo, double hi, const kvs_stats_options *opt,
                         kvs_equivalence *out, kvs_error *err);

/* ---- paired tests ---- */

typedef struct kvs_test {
    double statistic;
    double p;         /* two-sided */
    double p_greater; /* one-sided: the differences tend to be positive */
    bool exact;
    uint32_t n; /* pairs that entered */
} kvs_test;

/* Sign-flip permutation of paired differences d [n >= 1]; statistic is the mean. All 2^n signs when n <= 20, else
 * n_draws random ones with p = (1 + count) / (1 + n_draws). */
kvs_status kvs_sign_flip_test(const double *d, uint32_t n, const kvs_stats_options *opt, kvs_test *out, kvs_error *err);
/* Wilcoxon signed rank: zeros dropped, mid-ranks; statistic is the rank sum of positive differences. Exact (ties
 * included) for up to 50 nonzero differences, else normal with tie and continuity correction. */
kvs_status kvs_wilcoxon_test(const double *d, uint32_t n, const kvs_stats_options *opt, kvs_test *out, kvs_error *err);
/* McNemar, exact binomial: only_a items right in a alone, only_b in b alone. statistic is only_a - only_b. */
void kvs_mcnemar_test(uint32_t only_a, uint32_t only_b, kvs_test *out);

/* ---- association ---- */

/* Pearson of mid-ranks; NaN when either side is constant or n < 2. */
kvs_status kvs_spearman(const double *x, const double *y, size_t n, const kvs_stats_options *opt, double *rho,
                        kvs_error *err);
/* Pooled rho of rows, resampling whole clusters: cluster c owns rows [row_begin[c], row_begin[c + 1]), row_begin
 * [n_clusters + 1] ascending from 0. */
kvs_status kvs_spearman_clustered(const double *x, const double *y, const uint32_t *row_begin, uint32_t n_clusters,
                                  const kvs_stats_options *opt, kvs_interval *out, kvs_error *err);
/* First-order partial correlation of x, y given z, from the three pairwise ones; NaN where undefined. */
double kvs_partial_correlation(double r_xy, double r_xz, double r_yz);
/* Area under the ROC curve: chance that a positive scores above a negative, ties one half. NaN with one class only. */
kvs_status kvs_auroc(const double *score, const uint8_t *positive, size_t n, const kvs_stats_options *opt, double *out,
                     kvs_error *err);

/* ---- adjustment, planning, fits ---- */

/* p [n] in [0, 1] to adjusted p, in input order; adjusted may be p. */
kvs_status kvs_adjust_holm(const double *p, uint32_t n, const kvs_stats_options *opt, double *adjusted, kvs_error *err);
kvs_status kvs_adjust_bh(const double *p, uint32_t n, const kvs_stats_options *opt, double *adjusted, kvs_error *err);

/* Dialogues for 80 % power at a two-sided 5 %: ceil(((1.96 + 0.84) sd / delta)^2), at least 30. */
uint32_t kvs_sample_size(double sd_of_differences, double delta);

enum { KVS_NNLS_COLS_MAX = 32 };
/* Lawson-Hanson: the x >= 0 that minimises |A x - b|; A [n_rows][n_cols] row-major, n_cols <= 32. Through the normal
 * equations, so columns should be of one scale. residual: |A x - b|, may be NULL. EINVAL if not converged. */
kvs_status kvs_nnls(const double *a, const double *b, size_t n_rows, uint32_t n_cols, double *x, double *residual,
                    kvs_error *err);

#endif

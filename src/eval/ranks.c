/* Statistics on ranks: signed rank, Spearman, AUROC, and the adjustments that walk sorted p values; see stats.h.
 * Sources: Wilcoxon 1945, Spearman 1904, Mann-Whitney 1947, Holm 1979, Benjamini-Hochberg 1995. */
#include "eval/stats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { WILCOXON_EXACT_MAX = 50 };

static kvs_status no_memory(kvs_error *err, size_t n)
{
    return kvs_error_set(err, KVS_ENOMEM, "no memory to rank %zu numbers", n);
}

/* ---- signed rank ---- */

typedef struct ranked {
    double value;
    uint32_t idx;
} ranked;

static int compare_ranked(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->value != y->value)
        return x->value < y->value ? -1 : 1;
    return (x->idx > y->idx) - (x->idx < y->idx);
}

static uint32_t group_end(const ranked *r, uint32_t begin, uint32_t n)
{
    uint32_t end = begin + 1;
    while (end < n && r[end].value == r[begin].value)
        end++;
    return end;
}

/* Exact null distribution of the doubled rank sum (mid-ranks doubled are whole numbers): counts of sign choices. At
 * most 2^50 of them, so a double counts exactly. */
static void wilcoxon_exact(const uint32_t *rank2, uint32_t n, uint32_t observed2, kvs_test *out)
{
    double count[WILCOXON_EXACT_MAX * (WILCOXON_EXACT_MAX + 1) + 1] = {1.0};
    uint32_t top = 0;
    for (uint32_t i = 0; i < n; i++) {
        top += rank2[i];
        for (uint32_t s = top; s >= rank2[i]; s--)
            count[s] += count[s - rank2[i]];
    }
    double at_least = 0.0, at_most = 0.0;
    for (uint32_t s = 0; s <= top; s++) {
        at_least += s >= observed2 ? count[s] : 0.0;
        at_most += s <= observed2 ? count[s] : 0.0;
    }
    out->p_greater = ldexp(at_least, -(int)n);
    out->p = fmin(1.0, 2.0 * ldexp(fmin(at_least, at_most), -(int)n));
}

static void wilcoxon_normal(double n, double ties, kvs_test *out)
{
    out->exact = false;
    const double mean = n * (n + 1.0) / 4.0;
    const double sd = sqrt(n * (n + 1.0) * (2.0 * n + 1.0) / 24.0 - ties / 48.0);
    const double diff = out->statistic - mean;
    const double shift = diff > 0.0 ? 0.5 : diff < 0.0 ? -0.5 : 0.0;
    out->p_greater = kvs_normal_cdf(-(diff - 0.5) / sd);
    out->p = fmin(1.0, 2.0 * kvs_normal_cdf(-fabs(diff - shift) / sd));
}

kvs_status kvs_wilcoxon_test(const double *d, uint32_t n, const kvs_stats_options *opt, kvs_test *out, kvs_error *err)
{
    KVS_TRY(kvs_check_finite("d", d, n, err));
    ranked *r = kvs_alloc(opt->allocator, (size_t)n + 1, sizeof *r);
    if (r == NULL)
        return no_memory(err, n);
    uint32_t m = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (d[i] != 0.0)
            r[m++] = (ranked){fabs(d[i]), i};
    }
    *out = (kvs_test){.p = 1.0, .p_greater = 1.0, .exact = true, .n = m};
    qsort(r, m, sizeof *r, compare_ranked);
    uint32_t rank2[WILCOXON_EXACT_MAX], observed2 = 0;
    double ties = 0.0;
    for (uint32_t begin = 0; begin < m;) {
        const uint32_t end = group_end(r, begin, m);
        const double size = (double)(end - begin);
        ties += size * size * size - size;
        for (uint32_t i = begin; i < end; i++) {
            if (i < WILCOXON_EXACT_MAX)
                rank2[i] = begin + end + 1;
            out->statistic += d[r[i].idx] > 0.0 ? (double)(begin + end + 1) / 2.0 : 0.0;
        }
        begin = end;
    }
    observed2 = m <= WILCOXON_EXACT_MAX ? (uint32_t)(2.0 * out->statistic) : 0;
    if (m > WILCOXON_EXACT_MAX)
        wilcoxon_normal((double)m, ties, out);
    else if (m > 0)
        wilcoxon_exact(rank2, m, observed2, out);
    kvs_free(opt->allocator, r);
    return KVS_OK;
}

/* ---- association ---- */

/* Rows in ascending order of value: ties keep row order. order [n]. */
static kvs_status order_rows(const kvs_allocator *a, const double *x, size_t n, uint32_t *order, kvs_error *err)
{
    ranked *r = kvs_alloc(a, n + 1, sizeof *r);
    if (r == NULL)
        return no_memory(err, n);
    for (size_t i = 0; i < n; i++)
        r[i] = (ranked){x[i], (uint32_t)i};
    qsort(r, n, sizeof *r, compare_ranked);
    for (size_t i = 0; i < n; i++)
        order[i] = r[i].idx;
    kvs_free(a, r);
    return KVS_OK;
}

/* Rows of a pooled correlation, sorted once; a draw of clusters is then a multiplicity per row, so no draw sorts. */
typedef struct pooled {
    const double *x, *y;
    uint32_t *order_x, *order_y; /* [n] */
    double *rank_x, *rank_y;     /* [n] mid-ranks within the current draw */
    double *weight;              /* [n] times the row is drawn */
    const uint32_t *row_begin;
    uint32_t n_clusters;
    size_t n;
} pooled;

/* Mid-ranks of rows that count weight[] times each; a tie of total weight m after `before` gets before + (m + 1) / 2.
 */
static void weighted_ranks(const double *x, const uint32_t *order, const double *weight, size_t n, double *rank)
{
    double before = 0.0;
    for (size_t begin = 0; begin < n;) {
        size_t end = begin;
        double tied = 0.0;
        while (end < n && x[order[end]] == x[order[begin]])
            tied += weight[order[end++]];
        for (size_t i = begin; i < end; i++)
            rank[order[i]] = before + (tied + 1.0) / 2.0;
        before += tied;
        begin = end;
    }
}

static double pooled_rho(pooled *p)
{
    weighted_ranks(p->x, p->order_x, p->weight, p->n, p->rank_x);
    weighted_ranks(p->y, p->order_y, p->weight, p->n, p->rank_y);
    double total = 0.0, xx = 0.0, yy = 0.0, xy = 0.0;
    for (size_t i = 0; i < p->n; i++)
        total += p->weight[i];
    const double mean = (total + 1.0) / 2.0; /* of mid-ranks, whatever the ties */
    for (size_t i = 0; i < p->n; i++) {
        const double dx = p->rank_x[i] - mean, dy = p->rank_y[i] - mean;
        xx += p->weight[i] * dx * dx;
        yy += p->weight[i] * dy * dy;
        xy += p->weight[i] * dx * dy;
    }
    return xx > 0.0 && yy > 0.0 ? xy / sqrt(xx * yy) : NAN;
}

static double pooled_rho_of_clusters(void *ctx, const uint32_t *idx, uint32_t n)
{
    pooled *p = ctx;
    memset(p->weight, 0, p->n * sizeof *p->weight);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t row = p->row_begin[idx[i]]; row < p->row_begin[idx[i] + 1]; row++)
            p->weight[row] += 1.0;
    }
    return pooled_rho(p);
}

static void pooled_free(const kvs_allocator *a, pooled *p)
{
    kvs_free(a, p->order_x);
    kvs_free(a, p->order_y);
    kvs_free(a, p->rank_x);
    kvs_free(a, p->rank_y);
    kvs_free(a, p->weight);
}

static kvs_status pooled_init(const kvs_allocator *a, const double *x, const double *y, size_t n, pooled *p,
                              kvs_error *err)
{
    *p = (pooled){.x = x, .y = y, .n = n};
    if (n >= UINT32_MAX)
        return kvs_error_set(err, KVS_EINVAL, "%zu rows: a rank correlation takes less than 2^32 - 1", n);
    KVS_TRY(kvs_check_finite("x", x, n, err));
    KVS_TRY(kvs_check_finite("y", y, n, err));
    p->order_x = kvs_alloc(a, n + 1, sizeof *p->order_x);
    p->order_y = kvs_alloc(a, n + 1, sizeof *p->order_y);
    p->rank_x = kvs_alloc(a, n + 1, sizeof *p->rank_x);
    p->rank_y = kvs_alloc(a, n + 1, sizeof *p->rank_y);
    p->weight = kvs_alloc(a, n + 1, sizeof *p->weight);
    kvs_status status = KVS_OK;
    if (!p->order_x || !p->order_y || !p->rank_x || !p->rank_y || !p->weight)
        status = no_memory(err, n);
    if (status == KVS_OK)
        status = order_rows(a, x, n, p->order_x, err);
    if (status == KVS_OK)
        status = order_rows(a, y, n, p->order_y, err);
    if (status != KVS_OK)
        pooled_free(a, p);
    return status;
}

kvs_status kvs_spearman(const double *x, const double *y, size_t n, const kvs_stats_options *opt, double *rho,
                        kvs_error *err)
{
    pooled p;
    *rho = NAN;
    KVS_TRY(pooled_init(opt->allocator, x, y, n, &p, err));
    for (size_t i = 0; i < n; i++)
        p.weight[i] = 1.0;
    *rho = pooled_rho(&p);
    pooled_free(opt->allocator, &p);
    return KVS_OK;
}

kvs_status kvs_spearman_clustered(const double *x, const double *y, const uint32_t *row_begin, uint32_t n_clusters,
                                  const kvs_stats_options *opt, kvs_interval *out, kvs_error *err)
{
    for (uint32_t c = 0; c < n_clusters; c++) {
        if (row_begin[c + 1] < row_begin[c] || row_begin[0] != 0)
            return kvs_error_set(err, KVS_EINVAL, "row_begin[%u] is %u after %u: rows must ascend from 0", c + 1,
                                 row_begin[c + 1], row_begin[c]);
    }
    pooled p;
    KVS_TRY(pooled_init(opt->allocator, x, y, n_clusters > 0 ? row_begin[n_clusters] : 0, &p, err));
    p.row_begin = row_begin;
    p.n_clusters = n_clusters;
    const kvs_status status = kvs_bootstrap(pooled_rho_of_clusters, &p, n_clusters, opt, out, err);
    pooled_free(opt->allocator, &p);
    return status;
}

double kvs_partial_correlation(double r_xy, double r_xz, double r_yz)
{
    const double left = 1.0 - r_xz * r_xz, right = 1.0 - r_yz * r_yz;
    return left > 0.0 && right > 0.0 ? (r_xy - r_xz * r_yz) / sqrt(left * right) : NAN;
}

kvs_status kvs_auroc(const double *score, const uint8_t *positive, size_t n, const kvs_stats_options *opt, double *out,
                     kvs_error *err)
{
    *out = NAN;
    KVS_TRY(kvs_check_finite("score", score, n, err));
    if (n >= UINT32_MAX)
        return kvs_error_set(err, KVS_EINVAL, "%zu scores: at most 2^32 - 2 can be ranked", n);
    const kvs_allocator *a = opt->allocator;
    uint32_t *order = kvs_alloc(a, n + 1, sizeof *order);
    if (order == NULL)
        return no_memory(err, n);
    const kvs_status status = order_rows(a, score, n, order, err);
    double n_positive = 0.0, rank_sum = 0.0;
    for (size_t begin = 0; status == KVS_OK && begin < n;) {
        size_t end = begin;
        double hits = 0.0;
        while (end < n && score[order[end]] == score[order[begin]])
            hits += positive[order[end++]] ? 1.0 : 0.0;
        rank_sum += hits * (double)(begin + end + 1) / 2.0;
        n_positive += hits;
        begin = end;
    }
    const double n_negative = (double)n - n_positive;
    if (n_positive > 0.0 && n_negative > 0.0)
        *out = (rank_sum - n_positive * (n_positive + 1.0) / 2.0) / (n_positive * n_negative);
    kvs_free(a, order);
    return status;
}

/* ---- adjustment ---- */

static kvs_status order_p(const kvs_allocator *a, const double *p, uint32_t n, uint32_t **order, kvs_error *err)
{
    *order = NULL;
    for (uint32_t i = 0; i < n; i++) {
        if (!(p[i] >= 0.0 && p[i] <= 1.0))
            return kvs_error_set(err, KVS_EINVAL, "p[%u] is %g: a p value lies in [0, 1]", i, p[i]);
    }
    *order = kvs_alloc(a, (size_t)n + 1, sizeof **order);
    if (*order == NULL)
        return no_memory(err, n);
    const kvs_status status = order_rows(a, p, n, *order, err);
    if (status != KVS_OK) {
        kvs_free(a, *order);
        *order = NULL;
    }
    return status;
}

kvs_status kvs_adjust_holm(const double *p, uint32_t n, const kvs_stats_options *opt, double *adjusted, kvs_error *err)
{
    uint32_t *order;
    KVS_TRY(order_p(opt->allocator, p, n, &order, err));
    double running = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        running = fmax(running, fmin(1.0, (double)(n - i) * p[order[i]]));
        adjusted[order[i]] = running;
    }
    kvs_free(opt->allocator, order);
    return KVS_OK;
}

kvs_status kvs_adjust_bh(const double *p, uint32_t n, const kvs_stats_options *opt, double *adjusted, kvs_error *err)
{
    uint32_t *order;
    KVS_TRY(order_p(opt->allocator, p, n, &order, err));
    double running = 1.0;
    for (uint32_t i = n; i-- > 0;) {
        running = fmin(running, (double)n / (double)(i + 1) * p[order[i]]);
        adjusted[order[i]] = running;
    }
    kvs_free(opt->allocator, order);
    return KVS_OK;
}

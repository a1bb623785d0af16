/* Dense algebra for scorers; dense.h says in what order sums run. */
#include "policy/dense.h"

#include "cache/cache.h"

#include <math.h>
#include <string.h>

enum { LANES = 16, BLOCK = 8, COLUMNS = 8 };

/* Lanes as the compiler's own vectors: every machine has instructions for 16 bytes, or the compiler makes do. */
typedef float f4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double d2 __attribute__((vector_size(16), aligned(8), may_alias));

/* ---- second moments ---- */

/* Rows [0, BLOCK) of x, weighted, into row i of a. Columns in blocks of constant width, so that they become lanes. */
static void add_block_row(double *row, uint32_t i, const double *x, const double *weighted, uint32_t n)
{
    uint32_t j = 0;
    for (; j + COLUMNS <= i + 1; j += COLUMNS) {
        d2 *const out = (d2 *)(void *)(row + j);
        d2 s0 = out[0], s1 = out[1], s2 = out[2], s3 = out[3];
        for (uint32_t s = 0; s < BLOCK; s++) {
            const double one = weighted[(size_t)s * n + i];
            const d2 w = {one, one}, *const c = (const d2 *)(const void *)(x + (size_t)s * n + j);
            s0 += w * c[0];
            s1 += w * c[1];
            s2 += w * c[2];
            s3 += w * c[3];
        }
        out[0] = s0;
        out[1] = s1;
        out[2] = s2;
        out[3] = s3;
    }
    for (; j <= i; j++)
        for (uint32_t s = 0; s < BLOCK; s++)
            row[j] += weighted[(size_t)s * n + i] * x[(size_t)s * n + j];
}

void kvs_add_moments(double *a, uint32_t n, const float *x, const float *weight, uint32_t n_rows)
{
    double plain[BLOCK * KVS_HEAD_DIM_MAX], weighted[BLOCK * KVS_HEAD_DIM_MAX];
    for (uint32_t at = 0; at < n_rows; at += BLOCK) {
        for (uint32_t s = 0; s < BLOCK; s++) {
            const bool there = at + s < n_rows; /* what is missing adds 0 */
            const double w = !there ? 0 : weight == NULL ? 1 : (double)weight[at + s];
            for (uint32_t i = 0; i < n; i++) {
                const double value = there ? (double)x[(size_t)(at + s) * n + i] : 0;
                plain[(size_t)s * n + i] = value;
                weighted[(size_t)s * n + i] = w * value;
            }
        }
        for (uint32_t i = 0; i < n; i++)
            add_block_row(a + (size_t)i * n, i, plain, weighted, n);
    }
}

/* ---- triangles ---- */

bool kvs_cholesky(double *a, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        double *const row = a + (size_t)i * n;
        for (uint32_t j = 0; j <= i; j++) {
            const double *const other = a + (size_t)j * n;
            double sum = row[j];
            for (uint32_t k = 0; k < j; k++)
                sum -= row[k] * other[k];
            if (j < i)
                row[j] = sum / other[j];
            else if (sum > 0) /* NaN is not */
                row[i] = sqrt(sum);
            else
                return false;
        }
    }
    return true;
}

void kvs_invert_lower(double *l, uint32_t n, float *out)
{
    for (uint32_t j = 0; j < n; j++) /* column j of the inverse needs L's columns from j on only */
        for (uint32_t i = j; i < n; i++) {
            double sum = i == j ? 1 : 0;
            for (uint32_t k = j; k < i; k++)
                sum -= l[(size_t)i * n + k] * (double)out[(size_t)k * n + j];
            out[(size_t)i * n + j] = (float)(sum / l[(size_t)i * n + i]);
        }
}

/* ---- many vectors ---- */

/* Slots [at, at + LANES) of x as columns: tile [n][LANES], zero beyond n_rows. */
static void load_tile(const float *x, uint32_t n, uint32_t at, uint32_t n_rows, float *tile)
{
    for (uint32_t lane = 0; lane < LANES; lane++)
        for (uint32_t d = 0; d < n; d++)
            tile[(size_t)d * LANES + lane] = at + lane < n_rows ? x[(size_t)(at + lane) * n + d] : 0.0f;
}

/* out[lane] = sum over d of scale[d] x[d width + lane], d ascending. */
static inline void sum_lanes(const float *scale, const float *x, size_t width, uint32_t n, float *out)
{
    f4 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    for (uint32_t d = 0; d < n; d++) {
        const f4 w = {scale[d], scale[d], scale[d], scale[d]}, *const c = (const f4 *)(const void *)(x + d * width);
        s0 += w * c[0];
        s1 += w * c[1];
        s2 += w * c[2];
        s3 += w * c[3];
    }
    f4 *const to = (f4 *)(void *)out;
    to[0] = s0;
    to[1] = s1;
    to[2] = s2;
    to[3] = s3;
}

/* Sum over i of y_i (y_i or x_i), y = T x. */
static void fold(const float *t, uint32_t n, const float *x, uint32_t n_rows, bool with_x, float *out)
{
    float tile[KVS_HEAD_DIM_MAX * LANES], y[LANES];
    for (uint32_t at = 0; at < n_rows; at += LANES) {
        float sum[LANES] = {0};
        load_tile(x, n, at, n_rows, tile);
        for (uint32_t i = 0; i < n; i++) {
            sum_lanes(t + (size_t)i * n, tile, LANES, i + 1, y);
            const float *const by = with_x ? tile + (size_t)i * LANES : y;
            for (uint32_t lane = 0; lane < LANES; lane++)
                sum[lane] += y[lane] * by[lane];
        }
        for (uint32_t lane = 0; lane < LANES && at + lane < n_rows; lane++)
            out[at + lane] = sum[lane];
    }
}

void kvs_norms_under(const float *t, uint32_t n, const float *x, uint32_t n_rows, float *out)
{
    fold(t, n, x, n_rows, false, out);
}

void kvs_quadratic_forms(const float *t, uint32_t n, const float *x, uint32_t n_rows, float *out)
{
    fold(t, n, x, n_rows, true, out);
}

void kvs_project(const float *a, uint32_t n, uint32_t k, const float *x, uint32_t n_rows, float *y)
{
    for (uint32_t i = 0; i < n_rows; i++)
        for (uint32_t at = 0; at < k; at += LANES) {
            const uint32_t width = k - at < LANES ? k - at : LANES;
            float sum[LANES] = {0};
            if (width == LANES)
                sum_lanes(x + (size_t)i * n, a + at, k, n, sum);
            else
                for (uint32_t d = 0; d < n; d++)
                    for (uint32_t lane = 0; lane < width; lane++)
                        sum[lane] += x[(size_t)i * n + d] * a[(size_t)d * k + at + lane];
            memcpy(y + (size_t)i * k + at, sum, width * sizeof *sum);
        }
}

void kvs_sketch(uint64_t seed, uint32_t n, uint32_t k, float *a)
{
    const double scale = 1 / sqrt((double)k);
    for (size_t i = 0; i < (size_t)n * k; i++) {
        uint64_t sum = 0; /* twelve draws of 16 bits */
        for (uint32_t part = 0; part < 3; part++) {
            const uint64_t u = kvs_hash3(seed, i, part);
            sum += (u & 0xffff) + (u >> 16 & 0xffff) + (u >> 32 & 0xffff) + (u >> 48);
        }
        a[i] =
            (float)(((double)sum + 6) / 65536 * scale - 6 * scale); /* each draw stands for the middle of its 1/65536 */
    }
}

void kvs_row_norms(const float *x, uint32_t n, uint32_t n_rows, float *out)
{
    for (uint32_t i = 0; i < n_rows; i++) {
        float sum = 0;
        for (uint32_t d = 0; d < n; d++)
            sum += x[(size_t)i * n + d] * x[(size_t)i * n + d];
        out[i] = sqrtf(sum);
    }
}

/* ---- queries to come ---- */

uint32_t kvs_sink_slots(const kvs_policy_view *view, uint32_t sinks)
{
    uint32_t n = 0;
    while (n < view->n_slots && view->pos[n] >= 0 && (uint32_t)view->pos[n] < sinks)
        n++;
    return n;
}

/* Mean over positions p = first .. first + n - 1 of cos and sin of theta p: those of the middle one, times
 * sin(n theta / 2) / (n sin(theta / 2)). */
static void mean_rotation(double theta, int32_t first, uint32_t n, double *c, double *s)
{
    const double half = theta / 2, below = n * sin(half), damp = below != 0 ? sin(n * half) / below : 1;
    const double angle = theta * (first + (n - 1) / 2.0);
    *c = damp * cos(angle);
    *s = damp * sin(angle);
}

static void turn(double *a, double *b, double c, double s)
{
    const double x = *a, y = *b;
    *a = x * c - y * s;
    *b = x * s + y * c;
}

void kvs_expected_query(const kvs_policy_view *view, uint32_t g, uint32_t n_future, double *mean, double *covariance)
{
    const uint32_t dh = view->head_dim;
    const double *const sum = view->query_sum + (size_t)g * dh, *const square =
                                                                    view->query_square + (size_t)g * dh * dh;
    const double scale = view->n_queries > 0 ? 1 / (double)view->n_queries : 0;
    for (uint32_t i = 0; i < dh; i++)
        mean[i] = sum[i] * scale;
    /* The whole matrix: rotating its rows, then its columns, mixes both triangles. */
    for (uint32_t i = 0; covariance != NULL && i < dh; i++)
        for (uint32_t j = 0; j <= i; j++)
            covariance[(size_t)i * dh + j] = covariance[(size_t)j * dh + i] =
                square[(size_t)i * dh + j] * scale - mean[i] * mean[j];
    for (uint32_t f = 0; f < view->n_freq; f++) {
        double c, s;
        mean_rotation(view->rope_theta[f], view->rope_next, n_future, &c, &s);
        turn(&mean[2 * f], &mean[2 * f + 1], c, s);
        if (covariance == NULL)
            continue;
        double *const a = covariance + (size_t)2 * f * dh, *const b = a + dh;
        for (uint32_t j = 0; j < dh; j++)
            turn(&a[j], &b[j], c, s);
        for (uint32_t i = 0; i < dh; i++)
            turn(&covariance[(size_t)i * dh + 2 * f], &covariance[(size_t)i * dh + 2 * f + 1], c, s);
    }
}

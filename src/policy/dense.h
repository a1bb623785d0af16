/* Small dense algebra that scorers share: second moments, Cholesky, quadratic forms of many vectors, a random sketch, and
 * what is expected of the queries to come. Plain C that the compiler may spread over lanes: lanes are different slots or
 * columns, sums run in ascending order, nothing is contracted, so bits are the same on every machine. */
#ifndef KVS_POLICY_DENSE_H
#define KVS_POLICY_DENSE_H

#include "kvasir_policy.h"

/* a [n][n] f64: adds sum over i of weight[i] x_i x_i^T to the lower triangle, i ascending; x [n_rows][n] f32, weight
 * [n_rows] or NULL for ones. */
void kvs_add_moments(double *a, uint32_t n, const float *x, const float *weight, uint32_t n_rows);
/* The lower triangle of a [n][n] becomes L of a = L L^T; false where a pivot is not positive (a is then unspecified). */
bool kvs_cholesky(double *a, uint32_t n);
/* out [n][n] f32, lower triangle: the inverse of the lower triangular l [n][n] f64, computed in l. */
void kvs_invert_lower(double *l, uint32_t n, float *out);
/* out[i] = |T x_i|^2 for a lower triangular t [n][n]; x [n_rows][n]. */
void kvs_norms_under(const float *t, uint32_t n, const float *x, uint32_t n_rows, float *out);
/* out[i] = x_i^T S x_i, S symmetric, of which t [n][n] holds the diagonal and twice what is below it. */
void kvs_quadratic_forms(const float *t, uint32_t n, const float *x, uint32_t n_rows, float *out);
/* y_i = A^T x_i: a [n][k], x [n_rows][n], y [n_rows][k]. */
void kvs_project(const float *a, uint32_t n, uint32_t k, const float *x, uint32_t n_rows, float *y);
/* a [n][k] f32 of independent draws, mean 0, variance 1/k: each the sum of twelve uniform ones less 6, which needs no
 * logarithm and so means the same on every machine. */
void kvs_sketch(uint64_t seed, uint32_t n, uint32_t k, float *a);
/* |x_i| of x [n_rows][n]; the sum of squares in f32, ascending. */
void kvs_row_norms(const float *x, uint32_t n, uint32_t n_rows, float *out);

/* Slots with pos below `sinks`, which scorers by query statistics leave out and keep: they come first. */
uint32_t kvs_sink_slots(const kvs_policy_view *view, uint32_t sinks);
/* What query head g will ask over the next n_future positions, in the frame of the keys as they stand: mean [head_dim],
 * and the lower triangle of the covariance [head_dim][head_dim] unless NULL. Both are turned by the mean of the rotations
 * of those positions (arXiv 2510.00636). Zeros where no query was seen. */
void kvs_expected_query(const kvs_policy_view *view, uint32_t g, uint32_t n_future, double *mean, double *covariance);

#endif

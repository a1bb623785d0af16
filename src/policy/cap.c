/* CapKV: slots whose values add most to the room that the kept values span, weighted by how well their keys meet the mean
 * query. Source: arXiv:2604.25975 as kvpress's CapPress writes it (its choices, not the paper's: cosines
 * instead of products, shifted by their maximum; the mean rotation of the next 512 positions): per query head
 * w_j = exp(tau (cos(q, k_j) - max)), A = I + sum (w_j + 1e-6) v_j v_j^T, score w_j v_j^T A^-1 v_j; mean over the group. The first
 * 4 tokens stay, and their queries are not counted. Queries of all tokens said are counted. */
#include "policy/dense.h"
#include "policy/policy.h"

#include <math.h>
#include <string.h>

#define EPSILON 1e-6f /* CapPress's */

static const kvs_param_info params_info[] = {
    {"tau", "sharpness of the weights", 5, 0, 100},
    {"future", "positions over which rotations are averaged", 512, 1, 1048576},
    {"sinks", "first tokens, which stay", 4, 0, 4096},
};

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    const size_t dh = head_dim;
    (void)params;
    return 2 * dh * (dh + 1) + dh * dh + 3 * (size_t)n_slots;
}

/* exp(tau (cos(mean, k_i) - max)); norms [n] of the keys. */
static void weigh(const kvs_policy_view *view, const float *keys, const float *norms, uint32_t n, const double *mean,
                  float tau, float *weight)
{
    const uint32_t dh = view->head_dim;
    double square = 0;
    for (uint32_t d = 0; d < dh; d++)
        square += mean[d] * mean[d];
    const double length = sqrt(square);
    float most = -INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        double dot = 0;
        for (uint32_t d = 0; d < dh; d++)
            dot += (double)keys[(size_t)i * dh + d] * mean[d];
        const double scale = length * (double)norms[i];
        weight[i] = scale > 0 ? tau * (float)(dot / scale) : 0.0f;
        most = weight[i] > most ? weight[i] : most;
    }
    view->exp_scale(weight, n, most, 1);
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t dh = view->head_dim, n_sinks = kvs_sink_slots(view, (uint32_t)params[2]);
    const uint32_t n = view->n_slots - n_sinks;
    const float *const keys = view->keys + (size_t)n_sinks * dh, *const values = view->values + (size_t)n_sinks * dh;
    double *const mean = (double *)(void *)view->work, *const a = mean + dh;
    float *const inverse = (float *)(void *)(a + (size_t)dh * dh), *const norms = inverse + (size_t)dh * dh;
    float *const weight = norms + n, *const leverage = weight + n;
    float *const out = scores + n_sinks;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = i < n_sinks ? INFINITY : 0.0f;
    kvs_row_norms(keys, dh, n, norms);
    for (uint32_t g = 0; g < view->group && view->n_queries > 0; g++) {
        kvs_expected_query(view, g, (uint32_t)params[1], mean, NULL);
        weigh(view, keys, norms, n, mean, (float)params[0], weight);
        memset(a, 0, (size_t)dh * dh * sizeof *a);
        for (uint32_t d = 0; d < dh; d++)
            a[(size_t)d * dh + d] = 1;
        for (uint32_t i = 0; i < n; i++)
            weight[i] += EPSILON;
        kvs_add_moments(a, dh, values, weight, n);
        if (!kvs_cholesky(a, dh)) /* only where a value is not finite */
            continue;
        kvs_invert_lower(a, dh, inverse);
        kvs_norms_under(inverse, dh, values, n, leverage); /* v^T A^-1 v */
        for (uint32_t i = 0; i < n; i++)
            out[i] += (weight[i] - EPSILON) * leverage[i] / (float)view->group;
    }
}

const kvs_policy_ops kvs_policy_cap = {
    .abi = KVS_POLICY_ABI,
    .name = "cap",
    .doc = "values that span the most, where keys meet the mean query",
    .source = "arXiv:2604.25975",
    .exactness = "exact as kvpress's CapPress with +protect=none; statistics are of every query so far",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_KEYS | KVS_POLICY_NEEDS_VALUES | KVS_POLICY_NEEDS_QUERY_STATS,
    .params = params_info,
    .n_params = 3,
    .score = score,
    .work_of = work_of,
};

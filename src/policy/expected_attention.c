/* Expected attention: what queries drawn from the Gaussian of those seen so far would give each slot over the next
 * positions. Source: arXiv:2510.00636 and kvpress's ExpectedAttentionPress: per query head
 * softmax over slots of k mu / sqrt(d) + k^T Sigma k / (2 d), with mu and Sigma turned by the mean rotation of the next 512
 * positions; mean over the group, times |v|. The first 4 tokens stay, and their queries are not counted (fixed there).
 * Queries of all tokens said are counted, evicted ones too; kvpress counts those of the prompt. Its leaderboard entry is
 * expected_attention:epsilon=0.01 +budget=ada. */
#include "policy/dense.h"
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"future", "positions over which rotations are averaged", 512, 1, 1048576},
    {"sinks", "first tokens, which stay", 4, 0, 4096},
    {"covariance", "0: the mean query alone", 1, 0, 1},
    {"vnorm", "0: without the values' norms", 1, 0, 1},
    {"epsilon", "added to the attention before it meets the norm", 0, 0, 1},
};

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    const size_t dh = head_dim;
    (void)params;
    return 2 * dh * (dh + 1) + dh * dh + n_slots;
}

/* Softmax of logits [n] added to out. */
static void add_softmax(const kvs_policy_view *view, float *logits, uint32_t n, float *out)
{
    float most = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < n; i++)
        most = logits[i] > most ? logits[i] : most;
    view->exp_scale(logits, n, most, 1);
    for (uint32_t i = 0; i < n; i++)
        sum += logits[i];
    for (uint32_t i = 0; i < n; i++)
        out[i] += logits[i] / sum;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t dh = view->head_dim, n_sinks = kvs_sink_slots(view, (uint32_t)params[1]);
    const uint32_t n = view->n_slots - n_sinks;
    const float *const keys = view->keys + (size_t)n_sinks * dh;
    const bool covariance = params[2] != 0;
    double *const mean = (double *)(void *)view->work, *const sigma = mean + dh;
    float *const form = (float *)(void *)(sigma + (size_t)dh * dh), *const logits = form + (size_t)dh * dh;
    float *const out = scores + n_sinks;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = i < n_sinks ? INFINITY : 0.0f;
    for (uint32_t g = 0; g < view->group && view->n_queries > 0; g++) {
        kvs_expected_query(view, g, (uint32_t)params[0], mean, covariance ? sigma : NULL);
        for (uint32_t i = 0; covariance && i < dh; i++)
            for (uint32_t j = 0; j <= i; j++)
                form[(size_t)i * dh + j] = (float)(sigma[(size_t)i * dh + j] * (i == j ? 0.5 : 1) / dh);
        if (covariance)
            kvs_quadratic_forms(form, dh, keys, n, logits);
        const double scale = 1 / sqrt((double)dh);
        for (uint32_t i = 0; i < n; i++) {
            double dot = 0;
            for (uint32_t d = 0; d < dh; d++)
                dot += (double)keys[(size_t)i * dh + d] * mean[d];
            logits[i] = (float)(dot * scale) + (covariance ? logits[i] : 0.0f);
        }
        add_softmax(view, logits, n, out);
    }
    if (params[3] != 0)
        kvs_row_norms(view->values + (size_t)n_sinks * dh, dh, n, logits);
    for (uint32_t i = 0; i < n; i++) {
        out[i] /= (float)view->group;
        if (params[3] != 0)
            out[i] = (out[i] + (float)params[4]) * logits[i];
    }
}

static uint32_t needs_of(const double *params)
{
    return params[3] != 0 ? KVS_POLICY_NEEDS_VALUES : 0u;
}

const kvs_policy_ops kvs_policy_expected_attention = {
    .abi = KVS_POLICY_ABI,
    .name = "expected_attention",
    .doc = "the attention that queries like those so far would give",
    .source = "arXiv:2510.00636",
    .exactness = "exact with +protect=none; statistics are of every query so far",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_KEYS | KVS_POLICY_NEEDS_QUERY_STATS,
    .needs_of = needs_of,
    .params = params_info,
    .n_params = 5,
    .score = score,
    .work_of = work_of,
};

static const kvs_param_info lukv_params_info[] = {
    {"future", "positions over which rotations are averaged", 512, 1, 1048576},
    {"sinks", "first tokens, which stay", 4, 0, 4096},
    {"covariance", "0: the mean query alone", 1, 0, 1},
    {"vnorm", "0: without the values' norms", 1, 0, 1},
    {"epsilon", "added to the attention before it meets the norm", 0.02, 0, 1},
};

/* kvpress's LUKVPress over expected attention (arXiv:2602.08585): shares by a table, budget_lukv.c. */
const kvs_policy_ops kvs_policy_lukv = {
    .abi = KVS_POLICY_ABI,
    .name = "lukv",
    .doc = "expected_attention with as much in each head as a table says; needs file=PATH",
    .source = "arXiv:2602.08585",
    .exactness = "exact in proportion with +protect=recent:1; our tables are reconstructed",
    .schedule = "full",
    .position = "keep",
    .budget = "lukv",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_KEYS | KVS_POLICY_NEEDS_QUERY_STATS,
    .needs_of = needs_of,
    .params = lukv_params_info,
    .n_params = 5,
    .score = score,
    .work_of = work_of,
};

/* CurDKV by its cheap form: squared norms of keys and values, as shares of their window's, stand for leverage. Source:
 * arXiv:2509.15038 and kvpress's CURPress: type product, windows of 16 slots, 4 sinks; random=1 first projects both to 20
 * dims at random. The projection is drawn once from the session's seed, for all heads (theirs anew at each call). */
#include "policy/dense.h"
#include "policy/policy.h"

#include <math.h>

enum { RANDOM_DIMS = 20 };

static const kvs_param_info params_info[] = {
    {"type", "0: keys times values, 1: keys, 2: values, 3: their mean", 0, 0, 3},
    {"window", "slots over which shares are taken, 0: no shares", 16, 0, 65536},
    {"sinks", "first slots, which stay", 4, 0, 4096},
    {"random", "1: norms after a random projection to 20 dims", 0, 0, 1},
};

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    const size_t random = params[3] != 0 ? (size_t)RANDOM_DIMS * ((size_t)head_dim + n_slots) : 0;
    return n_slots + random;
}

/* Squared norms, as shares of the sum over each `window` slots. */
static void shares(const kvs_policy_view *view, const float *x, const double *params, float *out)
{
    const uint32_t n = view->n_slots, window = (uint32_t)params[1];
    uint32_t dims = view->head_dim;
    if (params[3] != 0) {
        float *const sketch = view->work + n, *const projected = sketch + (size_t)RANDOM_DIMS * dims;
        kvs_sketch(view->seed, dims, RANDOM_DIMS, sketch);
        kvs_project(sketch, dims, RANDOM_DIMS, x, n, projected);
        x = projected;
        dims = RANDOM_DIMS;
    }
    for (uint32_t i = 0; i < n; i++) {
        float sum = 0;
        for (uint32_t d = 0; d < dims; d++)
            sum += x[(size_t)i * dims + d] * x[(size_t)i * dims + d];
        out[i] = sum;
    }
    for (uint32_t begin = 0; window > 0 && begin < n; begin += window) {
        const uint32_t end = kvs_min_u32(n, begin + window);
        float sum = 0;
        for (uint32_t i = begin; i < end; i++)
            sum += out[i];
        for (uint32_t i = begin; i < end; i++)
            out[i] = sum > 0 ? out[i] / sum : 0.0f;
    }
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots, type = (uint32_t)params[0], sinks = (uint32_t)params[2];
    float *const of_values = view->work;
    if (type != 2)
        shares(view, view->keys, params, scores);
    if (type != 1)
        shares(view, view->values, params, type == 2 ? scores : of_values);
    for (uint32_t i = 0; i < n && (type == 0 || type == 3); i++)
        scores[i] = type == 0 ? scores[i] * of_values[i] : (scores[i] + of_values[i]) / 2;
    float sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += scores[i];
    for (uint32_t i = 0; i < n; i++)
        scores[i] = i < sinks ? 1.0f : sum > 0 ? scores[i] / sum : 0.0f;
}

static uint32_t needs_of(const double *params)
{
    return ((uint32_t)params[0] != 2 ? KVS_POLICY_NEEDS_KEYS : 0u) |
           ((uint32_t)params[0] != 1 ? KVS_POLICY_NEEDS_VALUES : 0u);
}

const kvs_policy_ops kvs_policy_cur = {
    .abi = KVS_POLICY_ABI,
    .name = "cur",
    .doc = "large keys and values among their neighbours",
    .source = "arXiv:2509.15038",
    .exactness = "exact as kvpress's CURPress with +protect=none, apart from random=1's generator",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs_of = needs_of,
    .params = params_info,
    .n_params = 4,
    .score = score,
    .work_of = work_of,
};

/* CAOTE: how far the attention output moves when one slot is removed and the softmax renormalised. Source: arXiv:2504.14051:
 * c_j = A_j / (1 - A_j) |o - v_j|_2, where A are any non-negative scores divided by their sum and o is their mean of the
 * values (the paper's meta form; that the base score is divided by its sum is reconstructed). fast=1 takes the plain mean of the
 * values for o (FastCAOTE). Exact for the removal of one slot; several go by the same ranking. */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"fast", "1: the plain mean of values instead of the weighted one (FastCAOTE)", 0, 0, 1},
};

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)n_slots;
    return head_dim;
}

static void rescore(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots, dh = view->head_dim;
    const bool fast = params[0] != 0;
    float *const o = view->work;
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        scores[i] = scores[i] > 0 ? scores[i] : 0; /* NaN too */
        if (isinf(scores[i]))
            continue;
        sum += (double)scores[i];
    }
    for (uint32_t d = 0; d < dh; d++)
        o[d] = 0;
    for (uint32_t i = 0; i < n; i++) {
        const float a = fast ? 1.0f / (float)n : sum > 0 && !isinf(scores[i]) ? (float)((double)scores[i] / sum) : 0.0f;
        for (uint32_t d = 0; d < dh; d++)
            o[d] += a * view->values[(size_t)i * dh + d];
    }
    for (uint32_t i = 0; i < n; i++) {
        if (isinf(scores[i]))
            continue; /* what the base keeps whatever happens */
        const double a = sum > 0 ? (double)scores[i] / sum : 0;
        double distance = 0;
        for (uint32_t d = 0; d < dh; d++) {
            const double x = (double)(o[d] - view->values[(size_t)i * dh + d]);
            distance += x * x;
        }
        scores[i] = a >= 1 ? INFINITY : (float)(a / (1 - a) * sqrt(distance));
    }
}

const kvs_rescore_ops kvs_rescore_caote = {
    .info = {.name = "caote",
             .doc = "how far the attention output moves without the slot",
             .source = "arXiv:2504.14051",
             .exactness = "exact formula; the base score's normalisation is reconstructed",
             .params = params_info,
             .n_params = 1},
    .needs = KVS_POLICY_NEEDS_VALUES,
    .rescore = rescore,
    .work_of = work_of,
};

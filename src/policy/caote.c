/* CAOTE: how far the newest query's attention output moves when a slot is removed and the softmax renormalised. Source:
 * arXiv:2504.14051: c_j = A_j / (1 - A_j) |o - v_j|_2, exact for one slot. The group's query heads are taken together by the root of
 * the sum of squares, which is the length of the group's change (the paper leaves it open; reconstructed), as are
 * several queries (window over 1). fastcaote takes the plain mean of the values for o. Over another scorer:
 * +rescore=caote. */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"window", "newest queries that count", 1, 1, KVS_POLICY_WINDOW_MAX},
};

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[0];
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    return (size_t)n_slots + head_dim;
}

static void plain_mean(const kvs_policy_view *view, float *o)
{
    const uint32_t n = view->n_slots, dh = view->head_dim;
    for (uint32_t d = 0; d < dh; d++)
        o[d] = 0;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t d = 0; d < dh; d++)
            o[d] += view->values[(size_t)i * dh + d] / (float)n;
}

/* scores[i] += |o - v_i|^2 (a / (1 - a))^2 for one query head. */
static void add_changes(const kvs_policy_view *view, const float *prob, const float *o, float *scores)
{
    const uint32_t dh = view->head_dim;
    for (uint32_t i = 0; i < view->n_slots; i++) {
        double distance = 0;
        for (uint32_t d = 0; d < dh; d++) {
            const double x = (double)(o[d] - view->values[(size_t)i * dh + d]);
            distance += x * x;
        }
        const double a = (double)prob[i], ratio = a / (1 - a);
        scores[i] += a >= 1 ? INFINITY : (float)(ratio * ratio * distance);
    }
}

static void score_with(bool fast, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots, dh = view->head_dim;
    float *const o = view->work;
    for (uint32_t i = 0; i < n; i++)
        scores[i] = 0;
    for (uint32_t r = 0; r < view->n_window * view->group; r++) {
        const float *const prob = view->window_prob + (size_t)r * n;
        if (fast) {
            if (r == 0)
                plain_mean(view, o);
        } else {
            for (uint32_t d = 0; d < dh; d++)
                o[d] = 0;
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t d = 0; d < dh; d++)
                    o[d] += prob[i] * view->values[(size_t)i * dh + d];
        }
        add_changes(view, prob, o, scores);
    }
    for (uint32_t i = 0; i < n; i++)
        scores[i] = sqrtf(scores[i]);
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    score_with(false, view, scores);
}

static void score_fast(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    score_with(true, view, scores);
}

#define CAOTE                                                                                                          \
    .abi = KVS_POLICY_ABI, .source = "arXiv:2504.14051", .schedule = "full", .position = "keep",                       \
    .exactness =                                                                                                       \
        "exact for one slot (+protect=none +schedule=step); the group's heads by root of squares, reconstructed",      \
    .scope = KVS_SCOPE_HEAD, .needs = KVS_POLICY_NEEDS_WINDOW | KVS_POLICY_NEEDS_VALUES, .params = params_info,        \
    .n_params = 1, .window_of = window_of, .work_of = work_of

const kvs_policy_ops kvs_policy_caote = {
    CAOTE,
    .name = "caote",
    .doc = "how far the newest query's output moves without the slot",
    .score = score,
};

const kvs_policy_ops kvs_policy_fastcaote = {
    CAOTE,
    .name = "fastcaote",
    .doc = "the same with the plain mean of values for the output",
    .score = score_fast,
};

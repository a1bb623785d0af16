/* A score decides, not a count: what falls below `least` goes as soon as it is out of the newest `window` tokens;
 * how much that is follows from the text, head by head. Source: kvpress's DMSPress, after Dynamic Memory
 * Sparsification (arXiv:2506.05345) without its trained evictors: window 128; `least` has no default there, and 0
 * drops nothing of what scores 0 or more. With +rescore=first a slot's first score is its last, and +schedule=step
 * asks as often as kvpress does. Deviation: a cap on bytes outranks the threshold; where more passes it than fits,
 * the best of all heads stay (+budget=global). */
#include "policy/budget_pool.h"

static const kvs_param_info params_info[] = {
    {"least", "score below which a slot goes", 0, -1e30, 1e30},
    {"window", "newest tokens that stay whatever they score", 128, 0, 1e9},
};

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    const uint32_t n_heads = v->n_layers * v->n_kv_heads;
    kvs_budget_pool(v, 0, n_heads, 0, n_keep);
    for (uint32_t h = 0; h < n_heads; h++) {
        const float *const scores = v->scores + h * v->stride;
        uint32_t n_pass = 0;
        for (uint32_t i = 0; i < v->n_slots[h]; i++)
            n_pass += scores[i] >= (float)params[0];
        n_keep[h] = kvs_min_u32(n_keep[h], n_pass);
    }
}

static uint32_t recent_of(const double *params)
{
    return (uint32_t)params[1];
}

const kvs_budget_ops kvs_budget_threshold = {
    .info = {.name = "threshold",
             .doc = "what scores too little goes, however much it is",
             .source = "NVIDIA/kvpress DMSPress",
             .exactness = "exact with +rescore=first +schedule=step for scores that no later token changes, while the "
                          "budget has room",
             .params = params_info,
             .n_params = 2},
    .scope = KVS_SCOPE_HEAD,
    .share_max = 16,
    .by_score = true,
    .recent_of = recent_of,
    .allocate = allocate,
};

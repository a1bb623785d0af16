/* AdaKV: the heads of a layer share its room by one threshold over their scores, each keeping some of its own best.
 * Source: Feng et al., arXiv:2407.11550; floor 0.2 as its repository and kvpress's AdaKVPress (alpha_safeguard). With
 * floor=0 it is the per-layer pool of KVzip and EpiCache ("pair"); with floor=1 each head keeps its even share. */
#include "policy/budget_pool.h"

static const kvs_param_info params_info[] = {
    {"floor", "share of its even share that a head keeps whatever the others score", 0.2, 0, 1},
};

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    for (uint32_t layer = 0; layer < v->n_layers; layer++)
        kvs_budget_pool(v, layer * v->n_kv_heads, (layer + 1) * v->n_kv_heads, params[0], n_keep);
}

const kvs_budget_ops kvs_budget_ada = {
    .info = {.name = "ada",
             .doc = "heads of a layer share its room by one threshold",
             .source = "arXiv:2407.11550",
             .exactness = "exact",
             .params = params_info,
             .n_params = 1},
    .scope = KVS_SCOPE_HEAD,
    .by_score = true,
    .allocate = allocate,
};

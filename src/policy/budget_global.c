/* One threshold over all layers and heads: KVzip's (arXiv:2505.23416) and Fast KVzip's sharing, TRIM-KV's dynamic
 * budget (arXiv:2512.03324, with floor). A head gets at most 16 even shares at a session's cap, which scratch is sized by. */
#include "policy/budget_pool.h"

static const kvs_param_info params_info[] = {
    {"floor", "share of its even share that a head keeps whatever the others score", 0, 0, 1},
};

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    kvs_budget_pool(v, 0, v->n_layers * v->n_kv_heads, params[0], n_keep);
}

const kvs_budget_ops kvs_budget_global = {
    .info = {.name = "global",
             .doc = "all heads of all layers share the room by one threshold",
             .source = "arXiv:2505.23416",
             .exactness = "exact up to 16 even shares a head",
             .params = params_info,
             .n_params = 1},
    .scope = KVS_SCOPE_HEAD,
    .by_score = true,
    .share_max = 16,
    .allocate = allocate,
};

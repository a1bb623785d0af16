/* ChunkKV: runs of neighbouring tokens stay or go together, in all heads of a layer the same ones (by the mean of their
 * scores, as the paper's and kvpress's sums over heads rank them); with reuse, layers in a row share the first one's choice.
 * Source: Liu et al., arXiv:2502.00299: length 10 (kvpress: 20), reuse 2 in its ablation; heads=1 is our own. A chunk is [k length,
 * (k + 1) length) of the conversation's own positions, so that it stays the same chunk from one eviction to the next; its
 * score is the mean of what is left of it. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"length", "tokens of a chunk", 10, 1, 65536},
    {"reuse", "layers in a row that share the first one's keep sets", 1, 1, 1024},
    {"heads", "1: each KV head chooses for itself where the scorer can", 0, 0, 1},
};

static kvs_policy_scope scope_of(const double *params)
{
    return params[2] != 0 ? KVS_SCOPE_HEAD : KVS_SCOPE_LAYER;
}

static void units(const double *params, const kvs_policy_view *view, uint32_t *unit)
{
    const int32_t length = (int32_t)params[0];
    for (uint32_t i = 0; i < view->n_slots; i++)
        unit[i] = (uint32_t)(view->pos[i] / length);
}

static uint32_t reuse_of(const double *params)
{
    return (uint32_t)params[1];
}

const kvs_select_ops kvs_select_chunk = {
    .info = {.name = "chunk",
             .doc = "runs of neighbouring tokens stay or go together",
             .source = "arXiv:2502.00299",
             .exactness = "exact; several evictions keep the same chunk borders",
             .params = params_info,
             .n_params = 3},
    .scope_of = scope_of,
    .units = units,
    .reuse_of = reuse_of,
};

/* Blocks of a fixed size on the conversation's own positions, as paged caches evict them. */
static const kvs_param_info block_params[] = {
    {"size", "tokens of a block", 16, 1, 65536},
};

const kvs_select_ops kvs_select_block = {
    .info = {.name = "block",
             .doc = "aligned blocks stay or go together",
             .source = "Kvasir",
             .exactness = "exact",
             .params = block_params,
             .n_params = 1},
    .units = units,
};

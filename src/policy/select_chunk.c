/* ChunkKV: runs of neighbouring tokens stay or go together; with reuse, layers in a row share the first one's choice.
 * Source: Liu et al., arXiv:2502.00299: length 10 (kvpress: 20), reuse 2 in its ablation. A chunk is [k length,
 * (k + 1) length) of the conversation's own positions, so that it stays the same chunk from one eviction to the next; its
 * score is the mean of what is left of it. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"length", "tokens of a chunk", 10, 1, 65536},
    {"reuse", "layers in a row that share the first one's keep sets", 1, 1, 1024},
};

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
             .n_params = 2},
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

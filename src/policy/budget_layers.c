/* A share for each layer as a person wrote it: kvpress's PerLayerCompressionPress, which takes a list of ratios to
 * remove. The file has {"kind": "layers", "n_layers": ..., "n_kv_heads": ..., "layers": [...]}, the part of the slots that
 * each layer keeps, relative to the others: the sum is that of the even shares, whatever they add up to (kvpress keeps
 * the parts themselves). A layer gets at most 8 even shares. */
#include "policy/budget_deal.h"

enum { SHARE_MAX = 8 };

static const char *const kinds[] = {"layers", NULL};

static const kvs_profile_want file = {
    .kinds = kinds, .doc = "parts that layers keep, one number a layer", .any_model = true, .min = 0, .max = 1};

static double weight(const void *ctx, uint32_t layer)
{
    return ((const kvs_profile *)ctx)->layers[layer];
}

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    (void)params;
    const kvs_budget_deal_plan plan = {.weight = weight, .ctx = v->profile, .by_layer = true, .share_max = SHARE_MAX};
    kvs_budget_deal(v, &plan, n_keep);
}

const kvs_budget_ops kvs_budget_layers = {
    .info = {.name = "layers",
             .doc = "a share for each layer, from a file",
             .source = "kvpress PerLayerCompressionPress",
             .exactness = "exact in proportion; the sum is that of the even shares"},
    .scope = KVS_SCOPE_LAYER,
    .share_max = SHARE_MAX,
    .file = &file,
    .allocate = allocate,
};

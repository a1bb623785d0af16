/* EpiCache's layer budgets: a layer whose keys change when attention is confined to blocks gets more room.
 * Source: Kim et al., arXiv:2509.17396 and apple/ml-epicache; alpha 1.1 as there. The file has for each layer the mean
 * cosine between its keys under full and under confined attention (`kvasir profile sensitivity`); scaled to [0, 1] over the
 * layers as s, a layer's weight is (1 - s)^alpha. Theirs raises every layer to a quarter of an even share afterwards,
 * whatever that adds; ours scales the others down, so that the sum is that of the even shares. A layer gets at most 8. */
#include "policy/budget_deal.h"

#include <math.h>

enum { SHARE_MAX = 8 };

static const kvs_param_info params_info[] = {
    {"alpha", "how steep: 0 is even", 1.1, 0, 16},
    {"floor", "part of an even share that every layer keeps", 0.25, 0, 1},
};

static const char *const kinds[] = {"sensitivity", NULL};

static const kvs_profile_want file = {
    .kinds = kinds, .doc = "similarity of layers' keys, by kvasir profile sensitivity", .min = -1, .max = 1};

typedef struct scale {
    const double *x;
    double least, most, alpha;
} scale;

static double weight(const void *ctx, uint32_t layer)
{
    const scale *const s = ctx;
    if (s->alpha == 0 || s->most == s->least)
        return 1;
    return pow(1 - (s->x[layer] - s->least) / (s->most - s->least), s->alpha);
}

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    const double *const x = v->profile->layers;
    scale s = {x, x[0], x[0], params[0]};
    for (uint32_t l = 1; l < v->n_layers; l++) {
        s.least = fmin(s.least, x[l]);
        s.most = fmax(s.most, x[l]);
    }
    const kvs_budget_deal_plan plan = {
        .weight = weight, .ctx = &s, .by_layer = true, .least = params[1], .share_max = SHARE_MAX};
    kvs_budget_deal(v, &plan, n_keep);
}

const kvs_budget_ops kvs_budget_sensitivity = {
    .info = {.name = "sensitivity",
             .doc = "layers whose keys change without the far context get more room",
             .source = "arXiv:2509.17396",
             .exactness = "exact, except that the sum stays that of the even shares",
             .params = params_info,
             .n_params = 2},
    .scope = KVS_SCOPE_LAYER,
    .share_max = SHARE_MAX,
    .file = &file,
    .allocate = allocate,
};

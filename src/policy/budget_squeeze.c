/* SqueezeAttention: layers whose attention changes the hidden state least give up part of their room to the others.
 * Source: Wang et al., arXiv:2404.04793. The importance of a layer is the cosine of the hidden state before and after its
 * attention block, averaged over tokens; k-means in one dimension makes three groups of layers; each layer of the group
 * with the highest cosine gets p of an even share, and what that saves is spread evenly over all others. p 0.38 as in the
 * repository's example. Deviations: means are over all rows said so far (theirs: the first prompt), so groups follow the
 * conversation; the three groups are the best there are (theirs: k-means from a random start); a layer gets at most 8
 * even shares; with fewer than three layers, or if all are alike, shares are even. */
#include "policy/budget_deal.h"

enum { SHARE_MAX = 8, GROUPS = 3 };

static const kvs_param_info params_info[] = {
    {"p", "part of an even share that layers of the least important group keep", 0.38, 0, 1},
};

typedef struct groups {
    const double *x;       /* [n] similarity of layers */
    const uint32_t *order; /* [n] layers by it, rising */
    uint32_t n, third;     /* where the third group begins */
    double p;
} groups;

/* Sum of squares around the mean of layers order[begin, end). */
static double spread(const groups *g, uint32_t begin, uint32_t end)
{
    double mean = 0, sum = 0;
    for (uint32_t i = begin; i < end; i++)
        mean += g->x[g->order[i]] / (end - begin);
    for (uint32_t i = begin; i < end; i++)
        sum += (g->x[g->order[i]] - mean) * (g->x[g->order[i]] - mean);
    return sum;
}

/* In one dimension groups are neighbours: every pair of borders is tried. */
static uint32_t third_group(const groups *g)
{
    uint32_t third = 2;
    double least = __builtin_inf();
    for (uint32_t i = 1; i + 1 < g->n; i++) {
        const double first = spread(g, 0, i);
        for (uint32_t j = i + 1; j < g->n; j++) {
            const double cost = first + spread(g, i, j) + spread(g, j, g->n);
            if (cost < least) {
                least = cost;
                third = j;
            }
        }
    }
    return third;
}

static double weight(const void *ctx, uint32_t layer)
{
    const groups *const g = ctx;
    const double n_third = g->n - g->third;
    for (uint32_t i = g->third; i < g->n; i++)
        if (g->order[i] == layer)
            return g->p;
    return (g->n - n_third * g->p) / (g->n - n_third);
}

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    uint32_t *const order = v->keys;
    groups g = {v->similarity, order, v->n_layers, 0, params[0]};
    if (g.x == NULL || g.n < GROUPS)
        return; /* even, as they are */
    for (uint32_t l = 0; l < g.n; l++) {
        uint32_t at = l;
        for (; at > 0 && g.x[order[at - 1]] > g.x[l]; at--)
            order[at] = order[at - 1];
        order[at] = l;
    }
    if (g.x[order[0]] == g.x[order[g.n - 1]])
        return;
    g.third = third_group(&g);
    const kvs_budget_deal_plan plan = {.weight = weight, .ctx = &g, .by_layer = true, .share_max = SHARE_MAX};
    kvs_budget_deal(v, &plan, n_keep);
}

const kvs_budget_ops kvs_budget_squeeze = {
    .info = {.name = "squeeze",
             .doc = "layers whose attention changes the hidden state least give room to the others",
             .source = "arXiv:2404.04793",
             .exactness = "groups from all rows so far; the best three groups; at most 8 even shares a layer",
             .params = params_info,
             .n_params = 1},
    .scope = KVS_SCOPE_LAYER,
    .share_max = SHARE_MAX,
    .similarity = true,
    .allocate = allocate,
};

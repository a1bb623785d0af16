/* BaKlaVa: every KV head has a share of its own, found offline. Source: Gulhan et al., arXiv:2502.13176. The file has a
 * weight for each KV head (`kvasir profile baklava`, src/eval/profile_baklava.c says how they come about); shares are in
 * proportion to them and sum to the even shares. A head gets at most 8 even shares. */
#include "policy/budget_deal.h"

enum { SHARE_MAX = 8 };

static const char *const kinds[] = {"baklava", NULL};

static const kvs_profile_want file = {
    .kinds = kinds, .doc = "weights of KV heads, by kvasir profile baklava", .heads = true, .min = 0, .max = 1000};

static double weight(const void *ctx, uint32_t head)
{
    return ((const kvs_profile *)ctx)->heads[head];
}

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    (void)params;
    const kvs_budget_deal_plan plan = {.weight = weight, .ctx = v->profile, .share_max = SHARE_MAX};
    kvs_budget_deal(v, &plan, n_keep);
}

const kvs_budget_ops kvs_budget_baklava = {
    .info = {.name = "baklava",
             .doc = "a share for each KV head, from a profile",
             .source = "arXiv:2502.13176",
             .exactness = "reconstructed: the search over a grid of ours"},
    .scope = KVS_SCOPE_HEAD,
    .share_max = SHARE_MAX,
    .file = &file,
    .allocate = allocate,
};

/* LU-KV: for every overall ratio a table says how much each head loses. Source: arXiv:2602.08585 and kvpress's LUKVPress:
 * tables for 1 % to 99 % dropped, the row that is nearest to what this eviction drops. The file has 99 tables of the part that
 * each KV head drops (`kvasir profile lukv`; theirs exists for one model). Deviation: kvpress takes each layer's sum from the
 * table, ours scales all heads by one factor so that the sum is that of the even shares; a head gets at most 16. */
#include "policy/budget_deal.h"

#include <math.h>

enum { SHARE_MAX = 16, TABLES = 99 };

static const char *const kinds[] = {"lukv", NULL};

static const kvs_profile_want file = {.kinds = kinds,
                                      .doc = "parts that heads drop, by kvasir profile lukv",
                                      .heads = true,
                                      .n_tables = TABLES,
                                      .min = 0,
                                      .max = 1};

static double weight(const void *ctx, uint32_t head)
{
    return 1 - ((const double *)ctx)[head];
}

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    (void)params;
    const uint32_t n = v->n_layers * v->n_kv_heads;
    double held = 0, even = 0;
    for (uint32_t h = 0; h < n; h++) {
        held += v->n_slots[h];
        even += kvs_min_u32(v->n_even[h], v->n_slots[h]);
    }
    const double row = nearbyint(100 * (1 - even / held)) - 1;
    const uint32_t table = row < 0 ? 0 : row > TABLES - 1 ? TABLES - 1 : (uint32_t)row;
    const kvs_budget_deal_plan plan = {
        .weight = weight, .ctx = v->profile->heads + (size_t)table * n, .share_max = SHARE_MAX};
    kvs_budget_deal(v, &plan, n_keep);
}

const kvs_budget_ops kvs_budget_lukv = {
    .info = {.name = "lukv",
             .doc = "heads lose what a table for this ratio says",
             .source = "arXiv:2602.08585",
             .exactness = "exact in proportion up to 16 even shares a head; the sum is that of the even shares"},
    .scope = KVS_SCOPE_HEAD,
    .share_max = SHARE_MAX,
    .file = &file,
    .allocate = allocate,
};

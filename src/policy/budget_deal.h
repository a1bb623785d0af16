/* Sharing out by weights. */
#ifndef KVS_BUDGET_DEAL_H
#define KVS_BUDGET_DEAL_H

#include "policy/policy.h"

/* How budget_deal shares out. A unit is a layer, whose heads keep equally many, or a head; its share is its even share
 * times its weight, all scaled by one factor such that their sum is that of the even shares, within bounds: at least
 * what is protected and `least` even shares, at most what it holds and share_max even shares. Fractions go to where they
 * are largest, the lower unit first. Equal weights give the even shares. */
typedef struct kvs_budget_deal_plan {
    double (*weight)(const void *ctx, uint32_t unit); /* 0 or more */
    const void *ctx;
    bool by_layer;
    double least;
    uint32_t share_max;
    /* A head that takes no part: its n_keep stays, and what it leaves of its even share is dealt out too. NULL: none. */
    bool (*left_out)(const void *ctx, uint32_t unit);
} kvs_budget_deal_plan;

void kvs_budget_deal(const kvs_budget_view *v, const kvs_budget_deal_plan *plan, uint32_t *n_keep);

#endif

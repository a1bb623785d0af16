/* Sharing out by one threshold over the scores of several heads. */
#ifndef KVS_BUDGET_POOL_H
#define KVS_BUDGET_POOL_H

#include "policy/policy.h"

/* n_keep of heads [begin, end): those of their slots that are among the sum of n_even best of all of them, where each
 * head's own best floor * n_even count as best of all. Equal scores at the threshold: the later head, so that
 * the sum is kept. */
void kvs_budget_pool(const kvs_budget_view *v, uint32_t begin, uint32_t end, double floor, uint32_t *n_keep);

#endif

/* Sharing out by one threshold over the scores of several heads. */
#include "policy/budget_pool.h"

/* The keys of one head's scores, its n_safe best raised above all others. */
static void write_keys(const float *scores, uint32_t n, uint32_t n_safe, uint32_t *keys)
{
    for (uint32_t i = 0; i < n; i++)
        keys[i] = kvs_score_key(scores[i]);
    if (n_safe == 0)
        return;
    uint32_t n_ties;
    const uint32_t least = kvs_kth_largest(keys, n, n_safe, &n_ties);
    for (uint32_t i = n; i-- > 0;) {
        const bool tie = keys[i] == least && n_ties > 0;
        n_ties -= tie;
        if (keys[i] > least || tie)
            keys[i] = UINT32_MAX;
    }
}

void kvs_budget_pool(const kvs_budget_view *v, uint32_t begin, uint32_t end, double floor, uint32_t *n_keep)
{
    uint32_t n = 0, total = 0;
    for (uint32_t h = begin; h < end; h++) {
        write_keys(v->scores + h * v->stride, v->n_slots[h],
                   kvs_min_u32(v->n_slots[h], (uint32_t)(floor * v->n_even[h])), v->keys + n);
        n += v->n_slots[h];
        total += kvs_min_u32(v->n_even[h], v->n_slots[h]);
    }
    if (total == 0)
        return;
    uint32_t n_ties;
    const uint32_t least = kvs_kth_largest(v->keys, n, total, &n_ties);
    for (uint32_t h = end; h-- > begin;) {
        uint32_t kept = 0;
        n -= v->n_slots[h];
        for (uint32_t i = 0; i < v->n_slots[h]; i++) {
            const bool tie = v->keys[n + i] == least && n_ties > 0;
            n_ties -= tie;
            kept += v->keys[n + i] > least || tie;
        }
        n_keep[h] = kept;
    }
}

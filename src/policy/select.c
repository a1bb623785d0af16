/* Top-k with protection and ties in favour of the newer, by radix selection: linear in the number of slots. */
#include "policy/policy.h"

#include <string.h>

enum { CLASS_FREE = 0, CLASS_MARKER = 1, CLASS_HARD = 2 };

/* A float's bits in an order where larger unsigned means larger float; NaN below everything. */
static uint32_t ordered(float x)
{
    if (x != x)
        return 0;
    if (x == 0.0f)
        return 0x80000000u; /* -0 equals 0: a tie, not an order */
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static bool is_hard(const kvs_protect *p, const kvs_policy_view *v, uint32_t i)
{
    const int64_t pos = v->pos[i];
    const uint8_t flags = v->flags == NULL ? 0 : v->flags[i];
    return pos < (int64_t)p->sinks || pos >= v->n_tokens - (int64_t)p->recent ||
           (p->system && flags & KVS_TOKEN_SYSTEM) || (p->pinned && flags & KVS_TOKEN_PINNED);
}

uint32_t kvs_protected_count(const kvs_protect *protect, const kvs_policy_view *view)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < view->n_slots; i++)
        n += is_hard(protect, view, i);
    return n;
}

/* The k-th largest of n distinct keys, one byte at a time from the top: a histogram says in which bucket it lies. */
static uint64_t kth_largest(const uint64_t *keys, uint32_t n, uint32_t k)
{
    uint64_t prefix = 0, mask = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        uint32_t count[256] = {0};
        for (uint32_t i = 0; i < n; i++)
            if ((keys[i] & mask) == prefix)
                count[keys[i] >> shift & 0xff]++;
        uint32_t bucket = 255;
        while (k > count[bucket])
            k -= count[bucket--];
        prefix |= (uint64_t)bucket << shift;
        mask |= (uint64_t)0xff << shift;
        if (count[bucket] == 1) { /* only one key can match: find it */
            for (uint32_t i = 0; i < n; i++)
                if ((keys[i] & mask) == prefix)
                    return keys[i];
        }
    }
    return prefix;
}

kvs_status kvs_select(const kvs_protect *protect, const kvs_policy_view *view, const float *scores, uint32_t n_keep,
                      uint8_t *keep, uint64_t *scratch, kvs_error *err)
{
    const uint32_t n = view->n_slots;
    memset(keep, 0, n);
    if (n_keep >= n) {
        memset(keep, 1, n);
        return KVS_OK;
    }
    const uint32_t n_hard = kvs_protected_count(protect, view);
    if (n_hard > n_keep)
        return kvs_error_set(err, KVS_EBUDGET,
                             "%u tokens are protected (sinks %u, recent %u%s%s) but only %u may stay; raise the budget "
                             "or use +protect=none",
                             n_hard, protect->sinks, protect->recent, protect->system ? ", system" : "",
                             protect->pinned ? ", pinned" : "", n_keep);
    if (n_keep == 0)
        return KVS_OK;
    uint32_t markers_left = protect->template_markers ? n_keep / 8 : 0;
    for (uint32_t i = n; i-- > 0;) {
        uint64_t class = CLASS_FREE;
        if (is_hard(protect, view, i)) {
            class = CLASS_HARD;
        } else if (markers_left > 0 && view->flags != NULL && view->flags[i] & KVS_TOKEN_TEMPLATE) {
            class = CLASS_MARKER;
            markers_left--;
        }
        /* class, score, index: keys are distinct, and among equal scores the newer is larger */
        scratch[i] = class << 62 | (uint64_t)ordered(scores[i]) << 30 | i;
    }
    const uint64_t threshold = kth_largest(scratch, n, n_keep);
    for (uint32_t i = 0; i < n; i++)
        keep[i] = scratch[i] >= threshold;
    return KVS_OK;
}

/* Top-k with protection and ties in favour of the newer, by radix selection: linear in the number of slots. */
#include "policy/policy.h"

#include <math.h>
#include <string.h>

/* What keep[] says while a choice is made. Hard-protected slots and markers in it stay: bit 0. */
enum { CLASS_FREE = 0, CLASS_HARD = 1, CLASS_MARKER = 3 };

/* -0 equal to 0: a tie, not an order. */
static inline uint32_t ordered(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    const uint32_t magnitude = u & 0x7fffffffu;
    const uint32_t key = (u >> 31 != 0 ? 0x80000000u - magnitude : 0x80000000u + magnitude);
    return magnitude > 0x7f800000u ? 0 : key;
}

uint32_t kvs_score_key(float score)
{
    return ordered(score);
}

/* ---- what is protected ---- */

/* Hard-protected are the slots before `begin`, those from `end` on, and between them those with one of `flags`. */
typedef struct hard {
    uint32_t begin, end;
    uint8_t flags;
} hard;

/* The first of the ascending pos that is not below bound. */
static uint32_t first_from(const int32_t *pos, uint32_t n, int64_t bound)
{
    uint32_t low = 0, high = n;
    while (low < high) {
        const uint32_t mid = low + (high - low) / 2;
        if (pos[mid] < bound)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static hard hard_of(const kvs_protect *p, const kvs_policy_view *v)
{
    hard h = {.begin = first_from(v->pos, v->n_slots, (int64_t)p->sinks),
              .end = first_from(v->pos, v->n_slots, v->n_tokens - (int64_t)p->recent)};
    h.end = kvs_max_u32(h.end, h.begin);
    if (v->flags != NULL)
        h.flags = (uint8_t)((p->system ? KVS_TOKEN_SYSTEM : 0) | (p->pinned ? KVS_TOKEN_PINNED : 0));
    return h;
}

static uint32_t count_hard(const hard *h, const kvs_policy_view *v)
{
    uint32_t n = h->begin + v->n_slots - h->end;
    const uint8_t *const flags = v->flags, hard_flags = h->flags;
    const uint32_t end = hard_flags != 0 ? h->end : 0;
    for (uint32_t i = h->begin; i < end; i++)
        n += (flags[i] & hard_flags) != 0;
    return n;
}

uint32_t kvs_protected_count(const kvs_protect *protect, const kvs_policy_view *view)
{
    const hard h = hard_of(protect, view);
    return count_hard(&h, view);
}

uint32_t kvs_protected_dropped(const kvs_protect *protect, const kvs_policy_view *view, const uint8_t *keep)
{
    const hard h = hard_of(protect, view);
    uint32_t i = 0;
    while (i < view->n_slots &&
           (keep[i] || (i >= h.begin && i < h.end && (view->flags == NULL || (view->flags[i] & h.flags) == 0))))
        i++;
    return i;
}

void kvs_protected_mark(const kvs_protect *protect, const kvs_policy_view *view, float *scores)
{
    const hard h = hard_of(protect, view);
    for (uint32_t i = 0; i < h.begin; i++)
        scores[i] = INFINITY;
    for (uint32_t i = h.begin; view->flags != NULL && i < h.end; i++)
        if ((view->flags[i] & h.flags) != 0)
            scores[i] = INFINITY;
    for (uint32_t i = h.end; i < view->n_slots; i++)
        scores[i] = INFINITY;
}

/* ---- the best ---- */

enum { RADIX_BITS = 11 };

/* A digit at a time from the top: a histogram says which bucket holds it. */
uint32_t kvs_kth_largest(const uint32_t *keys, uint32_t n, uint32_t k, uint32_t *n_ties)
{
    uint32_t prefix = 0, mask = 0;
    for (int top = 32; top > 0; top -= RADIX_BITS) {
        const int shift = top > RADIX_BITS ? top - RADIX_BITS : 0;
        uint32_t count[1u << RADIX_BITS] = {0};
        const uint32_t digit_mask = (1u << (top - shift)) - 1;
        for (uint32_t i = 0; i < n; i++)
            if ((keys[i] & mask) == prefix)
                count[keys[i] >> shift & digit_mask]++;
        uint32_t bucket = digit_mask;
        while (k > count[bucket])
            k -= count[bucket--];
        prefix |= bucket << shift;
        mask |= digit_mask << shift;
    }
    *n_ties = k;
    return prefix;
}

/* Slots to choose from, ascending: keys of their scores and where they stand. */
typedef struct candidates {
    uint32_t *key, *slot;
    uint32_t n;
} candidates;

/* Marks the k best of them and no other, k <= n; equal scores keep the newer. */
static void keep_best(const candidates *c, uint32_t k, uint8_t *keep)
{
    uint32_t n_ties = 0;
    const uint32_t least = k == 0 ? UINT32_MAX : kvs_kth_largest(c->key, c->n, k, &n_ties);
    for (uint32_t i = c->n; i-- > 0;) {
        const bool tie = c->key[i] == least && n_ties > 0;
        n_ties -= tie;
        keep[c->slot[i]] = c->key[i] > least || tie;
    }
}

/* The slots of one class, which then leave it. */
static candidates collect(const float *scores, uint8_t *restrict keep, uint32_t n, uint8_t class, uint64_t *scratch)
{
    uint32_t *const key = (uint32_t *)(void *)scratch, *const slot = key + n, n_found = 0;
    for (uint32_t i = 0; i < n; i++)
        key[i] = ordered(scores[i]);
    for (uint32_t i = 0; i < n; i++) {
        key[n_found] = key[i];
        slot[n_found] = i;
        n_found += keep[i] == class;
    }
    for (uint32_t i = 0; i < n; i++)
        keep[i] &= CLASS_HARD;
    return (candidates){key, slot, n_found};
}

/* ---- the choice ---- */

/* Classifies every slot: hard-protected, one of the n_markers_max newest template markers, or free. Returns the number
 * of markers. */
static uint32_t classify(const hard *h, const kvs_policy_view *v, uint32_t n_markers_max, uint8_t *restrict class)
{
    const uint8_t *const flags = v->flags, hard_flags = h->flags;
    memset(class, CLASS_FREE, v->n_slots);
    memset(class, CLASS_HARD, h->begin);
    memset(class + h->end, CLASS_HARD, v->n_slots - h->end);
    if (flags == NULL)
        return 0;
    const uint32_t end = hard_flags != 0 ? h->end : 0;
    for (uint32_t i = h->begin; i < end; i++)
        class[i] = (flags[i] & hard_flags) != 0 ? CLASS_HARD : CLASS_FREE;
    uint32_t n = 0;
    for (uint32_t i = h->end; i-- > h->begin && n < n_markers_max;)
        if (class[i] == CLASS_FREE && flags[i] & KVS_TOKEN_TEMPLATE) {
            class[i] = CLASS_MARKER;
            n++;
        }
    return n;
}

kvs_status kvs_protected_fit(const kvs_protect *protect, const kvs_policy_view *view, uint32_t n_keep, kvs_error *err)
{
    const uint32_t n_hard = kvs_protected_count(protect, view);
    if (n_hard <= n_keep)
        return KVS_OK;
    return kvs_error_set(err, KVS_EBUDGET,
                         "%u tokens are protected (sinks %u, recent %u%s%s) but only %u may stay; raise the budget "
                         "or use +protect=none",
                         n_hard, protect->sinks, protect->recent, protect->system ? ", system" : "",
                         protect->pinned ? ", pinned" : "", n_keep);
}

kvs_status kvs_select(const kvs_protect *protect, const kvs_policy_view *view, const float *scores, uint32_t n_keep,
                      uint8_t *keep, uint64_t *scratch, kvs_error *err)
{
    const uint32_t n = view->n_slots;
    if (n_keep >= n) {
        memset(keep, 1, n);
        return KVS_OK;
    }
    KVS_TRY(kvs_protected_fit(protect, view, n_keep, err));
    const hard h = hard_of(protect, view);
    const uint32_t n_hard = count_hard(&h, view);
    const uint32_t n_markers = classify(&h, view, protect->template_markers ? n_keep / 8 : 0, keep);
    const uint32_t left = n_keep - n_hard;
    if (n_markers > left) {
        const candidates markers = collect(scores, keep, n, CLASS_MARKER, scratch);
        keep_best(&markers, left, keep);
        return KVS_OK;
    }
    const candidates free = collect(scores, keep, n, CLASS_FREE, scratch);
    keep_best(&free, left - n_markers, keep);
    return KVS_OK;
}

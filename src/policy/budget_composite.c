/* KVCompose's sharing: a layer's curve is the mean over its heads of their scores in falling order (the r-th "composite
 * token"), and one threshold over all layers' curves says how many each layer keeps; its heads keep equally many, each its own.
 * Source: arXiv:2509.05165. first=1 raises layer 0's curve to the largest of all layers, as the reference does because its cache
 * takes its length from there. */
#include "policy/policy.h"

#include <string.h>

static const kvs_param_info params_info[] = {
    {"first", "1: layer 0 keeps at least as many as any other, as the reference does", 0, 0, 1},
};

/* Falling order, in place: scratch is all there is. */
static void sort_keys(uint32_t *key, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++) /* a heap with the least at its root */
        for (uint32_t at = i; at > 0 && key[at] < key[(at - 1) / 2]; at = (at - 1) / 2) {
            const uint32_t t = key[at];
            key[at] = key[(at - 1) / 2];
            key[(at - 1) / 2] = t;
        }
    for (uint32_t end = n; end-- > 1;) {
        const uint32_t least = key[0];
        key[0] = key[end];
        key[end] = least;
        for (uint32_t at = 0, next; (next = 2 * at + 1) < end; at = next) {
            next += next + 1 < end && key[next + 1] < key[next];
            if (key[at] <= key[next])
                break;
            const uint32_t t = key[at];
            key[at] = key[next];
            key[next] = t;
        }
    }
}

/* What kvs_score_key was given, -0 as 0 and NaN as the least. */
static float score_of(uint32_t key)
{
    const uint32_t bits = key >= 0x80000000u ? key - 0x80000000u : (0x80000000u - key) | 0x80000000u;
    float x;
    memcpy(&x, &bits, sizeof x);
    return key == 0 ? -__builtin_inff() : x;
}

/* The curve of one layer into keys [n]; returns its length: slots that all heads have. */
static uint32_t layer_curve(const kvs_budget_view *v, uint32_t layer, uint32_t *keys)
{
    const uint32_t first = layer * v->n_kv_heads;
    uint32_t n = v->n_slots[first];
    for (uint32_t h = first; h < first + v->n_kv_heads; h++) {
        uint32_t *const own = keys + (h - first) * v->stride;
        n = kvs_min_u32(n, v->n_slots[h]);
        for (uint32_t i = 0; i < v->n_slots[h]; i++)
            own[i] = kvs_score_key(v->scores[h * v->stride + i]);
        sort_keys(own, v->n_slots[h]);
    }
    for (uint32_t r = 0; r < n; r++) {
        double sum = 0;
        for (uint32_t h = 0; h < v->n_kv_heads; h++)
            sum += (double)score_of(keys[h * v->stride + r]);
        keys[r] = kvs_score_key((float)(sum / v->n_kv_heads));
    }
    return n;
}

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    const uint32_t heads = v->n_kv_heads;
    uint32_t n = 0, total = 0, longest = 0;
    for (uint32_t l = 0; l < v->n_layers; l++) {
        uint32_t *const curve =
            v->keys + n; /* never beyond the heads before: each layer leaves at most stride behind */
        uint32_t *const work = v->keys + (size_t)l * heads * v->stride;
        const uint32_t length = layer_curve(v, l, work);
        memmove(curve, work, length * sizeof *curve);
        n_keep[l * heads] = length;
        n += length;
        longest = kvs_max_u32(longest, length);
        total += kvs_min_u32(v->n_even[l * heads], length);
    }
    if (total == 0)
        return;
    for (uint32_t r = 0; params[0] != 0 && r < n_keep[0]; r++)
        for (uint32_t l = 1, at = n_keep[0]; l < v->n_layers; at += n_keep[l * heads], l++)
            if (r < n_keep[l * heads] && v->keys[at + r] > v->keys[r])
                v->keys[r] = v->keys[at + r];
    uint32_t n_ties;
    const uint32_t least = kvs_kth_largest(v->keys, n, total, &n_ties);
    for (uint32_t l = v->n_layers; l-- > 0;) {
        const uint32_t length = n_keep[l * heads];
        uint32_t kept = 0;
        n -= length;
        for (uint32_t r = 0; r < length; r++) {
            const bool tie = v->keys[n + r] == least && n_ties > 0;
            n_ties -= tie;
            kept += v->keys[n + r] > least || tie;
        }
        for (uint32_t h = 0; h < heads; h++)
            n_keep[l * heads + h] = kept;
    }
}

const kvs_budget_ops kvs_budget_composite = {
    .info = {.name = "composite",
             .doc = "layers share the room by the mean curve of their heads' ranked scores",
             .source = "arXiv:2509.05165",
             .exactness = "exact up to 16 even shares a head",
             .params = params_info,
             .n_params = 1},
    .scope = KVS_SCOPE_LAYER,
    .by_score = true,
    .share_max = 16,
    .allocate = allocate,
};

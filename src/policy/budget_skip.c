/* The lowest layers are left alone, the others share what room is left evenly. Source: the skip_layers of Devoto et al.'s
 * repository (arXiv:2406.11430; layers 0 and 1 there), where such layers keep everything and memory has no cap. Under a
 * cap they cannot for ever: a layer of theirs keeps what it holds up to four even shares, and all of them together take
 * at most half of the room (both bounds are ours). The sum is that of the even shares; heads of a layer keep equal
 * numbers. */
#include "policy/policy.h"

enum { SHARE_MAX = 4 };

static const kvs_param_info params_info[] = {
    {"layers", "lowest layers that are left alone", 2, 0, 1024},
};

/* Deals room (slots of one head of each layer) out to layers [begin, end) as evenly as it goes, a layer getting what it
 * holds at most, and n_shares even shares at most unless 0. Returns what could not be placed. */
static uint64_t deal(const kvs_budget_view *v, uint32_t begin, uint32_t end, uint64_t room, uint32_t n_shares,
                     uint32_t *n_keep)
{
    for (uint32_t l = begin; l < end; l++) {
        const uint32_t first = l * v->n_kv_heads, n_left = end - l;
        uint64_t most = v->n_slots[first];
        if (n_shares != 0 && most > (uint64_t)v->n_even[first] * n_shares)
            most = (uint64_t)v->n_even[first] * n_shares;
        const uint64_t fair = (room + n_left - 1) / n_left, given = fair < most ? fair : most;
        for (uint32_t h = first; h < first + v->n_kv_heads; h++)
            n_keep[h] = (uint32_t)given;
        room -= given;
    }
    return room;
}

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    const uint32_t n_skipped = kvs_min_u32((uint32_t)params[0], v->n_layers);
    uint64_t room = 0, even = 0;
    for (uint32_t l = 0; l < v->n_layers; l++) {
        room += v->n_even[l * v->n_kv_heads];
        even += l < n_skipped ? v->n_even[l * v->n_kv_heads] : 0;
    }
    /* Half of the room, unless the even shares of these layers are more already. */
    const uint64_t half = room / 2 > even ? room / 2 : even;
    const uint64_t left = deal(v, 0, n_skipped, half, SHARE_MAX, n_keep);
    deal(v, n_skipped, v->n_layers, room - half + left, 0, n_keep);
}

const kvs_budget_ops kvs_budget_skip = {
    .info = {.name = "skip",
             .doc = "the lowest layers are left alone as far as there is room",
             .source = "arXiv:2406.11430",
             .exactness = "exact while the lowest layers hold at most four even shares and half of the room",
             .params = params_info,
             .n_params = 1},
    .scope = KVS_SCOPE_LAYER,
    .share_max = SHARE_MAX,
    .allocate = allocate,
};

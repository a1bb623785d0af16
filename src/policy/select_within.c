/* The same share of every stretch of the conversation: within each run of `length` tokens the best stay, so that
 * none is emptied by another. Source: kvpress's ChunkPress, 1024 tokens. Deviations: scores are those of one look
 * at everything held, not of a chunk alone; a stretch pays at every eviction, where there each chunk is pruned
 * once; what the shares' rounding leaves goes to the newest stretches, a slot each, so that the budget is used. */
#include "policy/policy.h"

#include <string.h>

static const kvs_param_info params_info[] = {
    {"length", "tokens of a stretch", 1024, 1, 1e9},
};

static void units(const double *params, const kvs_policy_view *view, uint32_t *unit)
{
    const int32_t length = (int32_t)params[0];
    for (uint32_t i = 0; i < view->n_slots; i++)
        unit[i] = (uint32_t)(view->pos[i] / length);
}

/* Slots [begin, begin + n) as a head of their own. */
static kvs_policy_view part_of(const kvs_policy_view *view, uint32_t begin, uint32_t n)
{
    kvs_policy_view part = *view;
    part.n_slots = n;
    part.pos += begin;
    if (view->flags != NULL)
        part.flags += begin;
    return part;
}

static uint32_t unit_length(const uint32_t *unit, uint32_t begin, uint32_t n)
{
    uint32_t end = begin;
    while (end < n && unit[end] == unit[begin])
        end++;
    return end - begin;
}

/* Slots of unprotected ones that the shares, rounded down, leave over. */
static uint32_t rest_of(const kvs_protect *protect, const kvs_policy_view *view, const uint32_t *unit, uint32_t n_left,
                        uint32_t n_free)
{
    uint32_t rest = n_left;
    for (uint32_t at = 0, n; at < view->n_slots; at += n) {
        n = unit_length(unit, at, view->n_slots);
        const kvs_policy_view part = part_of(view, at, n);
        rest -= (uint32_t)((uint64_t)n_left * (n - kvs_protected_count(protect, &part)) / n_free);
    }
    return rest;
}

static uint32_t count_units(const kvs_protect *protect, const kvs_policy_view *view, const uint32_t *unit)
{
    uint32_t n_units = 0;
    for (uint32_t at = 0, n; at < view->n_slots; at += n) {
        n = unit_length(unit, at, view->n_slots);
        const kvs_policy_view part = part_of(view, at, n);
        n_units += kvs_protected_count(protect, &part) < n;
    }
    return n_units;
}

static kvs_status choose(const kvs_protect *protect, const kvs_policy_view *view, const float *scores,
                         const uint32_t *unit, uint32_t n_keep, uint8_t *keep, uint64_t *scratch, kvs_error *err)
{
    if (n_keep >= view->n_slots) {
        memset(keep, 1, view->n_slots);
        return KVS_OK;
    }
    KVS_TRY(kvs_protected_fit(protect, view, n_keep, err));
    const uint32_t n_hard = kvs_protected_count(protect, view), n_left = n_keep - n_hard,
                   n_free = view->n_slots - n_hard;
    const uint32_t rest = rest_of(protect, view, unit, n_left, n_free);
    uint32_t n_units = count_units(protect, view, unit); /* that are still to come and can take one more */
    for (uint32_t at = 0, n; at < view->n_slots; at += n) {
        n = unit_length(unit, at, view->n_slots);
        const kvs_policy_view part = part_of(view, at, n);
        const uint32_t hard = kvs_protected_count(protect, &part);
        uint32_t quota = hard + (uint32_t)((uint64_t)n_left * (n - hard) / n_free);
        if (hard < n)
            quota += n_units-- <= rest;
        KVS_TRY(kvs_select(protect, &part, scores + at, quota, keep + at, scratch, err));
    }
    return KVS_OK;
}

const kvs_select_ops kvs_select_within = {
    .info = {.name = "within",
             .doc = "the same share of every stretch of the conversation",
             .source = "NVIDIA/kvpress ChunkPress",
             .exactness = "exact for one eviction by scores that a chunk does not change",
             .params = params_info,
             .n_params = 1},
    .units = units,
    .choose = choose,
};

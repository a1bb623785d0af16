/* Selection by units: chunks, blocks or sentences stay or go whole. */
#include "policy/policy.h"

#include <math.h>
#include <string.h>

/* Mean score of each unit's slots that may go (NaN where all are protected), by unit order; returns the units' number.
 * begin[u] is unit u's first slot, begin[n_units] is n. */
static uint32_t unit_scores(const float *scores, const uint8_t *hard, const uint32_t *unit, uint32_t n, float *score,
                            uint32_t *begin)
{
    uint32_t n_units = 0;
    for (uint32_t i = 0; i < n;) {
        double sum = 0;
        uint32_t n_free = 0;
        begin[n_units] = i;
        const uint32_t id = unit[i];
        for (; i < n && unit[i] == id; i++)
            if (!hard[i]) {
                sum += (double)scores[i];
                n_free++;
            }
        score[n_units++] = n_free == 0 ? NAN : (float)(sum / n_free);
    }
    begin[n_units] = n;
    return n_units;
}

/* Marks units from the best on (keys: 0 for what is not to be chosen, overwritten), as long as they fit into n_left; the first that does not ends it. */
static void keep_best_units(uint32_t *keys, const uint32_t *begin, uint32_t n_units, uint32_t n_left, uint8_t *keep)
{
    for (;;) {
        uint32_t best = UINT32_MAX, best_key = 0;
        for (uint32_t u = 0; u < n_units; u++)
            if (keys[u] != 0 && keys[u] >= best_key) { /* equal: the newer */
                best = u;
                best_key = keys[u];
            }
        if (best == UINT32_MAX)
            return;
        keys[best] = 0;
        uint32_t n_free = 0;
        for (uint32_t i = begin[best]; i < begin[best + 1]; i++)
            n_free += !keep[i];
        if (n_free > n_left)
            return;
        n_left -= n_free;
        memset(keep + begin[best], 1, begin[best + 1] - begin[best]);
    }
}

kvs_status kvs_select_by_units(const kvs_protect *protect, const kvs_policy_view *view, const float *scores,
                               const uint32_t *unit, uint32_t n_keep, uint8_t *keep, uint64_t *scratch, kvs_error *err)
{
    const uint32_t n = view->n_slots;
    if (n_keep >= n) {
        memset(keep, 1, n);
        return KVS_OK;
    }
    /* What is protected, and whether it fits, is kvs_select's to say: a choice among equals that keeps only that. */
    const uint32_t n_hard = kvs_protected_count(protect, view);
    const kvs_protect hard_only = {
        .sinks = protect->sinks, .recent = protect->recent, .system = protect->system, .pinned = protect->pinned};
    if (n_hard == 0)
        memset(keep, 0, n);
    else
        KVS_TRY(kvs_select(&hard_only, view, scores, kvs_min_u32(n_hard, n_keep), keep, scratch, err));
    uint32_t *const begin = (uint32_t *)(void *)scratch, *const keys = begin + n + 1;
    float *const score = (float *)(void *)(keys + n);
    const uint32_t n_units = unit_scores(scores, keep, unit, n, score, begin);
    for (uint32_t u = 0; u < n_units; u++)
        keys[u] = kvs_score_key(score[u]); /* 0 for NaN: nothing to decide */
    keep_best_units(keys, begin, n_units, n_keep - n_hard, keep);
    return KVS_OK;
}

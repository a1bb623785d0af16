/* Selection by the preset's own choose(). A plug-in's list may hold anything: nothing is believed that is not checked. */
#include "policy/policy.h"

#include <string.h>

/* A NaN whose payload no arithmetic makes. */
static const uint32_t guard[KVS_GUARD_WORDS] = {0x7fe5a1d1, 0xffe5a1d2, 0x7fe5a1d3, 0xffe5a1d4};

void kvs_guard_set(void *end)
{
    memcpy(end, guard, sizeof guard);
}

bool kvs_guard_holds(const void *end)
{
    return memcmp(end, guard, sizeof guard) == 0;
}

/* How the list is wrong, at index *at; NULL: it is right. */
static const char *fault_of(const uint32_t *slots, uint32_t n, uint32_t n_slots, uint32_t *at)
{
    for (uint32_t i = 0; i < n; i++) {
        *at = i;
        if (slots[i] >= n_slots)
            return "is out of range";
        if (i > 0 && slots[i] <= slots[i - 1])
            return slots[i] == slots[i - 1] ? "comes twice" : "is not in ascending order";
    }
    return NULL;
}

kvs_status kvs_select_by_policy(const kvs_policy *p, const kvs_policy_view *view, float *scores, uint32_t n_keep,
                                uint8_t *keep, uint32_t *slots, kvs_error *err)
{
    const char *const name = p->ops->name;
    const uint32_t n = view->n_slots, layer = view->layer, head = view->kv_head;
    if (n_keep >= n) {
        memset(keep, 1, n);
        return KVS_OK;
    }
    KVS_TRY(kvs_protected_fit(&p->protect, view, n_keep, err));
    kvs_protected_mark(&p->protect, view, scores);
    kvs_guard_set(slots + n);
    const uint32_t n_kept = p->ops->choose(p->params, view, scores, n_keep, slots);
    if (!kvs_guard_holds(slots + n))
        return kvs_error_set(err, KVS_EPOLICY, "%s, layer %u, KV head %u: choose wrote past the end of its %u slots",
                             name, layer, head, n);
    if (n_kept < 1 || n_kept > n_keep)
        return kvs_error_set(err, KVS_EPOLICY,
                             "%s, layer %u, KV head %u: choose keeps %u of %u slots, must keep 1 to %u", name, layer,
                             head, n_kept, n, n_keep);
    uint32_t at;
    const char *const fault = fault_of(slots, n_kept, n, &at);
    if (fault != NULL)
        return kvs_error_set(err, KVS_EPOLICY,
                             "%s, layer %u, KV head %u: choose gives slot %u at index %u, which %s; slots are 0 to %u, "
                             "ascending, each once",
                             name, layer, head, slots[at], at, fault, n - 1);
    memset(keep, 0, n);
    for (uint32_t i = 0; i < n_kept; i++)
        keep[slots[i]] = 1;
    const uint32_t dropped = kvs_protected_dropped(&p->protect, view, keep);
    if (dropped < n)
        return kvs_error_set(err, KVS_EPOLICY,
                             "%s, layer %u, KV head %u: choose drops slot %u (pos %d), which is protected: all whose "
                             "score is +inf must stay",
                             name, layer, head, dropped, view->pos[dropped]);
    return KVS_OK;
}

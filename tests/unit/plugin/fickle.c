/* Plug-ins that keep the contract until fickle_how says otherwise: what tests/unit/test_plugin.c switches while a session
 * lives. Only layer 1, KV head 2 ever misbehaves. */
#include "fickle.h"

#include <math.h>
#include <stddef.h>

__attribute__((visibility("default"))) int fickle_how;

static bool is_place(const kvs_policy_view *view)
{
    return view->layer == FICKLE_LAYER && view->kv_head == FICKLE_HEAD;
}

/* The newest, as choose() has it too. */
static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = fickle_how == FICKLE_ALL_NAN ? NAN : (float)view->pos[i];
    if (fickle_how == FICKLE_SCORE_OVERRUN && is_place(view))
        scores[view->n_slots] = 1;
}

static uint32_t choose(const double *params, const kvs_policy_view *view, const float *scores, uint32_t n_keep,
                       uint32_t *slots)
{
    (void)params;
    /* The protected ones, then from the end as many as there is room for. */
    const uint32_t n = view->n_slots;
    uint32_t n_hard = 0, n_kept = 0, n_free = 0, n_skip;
    for (uint32_t i = 0; i < n; i++)
        n_hard += scores[i] == INFINITY;
    n_skip = n - n_hard - (n_keep - n_hard);
    for (uint32_t i = 0; i < n; i++)
        if (scores[i] == INFINITY || n_free++ >= n_skip)
            slots[n_kept++] = i;
    if (!is_place(view))
        return n_kept;
    switch (fickle_how) {
    case FICKLE_UNSORTED:
        slots[4] = slots[5] + 1;
        return n_kept;
    case FICKLE_TWICE:
        slots[5] = slots[4];
        return n_kept;
    case FICKLE_OUT_OF_RANGE:
        slots[n_kept - 1] = n;
        return n_kept;
    case FICKLE_TOO_MANY:
        for (uint32_t i = 0; i < n; i++)
            slots[i] = i;
        return n_keep + 1;
    case FICKLE_HUGE_COUNT:
        return UINT32_MAX;
    case FICKLE_NONE:
        return 0;
    case FICKLE_UNPROTECTED:
        for (uint32_t i = 0; i + 1 < n_kept; i++)
            slots[i] = slots[i + 1];
        return n_kept - 1;
    case FICKLE_CHOOSE_OVERRUN:
        slots[n] = n;
        return n_kept;
    default:
        return n_kept;
    }
}

static uint32_t target(const double *params, const kvs_policy_view *view, uint32_t n_default)
{
    (void)params;
    if (fickle_how == FICKLE_TARGET_TOO_MANY && is_place(view))
        return view->n_slots + 1;
    return fickle_how == FICKLE_TARGET_ALL ? view->n_slots : n_default;
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)head_dim;
    return fickle_how == FICKLE_WORK ? SIZE_MAX : n_slots;
}

#define COMMON                                                                                                         \
    .abi = KVS_POLICY_ABI, .doc = "", .source = "", .exactness = "", .schedule = "full", .position = "keep",           \
    .scope = KVS_SCOPE_HEAD, .score = score

static const kvs_policy_ops scorer = {COMMON, .name = "fickle_score", .needs = KVS_POLICY_NEEDS_MASS_SUM,
                                      .work_of = work_of};
static const kvs_policy_ops chooser = {COMMON, .name = "fickle_choose", .choose = choose};
static const kvs_policy_ops prober = {COMMON, .name = "fickle_probe", .needs = KVS_POLICY_NEEDS_PROBE,
                                      .probe = "context:chunk=16", .choose = choose};
static const kvs_policy_ops targeter = {COMMON, .name = "fickle_target", .target = target};

const kvs_policy_ops *kvs_policy_plugin(uint32_t index)
{
    static const kvs_policy_ops *const all[] = {&scorer, &chooser, &targeter, &prober};
    return index < sizeof all / sizeof *all ? all[index] : NULL;
}

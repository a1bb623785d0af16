/* Cascading KV cache: a chain of windows, each taking every second token that leaves the one before, so that the reach grows
 * exponentially at a fixed size. Source: Willette et al., arXiv:2406.17808 and its repository: the token that leaves window i
 * at step t enters window i + 1 if t is a multiple of 2^(i + 1) or that window is not full; else it or the newest token there is
 * dropped, whichever has the lower moving average of attention. Positions are counted in the cache (rerotate).
 * What is kept, in order, is the sinks, then the windows from the last to the first, each `(keep - sinks) / cascades` long, so
 * that nothing but the order has to be remembered. Deviations: nothing is dropped while there is room in any window (the repository fills each window at its own
 * rate); the moving average forgets within about 20 queries (the
 * repository: 1e4 to 1e7); several tokens that came between two evictions go in one after the other, but share their averages. */
#include "policy/policy.h"

#include <string.h>

static const kvs_param_info params_info[] = {
    {"cascades", "windows in the chain; 1 is StreamingLLM", 4, 1, 16},
    {"sinks", "first tokens that stay", 4, 0, 1e6},
};

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)head_dim;
    return n_slots;
}

/* list [n]: slots held behind the sinks, oldest first, one more than there is room for; window: length of one. Index in the
 * list of the one to drop now that the token of step t came in. */
static uint32_t choose_one(const kvs_policy_view *view, const uint32_t *list, uint32_t n, uint32_t window,
                           uint32_t n_windows, uint64_t t)
{
    for (uint32_t i = 1; i < n_windows; i++) {
        const uint32_t leaves = n - 1 - i * window; /* the oldest of window i - 1 */
        if (t % ((uint64_t)1 << i) == 0)
            continue; /* it enters window i, whose oldest leaves */
        return view->mass_ema[list[leaves]] < view->mass_ema[list[leaves - 1]] ? leaves : leaves - 1;
    }
    return 0;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    uint32_t *const list = (uint32_t *)(void *)view->work, n = 0, n_sinks = 0, dropped = 0;
    while (n_sinks < view->n_slots && view->pos[n_sinks] < (int32_t)params[1])
        n_sinks++;
    const uint32_t n_windows = (uint32_t)params[0];
    const uint32_t room = view->n_keep > n_sinks + n_windows ? view->n_keep - n_sinks : n_windows;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = 2e9f;
    for (uint32_t i = n_sinks; i < view->n_slots; i++) {
        list[n++] = i;
        if (n <= room)
            continue;
        /* In the order in which they came: what goes first is worth least. */
        const uint32_t at = choose_one(view, list, n, room / n_windows, n_windows, (uint64_t)view->pos[i]);
        scores[list[at]] = (float)dropped++;
        memmove(list + at, list + at + 1, (n - at - 1) * sizeof *list);
        n--;
    }
}

const kvs_policy_ops kvs_policy_cascading = {
    .abi = KVS_POLICY_ABI,
    .name = "cascading",
    .doc = "a chain of windows, each taking every second token of the one before",
    .source = "arXiv:2406.17808",
    .exactness = "exact with +protect=none +schedule=step, except how fast attention is forgotten and that nothing "
                 "goes while there is room",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_MASS_EMA,
    .params = params_info,
    .n_params = 2,
    .score = score,
    .work_of = work_of,
};

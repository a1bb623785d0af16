/* SnapKV: the mean attention that the newest rows (the observation window) give each slot, smoothed over neighbours; the
 * window itself stays. Source: Li et al., arXiv:2404.14469; window 64, average pooling of 5 and the mean over the group's heads
 * as kvpress's SnapKVPress (the paper's repository: window 32, kernel 5 to 7, average or maximum).
 * Below it, the methods that are SnapKV with another stage: AdaKV (arXiv:2407.11550), PyramidKV (arXiv:2406.02069), CriticalKV
 * and CriticalAdaKV (arXiv:2502.03805), and ChunkKV (arXiv:2502.00299: no pooling, one set for the heads of a layer). */
#include "policy/policy.h"

#include <math.h>

enum { N_PARAMS = 3 };

#define SNAPKV_PARAMS(kernel)                                                                                          \
    {                                                                                                                  \
        {"window", "rows of the observation window", 64, 1, KVS_POLICY_WINDOW_MAX},                                    \
            {"kernel", "slots pooled, odd", kernel, 1, 1023},                                                          \
            {"max", "1: the largest of the neighbours instead of their mean", 0, 0, 1},                                \
    }
static const kvs_param_info pooled[] = SNAPKV_PARAMS(5), single[] = SNAPKV_PARAMS(1);

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[0];
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)head_dim;
    return n_slots;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    /* The window's own slots take no part in the pooling, as in kvpress: they are kept, not compared. */
    const uint32_t n_window = kvs_window_slots(view), n = view->n_slots - n_window;
    const uint32_t kernel = (uint32_t)params[1] | 1u;
    kvs_window_mean(view, view->work);
    if (params[2] != 0)
        kvs_pool_max(view->work, n, kernel, scores);
    else
        kvs_pool_average(view->work, n, kernel, scores);
    for (uint32_t i = n; i < view->n_slots; i++)
        scores[i] = INFINITY;
}

/* What all of them are. */
#define SNAPKV                                                                                                         \
    .abi = KVS_POLICY_ABI, .schedule = "full", .position = "keep", .needs = KVS_POLICY_NEEDS_WINDOW,                   \
    .n_params = N_PARAMS, .score = score, .window_of = window_of, .work_of = work_of

#define IN_A_BUDGET "; in a budget the window is the newest rows that ran"

const kvs_policy_ops kvs_policy_snapkv = {
    SNAPKV,
    .name = "snapkv",
    .doc = "what the newest rows attend to, smoothed over neighbours",
    .source = "arXiv:2404.14469",
    .exactness = "exact with +protect=none +schedule=after_prefill" IN_A_BUDGET,
    .scope = KVS_SCOPE_HEAD,
    .params = pooled,
};

const kvs_policy_ops kvs_policy_adakv = {
    SNAPKV,
    .name = "adakv",
    .doc = "snapkv, the heads of a layer sharing its room by one threshold",
    .source = "arXiv:2407.11550",
    .exactness = "exact with +protect=none +schedule=after_prefill" IN_A_BUDGET,
    .budget = "ada",
    .scope = KVS_SCOPE_HEAD,
    .params = pooled,
};

const kvs_policy_ops kvs_policy_pyramidkv = {
    SNAPKV,
    .name = "pyramidkv",
    .doc = "snapkv, low layers keeping more than high ones",
    .source = "arXiv:2406.02069",
    .exactness = "exact apart from rounding, with +protect=none +schedule=after_prefill" IN_A_BUDGET,
    .budget = "pyramid",
    .scope = KVS_SCOPE_HEAD,
    .params = pooled,
};

const kvs_policy_ops kvs_policy_criticalkv = {
    SNAPKV,
    .name = "criticalkv",
    .doc = "snapkv, half of the room going by what the values become behind the output projection",
    .source = "arXiv:2502.03805",
    .exactness = "exact with +protect=none +schedule=after_prefill" IN_A_BUDGET,
    .rescore = "critical",
    .scope = KVS_SCOPE_HEAD,
    .params = pooled,
};

const kvs_policy_ops kvs_policy_critical_adakv = {
    SNAPKV,
    .name = "critical-adakv",
    .doc = "adakv, half of each head's room going by what the values become behind the output projection",
    .source = "arXiv:2502.03805",
    .exactness = "exact with +protect=none +schedule=after_prefill" IN_A_BUDGET,
    .rescore = "critical",
    .budget = "ada",
    .scope = KVS_SCOPE_HEAD,
    .params = pooled,
};

const kvs_policy_ops kvs_policy_chunkkv = {
    SNAPKV,
    .name = "chunkkv",
    .doc = "what the newest rows attend to, whole chunks of ten, one set a layer",
    .source = "arXiv:2502.00299",
    .exactness =
        "exact with +protect=none +schedule=after_prefill, but a chunk that the window reaches into stays whole",
    .select = "chunk:length=10",
    .scope = KVS_SCOPE_LAYER,
    .params = single,
};

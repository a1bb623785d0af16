/* HAE's eviction while decoding, as a port to text. Source: "Hierarchical Adaptive Eviction", arXiv:2602.02197, a
 * method for images and text whose code and thresholds are not published. What exceeds the cache's bound, least
 * attended first, is marked for a recycle bin; the bin is emptied in one batch when it holds more than `bin`; a
 * slot whose attention recovers before is taken out again. Reconstructed: a marked slot goes on being attended to,
 * since it could not recover otherwise, so marks show only when the bin is emptied: what is least attended then
 * goes. bin 64 is ours, the slots of a page. The paper's pruning of prompts (one index set, from the first layer's
 * attention, for all layers) is `observed_attention +select=chunk:length=1,reuse=1024 +schedule=after_prefill`,
 * without its second criterion. */
#include "policy/policy.h"

#include <string.h>

static const kvs_param_info params_info[] = {
    {"bin", "marked slots that wait; 0: none does", 64, 0, 1e9},
};

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    memcpy(scores, view->mass_sum, view->n_slots * sizeof *scores);
}

static uint32_t target(const double *params, const kvs_policy_view *view, uint32_t n_default)
{
    const uint32_t n_marked = view->n_slots > n_default ? view->n_slots - n_default : 0;
    return n_marked > (uint32_t)params[0] ? n_default : view->n_slots;
}

const kvs_policy_ops kvs_policy_hae = {
    .abi = KVS_POLICY_ABI,
    .name = "hae",
    .doc = "the least attended wait in a bin that is emptied at once",
    .source = "arXiv:2602.02197",
    .exactness = "reconstructed: port to text; thresholds and the bin's size are not published, marked "
                 "slots stay attended; the bin works with +schedule=step",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_LAYER,
    .needs = KVS_POLICY_NEEDS_MASS_SUM,
    .params = params_info,
    .n_params = 1,
    .score = score,
    .target = target,
};

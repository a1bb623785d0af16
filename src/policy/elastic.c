/* Elastic Cache (arXiv:2407.18121), a method for images and text, on a prompt: what it attends to least by the sum
 * over its rows joins the kept slot that stands nearest, in all heads of a layer alike. The first 4 tokens and the
 * last stay, a fifth goes (its run script's ratio). Where its code is at odds with itself the paper's meaning is
 * taken: ranks, not the order of a sort, decide, and every index counts the first tokens. Deviations: keys are
 * averaged before rotation (dispose_nearest.c); its rule for decoding, one slot a step at a fixed index, is not
 * here: while the answer grows only a full budget evicts, by the same score. */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"start", "first tokens that stay", 4, 0, 1e6},
};

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = view->pos[i] < (int32_t)params[0] || i + 1 == view->n_slots ? INFINITY : view->mass_sum[i];
}

const kvs_policy_ops kvs_policy_elastic = {
    .abi = KVS_POLICY_ABI,
    .name = "elastic",
    .doc = "the least attended of a prompt join the nearest that stay",
    .source = "arXiv:2407.18121",
    .exactness =
        "the prompt's part, with +protect=none +schedule=after_prefill --prefill full; keys are averaged before "
        "rotation, and the rule for decoding is not here",
    .schedule = "full",
    .position = "keep",
    .dispose = "nearest:keys=1",
    .scope = KVS_SCOPE_LAYER,
    .needs = KVS_POLICY_NEEDS_MASS_SUM,
    .keep = "0.8",
    .params = params_info,
    .n_params = 1,
    .score = score,
};

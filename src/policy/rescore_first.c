/* The first score that a slot gets stays its own: for methods that judge a token when it is new (kvpress's
 * DMSPress with +budget=threshold). First means at the first eviction that was carried out after the token came
 * in; a score that is infinite or NaN says nothing about the slot and is asked for again. */
#include "policy/policy.h"

#include <math.h>

static void rescore(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    for (uint32_t i = 0; i < view->n_slots; i++) {
        if (signbit(view->carry[i]) || view->carry[i] != 0)
            scores[i] = view->carry[i];
        else if (isfinite(scores[i]))
            view->carry[i] = scores[i] == 0 ? -0.0f : scores[i]; /* 0 is a slot that was never asked */
    }
}

const kvs_rescore_ops kvs_rescore_first = {
    .info = {.name = "first",
             .doc = "a slot keeps the score it got first",
             .source = "NVIDIA/kvpress DMSPress",
             .exactness = "exact with +schedule=step, but for events that drop nothing"},
    .needs = KVS_POLICY_NEEDS_CARRY,
    .any_score = true,
    .rescore = rescore,
};

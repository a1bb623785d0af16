/* Keep what attention looks at least: a control. Source: arXiv 2511.04686's script, "AttentionBottom": importance is the attention mass of the
 * latest forward only, averaged over layers and heads, one set for all (acc=0, scope=0, norm=0). The other choices are
 * Kvasir's, to separate the causes: mass summed since the slot was written (acc=1, as H2O), its moving average (acc=2),
 * its maximum (acc=3); divided by the queries that could see the slot (norm=1, as kvpress's ObservedAttention); one set a
 * layer or a head (scope=1, 2). */
#include "policy/policy.h"
#include "policy/attention_mass.h"

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    kvs_attention_mass_scores(params, view, scores);
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = -scores[i];
}

const kvs_policy_ops kvs_policy_attention_bottom = {
    .abi = KVS_POLICY_ABI,
    .name = "attention_bottom",
    .doc = "keep the share with the least attention (control)",
    .source = "arXiv:2511.04686",
    .exactness = "exact with +protect=none",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_SHARED,
    .keep = "0.7",
    .params = kvs_attention_mass_params,
    .n_params = 3,
    .signed_scores = true,
    .score = score,
    .needs_of = kvs_attention_mass_needs,
    .scope_of = kvs_attention_mass_scope,
};

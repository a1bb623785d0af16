/* Scores by attention mass: which accumulator, how normalised, who shares a keep set. */
#include "policy/attention_mass.h"

enum { ACC_LAST = 0, ACC_SUM = 1, ACC_EMA = 2, ACC_MAX = 3 };

const kvs_param_info kvs_attention_mass_params[3] = {
    {"acc", "mass of: 0 the latest forward, 1 all so far, 2 moving average, 3 maximum", ACC_LAST, 0, 3},
    {"norm", "1: divided by the number of queries that could see the slot", 0, 0, 1},
    {"scope", "one keep set for 0 all, 1 a layer, 2 a head", 0, 0, 2},
};

uint32_t kvs_attention_mass_needs(const double *params)
{
    switch ((int)params[0]) {
    case ACC_SUM:
        return KVS_POLICY_NEEDS_MASS_SUM;
    case ACC_EMA:
        return KVS_POLICY_NEEDS_MASS_EMA;
    case ACC_MAX:
        return KVS_POLICY_NEEDS_MASS_MAX;
    default:
        return KVS_POLICY_NEEDS_MASS_LAST;
    }
}

kvs_policy_scope kvs_attention_mass_scope(const double *params)
{
    return (kvs_policy_scope)(int)params[2];
}

void kvs_attention_mass_scores(const double *params, const kvs_policy_view *view, float *scores)
{
    const int acc = (int)params[0];
    const float *mass = acc == ACC_EMA ? view->mass_ema : acc == ACC_MAX ? view->mass_max : view->mass_sum;
    const bool norm = params[1] != 0;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = norm ? mass[i] / (float)(view->n_tokens - view->pos[i]) : mass[i];
}

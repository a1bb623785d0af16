/* Scores by attention mass, shared by attention_top and attention_bottom. */
#ifndef KVS_ATTENTION_MASS_H
#define KVS_ATTENTION_MASS_H

#include "policy/policy.h"

extern const kvs_param_info kvs_attention_mass_params[3]; /* acc, norm, scope */
void kvs_attention_mass_scores(const double *params, const kvs_policy_view *view, float *scores);
uint32_t kvs_attention_mass_needs(const double *params);
kvs_policy_scope kvs_attention_mass_scope(const double *params);

#endif

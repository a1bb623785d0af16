/* The only list of policies. CLI, server, bench and tests walk it, so that a new method is one file and one line. */
#include "policy/policy.h"

#include <stdio.h>
#include <string.h>

#define KVS_POLICIES(X)                                                                                                \
    X(baseline)                                                                                                        \
    X(evict_oldest)                                                                                                    \
    X(attention_top)                                                                                                   \
    X(attention_bottom)                                                                                                \
    X(random)                                                                                                          \
    X(sliding_window)                                                                                                  \
    X(sliding_window_gist)                                                                                             \
    X(sliding_window_gist_attentive)                                                                                   \
    X(streaming)                                                                                                       \
    X(llama_context_shift)

#define KVS_POLICY_DECLARE(name) extern const kvs_policy_ops kvs_policy_##name;
KVS_POLICIES(KVS_POLICY_DECLARE)
#define KVS_POLICY_ENTRY(name) &kvs_policy_##name,
static const kvs_policy_ops *const policies[] = {KVS_POLICIES(KVS_POLICY_ENTRY)};

enum { N_POLICIES = sizeof policies / sizeof *policies };

const kvs_policy_ops *kvs_policy_at(uint32_t index)
{
    return index < N_POLICIES ? policies[index] : NULL;
}

const kvs_policy_ops *kvs_policy_find(const char *name)
{
    for (uint32_t i = 0; i < N_POLICIES; i++)
        if (strcmp(policies[i]->name, name) == 0)
            return policies[i];
    return NULL;
}

uint32_t kvs_policy_count(void)
{
    return N_POLICIES;
}

/* With the parameters' defaults. */
static const char *needs_text(const kvs_policy_ops *ops)
{
    double params[KVS_POLICY_PARAMS_MAX] = {0};
    for (uint32_t i = 0; i < ops->n_params; i++)
        params[i] = ops->params[i].value;
    const uint32_t needs = ops->needs | (ops->needs_of == NULL ? 0 : ops->needs_of(params));
    if (needs & KVS_POLICY_NEEDS_MASS_EMA)
        return "attention mass, moving average";
    if (needs & KVS_POLICY_NEEDS_MASS_SUM)
        return "attention mass, sum";
    if (needs & KVS_POLICY_NEEDS_MASS_MAX)
        return "attention mass, maximum";
    return needs & KVS_POLICY_NEEDS_MASS_LAST ? "attention mass of the latest forward" : "nothing";
}

bool kvs_policy_get_info(uint32_t index, kvs_policy_info *info)
{
    static _Thread_local char stages[256];
    const kvs_policy_ops *ops = kvs_policy_at(index);
    if (ops == NULL)
        return false;
    static const char *const scopes[] = {"shared", "layer", "head"};
    snprintf(stages, sizeof stages,
             "schedule=%s score=%s budget=uniform select=top-k(%s) keep=%s dispose=drop "
             "position=%s",
             ops->schedule, ops->name, scopes[ops->scope],
             ops->never_evicts   ? "all"
             : ops->keep != NULL ? ops->keep
                                 : "budget-chunk",
             ops->position);
    *info = (kvs_policy_info){
        .name = ops->name,
        .doc = ops->doc,
        .source = ops->source,
        .exactness = ops->exactness,
        .stages = stages,
        .needs = needs_text(ops),
        .params = ops->params,
        .n_params = ops->n_params,
    };
    return true;
}

kvs_status kvs_policy_check(const char *spec, kvs_error *err)
{
    kvs_policy p;
    if (spec == NULL)
        return kvs_error_set(err, KVS_EINVAL, "policy spec is NULL: write one, as streaming:sinks=4");
    return kvs_policy_parse(spec, NULL, false, &p, err);
}

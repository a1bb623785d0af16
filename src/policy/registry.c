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
    X(llama_context_shift)                                                                                             \
    X(snapkv)                                                                                                          \
    X(h2o)                                                                                                             \
    X(knorm)                                                                                                           \
    X(kvzip)                                                                                                           \
    X(kvzip_plus)                                                                                                      \
    X(kvcompose)                                                                                                       \
    X(kvcompose_ragged)                                                                                                \
    X(laq)                                                                                                             \
    X(laqpp)                                                                                                           \
    X(tova)                                                                                                            \
    X(sage_kv)                                                                                                         \
    X(scissorhands)                                                                                                    \
    X(finch)                                                                                                           \
    X(r_kv)                                                                                                            \
    X(skipkv)                                                                                                          \
    X(g_kv)                                                                                                            \
    X(obcache_v)                                                                                                       \
    X(obcache_k)                                                                                                       \
    X(obcache_vk)                                                                                                      \
    X(caote)                                                                                                           \
    X(fastcaote)                                                                                                       \
    X(dbudgetkv)                                                                                                       \
    X(simlayerkv)                                                                                                      \
    X(observed_attention)                                                                                              \
    X(adakv)                                                                                                           \
    X(pyramidkv)                                                                                                       \
    X(criticalkv)                                                                                                      \
    X(critical_adakv)                                                                                                  \
    X(chunkkv)                                                                                                         \
    X(keydiff)                                                                                                         \
    X(lagkv)                                                                                                           \
    X(expected_attention)                                                                                              \
    X(cap)                                                                                                             \
    X(cur)                                                                                                             \
    X(leverage)                                                                                                        \
    X(non_causal_attention)                                                                                            \
    X(compactor)                                                                                                       \
    X(qfilter)                                                                                                         \
    X(cascading)                                                                                                       \
    X(hae)                                                                                                             \
    X(elastic)                                                                                                         \
    X(squeezeattention)                                                                                                \
    X(baklava)                                                                                                         \
    X(duo)                                                                                                             \
    X(prulong)                                                                                                         \
    X(kvzip_head)                                                                                                      \
    X(lukv)                                                                                                            \
    X(epicache)

#define KVS_PROBES(X)                                                                                                  \
    X(repeat)                                                                                                          \
    X(context)                                                                                                         \
    X(lookahead)                                                                                                       \
    X(prompt)                                                                                                          \
    X(extract)

#define KVS_RESCORES(X)                                                                                                \
    X(caote)                                                                                                           \
    X(obcache_v)                                                                                                       \
    X(critical)                                                                                                        \
    X(first)

#define KVS_BUDGETS(X)                                                                                                 \
    X(pyramid)                                                                                                         \
    X(ada)                                                                                                             \
    X(global)                                                                                                          \
    X(composite)                                                                                                       \
    X(skip)                                                                                                            \
    X(threshold)                                                                                                       \
    X(squeeze)                                                                                                         \
    X(baklava)                                                                                                         \
    X(sensitivity)                                                                                                     \
    X(layers)                                                                                                          \
    X(roles)                                                                                                           \
    X(lukv)

#define KVS_SELECTS(X)                                                                                                 \
    X(chunk)                                                                                                           \
    X(block)                                                                                                           \
    X(sentence)                                                                                                        \
    X(within)                                                                                                          \
    X(unrepeated)

#define KVS_DISPOSES(X)                                                                                                \
    X(merge)                                                                                                           \
    X(cam)                                                                                                             \
    X(nearest)

#define KVS_POLICY_DECLARE(name) extern const kvs_policy_ops kvs_policy_##name;
KVS_POLICIES(KVS_POLICY_DECLARE)
#define KVS_POLICY_ENTRY(name) &kvs_policy_##name,
static const kvs_policy_ops *const policies[] = {KVS_POLICIES(KVS_POLICY_ENTRY)};

enum { N_POLICIES = sizeof policies / sizeof *policies };

#define KVS_PROBE_DECLARE(name) extern const kvs_probe_ops kvs_probe_##name;
#define KVS_PROBE_ENTRY(name)   &kvs_probe_##name,
KVS_PROBES(KVS_PROBE_DECLARE)
static const kvs_probe_ops *const probes[] = {KVS_PROBES(KVS_PROBE_ENTRY)};

const kvs_probe_ops *kvs_probe_at(uint32_t index)
{
    return index < sizeof probes / sizeof *probes ? probes[index] : NULL;
}

#define KVS_RESCORE_DECLARE(name) extern const kvs_rescore_ops kvs_rescore_##name;
#define KVS_RESCORE_ENTRY(name)   &kvs_rescore_##name,
#define KVS_BUDGET_DECLARE(name)  extern const kvs_budget_ops kvs_budget_##name;
#define KVS_BUDGET_ENTRY(name)    &kvs_budget_##name,
#define KVS_SELECT_DECLARE(name)  extern const kvs_select_ops kvs_select_##name;
#define KVS_SELECT_ENTRY(name)    &kvs_select_##name,
KVS_RESCORES(KVS_RESCORE_DECLARE)
KVS_BUDGETS(KVS_BUDGET_DECLARE)
KVS_SELECTS(KVS_SELECT_DECLARE)
static const kvs_rescore_ops *const rescores[] = {KVS_RESCORES(KVS_RESCORE_ENTRY)};
static const kvs_budget_ops *const budgets[] = {KVS_BUDGETS(KVS_BUDGET_ENTRY)};
static const kvs_select_ops *const selects[] = {KVS_SELECTS(KVS_SELECT_ENTRY)};

const kvs_rescore_ops *kvs_rescore_at(uint32_t index)
{
    return index < sizeof rescores / sizeof *rescores ? rescores[index] : NULL;
}

const kvs_budget_ops *kvs_budget_at(uint32_t index)
{
    return index < sizeof budgets / sizeof *budgets ? budgets[index] : NULL;
}

const kvs_select_ops *kvs_select_at(uint32_t index)
{
    return index < sizeof selects / sizeof *selects ? selects[index] : NULL;
}

#define KVS_DISPOSE_DECLARE(name) extern const kvs_dispose_ops kvs_dispose_##name;
#define KVS_DISPOSE_ENTRY(name)   &kvs_dispose_##name,
KVS_DISPOSES(KVS_DISPOSE_DECLARE)
static const kvs_dispose_ops *const disposes[] = {KVS_DISPOSES(KVS_DISPOSE_ENTRY)};

const kvs_dispose_ops *kvs_dispose_at(uint32_t index)
{
    return index < sizeof disposes / sizeof *disposes ? disposes[index] : NULL;
}

const kvs_policy_ops *kvs_policy_at(uint32_t index)
{
    return index < N_POLICIES ? policies[index] : kvs_plugin_at(index - N_POLICIES);
}

const kvs_policy_ops *kvs_policy_find(const char *name)
{
    const kvs_policy_ops *ops;
    for (uint32_t i = 0; (ops = kvs_policy_at(i)) != NULL; i++)
        if (strcmp(ops->name, name) == 0)
            return ops;
    return NULL;
}

uint32_t kvs_policy_count(void)
{
    return N_POLICIES + kvs_plugin_count();
}

/* With the parameters' defaults. */
static const char *needs_text(const kvs_policy_ops *ops)
{
    kvs_policy p;
    const uint32_t needs = kvs_policy_parse(ops->name, NULL, false, &p, NULL) == KVS_OK ? kvs_policy_needs(&p) : 0;
    static const struct {
        uint32_t bit;
        const char *text;
    } words[] = {
        {KVS_POLICY_NEEDS_MASS_LAST, "attention mass of the latest forward"},
        {KVS_POLICY_NEEDS_MASS_SUM, "attention mass, sum"},
        {KVS_POLICY_NEEDS_MASS_EMA, "attention mass, moving average"},
        {KVS_POLICY_NEEDS_MASS_MAX, "attention mass, maximum"},
        {KVS_POLICY_NEEDS_WINDOW, "attention of the newest rows"},
        {KVS_POLICY_NEEDS_PROBE, "attention of probe rows"},
        {KVS_POLICY_NEEDS_PAIRS, "products of the newest rows' queries and keys"},
        {KVS_POLICY_NEEDS_QUERY_STATS, "mean and covariance of queries"},
        {KVS_POLICY_NEEDS_KEYS | KVS_POLICY_NEEDS_KEYS_RAW, "keys"},
        {KVS_POLICY_NEEDS_VALUES, "values"},
        {KVS_POLICY_NEEDS_PROBE_BY_STREAM | KVS_POLICY_NEEDS_PROBE_BY_INPUT, "hidden states of probe rows"},
        {KVS_POLICY_NEEDS_OUT_NORM | KVS_POLICY_NEEDS_OUT_LENGTH, "output projection"},
        {KVS_POLICY_NEEDS_CARRY, "a number of its own a slot"},
    };
    static _Thread_local char text[256];
    size_t at = 0;
    snprintf(text, sizeof text, "nothing");
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (needs & words[i].bit && at < sizeof text)
            at += (size_t)snprintf(text + at, sizeof text - at, "%s%s", at == 0 ? "" : "; ", words[i].text);
    return text;
}

bool kvs_policy_get_info(uint32_t index, kvs_policy_info *info)
{
    static _Thread_local char stages[256];
    const kvs_policy_ops *ops = kvs_policy_at(index);
    if (ops == NULL)
        return false;
    static const char *const scopes[] = {"shared", "layer", "head"};
    snprintf(stages, sizeof stages,
             "schedule=%s%s%s score=%s%s%s budget=%s select=%s(%s) keep=%s dispose=%s position=%s", ops->schedule,
             ops->probe != NULL ? " probe=" : "", ops->probe != NULL ? ops->probe : "", ops->name,
             ops->rescore != NULL ? " rescore=" : "", ops->rescore != NULL ? ops->rescore : "",
             ops->budget != NULL ? ops->budget : "uniform",
             ops->choose != NULL   ? "own"
             : ops->select != NULL ? ops->select
                                   : "token",
             scopes[ops->scope],
             ops->never_evicts   ? "all"
             : ops->keep != NULL ? ops->keep
                                 : "budget-chunk",
             ops->dispose != NULL ? ops->dispose : "drop", ops->position);
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

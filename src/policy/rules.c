/* Which stages can stand together, and what a preset may say of itself. Every refusal names both sides and why. */
#include "policy/policy.h"

#include <string.h>

/* Scores that see positions, tokens and chance alone, and one set for all heads: every head scores alike. */
static bool scores_alike(const kvs_policy *p)
{
    return kvs_policy_own_scope(p) == KVS_SCOPE_SHARED &&
           (p->ops->needs | (p->ops->needs_of == NULL ? 0 : p->ops->needs_of(p->params))) == 0;
}

static kvs_status check_rescore(const kvs_policy *p, kvs_error *err)
{
    if (p->rescore == NULL || p->rescore->any_score)
        return KVS_OK;
    const char *const name = p->ops->name, *const second = p->rescore->info.name;
    if (scores_alike(p))
        return kvs_error_set(err, KVS_EINVAL,
                             "+rescore=%s takes the first scores for attention, and %s looks at no "
                             "attention, key or value",
                             second, name);
    if (p->ops->signed_scores)
        return kvs_error_set(err, KVS_EINVAL,
                             "+rescore=%s takes the first scores for attention, and those of %s may be below 0", second,
                             name);
    if (p->ops->target_by_score != NULL)
        return kvs_error_set(err, KVS_EINVAL,
                             "%s counts by its own scores how many slots stay, and +rescore=%s would replace them",
                             name, second);
    if (p->ops->rescore == NULL && strcmp(p->ops->source, p->rescore->info.source) == 0)
        return kvs_error_set(err, KVS_EINVAL, "%s scores by the formula of +rescore=%s already (both %s)", name, second,
                             p->ops->source);
    return KVS_OK;
}

static kvs_status check_budget(const kvs_policy *p, kvs_error *err)
{
    if (p->budget == NULL)
        return KVS_OK;
    const char *const name = p->ops->name, *const budget = p->budget->info.name;
    if (p->ops->target != NULL || p->ops->target_by_score != NULL)
        return kvs_error_set(err, KVS_EINVAL,
                             "%s says itself how many slots each head keeps: it takes no +budget=%s, only "
                             "+budget=uniform",
                             name, budget);
    if (p->budget->by_score && scores_alike(p))
        return kvs_error_set(err, KVS_EINVAL,
                             "+budget=%s shares out by score, and %s looks at no attention, key or value: all "
                             "heads score alike",
                             budget, name);
    return KVS_OK;
}

/* Layers in a row that share a keep set. */
static kvs_status check_reuse(const kvs_policy *p, kvs_error *err)
{
    if (p->select == NULL || p->select->reuse_of == NULL || p->select->reuse_of(p->select_params) <= 1)
        return KVS_OK;
    const char *const name = p->select->info.name;
    const uint32_t reuse = p->select->reuse_of(p->select_params);
    if (p->budget != NULL)
        return kvs_error_set(err, KVS_EINVAL,
                             "+select=%s:reuse=%u copies keep sets between layers, +budget=%s gives each %s its own "
                             "number of slots: use reuse=1",
                             name, reuse, p->budget->info.name, p->budget->scope == KVS_SCOPE_HEAD ? "head" : "layer");
    if (kvs_policy_own_scope(p) == KVS_SCOPE_SHARED)
        return kvs_error_set(err, KVS_EINVAL,
                             "+select=%s:reuse=%u copies keep sets between layers, and %s has one for all layers: use "
                             "reuse=1",
                             name, reuse, p->ops->name);
    return KVS_OK;
}

/* What a fresh prefill of the kept tokens cannot give. */
static kvs_status check_recompute(const kvs_policy *p, kvs_error *err)
{
    if (p->position != KVS_POSITION_RECOMPUTE)
        return KVS_OK;
    const kvs_policy_scope scope = kvs_policy_scope_of(p);
    if (scope != KVS_SCOPE_SHARED)
        return kvs_error_set(err, KVS_EINVAL,
                             "position recompute needs one keep set for all heads, %s%s keeps another set in each %s",
                             kvs_policy_own_scope(p) < scope ? "+budget=" : "",
                             kvs_policy_own_scope(p) < scope ? p->budget->info.name : p->ops->name,
                             scope == KVS_SCOPE_LAYER ? "layer" : "head");
    if (kvs_policy_needs(p) & KVS_POLICY_NEEDS_CARRY)
        return kvs_error_set(err, KVS_EINVAL,
                             "position recompute reads the kept tokens afresh, which loses what %s carries with each "
                             "slot",
                             p->ops->name);
    return KVS_OK;
}

static kvs_status check_dispose(const kvs_policy *p, kvs_error *err)
{
    if (p->dispose == NULL)
        return KVS_OK;
    if (p->position == KVS_POSITION_RECOMPUTE)
        return kvs_error_set(err, KVS_EINVAL,
                             "position recompute runs the kept tokens afresh, which undoes +dispose=%s; use another "
                             "position",
                             p->dispose->info.name);
    if (p->dispose->needs & KVS_POLICY_NEEDS_MASS_SUM && kvs_policy_needs(p) & KVS_POLICY_NEEDS_MASS_LAST)
        return kvs_error_set(err, KVS_EINVAL,
                             "+dispose=%s weighs by the attention received so far, where %s has that of the latest "
                             "forward recorded",
                             p->dispose->info.name, p->ops->name);
    return KVS_OK;
}

/* Stages that cannot stand together: named both, with the reason. */
static kvs_status check_stages(const kvs_policy *p, kvs_error *err)
{
    const char *const name = p->ops->name;
    const kvs_choice_info *const first = p->probe != NULL     ? &p->probe->info
                                         : p->rescore != NULL ? &p->rescore->info
                                         : p->budget != NULL  ? &p->budget->info
                                         : p->select != NULL  ? &p->select->info
                                         : p->dispose != NULL ? &p->dispose->info
                                                              : NULL;
    if (p->ops->never_evicts && first != NULL)
        return kvs_error_set(err, KVS_EINVAL, "%s never evicts: the stage %s would never be asked", name, first->name);
    const uint32_t needs = kvs_policy_needs(p),
                   own = p->ops->needs | (p->ops->needs_of == NULL ? 0 : p->ops->needs_of(p->params));
    if (p->rescore != NULL && p->rescore->needs & own & KVS_POLICY_NEEDS_CARRY)
        return kvs_error_set(err, KVS_EINVAL,
                             "+rescore=%s remembers a number a slot, and so does %s: there is room for one",
                             p->rescore->info.name, name);
    const bool rows = p->probe != NULL && (p->probe->kind == KVS_PROBE_LOOKAHEAD || p->probe->kind == KVS_PROBE_PROMPT);
    if (needs & KVS_POLICY_NEEDS_PROBE && (p->probe == NULL || rows))
        return kvs_error_set(
            err, KVS_EINVAL,
            "%s scores by what probe rows attend to: it needs +probe=repeat, context or extract, not %s", name,
            p->probe == NULL ? "none" : p->probe->info.name);
    if (p->probe != NULL && !rows && !(needs & KVS_POLICY_NEEDS_PROBE))
        return kvs_error_set(err, KVS_EINVAL, "+probe=%s: %s does not look at what probe rows attend to",
                             p->probe->info.name, name);
    if (rows && !(needs & KVS_POLICY_NEEDS_WINDOW))
        return kvs_error_set(
            err, KVS_EINVAL,
            "+probe=%s adds rows to the window of attention, which %s does not look at; snapkv and laq do",
            p->probe->info.name, name);
    KVS_TRY(check_rescore(p, err));
    KVS_TRY(check_budget(p, err));
    if (p->select != NULL && p->ops->choose != NULL)
        return kvs_error_set(err, KVS_EINVAL, "%s chooses its slots itself: it takes no +select=%s", name,
                             p->select->info.name);
    if (p->budget != NULL && p->budget->scope > kvs_policy_select_scope(p))
        return kvs_error_set(err, KVS_EINVAL,
                             "+select=%s keeps one set for all heads of a layer, +budget=%s gives each head its own "
                             "number of slots: use +select=%s:heads=1",
                             p->select->info.name, p->budget->info.name, p->select->info.name);
    KVS_TRY(check_reuse(p, err));
    return check_dispose(p, err);
}

/* What a preset says of itself under these parameters: a plug-in's may be anything. */
static kvs_status check_answers(const kvs_policy_ops *ops, const double *params, kvs_error *err)
{
    const uint32_t needs = ops->needs | (ops->needs_of == NULL ? 0 : ops->needs_of(params));
    const int scope = (int)(ops->scope_of == NULL ? ops->scope : ops->scope_of(params));
    if (needs >= KVS_POLICY_NEEDS_END)
        return kvs_error_set(err, KVS_EINVAL, "%s: needs 0x%x holds a bit that is none: all are below 0x%x", ops->name,
                             needs, (unsigned)KVS_POLICY_NEEDS_END);
    const uint32_t by = needs & (KVS_POLICY_NEEDS_PROBE_BY_STREAM | KVS_POLICY_NEEDS_PROBE_BY_INPUT);
    if ((by & (by - 1)) != 0 || (by != 0 && (needs & KVS_POLICY_NEEDS_PROBE) == 0))
        return kvs_error_set(
            err, KVS_EINVAL,
            "%s: needs 0x%x has PROBE_BY_STREAM or _INPUT: one of them, and PROBE, whose rows they divide", ops->name,
            needs);
    if ((needs & KVS_POLICY_NEEDS_LOGITS) != 0 && (needs & KVS_POLICY_NEEDS_WINDOW) == 0)
        return kvs_error_set(err, KVS_EINVAL, "%s: needs 0x%x has LOGITS without WINDOW, whose logits they are",
                             ops->name, needs);
    if ((needs & KVS_POLICY_NEEDS_WINDOW) != 0 && ops->window_of == NULL)
        return kvs_error_set(err, KVS_EINVAL, "%s: needs WINDOW, so window_of must say how many rows", ops->name);
    if (scope < KVS_SCOPE_SHARED || scope > KVS_SCOPE_HEAD)
        return kvs_error_set(err, KVS_EINVAL, "%s: scope %d is none: 0 shared, 1 layer, 2 head", ops->name, scope);
    return KVS_OK;
}

kvs_status kvs_policy_check_rules(const kvs_policy *p, kvs_error *err)
{
    KVS_TRY(check_answers(p->ops, p->params, err));
    KVS_TRY(check_stages(p, err));
    return check_recompute(p, err);
}

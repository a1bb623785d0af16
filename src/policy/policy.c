/* What a policy that was parsed asks of the session, over all of its stages. */
#include "policy/policy.h"

#include <string.h>

kvs_policy_scope kvs_policy_select_scope(const kvs_policy *p)
{
    return p->select == NULL || p->select->scope_of == NULL ? KVS_SCOPE_HEAD : p->select->scope_of(p->select_params);
}

kvs_policy_scope kvs_policy_own_scope(const kvs_policy *p)
{
    return p->ops->scope_of == NULL ? p->ops->scope : p->ops->scope_of(p->params);
}

uint32_t kvs_policy_needs(const kvs_policy *p)
{
    return p->ops->needs | (p->ops->needs_of == NULL ? 0 : p->ops->needs_of(p->params)) |
           (p->rescore == NULL ? 0 : p->rescore->needs) | (p->dispose == NULL ? 0 : p->dispose->needs);
}

/* The finer of what the scorer wants, as far as the selection goes along, and what the budget can share out. */
kvs_policy_scope kvs_policy_scope_of(const kvs_policy *p)
{
    const kvs_policy_scope wanted = kvs_policy_own_scope(p);
    const kvs_policy_scope own = wanted < kvs_policy_select_scope(p) ? wanted : kvs_policy_select_scope(p);
    return p->budget != NULL && p->budget->scope > own ? p->budget->scope : own;
}

uint32_t kvs_policy_window(const kvs_policy *p)
{
    uint32_t rows = 0;
    if (p->ops->window_of != NULL)
        rows = p->ops->window_of(p->params);
    if (p->rescore != NULL && p->rescore->window_of != NULL)
        rows = kvs_max_u32(rows, p->rescore->window_of(p->rescore_params));
    if (rows != 0 && p->probe != NULL && p->probe->kind == KVS_PROBE_LOOKAHEAD)
        rows += (uint32_t)p->probe_params[0];
    if (rows != 0 && p->probe != NULL && p->probe->kind == KVS_PROBE_PROMPT)
        rows = kvs_max_u32(rows, (uint32_t)p->probe_params[0]);
    return rows;
}

size_t kvs_policy_work(const kvs_policy *p, uint32_t n_slots, uint32_t head_dim)
{
    const size_t own = p->ops->work_of == NULL ? 0 : p->ops->work_of(p->params, n_slots, head_dim);
    const size_t second = p->rescore == NULL || p->rescore->work_of == NULL
                              ? 0
                              : p->rescore->work_of(p->rescore_params, n_slots, head_dim);
    const size_t third = p->dispose == NULL || p->dispose->work_of == NULL
                             ? 0
                             : p->dispose->work_of(p->dispose_params, n_slots, head_dim);
    const size_t scorers = own > second ? own : second;
    return scorers > third ? scorers : third;
}

uint32_t kvs_policy_sinks(const kvs_policy *p)
{
    uint32_t n = p->protect.sinks;
    for (uint32_t i = 0; i < p->ops->n_params; i++)
        if (strcmp(p->ops->params[i].name, "sinks") == 0)
            n = kvs_max_u32(n, (uint32_t)p->params[i]);
    return n;
}

bool kvs_policy_is_ragged(const kvs_policy *p)
{
    const bool own = p->ops->target != NULL || p->ops->target_by_score != NULL;
    return p->budget != NULL || (own && kvs_policy_scope_of(p) != KVS_SCOPE_SHARED);
}

uint32_t kvs_policy_target(const kvs_policy *p, const kvs_policy_view *view, uint32_t n_full)
{
    return kvs_policy_target_scored(p, view, NULL, n_full);
}

uint32_t kvs_policy_target_scored(const kvs_policy *p, const kvs_policy_view *view, const float *scores,
                                  uint32_t n_full)
{
    const uint32_t n = view->n_slots;
    uint32_t want = n_full;
    if (p->keep_tokens != 0)
        want = p->keep_tokens;
    else if (p->keep_ratio != 0)
        want = (uint32_t)((p->keep_of_said ? (double)view->n_tokens : n) * p->keep_ratio);
    if (p->ops->target != NULL)
        want = p->ops->target(p->params, view, kvs_min_u32(want, n));
    if (p->ops->target_by_score != NULL && scores != NULL)
        want = p->ops->target_by_score(p->params, view, scores, want);
    /* What is protected outranks an aim: a share of few slots, or a budget less a chunk, may be below it. */
    return kvs_max_u32(kvs_max_u32(want, 1), kvs_protected_count(&p->protect, view));
}

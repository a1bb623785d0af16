/* The kinds of profiles, and how texts are run for them. */
#include "eval/profile_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    kvs_status (*measure)(kvs_profile_run *r);
    uint32_t n_tables; /* of heads; 0: layers */
} kinds[] = {
    {"baklava", kvs_profile_baklava, 1}, {"sensitivity", kvs_profile_sensitivity, 0},
    {"duo", kvs_profile_duo, 1},         {"kvzip-head", kvs_profile_kvzip_head, 1},
    {"lukv", kvs_profile_lukv, 99},
};

enum { N_KINDS = sizeof kinds / sizeof *kinds };

const char *kvs_eval_profile_kind(uint32_t index)
{
    return index < N_KINDS ? kinds[index].name : NULL;
}

kvs_status kvs_profile_session(kvs_profile_run *r, const char *policy, uint32_t budget_tokens,
                               const kvs_profile *profile, kvs_session **out)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = policy;
    o.budget_tokens = budget_tokens;
    o.arith = r->opt->arith;
    o.kv_type = KVS_KV_F32;
    return kvs_session_create_profiled(r->m, &o, profile, out, r->err);
}

kvs_status kvs_profile_extend(kvs_profile_run *r, kvs_session *s, const int32_t *tokens, uint32_t n,
                              kvs_forward_watch watch)
{
    for (uint32_t at = 0; at < n;) {
        const uint32_t step = kvs_min_u32(n - at, KVS_PROFILE_BLOCK);
        if (r->opt->cancel != NULL && *r->opt->cancel != 0)
            return kvs_error_set(r->err, KVS_ECANCELLED, "interrupted");
        r->m->forward->watch = watch;
        const kvs_status status = kvs_session_extend(s, tokens + at, NULL, step, NULL, r->err);
        r->m->forward->watch = (kvs_forward_watch){0};
        if (status != KVS_OK)
            return status;
        at += step;
        r->n_done += step;
        if (r->opt->on_progress != NULL)
            r->opt->on_progress(r->opt->ctx, r->n_done, r->n_total);
    }
    return KVS_OK;
}

double kvs_profile_cosine(const float *a, const float *b, uint32_t n)
{
    double ab = 0, aa = 0, bb = 0;
    for (uint32_t i = 0; i < n; i++) {
        ab += (double)a[i] * (double)b[i];
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
    }
    return aa * bb > 0 ? ab / sqrt(aa * bb) : 0;
}

uint32_t kvs_profile_shortest(const kvs_profile_run *r)
{
    uint32_t n = UINT32_MAX;
    for (uint32_t i = 0; i < r->n_texts; i++)
        n = kvs_min_u32(n, r->texts[i].n_tokens);
    return n;
}

static kvs_status find(const char *kind, uint32_t *index, kvs_error *err)
{
    const char *names[N_KINDS];
    for (*index = 0; *index < N_KINDS; (*index)++) {
        names[*index] = kinds[*index].name;
        if (strcmp(kind, kinds[*index].name) == 0)
            return KVS_OK;
    }
    const char *const near = kvs_nearest(kind, names, N_KINDS);
    if (near != NULL)
        return kvs_error_set(err, KVS_EINVAL, "unknown kind of profile '%.40s': did you mean '%s'?", kind, near);
    return kvs_error_set(err, KVS_EINVAL,
                         "unknown kind of profile '%.40s': known are baklava, sensitivity, duo, kvzip-head, lukv",
                         kind);
}

kvs_status kvs_eval_profile(kvs_model *m, const char *kind, const kvs_profile_options *opt,
                            const kvs_profile_text *texts, uint32_t n_texts, kvs_profile_made *out, kvs_error *err)
{
    uint32_t k;
    *out = (kvs_profile_made){0};
    KVS_TRY(find(kind, &k, err));
    if (n_texts == 0)
        return kvs_error_set(err, KVS_EINVAL, "a profile needs one text at least");
    const size_t n_heads = (size_t)m->info.n_layers * m->info.n_kv_heads;
    out->n_layers = m->info.n_layers;
    out->n_kv_heads = m->info.n_kv_heads;
    out->n_tables = kinds[k].n_tables;
    out->held_nll_even = out->held_nll_chosen = (double)NAN;
    double **const numbers = kinds[k].n_tables > 0 ? &out->heads : &out->layers;
    *numbers = calloc(kinds[k].n_tables > 0 ? kinds[k].n_tables * n_heads : out->n_layers, sizeof **numbers);
    kvs_status status =
        *numbers != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for a profile of %zu heads", n_heads);
    kvs_profile_run r = {m, opt, texts, n_texts, 0, 0, out, err};
    if (status == KVS_OK)
        status = kinds[k].measure(&r);
    if (status != KVS_OK)
        kvs_profile_made_free(out);
    return status;
}

void kvs_profile_made_free(kvs_profile_made *made)
{
    free(made->heads);
    free(made->layers);
    free(made->head_importance);
    free(made->layer_importance);
    *made = (kvs_profile_made){0};
}

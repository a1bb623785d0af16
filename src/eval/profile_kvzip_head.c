/* KVzip's scores of whole heads (arXiv:2505.23416): a head is worth the largest score of any of its tokens when the
 * model repeats a calibration text, which is what policy kvzip's probe measures. The first 4 tokens, which every chunk sees
 * and every head may take for a sink, do not count. Of several texts the mean counts. */
#include "eval/profile_internal.h"

#include <math.h>

enum { SINKS = 4, CHUNK = 2000, ROWS = 1024 /* of requests and answers' openings, at most */ };

/* The largest score of a KV head, over its query heads and the tokens behind the sinks. */
static double worth(const kvs_session *s, uint32_t layer, uint32_t head)
{
    const kvs_model_info *const i = &s->model->info;
    const uint32_t group = i->n_heads / i->n_kv_heads;
    const kvs_policy_view v = kvs_view_head(s, layer, head, &s->scratch.threads[0]);
    float most = 0;
    for (uint32_t g = 0; g < group; g++)
        for (uint32_t t = SINKS; t < v.n_slots; t++)
            most = fmaxf(most, v.probe[(size_t)g * v.n_slots + t]);
    return (double)most;
}

static kvs_status repeat(kvs_profile_run *r, kvs_session *s)
{
    const kvs_model_info *const i = &r->m->info;
    kvs_forward *f;
    KVS_TRY(kvs_session_forward(s, &f, r->err));
    pthread_mutex_lock(&f->lock);
    const kvs_status status = kvs_probe_before(s, f, r->err);
    for (uint32_t h = 0; status == KVS_OK && h < i->n_layers * i->n_kv_heads; h++)
        r->out->heads[h] += worth(s, h / i->n_kv_heads, h % i->n_kv_heads) / r->n_texts;
    kvs_probe_end(s);
    pthread_mutex_unlock(&f->lock);
    return status;
}

kvs_status kvs_profile_kvzip_head(kvs_profile_run *r)
{
    for (uint32_t t = 0; t < r->n_texts; t++)
        r->n_total += r->texts[t].n_tokens;
    for (uint32_t t = 0; t < r->n_texts; t++) {
        const uint32_t n = r->texts[t].n_tokens;
        kvs_session *s;
        if (n <= SINKS)
            return kvs_error_set(r->err, KVS_EINVAL, "text %u has %u tokens, more than %d are needed", t, n, SINKS);
        /* Room for all of it and a chunk's rows, which are a quarter of the budget at most. */
        KVS_TRY(kvs_profile_session(r, "kvzip +protect=none", kvs_max_u32(n + CHUNK + ROWS, 4 * CHUNK), NULL, &s));
        kvs_status status = kvs_profile_extend(r, s, r->texts[t].tokens, n, (kvs_forward_watch){0});
        if (status == KVS_OK)
            status = repeat(r, s);
        kvs_session_free(&s);
        KVS_TRY(status);
    }
    return KVS_OK;
}

/* Head roles without training: kvpress's on-the-fly scoring for DuoAttention. For each text and layer the mean query and
 * mean key before rotation are placed at 500 positions; the score of a head is the area under its cumulated attention from
 * the last of them: high where mass lies far back. Means over texts and over the query heads of a KV head. Theirs takes 50
 * chapters of BookSum, ours whatever texts are given. */
#include "eval/profile_internal.h"

#include <math.h>
#include <stdlib.h>

enum { POSITIONS = 500 };

typedef struct sums {
    double *q, *k; /* [n_layers][n_heads][head_dim], [n_layers][n_kv_heads][head_dim] */
} sums;

static void add_rows(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows, kvs_forward_point point)
{
    const sums *const s = ctx;
    const kvs_model_info *const i = &f->model->info;
    const size_t n_q = (size_t)i->n_heads * i->head_dim, n_k = (size_t)i->n_kv_heads * i->head_dim;
    for (uint32_t r = 0; point == KVS_FORWARD_QKV && r < n_rows; r++) {
        const float *const row = f->qkv + r * f->qkv_width;
        for (size_t d = 0; d < n_q; d++)
            s->q[layer * n_q + d] += (double)row[d];
        for (size_t d = 0; d < n_k; d++)
            s->k[layer * n_k + d] += (double)row[n_q + d];
    }
}

/* q at the last position, k at each: what a pair of dims gives turns with their distance. */
static double logit(const double *q, const double *k, uint32_t head_dim, const double *theta, uint32_t n_freq,
                    double back)
{
    double dot = 0;
    for (uint32_t i = 0; i < n_freq; i++) {
        const double q0 = q[2 * i], q1 = q[2 * i + 1], k0 = k[2 * i], k1 = k[2 * i + 1], angle = -theta[i] * back;
        dot += (q0 * k0 + q1 * k1) * cos(angle) + (q1 * k0 - q0 * k1) * sin(angle);
    }
    for (uint32_t d = 2 * n_freq; d < head_dim; d++)
        dot += q[d] * k[d];
    return dot / sqrt(head_dim);
}

double kvs_profile_reach(const double *q, const double *k, uint32_t head_dim, const double *theta, uint32_t n_freq,
                         uint32_t n)
{
    double most = -INFINITY, mass = 0, area = 0;
    for (uint32_t j = 0; j < n; j++)
        most = fmax(most, logit(q, k, head_dim, theta, n_freq, n - 1 - j));
    for (uint32_t j = 0; j < n; j++) {
        const double p = exp(logit(q, k, head_dim, theta, n_freq, n - 1 - j) - most);
        mass += p;
        area += p * (n - j); /* it counts in this sum and in all later ones */
    }
    return area / mass / n;
}

/* One text's scores, added to the heads' numbers. */
static void add_scores(kvs_profile_run *r, sums *s, uint32_t n_tokens)
{
    const kvs_model *const m = r->m;
    const uint32_t dh = m->info.head_dim, group = m->info.n_heads / m->info.n_kv_heads;
    for (size_t i = 0; i < (size_t)m->info.n_layers * m->info.n_heads * dh; i++)
        s->q[i] /= n_tokens;
    for (size_t i = 0; i < (size_t)m->info.n_layers * m->info.n_kv_heads * dh; i++)
        s->k[i] /= n_tokens;
    for (size_t h = 0; h < (size_t)m->info.n_layers * m->info.n_heads; h++)
        r->out->heads[h / group] +=
            kvs_profile_reach(s->q + h * dh, s->k + h / group * dh, dh, m->theta, m->n_freq, POSITIONS) /
            ((double)group * r->n_texts);
}

static kvs_status measure_text(kvs_profile_run *r, const kvs_profile_text *text, sums *s)
{
    const kvs_model_info *const i = &r->m->info;
    const size_t n_q = (size_t)i->n_layers * i->n_heads * i->head_dim;
    const size_t n_k = (size_t)i->n_layers * i->n_kv_heads * i->head_dim;
    kvs_session *session;
    s->q = calloc(n_q, sizeof *s->q);
    s->k = calloc(n_k, sizeof *s->k);
    if (s->q == NULL || s->k == NULL)
        return kvs_error_set(r->err, KVS_ENOMEM, "no memory for means of %zu numbers", n_q + n_k);
    KVS_TRY(kvs_profile_session(r, "baseline", text->n_tokens, NULL, &session));
    const kvs_status status =
        kvs_profile_extend(r, session, text->tokens, text->n_tokens, (kvs_forward_watch){add_rows, s});
    kvs_session_free(&session);
    if (status == KVS_OK)
        add_scores(r, s, text->n_tokens);
    return status;
}

kvs_status kvs_profile_duo(kvs_profile_run *r)
{
    for (uint32_t t = 0; t < r->n_texts; t++)
        r->n_total += r->texts[t].n_tokens;
    for (uint32_t t = 0; t < r->n_texts; t++) {
        sums s = {0};
        const kvs_status status = measure_text(r, &r->texts[t], &s);
        free(s.q);
        free(s.k);
        KVS_TRY(status);
    }
    return KVS_OK;
}

/* The masked full cache: a forward pass of its own, in double, that keeps every token and hides what an eviction dropped. Shared
 * by tests/oracle/oracle_masked.c and tests/unit/test_properties.c. The includer defines MASKED_TOKENS_MAX. Everything
 * static, as in tiny_gguf.h. */
#ifndef KVS_MASKED_REFERENCE_H
#define KVS_MASKED_REFERENCE_H

#include "session/session_internal.h"
#include "unit/session_fixture.h"

enum { N_MASKED = MASKED_TOKENS_MAX };

static TINY_UNUSED void *need(void *p)
{
    if (p == NULL) {
        fputs("no memory or no tiny model\n", stderr);
        exit(1);
    }
    return p;
}

/* ---- the reference: weights in double ---------------------------------------------------------------------------- */

typedef struct matrix {
    double *w; /* [n_out][n_in] */
    uint32_t n_out, n_in;
} matrix;

typedef struct ref_layer {
    matrix qkv, attn_out, gate_up, ffn_down;
    const float *attn_norm, *ffn_norm;
} ref_layer;

typedef struct reference {
    const kvs_model *m;
    kvs_model_info i;
    ref_layer *layers;
    matrix embd, head;
    double *key, *value; /* [layer][kv head][N_MASKED][head_dim], keys unrotated */
    int32_t *rope;       /* [layer][kv head][N_MASKED] where each key stands */
    double *turned;      /* the keys rotated to there, and where that was: -1 nowhere yet */
    int32_t *turned_to;
    uint32_t *masked_from; /* [layer][kv head][N_MASKED] rows t >= this do not see it */
    int32_t *next;         /* [layer][kv head] where the next token stands */
} reference;

static TINY_UNUSED matrix widen(const kvs_weight *w)
{
    matrix m = {need(calloc((size_t)w->n_out * w->n_in, sizeof(double))), w->n_out, w->n_in};
    float *row = need(malloc(w->n_in * sizeof *row));
    for (uint32_t r = 0; r < w->n_out; r++) {
        kvs_weight_row(w, r, row);
        for (uint32_t k = 0; k < w->n_in; k++)
            m.w[(size_t)r * w->n_in + k] = (double)row[k];
    }
    free(row);
    return m;
}

static TINY_UNUSED void reference_open(reference *r, const kvs_model *m)
{
    *r = (reference){.m = m};
    kvs_model_get_info(m, &r->i);
    r->layers = need(calloc(r->i.n_layers, sizeof *r->layers));
    for (uint32_t l = 0; l < r->i.n_layers; l++)
        r->layers[l] =
            (ref_layer){widen(&m->layers[l].qkv),      widen(&m->layers[l].attn_out), widen(&m->layers[l].gate_up),
                        widen(&m->layers[l].ffn_down), m->layers[l].attn_norm,        m->layers[l].ffn_norm};
    r->embd = widen(&m->embd);
    r->head = widen(&m->head);
    const size_t n = (size_t)r->i.n_layers * r->i.n_kv_heads * N_MASKED;
    r->key = need(calloc(n * r->i.head_dim, sizeof(double)));
    r->value = need(calloc(n * r->i.head_dim, sizeof(double)));
    r->rope = need(calloc(n, sizeof *r->rope));
    r->turned = need(calloc(n * r->i.head_dim, sizeof(double)));
    r->turned_to = need(calloc(n, sizeof *r->turned_to));
    r->masked_from = need(calloc(n, sizeof *r->masked_from));
    r->next = need(calloc((size_t)r->i.n_layers * r->i.n_kv_heads, sizeof *r->next));
}

static TINY_UNUSED void reference_reset(reference *r)
{
    const size_t heads = (size_t)r->i.n_layers * r->i.n_kv_heads;
    for (size_t j = 0; j < heads * N_MASKED; j++)
        r->masked_from[j] = UINT32_MAX, r->turned_to[j] = -1;
    memset(r->next, 0, heads * sizeof *r->next);
}

static TINY_UNUSED void reference_close(reference *r)
{
    for (uint32_t l = 0; l < r->i.n_layers; l++) {
        free(r->layers[l].qkv.w);
        free(r->layers[l].attn_out.w);
        free(r->layers[l].gate_up.w);
        free(r->layers[l].ffn_down.w);
    }
    void *all[] = {r->layers, r->embd.w,      r->head.w, r->key,    r->value,
                   r->rope,   r->masked_from, r->next,   r->turned, r->turned_to};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* ---- the reference: one token ------------------------------------------------------------------------------------- */

static TINY_UNUSED void product(const matrix *m, const double *x, double *y)
{
    for (uint32_t r = 0; r < m->n_out; r++) {
        double sum = 0;
        for (uint32_t k = 0; k < m->n_in; k++)
            sum += m->w[(size_t)r * m->n_in + k] * x[k];
        y[r] = sum;
    }
}

static TINY_UNUSED void norm(const reference *r, const double *x, const float *w, double *y)
{
    double squares = 0;
    for (uint32_t k = 0; k < r->i.n_embd; k++)
        squares += x[k] * x[k];
    const double scale = 1 / sqrt(squares / r->i.n_embd + (double)r->m->norm_eps);
    for (uint32_t k = 0; k < r->i.n_embd; k++)
        y[k] = x[k] * scale * (double)w[k];
}

/* RoPE of adjacent pairs at `pos`. */
static TINY_UNUSED void rotate(const reference *r, const double *x, int32_t pos, double *y)
{
    for (uint32_t f = 0; f < r->i.head_dim / 2; f++) {
        const double angle = pos * pow(r->i.rope_base, -2.0 * f / r->i.head_dim);
        y[2 * f] = x[2 * f] * cos(angle) - x[2 * f + 1] * sin(angle);
        y[2 * f + 1] = x[2 * f] * sin(angle) + x[2 * f + 1] * cos(angle);
    }
}

/* Attention of one query head over what its KV head still shows to row t. */
static TINY_UNUSED void attend_head(reference *r, size_t kv, const double *q, int32_t q_pos, uint32_t t, double *out)
{
    const uint32_t dh = r->i.head_dim;
    double score[N_MASKED], query[256], max = -INFINITY, sum = 0;
    rotate(r, q, q_pos, query);
    for (uint32_t j = 0; j <= t; j++) {
        score[j] = -INFINITY;
        if (t >= r->masked_from[kv * N_MASKED + j])
            continue;
        const size_t slot = kv * N_MASKED + j;
        double *const key = r->turned + slot * dh;
        if (r->turned_to[slot] != r->rope[slot])
            rotate(r, r->key + slot * dh, r->rope[slot], key);
        r->turned_to[slot] = r->rope[slot];
        score[j] = 0;
        for (uint32_t d = 0; d < dh; d++)
            score[j] += query[d] * key[d];
        score[j] /= sqrt(dh);
        max = fmax(max, score[j]);
    }
    memset(out, 0, dh * sizeof *out);
    for (uint32_t j = 0; j <= t; j++) {
        const double p = exp(score[j] - max);
        sum += p;
        for (uint32_t d = 0; d < dh; d++)
            out[d] += p * r->value[(kv * N_MASKED + j) * dh + d];
    }
    for (uint32_t d = 0; d < dh; d++)
        out[d] /= sum;
}

static TINY_UNUSED void attend(reference *r, uint32_t layer, const double *qkv, uint32_t t, double *out)
{
    const uint32_t dh = r->i.head_dim, group = r->i.n_heads / r->i.n_kv_heads;
    for (uint32_t h = 0; h < r->i.n_kv_heads; h++) {
        const size_t kv = (size_t)layer * r->i.n_kv_heads + h;
        memcpy(r->key + (kv * N_MASKED + t) * dh, qkv + (size_t)(r->i.n_heads + h) * dh, dh * sizeof(double));
        memcpy(r->value + (kv * N_MASKED + t) * dh, qkv + (size_t)(r->i.n_heads + r->i.n_kv_heads + h) * dh,
               dh * sizeof(double));
        r->rope[kv * N_MASKED + t] = r->next[kv];
        for (uint32_t g = 0; g < group; g++)
            attend_head(r, kv, qkv + (size_t)(h * group + g) * dh, r->next[kv], t, out + (size_t)(h * group + g) * dh);
        r->next[kv]++;
    }
}

static TINY_UNUSED void reference_token(reference *r, int32_t token, uint32_t t, double *logits)
{
    const uint32_t n_embd = r->i.n_embd, n_ff = r->i.n_ff;
    double x[1024], y[1024], att[1024], wide[4096], act[2048];
    memcpy(x, r->embd.w + (size_t)token * n_embd, n_embd * sizeof *x);
    for (uint32_t l = 0; l < r->i.n_layers; l++) {
        const ref_layer *w = &r->layers[l];
        norm(r, x, w->attn_norm, y);
        product(&w->qkv, y, wide);
        attend(r, l, wide, t, att);
        product(&w->attn_out, att, y);
        for (uint32_t k = 0; k < n_embd; k++)
            x[k] += y[k];
        norm(r, x, w->ffn_norm, y);
        product(&w->gate_up, y, wide);
        for (uint32_t k = 0; k < n_ff; k++)
            act[k] = wide[k] / (1 + exp(-wide[k])) * wide[n_ff + k];
        product(&w->ffn_down, act, y);
        for (uint32_t k = 0; k < n_embd; k++)
            x[k] += y[k];
    }
    norm(r, x, r->m->out_norm, y);
    product(&r->head, y, logits);
}

/* ---- evictions ---------------------------------------------------------------------------------------------------- */

typedef struct event_log {
    const kvs_session *s;
    uint32_t n;
    uint32_t at[N_MASKED];   /* tokens said when it happened */
    uint8_t *kept[N_MASKED]; /* [layer][kv head][N_MASKED] */
} event_log;

static TINY_UNUSED void on_event(void *ctx, const kvs_event *event)
{
    event_log *log = ctx;
    const kvs_model_info *i = &log->s->model->info;
    const size_t heads = (size_t)i->n_layers * i->n_kv_heads;
    if (log->n == N_MASKED)
        return;
    log->at[log->n] = (uint32_t)event->token_idx;
    uint8_t *kept = log->kept[log->n++] = need(calloc(heads, N_MASKED));
    int32_t pos[N_MASKED];
    for (size_t h = 0; h < heads; h++) {
        const uint32_t n = kvs_session_keep_set(log->s, (uint32_t)(h / i->n_kv_heads), (uint32_t)(h % i->n_kv_heads),
                                                pos, NULL, N_MASKED);
        for (uint32_t k = 0; k < n && k < N_MASKED; k++)
            kept[h * N_MASKED + (uint32_t)pos[k]] = 1;
    }
}

/* Masks what is gone from row t on and gives the rest their places: section 4 of the design, in so many words. */
static TINY_UNUSED void apply_event(reference *r, const uint8_t *kept, uint32_t t, kvs_position_mode mode,
                                    int32_t gap_cap)
{
    for (size_t h = 0; h < (size_t)r->i.n_layers * r->i.n_kv_heads; h++) {
        int32_t n = 0, at = 0, before = -1;
        for (uint32_t j = 0; j < t; j++) {
            const size_t slot = h * N_MASKED + j;
            if (r->masked_from[slot] <= t)
                continue;
            if (!kept[slot]) {
                r->masked_from[slot] = t;
                continue;
            }
            const int32_t gap = (int32_t)j - before;
            at = before < 0 ? ((int32_t)j < gap_cap ? (int32_t)j : gap_cap) : at + (gap < gap_cap ? gap : gap_cap);
            if (mode == KVS_POSITION_REROTATE)
                r->rope[slot] = n;
            if (mode == KVS_POSITION_GAPCAP)
                r->rope[slot] = at;
            before = (int32_t)j;
            n++;
        }
        const int32_t gap = (int32_t)t - before;
        r->next[h] = mode == KVS_POSITION_KEEP     ? (int32_t)t
                     : mode == KVS_POSITION_GAPCAP ? at + (gap < gap_cap ? gap : gap_cap)
                                                   : n;
    }
}

/* ---- comparing ---- */

static TINY_UNUSED void forget_events(event_log *log)
{
    for (uint32_t e = 0; e < log->n; e++)
        free(log->kept[e]);
    log->n = 0;
}

/* The worst row's largest error, over its largest logit, of logits [n][vocab]. */
static TINY_UNUSED double masked_error(reference *r, const int32_t *tokens, uint32_t n, const float *logits,
                                       const event_log *log, kvs_position_mode mode, int32_t gap_cap)
{
    double worst = 0, *expected = need(malloc(r->i.vocab_size * sizeof *expected));
    reference_reset(r);
    for (uint32_t t = 0, e = 0; t < n; t++) {
        for (; e < log->n && log->at[e] == t; e++)
            apply_event(r, log->kept[e], t, mode, gap_cap);
        reference_token(r, tokens[t], t, expected);
        double most = 0, scale = 0;
        for (uint32_t v = 0; v < r->i.vocab_size; v++) {
            most = fmax(most, fabs((double)logits[(size_t)t * r->i.vocab_size + v] - expected[v]));
            scale = fmax(scale, fabs(expected[v]));
        }
        worst = fmax(worst, most / scale);
    }
    free(expected);
    return worst;
}

#endif

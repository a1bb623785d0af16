/* The forward pass: a plain loop over layers, with attention as the hook that knows caches. Includes base, kernels,
 * model. One workspace a model: steps of its sessions follow each other. */
#ifndef KVS_FORWARD_H
#define KVS_FORWARD_H

#include "model/model.h"

#include <pthread.h>

enum {
    KVS_STEP_ROWS_MAX = 512, /* rows of one step over all sessions: beyond this a product gains nothing */
    KVS_LOGIT_ROWS_MAX = 32, /* rows whose logits are held at once: 6 MiB at 49,152 tokens */
};

struct kvs_forward;

/* Where activations can be looked at, once a layer each. */
typedef enum kvs_forward_point {
    KVS_FORWARD_QKV, /* f->qkv, before attention rotates queries and keys in place */
    KVS_FORWARD_ATT, /* f->att, and f->qkv as attention left it */
    KVS_FORWARD_MIX, /* f->norm is what attention will add to the residual stream f->x */
} kvs_forward_point;

/* Looks only. fn NULL: nobody does. */
typedef struct kvs_forward_watch {
    void (*fn)(void *ctx, struct kvs_forward *f, uint32_t layer, uint32_t n_rows, kvs_forward_point point);
    void *ctx;
} kvs_forward_watch;

typedef struct kvs_forward {
    kvs_model *model;
    pthread_mutex_t lock; /* held for a whole step */
    uint32_t max_rows;
    float *x;         /* [max_rows][n_embd] residual stream */
    float *norm;      /* [max_rows][n_embd] */
    float *qkv;       /* [max_rows][qkv_width] */
    size_t qkv_width; /* (n_heads + 2 n_kv_heads) head_dim */
    float *att;       /* [max_rows][n_heads head_dim] */
    float *gate_up;   /* [max_rows][2 n_ff] */
    float *act;       /* [max_rows][n_ff] */
    float *logits;    /* [KVS_LOGIT_ROWS_MAX][vocab] */
    /* Called with the hook's ctx behind a layer, before its last sum: may move f->x. NULL: nobody does. */
    void (*shift)(void *ctx, struct kvs_forward *f, uint32_t layer, uint32_t n_rows);
    void *matmul_scratch;
    void *attn_scratch; /* [n_threads + 1][attn_scratch_bytes]; grown when a session is created */
    size_t attn_scratch_bytes;
    uint64_t bytes; /* all of the above */
    kvs_forward_watch watch;
} kvs_forward;

/* ENOMEM leaves nothing behind. */
kvs_status kvs_forward_create(kvs_model *m, kvs_forward **out, kvs_error *err);
void kvs_forward_free(kvs_forward **f);
/* Makes attn_scratch at least bytes_per_thread; ENOMEM leaves it as it was. Under the lock: its content is lost. */
kvs_status kvs_forward_need_scratch(kvs_forward *f, size_t bytes_per_thread, kvs_error *err);

/* Attention of one layer for all rows: reads q, k, v from f->qkv, stores keys and values where they belong, writes
 * f->att. */
typedef void (*kvs_attend_hook)(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows);

/* What one layer did with the rows that a rule covers. */
typedef struct kvs_ffn_count {
    uint64_t n_run, n_skipped;
    double cosine_sum; /* over n_run */
} kvs_ffn_count;

/* FFN-SkipLLM (arXiv:2404.03865; no code is published, the rule is reconstructed from its text): a row whose residual
 * stream a feed-forward block of a middle layer leaves nearly as it was (the cosine of before and after reaches the
 * threshold) goes without those of the middle layers that follow. Attention always runs, so every token has its key and
 * value in every layer. */
typedef struct kvs_ffn_rule {
    double threshold;      /* over 1: blocks are measured, none is left out */
    uint32_t first, end;   /* the middle layers */
    kvs_ffn_count *counts; /* [n_layers] */
} kvs_ffn_rule;

/* Where a row's residual stream goes as each layer leaves it: out [n_layers][n_embd]. */
typedef struct kvs_hidden_tap {
    uint32_t row;
    float *out;
} kvs_hidden_tap;

/* What a step wants besides the plain loop; NULL and 0: nothing. */
typedef struct kvs_forward_wishes {
    const kvs_ffn_rule *const *ffn; /* [n_rows], an entry may be NULL */
    const kvs_hidden_tap *taps;
    uint32_t n_taps;
} kvs_forward_wishes;

/* Runs rows [n_rows] of token ids through all layers; f->x holds the last layer's residual stream after it. wishes may
 * be NULL. */
void kvs_forward_rows(kvs_forward *f, kvs_arith arith, const int32_t *tokens, uint32_t n_rows, kvs_attend_hook attend,
                      void *ctx, const kvs_forward_wishes *wishes);
/* Logits of rows[n] (indices of the last kvs_forward_rows), n <= KVS_LOGIT_ROWS_MAX, into f->logits [n][vocab]. */
void kvs_forward_logits(kvs_forward *f, kvs_arith arith, const uint32_t *rows, uint32_t n);

#endif

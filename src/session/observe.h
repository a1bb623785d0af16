/* What a session remembers of its queries for policies that ask: the newest rows' queries, and the mean and second
 * moment of all. From the former the attention of the newest rows over the slots held now is computed when an eviction
 * asks, so that nothing is stored a row and slot. Queries are kept as they are before rotation: where their tokens
 * stand may change with every eviction. And, where a budget stage asks, how alike each layer's hidden state is before and
 * after attention. */
#ifndef KVS_OBSERVE_H
#define KVS_OBSERVE_H

#include "base/base.h"

enum {
    KVS_QUERY_STATS_SKIP = 4
}; /* first tokens, whose queries are outliers: as kvpress's ExpectedAttention (n_sink) */

typedef struct kvs_query_log {
    uint32_t n_layers, n_kv_heads, group, head_dim;
    uint32_t n_rows;  /* capacity; 0: not wanted */
    uint32_t n_ahead; /* rows beyond what was said: of a probe, for the eviction that is under way */
    uint32_t n_valid; /* rows of the tokens [n_tokens + n_ahead - n_valid, n_tokens + n_ahead) are there */
    float *rows;      /* [n_layers][n_kv_heads][n_rows][group][head_dim]; token t at row t % n_rows */
    uint64_t n_stats; /* queries counted in the sums */
    double *sum;      /* [n_layers][n_kv_heads][group][head_dim], or NULL */
    double *square;   /* [...][head_dim][head_dim], lower triangle */
    bool mixes;       /* asked for: */
    uint64_t n_mixed; /* rows counted in it */
    double *mixed;    /* [n_layers] sum of cosines, then [n_layers] their mean; NULL unless asked */
    uint64_t bytes;
} kvs_query_log;

/* ENOMEM leaves log zero. */
kvs_status kvs_query_log_create(kvs_query_log *log, const kvs_allocator *a, uint32_t n_rows, bool stats,
                                kvs_error *err);
void kvs_query_log_free(kvs_query_log *log, const kvs_allocator *a);
/* One row of one head: q [group][head_dim] before rotation, of token `token_idx`. Heads may come from several threads. */
void kvs_query_log_write(kvs_query_log *log, uint32_t layer, uint32_t kv_head, uint64_t token_idx, const float *q);
/* The same into the sums only. */
void kvs_query_log_count(kvs_query_log *log, uint32_t layer, uint32_t kv_head, uint64_t token_idx, const float *q);
/* The cosine of a layer's hidden state before and after attention of the next row, rows in the order they were said. */
void kvs_query_log_mix(kvs_query_log *log, uint32_t layer, double cosine);
/* [n_layers] means of them, or NULL: not asked for, or no row yet. */
const double *kvs_query_log_mixed(kvs_query_log *log);
/* n rows of a probe were written behind what was said. */
void kvs_query_log_look_ahead(kvs_query_log *log, uint32_t n);
/* After n rows were run; after truncating to what was n_tokens - n. */
void kvs_query_log_advance(kvs_query_log *log, uint64_t n_tokens, uint32_t n);
void kvs_query_log_drop(kvs_query_log *log, uint64_t n);
/* Copies what both have. */
void kvs_query_log_copy(kvs_query_log *log, const kvs_query_log *from);
const float *kvs_query_log_row(const kvs_query_log *log, uint32_t layer, uint32_t kv_head, uint64_t token_idx);

/* Little-endian bytes of it, for saves. */
size_t kvs_query_log_bytes(const kvs_query_log *log);
void kvs_query_log_save(const kvs_query_log *log, uint8_t *buf);
void kvs_query_log_load(kvs_query_log *log, const uint8_t *buf);

#endif

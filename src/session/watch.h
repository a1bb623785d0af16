/* Looks at rows of a session as they run, for diagnostics: how much of their attention goes to some tokens, how large
 * their queries are by channel, what their residual stream is behind each layer. Reads beside the path: with a watch or
 * without, logits are the same bits. Off unless somebody attaches one. */
#ifndef KVS_WATCH_H
#define KVS_WATCH_H

#include "base/base.h"

struct kvs_attend_run;
struct kvs_forward;

typedef struct kvs_watch_options {
    const int32_t *tokens; /* [n_tokens] positions whose mass is asked for, ascending; borrowed as long as the watch */
    uint32_t n_tokens;
    uint64_t from_query;  /* rows from this token on count in query_square */
    uint64_t from_answer; /* rows from this token on count in mass, and the newest of them in hidden */
} kvs_watch_options;

typedef struct kvs_watch {
    kvs_watch_options options;
    uint32_t n_layers, n_heads, n_kv_heads, head_dim, n_embd, group;
    uint64_t n_answers;   /* rows in mass; 0: hidden is empty too */
    double *mass;         /* [n_layers][n_heads] sums over rows of the attention that goes to the tokens */
    double *query_square; /* [n_layers][n_heads][head_dim] sums over rows of squares, as rotated when they ran */
    float *hidden;        /* [n_layers][n_embd] */
    /* What each thread works in. */
    uint32_t n_threads, n_slots;
    size_t thread_bytes;
    uint8_t *threads;
    const kvs_allocator *allocator;
} kvs_watch;

/* For sessions whose heads have no more slots than this one's. ENOMEM, or EINVAL: tokens do not ascend. */
kvs_status kvs_watch_create(const kvs_session *s, const kvs_watch_options *o, kvs_watch **out, kvs_error *err);
void kvs_watch_free(kvs_watch **w);
/* From the next row on; NULL: no more. The session borrows it and does not pass it on to forks. */
void kvs_session_watch(kvs_session *s, kvs_watch *w);

/* ||q_c|| ||k_c|| of each channel of one KV head, ThinK's score (arXiv:2407.21018): queries of the rows watched, the mean
 * over the group, and all keys that are held now, as they stand. score [head_dim]. ENOMEM. */
kvs_status kvs_watch_key_channels(const kvs_watch *w, const kvs_session *s, uint32_t layer, uint32_t kv_head,
                                  double *score, kvs_error *err);

/* From attention, once a layer's rows are stored and rotated: one head's part. */
void kvs_watch_rows(const struct kvs_attend_run *run, const struct kvs_forward *f, uint32_t layer, uint32_t head,
                    uint32_t thread);

#endif

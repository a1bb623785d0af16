/* The sentences of a conversation and what they mean, for selection that drops those that were said again
 * (src/policy/select_unrepeated.c). Kept in the order tokens were said, so that chunks and threads cannot be seen. */
#ifndef KVS_SENTENCES_H
#define KVS_SENTENCES_H

#include "policy/policy.h"

/* Where a sentence ends: a state that sees one token after the other. */
typedef struct kvs_segmenter {
    uint32_t shortest, longest;
    uint32_t n_open; /* tokens of the sentence that is open */
    uint8_t role;    /* whose words they are */
} kvs_segmenter;

typedef enum kvs_segment {
    KVS_SEGMENT_GOES_ON = 0, /* the token is of the open sentence */
    KVS_SEGMENT_ENDS,        /* the token is its last */
    KVS_SEGMENT_OUTSIDE,     /* a template marker, of none */
} kvs_segment;

/* Whether the open sentence, if any, ends before a token with these flags. */
bool kvs_segmenter_breaks(const kvs_segmenter *g, uint8_t flags);
/* Takes the token in; n_open counts it until the caller sets it to 0. ends: bit t for a token that ends a sentence. */
kvs_segment kvs_segmenter_take(kvs_segmenter *g, const uint64_t *ends, int32_t token, uint8_t flags);

typedef struct kvs_sentence {
    int32_t begin, end;  /* pos */
    int32_t repeated_at; /* end of the first later sentence that is like it; 0: none is */
} kvs_sentence;

typedef struct kvs_sentence_log {
    const uint64_t *ends; /* of the session; NULL: nothing is kept */
    uint32_t n_embd, vocab_size;
    float threshold;
    kvs_segmenter segmenter;
    double *sum;              /* [n_embd] of the open sentence's hidden states */
    uint32_t n, capacity;     /* sentences: as many as can begin between two evictions, and as many older ones */
    kvs_sentence *sentences;  /* [capacity], in order */
    float *meanings;          /* [capacity][n_embd], of length 1 */
    uint64_t n_tokens;        /* seen */
    uint32_t n_ring, n_valid; /* newest tokens that are remembered, so that some can be taken back */
    int32_t *tokens;          /* [n_ring], token t at t % n_ring */
    uint8_t *flags;           /* [n_ring] */
    float *hidden;            /* [n_ring][n_embd] */
    void *block;
    uint64_t bytes;
} kvs_sentence_log;

/* n_slots: tokens between two evictions at most. ENOMEM leaves log empty. */
kvs_status kvs_sentence_log_create(kvs_sentence_log *log, const kvs_allocator *a, uint32_t n_slots, kvs_error *err);
void kvs_sentence_log_free(kvs_sentence_log *log, const kvs_allocator *a);
/* The next token said: hidden [n_embd] after the last norm. */
void kvs_sentence_log_add(kvs_sentence_log *log, int32_t token, uint8_t flags, const float *hidden);
/* After truncating to n_tokens, not below the last eviction. */
void kvs_sentence_log_truncate(kvs_sentence_log *log, uint64_t n_tokens);
/* After an eviction: room for what is said until the next. */
void kvs_sentence_log_evicted(kvs_sentence_log *log);
/* As much of `from` as log has room for; one that kept nothing leaves log knowing only that n_tokens were said. */
void kvs_sentence_log_copy(kvs_sentence_log *log, const kvs_sentence_log *from, uint64_t n_tokens);
/* Scores of slots whose sentence is said again become NaN, unless one of its slots scores +inf. Returns how many of the
 * view's slots may stay then, at most n_keep and at least 1. */
uint32_t kvs_sentence_log_mark(const kvs_sentence_log *log, const kvs_policy_view *view, float *scores,
                               uint32_t n_keep);

/* Little-endian bytes of it, for saves. */
size_t kvs_sentence_log_bytes(const kvs_sentence_log *log);
void kvs_sentence_log_save(const kvs_sentence_log *log, uint8_t *buf);
/* Bytes that buf [avail] says it takes, of a session of n_tokens; EFORMAT where it is damaged. */
kvs_status kvs_sentence_log_measure(const kvs_sentence_log *log, const uint8_t *buf, size_t avail, uint64_t n_tokens,
                                    size_t *n_bytes, kvs_error *err);
void kvs_sentence_log_load(kvs_sentence_log *log, const uint8_t *buf);

#endif

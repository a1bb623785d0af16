/* Steering (SkipKV, arXiv:2512.07993, after SEAL, arXiv:2504.07986): the hidden states of an answer are moved along a
 * direction, further with every thought that does not get on. */
#ifndef KVS_STEER_H
#define KVS_STEER_H

#include "model/forward.h"
#include "session/sentences.h"

enum { KVS_STEER_TEXT_BYTES = 1024 };

/* What was known behind a token: enough to take later ones back. */
typedef struct kvs_steer_mark {
    int32_t token;
    uint32_t n_other; /* thoughts of this answer so far that do not get on */
    uint16_t n_open;  /* tokens of the sentence that is open */
    uint8_t role;
} kvs_steer_mark;

typedef struct kvs_steer {
    bool on;
    uint32_t layer;
    double alpha, gamma;
    float *direction; /* [n_embd] */
    float *shift;     /* [KVS_STEP_ROWS_MAX] alpha of each row of the step that is under way */
    kvs_segmenter segmenter;
    char text[KVS_STEER_TEXT_BYTES]; /* of the open sentence, as far as it fits */
    uint32_t n_text, n_other;
    uint64_t n_tokens;
    uint32_t n_ring, n_valid;
    kvs_steer_mark *ring; /* [n_ring], token t at t % n_ring */
    void *block;
    uint64_t bytes;
} kvs_steer;

struct kvs_session;

void kvs_steer_free(struct kvs_session *s);
/* The parent's steering in a fork. */
kvs_status kvs_steer_fork(struct kvs_session *s, const struct kvs_session *from, kvs_error *err);
/* The next n tokens, before they run: shift[i] for each. */
void kvs_steer_take(struct kvs_session *s, const int32_t *tokens, const uint8_t *flags, uint32_t n);
void kvs_steer_truncate(struct kvs_session *s, uint64_t n_tokens);
/* Whether a sentence is a thought that does not get on: it checks what was said, or turns elsewhere. */
bool kvs_steer_is_other(const char *text, size_t n);

size_t kvs_steer_bytes(const struct kvs_session *s);
void kvs_steer_save(const struct kvs_session *s, uint8_t *buf);
kvs_status kvs_steer_measure(const struct kvs_session *s, const uint8_t *buf, size_t avail, uint64_t n_tokens,
                             size_t *n_bytes, kvs_error *err);
void kvs_steer_load(struct kvs_session *s, const uint8_t *buf);

#endif

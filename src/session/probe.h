/* Rows that run on top of the cache when an eviction asks, and are thrown away: what they attend to judges the slots. */
#ifndef KVS_PROBE_H
#define KVS_PROBE_H

#include "base/base.h"

struct kvs_session;
struct kvs_forward;
struct kvs_attend_run;

typedef struct kvs_probe {
    uint32_t reserve_tokens; /* room that must be left for its rows; 0: no probe */
    uint32_t chunk_tokens;   /* said again at once */
    int32_t *text[3]; /* tokens of the request for the first chunk, for later ones, and of what opens an answer */
    uint32_t n_text[3];
    int32_t *tokens, *row_pos;      /* [reserve_tokens] rows being run */
    int32_t *held_pos, *held_token; /* [n_slots] what is said again */
    float *
        most; /* [n_heads][group][n_slots] largest probability so far, or of it over the row's length; its logarithm while rows run */
    /* While rows run: which slots they share their attention over besides themselves, and which of them are judged. */
    int32_t first_end, begin, end; /* pos below first_end, or in [begin, end): judged are the latter */
    bool apart;                    /* not even themselves */
    /* Of the probe prompt, until the eviction is over: the log of what its rows' exponentials sum to over the rows
     * themselves, which are not held any more. */
    float *own; /* [n_heads][rows][group] */
    uint32_t n_own;
    const int32_t *words; /* [n_words] of an episode, behind the request; the owner keeps them */
    uint32_t n_words;
    void *block;
    uint64_t bytes;
} kvs_probe;

/* ENOMEM leaves probe empty. Called once cache and policy are there. */
kvs_status kvs_probe_create(struct kvs_session *s, kvs_error *err);
void kvs_probe_free(struct kvs_session *s);
/* Runs the rows of the policy's probe, if it has one that needs no keep sets; afterwards the cache holds what it held.
 * EBUDGET: no room for them. */
kvs_status kvs_probe_before(struct kvs_session *s, struct kvs_forward *f, kvs_error *err);
/* The same for a probe that runs on keep sets, keep [n_heads][n_slots]: then every head has been chosen once. */
kvs_status kvs_probe_on_kept(struct kvs_session *s, struct kvs_forward *f, const uint8_t *keep, size_t stride,
                             kvs_error *err);
bool kvs_probe_wants_kept(const struct kvs_session *s);
/* Tokens of the request that the probe extract begins with. */
kvs_status kvs_probe_extract_tokens(const kvs_model *m, uint32_t *n_tokens, kvs_error *err);
/* What the probe extract says behind its request, borrowed until it is set anew; at most its parameter `text`. */
void kvs_probe_set_words(struct kvs_session *s, const int32_t *tokens, uint32_t n);
/* After the eviction: forgets the rows' queries. */
void kvs_probe_end(struct kvs_session *s);
/* From attention, after a layer's scores can be had: records what the rows of a run give the slots of one head. */
void kvs_probe_record(const struct kvs_attend_run *run, const struct kvs_forward *f, uint32_t layer, uint32_t head,
                      uint32_t thread);

#endif

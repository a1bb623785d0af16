/* The session: the one place that knows model, cache and policy. Shared by the files of this folder. */
#ifndef KVS_SESSION_INTERNAL_H
#define KVS_SESSION_INTERNAL_H

#include "base/base.h"
#include "cache/cache.h"
#include "cache/turns.h"
#include "model/forward.h"
#include "policy/policy.h"
#include "session/ffn_skip.h"
#include "session/observe.h"
#include "session/probe.h"
#include "session/sentences.h"
#include "session/steer.h"
#include "session/watch.h"

/* What one thread needs to look at one head; arrays that the policy does not ask for are NULL. */
typedef struct kvs_view_scratch {
    int32_t *pos, *rope_pos, *key_rot, *token; /* [n_slots] */
    uint8_t *flags;
    float *side[KVS_SIDE_COUNT];
    float *keys, *keys_raw, *values; /* [n_slots][head_dim] */
    float *prob, *logit;             /* [window][group][n_slots] */
    float *pair;                     /* [window][group][window] */
    float *query;                    /* [window][group][head_dim] */
    int32_t *window_pos;             /* [window] */
    kvs_page_view *pages;            /* [pages_bound] */
    float *physical, *most;          /* [KVS_ATTN_ROWS_MAX * group][physical slots]; [KVS_ATTN_ROWS_MAX * group] */
    kvs_policy_view *layer_views;    /* [n_kv_heads] */
    float **layer_scores;
    float *out_norm, *out_length; /* [group][n_slots] */
    double *out_gram;             /* [head_dim][head_dim] */
    float *out_rows;              /* [kvs_view_out_rows()] */
    float *work;
    uint32_t *list;   /* [physical slots] */
    uint64_t *select; /* [2 n_slots + 2] */
    uint32_t *unit;   /* [n_slots] */
    uint32_t *chosen; /* [n_slots + KVS_GUARD_WORDS] */
    uint8_t *changed; /* [n_slots] 1: the dispose stage wrote the value of this slot of n_kept */
    uint32_t n_kept;
} kvs_view_scratch;

/* Arrays an eviction works in, sized at create so that it allocates nothing. */
typedef struct kvs_evict_scratch {
    uint32_t n_slots; /* of one head */
    uint32_t n_threads, n_heads;
    uint32_t window;                                        /* rows */
    kvs_view_scratch *threads;                              /* [n_threads] */
    uint32_t stride;                                        /* of scores: n_slots and a guard */
    float *scores;                                          /* [n_heads][stride]; one head's where all see the same */
    uint8_t *keep;                                          /* [n_heads][n_slots] */
    uint32_t *n_live, *n_hard, *n_even, *n_keep, *keys;     /* [n_heads]; keys [n_heads][stride] for the budget stage */
    float *carry, *part;                                    /* [n_heads][n_slots] */
    int32_t *pos, *rope_pos, *token, *kept_pos, *kept_rope; /* [n_slots], for what one thread does */
    uint8_t *flags;
    void *block; /* all of the above */
    uint64_t bytes;
} kvs_evict_scratch;

/* Sessions that are never in work at once and keep one budget between them (episodes.c): they draw from one store of
 * blocks, and all but the first borrow the first one's scratch. */
typedef struct kvs_kinship {
    struct kvs_session *first;  /* outlives the others and still holds nothing; NULL: this is it */
    uint32_t own_tokens;        /* slots in every head that this one adds to the store; 0: as many as its budget */
    const double *layer_share;  /* as in kvs_session */
    const kvs_profile *profile; /* that no file has yet; NULL: what the spec names */
} kvs_kinship;

struct kvs_session {
    kvs_model *model;
    const kvs_allocator *allocator;
    kvs_session_options options; /* policy and position strings are not kept: see `policy` */
    kvs_policy policy;
    kvs_cache *cache;
    uint64_t n_tokens;            /* said: the next token_idx */
    uint64_t n_tokens_evicted_at; /* n_tokens at the last eviction: truncation cannot go below */
    uint64_t schedule_mark;       /* every: n_tokens of the last event; once: 1 after it */
    uint32_t chunk_tokens;
    bool uniform;              /* every head holds the same tokens */
    bool layer_uniform;        /* every head of a layer does */
    bool forward_open;         /* the mass of the latest forward goes on accumulating */
    bool last_was_prompt;      /* the newest row was not the assistant's: a decode step now ends the prefill */
    bool evicted_after_prompt; /* the same at n_tokens_evicted_at, where truncation may return to */
    double mass_lost;          /* EMA over events; -1: never recorded */
    uint64_t n_evictions, n_slots_evicted, evict_ns, score_ns, select_ns, move_ns;
    uint64_t probe_ns;       /* as the others, but since this object was made: saves do not carry it */
    uint64_t footprint_skip; /* slots counted by recomputation, not by new tokens */
    bool saw_nan;
    uint64_t perturb_seed; /* != 0: layer 0's q, k, v move by one unit in the last place (the noise floor) */
    kvs_evict_scratch scratch;
    kvs_turn_log turns; /* its memory is among scratch's bytes */
    kvs_query_log queries;
    kvs_ffn_skip ffn;
    kvs_watch *watch;    /* borrowed, or NULL */
    kvs_profile profile; /* of the budget stage's file */
    kvs_probe probe;
    int32_t probe_token;    /* what a lookahead begins with */
    const int32_t *pending; /* prompt tokens still to come in the call that is under way, or NULL */
    uint32_t n_pending;
    kvs_session *kin; /* whose scratch this one borrows, or NULL */
    const double
        *layer_share;        /* [n_layers] what a layer keeps, in even shares of a layer; NULL: 1. The owner keeps it */
    uint64_t *sentence_ends; /* [ceil(vocab / 64)] a bit a token, or NULL: only where selection asks */
    kvs_sentence_log sentences;
    kvs_steer steer;
    void (*on_event)(void *ctx, const kvs_event *event);
    void *event_ctx;
};

/* evict.c: evicts once. keep_override 0: what the policy says. *progress is false when the policy drops nothing.
 * forward: the workspace, locked, for mode recompute. Errors leave the session unchanged. */
kvs_status kvs_evict(kvs_session *s, kvs_forward *forward, uint32_t keep_override, const char *path, const char *reason,
                     bool *progress, kvs_error *err);
/* Lets the policy observe, where it wants to now; how many rows may pass until it wants to again (UINT32_MAX: never). */
uint32_t kvs_observe(kvs_session *s);
/* Slots a head keeps where a policy has no keep of its own: the trigger or the budget less one chunk. */
uint32_t kvs_keep_default(const kvs_session *s);
kvs_status kvs_evict_scratch_create(kvs_session *s, kvs_error *err);
void kvs_evict_scratch_free(kvs_session *s);

/* What is remembered of a run's rows besides their keys and values. */
typedef enum kvs_row_use {
    KVS_ROWS_ALONE = 0, /* nothing */
    KVS_ROWS_SAID,      /* of the conversation: the query log takes them */
    KVS_ROWS_LOG,       /* of a probe, as the newest rows of the query log */
    KVS_ROWS_JUDGE,     /* of a probe, what they attend to */
    KVS_ROWS_AGAIN,     /* the newest row of the conversation once more, as it was; nothing new is remembered */
} kvs_row_use;

/* attend.c: one session's share of a forward step. */
typedef struct kvs_attend_run {
    kvs_session *session;
    uint32_t row0, n_rows; /* rows of the step */
    uint32_t tap_from;     /* first row (of this run) whose attention is recorded; n_rows: none */
    bool tap_reset;        /* the accumulators of the latest forward start anew */
    bool steered;          /* said rows of a session that steers: its shift[] is of these */
    kvs_row_use use;
    uint64_t token_idx; /* of the first row */
    kvs_watch *watch;   /* NULL: nobody looks on */
} kvs_attend_run;
typedef struct kvs_attend_ctx {
    const kvs_attend_run *runs;
    uint32_t n_runs;
    bool judged;  /* some run's rows judge slots */
    bool watched; /* some run has a watch */
    bool mixed;   /* some run's policy asks what attention changes */
} kvs_attend_ctx;
/* Bytes of scratch a thread needs for sessions whose heads have n_pages at most. */
size_t kvs_attend_scratch_bytes(const kvs_model *m, uint32_t n_pages);
void kvs_attend(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows);
/* mix.c: records what attention changes of the hidden state; a kvs_forward_watch with the same ctx. */
void kvs_attend_watch(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows, kvs_forward_point point);
/* Cosine of x and x + d, n of each, in double; the same bits on every machine. 0 where either is 0. */
double kvs_cosine_after(const float *x, const float *d, uint32_t n);

/* view.c: what a policy sees of one head, in t's arrays. */
kvs_policy_view kvs_view_head(const kvs_session *s, uint32_t layer, uint32_t head, kvs_view_scratch *t);
/* Without window and query moments. */
kvs_policy_view kvs_view_contents(const kvs_session *s, uint32_t layer, uint32_t head, kvs_view_scratch *t);
/* f32 that the rows of an output projection's part, one KV head's, take. */
size_t kvs_view_out_rows(const kvs_model *m);
/* Keys before rotation, [n][head_dim], to positions `to`. */
void kvs_view_rotate(const kvs_session *s, float *keys_raw, const int32_t *to, uint32_t n);
/* The newest n slots of every head are rows of the probe, logged as tokens n_tokens on: what they give themselves, before
 * they are thrown away. */
void kvs_view_own_rows(kvs_session *s, uint32_t n);
/* Without the output projection too. */
kvs_policy_view kvs_view_kv(const kvs_session *s, uint32_t layer, uint32_t head, kvs_view_scratch *t);
/* Without keys and values too. */
kvs_policy_view kvs_view_facts(const kvs_session *s, uint32_t layer, uint32_t head, kvs_view_scratch *t);

/* step.c: appends n tokens at positions pos and runs them, without schedule and logits. EBUDGET: no room, unchanged. */
kvs_status kvs_step_raw(kvs_session *s, kvs_forward *f, const int32_t *tokens, const uint8_t *flags, const int32_t *pos,
                        uint32_t n, kvs_row_use use, kvs_error *err);
/* session.c: fills s->sentence_ends, if it is not there. */
kvs_status kvs_sentence_ends_create(kvs_session *s, kvs_error *err);
kvs_status kvs_session_forward(kvs_session *s, kvs_forward **out, kvs_error *err);

/* As kvs_session_create with a profile that no file has yet, in place of the one that the spec names. */
kvs_status kvs_session_create_profiled(kvs_model *m, const kvs_session_options *opt, const kvs_profile *profile,
                                       kvs_session **out, kvs_error *err);
/* session.c: as kvs_session_create. */
kvs_status kvs_session_create_kin(kvs_model *m, const kvs_session_options *opt, const kvs_kinship *kinship,
                                  kvs_session **out, kvs_error *err);
/* Rows of the conversation that fit before anything is evicted. */
uint32_t kvs_session_room(const kvs_session *s);

/* The noise floor: from now on this session's inputs are nudged by one rounding step, up or down by the seed. */
void kvs_session_perturb(kvs_session *s, uint64_t seed);

uint32_t kvs_side_mask(const kvs_policy *p);

#endif

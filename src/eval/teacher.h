/* Teacher forcing: one fixed token stream through a policy session and a reference session in lock-step
 * (reference/evaluation.md 3.2), so that only a block of the reference's logits is ever held. */
#ifndef KVS_EVAL_TEACHER_H
#define KVS_EVAL_TEACHER_H

#include "base/base.h"
#include "eval/routing.h"

typedef enum kvs_teacher_ref {
    KVS_TEACHER_REF_NONE = 0,
    KVS_TEACHER_REF_FULL,   /* full cache; compares tokens inside the model's window only */
    KVS_TEACHER_REF_WINDOW, /* fresh prefill of BOS and the last ref_tokens - 64 tokens, every 64 tokens */
} kvs_teacher_ref;

enum {
    KVS_TEACHER_BLOCK_TOKENS = 32,    /* rows whose logits are held: 6 MiB at 49,152 tokens */
    KVS_TEACHER_STRIDE_TOKENS = 64,   /* of the window reference, evaluation.md 3.2 */
    KVS_TEACHER_QUERY_TOKENS = 32,    /* whose queries weigh key channels: as many as ThinK takes */
    KVS_TEACHER_DECODE_TOKENS = 16,   /* greedy tokens after the stream, for tpot_ms; they need room in the budget */
    KVS_TEACHER_TURN_BEGIN = 1u << 0, /* in turns[i]: a turn begins before token i */
    KVS_TEACHER_TURN_END = 1u << 1,   /* in turns[i]: a turn ends after token i */
};

typedef struct kvs_teacher_row {
    uint32_t token_idx;  /* the token whose logits these are */
    const float *logits; /* [vocab] of the policy session, valid during the call */
    double nll;          /* of token_idx + 1; NaN for the last token */
    double ref_nll, kl;  /* NaN where there is no reference */
    bool top1;           /* same argmax as the reference */
} kvs_teacher_row;

typedef struct kvs_teacher_options {
    kvs_session_options session; /* strings borrowed */
    kvs_teacher_ref ref;
    uint32_t ref_tokens;                                   /* of REF_WINDOW; 0: the model's window */
    const uint8_t *flags;                                  /* [n_tokens] KVS_TOKEN_* bits or NULL */
    const uint8_t *turns;                                  /* [n_tokens] KVS_TEACHER_TURN_* bits or NULL */
    kvs_routing *routing;                                  /* NULL, or filled at the end; the caller's to free */
    const int32_t *fact;                                   /* for it: [n_fact] tokens, ascending, whose use is asked */
    uint32_t n_fact, answer_from;                          /* for it: answer rows are [answer_from, n_tokens) */
    volatile int *cancel;                                  /* NULL, or nonzero asks to stop (ECANCELLED) */
    bool (*on_row)(void *ctx, const kvs_teacher_row *row); /* NULL, or in token order; false cancels */
    bool (*on_end)(void *ctx, const kvs_session *s);       /* NULL, or once, with the policy session's last state */
    void (*on_progress)(void *ctx, uint64_t n_done, uint64_t n_total); /* NULL, or after each block */
    void *ctx;
} kvs_teacher_options;

/* Means run over scored tokens 1 .. n - 1 (kl, top1, ref_nll: those that the reference covers); NaN where there are
 * none. assistant_*: only tokens flagged KVS_TOKEN_ASSISTANT. */
typedef struct kvs_teacher_result {
    uint32_t n_tokens, n_scored, n_ref, n_assistant;
    double nll, ref_nll, kl_mean, kl_p99, top1;
    double assistant_nll, assistant_kl_mean;
    /* Time of the policy session alone; NaN when its steps were shared with the reference (prefill_full). */
    double ttft_ms;                   /* the whole stream, every row's logits included */
    double prefill_tok_per_s;         /* likewise */
    double tpot_ms, decode_tok_per_s; /* greedy tokens after the stream; NaN when the budget has no room for them */
    kvs_usage usage;                  /* before those tokens, as are positions and health */
    kvs_positions positions;
    kvs_health health;
    char policy[512];
    const char *position;
} kvs_teacher_result;

/* Runs tokens [n_tokens >= 2] through a new session. Without prefill_full the stream is fed in blocks of 32, the
 * reference's block before the policy's; with it each turn (or the whole stream) is one step of both.
 * Errors: as kvs_session_create and kvs_step; EINVAL for prefill_full with a reference that cannot hold the stream;
 * EBACKEND a logit was NaN; ECANCELLED. */
kvs_status kvs_eval_teacher_force(kvs_model *m, const kvs_teacher_options *opt, const int32_t *tokens,
                                  uint32_t n_tokens, kvs_teacher_result *out, kvs_error *err);

#endif

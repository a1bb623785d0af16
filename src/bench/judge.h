/* A language model as judge of single answers, 1 to 10. Off by default: it needs a transport, and none is here.
 *
 * Owns: the prompts, the reading of a reply, what a failure counts as. Does not own: the connection (kvs_judge_ops), or
 * any use of a score: judge scores enter neither health nor claims. Source: the rubric of arXiv 2511.04686's public
 * script, in our own words, and the dialogue-wide question of MT-Bench (arXiv 2306.05685). docs/judge.md has the why.
 *
 * The script turns failures into scores (5, 0, -1, 0) that enter its means. Here a failure is null with a reason,
 * and is counted; the script's numbers come back under paper_compat only, and are counted all the same. */
#ifndef KVS_BENCH_JUDGE_H
#define KVS_BENCH_JUDGE_H

#include "base/base.h"

#define KVS_JUDGE_PROMPT_VERSION 1 /* to be stored with every score: another wording is another instrument */

enum { KVS_JUDGE_SCORE_MIN = 1, KVS_JUDGE_SCORE_MAX = 10 };

/* How a prompt reaches a judge. Nothing is retried here. */
typedef struct kvs_judge_ops {
    const char *name; /* "openai", for messages */
    /* Sends prompt (NUL-terminated, borrowed), sets *reply to text that free() releases. Any status but OK is a failed
     * call, ECANCELLED aside, which stops the caller. OK with *reply NULL: answered, but without a text. */
    kvs_status (*complete)(void *ctx, const char *prompt, char **reply, kvs_error *err);
    void *ctx;
} kvs_judge_ops;

typedef enum kvs_judge_mode {
    KVS_JUDGE_PAPER = 0,  /* the judge sees the current user turn and the answer, nothing said before */
    KVS_JUDGE_CONTEXTUAL, /* it sees the whole dialogue and the last answer */
} kvs_judge_mode;

typedef enum kvs_judge_outcome {
    KVS_JUDGE_OFF = 0,     /* no transport: nothing was asked */
    KVS_JUDGE_SCORED,      /* the judge gave a score */
    KVS_JUDGE_UNREADABLE,  /* it answered, without a score where one has to be */
    KVS_JUDGE_CALL_FAILED, /* the transport failed */
    KVS_JUDGE_NO_TEXT,     /* the transport succeeded and brought no text */
    KVS_JUDGE_SKIPPED,     /* paper_compat only: the answer holds "Error", which the script takes for a crash */
    KVS_JUDGE_OUTCOME_COUNT
} kvs_judge_outcome;

typedef struct kvs_judge_result {
    kvs_judge_outcome outcome;
    bool scored;             /* false: write null. True with an outcome that is not SCORED: the script's number */
    int score;               /* 1 to 10; under paper_compat also 0 and -1; 0 if not scored */
    char reason[200];        /* why there is no score of the judge's own; "" if there is */
    uint64_t request_xxh64;  /* XXH64 (seed 0) of the prompt; 0 if none was sent */
    uint64_t response_xxh64; /* of the reply; 0 if none came */
} kvs_judge_result;

/* The prompt, owned by the caller (free). history [n_history]: what was said before user, oldest first; not looked at
 * in PAPER mode. Each text stands between lines that carry its own XXH64, so that no answer can end its block and
 * speak as the examiner. Errors: EINVAL unknown mode, user or answer NULL; ENOMEM. */
kvs_status kvs_judge_prompt(kvs_judge_mode mode, const char *user, const char *answer, const kvs_message *history,
                            size_t n_history, char **prompt, kvs_error *err);

/* The score in a reply: the integer after the last "FINAL SCORE" in any case, 1 to 10, "8/10" and **8** included;
 * a fraction, a range or a score out of another number is no score. Otherwise, under paper_compat, the last integer
 * from 1 to 10 in the text, else 5. Fills outcome, scored, score and reason only. */
void kvs_judge_parse(const char *reply, bool paper_compat, kvs_judge_result *result);

/* Asks for one answer's score. ops NULL: the judge is off and result says so. A failed judge is not an error of the
 * benchmark: it is OK with scored false (paper_compat: 0 for a failed call, -1 for a reply without text).
 * Errors: EINVAL as kvs_judge_prompt, or ops without complete; ENOMEM; ECANCELLED from the transport. The result is
 * zeroed on error. */
kvs_status kvs_judge_turn(const kvs_judge_ops *ops, kvs_judge_mode mode, bool paper_compat, const char *user,
                          const char *answer, const kvs_message *history, size_t n_history, kvs_judge_result *result,
                          kvs_error *err);

typedef struct kvs_judge_tally {
    uint64_t n[KVS_JUDGE_OUTCOME_COUNT];
} kvs_judge_tally;
void kvs_judge_tally_add(kvs_judge_tally *t, const kvs_judge_result *result);
/* Share of the answers due for judging (OFF is not due) that got no score of the judge's own, whatever number
 * paper_compat put there; NaN if none was due. */
double kvs_judge_failure_rate(const kvs_judge_tally *t);

#endif

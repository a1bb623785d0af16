/* How broken a generated text is, on token ids: repetition, loops, echo of the prompt, and agreement of two
 * trajectories. Knows no model. Formulas: docs/metrics.md, "Degeneration". */
#ifndef KVS_DEGENERATION_H
#define KVS_DEGENERATION_H

#include "base/base.h"

enum {
    KVS_DEGEN_TOKENS_MIN = 32, /* shorter texts repeat too little to judge */
    KVS_DEGEN_NGRAM_MAX = 4,
    KVS_DEGEN_PERIOD_MAX = 64,
    KVS_DEGEN_PERIOD_TOKENS = 128,
};

typedef struct kvs_degeneration {
    bool valid;                           /* n >= 32; else every number is NaN and the rest 0 */
    double rep[KVS_DEGEN_NGRAM_MAX];      /* rep[k - 1] = 1 - unique k-grams / k-grams */
    double distinct[KVS_DEGEN_NGRAM_MAX]; /* 1 - rep */
    bool looped;                          /* rep[3] >= 0.5 */
    double longest_repeat;                /* longest span that starts at two places (they may overlap) / n */
    uint32_t max_run;                     /* longest run of one token */
    uint32_t period;                      /* smallest period <= 64 of the last 128 tokens; 0: none */
    double prompt_echo;                   /* share of the text's 4-grams that the user's turn has; NaN without a turn */
} kvs_degeneration;

/* y [n] the text, user [n_user] the turn it answers; user may be NULL when n_user is 0. Deterministic, O(n log^2 n).
 * allocator NULL: default. ENOMEM. */
kvs_status kvs_degeneration_measure(const int32_t *y, size_t n, const int32_t *user, size_t n_user,
                                    const kvs_allocator *allocator, kvs_degeneration *out, kvs_error *err);

/* Common prefix / reference length, on token ids as decoded. 1 when both are empty, 0 when only ref is. */
double kvs_trajectory_agreement(const int32_t *ref, size_t n_ref, const int32_t *candidate, size_t n_candidate);

/* Text quality by bytes: 1 unless all of it is UTF-8; and replacement characters (U+FFFD) per byte of text. */
double kvs_invalid_utf8(const char *text, size_t n_bytes);
double kvs_replacement_rate(const char *text, size_t n_bytes);

#endif

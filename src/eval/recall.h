/* Did the answer hold the fact? Normalised exact match against gold values and confusers, logit recall by forced
 * choice, and survival of the fact's tokens in the cache. Normalisation follows SQuAD's, which the long-context
 * benchmarks share (docs/metrics.md, "Recall"). */
#ifndef KVS_RECALL_H
#define KVS_RECALL_H

#include "base/base.h"

/* Lower case (ASCII), no articles (a, an, the), single spaces. Apostrophes vanish, a comma between digits vanishes, a
 * point between digits stays, all other ASCII punctuation is a space; other bytes are kept. Writes at most n_bytes + 1
 * bytes with the NUL, so out [n_bytes + 1] always suffices; returns the length. */
size_t kvs_recall_normalise(const char *text, size_t n_bytes, char *out);

typedef struct kvs_recall_result {
    bool hit;           /* all values present and no confuser */
    double fraction;    /* of the values present */
    bool wrong_binding; /* a confuser is present */
    uint32_t n_values;
} kvs_recall_result;
/* Matches whole words of the normalised texts. A value or confuser that normalises to nothing is EINVAL, for it would
 * match anywhere. values [n_values >= 1], confusers [n_confusers] NUL-terminated. ENOMEM. */
kvs_status kvs_recall_score(const char *answer, size_t n_bytes, const char *const *values, uint32_t n_values,
                            const char *const *confusers, uint32_t n_confusers, const kvs_allocator *allocator,
                            kvs_recall_result *out, kvs_error *err);

/* Forced choice: candidates by mean log-probability per token. */
typedef struct kvs_choice {
    bool correct;        /* gold strictly above every other */
    double margin;       /* gold's mean minus the best other's, nats per token */
    double gold_logprob; /* mean over gold's tokens */
} kvs_choice;
/* logprob [n] sums over n_tokens [n] tokens each; n >= 2, gold < n, every n_tokens >= 1, else EINVAL. */
kvs_status kvs_recall_choice(const double *logprob, const uint32_t *n_tokens, uint32_t n, uint32_t gold,
                             kvs_choice *out, kvs_error *err);

/* held_in [n_tokens]: how many of n_heads (layer, KV head) hold each token of the fact. survival: mean share; erased:
 * share of tokens held nowhere. NaN when there are none. */
void kvs_recall_survival(const uint32_t *held_in, uint32_t n_tokens, uint32_t n_heads, double *survival,
                         double *erased);

/* mean(hit_policy | hit_full); NaN when the full cache never hit. */
double kvs_recall_retention(const uint8_t *hit_policy, const uint8_t *hit_full, size_t n);

#endif

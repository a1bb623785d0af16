/* What the kinds of profiles share. */
#ifndef KVS_EVAL_PROFILE_INTERNAL_H
#define KVS_EVAL_PROFILE_INTERNAL_H

#include "eval/profile.h"
#include "session/session_internal.h"

enum { KVS_PROFILE_BLOCK = 128 }; /* tokens of a step: what a progress line and Ctrl-C wait for */

typedef struct kvs_profile_run {
    kvs_model *m;
    const kvs_profile_options *opt;
    const kvs_profile_text *texts;
    uint32_t n_texts;
    uint64_t n_done, n_total; /* tokens, for progress */
    kvs_profile_made *out;
    kvs_error *err;
} kvs_profile_run;

/* A session of the run's arithmetic; f32 keys and values. profile may be NULL. */
kvs_status kvs_profile_session(kvs_profile_run *r, const char *policy, uint32_t budget_tokens,
                               const kvs_profile *profile, kvs_session **out);
/* Appends tokens, seen by watch (fn NULL: by nobody); progress and cancel. */
kvs_status kvs_profile_extend(kvs_profile_run *r, kvs_session *s, const int32_t *tokens, uint32_t n,
                              kvs_forward_watch watch);
/* Cosine of a and b [n] in double; 0 where either is 0. */
double kvs_profile_cosine(const float *a, const float *b, uint32_t n);
uint32_t kvs_profile_shortest(const kvs_profile_run *r);

kvs_status kvs_profile_baklava(kvs_profile_run *r);
kvs_status kvs_profile_sensitivity(kvs_profile_run *r);
kvs_status kvs_profile_duo(kvs_profile_run *r);
kvs_status kvs_profile_kvzip_head(kvs_profile_run *r);
kvs_status kvs_profile_lukv(kvs_profile_run *r);

/* baklava: weights of heads by class of what they are worth; equal worth gives 1 everywhere. low, high: parts of all
 * heads below and above the two borders; few, many: the weights there. */
void kvs_profile_classes(const double *worth, uint32_t n, double low, double high, double few, double many,
                         double *weights);
/* lukv: adds [n], what each of n in a row adds, becomes the slopes of the least concave majorant of their sums.
 * size: [n] scratch. */
void kvs_profile_hull(double *adds, uint32_t *size, uint32_t n);
/* duo: area under the cumulated attention of the last of n positions when all hold the same query and key; pairs of
 * dims turn by theta [n_freq] a position. */
double kvs_profile_reach(const double *q, const double *k, uint32_t head_dim, const double *theta, uint32_t n_freq,
                         uint32_t n);

#endif

/* Per-token scores of a teacher-forced run and what is reported of them: NLL, KL, agreement, entropy strata, memory
 * footprint, times. Sums run in token order, so equal logs give equal bytes. Formulas: docs/metrics.md. */
#ifndef KVS_METRICS_H
#define KVS_METRICS_H

#include "base/base.h"
#include "kernels/kernels.h"

/* ---- token scores ---- */

/* Which score sets a token belongs to. */
enum {
    KVS_SCORE_ASSISTANT = 1u << 0,      /* said by the assistant */
    KVS_SCORE_AFTER_EVICTION = 1u << 1, /* among the first 32 tokens after an eviction */
    KVS_SCORE_KEY = 1u << 2,            /* needs long context (kvs_score_is_key), frozen before policies run */
};

typedef struct kvs_token_score {
    double nll;         /* -ln q(x), policy */
    double nll_ref;     /* -ln p(x), reference */
    double kl, jsd;     /* KL(p || q), nats; Jensen-Shannon, [0, ln 2] */
    double entropy_ref; /* of p, nats */
    double delta_p;     /* q(x) - p(x) */
    double top5;        /* overlap of the five likeliest, [0, 1]; NaN if not computed */
    uint32_t turn;
    uint16_t sets; /* KVS_SCORE_* */
    bool top1;     /* the likeliest tokens agree */
} kvs_token_score;

/* The score of token x from both rows' comparison and the two logits of x; turn and sets are left 0, top5 NaN. */
kvs_token_score kvs_token_score_of(const kvs_dist_pair *pair, float logit_ref, float logit_policy);
/* |top k of p, and of q| / k; ties go to the lower index. k in [1, 16], at most n. */
double kvs_top_overlap(const float *p_logits, const float *q_logits, uint32_t n, uint32_t k);
/* LongPPL's rule with its numbers: the token is hard without the far context and easy with it. */
bool kvs_score_is_key(double nll_short, double nll_full);

/* Scores in the order they were added. One writer; logs of parallel dialogues are merged in a fixed order. */
typedef struct kvs_scores {
    kvs_token_score *items; /* [n] */
    size_t n, cap;
    uint64_t n_clipped; /* KL below 0 by rounding, set to 0 */
    bool has_ref;       /* false: only nll, turn and sets mean anything */
    const kvs_allocator *allocator;
} kvs_scores;
void kvs_scores_init(kvs_scores *log, bool has_ref, const kvs_allocator *allocator); /* allocator NULL: default */
void kvs_scores_free(kvs_scores *log);
/* KL in [-1e-6, 0) is rounding, becomes 0 and is counted; below that, and for anything not finite, EINVAL (top5 may
 * be NaN) and the log is unchanged. ENOMEM. */
kvs_status kvs_scores_add(kvs_scores *log, const kvs_token_score *score, kvs_error *err);
/* Appends from to into. EINVAL if only one has a reference. */
kvs_status kvs_scores_merge(kvs_scores *into, const kvs_scores *from, kvs_error *err);

enum { KVS_SCORE_STRATA = 4 };
#define KVS_SCORE_ALL_TURNS UINT32_MAX

/* Everything is NaN that the selection or the lack of a reference leaves undefined. */
typedef struct kvs_score_summary {
    size_t n;
    double nll, ppl;                                   /* mean, exp(mean) */
    double nll_ref, ppl_ref, ppl_ratio;                /* exp(mean(nll - nll_ref)) */
    double kl_mean, kl_median, kl_p95, kl_p99, kl_max; /* nats */
    double jsd, top1, top5, rms_delta_p;
    /* mean nll - nll_ref by quartile of entropy_ref: below edge[0], [edge[0], edge[1]), ... */
    double delta_nll[KVS_SCORE_STRATA], entropy_edge[KVS_SCORE_STRATA - 1];
    size_t n_stratum[KVS_SCORE_STRATA];
    uint64_t n_clipped; /* of the whole log */
} kvs_score_summary;
/* Over tokens of `turn` (or KVS_SCORE_ALL_TURNS) that have every bit of `sets` (0: all). ENOMEM. */
kvs_status kvs_scores_finish(const kvs_scores *log, uint16_t sets, uint32_t turn, kvs_score_summary *out,
                             kvs_error *err);

/* ---- memory ---- */

/* KV footprint (arXiv 2506.17121): live slots summed over tokens as a share of the full cache's. */
typedef struct kvs_footprint {
    double live_sum, live_max;
    uint64_t n_tokens;
} kvs_footprint;
/* Once per token: slots over all (layer, KV head) while it attends, its own included. */
void kvs_footprint_add(kvs_footprint *f, uint64_t live_slots);
/* footprint = sum / (n_heads T (T + 1) / 2), peak = max / (n_heads T), n_heads counting (layer, KV head). NaN at 0. */
void kvs_footprint_finish(const kvs_footprint *f, uint64_t n_heads, double *footprint, double *peak);
double kvs_overshoot(uint64_t peak_bytes, uint64_t budget_bytes); /* peak / budget - 1; NaN for budget 0 */

/* ---- time ---- */

/* Mean time between tokens: (last - first) / (n - 1); NaN for n < 2. */
double kvs_tpot_ms(uint64_t first_ns, uint64_t last_ns, uint32_t n_tokens);

typedef struct kvs_time_summary {
    size_t n;
    double median, q1, q3, iqr, min, max, p95, mean;
} kvs_time_summary;
/* ms [n], scratch [n]. The caller leaves the first repetition out. All NaN at n = 0. */
void kvs_time_summarise(const double *ms, size_t n, double *scratch, kvs_time_summary *out);

#endif

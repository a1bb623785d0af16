/* Aggregation of token scores, footprint and times; see metrics.h. Report format of the KL block after llama.cpp's
 * perplexity tool (mean, median, percentiles, RMS of the probability difference, same-top share). */
#include "eval/metrics.h"

#include "eval/stats.h"

#include <math.h>
#include <string.h>

/* f32 log-softmax with f64 sums leaves KL of equal rows within 1e-6 of 0. */
static const double KL_ROUNDING = 1e-6;

/* ---- token scores ---- */

kvs_token_score kvs_token_score_of(const kvs_dist_pair *pair, float logit_ref, float logit_policy)
{
    const double ln_p = (double)logit_ref - pair->lse_p, ln_q = (double)logit_policy - pair->lse_q;
    return (kvs_token_score){.nll = -ln_q,
                             .nll_ref = -ln_p,
                             .kl = pair->kl,
                             .jsd = pair->jsd,
                             .entropy_ref = pair->entropy_p,
                             .delta_p = exp(ln_q) - exp(ln_p),
                             .top5 = NAN,
                             .top1 = pair->argmax_p == pair->argmax_q};
}

enum { TOP_MAX = 16 };

/* Indices of the k largest, descending; ties to the lower index. */
static void top_indices(const float *logits, uint32_t n, uint32_t k, uint32_t *top)
{
    uint32_t held = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (held == k && !(logits[i] > logits[top[k - 1]]))
            continue;
        uint32_t at = held < k ? held++ : k - 1;
        for (; at > 0 && logits[i] > logits[top[at - 1]]; at--)
            top[at] = top[at - 1];
        top[at] = i;
    }
}

double kvs_top_overlap(const float *p_logits, const float *q_logits, uint32_t n, uint32_t k)
{
    uint32_t top_p[TOP_MAX] = {0}, top_q[TOP_MAX] = {0}, shared = 0;
    k = kvs_min_u32(kvs_min_u32(k, TOP_MAX), n);
    if (k == 0)
        return NAN;
    top_indices(p_logits, n, k, top_p);
    top_indices(q_logits, n, k, top_q);
    for (uint32_t i = 0; i < k; i++) {
        for (uint32_t j = 0; j < k; j++)
            shared += top_p[i] == top_q[j];
    }
    return (double)shared / (double)k;
}

bool kvs_score_is_key(double nll_short, double nll_full)
{
    return nll_short - nll_full > 2.0 && nll_full < 2.0;
}

void kvs_scores_init(kvs_scores *log, bool has_ref, const kvs_allocator *allocator)
{
    *log = (kvs_scores){.has_ref = has_ref, .allocator = allocator};
}

void kvs_scores_free(kvs_scores *log)
{
    kvs_free(log->allocator, log->items);
    kvs_scores_init(log, log->has_ref, log->allocator);
}

static kvs_status scores_reserve(kvs_scores *log, size_t more, kvs_error *err)
{
    if (more <= log->cap - log->n)
        return KVS_OK;
    const size_t doubled = log->cap < 256 ? 256 : log->cap * 2;
    const size_t cap = log->n + more > doubled ? log->n + more : doubled;
    kvs_token_score *items = kvs_alloc(log->allocator, cap, sizeof *items);
    if (items == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the scores of %zu tokens", cap);
    if (log->n > 0)
        memcpy(items, log->items, log->n * sizeof *items);
    kvs_free(log->allocator, log->items);
    log->items = items;
    log->cap = cap;
    return KVS_OK;
}

kvs_status kvs_scores_add(kvs_scores *log, const kvs_token_score *score, kvs_error *err)
{
    bool finite = isfinite(score->nll);
    if (log->has_ref)
        finite = finite && isfinite(score->nll_ref) && isfinite(score->kl) && isfinite(score->jsd) &&
                 isfinite(score->entropy_ref) && isfinite(score->delta_p);
    if (!finite)
        return kvs_error_set(err, KVS_EINVAL, "token %zu: a score is not finite (nll %g, kl %g)", log->n, score->nll,
                             log->has_ref ? score->kl : 0.0);
    if (log->has_ref && score->kl < -KL_ROUNDING)
        return kvs_error_set(err, KVS_EINVAL, "token %zu: KL is %g, and cannot be below -1e-6", log->n, score->kl);
    KVS_TRY(scores_reserve(log, 1, err));
    kvs_token_score *item = &log->items[log->n++];
    *item = *score;
    if (log->has_ref && item->kl < 0.0) {
        item->kl = 0.0;
        log->n_clipped++;
    }
    return KVS_OK;
}

kvs_status kvs_scores_merge(kvs_scores *into, const kvs_scores *from, kvs_error *err)
{
    if (into->has_ref != from->has_ref)
        return kvs_error_set(err, KVS_EINVAL, "scores %s a reference cannot join scores %s one",
                             from->has_ref ? "with" : "without", into->has_ref ? "with" : "without");
    const size_t n = from->n; /* from may be into */
    KVS_TRY(scores_reserve(into, n, err));
    if (n > 0)
        memcpy(into->items + into->n, from->items, n * sizeof *into->items);
    into->n += n;
    into->n_clipped += from->n_clipped;
    return KVS_OK;
}

static void summarise_strata(const kvs_token_score *const *chosen, size_t n, double *scratch, kvs_score_summary *out)
{
    for (size_t i = 0; i < n; i++)
        scratch[i] = chosen[i]->entropy_ref;
    kvs_sort_doubles(scratch, n);
    for (int edge = 0; edge < KVS_SCORE_STRATA - 1; edge++)
        out->entropy_edge[edge] = kvs_quantile_sorted(scratch, n, (edge + 1) / (double)KVS_SCORE_STRATA);
    double sum[KVS_SCORE_STRATA] = {0};
    for (size_t i = 0; i < n; i++) {
        int stratum = 0;
        while (stratum < KVS_SCORE_STRATA - 1 && chosen[i]->entropy_ref >= out->entropy_edge[stratum])
            stratum++;
        sum[stratum] += chosen[i]->nll - chosen[i]->nll_ref;
        out->n_stratum[stratum]++;
    }
    for (int s = 0; s < KVS_SCORE_STRATA; s++)
        out->delta_nll[s] = out->n_stratum[s] > 0 ? sum[s] / (double)out->n_stratum[s] : NAN;
}

static void summarise_reference(const kvs_token_score *const *chosen, size_t n, double *scratch, kvs_score_summary *out)
{
    double nll_ref = 0.0, delta_nll = 0.0, kl = 0.0, jsd = 0.0, top1 = 0.0, top5 = 0.0, squares = 0.0;
    for (size_t i = 0; i < n; i++) {
        const kvs_token_score *s = chosen[i];
        nll_ref += s->nll_ref;
        delta_nll += s->nll - s->nll_ref;
        kl += s->kl;
        jsd += s->jsd;
        top1 += s->top1 ? 1.0 : 0.0;
        top5 += s->top5; /* NaN once is NaN for all: a mean over some would mislead */
        squares += s->delta_p * s->delta_p;
        scratch[i] = s->kl;
    }
    const double count = (double)n;
    out->nll_ref = nll_ref / count;
    out->ppl_ref = exp(out->nll_ref);
    out->ppl_ratio = exp(delta_nll / count);
    out->kl_mean = kl / count;
    out->jsd = jsd / count;
    out->top1 = top1 / count;
    out->top5 = top5 / count;
    out->rms_delta_p = sqrt(squares / count);
    kvs_sort_doubles(scratch, n);
    out->kl_median = kvs_quantile_sorted(scratch, n, 0.50);
    out->kl_p95 = kvs_quantile_sorted(scratch, n, 0.95);
    out->kl_p99 = kvs_quantile_sorted(scratch, n, 0.99);
    out->kl_max = scratch[n - 1];
}

static void summary_undefined(kvs_score_summary *out)
{
    *out = (kvs_score_summary){.nll = NAN, .ppl = NAN, .nll_ref = NAN, .ppl_ref = NAN, .ppl_ratio = NAN};
    out->kl_mean = out->kl_median = out->kl_p95 = out->kl_p99 = out->kl_max = NAN;
    out->jsd = out->top1 = out->top5 = out->rms_delta_p = NAN;
    for (int s = 0; s < KVS_SCORE_STRATA; s++)
        out->delta_nll[s] = NAN;
    for (int edge = 0; edge < KVS_SCORE_STRATA - 1; edge++)
        out->entropy_edge[edge] = NAN;
}

kvs_status kvs_scores_finish(const kvs_scores *log, uint16_t sets, uint32_t turn, kvs_score_summary *out,
                             kvs_error *err)
{
    summary_undefined(out);
    out->n_clipped = log->n_clipped;
    const kvs_token_score **chosen = kvs_alloc(log->allocator, log->n, sizeof *chosen);
    double *scratch = kvs_alloc(log->allocator, log->n, sizeof *scratch);
    if (chosen == NULL || scratch == NULL) {
        kvs_free(log->allocator, chosen);
        kvs_free(log->allocator, scratch);
        return kvs_error_set(err, KVS_ENOMEM, "no memory to summarise %zu tokens", log->n);
    }
    double nll = 0.0;
    for (size_t i = 0; i < log->n; i++) {
        const kvs_token_score *s = &log->items[i];
        if ((s->sets & sets) != sets || (turn != KVS_SCORE_ALL_TURNS && s->turn != turn))
            continue;
        chosen[out->n++] = s;
        nll += s->nll;
    }
    if (out->n > 0) {
        out->nll = nll / (double)out->n;
        out->ppl = exp(out->nll);
        if (log->has_ref) {
            summarise_reference(chosen, out->n, scratch, out);
            summarise_strata(chosen, out->n, scratch, out);
        }
    }
    kvs_free(log->allocator, chosen);
    kvs_free(log->allocator, scratch);
    return KVS_OK;
}

/* ---- memory ---- */

void kvs_footprint_add(kvs_footprint *f, uint64_t live_slots)
{
    f->live_sum += (double)live_slots;
    f->live_max = fmax(f->live_max, (double)live_slots);
    f->n_tokens++;
}

void kvs_footprint_finish(const kvs_footprint *f, uint64_t n_heads, double *footprint, double *peak)
{
    const double tokens = (double)f->n_tokens, heads = (double)n_heads;
    const bool defined = f->n_tokens > 0 && n_heads > 0;
    *footprint = defined ? f->live_sum / (heads * (tokens * (tokens + 1.0) / 2.0)) : NAN;
    *peak = defined ? f->live_max / (heads * tokens) : NAN;
}

double kvs_overshoot(uint64_t peak_bytes, uint64_t budget_bytes)
{
    return budget_bytes > 0 ? (double)peak_bytes / (double)budget_bytes - 1.0 : NAN;
}

/* ---- time ---- */

double kvs_tpot_ms(uint64_t first_ns, uint64_t last_ns, uint32_t n_tokens)
{
    return n_tokens >= 2 && last_ns >= first_ns ? (double)(last_ns - first_ns) / 1e6 / (double)(n_tokens - 1) : NAN;
}

void kvs_time_summarise(const double *ms, size_t n, double *scratch, kvs_time_summary *out)
{
    if (n > 0)
        memcpy(scratch, ms, n * sizeof *ms);
    kvs_sort_doubles(scratch, n);
    out->n = n;
    out->median = kvs_quantile_sorted(scratch, n, 0.50);
    out->q1 = kvs_quantile_sorted(scratch, n, 0.25);
    out->q3 = kvs_quantile_sorted(scratch, n, 0.75);
    out->iqr = out->q3 - out->q1;
    out->min = kvs_quantile_sorted(scratch, n, 0.0);
    out->max = kvs_quantile_sorted(scratch, n, 1.0);
    out->p95 = kvs_quantile_sorted(scratch, n, 0.95);
    out->mean = kvs_mean(ms, n);
}

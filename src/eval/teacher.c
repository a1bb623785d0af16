/* The teacher-forcing loop. The policy's and the reference's rows meet in a queue that holds whichever side is ahead;
 * both arrive in token order, so a plain ring is enough. */
#include "eval/teacher.h"

#include "eval/metrics.h"
#include "model/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { QUEUE_ROWS_MAX = 2048 /* 384 MiB at 49,152 tokens: a step in which one side runs further ahead is refused */ };

typedef struct teacher {
    kvs_model *m;
    const kvs_kernels *kernels;
    const kvs_allocator *allocator;
    const kvs_teacher_options *opt;
    const int32_t *tokens;
    uint32_t n_tokens, vocab_size, window_tokens;
    kvs_session *policy, *ref;
    kvs_watch *policy_watch, *ref_watch; /* NULL where nobody asks */
    /* rows of the side that is ahead: ring [queue_cap][vocab] */
    float *queue;
    uint32_t queue_cap, queue_head, queue_n;
    bool queue_is_ref;
    bool comparing;     /* the current step's rows have a reference */
    uint32_t next_row;  /* the policy row that is compared next */
    kvs_status failure; /* what a callback found; kvs_step only says that it was cancelled */
    kvs_error *err;
    kvs_scores all, compared;
    uint64_t step_ns;
    bool time_is_shared;
    kvs_teacher_result *out;
} teacher;

/* ---- one row ---------------------------------------------------------------------------------------------------- */

static bool refuse(teacher *t, kvs_status status, const char *message)
{
    t->failure = kvs_error_set(t->err, status, "%s (token %u)", message, t->next_row);
    return false;
}

/* Every token enters `all`; those that have a reference enter `compared` too, for a full reference ends at the window. */
static bool count_row(teacher *t, const kvs_teacher_row *row, const kvs_dist_pair *pair, float logit_ref,
                      float logit_policy)
{
    kvs_token_score score = {.nll = row->nll};
    if (pair != NULL)
        score = kvs_token_score_of(pair, logit_ref, logit_policy);
    if (t->opt->flags != NULL && (t->opt->flags[row->token_idx + 1] & KVS_TOKEN_ASSISTANT) != 0)
        score.sets = KVS_SCORE_ASSISTANT;
    t->failure = kvs_scores_add(&t->all, &score, t->err);
    if (t->failure == KVS_OK && pair != NULL)
        t->failure = kvs_scores_add(&t->compared, &score, t->err);
    return t->failure == KVS_OK;
}

/* One row of the policy session, with the reference's logits or NULL. */
static bool score_row(teacher *t, const float *logits, const float *ref)
{
    kvs_teacher_row row = {.token_idx = t->next_row, .logits = logits, .nll = NAN, .ref_nll = NAN, .kl = NAN};
    const bool last = t->next_row + 1 >= t->n_tokens;
    const int32_t target = last ? 0 : t->tokens[t->next_row + 1];
    kvs_dist_pair pair;
    double lse;
    if (ref != NULL) {
        t->kernels->dist_pair(&pair, ref, logits, t->vocab_size);
        row.kl = pair.kl;
        row.top1 = pair.argmax_p == pair.argmax_q;
        row.ref_nll = last ? NAN : pair.lse_p - (double)ref[target];
        lse = pair.lse_q;
    } else {
        lse = t->kernels->logsumexp(logits, t->vocab_size, NULL);
    }
    if (!isfinite(lse) || isnan(row.kl) != (ref == NULL))
        return refuse(t, KVS_EBACKEND, "the logits are not finite");
    if (!last) {
        row.nll = lse - (double)logits[target];
        if (!count_row(t, &row, ref != NULL ? &pair : NULL, ref != NULL ? ref[target] : 0, logits[target]))
            return false;
    }
    if (t->opt->on_row != NULL && !t->opt->on_row(t->opt->ctx, &row)) {
        t->failure = kvs_error_set(t->err, KVS_ECANCELLED, "cancelled at token %u", t->next_row);
        return false;
    }
    t->next_row++;
    return t->opt->cancel == NULL || *t->opt->cancel == 0;
}

/* ---- two sides meet --------------------------------------------------------------------------------------------- */

static bool queue_grow(teacher *t)
{
    const uint32_t cap = t->queue_cap * 2;
    if (cap > QUEUE_ROWS_MAX)
        return refuse(t, KVS_ENOMEM, "one session ran too far ahead of the other");
    float *const grown = kvs_alloc(t->allocator, (size_t)cap * t->vocab_size, sizeof(float));
    if (grown == NULL)
        return refuse(t, KVS_ENOMEM, "no memory for rows of logits");
    for (uint32_t i = 0; i < t->queue_n; i++)
        memcpy(grown + (size_t)i * t->vocab_size,
               t->queue + (size_t)((t->queue_head + i) % t->queue_cap) * t->vocab_size,
               (size_t)t->vocab_size * sizeof(float));
    kvs_free(t->allocator, t->queue);
    t->queue = grown;
    t->queue_cap = cap;
    t->queue_head = 0;
    return true;
}

static bool on_side(teacher *t, bool is_ref, const float *logits)
{
    if (t->queue_n > 0 && t->queue_is_ref != is_ref) {
        const float *const waiting = t->queue + (size_t)t->queue_head * t->vocab_size;
        const bool go_on = score_row(t, is_ref ? waiting : logits, is_ref ? logits : waiting);
        t->queue_head = (t->queue_head + 1) % t->queue_cap;
        t->queue_n--;
        return go_on;
    }
    if (t->queue_n >= t->queue_cap && !queue_grow(t))
        return false;
    t->queue_is_ref = is_ref;
    /* NOLINTNEXTLINE(clang-analyzer-core.DivideZero): queue_grow made room */
    const uint32_t tail = (t->queue_head + t->queue_n) % t->queue_cap;
    memcpy(t->queue + (size_t)tail * t->vocab_size, logits, (size_t)t->vocab_size * sizeof(float));
    t->queue_n++;
    return true;
}

static bool on_policy_row(void *ctx, uint32_t row, const float *logits)
{
    (void)row;
    teacher *const t = ctx;
    return t->comparing ? on_side(t, false, logits) : score_row(t, logits, NULL);
}

static bool on_ref_row(void *ctx, uint32_t row, const float *logits)
{
    (void)row;
    return on_side(ctx, true, logits);
}

/* ---- steps ------------------------------------------------------------------------------------------------------ */

static kvs_status step(teacher *t, kvs_run *runs, uint32_t n_runs)
{
    t->failure = KVS_OK;
    const kvs_status status = kvs_step(runs, n_runs, t->err);
    if (status == KVS_ECANCELLED && t->failure != KVS_OK)
        return t->failure;
    return status;
}

/* A reference that slides: what does not fit its window any more is forgotten by a fresh prefill, never by eviction. */
static kvs_status ref_slide(teacher *t, uint32_t at, uint32_t n)
{
    const uint32_t cap = t->opt->ref_tokens > 0 ? t->opt->ref_tokens : t->window_tokens;
    if (kvs_session_n_tokens(t->ref) + n <= cap)
        return KVS_OK;
    const uint32_t n_bos = t->tokens[0] == kvs_token_bos(t->m) ? 1 : 0;
    const uint32_t n_fresh = cap - KVS_TEACHER_STRIDE_TOKENS - n_bos;
    KVS_TRY(kvs_session_truncate(t->ref, 0, t->err));
    if (n_bos > 0)
        KVS_TRY(kvs_session_extend(t->ref, t->tokens, NULL, 1, NULL, t->err));
    return kvs_session_extend(t->ref, t->tokens + (at - n_fresh), NULL, n_fresh, NULL, t->err);
}

/* Tokens [at, at + n) through both sessions; wanted rows are all of them. */
static kvs_status feed(teacher *t, uint32_t at, uint32_t n, const uint8_t *want)
{
    const uint8_t *const flags = t->opt->flags != NULL ? t->opt->flags + at : NULL;
    kvs_run runs[2] = {
        {.session = t->policy,
         .tokens = t->tokens + at,
         .flags = flags,
         .n_tokens = n,
         .on_logits = on_policy_row,
         .want = want,
         .ctx = t},
        {.session = t->ref,
         .tokens = t->tokens + at,
         .flags = flags,
         .n_tokens = n,
         .on_logits = on_ref_row,
         .want = want,
         .ctx = t},
    };
    t->comparing = t->ref != NULL;
    if (t->comparing && t->opt->ref == KVS_TEACHER_REF_WINDOW)
        KVS_TRY(ref_slide(t, at, n));
    /* Apart, each step's time belongs to one session; results are the same either way. A whole prefill has to go
     * together, or all of the reference's logits would have to wait for the policy's. */
    const bool together = t->comparing && t->opt->session.prefill_full;
    t->time_is_shared = t->time_is_shared || together;
    if (t->comparing && !together)
        KVS_TRY(step(t, runs + 1, 1));
    const uint64_t begin_ns = kvs_now_ns();
    KVS_TRY(step(t, runs, together ? 2 : 1));
    t->step_ns += kvs_now_ns() - begin_ns;
    return KVS_OK;
}

/* How many tokens go together from `at`: to the end of the turn, of the block, of the reference's window. */
static uint32_t block_length(const teacher *t, uint32_t at)
{
    uint32_t n = t->n_tokens - at;
    if (!t->opt->session.prefill_full)
        n = kvs_min_u32(n, KVS_TEACHER_BLOCK_TOKENS);
    if (t->ref != NULL && t->opt->ref == KVS_TEACHER_REF_FULL)
        n = kvs_min_u32(n, t->window_tokens - at); /* feed_all ends the reference at the window */
    for (uint32_t i = 0; t->opt->turns != NULL && i < n; i++) {
        if (i > 0 && (t->opt->turns[at + i] & KVS_TEACHER_TURN_BEGIN))
            return i;
        if (t->opt->turns[at + i] & KVS_TEACHER_TURN_END)
            return i + 1;
    }
    return n;
}

static kvs_status feed_all(teacher *t)
{
    uint8_t *const want = kvs_alloc(t->allocator, t->n_tokens, 1);
    if (want == NULL)
        return kvs_error_set(t->err, KVS_ENOMEM, "no memory for %u tokens", t->n_tokens);
    memset(want, 1, t->n_tokens);
    kvs_status status = KVS_OK;
    for (uint32_t at = 0; status == KVS_OK && at < t->n_tokens;) {
        if (t->ref != NULL && t->opt->ref == KVS_TEACHER_REF_FULL && at >= t->window_tokens)
            kvs_session_free(&t->ref);
        const uint8_t *const turns = t->opt->turns;
        if (turns != NULL && (turns[at] & KVS_TEACHER_TURN_BEGIN))
            status = kvs_session_turn_begin(t->policy, t->err);
        const uint32_t n = block_length(t, at);
        if (status == KVS_OK)
            status = feed(t, at, n, want);
        if (status == KVS_OK && turns != NULL && (turns[at + n - 1] & KVS_TEACHER_TURN_END))
            status = kvs_session_turn_end(t->policy, t->err);
        at += n;
        if (t->opt->on_progress != NULL)
            t->opt->on_progress(t->opt->ctx, at, t->n_tokens);
        if (status == KVS_OK && t->opt->cancel != NULL && *t->opt->cancel != 0)
            status = kvs_error_set(t->err, KVS_ECANCELLED, "cancelled at token %u", at);
    }
    kvs_free(t->allocator, want);
    return status;
}

/* ---- the whole -------------------------------------------------------------------------------------------------- */

/* Greedy tokens after the stream, one at a time. A budget without room for them is no failure of the evaluation. */
static void time_decode(teacher *t)
{
    float *const logits = kvs_alloc(t->allocator, t->vocab_size, sizeof(float));
    int32_t token = t->tokens[t->n_tokens - 1];
    const uint8_t answer = KVS_TOKEN_ASSISTANT; /* how schedules know a decoded token */
    uint32_t n = 0;
    uint64_t ns = 0;
    for (; logits != NULL && n < KVS_TEACHER_DECODE_TOKENS; n++) {
        const uint64_t begin_ns = kvs_now_ns();
        if (kvs_session_extend(t->policy, &token, &answer, 1, logits, NULL) != KVS_OK)
            break;
        ns += kvs_now_ns() - begin_ns;
        uint32_t best = 0;
        t->kernels->logsumexp(logits, t->vocab_size, &best);
        token = (int32_t)best;
    }
    kvs_free(t->allocator, logits);
    if (n == KVS_TEACHER_DECODE_TOKENS && ns > 0) {
        t->out->tpot_ms = (double)ns * 1e-6 / n;
        t->out->decode_tok_per_s = n / ((double)ns * 1e-9);
    }
}

static kvs_status open_sessions(teacher *t)
{
    const kvs_teacher_options *const o = t->opt;
    const uint32_t cap = o->ref == KVS_TEACHER_REF_WINDOW && o->ref_tokens > 0 ? o->ref_tokens : t->window_tokens;
    if (o->ref == KVS_TEACHER_REF_WINDOW && cap < 2 * KVS_TEACHER_STRIDE_TOKENS)
        return kvs_error_set(t->err, KVS_EINVAL, "a window reference of %u tokens is too short: %u at least", cap,
                             2u * KVS_TEACHER_STRIDE_TOKENS);
    if (o->ref != KVS_TEACHER_REF_NONE && o->session.prefill_full && t->n_tokens > cap)
        return kvs_error_set(t->err, KVS_EINVAL,
                             "%u tokens do not fit a reference of %u when the prefill is full: "
                             "prefill chunked, or use no reference",
                             t->n_tokens, cap);
    KVS_TRY(kvs_session_create(t->m, &o->session, &t->policy, t->err));
    if (o->ref == KVS_TEACHER_REF_NONE)
        return KVS_OK;
    kvs_session_options ref;
    kvs_session_options_default(&ref);
    ref.budget_tokens = kvs_min_u32(cap, t->n_tokens);
    ref.kv_type = o->session.kv_type;
    ref.arith = o->session.arith;
    ref.seed = o->session.seed;
    ref.chunk_tokens = o->session.chunk_tokens;
    ref.prefill_full = o->session.prefill_full;
    ref.allocator = o->session.allocator;
    KVS_TRY(kvs_session_create(t->m, &ref, &t->ref, t->err));
    t->queue_cap = KVS_TEACHER_BLOCK_TOKENS;
    t->queue = kvs_alloc(t->allocator, (size_t)t->queue_cap * t->vocab_size, sizeof(float));
    if (t->queue == NULL)
        return kvs_error_set(t->err, KVS_ENOMEM, "no memory for the logits of %u rows", t->queue_cap);
    return KVS_OK;
}

/* A reference that slides holds its tokens under other numbers: it cannot be watched beside the policy. */
static kvs_status open_watches(teacher *t)
{
    const kvs_watch_options o = {
        .tokens = t->opt->fact,
        .n_tokens = t->opt->n_fact,
        .from_query = t->n_tokens > KVS_TEACHER_QUERY_TOKENS ? t->n_tokens - KVS_TEACHER_QUERY_TOKENS : 0,
        .from_answer = t->opt->answer_from,
    };
    if (t->opt->routing == NULL)
        return KVS_OK;
    KVS_TRY(kvs_watch_create(t->policy, &o, &t->policy_watch, t->err));
    kvs_session_watch(t->policy, t->policy_watch);
    if (t->opt->ref != KVS_TEACHER_REF_FULL || t->n_tokens > t->window_tokens)
        return KVS_OK;
    KVS_TRY(kvs_watch_create(t->ref, &o, &t->ref_watch, t->err));
    kvs_session_watch(t->ref, t->ref_watch);
    return KVS_OK;
}

/* The end of a plain text ends its prefill: a schedule that acts there acts now, and so does a keep that was asked for
 * with a whole prefill, since no answer follows that would make it act. */
static kvs_status end_prefill(teacher *t)
{
    const char *const spec = t->opt->session.policy;
    if (t->opt->turns != NULL || spec == NULL)
        return KVS_OK;
    const bool asked =
        strstr(spec, "after_prefill") != NULL || (t->opt->session.prefill_full && strstr(spec, "keep=") != NULL);
    return asked ? kvs_session_evict(t->policy, 0, t->err) : KVS_OK;
}

static kvs_status finish(teacher *t)
{
    kvs_teacher_result *const r = t->out;
    KVS_TRY(end_prefill(t));
    kvs_session_get_usage(t->policy, &r->usage);
    kvs_session_get_positions(t->policy, &r->positions);
    kvs_session_get_health(t->policy, &r->health);
    snprintf(r->policy, sizeof r->policy, "%s", kvs_session_policy(t->policy));
    r->position = kvs_position_name(kvs_session_position(t->policy));
    kvs_score_summary all, compared, assistant, assistant_compared;
    KVS_TRY(kvs_scores_finish(&t->all, 0, KVS_SCORE_ALL_TURNS, &all, t->err));
    KVS_TRY(kvs_scores_finish(&t->compared, 0, KVS_SCORE_ALL_TURNS, &compared, t->err));
    KVS_TRY(kvs_scores_finish(&t->all, KVS_SCORE_ASSISTANT, KVS_SCORE_ALL_TURNS, &assistant, t->err));
    KVS_TRY(kvs_scores_finish(&t->compared, KVS_SCORE_ASSISTANT, KVS_SCORE_ALL_TURNS, &assistant_compared, t->err));
    r->n_scored = (uint32_t)all.n;
    r->nll = all.nll;
    r->n_ref = (uint32_t)compared.n;
    r->ref_nll = compared.nll_ref;
    r->kl_mean = compared.kl_mean;
    r->kl_p99 = compared.kl_p99;
    r->top1 = compared.top1;
    r->n_assistant = (uint32_t)assistant.n;
    r->assistant_nll = assistant.nll;
    r->assistant_kl_mean = assistant_compared.kl_mean;
    if (!t->time_is_shared && t->step_ns > 0) {
        r->ttft_ms = (double)t->step_ns * 1e-6;
        r->prefill_tok_per_s = r->n_tokens / ((double)t->step_ns * 1e-9);
    }
    if (t->opt->routing != NULL) {
        kvs_session_watch(t->policy, NULL);
        KVS_TRY(kvs_routing_make(t->policy, t->policy_watch, t->ref_watch, t->opt->routing, t->err));
    }
    if (t->opt->on_end != NULL && !t->opt->on_end(t->opt->ctx, t->policy))
        return kvs_error_set(t->err, KVS_ECANCELLED, "cancelled after the last token");
    time_decode(t);
    return KVS_OK;
}

kvs_status kvs_eval_teacher_force(kvs_model *m, const kvs_teacher_options *opt, const int32_t *tokens,
                                  uint32_t n_tokens, kvs_teacher_result *out, kvs_error *err)
{
    memset(out, 0, sizeof *out);
    out->n_tokens = n_tokens;
    out->nll = out->ref_nll = out->kl_mean = out->kl_p99 = out->top1 = NAN;
    out->assistant_nll = out->assistant_kl_mean = NAN;
    out->ttft_ms = out->prefill_tok_per_s = out->tpot_ms = out->decode_tok_per_s = NAN;
    if (n_tokens < 2)
        return kvs_error_set(err, KVS_EINVAL, "a text of %u tokens has nothing to predict: 2 at least", n_tokens);
    kvs_model_info info;
    kvs_model_get_info(m, &info);
    kvs_error own = {0};
    teacher t = {.m = m,
                 .kernels = m->kernels,
                 .allocator = m->allocator,
                 .opt = opt,
                 .tokens = tokens,
                 .n_tokens = n_tokens,
                 .vocab_size = info.vocab_size,
                 .window_tokens = info.window_tokens,
                 .err = err != NULL ? err : &own,
                 .out = out};
    kvs_scores_init(&t.all, false, t.allocator);
    kvs_scores_init(&t.compared, true, t.allocator);
    kvs_status status = open_sessions(&t);
    if (status == KVS_OK)
        status = open_watches(&t);
    if (status == KVS_OK)
        status = feed_all(&t);
    if (status == KVS_OK)
        status = finish(&t);
    kvs_free(t.allocator, t.queue);
    kvs_scores_free(&t.all);
    kvs_scores_free(&t.compared);
    kvs_session_free(&t.ref);
    kvs_session_free(&t.policy);
    kvs_watch_free(&t.ref_watch);
    kvs_watch_free(&t.policy_watch);
    return status;
}

/* The turn loop's engine: plans how many rows each session may take, evicts where its schedule says so, runs all rows
 * together, hands out logits. */
#include "session/session_internal.h"

#include <string.h>

/* ---- schedules ---- */

static bool is_answer(const kvs_run *run, uint32_t row)
{
    return run->flags != NULL && run->flags[row] & KVS_TOKEN_ASSISTANT;
}

/* Rows until live bytes reach the trigger; 0 when they have. */
static uint32_t rows_until_bytes(const kvs_session *s, uint64_t trigger_bytes)
{
    const kvs_cache_meter m = *kvs_cache_meter_now(s->cache);
    if (m.live_bytes >= trigger_bytes)
        return 0;
    const kvs_model_info *i = &s->model->info;
    const uint64_t row_bytes =
        (uint64_t)i->n_layers * i->n_kv_heads * 2 * i->head_dim * (s->options.kv_type == KVS_KV_F32 ? 4 : 2);
    const uint64_t rows = (trigger_bytes - m.live_bytes + row_bytes - 1) / row_bytes;
    return rows > UINT32_MAX ? UINT32_MAX : (uint32_t)rows;
}

static uint32_t rows_until_tokens(const kvs_session *s, uint64_t trigger_tokens)
{
    const uint32_t live = kvs_cache_live_max(s->cache);
    if (live >= trigger_tokens)
        return 0;
    const uint64_t rows = trigger_tokens - live;
    return rows > UINT32_MAX ? UINT32_MAX : (uint32_t)rows;
}

typedef struct plan {
    bool act;          /* the schedule asks for an eviction now */
    uint32_t rows_max; /* rows until it asks again */
    const char *reason;
} plan;

/* What the schedule says before the next row. */
static plan consult_schedule(const kvs_session *s, bool answer)
{
    plan p = {.rows_max = UINT32_MAX, .reason = "budget"};
    const uint64_t value = s->policy.schedule_value;
    switch (s->policy.schedule) {
    case KVS_SCHEDULE_BYTES:
        p.rows_max = rows_until_bytes(s, value);
        p.act = p.rows_max == 0;
        p.reason = "bytes";
        break;
    case KVS_SCHEDULE_TOKENS:
        p.rows_max = rows_until_tokens(s, value);
        p.act = p.rows_max == 0;
        p.reason = "tokens";
        break;
    case KVS_SCHEDULE_ONCE:
        if (s->schedule_mark == 0) {
            p.rows_max = rows_until_tokens(s, value);
            p.act = p.rows_max == 0;
        }
        p.reason = "once";
        break;
    case KVS_SCHEDULE_CHUNK:
        p.act = !answer;
        p.reason = "chunk";
        break;
    case KVS_SCHEDULE_AFTER_PREFILL:
        p.act = answer && s->last_was_prompt;
        p.reason = "after_prefill";
        break;
    case KVS_SCHEDULE_STEP:
        p.act = true;
        if (answer)
            p.rows_max = 1;
        p.reason = "step";
        break;
    case KVS_SCHEDULE_EVERY:
        p.act = s->n_tokens >= s->schedule_mark + value;
        p.rows_max = p.act ? 0 : (uint32_t)(s->schedule_mark + value - s->n_tokens);
        p.reason = "every";
        break;
    default:
        break;
    }
    return p;
}

static void mark_schedule(kvs_session *s)
{
    if (s->policy.schedule == KVS_SCHEDULE_ONCE)
        s->schedule_mark = 1;
    if (s->policy.schedule == KVS_SCHEDULE_EVERY)
        s->schedule_mark = s->n_tokens;
}

/* Rows of the conversation that fit, room for the probe's rows left free. */
uint32_t kvs_session_room(const kvs_session *s)
{
    const uint32_t room = kvs_cache_room(s->cache), reserve = s->probe.reserve_tokens;
    return room > reserve ? room - reserve : 0;
}

/* A baseline whose cache is full, or a policy that frees nothing. */
static kvs_status refuse(const kvs_session *s, uint32_t n_more, kvs_error *err)
{
    const kvs_cache_meter m = *kvs_cache_meter_now(s->cache);
    return kvs_error_set(err, KVS_EBUDGET,
                         "%s: %u more tokens do not fit: %u slots a head are held of %llu (%llu bytes) and %s",
                         s->policy.ops->name, n_more, kvs_cache_live_max(s->cache), (unsigned long long)m.budget_tokens,
                         (unsigned long long)m.budget_bytes,
                         s->policy.ops->never_evicts ? "it never evicts"
                         : s->options.paper_compat
                             ? "paper_compat evicts on a size only, as +schedule=tokens:4800, and has no cap of its own"
                             : "its keep leaves no room for the next");
}

/* A chunk holds a prompt's rows or an answer's, so that schedules see the border wherever a call begins. */
static uint32_t rows_of_one_kind(const kvs_run *run, uint32_t at, uint32_t n)
{
    uint32_t same = 1;
    while (same < n && is_answer(run, at + same) == is_answer(run, at))
        same++;
    return same;
}

/* paper_compat: the published script checks before the turn and before each decoded token, never during prefill, and
 * evicts once a check however much is left. */
static kvs_status plan_compat(kvs_session *s, kvs_forward *f, const kvs_run *run, uint32_t at, uint32_t *n_rows,
                              kvs_error *err)
{
    const uint32_t left = run->n_tokens - at;
    const bool answer = is_answer(run, at);
    *n_rows = kvs_min_u32(left, s->chunk_tokens);
    if (answer) {
        const plan p = consult_schedule(s, true);
        bool progress;
        if (p.act && !s->policy.ops->never_evicts) {
            KVS_TRY(kvs_evict(s, f, 0, "decode", p.reason, &progress, err));
            mark_schedule(s);
        }
        *n_rows = 1;
        if (!p.act)
            *n_rows = kvs_min_u32(kvs_min_u32(left, s->chunk_tokens), p.rows_max);
    }
    const uint32_t room = kvs_session_room(s);
    if (room == 0)
        return refuse(s, left, err);
    *n_rows = rows_of_one_kind(run, at, kvs_min_u32(*n_rows, room));
    return KVS_OK;
}

/* With s->pending set. */
static kvs_status plan_rows(kvs_session *s, kvs_forward *f, const kvs_run *run, uint32_t at, uint32_t *n_rows,
                            kvs_error *err)
{
    const uint32_t left = run->n_tokens - at;
    const bool answer = is_answer(run, at);
    const char *path = answer ? "decode" : "in_prefill";
    plan p = consult_schedule(s, answer);
    bool progress = true;
    const bool hold = s->options.prefill_full && !answer; /* the prompt goes in whole */
    if (p.act && !hold && !s->policy.ops->never_evicts) {
        KVS_TRY(kvs_evict(s, f, 0, path, p.reason, &progress, err));
        mark_schedule(s);
        p = consult_schedule(s, answer);
    }
    uint32_t room = kvs_session_room(s);
    if (hold && room < left && is_answer(run, run->n_tokens - 1) == answer)
        return kvs_error_set(err, KVS_EBUDGET,
                             "prefill full needs room for the whole prompt: %u more tokens, room for %u; raise the "
                             "budget or use prefill chunked",
                             left, room);
    while (room == 0) {
        if (s->policy.ops->never_evicts)
            return refuse(s, left, err);
        KVS_TRY(kvs_evict(s, f, 0, path, "budget", &progress, err));
        if (!progress) /* the preset's own keep is over the budget: the budget decides */
            KVS_TRY(kvs_evict(s, f, kvs_keep_default(s), path, "budget", &progress, err));
        if (!progress)
            return refuse(s, left, err);
        room = kvs_session_room(s);
    }
    uint32_t n = kvs_min_u32(kvs_min_u32(left, room), s->chunk_tokens);
    /* A trigger that eviction cannot satisfy (keep above it) still lets one row through: it is asked again after. */
    n = kvs_min_u32(n, hold ? n : kvs_max_u32(p.rows_max, 1));
    *n_rows = rows_of_one_kind(run, at, n);
    return KVS_OK;
}

/* Rows the run may take next; evicts first where the schedule or the budget asks for it. */
static kvs_status plan_run(kvs_session *s, kvs_forward *f, const kvs_run *run, uint32_t at, uint32_t *n_rows,
                           kvs_error *err)
{
    if (s->options.paper_compat)
        return plan_compat(s, f, run, at, n_rows, err);
    if (!is_answer(run, at)) {
        s->pending = run->tokens + at;
        s->n_pending = rows_of_one_kind(run, at, run->n_tokens - at);
    }
    const kvs_status status = plan_rows(s, f, run, at, n_rows, err);
    s->pending = NULL; /* the caller's: no later eviction may look at it */
    s->n_pending = 0;
    return status;
}

/* ---- one forward step ---- */

typedef struct step_rows {
    int32_t tokens[KVS_STEP_ROWS_MAX];
    kvs_attend_run runs[KVS_STEP_ROWS_MAX];
    uint32_t run_index[KVS_STEP_ROWS_MAX]; /* into the caller's array */
    const kvs_ffn_rule *ffn[KVS_STEP_ROWS_MAX];
    bool any_ffn;
    uint32_t n_runs, n_rows;
} step_rows;

kvs_status kvs_session_forward(kvs_session *s, kvs_forward **out, kvs_error *err)
{
    /* The first sessions of a model may be created on several threads at once. */
    static pthread_mutex_t creating = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&creating);
    const kvs_status status =
        s->model->forward != NULL ? KVS_OK : kvs_forward_create(s->model, &s->model->forward, err);
    pthread_mutex_unlock(&creating);
    *out = s->model->forward;
    return status;
}

/* Which rows' attention the policy wants: all of them, or only those of the forward that is the latest when the step
 * ends (a prompt counts as one forward, each answer token as its own). */
static void plan_tap(kvs_session *s, kvs_attend_run *r, const uint8_t *flags)
{
    const uint32_t needs = kvs_policy_needs(&s->policy);
    r->tap_from = r->n_rows;
    r->tap_reset = false;
    if ((needs & KVS_POLICY_NEEDS_MASS) == 0)
        return;
    r->tap_from = 0;
    const bool answer = flags != NULL && flags[r->n_rows - 1] & KVS_TOKEN_ASSISTANT;
    if (needs & KVS_POLICY_NEEDS_MASS_LAST) {
        if (answer)
            r->tap_from = r->n_rows - 1;
        r->tap_reset = answer || !s->forward_open;
    }
    s->forward_open = !answer;
}

/* Counts the rows that a run's watch takes; where its residual stream goes, if any is among them. */
static bool tap_hidden(const kvs_attend_run *r, kvs_hidden_tap *tap)
{
    kvs_watch *w = r->watch;
    const uint64_t end = r->token_idx + r->n_rows;
    if (w == NULL || end <= w->options.from_answer)
        return false;
    w->n_answers += end - (r->token_idx > w->options.from_answer ? r->token_idx : w->options.from_answer);
    *tap = (kvs_hidden_tap){.row = r->row0 + r->n_rows - 1, .out = w->hidden};
    return true;
}

/* Steering: rows whose alpha is 0 are left alone to the bit. */
static void shift_rows(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows)
{
    (void)n_rows;
    const kvs_attend_ctx *const a = ctx;
    const uint32_t n = f->model->info.n_embd;
    for (uint32_t i = 0; i < a->n_runs; i++) {
        const kvs_attend_run *const run = &a->runs[i];
        const kvs_steer *const steer = &run->session->steer;
        if (!run->steered || steer->layer != layer)
            continue;
        for (uint32_t r = 0; r < run->n_rows; r++) {
            float *const x = f->x + (size_t)(run->row0 + r) * n;
            for (uint32_t d = 0; steer->shift[r] != 0 && d < n; d++)
                x[d] += steer->shift[r] * steer->direction[d];
        }
    }
}

/* Runs the rows through all layers. All it works in was reserved when the sessions were created. */
static void run_forward(kvs_forward *f, step_rows *rows, kvs_arith arith)
{
    kvs_attend_ctx ctx = {.runs = rows->runs, .n_runs = rows->n_runs};
    kvs_hidden_tap taps[KVS_STEP_ROWS_MAX];
    uint32_t n_taps = 0;
    f->shift = NULL;
    for (uint32_t i = 0; i < rows->n_runs; i++) {
        ctx.judged |= rows->runs[i].use == KVS_ROWS_JUDGE;
        ctx.watched |= rows->runs[i].watch != NULL;
        ctx.mixed |= rows->runs[i].use == KVS_ROWS_SAID && rows->runs[i].session->queries.mixes;
        n_taps += tap_hidden(&rows->runs[i], &taps[n_taps]);
        if (rows->runs[i].steered)
            f->shift = shift_rows;
    }
    const kvs_forward_watch watch = f->watch;
    if (ctx.mixed)
        f->watch = (kvs_forward_watch){kvs_attend_watch, &ctx};
    const kvs_forward_wishes wishes = {.ffn = rows->any_ffn ? rows->ffn : NULL, .taps = taps, .n_taps = n_taps};
    kvs_forward_rows(f, arith, rows->tokens, rows->n_rows, kvs_attend, &ctx, &wishes);
    f->watch = watch;
}

/* Says one row's rule. */
static void cover_row(step_rows *rows, uint32_t row, const kvs_ffn_rule *rule)
{
    rows->ffn[row] = rule;
    rows->any_ffn |= rule != NULL;
}

kvs_status kvs_step_raw(kvs_session *s, kvs_forward *f, const int32_t *tokens, const uint8_t *flags, const int32_t *pos,
                        uint32_t n, kvs_row_use use, kvs_error *err)
{
    static _Thread_local step_rows rows;
    rows.n_runs = 1;
    rows.n_rows = n;
    rows.any_ffn = false;
    for (uint32_t r = 0; r < n; r++)
        cover_row(&rows, r, use == KVS_ROWS_AGAIN ? kvs_ffn_skip_newest(&s->ffn) : NULL);
    memcpy(rows.tokens, tokens, n * sizeof *tokens);
    KVS_TRY(kvs_cache_append(s->cache, pos, tokens, flags, n, err));
    rows.runs[0] =
        (kvs_attend_run){.session = s, .n_rows = n, .tap_from = n, .use = use, .token_idx = (uint64_t)pos[0]};
    run_forward(f, &rows, s->options.arith);
    return KVS_OK;
}

/* ---- logits ---- */

static bool is_wanted(const kvs_run *run, uint32_t row)
{
    if (run->on_logits == NULL)
        return false;
    return run->want == NULL ? row == run->n_tokens - 1 : run->want[row] != 0;
}

/* Hands out the wanted rows of this step, in run order; false when a callback cancels. */
static bool deliver(kvs_forward *f, const step_rows *rows, kvs_run *runs, const uint32_t *at, kvs_arith arith)
{
    const uint32_t vocab = f->model->info.vocab_size;
    uint32_t list[KVS_LOGIT_ROWS_MAX], owner[KVS_LOGIT_ROWS_MAX], row_of[KVS_LOGIT_ROWS_MAX], n = 0;
    for (uint32_t i = 0; i < rows->n_runs; i++) {
        const kvs_attend_run *r = &rows->runs[i];
        const uint32_t index = rows->run_index[i];
        for (uint32_t row = 0; row <= r->n_rows; row++) {
            const bool last = i + 1 == rows->n_runs && row == r->n_rows;
            if (row < r->n_rows && is_wanted(&runs[index], at[index] + row)) {
                list[n] = r->row0 + row;
                owner[n] = index;
                row_of[n++] = at[index] + row;
            }
            if (n == KVS_LOGIT_ROWS_MAX || (last && n > 0)) {
                kvs_forward_logits(f, arith, list, n);
                for (uint32_t k = 0; k < n; k++) {
                    kvs_run *run = &runs[owner[k]];
                    const float *logits = f->logits + (size_t)k * vocab;
                    run->session->saw_nan |= logits[0] != logits[0];
                    if (!run->on_logits(run->ctx, row_of[k], logits))
                        return false;
                }
                n = 0;
            }
        }
    }
    return true;
}

/* ---- the step ---- */

static kvs_status check_runs(kvs_run *runs, uint32_t n_runs, kvs_error *err)
{
    if (n_runs == 0 || n_runs > KVS_STEP_ROWS_MAX)
        return kvs_error_set(err, KVS_EINVAL, "a step of %u sessions must have 1 to %d", n_runs, KVS_STEP_ROWS_MAX);
    for (uint32_t i = 0; i < n_runs; i++) {
        const kvs_session *s = runs[i].session;
        runs[i].status = KVS_OK;
        if (s == NULL || s->model != runs[0].session->model || s->options.arith != runs[0].session->options.arith)
            return runs[i].status = kvs_error_set(err, KVS_EINVAL,
                                                  "session %u of a step is of another model or "
                                                  "arithmetic than the first",
                                                  i);
        for (uint32_t j = 0; j < i; j++)
            if (runs[j].session == s)
                return runs[i].status = kvs_error_set(err, KVS_EINVAL, "session %u of a step is also session %u", i, j);
        const uint32_t vocab = s->model->info.vocab_size;
        for (uint32_t t = 0; t < runs[i].n_tokens; t++)
            if (runs[i].tokens[t] < 0 || (uint32_t)runs[i].tokens[t] >= vocab)
                return runs[i].status = kvs_error_set(err, KVS_EINVAL, "token %d at %u is outside the vocabulary of %u",
                                                      runs[i].tokens[t], t, vocab);
        if (s->n_tokens + runs[i].n_tokens > INT32_MAX / 2)
            return runs[i].status = kvs_error_set(err, KVS_EINVAL, "a session holds at most %d tokens", INT32_MAX / 2);
    }
    return KVS_OK;
}

/* Adds what run i may take now to the step. */
static kvs_status add_run(kvs_forward *f, step_rows *rows, kvs_run *run, uint32_t index, uint32_t at, kvs_error *err)
{
    kvs_session *s = run->session;
    uint32_t n = 0;
    const uint32_t until_look = kvs_observe(s);
    KVS_TRY(plan_run(s, f, run, at, &n, err));
    n = kvs_min_u32(kvs_min_u32(n, until_look), f->max_rows - rows->n_rows);
    int32_t pos[KVS_STEP_ROWS_MAX];
    for (uint32_t i = 0; i < n; i++)
        pos[i] = (int32_t)(s->n_tokens + i);
    const uint8_t *flags = run->flags == NULL ? NULL : run->flags + at;
    KVS_TRY(kvs_cache_append(s->cache, pos, run->tokens + at, flags, n, err));
    kvs_attend_run *r = &rows->runs[rows->n_runs];
    *r = (kvs_attend_run){.session = s, .row0 = rows->n_rows, .n_rows = n};
    plan_tap(s, r, flags);
    r->use = s->queries.bytes != 0 ? KVS_ROWS_SAID : KVS_ROWS_ALONE;
    r->token_idx = s->n_tokens;
    r->watch = s->watch;
    r->steered = s->steer.on;
    memcpy(rows->tokens + rows->n_rows, run->tokens + at, n * sizeof *run->tokens);
    for (uint32_t i = 0; i < n; i++)
        cover_row(rows, rows->n_rows + i, kvs_ffn_skip_next(&s->ffn, flags == NULL ? 0 : flags[i]));
    kvs_steer_take(s, run->tokens + at, flags, n);
    kvs_turn_log_append(&s->turns, (int32_t)s->n_tokens, flags, n);
    s->n_tokens += n;
    kvs_query_log_advance(&s->queries, s->n_tokens, n);
    s->last_was_prompt = !is_answer(run, at + n - 1);
    rows->run_index[rows->n_runs++] = index;
    rows->n_rows += n;
    return KVS_OK;
}

/* The step ends here for every run that still had rows to come or to deliver. */
static kvs_status fail_open(kvs_run *runs, uint32_t n_runs, const uint32_t *at, kvs_status status)
{
    for (uint32_t i = 0; i < n_runs; i++)
        if (runs[i].status == KVS_OK && at[i] < runs[i].n_tokens)
            runs[i].status = status;
    return status;
}

/* The rows' hidden states behind the last norm, for sessions that keep what sentences mean. */
static void remember_sentences(kvs_forward *f, const step_rows *rows, const kvs_run *runs, const uint32_t *at)
{
    const kvs_model *const m = f->model;
    const uint32_t n = m->info.n_embd;
    for (uint32_t i = 0; i < rows->n_runs; i++) {
        const kvs_attend_run *const r = &rows->runs[i];
        const kvs_run *const run = &runs[rows->run_index[i]];
        kvs_sentence_log *const log = &r->session->sentences;
        for (uint32_t row = 0; log->ends != NULL && row < r->n_rows; row++) {
            const uint32_t k = at[rows->run_index[i]] + row;
            float *const hidden = f->norm + (size_t)(r->row0 + row) * n;
            m->kernels->rmsnorm(hidden, f->x + (size_t)(r->row0 + row) * n, m->out_norm, n, m->norm_eps);
            kvs_sentence_log_add(log, run->tokens[k], run->flags == NULL ? 0 : run->flags[k], hidden);
        }
    }
}

static kvs_status step_locked(kvs_forward *f, kvs_run *runs, uint32_t n_runs, uint32_t *at, kvs_error *err)
{
    static _Thread_local step_rows rows;
    const kvs_arith arith = runs[0].session->options.arith;
    kvs_status first = KVS_OK;
    for (;;) {
        rows.n_runs = rows.n_rows = 0;
        rows.any_ffn = false;
        for (uint32_t i = 0; i < n_runs && rows.n_rows < f->max_rows; i++) {
            if (runs[i].status != KVS_OK || at[i] == runs[i].n_tokens)
                continue;
            runs[i].status = add_run(f, &rows, &runs[i], i, at[i], first == KVS_OK ? err : NULL);
            if (first == KVS_OK)
                first = runs[i].status;
        }
        if (rows.n_runs == 0)
            return first;
        run_forward(f, &rows, arith);
        remember_sentences(f, &rows, runs, at);
        if (!deliver(f, &rows, runs, at, arith)) {
            kvs_error_set(err, KVS_ECANCELLED, "the caller's callback asked to stop");
            return fail_open(runs, n_runs, at, KVS_ECANCELLED);
        }
        for (uint32_t i = 0; i < rows.n_runs; i++)
            at[rows.run_index[i]] += rows.runs[i].n_rows;
    }
}

kvs_status kvs_step(kvs_run *runs, uint32_t n_runs, kvs_error *err)
{
    KVS_TRY(check_runs(runs, n_runs, err));
    kvs_forward *f;
    KVS_TRY(kvs_session_forward(runs[0].session, &f, err));
    uint32_t at[KVS_STEP_ROWS_MAX] = {0};
    pthread_mutex_lock(&f->lock);
    kvs_affinity saved;
    kvs_pool_enter(f->model->pool, &saved);
    const kvs_status status = step_locked(f, runs, n_runs, at, err);
    kvs_pool_leave(&saved);
    pthread_mutex_unlock(&f->lock);
    return status;
}

/* ---- one session ---- */

typedef struct copy_logits {
    float *out;
    uint32_t vocab;
} copy_logits;

static bool copy_row(void *ctx, uint32_t row, const float *logits)
{
    (void)row;
    const copy_logits *c = ctx;
    memcpy(c->out, logits, c->vocab * sizeof *logits);
    return true;
}

kvs_status kvs_session_extend(kvs_session *s, const int32_t *tokens, const uint8_t *flags, uint32_t n_tokens,
                              float *logits, kvs_error *err)
{
    if (n_tokens == 0)
        return KVS_OK;
    copy_logits copy = {logits, s->model->info.vocab_size};
    kvs_run run = {
        .session = s,
        .tokens = tokens,
        .flags = flags,
        .n_tokens = n_tokens,
        .on_logits = logits != NULL ? copy_row : NULL,
        .ctx = &copy,
    };
    return kvs_step(&run, 1, err);
}

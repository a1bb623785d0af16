/* Free-running play, the paper's protocol: greedy answers that stay in the history. It begins with the turn whose
 * prompt reaches the trigger - until then every policy would say the same - and runs in native arithmetic, one session
 * at a time, so that its times are what a person would see. */
#include "bench/play.h"

#include "eval/degeneration.h"
#include "model/chat_template.h"
#include "policy/policy.h"
#include "session/session_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct free_state {
    const kvs_play *p;
    const kvs_script *script;
    const kvs_message *messages;
    kvs_session *trunk;  /* the history that all runs share, recording attention */
    uint32_t first_turn; /* played freely from here */
    kvs_rendered tail;   /* the template's end of a turn */
    float *logits;
    json_t *turns, *summary, *loops;
} free_state;

typedef struct free_turn {
    int32_t *answer; /* [n] */
    uint32_t n, n_prompt;
    bool eog;
    double tokenise_ms, ttft_ms, tpot_ms, ttft_compat_ms, prefill_ms, decode_ms, evict_ms;
    kvs_usage before, after;
} free_turn;

static double ms_between(uint64_t a, uint64_t b)
{
    return (double)(b - a) / 1e6;
}

static double evict_ms(const kvs_usage *a, const kvs_usage *b)
{
    return ms_between(a->evict_ns, b->evict_ns);
}

static int32_t greedy(const free_state *s)
{
    uint32_t best;
    s->p->model->kernels->logsumexp(s->logits, s->p->model->info.vocab_size, &best);
    return (int32_t)best;
}

static kvs_status answer_turn(free_state *s, kvs_session *session, uint32_t turn, free_turn *out, kvs_error *err)
{
    static const uint8_t flag = KVS_TOKEN_ASSISTANT;
    const kvs_script_turn *t = &s->script->turns[turn];
    const uint32_t from = turn == 0 ? 0 : s->script->turns[turn - 1].message_end;
    kvs_rendered prompt;
    const uint64_t t0 = kvs_now_ns();
    KVS_TRY(kvs_chat_render(s->p->model, s->messages, t->message_end - 1, from, true, &prompt, err));
    const uint64_t t1 = kvs_now_ns();
    kvs_session_get_usage(session, &out->before);
    kvs_status status = kvs_session_turn_begin(session, err);
    const uint64_t prefill_from = kvs_now_ns();
    if (status == KVS_OK)
        status = kvs_session_extend(session, prompt.tokens, prompt.flags, (uint32_t)prompt.n_tokens, s->logits, err);
    out->n_prompt = (uint32_t)prompt.n_tokens;
    kvs_rendered_free(&prompt);
    KVS_TRY(status);
    uint64_t first = kvs_now_ns(), last = first;
    kvs_usage prefilled, after_first;
    kvs_session_get_usage(session, &prefilled);
    after_first = prefilled;
    while (out->n < s->p->suite->free_tokens) {
        const int32_t token = greedy(s);
        last = kvs_now_ns();
        if (out->n == 0)
            first = last;
        out->answer[out->n++] = token;
        if ((out->eog = kvs_token_is_eog(s->p->model, token)))
            break;
        KVS_TRY(kvs_session_extend(session, &token, &flag, 1, s->logits, err));
        if (out->n == 1)
            kvs_session_get_usage(session, &after_first);
        if (kvs_play_cancelled(s->p))
            return kvs_error_set(err, KVS_ECANCELLED, "stopped");
    }
    kvs_usage answered;
    kvs_session_get_usage(session, &answered);
    if (!session->options.paper_compat)
        KVS_TRY(kvs_session_extend(session, s->tail.tokens, s->tail.flags, (uint32_t)s->tail.n_tokens, NULL, err));
    KVS_TRY(kvs_session_turn_end(session, err));
    kvs_session_get_usage(session, &out->after);
    out->tokenise_ms = ms_between(t0, t1);
    out->evict_ms = evict_ms(&out->before, &out->after);
    out->prefill_ms = ms_between(t1, first) - evict_ms(&out->before, &prefilled);
    out->decode_ms = ms_between(first, last) - evict_ms(&prefilled, &answered);
    out->ttft_ms = ms_between(t0, first);
    out->ttft_compat_ms = ms_between(prefill_from, first) + evict_ms(&prefilled, &after_first);
    out->tpot_ms = out->n > 1 ? ms_between(first, last) / (out->n - 1) : NAN;
    return KVS_OK;
}

/* ---- records ---- */

static void record_degeneration(json_t *row, const free_state *s, uint32_t turn, const free_turn *f, int *looped)
{
    const kvs_script_turn *t = &s->script->turns[turn];
    kvs_degeneration d;
    kvs_error e;
    static const char *const rep[] = {"rep1", "rep2", "rep3", "rep4"};
    const bool ok = kvs_degeneration_measure(f->answer, f->n, s->script->tokens + t->begin, t->answer - t->begin, NULL,
                                             &d, &e) == KVS_OK &&
                    d.valid;
    for (int k = 0; k < 4; k++)
        json_object_set_new(row, rep[k], ok ? kvs_json_real(d.rep[k]) : json_null());
    json_object_set_new(row, "looped", ok ? json_boolean(d.looped) : json_null());
    json_object_set_new(row, "longest_repeat", ok ? kvs_json_real(d.longest_repeat * f->n) : json_null());
    json_object_set_new(row, "max_run", ok ? json_integer(d.max_run) : json_null());
    json_object_set_new(row, "period", ok ? json_integer(d.period) : json_null());
    json_object_set_new(row, "prompt_echo", ok ? kvs_json_real(d.prompt_echo) : json_null());
    *looped = ok ? d.looped : -1;
}

static json_t *answer_text(const kvs_model *m, const free_turn *f)
{
    char text[4096];
    size_t at = 0;
    for (uint32_t i = 0; i < f->n && at + 64 < sizeof text; i++)
        at += kvs_token_text(m, f->answer[i], false, text + at, 64);
    return json_stringn(text, kvs_utf8_valid_prefix(text, at));
}

static void record_free_turn(free_state *s, const kvs_bench_run_spec *run, const kvs_session *session, uint32_t turn,
                             const free_turn *f, const char *failure, int *looped)
{
    const kvs_script_turn *t = &s->script->turns[turn];
    json_t *row = json_object();
    json_object_set_new(row, "run", json_string(run->id));
    json_object_set_new(row, "dialogue", json_string(s->script->id));
    json_object_set_new(row, "turn", json_integer(turn));
    json_object_set_new(row, "protocol", json_string("fr"));
    json_object_set_new(row, "token_begin", json_integer(t->begin));
    json_object_set_new(row, "token_end", json_integer((json_int_t)t->begin + f->n_prompt + f->n));
    static const char *const forced_only[] = {"n_scored", "nll",        "nll_ref", "kl_mean", "kl_p95",
                                              "kl_p99",   "kl_first32", "jsd",     "top1",    "rms_dp"};
    for (size_t i = 0; i < sizeof forced_only / sizeof *forced_only; i++)
        json_object_set_new(row, forced_only[i], json_null());
    kvs_health h;
    kvs_session_get_health(session, &h);
    json_object_set_new(row, "live_bytes", json_integer((json_int_t)f->after.live_bytes));
    json_object_set_new(row, "kv_bytes", json_integer((json_int_t)f->after.kv_bytes));
    json_object_set_new(row, "live_slots_max", json_integer(f->after.n_slots_max));
    json_object_set_new(row, "evictions", json_integer((json_int_t)(f->after.n_evictions - f->before.n_evictions)));
    json_object_set_new(row, "evict_ms", kvs_json_real(f->evict_ms));
    json_object_set_new(row, "score_ms", kvs_json_ms(f->after.score_ns - f->before.score_ns));
    json_object_set_new(row, "select_ms", kvs_json_ms(f->after.select_ns - f->before.select_ns));
    json_object_set_new(row, "move_ms", kvs_json_ms(f->after.move_ns - f->before.move_ns));
    json_object_set_new(row, "health", kvs_json_real(h.score));
    json_object_set_new(row, "health_worst", json_string(h.worst));
    kvs_record_positions(row, session);
    json_object_set_new(row, "ttft_ms", kvs_json_real(f->ttft_ms));
    /* The script's: no tokenising, no eviction before the turn, but the first one inside its loop. */
    json_object_set_new(row, "ttft_compat_ms", kvs_json_real(f->ttft_compat_ms));
    json_object_set_new(row, "tpot_ms", kvs_json_real(f->tpot_ms));
    json_object_set_new(row, "prefill_ms", kvs_json_real(f->prefill_ms));
    json_object_set_new(row, "decode_ms", kvs_json_real(f->decode_ms));
    json_object_set_new(row, "tokenise_ms", kvs_json_real(f->tokenise_ms));
    json_object_set_new(row, "n_generated", json_integer(f->n));
    record_degeneration(row, s, turn, f, looped);
    json_object_set_new(row, "eos_missing", json_boolean(!f->eog));
    json_object_set_new(row, "answer", answer_text(s->p->model, f));
    json_object_set_new(row, "failure", failure == NULL ? json_null() : json_string(failure));
    json_array_append_new(s->turns, row);
}

typedef struct free_totals {
    double ttft[16], tpot[16], health, live, prefill_ms, decode_ms;
    uint32_t n, n_looped, n_judged, n_prompt, n_generated;
} free_totals;

static double median_of(double *x, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++)
        for (uint32_t j = i; j > 0 && x[j] < x[j - 1]; j--) {
            const double tmp = x[j];
            x[j] = x[j - 1];
            x[j - 1] = tmp;
        }
    return n == 0 ? NAN : n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

static void record_free_summary(free_state *s, const kvs_bench_run_spec *run, const kvs_session *session,
                                free_totals *t)
{
    kvs_usage u;
    kvs_session_get_usage(session, &u);
    json_t *row = json_object();
    json_object_set_new(row, "run", json_string(run->id));
    json_object_set_new(row, "policy", json_string(run->policy));
    json_object_set_new(row, "position", json_string(run->position));
    json_object_set_new(row, "dialogue", json_string(s->script->id));
    json_object_set_new(row, "protocol", json_string("fr"));
    json_object_set_new(row, "n_tokens", json_integer((json_int_t)kvs_session_n_tokens(session)));
    static const char *const forced_only[] = {"n_scored", "kl_mean", "kl_p99",    "kl_median", "nll",
                                              "nll_ref",  "ppl",     "ppl_ratio", "top1",      "jsd"};
    for (size_t i = 0; i < sizeof forced_only / sizeof *forced_only; i++)
        json_object_set_new(row, forced_only[i], json_null());
    json_object_set_new(row, "footprint", kvs_json_real(u.footprint));
    json_object_set_new(row, "peak_kv_bytes", json_integer((json_int_t)u.kv_bytes_peak));
    json_object_set_new(row, "live_bytes_mean", kvs_json_real(t->live / t->n));
    json_object_set_new(row, "budget_bytes", json_integer((json_int_t)u.budget_bytes));
    json_object_set_new(row, "evictions", json_integer((json_int_t)u.n_evictions));
    json_object_set_new(row, "health_mean", kvs_json_real(t->health / t->n));
    json_object_set_new(row, "looped_rate", kvs_json_real((double)t->n_looped / t->n_judged));
    json_object_set_new(row, "ttft_ms_median", kvs_json_real(median_of(t->ttft, t->n)));
    json_object_set_new(row, "tpot_ms_median", kvs_json_real(median_of(t->tpot, t->n)));
    json_object_set_new(row, "prefill_tok_per_s", kvs_json_real(t->n_prompt / t->prefill_ms * 1e3));
    json_object_set_new(row, "decode_tok_per_s", kvs_json_real(t->n_generated / t->decode_ms * 1e3));
    json_object_set_new(row, "evict_ms_total", kvs_json_ms(u.evict_ns));
    json_object_set_new(row, "peak_rss_bytes", json_integer((json_int_t)kvs_peak_rss_bytes()));
    json_array_append_new(s->summary, row);
}

/* ---- one run ---- */

static kvs_status run_turns(free_state *s, const kvs_bench_run_spec *run, kvs_session *session, kvs_error *err)
{
    free_totals totals = {0};
    json_t *loops = json_array();
    int32_t *answer = calloc(s->p->suite->free_tokens + 1, sizeof *answer);
    kvs_status status = KVS_OK;
    for (uint32_t i = 0; i < s->p->suite->free_turns && i < 16; i++) {
        const uint32_t turn = s->first_turn + i;
        if (turn >= s->script->n_turns)
            break;
        free_turn f = {.answer = answer};
        kvs_error e;
        status = answer_turn(s, session, turn, &f, &e);
        int looped = -1; /* -1: too short to tell */
        if (status == KVS_ECANCELLED) {
            *err = e;
            break;
        }
        kvs_session_get_usage(session, &f.after);
        record_free_turn(s, run, session, turn, &f, status == KVS_OK ? NULL : e.message, &looped);
        if (status != KVS_OK) {
            status = KVS_OK; /* a failed cell is a record */
            break;
        }
        kvs_health h;
        kvs_session_get_health(session, &h);
        totals.ttft[totals.n] = f.ttft_ms;
        totals.tpot[totals.n++] = f.tpot_ms;
        totals.n_looped += looped > 0;
        totals.n_judged += looped >= 0;
        totals.health += h.score;
        totals.live += (double)f.after.live_bytes;
        totals.prefill_ms += f.prefill_ms;
        totals.decode_ms += f.decode_ms;
        totals.n_prompt += f.n_prompt;
        totals.n_generated += f.n;
        json_array_append_new(loops, looped < 0 ? json_null() : json_boolean(looped));
    }
    free(answer);
    if (totals.n > 0 && status == KVS_OK)
        record_free_summary(s, run, session, &totals);
    json_object_set_new(s->loops, run->id, loops);
    return status;
}

static kvs_status play_run(free_state *s, const kvs_bench_run_spec *run, kvs_error *err)
{
    const uint32_t begin = s->script->turns[s->first_turn].begin;
    kvs_session_options o;
    kvs_play_options(s->p, run, s->script->n_tokens + s->p->suite->free_turns * (s->p->suite->free_tokens + 1024), &o);
    o.arith = KVS_ARITH_NATIVE;
    kvs_session *session;
    KVS_TRY(kvs_session_fork(s->trunk, &o, &session, err));
    /* What of the history lies past the trigger is read by each run for itself. */
    const uint32_t shared = (uint32_t)kvs_session_n_tokens(s->trunk);
    kvs_status status =
        kvs_session_extend(session, s->script->tokens + shared, s->script->flags + shared, begin - shared, NULL, err);
    if (status == KVS_OK)
        status = run_turns(s, run, session, err);
    kvs_session_free(&session);
    return status;
}

static uint32_t find_first_turn(const kvs_play *p, const kvs_script *script)
{
    for (uint32_t t = 0; t < script->n_turns; t++)
        if (script->turns[t].answer >= p->suite->trigger_tokens)
            return t;
    return script->n_turns - 1;
}

static kvs_status play_runs(free_state *s, kvs_error *err)
{
    KVS_TRY(kvs_chat_turn_end(s->p->model, &s->tail, err));
    const uint32_t begin = s->script->turns[s->first_turn].begin;
    uint32_t shared = begin;
    for (uint32_t i = 1; i < s->p->n_runs; i++)
        shared = kvs_min_u32(shared, s->p->runs[i].first_tokens);
    kvs_session_options o;
    const kvs_bench_run_spec trunk = {
        .is_reference = true, .policy = "attention_top +protect=none", .position = "keep"};
    kvs_play_options(s->p, &trunk, s->script->n_tokens, &o);
    o.arith = KVS_ARITH_NATIVE;
    KVS_TRY(kvs_session_create(s->p->model, &o, &s->trunk, err));
    for (uint32_t at = 0; at < shared;) { /* in pieces, so that Ctrl-C is heard */
        const uint32_t n = kvs_min_u32(shared - at, 512);
        if (kvs_play_cancelled(s->p))
            return kvs_error_set(err, KVS_ECANCELLED, "stopped");
        KVS_TRY(kvs_session_extend(s->trunk, s->script->tokens + at, s->script->flags + at, n, NULL, err));
        at += n;
    }
    for (uint32_t i = 0; i < s->p->n_runs; i++) {
        KVS_TRY(play_run(s, &s->p->runs[i], err));
        if (s->p->progress != NULL)
            s->p->progress(s->p->ctx, i + 1, s->p->n_runs);
    }
    return KVS_OK;
}

kvs_status kvs_play_free(const kvs_play *p, const kvs_script *script, json_t *part, kvs_error *err)
{
    json_t *claims = json_object_get(part, "claims");
    free_state s = {
        .p = p,
        .script = script,
        .first_turn = find_first_turn(p, script),
        .messages = kvs_script_messages(script->dialogue),
        .logits = calloc(p->model->info.vocab_size, sizeof(float)),
        .turns = json_object_get(part, "turns"),
        .summary = json_object_get(part, "summary"),
        .loops = json_object(),
    };
    kvs_status status = s.messages == NULL || s.logits == NULL
                            ? kvs_error_set(err, KVS_ENOMEM, "no memory to play dialogue %s freely", script->id)
                            : play_runs(&s, err);
    json_object_set_new(claims, "loops", s.loops);
    kvs_session_free(&s.trunk);
    kvs_rendered_free(&s.tail);
    free(s.logits);
    free((void *)(uintptr_t)s.messages);
    return status;
}

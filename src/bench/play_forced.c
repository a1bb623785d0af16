/* Teacher-forced play: every run reads the same tokens, in lock-step with the full cache, block by block. What runs
 * share - everything before the first eviction - is computed once and forked. */
#include "bench/play.h"

#include "eval/metrics.h"
#include "eval/stats.h"
#include "model/forward.h"
#include "session/session_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum {
    BLOCK_TOKENS = 32,    /* rows of the reference's logits that are held */
    AFTER_EVICTION = 32,  /* tokens after an eviction that are reported apart */
    BIN_TOKENS = 256,     /* of the curve over positions */
    WINDOW_TOKENS = 4096, /* of the windowed reference, claims C1 and C2 */
    WINDOW_STRIDE = 512,  /* tokens scored by one fresh prefill of it */
    EVENT_RANGES_MAX = 256,
    SCORED_LATE = 1u << 3, /* score set: after the grid's first possible eviction, while every run plays */
};

/* A run while its dialogue is played. */
typedef struct player {
    const kvs_bench_run_spec *spec;
    struct play_state *state;
    kvs_session *session; /* NULL: not forked yet */
    kvs_scores scores;
    kvs_usage turn_usage;   /* at the turn's begin */
    uint64_t forked_at;     /* tokens it did not read itself */
    uint64_t last_eviction; /* token_idx; UINT64_MAX: none */
    uint64_t first_logits;  /* hash of the first logits after the first eviction; 0: none */
    uint32_t turn_evictions;
    double health_sum, live_sum;
    uint32_t n_turns_recorded;
    double *bin_nll; /* [n_bins], past the window too */
    uint32_t *bin_n;
    bool retired; /* of a long dialogue it plays the part up to the suite's ordinary length only */
    kvs_status failed;
    char failure[400];
} player;

typedef struct play_state {
    const kvs_play *p;
    const kvs_script *script;
    kvs_session *trunk[2]; /* the full cache: [0] plain (the reference), [1] recording attention */
    player *players;       /* [n_runs]; 0 is the reference */
    player noise_player;   /* the full cache, nudged by one rounding step */
    uint32_t turn;
    uint32_t late_from, common_end; /* token_idx: first possible eviction; where the first runs retire */
    uint32_t block_begin, n_wanted;
    uint8_t want[BLOCK_TOKENS];
    float *rows; /* [BLOCK_TOKENS][vocab] of the reference */
    uint32_t row_of[BLOCK_TOKENS];
    double *bin_nll; /* [n_bins] of the reference */
    uint32_t *bin_n;
    uint32_t n_bins;
    json_t *turns, *events;
    kvs_error error;
    bool error_set;
} play_state;

/* ---- logits ---- */

static void note_error(play_state *s, const kvs_error *e)
{
    if (!s->error_set)
        s->error = *e;
    s->error_set = true;
}

/* Summaries and claims compare the same tokens for every run. */
static bool is_compared(const play_state *s, uint32_t idx)
{
    return idx >= s->late_from && idx < s->common_end;
}

static bool on_reference(void *ctx, uint32_t row, const float *logits)
{
    player *pl = ctx;
    play_state *s = pl->state;
    const kvs_model_info *info = &s->p->model->info;
    const uint32_t idx = s->block_begin + row, x = (uint32_t)s->script->tokens[idx + 1];
    s->row_of[row] = s->n_wanted;
    memcpy(s->rows + (size_t)s->n_wanted++ * info->vocab_size, logits, info->vocab_size * sizeof *logits);
    const double nll = s->p->model->kernels->logsumexp(logits, info->vocab_size, NULL) - (double)logits[x];
    const uint32_t bin = (idx + 1) / BIN_TOKENS;
    s->bin_nll[bin] += nll;
    s->bin_n[bin]++;
    const kvs_token_score score = {.nll = nll,
                                   .nll_ref = nll,
                                   .top5 = NAN,
                                   .turn = s->turn,
                                   .top1 = true,
                                   .sets = (uint16_t)(KVS_SCORE_ASSISTANT | (is_compared(s, idx) ? SCORED_LATE : 0))};
    kvs_error e;
    if (kvs_scores_add(&pl->scores, &score, &e) != KVS_OK) {
        note_error(s, &e);
        return false;
    }
    return true;
}

static bool on_policy(void *ctx, uint32_t row, const float *logits)
{
    player *pl = ctx;
    play_state *s = pl->state;
    const kvs_model_info *info = &s->p->model->info;
    const uint32_t idx = s->block_begin + row;
    const uint32_t x = (uint32_t)s->script->tokens[idx + 1];
    if (pl->last_eviction != UINT64_MAX && pl->first_logits == 0)
        pl->first_logits = XXH64(logits, info->vocab_size * sizeof *logits, 0) | 1;
    const double nll = s->p->model->kernels->logsumexp(logits, info->vocab_size, NULL) - (double)logits[x];
    pl->bin_nll[(idx + 1) / BIN_TOKENS] += nll;
    pl->bin_n[(idx + 1) / BIN_TOKENS]++;
    if (idx + 1 >= info->window_tokens)
        return true; /* the full cache is no reference past its window */
    const float *ref = s->rows + (size_t)s->row_of[row] * info->vocab_size;
    kvs_dist_pair pair;
    s->p->model->kernels->dist_pair(&pair, ref, logits, info->vocab_size);
    kvs_token_score score = kvs_token_score_of(&pair, ref[x], logits[x]);
    score.turn = s->turn;
    score.sets = (uint16_t)(KVS_SCORE_ASSISTANT | (is_compared(s, idx) ? SCORED_LATE : 0)); /* as the reference's */
    if (pl->last_eviction != UINT64_MAX && idx < pl->last_eviction + AFTER_EVICTION)
        score.sets |= KVS_SCORE_AFTER_EVICTION;
    kvs_error e;
    if (kvs_scores_add(&pl->scores, &score, &e) != KVS_OK) {
        note_error(s, &e);
        return false;
    }
    return true;
}

/* ---- events ---- */

static void on_event(void *ctx, const kvs_event *event)
{
    player *pl = ctx;
    play_state *s = pl->state;
    pl->last_eviction = event->token_idx;
    pl->turn_evictions++;
    const uint32_t n = kvs_session_keep_set(pl->session, 0, 0, NULL, NULL, 0);
    int32_t *pos = calloc(n + 1, sizeof *pos);
    kvs_session_keep_set(pl->session, 0, 0, pos, NULL, n);
    kvs_positions p;
    kvs_session_get_positions(pl->session, &p);
    kvs_health h;
    kvs_session_get_health(pl->session, &h);
    json_t *row = json_object();
    json_object_set_new(row, "run", json_string(pl->spec->id));
    json_object_set_new(row, "dialogue", json_string(s->script->id));
    json_object_set_new(row, "turn", json_integer(s->turn));
    json_object_set_new(row, "token_idx", json_integer((json_int_t)event->token_idx));
    json_object_set_new(row, "path", json_string(event->path));
    json_object_set_new(row, "reason", json_string(event->reason));
    json_object_set_new(row, "n_before", json_integer(event->n_before));
    json_object_set_new(row, "n_after", json_integer(event->n_after));
    json_object_set_new(row, "keep_token_ranges", kvs_json_ranges(pos, n, EVENT_RANGES_MAX));
    json_object_set_new(row, "uniform", json_boolean(pl->session->uniform));
    json_object_set_new(row, "rope_next", json_integer(kvs_cache_next_rope(pl->session->cache, 0, 0)));
    json_object_set_new(row, "evict_ms", kvs_json_ms(event->evict_ns));
    json_object_set_new(row, "score_ms", kvs_json_ms(event->score_ns));
    json_object_set_new(row, "select_ms", kvs_json_ms(event->select_ns));
    json_object_set_new(row, "move_ms", kvs_json_ms(event->move_ns));
    json_object_set_new(row, "future", kvs_json_real(p.future));
    json_object_set_new(row, "collision", kvs_json_real(p.collision));
    json_object_set_new(row, "order", kvs_json_real(p.order));
    json_object_set_new(row, "out_of_window", kvs_json_real(p.out_of_window));
    json_object_set_new(row, "backward", kvs_json_real(p.backward));
    json_object_set_new(row, "seam", kvs_json_real(p.seam));
    json_object_set_new(row, "health", kvs_json_real(h.score));
    json_array_append_new(s->events, row);
    free(pos);
}

/* ---- turns ---- */

static void turn_row_scores(json_t *row, const kvs_scores *log, uint32_t turn)
{
    kvs_score_summary all, after;
    kvs_error e;
    if (kvs_scores_finish(log, 0, turn, &all, &e) != KVS_OK ||
        kvs_scores_finish(log, KVS_SCORE_AFTER_EVICTION, turn, &after, &e) != KVS_OK)
        return;
    json_object_set_new(row, "n_scored", json_integer((json_int_t)all.n));
    json_object_set_new(row, "nll", kvs_json_real(all.nll));
    json_object_set_new(row, "nll_ref", kvs_json_real(all.nll_ref));
    json_object_set_new(row, "kl_mean", kvs_json_real(all.kl_mean));
    json_object_set_new(row, "kl_p95", kvs_json_real(all.kl_p95));
    json_object_set_new(row, "kl_p99", kvs_json_real(all.kl_p99));
    json_object_set_new(row, "kl_first32", kvs_json_real(after.kl_mean));
    json_object_set_new(row, "jsd", kvs_json_real(all.jsd));
    json_object_set_new(row, "top1", kvs_json_real(all.top1));
    json_object_set_new(row, "rms_dp", kvs_json_real(all.rms_delta_p));
}

/* Keys of docs/output.md that this protocol leaves undefined. */
static void set_nulls(json_t *row, const char *const *keys, size_t n)
{
    for (size_t i = 0; i < n; i++)
        json_object_set_new(row, keys[i], json_null());
}

/* What the turn's end leaves; pl's sums and marks move on. */
static void record_state(json_t *row, player *pl, const kvs_session *session)
{
    kvs_usage u;
    kvs_session_get_usage(session, &u);
    kvs_health h;
    kvs_session_get_health(session, &h);
    json_object_set_new(row, "live_bytes", json_integer((json_int_t)u.live_bytes));
    json_object_set_new(row, "kv_bytes", json_integer((json_int_t)u.kv_bytes));
    json_object_set_new(row, "live_slots_max", json_integer(u.n_slots_max));
    json_object_set_new(row, "evictions", json_integer(pl->turn_evictions));
    json_object_set_new(row, "evict_ms", kvs_json_ms(u.evict_ns - pl->turn_usage.evict_ns));
    json_object_set_new(row, "score_ms", kvs_json_ms(u.score_ns - pl->turn_usage.score_ns));
    json_object_set_new(row, "select_ms", kvs_json_ms(u.select_ns - pl->turn_usage.select_ns));
    json_object_set_new(row, "move_ms", kvs_json_ms(u.move_ns - pl->turn_usage.move_ns));
    json_object_set_new(row, "probe_ms", kvs_json_ms(u.probe_ns - pl->turn_usage.probe_ns));
    json_object_set_new(row, "health", kvs_json_real(h.score));
    json_object_set_new(row, "health_worst", json_string(h.worst));
    kvs_record_positions(row, session);
    pl->health_sum += h.score;
    pl->live_sum += (double)u.live_bytes;
    pl->n_turns_recorded++;
    pl->turn_usage = u;
}

static void record_turn(play_state *s, player *pl, const kvs_session *session)
{
    const kvs_script_turn *t = &s->script->turns[s->turn];
    json_t *row = json_object();
    json_object_set_new(row, "run", json_string(pl->spec->id));
    json_object_set_new(row, "dialogue", json_string(s->script->id));
    json_object_set_new(row, "turn", json_integer(s->turn));
    json_object_set_new(row, "protocol", json_string("tf"));
    json_object_set_new(row, "token_begin", json_integer(t->begin));
    json_object_set_new(row, "token_end", json_integer(t->end));
    static const char *const score_keys[] = {"n_scored", "nll",        "nll_ref", "kl_mean", "kl_p95",
                                             "kl_p99",   "kl_first32", "jsd",     "top1",    "rms_dp"};
    static const char *const rest[] = {
        "ttft_ms", "tpot_ms", "prefill_ms",     "decode_ms", "tokenise_ms", "n_generated", "rep1",       "rep2", "rep3",
        "rep4",    "looped",  "longest_repeat", "max_run",   "period",      "prompt_echo", "eos_missing"};
    static const char *const state_keys[] = {
        "live_bytes",    "kv_bytes",          "live_slots_max", "evictions",    "evict_ms", "score_ms", "select_ms",
        "move_ms",       "probe_ms",          "health",         "health_worst", "ldd",      "rddi",     "future",
        "out_of_window", "collision",         "order",          "backward",     "gap",      "seam",     "adjacency",
        "prefix",        "template_integrity"};
    set_nulls(row, score_keys, sizeof score_keys / sizeof *score_keys);
    if (pl->failed == KVS_OK)
        turn_row_scores(row, &pl->scores, s->turn);
    if (session != NULL)
        record_state(row, pl, session);
    else
        set_nulls(row, state_keys, sizeof state_keys / sizeof *state_keys);
    set_nulls(row, rest, sizeof rest / sizeof *rest);
    json_object_set_new(row, "failure", pl->failed == KVS_OK ? json_null() : json_string(pl->failure));
    json_array_append_new(s->turns, row);
    pl->turn_evictions = 0;
}

/* ---- blocks ---- */

static kvs_status open_trunk(play_state *s, const char *policy, kvs_session **out, kvs_error *err)
{
    kvs_bench_run_spec spec = {.is_reference = true};
    memcpy(spec.policy, policy, strlen(policy) + 1);
    memcpy(spec.position, "keep", 5);
    kvs_session_options o;
    kvs_play_options(s->p, &spec, s->script->n_tokens + BLOCK_TOKENS, &o);
    return kvs_session_create(s->p->model, &o, out, err);
}

/* Forks every run that could evict before token_idx `end`; the trunk that records attention goes once it is not
 * needed any more. */
static kvs_status fork_due(play_state *s, uint32_t end, kvs_error *err)
{
    bool trunk_needed = false;
    for (uint32_t i = 1; i < s->p->n_runs; i++) {
        player *pl = &s->players[i];
        if (pl->session != NULL || pl->failed != KVS_OK)
            continue;
        kvs_policy policy;
        KVS_TRY(kvs_policy_parse(pl->spec->policy, pl->spec->position, s->p->opt->paper_compat, &policy, err));
        const bool taps = (kvs_policy_needs(&policy) & KVS_POLICY_NEEDS_MASS) != 0;
        if (kvs_play_shares(pl->spec, &policy, end)) {
            trunk_needed |= taps;
            continue;
        }
        kvs_session_options o;
        kvs_play_options(s->p, pl->spec, s->script->n_tokens + BLOCK_TOKENS, &o);
        kvs_error e;
        /* Nothing shared yet: a fresh session is cheaper than a fork and has its own accumulators. */
        const kvs_status status = s->trunk[0]->n_tokens == 0 ? kvs_session_create(s->p->model, &o, &pl->session, &e)
                                                             : kvs_session_fork(s->trunk[taps], &o, &pl->session, &e);
        if (status != KVS_OK) {
            pl->failed = status;
            snprintf(pl->failure, sizeof pl->failure, "%s", e.message);
            continue;
        }
        pl->forked_at = s->trunk[0]->n_tokens;
        kvs_session_on_event(pl->session, on_event, pl);
        kvs_session_get_usage(pl->session, &pl->turn_usage);
    }
    if (end > s->late_from && s->noise_player.session == NULL) {
        KVS_TRY(kvs_session_fork(s->trunk[0], NULL, &s->noise_player.session, err));
        kvs_session_perturb(s->noise_player.session, s->p->opt->seed + 1);
    }
    if (!trunk_needed)
        kvs_session_free(&s->trunk[1]);
    return KVS_OK;
}

/* One block: the reference first, then everyone else against its logits. */
static kvs_status run_block(play_state *s, uint32_t begin, uint32_t end, kvs_error *err)
{
    kvs_run *runs = calloc(s->p->n_runs + 3, sizeof *runs);
    player **owner = calloc(s->p->n_runs + 3, sizeof *owner);
    if (runs == NULL || owner == NULL) {
        free(runs);
        free(owner);
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a block of %u runs", s->p->n_runs);
    }
    uint32_t n = 0;
    const kvs_run common = {.tokens = s->script->tokens + begin,
                            .flags = s->script->flags + begin,
                            .n_tokens = end - begin,
                            .want = s->want};
    s->block_begin = begin;
    s->n_wanted = 0;
    for (uint32_t i = begin; i < end; i++)
        s->want[i - begin] = i + 1 < s->script->n_tokens && s->script->flags[i + 1] & KVS_TOKEN_ASSISTANT &&
                             (!s->p->suite->registry || is_compared(s, i));
    owner[n] = &s->players[0];
    runs[n] = common;
    runs[n].session = s->trunk[0];
    runs[n].on_logits = on_reference;
    runs[n++].ctx = &s->players[0];
    if (s->trunk[1] != NULL) {
        runs[n] = common;
        runs[n++].session = s->trunk[1];
    }
    for (uint32_t i = 1; i <= s->p->n_runs; i++) {
        player *pl = i < s->p->n_runs ? &s->players[i] : &s->noise_player;
        if (pl->session == NULL || pl->failed != KVS_OK || pl->retired)
            continue;
        owner[n] = pl;
        runs[n] = common;
        runs[n].session = pl->session;
        runs[n].on_logits = on_policy;
        runs[n++].ctx = pl;
    }
    kvs_error e = {0};
    kvs_status status = kvs_step(runs, n, &e);
    /* A run that its budget refuses is a failed cell of the grid, not the end of the dialogue. */
    if (status == KVS_EBUDGET && runs[0].status == KVS_OK) {
        status = KVS_OK;
        for (uint32_t i = 1; i < n; i++)
            if (runs[i].status != KVS_OK && owner[i] != NULL) {
                owner[i]->failed = runs[i].status;
                snprintf(owner[i]->failure, sizeof owner[i]->failure, "%s", e.message);
            }
    }
    if (status != KVS_OK && err != NULL)
        *err = s->error_set ? s->error : e;
    free(runs);
    free(owner);
    return status;
}

static kvs_status begin_turn(play_state *s, kvs_error *err)
{
    for (uint32_t i = 0; i < 2; i++)
        if (s->trunk[i] != NULL)
            KVS_TRY(kvs_session_turn_begin(s->trunk[i], err));
    for (uint32_t i = 1; i < s->p->n_runs; i++)
        if (s->players[i].session != NULL)
            KVS_TRY(kvs_session_turn_begin(s->players[i].session, err));
    return KVS_OK;
}

static kvs_status end_turn(play_state *s, kvs_error *err)
{
    for (uint32_t i = 0; i < s->p->n_runs; i++) {
        player *pl = &s->players[i];
        const kvs_session *session = i == 0 ? s->trunk[0] : pl->session;
        if (pl->retired || (session == NULL && pl->failed == KVS_OK))
            continue;
        if (i > 0 && pl->failed == KVS_OK)
            KVS_TRY(kvs_session_turn_end(pl->session, err));
        record_turn(s, pl, session);
    }
    return KVS_OK;
}

/* A long dialogue shows what happens past the window. Beyond the suite's ordinary length only runs whose positions stay
 * bounded go on: the others' question is answered by then, and they would triple the time. */
static void retire_players(play_state *s, uint32_t begin)
{
    if (begin < s->common_end)
        return;
    for (uint32_t i = 1; i < s->p->n_runs; i++)
        s->players[i].retired = strcmp(s->players[i].spec->position, "rerotate") != 0;
    s->noise_player.retired = true;
}

static kvs_status play_turn(play_state *s, kvs_error *err)
{
    const kvs_script_turn *t = &s->script->turns[s->turn];
    retire_players(s, t->begin);
    KVS_TRY(begin_turn(s, err));
    for (uint32_t at = t->begin; at < t->end;) {
        if (kvs_play_cancelled(s->p))
            return kvs_error_set(err, KVS_ECANCELLED, "stopped");
        const uint32_t end = kvs_min_u32(t->end, at + BLOCK_TOKENS);
        KVS_TRY(fork_due(s, end, err));
        KVS_TRY(run_block(s, at, end, err));
        at = end;
        if (s->p->progress != NULL)
            s->p->progress(s->p->ctx, at, s->script->n_tokens);
    }
    return end_turn(s, err);
}

/* ---- the windowed reference: fresh prefills, the legal upper reference past the window ---- */

typedef struct window_score {
    play_state *s;
    uint32_t begin; /* token_idx of row 0 */
    double *nll;
    uint32_t *n;
} window_score;

static bool on_window(void *ctx, uint32_t row, const float *logits)
{
    window_score *w = ctx;
    const kvs_model *m = w->s->p->model;
    const uint32_t idx = w->begin + row + 1;
    w->nll[idx / BIN_TOKENS] +=
        m->kernels->logsumexp(logits, m->info.vocab_size, NULL) - (double)logits[w->s->script->tokens[idx]];
    w->n[idx / BIN_TOKENS]++;
    return true;
}

static kvs_status play_window(play_state *s, double *nll, uint32_t *n, kvs_error *err)
{
    const kvs_script *script = s->script;
    uint8_t want[WINDOW_TOKENS];
    for (uint32_t at = WINDOW_TOKENS; at + 1 < script->n_tokens; at += WINDOW_STRIDE) {
        if (kvs_play_cancelled(s->p))
            return kvs_error_set(err, KVS_ECANCELLED, "stopped");
        const uint32_t end = kvs_min_u32(script->n_tokens - 1, at + WINDOW_STRIDE);
        const uint32_t begin = end - kvs_min_u32(end, WINDOW_TOKENS);
        for (uint32_t i = begin; i < end; i++)
            want[i - begin] = i >= at && script->flags[i + 1] & KVS_TOKEN_ASSISTANT;
        kvs_session *session;
        KVS_TRY(open_trunk(s, "baseline", &session, err));
        window_score score = {s, begin, nll, n};
        kvs_run run = {.session = session,
                       .tokens = script->tokens + begin,
                       .flags = script->flags + begin,
                       .n_tokens = end - begin,
                       .on_logits = on_window,
                       .want = want,
                       .ctx = &score};
        const kvs_status status = kvs_step(&run, 1, err);
        kvs_session_free(&session);
        KVS_TRY(status);
    }
    return KVS_OK;
}

/* ---- results ---- */

static json_t *summary_row(const play_state *s, const player *pl, const kvs_session *session,
                           const kvs_score_summary *sum)
{
    kvs_usage u;
    kvs_session_get_usage(session, &u);
    json_t *row = json_object();
    json_object_set_new(row, "run", json_string(pl->spec->id));
    json_object_set_new(row, "policy", json_string(pl->spec->label[0] != '\0' ? pl->spec->label : pl->spec->policy));
    json_object_set_new(row, "position", json_string(pl->spec->position));
    json_object_set_new(row, "dialogue", json_string(s->script->id));
    json_object_set_new(row, "protocol", json_string("tf"));
    json_object_set_new(row, "n_tokens", json_integer(s->script->n_tokens));
    json_object_set_new(row, "n_scored", json_integer((json_int_t)sum->n));
    json_object_set_new(row, "kl_mean", kvs_json_real(sum->kl_mean));
    json_object_set_new(row, "kl_p99", kvs_json_real(sum->kl_p99));
    json_object_set_new(row, "kl_median", kvs_json_real(sum->kl_median));
    json_object_set_new(row, "nll", kvs_json_real(sum->nll));
    json_object_set_new(row, "nll_ref", kvs_json_real(sum->nll_ref));
    json_object_set_new(row, "ppl", kvs_json_real(sum->ppl));
    json_object_set_new(row, "ppl_ratio", kvs_json_real(sum->ppl_ratio));
    json_object_set_new(row, "top1", kvs_json_real(sum->top1));
    json_object_set_new(row, "jsd", kvs_json_real(sum->jsd));
    json_object_set_new(row, "footprint", kvs_json_real(u.footprint));
    json_object_set_new(row, "peak_kv_bytes", json_integer((json_int_t)u.kv_bytes_peak));
    json_object_set_new(row, "live_bytes_mean", kvs_json_real(pl->live_sum / pl->n_turns_recorded));
    json_object_set_new(row, "budget_bytes", json_integer((json_int_t)u.budget_bytes));
    json_object_set_new(row, "evictions", json_integer((json_int_t)u.n_evictions));
    json_object_set_new(row, "health_mean", kvs_json_real(pl->health_sum / pl->n_turns_recorded));
    static const char *const free_only[] = {"looped_rate", "ttft_ms_median", "tpot_ms_median", "prefill_tok_per_s",
                                            "decode_tok_per_s"};
    set_nulls(row, free_only, sizeof free_only / sizeof *free_only);
    json_object_set_new(row, "evict_ms_total", kvs_json_ms(u.evict_ns));
    json_object_set_new(row, "peak_rss_bytes", json_integer((json_int_t)kvs_peak_rss_bytes()));
    json_object_set_new(row, "own_tokens", json_integer((json_int_t)(session->n_tokens - pl->forked_at)));
    json_object_set_new(row, "score_ms_total", kvs_json_ms(u.score_ns));
    json_object_set_new(row, "select_ms_total", kvs_json_ms(u.select_ns));
    json_object_set_new(row, "move_ms_total", kvs_json_ms(u.move_ns));
    json_object_set_new(row, "probe_ms_total", kvs_json_ms(u.probe_ns));
    json_object_set_new(row, "side_bytes", json_integer((json_int_t)u.side_bytes_peak));
    json_object_set_new(row, "own_bytes", json_integer((json_int_t)u.own_bytes));
    return row;
}

static json_t *bins_json(const double *nll, const uint32_t *n, uint32_t n_bins)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < n_bins; i++)
        json_array_append_new(list, json_pack("[i,o]", (int)n[i], kvs_json_real(n[i] > 0 ? nll[i] / n[i] : NAN)));
    return list;
}

/* What claims are computed from: one number a (run, dialogue), and the curves over positions. */
static void claim_row(json_t *claims, const player *pl, const kvs_score_summary *sum, const kvs_score_summary *after)
{
    json_object_set_new(claims, pl->spec->id,
                        json_pack("{s:I,s:o,s:o,s:o,s:o,s:o,s:I}", "n", (json_int_t)sum->n, "kl",
                                  kvs_json_real(sum->kl_mean), "kl_after", kvs_json_real(after->kl_mean), "nll",
                                  kvs_json_real(sum->nll), "nll_ref", kvs_json_real(sum->nll_ref), "top1",
                                  kvs_json_real(sum->top1), "first_logits", (json_int_t)(pl->first_logits >> 1)));
}

static void keep_set_rows(const play_state *s, const player *pl, const kvs_session *session, json_t *out)
{
    const kvs_model_info *info = &s->p->model->info;
    int32_t *pos = calloc(2 * ((size_t)s->script->n_tokens + 64), sizeof *pos);
    int32_t *rope = pos + s->script->n_tokens + 64;
    for (uint32_t layer = 0; layer < info->n_layers; layer++)
        for (uint32_t head = 0; head < info->n_kv_heads; head++) {
            const uint32_t n = kvs_session_keep_set(session, layer, head, pos, rope, s->script->n_tokens + 64);
            json_t *pos_ranges = json_array(), *rope_ranges = json_array();
            for (uint32_t i = 0; i < n;) {
                uint32_t end = i + 1;
                while (end < n && pos[end] == pos[end - 1] + 1 && rope[end] == rope[end - 1] + 1)
                    end++;
                json_array_append_new(pos_ranges, json_pack("[i,i]", (int)pos[i], (int)pos[end - 1]));
                json_array_append_new(rope_ranges, json_pack("[i,i]", (int)rope[i], (int)rope[end - 1]));
                i = end;
            }
            json_array_append_new(out, json_pack("{s:s,s:s,s:i,s:i,s:o,s:o}", "run", pl->spec->id, "dialogue",
                                                 s->script->id, "layer", (int)layer, "kv_head", (int)head, "pos_ranges",
                                                 pos_ranges, "rope_ranges", rope_ranges));
        }
    free(pos);
}

static kvs_status collect(play_state *s, json_t *part, kvs_error *err)
{
    json_t *summary = json_array(), *claims = json_object(), *keepsets = json_array();
    json_object_set_new(part, "turns", json_incref(s->turns));
    json_object_set_new(part, "events", json_incref(s->events));
    json_object_set_new(part, "keepsets", keepsets);
    json_object_set_new(part, "summary", summary);
    json_object_set_new(part, "claims", claims);
    for (uint32_t i = 0; i <= s->p->n_runs; i++) {
        player *pl = i < s->p->n_runs ? &s->players[i] : &s->noise_player;
        const kvs_session *session = i == 0 ? s->trunk[0] : pl->session;
        if (session == NULL || pl->failed != KVS_OK)
            continue;
        kvs_score_summary sum, after;
        KVS_TRY(kvs_scores_finish(&pl->scores, SCORED_LATE, KVS_SCORE_ALL_TURNS, &sum, err));
        KVS_TRY(kvs_scores_finish(&pl->scores, KVS_SCORE_AFTER_EVICTION, KVS_SCORE_ALL_TURNS, &after, err));
        claim_row(claims, pl, &sum, &after);
        if (s->p->window && i > 0 && !pl->retired)
            json_object_set_new(json_object_get(claims, pl->spec->id), "bins",
                                bins_json(pl->bin_nll, pl->bin_n, s->n_bins));
        if (i == s->p->n_runs)
            continue;
        json_array_append_new(summary, summary_row(s, pl, session, &sum));
        if (s->p->keep_sets)
            keep_set_rows(s, pl, session, keepsets);
    }
    return KVS_OK;
}

static kvs_status play_all(play_state *s, json_t *part, kvs_error *err)
{
    KVS_TRY(open_trunk(s, "baseline", &s->trunk[0], err));
    KVS_TRY(open_trunk(s, "attention_top +protect=none", &s->trunk[1], err));
    for (s->turn = 0; s->turn < s->script->n_turns; s->turn++)
        KVS_TRY(play_turn(s, err));
    KVS_TRY(collect(s, part, err));
    json_t *claims = json_object_get(part, "claims");
    json_object_set_new(claims, "bins", bins_json(s->bin_nll, s->bin_n, s->n_bins));
    if (s->p->window) {
        double *nll = calloc(s->n_bins, sizeof *nll);
        uint32_t *n = calloc(s->n_bins, sizeof *n);
        const kvs_status status = play_window(s, nll, n, err);
        json_object_set_new(claims, "window_bins", bins_json(nll, n, s->n_bins));
        free(nll);
        free(n);
        KVS_TRY(status);
    }
    return KVS_OK;
}

static void init_player(player *pl, uint32_t n_bins)
{
    kvs_scores_init(&pl->scores, true, NULL);
    pl->bin_nll = calloc(n_bins, sizeof *pl->bin_nll);
    pl->bin_n = calloc(n_bins, sizeof *pl->bin_n);
}

static void free_player(player *pl)
{
    kvs_session_free(&pl->session);
    kvs_scores_free(&pl->scores);
    free(pl->bin_nll);
    free(pl->bin_n);
}

kvs_status kvs_play_forced(const kvs_play *p, const kvs_script *script, json_t **part, kvs_error *err)
{
    static const kvs_bench_run_spec noise_spec = {.id = "noise"};
    *part = NULL;
    play_state s = {.p = p, .script = script, .turns = json_array(), .events = json_array()};
    s.n_bins = script->n_tokens / BIN_TOKENS + 1;
    s.rows = calloc((size_t)BLOCK_TOKENS * p->model->info.vocab_size, sizeof *s.rows);
    s.bin_nll = calloc(s.n_bins, sizeof *s.bin_nll);
    s.bin_n = calloc(s.n_bins, sizeof *s.bin_n);
    s.players = calloc(p->n_runs, sizeof *s.players);
    s.late_from = s.common_end = script->n_tokens;
    for (uint32_t t = script->n_turns; p->window && t-- > 0;)
        if (script->turns[t].begin >= p->suite->target_tokens)
            s.common_end = script->turns[t].begin;
    for (uint32_t i = 0; i < p->n_runs; i++) {
        s.players[i] = (player){.spec = &p->runs[i], .state = &s, .last_eviction = UINT64_MAX};
        init_player(&s.players[i], s.n_bins);
        if (!p->runs[i].is_reference)
            s.late_from = kvs_min_u32(s.late_from, p->runs[i].first_tokens);
    }
    if (p->suite->registry) /* the same tokens for every budget: where the largest has long evicted */
        s.late_from = kvs_min_u32(p->suite->score_from_tokens, script->n_tokens);
    s.noise_player = (player){.spec = &noise_spec, .state = &s, .last_eviction = UINT64_MAX};
    init_player(&s.noise_player, s.n_bins);
    json_t *out = json_object();
    json_object_set_new(out, "dialogue",
                        json_pack("{s:s,s:i,s:i}", "id", script->id, "n_turns", (int)script->n_turns, "n_tokens",
                                  (int)script->n_tokens));
    const kvs_status status = play_all(&s, out, err);
    for (uint32_t i = 0; i < p->n_runs; i++) {
        free_player(&s.players[i]);
    }
    free_player(&s.noise_player);
    kvs_session_free(&s.trunk[0]);
    kvs_session_free(&s.trunk[1]);
    json_decref(s.turns);
    json_decref(s.events);
    free(s.rows);
    free(s.bin_nll);
    free(s.bin_n);
    free(s.players);
    if (status != KVS_OK) {
        json_decref(out);
        return status;
    }
    *part = out;
    return KVS_OK;
}

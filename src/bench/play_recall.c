/* Recall of planted facts (reference/evaluation.md 3.4): every run reads the same dialogue, and at each question the
 * candidates are scored by forced choice as the continuation of the recorded answer. Scoring happens in a fork that
 * never evicts, so that asking changes nothing; the recorded answer is read on afterwards. Episodes are made of what
 * stands before the first question and hold nothing of later ones: as the method has it, turns are dropped. */
#include "bench/play.h"

#include "eval/keep_sets.h"
#include "eval/recall.h"
#include "eval/routing.h"
#include "model/model.h"
#include "policy/policy.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    BLOCK_TOKENS = 256, /* rows a run feeds at once: no logits are needed between questions */
    PROBE_TOKENS = 256, /* room of the scoring fork; an answer's beginning and one candidate need a tenth */
    CANDIDATES_MAX = 16,
    MESSAGES_MAX = 4096, /* of one generated dialogue */
    BYTES_PER_TOKEN = 4, /* of English text, roughly: bounds a filler without tokenising all of them */
};

/* ---- the dialogue ---- */

/* Only exchanges of at most max_bytes: one long answer would put the questions far past the trigger, or the window.
 * Dialogues keep their index, for message.part names it. */
static kvs_status short_fillers(const kvs_dialogue_set *from, size_t max_bytes, kvs_dialogue_set *out, kvs_error *err)
{
    *out = (kvs_dialogue_set){.name = strdup(from->name != NULL ? from->name : "a set")};
    kvs_status status = out->name != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for the fillers");
    for (uint32_t i = 0; i < from->n_items && status == KVS_OK; i++) {
        kvs_dialogue d = {.has_assistant = true};
        const kvs_dialogue_message *m = from->items[i].messages;
        for (uint32_t k = 0; k + 1 < from->items[i].n_messages && status == KVS_OK; k++) {
            if (strcmp(m[k].role, "user") != 0 || strcmp(m[k + 1].role, "assistant") != 0 ||
                strlen(m[k].content) + strlen(m[k + 1].content) > max_bytes)
                continue;
            status = kvs_dialogue_append(&d, "user", m[k].content, m[k].source_idx, false, err);
            if (status == KVS_OK)
                status = kvs_dialogue_append(&d, "assistant", m[k + 1].content, m[k + 1].source_idx, false, err);
        }
        if (status == KVS_OK)
            status = kvs_dialogue_set_append(out, &d, err);
        kvs_dialogue_free(&d);
    }
    if (status != KVS_OK)
        kvs_dialogue_set_free(out);
    return status;
}

/* The turn whose recorded answer is message `answer_idx`. */
static uint32_t turn_of_answer(const kvs_script *script, uint32_t answer_idx)
{
    uint32_t t = 0;
    while (t + 1 < script->n_turns && script->turns[t].message_end <= answer_idx)
        t++;
    return t;
}

static kvs_status generate(const kvs_play *p, const kvs_facts_options *o, uint64_t index, kvs_dialogue *d,
                           kvs_script *script, kvs_error *err)
{
    KVS_TRY(kvs_dialogue_facts(o, index, d, err));
    const kvs_status status = kvs_script_render(p->model, d, script, err);
    if (status != KVS_OK)
        kvs_dialogue_free(d);
    return status;
}

/* The shortest dialogue whose first question stands past the trigger. A fact takes four slots of two messages (told,
 * two for its confusers, asked) and one more if it is updated, which kvs_dialogue_facts alone knows. */
static kvs_status grow_dialogue(const kvs_play *p, kvs_facts_options *o, uint64_t index, kvs_dialogue *d,
                                kvs_script *script, kvs_error *err)
{
    const uint32_t enough_messages = 10 * o->n_facts;
    for (o->n_messages = 8 * o->n_facts; o->n_messages <= MESSAGES_MAX; o->n_messages += 2) {
        const kvs_status status = generate(p, o, index, d, script, err);
        if (status == KVS_EINVAL && o->n_messages < enough_messages)
            continue;
        KVS_TRY(status);
        const uint32_t first = script->turns[turn_of_answer(script, d->facts[0].question_idx + 1)].begin;
        if (first >= 1.05 * p->suite->trigger_tokens)
            return KVS_OK;
        kvs_script_free(script);
        kvs_dialogue_free(d);
    }
    return kvs_error_set(err, KVS_EINVAL, "recall dialogue %llu: %d messages do not reach the trigger of %u tokens",
                         (unsigned long long)index, MESSAGES_MAX, p->suite->trigger_tokens);
}

kvs_status kvs_recall_dialogue(const kvs_play *p, const kvs_dialogue_set *fillers, uint64_t index, kvs_dialogue *d,
                               kvs_script *script, kvs_error *err)
{
    kvs_dialogue_set shorter;
    KVS_TRY(short_fillers(fillers, p->suite->trigger_tokens / 8 * BYTES_PER_TOKEN, &shorter, err));
    kvs_facts_options o;
    kvs_facts_options_default(&o);
    o.seed = p->opt->seed;
    o.n_facts = p->suite->recall_facts;
    o.fillers = &shorter;
    kvs_status status = grow_dialogue(p, &o, index, d, script, err);
    if (status == KVS_EINVAL) { /* a set without short answered questions: the embedded one has them */
        o.fillers = NULL;
        status = grow_dialogue(p, &o, index, d, script, err);
    }
    kvs_dialogue_set_free(&shorter);
    return status;
}

/* ---- state ---- */

typedef struct recaller {
    const kvs_bench_run_spec *spec;
    kvs_session *session; /* NULL: nothing can have been evicted yet, the reference stands for it */
    kvs_session *probe;
    kvs_watch *watch;       /* of the probe while it reads the answer's beginning; none for episodes */
    kvs_routing routing;    /* what it saw */
    kvs_episodes *episodes; /* instead of a session, from the first question on */
    uint32_t episode;       /* that the question went to */
    uint64_t n_context;     /* tokens said in probe before the tails */
    const struct recall_state *state;
    double logprob[CANDIDATES_MAX];
    uint32_t candidate; /* whose tail is being read */
    kvs_status failed;
    char failure[400];
} recaller;

typedef struct recall_state {
    const kvs_play *p;
    const kvs_script *script;
    kvs_session *trunk[2]; /* the full cache: [0] plain (the reference), [1] recording attention */
    recaller *recallers;   /* [n_runs]; 0 is the reference, its session is trunk[0] */
    uint32_t turn;
    const kvs_dialogue_fact *fact;
    /* of the question being asked */
    int32_t *tail[CANDIDATES_MAX]; /* tokens in which the candidate's answer differs from the answer's beginning */
    uint32_t n_tail[CANDIDATES_MAX], n_candidates, context_end;
    uint32_t told_begin, told_end; /* tokens of the gold value where it was told */
    int32_t *told;                 /* the same one by one */
    json_t *rows;
} recall_state;

static void fail(recaller *r, kvs_status status, const kvs_error *e)
{
    r->failed = status;
    snprintf(r->failure, sizeof r->failure, "%s", e->message);
}

/* ---- feeding ---- */

static kvs_status open_trunk(const recall_state *s, const char *policy, kvs_session **out, kvs_error *err)
{
    kvs_bench_run_spec spec = {.is_reference = true, .position = "keep"};
    snprintf(spec.policy, sizeof spec.policy, "%s", policy);
    kvs_session_options o;
    kvs_play_options(s->p, &spec, s->script->n_tokens + BLOCK_TOKENS, &o);
    return kvs_session_create(s->p->model, &o, out, err);
}

/* As in teacher-forced play: what stands before a run's first possible eviction is computed once. */
static kvs_status fork_due(recall_state *s, uint32_t end, kvs_error *err)
{
    bool trunk_needed = false;
    for (uint32_t i = 1; i < s->p->n_runs; i++) {
        recaller *r = &s->recallers[i];
        if (r->session != NULL || r->failed != KVS_OK || r->spec->n_episodes != 0)
            continue;
        kvs_policy policy;
        KVS_TRY(kvs_policy_parse(r->spec->policy, r->spec->position, s->p->opt->paper_compat, &policy, err));
        const bool taps = (kvs_policy_needs(&policy) & KVS_POLICY_NEEDS_MASS) != 0;
        if (kvs_play_shares(r->spec, &policy, end)) {
            trunk_needed |= taps;
            continue;
        }
        kvs_session_options o;
        kvs_play_options(s->p, r->spec, s->script->n_tokens + BLOCK_TOKENS, &o);
        kvs_error e;
        const kvs_status status = kvs_session_n_tokens(s->trunk[0]) == 0
                                      ? kvs_session_create(s->p->model, &o, &r->session, &e)
                                      : kvs_session_fork(s->trunk[taps], &o, &r->session, &e);
        if (status != KVS_OK)
            fail(r, status, &e);
    }
    if (!trunk_needed)
        kvs_session_free(&s->trunk[1]);
    return KVS_OK;
}

typedef struct batch {
    kvs_run *steps;
    recaller **owner;
    uint32_t n;
} batch;

static kvs_status batch_new(const recall_state *s, batch *b, kvs_error *err)
{
    *b = (batch){calloc(s->p->n_runs + 1, sizeof *b->steps), calloc(s->p->n_runs + 1, sizeof *b->owner), 0};
    return b->steps != NULL && b->owner != NULL
               ? KVS_OK
               : kvs_error_set(err, KVS_ENOMEM, "no memory for a step of %u runs", s->p->n_runs);
}

static void batch_free(batch *b)
{
    free(b->steps);
    free(b->owner);
}

static void batch_add(batch *b, const kvs_run *step, kvs_session *session, recaller *owner)
{
    b->steps[b->n] = *step;
    b->steps[b->n].session = session;
    b->steps[b->n].ctx = owner;
    b->owner[b->n++] = owner;
}

/* A run that its budget refuses fails alone; the reference or a trunk fails all. */
static kvs_status step_together(const recall_state *s, batch *b, kvs_error *err)
{
    kvs_error e = {0};
    const kvs_status status = b->n == 0 ? KVS_OK : kvs_step(b->steps, b->n, &e);
    if (status == KVS_OK)
        return KVS_OK;
    bool alone = status == KVS_EBUDGET;
    for (uint32_t i = 0; i < b->n; i++)
        if (b->steps[i].status != KVS_OK && (b->owner[i] == NULL || b->owner[i] == &s->recallers[0]))
            alone = false;
    if (!alone) {
        if (err != NULL)
            *err = e;
        return status;
    }
    for (uint32_t i = 0; i < b->n; i++)
        if (b->steps[i].status != KVS_OK)
            fail(b->owner[i], b->steps[i].status, &e);
    return KVS_OK;
}

static kvs_status feed_block(recall_state *s, uint32_t begin, uint32_t end, kvs_error *err)
{
    const kvs_run step = {
        .tokens = s->script->tokens + begin, .flags = s->script->flags + begin, .n_tokens = end - begin};
    batch b;
    kvs_status status = batch_new(s, &b, err);
    if (status == KVS_OK) {
        batch_add(&b, &step, s->trunk[0], &s->recallers[0]);
        if (s->trunk[1] != NULL)
            batch_add(&b, &step, s->trunk[1], NULL);
        for (uint32_t i = 1; i < s->p->n_runs; i++)
            if (s->recallers[i].session != NULL && s->recallers[i].failed == KVS_OK)
                batch_add(&b, &step, s->recallers[i].session, &s->recallers[i]);
        status = step_together(s, &b, err);
    }
    batch_free(&b);
    return status;
}

static kvs_status feed(recall_state *s, uint32_t begin, uint32_t end, kvs_error *err)
{
    for (uint32_t at = begin; at < end;) {
        if (kvs_play_cancelled(s->p))
            return kvs_error_set(err, KVS_ECANCELLED, "stopped");
        const uint32_t next = kvs_min_u32(end, at + BLOCK_TOKENS);
        KVS_TRY(fork_due(s, next, err));
        KVS_TRY(feed_block(s, at, next, err));
        at = next;
        if (s->p->progress != NULL)
            s->p->progress(s->p->ctx, at, s->script->n_tokens);
    }
    return KVS_OK;
}

/* ---- candidates ---- */

/* The turn's tokens with `answer` as the assistant's words, without what the template puts behind them. */
static kvs_status render_answer(const recall_state *s, kvs_message *messages, uint32_t answer_idx, const char *answer,
                                kvs_rendered *out, kvs_error *err)
{
    const uint32_t from = s->turn == 0 ? 0 : s->script->turns[s->turn - 1].message_end;
    const char *recorded = messages[answer_idx].content;
    messages[answer_idx].content = answer;
    const kvs_status status = kvs_chat_render(s->p->model, messages, answer_idx + 1, from, false, out, err);
    messages[answer_idx].content = recorded;
    while (status == KVS_OK && out->n_tokens > 0 && out->flags[out->n_tokens - 1] == KVS_TOKEN_TEMPLATE)
        out->n_tokens--;
    return status;
}

static void free_candidates(recall_state *s)
{
    for (uint32_t c = 0; c < s->n_candidates; c++) {
        free(s->tail[c]);
        s->tail[c] = NULL;
    }
    s->n_candidates = 0;
}

/* The context is what the answer's beginning and all candidates' answers have in common: a word's leading space is
 * often a part of its first token, so the beginning alone may end in a token that no answer has. */
static kvs_status cut_tails(recall_state *s, const kvs_rendered *beginning, const kvs_rendered *whole,
                            const kvs_dialogue_fact *fact, kvs_error *err)
{
    const kvs_script_turn *t = &s->script->turns[s->turn];
    size_t common = beginning->n_tokens;
    for (uint32_t c = 0; c < fact->n_candidates; c++) {
        size_t same = 0;
        while (same < common && same < whole[c].n_tokens && whole[c].tokens[same] == beginning->tokens[same])
            same++;
        common = same;
    }
    s->context_end = t->begin + (uint32_t)common;
    if (s->context_end <= t->answer || s->context_end >= t->end ||
        memcmp(beginning->tokens, s->script->tokens + t->begin, common * sizeof *beginning->tokens) != 0)
        return kvs_error_set(err, KVS_EUNSUPPORTED,
                             "dialogue %s, message %u: the answer's beginning does not tokenise as in the whole answer",
                             s->script->id, fact->question_idx + 1);
    for (uint32_t c = 0; c < fact->n_candidates; c++) {
        s->n_tail[c] = (uint32_t)(whole[c].n_tokens - common);
        s->tail[c] = calloc(s->n_tail[c] + 1, sizeof *s->tail[c]);
        s->n_candidates = c + 1;
        if (s->tail[c] == NULL || s->n_tail[c] == 0 || s->n_tail[c] + s->context_end - t->answer > PROBE_TOKENS)
            return kvs_error_set(err, s->tail[c] == NULL ? KVS_ENOMEM : KVS_EUNSUPPORTED,
                                 "candidate \"%.80s\" has %u tokens: 1 to %d can be scored", fact->candidates[c],
                                 s->n_tail[c], PROBE_TOKENS / 2);
        memcpy(s->tail[c], whole[c].tokens + common, s->n_tail[c] * sizeof *s->tail[c]);
    }
    return KVS_OK;
}

static kvs_status make_candidates(recall_state *s, const kvs_dialogue_fact *fact, kvs_error *err)
{
    if (fact->n_candidates < 2 || fact->n_candidates > CANDIDATES_MAX)
        return kvs_error_set(err, KVS_EINVAL, "fact %u has %u candidates: 2 to %d can be scored", fact->fact_idx,
                             fact->n_candidates, CANDIDATES_MAX);
    kvs_message *messages = kvs_script_messages(s->script->dialogue);
    if (messages == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the messages of %s", s->script->id);
    const char *answer = messages[fact->answer.message_idx].content;
    kvs_rendered beginning = {0}, whole[CANDIDATES_MAX] = {{0}};
    kvs_status status = KVS_OK;
    for (uint32_t c = 0; c <= fact->n_candidates && status == KVS_OK; c++) {
        char *text = NULL;
        if (asprintf(&text, "%.*s%s", (int)fact->answer.start_bytes, answer,
                     c < fact->n_candidates ? fact->candidates[c] : "") < 0)
            status = kvs_error_set(err, KVS_ENOMEM, "no memory for an answer");
        else
            status = render_answer(s, messages, fact->answer.message_idx, text,
                                   c < fact->n_candidates ? &whole[c] : &beginning, err);
        free(text);
    }
    if (status == KVS_OK)
        status = cut_tails(s, &beginning, whole, fact, err);
    kvs_rendered_free(&beginning);
    for (uint32_t c = 0; c < fact->n_candidates; c++)
        kvs_rendered_free(&whole[c]);
    free(messages);
    return status;
}

/* ---- scoring ---- */

static double logprob(const recall_state *s, const float *logits, int32_t token)
{
    const kvs_model *m = s->p->model;
    return (double)logits[token] - m->kernels->logsumexp(logits, m->info.vocab_size, NULL);
}

static bool on_context(void *ctx, uint32_t row, const float *logits)
{
    (void)row;
    recaller *r = ctx;
    for (uint32_t c = 0; c < r->state->n_candidates; c++)
        r->logprob[c] = logprob(r->state, logits, r->state->tail[c][0]);
    return true;
}

static bool on_tail(void *ctx, uint32_t row, const float *logits)
{
    recaller *r = ctx;
    r->logprob[r->candidate] += logprob(r->state, logits, r->state->tail[r->candidate][row + 1]);
    return true;
}

static bool on_episode(void *ctx, uint32_t episode, uint64_t n_done, uint64_t n_total)
{
    (void)episode;
    (void)n_done;
    (void)n_total;
    return !kvs_play_cancelled(ctx);
}

/* Of the messages before the question. */
static kvs_status make_episodes(const recall_state *s, recaller *r, kvs_error *err)
{
    kvs_message *messages = kvs_script_messages(s->script->dialogue);
    if (messages == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the messages of %s", s->script->id);
    kvs_session_options as;
    kvs_play_options(s->p, r->spec, 0, &as);
    kvs_episodes_options o;
    kvs_episodes_options_default(&o);
    o.n_episodes = r->spec->n_episodes;
    o.uniform_heads = r->spec->uniform_heads;
    o.sensitivity = r->spec->sensitivity;
    o.budget_bytes = as.budget_bytes;
    o.budget_tokens = as.budget_tokens;
    o.kv_type = as.kv_type;
    o.arith = as.arith;
    o.seed = as.seed;
    o.on_progress = on_episode;
    o.ctx = (void *)(uintptr_t)s->p;
    kvs_status status = kvs_episodes_create(s->p->model, &o, messages, s->fact->question_idx, &r->episodes, err);
    free(messages);
    if (status == KVS_OK &&
        kvs_session_n_tokens(kvs_episodes_session(r->episodes, 0)) != s->script->turns[s->turn].begin)
        status = kvs_error_set(err, KVS_EUNSUPPORTED, "dialogue %s does not render the same in turns and at once",
                               s->script->id);
    return status;
}

/* The session of the episode that the question goes to. */
static kvs_status route(const recall_state *s, recaller *r, kvs_session **out, kvs_error *err)
{
    if (r->episodes == NULL)
        KVS_TRY(make_episodes(s, r, err));
    KVS_TRY(kvs_episodes_route(r->episodes, s->fact->question, &r->episode, NULL, err));
    *out = kvs_episodes_session(r->episodes, r->episode);
    return KVS_OK;
}

/* A fork that cannot evict: the same keys and positions, room for an answer; an episode has not read the question. */
static kvs_status open_probe(const recall_state *s, recaller *r, kvs_error *err)
{
    const kvs_script_turn *t = &s->script->turns[s->turn];
    const uint32_t n_question = r->spec->n_episodes != 0 ? t->answer - t->begin : 0;
    kvs_session *from = r == &s->recallers[0] ? s->trunk[0] : r->session;
    if (r->spec->n_episodes != 0)
        KVS_TRY(route(s, r, &from, err));
    kvs_usage u;
    kvs_session_get_usage(from, &u);
    /* A head may hold more than the mean that a budget bounds. */
    const uint32_t room = kvs_max_u32((uint32_t)u.budget_tokens, u.n_slots_max) + n_question + PROBE_TOKENS;
    kvs_bench_run_spec spec = {.is_reference = true, .policy = "baseline", .budget_tokens = room};
    snprintf(spec.position, sizeof spec.position, "%s", r->spec->position);
    kvs_session_options o;
    kvs_play_options(s->p, &spec, 0, &o);
    KVS_TRY(kvs_session_fork(from, &o, &r->probe, err));
    return kvs_session_extend(r->probe, s->script->tokens + t->begin, s->script->flags + t->begin, n_question, NULL,
                              err);
}

/* One step of all probes: the answer's beginning (candidate UINT32_MAX) or a candidate's tail. */
static kvs_status step_probes(recall_state *s, uint32_t candidate, batch *b, kvs_error *err)
{
    uint8_t want[PROBE_TOKENS], flags[PROBE_TOKENS];
    memset(want, 1, sizeof want);
    memset(flags, KVS_TOKEN_ASSISTANT, sizeof flags);
    const uint32_t answer = s->script->turns[s->turn].answer;
    kvs_run step = {.tokens = s->script->tokens + answer,
                    .flags = s->script->flags + answer,
                    .n_tokens = s->context_end - answer,
                    .on_logits = on_context};
    if (candidate != UINT32_MAX)
        step = (kvs_run){.tokens = s->tail[candidate],
                         .flags = flags,
                         .n_tokens = s->n_tail[candidate] - 1,
                         .on_logits = on_tail,
                         .want = want};
    b->n = 0;
    for (uint32_t i = 0; i < s->p->n_runs; i++) {
        recaller *r = &s->recallers[i];
        r->candidate = candidate;
        if (r->probe != NULL && r->failed == KVS_OK)
            batch_add(b, &step, r->probe, r);
    }
    return step_together(s, b, err);
}

/* The answer's beginning is watched: what of its attention goes to the told value, and where its last row ends up. */
static kvs_status open_watch(const recall_state *s, recaller *r, kvs_error *err)
{
    const uint32_t answer = s->script->turns[s->turn].answer;
    const kvs_watch_options o = {
        .tokens = s->told, .n_tokens = s->told_end - s->told_begin, .from_query = answer, .from_answer = answer};
    KVS_TRY(kvs_watch_create(r->probe, &o, &r->watch, err));
    kvs_session_watch(r->probe, r->watch);
    return KVS_OK;
}

static kvs_status read_watches(recall_state *s, kvs_error *err)
{
    for (uint32_t i = 0; i < s->p->n_runs; i++) {
        recaller *r = &s->recallers[i];
        if (r->watch == NULL || r->failed != KVS_OK)
            continue;
        kvs_session_watch(r->probe, NULL);
        KVS_TRY(kvs_routing_make(r->probe, r->watch, s->recallers[0].watch, &r->routing, err));
    }
    return KVS_OK;
}

static kvs_status score(recall_state *s, batch *b, kvs_error *err)
{
    for (uint32_t i = 0; i < s->p->n_runs; i++) {
        recaller *r = &s->recallers[i];
        kvs_error e;
        if ((i > 0 && r->session == NULL && r->spec->n_episodes == 0) || r->failed != KVS_OK)
            continue;
        kvs_status status = open_probe(s, r, &e);
        if (status == KVS_ECANCELLED)
            return kvs_error_set(err, KVS_ECANCELLED, "stopped");
        if (status == KVS_OK && r->spec->n_episodes == 0)
            status = open_watch(s, r, &e);
        if (status != KVS_OK)
            fail(r, status, &e);
    }
    KVS_TRY(step_probes(s, UINT32_MAX, b, err));
    KVS_TRY(read_watches(s, err));
    for (uint32_t i = 0; i < b->n; i++)
        b->owner[i]->n_context = kvs_session_n_tokens(b->owner[i]->probe);
    for (uint32_t c = 0; c < s->n_candidates; c++) {
        if (s->n_tail[c] == 1)
            continue;
        KVS_TRY(step_probes(s, c, b, err));
        for (uint32_t i = 0; i < b->n; i++) {
            kvs_session *probe = b->owner[i]->probe;
            if (b->owner[i]->failed == KVS_OK)
                KVS_TRY(kvs_session_truncate(probe, b->owner[i]->n_context, err));
        }
    }
    return KVS_OK;
}

/* ---- records ---- */

/* Tokens of the value where it was told. Told messages hold it once, and no other message of the turn does. */
static void find_told(recall_state *s, const kvs_dialogue_fact *fact)
{
    const kvs_script_turn *t = &s->script->turns[turn_of_answer(s->script, fact->told.message_idx + 1)];
    const size_t n_gold = strlen(fact->gold);
    size_t n_bytes = 0, cap = 1;
    for (uint32_t i = t->begin; i < t->answer; i++)
        cap += kvs_token_text(s->p->model, s->script->tokens[i], true, NULL, 0);
    char *text = calloc(cap, 1);
    s->told_begin = s->told_end = t->begin;
    for (uint32_t i = t->begin; text != NULL && i < t->answer; i++)
        n_bytes += kvs_token_text(s->p->model, s->script->tokens[i], true, text + n_bytes, cap - n_bytes);
    const char *at = text != NULL ? memmem(text, n_bytes, fact->gold, n_gold) : NULL;
    const size_t from = at != NULL ? (size_t)(at - text) : n_bytes;
    size_t begin = 0;
    for (uint32_t i = t->begin; i < t->answer && begin < from + n_gold; i++) {
        begin += kvs_token_text(s->p->model, s->script->tokens[i], true, NULL, 0);
        if (begin <= from)
            s->told_begin = i + 1;
        s->told_end = i + 1;
    }
    free(text);
}

static void survival_of(const recall_state *s, const kvs_session *session, double *survival, double *erased)
{
    const kvs_model_info *info = &s->p->model->info;
    const uint32_t n_told = s->told_end - s->told_begin, cap = s->script->n_tokens + BLOCK_TOKENS;
    *survival = *erased = NAN;
    uint32_t *held = calloc(n_told + 1, sizeof *held);
    int32_t *pos = calloc(cap, sizeof *pos);
    for (uint32_t layer = 0; held != NULL && pos != NULL && layer < info->n_layers; layer++)
        for (uint32_t head = 0; head < info->n_kv_heads; head++) {
            const uint32_t n = kvs_session_keep_set(session, layer, head, pos, NULL, cap);
            for (uint32_t i = 0; i < n && n <= cap; i++)
                if (pos[i] >= (int32_t)s->told_begin && pos[i] < (int32_t)s->told_end)
                    held[(uint32_t)pos[i] - s->told_begin]++;
        }
    if (held != NULL && pos != NULL)
        kvs_recall_survival(held, n_told, info->n_layers * info->n_kv_heads, survival, erased);
    free(held);
    free(pos);
}

static kvs_session *held_by(const recall_state *s, const recaller *r)
{
    return r == &s->recallers[0] ? s->trunk[0]
           : r->episodes != NULL ? kvs_episodes_session(r->episodes, r->episode)
                                 : r->session;
}

/* Of all that the run held; null for one that shared the reference's cache to the end. */
static json_t *peak_bytes(const recall_state *s, const recaller *r)
{
    kvs_usage u;
    kvs_episodes_usage all;
    if (r->episodes != NULL) {
        kvs_episodes_get_usage(r->episodes, &all);
        return json_integer((json_int_t)all.kv_bytes_peak);
    }
    if (r->session == NULL && r != &s->recallers[0])
        return json_null();
    kvs_session_get_usage(held_by(s, r), &u);
    return json_integer((json_int_t)u.kv_bytes_peak);
}

/* docs/metrics.md, "Diagnostics". */
static void record_diagnostics(json_t *row, const recall_state *s, const recaller *from, bool ok)
{
    kvs_keep_report kept = {.head_consensus = NAN};
    const bool watched = ok && from->watch != NULL;
    if (ok && kvs_keep_report_make(s->p->model, held_by(s, from), s->told, s->told_end - s->told_begin, &kept, NULL) !=
                  KVS_OK)
        kept.head_consensus = NAN;
    json_object_set_new(row, "head_consensus", kvs_json_real(kept.head_consensus));
    json_object_set_new(row, "utilisation", kvs_json_real(watched ? from->routing.utilisation : NAN));
    json_object_set_new(row, "drift", kvs_json_real(watched ? from->routing.drift : NAN));
    json_object_set_new(row, "key_channels_90", kvs_json_real(watched ? from->routing.key_channels_90 : NAN));
    kvs_keep_report_free(&kept);
}

static void record_score(json_t *row, const recall_state *s, const recaller *r, const kvs_dialogue_fact *fact)
{
    kvs_choice choice;
    kvs_error e = {0};
    const recaller *from = r->session == NULL && r->spec->n_episodes == 0 ? &s->recallers[0] : r;
    if (r->failed == KVS_OK && from->failed != KVS_OK)
        snprintf(e.message, sizeof e.message, "%s", from->failure);
    const bool ok = r->failed == KVS_OK && from->failed == KVS_OK &&
                    kvs_recall_choice(from->logprob, s->n_tail, s->n_candidates, 0, &choice, &e) == KVS_OK;
    double survival = NAN, erased = NAN;
    uint32_t picked = 0;
    if (ok) {
        survival_of(s, held_by(s, from), &survival, &erased);
        for (uint32_t c = 1; c < s->n_candidates; c++)
            if (from->logprob[c] / s->n_tail[c] > from->logprob[picked] / s->n_tail[picked])
                picked = c;
    }
    json_object_set_new(row, "correct", ok ? json_boolean(choice.correct) : json_null());
    json_object_set_new(row, "picked", ok ? json_string(fact->candidates[picked]) : json_null());
    json_object_set_new(row, "margin", kvs_json_real(ok ? choice.margin : NAN));
    json_object_set_new(row, "gold_logprob", kvs_json_real(ok ? choice.gold_logprob : NAN));
    json_object_set_new(row, "survival", kvs_json_real(survival));
    json_object_set_new(row, "erased", kvs_json_real(erased));
    record_diagnostics(row, s, from, ok);
    const char *failure = r->failed != KVS_OK ? r->failure : ok ? NULL : e.message;
    json_object_set_new(row, "failure", failure == NULL ? json_null() : json_string(failure));
}

static void record(recall_state *s, uint32_t question, const kvs_dialogue_fact *fact)
{
    const uint32_t answer = s->script->turns[s->turn].answer;
    for (uint32_t i = 0; i < s->p->n_runs; i++) {
        const recaller *r = &s->recallers[i];
        json_t *row = json_object();
        json_object_set_new(row, "run", json_string(r->spec->id));
        json_object_set_new(row, "dialogue", json_string(s->script->id));
        json_object_set_new(row, "question", json_integer(question));
        json_object_set_new(row, "fact", json_integer(fact->fact_idx));
        json_object_set_new(row, "place", json_string(kvs_fact_place_name(fact->place)));
        json_object_set_new(row, "updated", json_boolean(fact->updated));
        json_object_set_new(row, "told_token", json_integer(s->told_begin));
        json_object_set_new(row, "question_token", json_integer(answer));
        json_object_set_new(row, "lag_tokens", json_integer(answer - s->told_begin));
        json_object_set_new(row, "lag_messages", json_integer(fact->lag_messages));
        json_object_set_new(row, "n_candidates", json_integer(s->n_candidates));
        json_object_set_new(row, "gold", json_string(fact->gold));
        if (r->episodes != NULL)
            json_object_set_new(row, "episode", json_integer(r->episode));
        record_score(row, s, r, fact);
        json_array_append_new(s->rows, row);
    }
}

/* ---- play ---- */

static kvs_status list_told(recall_state *s, kvs_error *err)
{
    const uint32_t n = s->told_end - s->told_begin;
    s->told = calloc(n + 1, sizeof *s->told);
    for (uint32_t i = 0; s->told != NULL && i < n; i++)
        s->told[i] = (int32_t)(s->told_begin + i);
    return s->told != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for a fact of %u tokens", n);
}

static void end_question(recall_state *s)
{
    for (uint32_t i = 0; i < s->p->n_runs; i++) {
        recaller *r = &s->recallers[i];
        kvs_session_free(&r->probe);
        kvs_watch_free(&r->watch);
        kvs_routing_free(&r->routing);
    }
    free(s->told);
    s->told = NULL;
    free_candidates(s);
}

static kvs_status ask(recall_state *s, uint32_t question, kvs_error *err)
{
    const kvs_dialogue_fact *fact = s->fact = &s->script->dialogue->facts[question];
    find_told(s, fact);
    batch b;
    kvs_status status = batch_new(s, &b, err);
    if (status == KVS_OK)
        status = make_candidates(s, fact, err);
    if (status == KVS_OK)
        status = list_told(s, err);
    if (status == KVS_OK)
        status = score(s, &b, err);
    batch_free(&b);
    if (status == KVS_OK)
        record(s, question, fact);
    end_question(s);
    return status;
}

static kvs_status mark_turn(recall_state *s, kvs_status (*mark)(kvs_session *, kvs_error *), kvs_error *err)
{
    for (uint32_t i = 0; i < 2; i++)
        if (s->trunk[i] != NULL)
            KVS_TRY(mark(s->trunk[i], err));
    for (uint32_t i = 1; i < s->p->n_runs; i++)
        if (s->recallers[i].session != NULL && s->recallers[i].failed == KVS_OK)
            KVS_TRY(mark(s->recallers[i].session, err));
    return KVS_OK;
}

static kvs_status play_all(recall_state *s, kvs_error *err)
{
    const kvs_dialogue *d = s->script->dialogue;
    KVS_TRY(open_trunk(s, "baseline", &s->trunk[0], err));
    KVS_TRY(open_trunk(s, "attention_top +protect=none", &s->trunk[1], err));
    uint32_t question = 0; /* facts stand in the order they are asked about */
    for (s->turn = 0; s->turn < s->script->n_turns && question < d->n_facts; s->turn++) {
        const kvs_script_turn *t = &s->script->turns[s->turn];
        KVS_TRY(mark_turn(s, kvs_session_turn_begin, err));
        KVS_TRY(feed(s, t->begin, t->answer, err));
        if (t->message_end == d->facts[question].question_idx + 2)
            KVS_TRY(ask(s, question++, err));
        KVS_TRY(feed(s, t->answer, t->end, err));
        KVS_TRY(mark_turn(s, kvs_session_turn_end, err));
    }
    return KVS_OK;
}

static void recaller_free(recaller *r)
{
    kvs_session_free(&r->session);
    kvs_episodes_free(&r->episodes);
}

kvs_status kvs_play_recall(const kvs_play *p, const kvs_script *script, json_t **part, kvs_error *err)
{
    *part = NULL;
    recall_state s = {.p = p, .script = script, .rows = json_array()};
    s.recallers = calloc(p->n_runs, sizeof *s.recallers);
    kvs_status status = s.recallers != NULL && s.rows != NULL
                            ? KVS_OK
                            : kvs_error_set(err, KVS_ENOMEM, "no memory for %u runs", p->n_runs);
    for (uint32_t i = 0; i < p->n_runs && status == KVS_OK; i++) {
        s.recallers[i].spec = &p->runs[i];
        s.recallers[i].state = &s;
    }
    if (status == KVS_OK)
        status = play_all(&s, err);
    json_t *peaks = json_object();
    for (uint32_t i = 0; i < p->n_runs && status == KVS_OK; i++)
        json_object_set_new(peaks, p->runs[i].id, peak_bytes(&s, &s.recallers[i]));
    for (uint32_t i = 0; i < p->n_runs && s.recallers != NULL; i++)
        recaller_free(&s.recallers[i]);
    kvs_session_free(&s.trunk[0]);
    kvs_session_free(&s.trunk[1]);
    free(s.recallers);
    if (status != KVS_OK) {
        json_decref(s.rows);
        json_decref(peaks);
        return status;
    }
    *part = json_pack("{s:{s:s,s:i,s:i,s:i},s:o,s:o}", "dialogue", "id", script->id, "n_turns", (int)script->n_turns,
                      "n_tokens", (int)script->n_tokens, "n_questions", (int)script->dialogue->n_facts, "recall",
                      s.rows, "kv_bytes_peak", peaks);
    return *part != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for a record");
}

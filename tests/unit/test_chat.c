/* Turns that differ from their tokens fed by hand, end markers that go missing, answers that cannot be had again. */
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

enum { VOCAB = TINY_VOCAB_MIN, CAP = 4000 };

static kvs_model *model;

static int set_up(void **state)
{
    (void)state;
    tiny_options o;
    fx_shape(&o, GGML_TYPE_Q4_1);
    model = fx_open(&o, 2, 0);
    return model == NULL;
}

static int tear_down(void **state)
{
    (void)state;
    kvs_model_close(&model);
    return 0;
}

/* ---- helpers ---------------------------------------------------------------------------------------------------- */

static kvs_session_options defaults(void)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.budget_tokens = CAP;
    return o;
}

/* A random model ends its turn at random: a high temperature and a seed give answers of every length. */
static kvs_sampling sampling(uint64_t seed, uint32_t max_tokens)
{
    kvs_sampling p;
    kvs_sampling_default(&p);
    p.temperature = 12.0f; /* logits of a random model reach 20 */
    p.seed = seed;
    p.max_tokens = max_tokens;
    return p;
}

typedef struct heard {
    int32_t tokens[512];
    char text[4096];
    size_t n_bytes;
    uint32_t n, stop_after; /* 0: never */
} heard;

static bool hear(void *ctx, int32_t token, const char *bytes, size_t n_bytes)
{
    heard *h = ctx;
    assert_true(h->n < 512 && h->n_bytes + n_bytes < sizeof h->text);
    h->tokens[h->n++] = token;
    memcpy(h->text + h->n_bytes, bytes, n_bytes);
    h->n_bytes += n_bytes;
    return h->n != h->stop_after;
}

static void turn(kvs_session *s, const char *user, const char *system, const kvs_sampling *p, heard *h,
                 kvs_generation *g)
{
    kvs_error err = {.message = ""};
    memset(h, 0, sizeof *h);
    if (kvs_chat_turn(s, user, system, p, hear, h, g, &err) != KVS_OK)
        fail_msg("%s", err.message);
}

/* Ids and flags of everything a session holds, in order. */
static uint32_t contents(const kvs_session *s, int32_t *tokens, uint8_t *flags)
{
    const kvs_head_slots slots = {.token = tokens, .flags = flags};
    return kvs_cache_read_head(s->cache, 0, 0, &slots);
}

static void next_logits(kvs_session *s, float *logits)
{
    static const int32_t probe = TINY_FIRST_BYTE + 'q';
    kvs_error err;
    assert_int_equal(kvs_session_extend(s, &probe, NULL, 1, logits, &err), KVS_OK);
}

static const char *const questions[] = {"Hello there, who are you?", "And what is the weather like?",
                                        "<|im_end|> is not a marker when I type it", "ok"};

/* ---- turns ------------------------------------------------------------------------------------------------------ */

/* The whole conversation rendered at once, with the answers that were heard in place of the assistant's content. */
static void turn_differs_from_its_tokens(void **state)
{
    (void)state;
    const kvs_session_options o = defaults();
    kvs_session *s = fx_session(model, &o), *by_hand = fx_session(model, &o);
    kvs_error err = {.message = ""};
    kvs_message messages[16] = {{"system", "Be brief."}};
    size_t n_messages = 1, n_from = 0;
    const uint8_t answer = KVS_TOKEN_ASSISTANT;
    for (int i = 0; i < 4; i++) {
        heard h;
        kvs_generation g;
        const kvs_sampling p = sampling((uint64_t)i + 3, 40);
        turn(s, questions[i], "Be brief.", &p, &h, &g); /* system counts in the first turn only */
        kvs_rendered prompt;
        messages[n_messages++] = (kvs_message){"user", questions[i]};
        assert_int_equal(kvs_chat_render(model, messages, n_messages, n_from, true, &prompt, &err), KVS_OK);
        assert_int_equal(g.n_prompt_tokens, prompt.n_tokens);
        assert_int_equal(kvs_session_turn_begin(by_hand, &err), KVS_OK);
        assert_int_equal(
            kvs_session_extend(by_hand, prompt.tokens, prompt.flags, (uint32_t)prompt.n_tokens, NULL, &err), KVS_OK);
        for (uint32_t t = 0; t < h.n; t++)
            assert_int_equal(kvs_session_extend(by_hand, &h.tokens[t], &answer, 1, NULL, &err), KVS_OK);
        messages[n_messages++] = (kvs_message){"assistant", "x"};
        n_from = n_messages;
        /* "<|im_end|>" and a newline, as TINY_CHATML closes a message */
        const int32_t end[] = {TINY_IM_END, TINY_FIRST_BYTE + '\n'};
        const uint8_t end_flags[] = {KVS_TOKEN_TEMPLATE, KVS_TOKEN_TEMPLATE};
        assert_int_equal(kvs_session_extend(by_hand, end, end_flags, 2, NULL, &err), KVS_OK);
        assert_int_equal(kvs_session_turn_end(by_hand, &err), KVS_OK);
        kvs_rendered_free(&prompt);
        assert_int_equal(kvs_session_n_tokens(s), kvs_session_n_tokens(by_hand));
    }
    static int32_t a[CAP], b[CAP];
    static uint8_t fa[CAP], fb[CAP];
    const uint32_t n = contents(s, a, fa);
    assert_int_equal(contents(by_hand, b, fb), n);
    assert_memory_equal(a, b, n * sizeof *a);
    for (uint32_t i = 0; i < n; i++) /* a marker may also be told whose it is */
        if (fa[i] & fb[i] & KVS_TOKEN_TEMPLATE)
            assert_int_equal(fa[i] & KVS_TOKEN_SYSTEM, fb[i] & KVS_TOKEN_SYSTEM);
        else
            assert_int_equal(fa[i], fb[i]);
    float la[VOCAB], lb[VOCAB];
    next_logits(s, la);
    next_logits(by_hand, lb);
    assert_memory_equal(la, lb, sizeof la);
    kvs_session_free(&s);
    kvs_session_free(&by_hand);
}

static uint32_t count_end_markers(const kvs_session *s)
{
    static int32_t tokens[CAP];
    const uint32_t n = contents(s, tokens, NULL);
    uint32_t found = 0;
    for (uint32_t i = 0; i < n; i++)
        found += tokens[i] == TINY_IM_END;
    return found;
}

/* Each message ends with a marker; paper_compat leaves out the answer's, as the script does. */
static void end_marker_is_lost(void **state)
{
    (void)state;
    for (int compat = 0; compat < 2; compat++) {
        kvs_session_options o = defaults();
        o.paper_compat = compat == 1;
        kvs_session *s = fx_session(model, &o);
        heard h;
        kvs_generation g;
        bool by_eog = false, by_length = false;
        for (uint32_t i = 1; i <= 12; i++) {
            const kvs_sampling p = sampling(i, i % 2 ? 2 : 200);
            turn(s, questions[i % 4], "Be brief.", &p, &h, &g);
            by_eog |= strcmp(g.stop, "eog") == 0;
            by_length |= strcmp(g.stop, "length") == 0;
            assert_int_equal(count_end_markers(s), compat ? 1 + i : 1 + 2 * i); /* system, then user (and answer) */
        }
        assert_true(by_eog && by_length);
        kvs_session_free(&s);
    }
}

static void turn_longer_than_the_budget_fails(void **state)
{
    (void)state;
    static char text[3000];
    for (size_t i = 0; i + 1 < sizeof text; i++)
        text[i] = (char)('a' + i * i % 26);
    kvs_session_options o = defaults();
    o.policy = "streaming";
    o.budget_tokens = 200;
    o.chunk_tokens = 32;
    kvs_session *s = fx_session(model, &o);
    heard h;
    kvs_generation g;
    const kvs_sampling p = sampling(1, 20);
    for (int i = 0; i < 2; i++) {
        turn(s, text, NULL, &p, &h, &g);
        assert_true(g.n_prompt_tokens > 1000);
        kvs_usage u;
        kvs_session_get_usage(s, &u);
        assert_true(u.n_evictions > 10);
        assert_true(u.n_slots_max <= 200 && u.kv_bytes_peak <= u.budget_bytes);
    }
    kvs_session_free(&s);

    o.policy = "baseline"; /* says so instead, and is still good for what fits */
    s = fx_session(model, &o);
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_chat_turn(s, text, NULL, &p, NULL, NULL, NULL, &err), KVS_EBUDGET);
    assert_non_null(strstr(err.message, "200"));
    assert_int_equal(kvs_session_n_tokens(s), 200);
    assert_int_equal(kvs_session_truncate(s, 0, &err), KVS_OK);
    turn(s, "ok", NULL, &p, &h, &g);
    kvs_session_free(&s);
}

typedef struct told {
    uint32_t n;
    uint64_t token_idx;
    uint32_t n_turn_end, n_decode, n_prefill;
} told;

static void on_event(void *ctx, const kvs_event *e)
{
    told *t = ctx;
    assert_int_equal(e->index, t->n);
    assert_true(e->token_idx >= t->token_idx && e->n_after < e->n_before);
    t->token_idx = e->token_idx;
    t->n++;
    t->n_turn_end += strcmp(e->path, "turn_end") == 0;
    t->n_decode += strcmp(e->path, "decode") == 0;
    t->n_prefill += strcmp(e->path, "in_prefill") == 0;
}

static void events_are_not_told(void **state)
{
    (void)state;
    static const char *const policies[] = {"streaming", "random:keep=0.8 +schedule=turn_end",
                                           "attention_top:keep=0.8 +schedule=after_prefill",
                                           "sliding_window:keep=0.9 +schedule=every:16"};
    for (int i = 0; i < 4; i++) {
        kvs_session_options o = defaults();
        o.policy = policies[i];
        o.budget_tokens = 160;
        kvs_session *s = fx_session(model, &o);
        told t = {0};
        kvs_session_on_event(s, on_event, &t);
        heard h;
        kvs_generation g;
        for (uint32_t k = 0; k < 5; k++) {
            const kvs_sampling p = sampling(k, 60);
            turn(s, questions[k % 4], NULL, &p, &h, &g);
        }
        kvs_usage u;
        kvs_session_get_usage(s, &u);
        assert_true(t.n > 1);
        assert_int_equal(t.n, u.n_evictions);
        assert_int_equal(t.n, t.n_turn_end + t.n_decode + t.n_prefill);
        if (i == 1)
            assert_int_equal(t.n_turn_end, 5);
        kvs_session_free(&s);
    }
}

/* ---- generation ------------------------------------------------------------------------------------------------- */

static void generate(kvs_session *s, float *logits, const kvs_sampling *p, heard *h, kvs_generation *g)
{
    kvs_error err = {.message = ""};
    memset(h, 0, sizeof *h);
    if (kvs_generate(s, logits, p, hear, h, g, &err) != KVS_OK)
        fail_msg("%s", err.message);
}

static kvs_session *prefilled(const kvs_session_options *o, float *logits)
{
    static int32_t tokens[90];
    fx_tokens(21, tokens, 90);
    kvs_session *s = fx_session(model, o);
    kvs_error err;
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 90, logits, &err), KVS_OK);
    return s;
}

static void generation_cannot_be_had_again(void **state)
{
    (void)state;
    kvs_session_options o = defaults();
    o.policy = "random:keep=0.6";
    o.budget_tokens = 128; /* evicts on the way */
    float logits[VOCAB];
    heard first, again;
    kvs_generation g;
    kvs_sampling p = sampling(5, 120);
    kvs_session *s = prefilled(&o, logits);
    generate(s, logits, &p, &first, &g);
    assert_true(first.n > 8);
    float after[VOCAB];
    next_logits(s, after);
    kvs_session_free(&s);

    s = prefilled(&o, logits); /* same seed, same tokens */
    generate(s, logits, &p, &again, &g);
    assert_memory_equal(&first, &again, sizeof first);
    kvs_session_free(&s);

    p.seed++;
    s = prefilled(&o, logits); /* another seed, others */
    generate(s, logits, &p, &again, &g);
    assert_true(memcmp(first.tokens, again.tokens, sizeof first.tokens) != 0);
    kvs_session_free(&s);

    /* In two halves, the second one by another session that loaded the first: the draw depends on (seed, token_idx). */
    p.seed--;
    p.max_tokens = first.n / 2;
    s = prefilled(&o, logits);
    generate(s, logits, &p, &again, &g);
    assert_string_equal(g.stop, "length");
    kvs_session *loaded = fx_session(model, &o);
    kvs_error err = {.message = ""};
    if (fx_copy_by_save(s, loaded, &err) != KVS_OK)
        fail_msg("%s", err.message);
    kvs_session_free(&s);
    heard rest;
    p.max_tokens = 120 - first.n / 2;
    generate(loaded, logits, &p, &rest, &g);
    assert_int_equal(again.n + rest.n, first.n);
    assert_memory_equal(again.tokens, first.tokens, again.n * sizeof *first.tokens);
    assert_memory_equal(rest.tokens, first.tokens + again.n, rest.n * sizeof *first.tokens);
    float loaded_after[VOCAB];
    next_logits(loaded, loaded_after);
    assert_memory_equal(loaded_after, after, sizeof after);
    kvs_session_free(&loaded);
}

static void greedy_is_not_the_argmax(void **state)
{
    (void)state;
    const kvs_session_options o = defaults();
    float logits[VOCAB], row[VOCAB];
    kvs_sampling p;
    kvs_sampling_default(&p);
    p.max_tokens = 12;
    heard h;
    kvs_generation g;
    kvs_session *s = prefilled(&o, logits), *by_hand = prefilled(&o, row);
    generate(s, logits, &p, &h, &g);
    kvs_error err;
    for (uint32_t t = 0; t < g.n_tokens; t++) {
        int32_t best = 0;
        for (int32_t v = 1; v < VOCAB; v++)
            best = row[v] > row[best] ? v : best;
        if (t < h.n)
            assert_int_equal(h.tokens[t], best);
        assert_int_equal(kvs_session_extend(by_hand, &best, NULL, 1, row, &err), KVS_OK);
    }
    assert_int_equal(kvs_session_n_tokens(s), kvs_session_n_tokens(by_hand)); /* the last token is fed too */
    assert_memory_equal(logits, row, sizeof row);
    kvs_session_free(&s);
    kvs_session_free(&by_hand);
}

static void cancelled_answer_breaks_the_session(void **state)
{
    (void)state;
    const kvs_session_options o = defaults();
    float logits[VOCAB];
    kvs_generation g;
    const kvs_sampling p = sampling(5, 120);
    heard h = {.stop_after = 3};
    kvs_session *s = prefilled(&o, logits);
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_generate(s, logits, &p, hear, &h, &g, &err), KVS_OK);
    assert_string_equal(g.stop, "cancelled");
    assert_int_equal(g.n_tokens, 3);
    assert_int_equal(kvs_session_n_tokens(s), 93); /* what was shown was said */
    kvs_session_free(&s);

    /* In a chat the turn is closed all the same, so that the next one begins well. */
    s = fx_session(model, &o);
    h = (heard){.stop_after = 2};
    assert_int_equal(kvs_chat_turn(s, "Hello", "Be brief.", &p, hear, &h, &g, &err), KVS_OK);
    assert_string_equal(g.stop, "cancelled");
    assert_int_equal(count_end_markers(s), 3);
    turn(s, "And now?", NULL, &p, &h, &g);
    assert_int_equal(count_end_markers(s), 5);
    kvs_session_free(&s);
}

/* ---- cancelled and refused steps -------------------------------------------------------------------------------- */

static bool refuse_third(void *ctx, uint32_t row, const float *logits)
{
    (void)logits;
    (void)row;
    return ++*(uint32_t *)ctx < 3;
}

static void cancelled_step_breaks_the_session(void **state)
{
    (void)state;
    kvs_session_options o = defaults();
    o.chunk_tokens = 16;
    kvs_session *s = fx_session(model, &o), *plain = fx_session(model, &o);
    static int32_t tokens[64];
    fx_tokens(31, tokens, 64);
    uint8_t want[64];
    memset(want, 1, sizeof want);
    uint32_t n_seen = 0;
    kvs_run run = {
        .session = s, .tokens = tokens, .n_tokens = 64, .on_logits = refuse_third, .want = want, .ctx = &n_seen};
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_step(&run, 1, &err), KVS_ECANCELLED);
    assert_int_equal(run.status, KVS_ECANCELLED);
    assert_int_equal(n_seen, 3);
    const uint64_t said = kvs_session_n_tokens(s);
    assert_true(said >= 3 && said < 64);
    float a[VOCAB], b[VOCAB];
    assert_int_equal(kvs_session_extend(s, tokens + said, NULL, (uint32_t)(64 - said), a, &err), KVS_OK);
    assert_int_equal(kvs_session_extend(plain, tokens, NULL, 64, b, &err), KVS_OK);
    assert_memory_equal(a, b, sizeof a);
    kvs_session_free(&s);
    kvs_session_free(&plain);
}

/* One run of a batch that cannot go on must not stop the others. */
static void refused_run_stops_its_neighbours(void **state)
{
    (void)state;
    kvs_session_options o = defaults();
    kvs_session *good = fx_session(model, &o), *plain = fx_session(model, &o);
    o.budget_tokens = 40;
    kvs_session *full = fx_session(model, &o);
    static int32_t tokens[300];
    fx_tokens(33, tokens, 300);
    uint32_t n_seen = 0;
    kvs_run runs[] = {{.session = full, .tokens = tokens, .n_tokens = 60},
                      {.session = good, .tokens = tokens, .n_tokens = 300, .on_logits = refuse_third, .ctx = &n_seen}};
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_step(runs, 2, &err), KVS_EBUDGET);
    assert_int_equal(runs[0].status, KVS_EBUDGET);
    assert_int_equal(runs[1].status, KVS_OK);
    assert_non_null(strstr(err.message, "40"));
    assert_int_equal(n_seen, 1);
    assert_int_equal(kvs_session_n_tokens(full), 40);
    assert_int_equal(kvs_session_n_tokens(good), 300);
    float a[VOCAB], b[VOCAB];
    assert_int_equal(kvs_session_extend(plain, tokens, NULL, 300, NULL, &err), KVS_OK);
    next_logits(good, a);
    next_logits(plain, b);
    assert_memory_equal(a, b, sizeof a);

    const int32_t foreign = VOCAB;
    assert_int_equal(kvs_session_extend(good, &foreign, NULL, 1, NULL, &err), KVS_EINVAL);
    assert_int_equal(kvs_session_n_tokens(good), 301);
    kvs_session_free(&good);
    kvs_session_free(&plain);
    kvs_session_free(&full);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(turn_differs_from_its_tokens),        cmocka_unit_test(end_marker_is_lost),
        cmocka_unit_test(turn_longer_than_the_budget_fails),   cmocka_unit_test(events_are_not_told),
        cmocka_unit_test(generation_cannot_be_had_again),      cmocka_unit_test(greedy_is_not_the_argmax),
        cmocka_unit_test(cancelled_answer_breaks_the_session), cmocka_unit_test(cancelled_step_breaks_the_session),
        cmocka_unit_test(refused_run_stops_its_neighbours),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

/* Episodes that are not what EpiCache says (arXiv:2509.17396): scores that are not those of the patched prompt, a budget
 * that is passed, questions that go to the wrong episode, saves that do not go on, inputs that are let through. */
#include "session/episodes.h"
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

enum { VOCAB = TINY_VOCAB_MIN, N_TURNS = 8, CAP = 4096, HEADS = 6 /* 2 layers of 3 */ };

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

/* ---- a history of two topics, which share no letter ---- */

static const char *const topic_words[2] = {"zxqvvqxz qzvx xzqq zvqx", "aeiooiea eaoi iaoe oeai"};

typedef struct history {
    char text[2 * N_TURNS][160];
    kvs_message messages[2 * N_TURNS];
} history;

/* Two turns a window of four utterances; turns 0, 1, 4, 5 are of topic 0. */
static void write_history(history *h)
{
    for (uint32_t i = 0; i < 2 * N_TURNS; i++) {
        const char *const words = topic_words[i / 4 % 2];
        snprintf(h->text[i], sizeof h->text[i], "%s %s %c%c", words, words, words[i % 4], words[i / 4]);
        h->messages[i] = (kvs_message){i % 2 == 0 ? "user" : "assistant", h->text[i]};
    }
}

static kvs_episodes_options options(uint32_t n_episodes, uint32_t budget_tokens)
{
    kvs_episodes_options o;
    kvs_episodes_options_default(&o);
    o.n_episodes = n_episodes;
    o.n_medoids = 1;
    o.budget_tokens = budget_tokens;
    o.block_tokens = 128;
    return o;
}

static kvs_episodes *make_on(kvs_model *m, const kvs_episodes_options *o)
{
    history h;
    write_history(&h);
    kvs_episodes *e;
    kvs_error err = {.message = ""};
    if (kvs_episodes_create(m, o, h.messages, 2 * N_TURNS, &e, &err) != KVS_OK)
        fail_msg("%s", err.message);
    return e;
}

static kvs_episodes *make(const kvs_episodes_options *o)
{
    return make_on(model, o);
}

/* Every head's positions, one list behind the other. */
static uint32_t keep_sets(const kvs_session *s, int32_t *out)
{
    uint32_t n = 0;
    for (uint32_t h = 0; h < HEADS; h++) {
        const uint32_t count = kvs_session_keep_set(s, h / 3, h % 3, out + n + 1, NULL, CAP);
        out[n] = (int32_t)count;
        n += count + 1;
    }
    return n;
}

static void assert_same_sets(const kvs_session *a, const kvs_session *b)
{
    static int32_t x[HEADS * (CAP + 1)], y[HEADS * (CAP + 1)];
    const uint32_t n = keep_sets(a, x);
    assert_int_equal(n, keep_sets(b, y));
    assert_memory_equal(x, y, n * sizeof *x);
}

typedef struct heard {
    int32_t tokens[256];
    uint32_t n, stop_after;
} heard;

static bool hear(void *ctx, int32_t token, const char *bytes, size_t n_bytes)
{
    (void)bytes;
    (void)n_bytes;
    heard *h = ctx;
    assert_true(h->n < 256);
    h->tokens[h->n++] = token;
    return h->n != h->stop_after;
}

static uint32_t ask(kvs_episodes *e, const char *question, uint32_t max_tokens, heard *h)
{
    kvs_sampling p;
    kvs_sampling_default(&p);
    p.max_tokens = max_tokens;
    p.temperature = 12.0f; /* logits of a random model reach 20 */
    kvs_error err = {.message = ""};
    uint32_t which = UINT32_MAX;
    if (kvs_episodes_turn(e, question, &p, hear, h, NULL, &which, &err) != KVS_OK)
        fail_msg("%s", err.message);
    return which;
}

static void assert_same_answer(const heard *a, const heard *b)
{
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->tokens, b->tokens, a->n * sizeof *a->tokens);
}

/* ---- scores ---- */

static const int32_t words[] = {TINY_FIRST_BYTE + 'z', TINY_FIRST_BYTE + 'a', TINY_FIRST_BYTE + 'q'};

/* The same rows said for good, under a policy whose window shows their attention: a softmax over all slots, which over
 * the held ones alone is the same divided by what these get. */
static void assert_scores(const kvs_session *probed, kvs_session *said, uint32_t n_held, uint32_t n_rows)
{
    for (uint32_t h = 0; h < HEADS; h++) {
        const kvs_policy_view v = kvs_view_head(said, h / 3, h % 3, &said->scratch.threads[0]);
        assert_int_equal(v.n_window, n_rows);
        for (uint32_t g = 0; g < v.group; g++) {
            const float *got = probed->probe.most + (h / 3 * 6 + h % 3 * 2 + g) * (size_t)probed->scratch.n_slots;
            for (uint32_t i = 0; i < n_held; i++) {
                double most = 0;
                for (uint32_t r = 0; r < n_rows; r++) {
                    const float *const prob = v.window_prob + ((size_t)r * v.group + g) * v.n_slots;
                    double held = 0;
                    for (uint32_t k = 0; k < n_held; k++)
                        held += (double)prob[k];
                    most = (double)prob[i] / held > most ? (double)prob[i] / held : most;
                }
                /* Scores of up to 40 are differences of f32 before they are exponents: 40 * 2^-23 and as much again. */
                assert_true(fabs((double)got[i] - most) <= 2e-5 * most + 1e-12);
            }
        }
    }
}

static void score_differs_from_attention_over_the_held_keys(void **state)
{
    (void)state;
    enum { N_HELD = 150 };
    int32_t tokens[N_HELD];
    fx_tokens(5, tokens, N_HELD);
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.kv_type = KVS_KV_F32;
    o.arith = KVS_ARITH_F32;
    o.budget_tokens = 1200;
    o.policy = "epicache +probe=extract:text=8";
    kvs_session *s = fx_session(model, &o);
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_session_extend(s, tokens, NULL, N_HELD, NULL, &err), KVS_OK);
    kvs_probe_set_words(s, words, 3);
    kvs_forward *f;
    assert_int_equal(kvs_session_forward(s, &f, &err), KVS_OK);
    assert_int_equal(kvs_probe_before(s, f, &err), KVS_OK);
    assert_int_equal(kvs_cache_live_max(s->cache), N_HELD); /* and the rows are gone */
    uint32_t n_rows = s->probe.n_text[0] + s->probe.n_text[2];
    int32_t rows[600];
    memcpy(rows, s->probe.text[0], s->probe.n_text[0] * sizeof *rows);
    memcpy(rows + s->probe.n_text[0], s->probe.text[2], s->probe.n_text[2] * sizeof *rows);
    memcpy(rows + n_rows, words, sizeof words);
    n_rows += 3;
    char spec[64];
    snprintf(spec, sizeof spec, "snapkv:window=%u", n_rows);
    o.policy = spec;
    kvs_session *said = fx_session(model, &o);
    assert_int_equal(kvs_session_extend(said, tokens, NULL, N_HELD, NULL, &err), KVS_OK);
    assert_int_equal(kvs_session_extend(said, rows, NULL, n_rows, NULL, &err), KVS_OK);
    assert_scores(s, said, N_HELD, n_rows);
    kvs_session_free(&said);
    kvs_session_free(&s);
}

/* ---- budgets ---- */

/* Room for everything, one episode: nothing may differ from a session without a policy. */
static void budget_that_holds_all_changes_a_bit(void **state)
{
    (void)state;
    history h;
    write_history(&h);
    kvs_episodes_options o = options(1, CAP);
    float sensitivity[2] = {1, 0};
    o.sensitivity = sensitivity;
    kvs_episodes *e = make(&o);
    kvs_session_options plain;
    kvs_session_options_default(&plain);
    plain.budget_tokens = CAP;
    kvs_session *s = fx_session(model, &plain);
    kvs_rendered r;
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_chat_render(model, h.messages, 2 * N_TURNS, 0, false, &r, &err), KVS_OK);
    assert_int_equal(kvs_session_extend(s, r.tokens, r.flags, (uint32_t)r.n_tokens, NULL, &err), KVS_OK);
    float got[VOCAB], want[VOCAB];
    for (uint32_t i = 0; i < 20; i++) {
        const int32_t token = TINY_FIRST_BYTE + 'b' + (int32_t)i;
        assert_int_equal(kvs_session_extend(s, &token, NULL, 1, want, &err), KVS_OK);
        assert_int_equal(kvs_session_extend(kvs_episodes_session(e, 0), &token, NULL, 1, got, &err), KVS_OK);
        assert_memory_equal(got, want, sizeof want);
    }
    kvs_rendered_free(&r);
    kvs_session_free(&s);
    kvs_episodes_free(&e);
}

static void layer_counts(kvs_episodes *e, uint32_t layer, uint32_t *sum, uint32_t *least, uint32_t *most)
{
    *sum = *most = 0;
    *least = UINT32_MAX;
    for (uint32_t h = 0; h < 3; h++) {
        const uint32_t n = kvs_session_keep_set(kvs_episodes_session(e, 0), layer, h, NULL, NULL, 0);
        *sum += n;
        *least = kvs_min_u32(*least, n);
        *most = kvs_max_u32(*most, n);
    }
}

static void layers_get_other_shares_than_sensitivity_says(void **state)
{
    (void)state;
    const float sensitivity[2] = {0.3f, 0.9f};
    for (int uniform = 0; uniform < 2; uniform++) {
        kvs_episodes_options o = options(2, 2400);
        o.block_tokens = 1200; /* one block: later, a head that holds less than its share leaves some of the layer's */
        o.uniform_heads = uniform != 0;
        kvs_episodes *even = make(&o);
        o.sensitivity = sensitivity;
        o.alpha = 0;
        kvs_episodes *alpha0 = make(&o);
        for (uint32_t i = 0; i < 2; i++)
            assert_same_sets(kvs_episodes_session(even, i), kvs_episodes_session(alpha0, i));
        o.alpha = 1.1;
        kvs_episodes *shared = make(&o);
        kvs_episodes_usage u;
        uint32_t sum[2], least, most;
        /* Layer 1 is the least needy: weight 0, raised to a quarter; layer 0 pays for it. */
        kvs_episodes_get_usage(shared, &u);
        layer_counts(shared, 0, &sum[0], &least, &most);
        assert_true(!uniform || least == most);
        layer_counts(shared, 1, &sum[1], &least, &most);
        assert_true(!uniform || least == most);
        assert_int_equal(sum[0], 3 * (u.share_tokens * 7 / 4));
        assert_int_equal(sum[1], 3 * (u.share_tokens / 4));
        kvs_episodes_get_usage(even, &u);
        for (uint32_t l = 0; l < 2; l++) {
            layer_counts(even, l, &sum[l], &least, &most);
            assert_int_equal(sum[l], 3 * u.share_tokens);
            assert_true(uniform ? least == most : least < most);
        }
        kvs_episodes_free(&even);
        kvs_episodes_free(&alpha0);
        kvs_episodes_free(&shared);
    }
}

static void caches_pass_the_budget(void **state)
{
    (void)state;
    const float sensitivity[2] = {0.3f, 0.9f};
    for (uint32_t k = 1; k <= 4; k += 3)
        for (int variant = 0; variant < 4; variant++) {
            const uint32_t budget_tokens = 800 + 300 * k;
            kvs_episodes_options o = options(k, budget_tokens);
            o.uniform_heads = (variant & 1) != 0;
            o.sensitivity = variant & 2 ? sensitivity : NULL;
            o.keep_turns = true;
            kvs_episodes *e = make(&o);
            kvs_episodes_usage u;
            for (int turn = 0; turn < 6; turn++) { /* until kept turns are evicted */
                heard h = {.n = 0};
                ask(e, topic_words[turn % 2], 60, &h);
            }
            kvs_episodes_get_usage(e, &u);
            const kvs_cache_config c = {.n_layers = 2, .n_kv_heads = 3, .head_dim = 32};
            assert_int_equal(u.budget_bytes, kvs_cache_bytes_for_tokens(&c, budget_tokens));
            assert_true(u.reserved_bytes <= u.budget_bytes);
            assert_true(u.kv_bytes_peak <= u.reserved_bytes);
            assert_true(u.kv_bytes <= u.kv_bytes_peak);
            assert_int_equal(u.n_resident, k);
            uint64_t sum = 0;
            for (uint32_t i = 0; i < k; i++) {
                kvs_usage one;
                kvs_session_get_usage(kvs_episodes_session(e, i), &one);
                sum += one.kv_bytes;
                assert_true(one.n_evictions > 0);
            }
            assert_int_equal(sum, u.kv_bytes);
            /* What is planned is used: the share of every episode but the last page, and a block at least. */
            assert_true(u.kv_bytes_peak > u.reserved_bytes / 2);
            kvs_episodes_free(&e);
        }
}

/* ---- order ---- */

typedef struct first_event {
    kvs_session *s;
    int32_t sets[HEADS * (CAP + 1)];
    uint32_t n, n_events;
} first_event;

static void on_event(void *ctx, const kvs_event *event)
{
    first_event *x = ctx;
    (void)event;
    if (x->n_events++ == 1) /* the second: it scores what the first has left */
        x->n = keep_sets(x->s, x->sets);
}

static void early_block_depends_on_a_later_one(void **state)
{
    (void)state;
    static int32_t tokens[1500];
    static first_event events[2];
    fx_tokens(11, tokens, 1500);
    for (int i = 0; i < 2; i++) {
        first_event *x = &events[i];
        *x = (first_event){0};
        kvs_session_options o;
        kvs_session_options_default(&o);
        o.policy = "epicache +probe=extract:text=8";
        o.budget_tokens = 700;
        x->s = fx_session(model, &o);
        kvs_probe_set_words(x->s, words, 3);
        kvs_session_on_event(x->s, on_event, x);
        if (i == 1)
            fx_tokens(12, tokens + 900, 600);
        kvs_error err = {.message = ""};
        assert_int_equal(kvs_session_extend(x->s, tokens, NULL, 1500, NULL, &err), KVS_OK);
        assert_true(x->n_events > 3 && x->n > HEADS);
        kvs_session_free(&x->s);
    }
    assert_int_equal(events[0].n, events[1].n);
    assert_memory_equal(events[0].sets, events[1].sets, events[0].n * sizeof(int32_t));
}

static void thread_count_shows(void **state)
{
    (void)state;
    tiny_options shape;
    fx_shape(&shape, GGML_TYPE_Q4_1);
    kvs_episodes_options o = options(2, 1500);
    kvs_episodes *two = make(&o);
    heard want = {.n = 0};
    const uint32_t which = ask(two, topic_words[1], 40, &want);
    for (uint32_t n_threads = 1; n_threads <= 3; n_threads += 2) {
        kvs_model *m = fx_open(&shape, n_threads, 0);
        assert_non_null(m);
        kvs_episodes *e = make_on(m, &o);
        heard got = {.n = 0};
        assert_int_equal(ask(e, topic_words[1], 40, &got), which);
        assert_same_answer(&got, &want);
        for (uint32_t i = 0; i < 2; i++)
            assert_same_sets(kvs_episodes_session(e, i), kvs_episodes_session(two, i));
        kvs_episodes_free(&e);
        kvs_model_close(&m);
    }
    kvs_episodes_free(&two);
}

/* ---- windows and groups ---- */

static void windows_are_not_cut_as_the_paper_does(void **state)
{
    (void)state;
    char answer[700], want[1200];
    memset(answer, 'x', sizeof answer);
    memcpy(answer, "First one here. No. Is 3.14 in it?! ", 36);
    memcpy(answer + 600, ". The end of it", 16);
    const kvs_message messages[] = {{"system", "Be brief."},
                                    {"user", "Hello."},
                                    {"assistant", "Short. And good."},
                                    {"user", ""},
                                    {"assistant", answer}};
    kvs_windows w;
    kvs_error err = {.message = ""};
    const kvs_allocator *const a = kvs_allocator_default();
    assert_int_equal(kvs_windows_make(messages, 5, 3, a, &w, &err), KVS_OK);
    assert_int_equal(w.n, 3);
    snprintf(want, sizeof want, "User said, \"Hello.\"\nAssistant said, \"Short. And good.\"\nUser said, \"\"\n");
    assert_int_equal(w.begin[1], strlen(want));
    assert_memory_equal(w.text, want, strlen(want));
    /* "No" is too short to be an utterance, a point in a number ends nothing. */
    snprintf(want, sizeof want,
             "Assistant said, \"First one here\"\nAssistant said, \"Is 3.14 in it\"\nAssistant said, \"%.564s\"\n",
             answer + 36);
    assert_int_equal(w.begin[2] - w.begin[1], strlen(want));
    assert_memory_equal(w.text + w.begin[1], want, strlen(want));
    assert_string_equal(w.text + w.begin[2], "Assistant said, \"The end of it\"\n");
    kvs_windows_free(&w, a);
    assert_int_equal(kvs_windows_make(messages, 5, 2, a, &w, &err), KVS_OK);
    assert_int_equal(w.n, 4);
    kvs_windows_free(&w, a);
    assert_int_equal(kvs_windows_make(messages, 1, 2, a, &w, &err), KVS_EINVAL);
}

/* Against every way to divide nine points in three: k-means must find the best, and number it by first appearance. */
static void grouping_is_not_the_best_one(void **state)
{
    (void)state;
    const float x[9][2] = {{1, 0},     {0, 1},    {-1, 0.1f}, {0.9f, 0.1f}, {0.2f, 0.9f},
                           {-0.9f, 0}, {1, 0.2f}, {-1.1f, 0}, {0.1f, 1.2f}};
    const uint32_t want[9] = {0, 1, 2, 0, 1, 2, 0, 2, 1};
    uint32_t label[9], nearest[3], n_members;
    float centroid[3][2];
    kvs_error err = {.message = ""};
    const kvs_allocator *const a = kvs_allocator_default();
    assert_int_equal(kvs_cluster(&x[0][0], 9, 2, 3, a, label, &centroid[0][0], &err), KVS_OK);
    assert_memory_equal(label, want, sizeof want);
    assert_float_equal(centroid[0][0], (1 + 0.9 + 1) / 3, 1e-6);
    assert_float_equal(centroid[1][1], (1 + 0.9 + 1.2) / 3, 1e-6);
    assert_int_equal(kvs_cluster_nearest(&x[0][0], 9, 2, label, 0, centroid[0], 2, nearest, &n_members), 2);
    assert_int_equal(n_members, 3);
    const float same[4][2] = {{1, 0}, {1, 0}, {0, 1}, {1, 0}};
    assert_int_equal(kvs_cluster(&same[0][0], 4, 2, 3, a, label, &centroid[0][0], &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "2 different groups"));
}

static void question_goes_to_the_other_topic(void **state)
{
    (void)state;
    const kvs_episodes_options o = options(2, 1500);
    kvs_episodes *e = make(&o);
    kvs_error err = {.message = ""};
    for (uint32_t topic = 0; topic < 2; topic++) {
        uint32_t which = UINT32_MAX;
        float similarity[2];
        assert_int_equal(kvs_episodes_route(e, topic_words[topic], &which, similarity, &err), KVS_OK);
        assert_int_equal(which, topic); /* episodes are numbered as they begin */
        assert_true(similarity[topic] > similarity[1 - topic]);
        kvs_episode_info info;
        assert_true(kvs_episodes_get_info(e, which, &info));
        assert_int_equal(info.n_windows, 2);
        assert_int_equal(info.n_medoids, 1);
        char text[1000] = "";
        size_t n = 0;
        for (uint32_t i = 0; i < info.n_words; i++)
            n += kvs_token_text(model, info.words[i], false, text + n, sizeof text - 1 - n);
        assert_non_null(strstr(text, topic_words[topic]));
        assert_null(strstr(text, topic_words[1 - topic]));
    }
    assert_int_equal(kvs_episodes_route(e, "", &(uint32_t){0}, NULL, &err), KVS_EINVAL);
    kvs_episodes_free(&e);
}

/* Says which topic a text is of; the direction is the model's only by name. */
static kvs_status encode_topic(void *ctx, const char *text, size_t n_bytes, float *out, kvs_error *err)
{
    (void)err;
    ++*(uint32_t *)ctx;
    out[0] = out[1] = 0.01f;
    out[memchr(text, 'z', n_bytes) != NULL ? 0 : 1] = 5;
    return KVS_OK;
}

static void own_encoder_is_not_asked(void **state)
{
    (void)state;
    uint32_t n_asked = 0, which;
    kvs_episodes_options o = options(2, 1500);
    o.encode = encode_topic;
    o.encode_ctx = &n_asked;
    o.encode_dim = 2;
    o.encoder_name = "topic";
    kvs_episodes *e = make(&o), *loaded = NULL;
    kvs_error err = {.message = ""};
    assert_int_equal(n_asked, 4);
    assert_int_equal(kvs_episodes_route(e, "a z b", &which, NULL, &err), KVS_OK);
    assert_int_equal(which, 0);
    assert_int_equal(n_asked, 5);
    size_t n;
    assert_int_equal(kvs_episodes_save(e, NULL, 0, &n, &err), KVS_OK);
    void *buf = malloc(n);
    assert_int_equal(kvs_episodes_save(e, buf, n, &n, &err), KVS_OK);
    assert_int_equal(kvs_episodes_load(model, NULL, buf, n, &loaded, &err), KVS_EFORMAT);
    assert_non_null(strstr(err.message, "topic"));
    assert_null(loaded);
    assert_int_equal(kvs_episodes_load(model, &o, buf, n, &loaded, &err), KVS_OK);
    kvs_episodes_free(&loaded);
    free(buf);
    kvs_episodes_free(&e);
}

/* ---- turns ---- */

static void dropped_turn_leaves_a_trace(void **state)
{
    (void)state;
    const kvs_episodes_options o = options(2, 1500);
    kvs_episodes *fresh = make(&o), *used = make(&o);
    heard want[2] = {{.n = 0}, {.n = 0}}, got = {.stop_after = 3};
    for (uint32_t t = 0; t < 2; t++)
        assert_int_equal(ask(fresh, topic_words[t], 40, &want[t]), t);
    ask(used, topic_words[1], 40, &got); /* stopped by the listener */
    assert_int_equal(got.n, 3);
    for (uint32_t t = 2; t-- > 0;) {
        got = (heard){.n = 0};
        ask(used, topic_words[t], 40, &got);
        assert_same_answer(&got, &want[t]);
    }
    for (uint32_t i = 0; i < 2; i++)
        assert_same_sets(kvs_episodes_session(used, i), kvs_episodes_session(fresh, i));
    kvs_episodes_free(&fresh);
    kvs_episodes_free(&used);
}

static void question_too_long_changes_something(void **state)
{
    (void)state;
    const kvs_episodes_options o = options(2, 1500);
    kvs_episodes *e = make(&o), *fresh = make(&o);
    static char question[4000];
    memset(question, 'z', sizeof question - 1);
    kvs_error err = {.message = ""};
    uint32_t which = 7;
    assert_int_equal(kvs_episodes_turn(e, question, NULL, NULL, NULL, NULL, &which, &err), KVS_EBUDGET);
    assert_non_null(strstr(err.message, "question"));
    assert_int_equal(which, 7);
    heard got = {.n = 0}, want = {.n = 0};
    ask(e, topic_words[0], 250, &got); /* an answer that long is cut, and nothing evicted for it */
    ask(fresh, topic_words[0], 250, &want);
    assert_same_answer(&got, &want);
    for (uint32_t i = 0; i < 2; i++)
        assert_same_sets(kvs_episodes_session(e, i), kvs_episodes_session(fresh, i));
    kvs_episodes_free(&e);
    kvs_episodes_free(&fresh);
}

static void save_goes_on_otherwise(void **state)
{
    (void)state;
    const float sensitivity[2] = {0.3f, 0.9f};
    for (int variant = 0; variant < 2; variant++) {
        kvs_episodes_options o = options(2, 1500);
        o.keep_turns = variant == 0;
        o.sensitivity = variant == 0 ? sensitivity : NULL;
        kvs_episodes *e = make(&o), *loaded = NULL;
        heard h = {.n = 0};
        ask(e, topic_words[0], 40, &h);
        size_t n, same;
        kvs_error err = {.message = ""};
        assert_int_equal(kvs_episodes_save(e, NULL, 0, &n, &err), KVS_OK);
        void *buf = malloc(n), *again = malloc(n);
        assert_int_equal(kvs_episodes_save(e, buf, n, &same, &err), KVS_OK);
        assert_int_equal(n, same);
        assert_int_equal(kvs_episodes_save(e, again, n - 1, &same, &err), KVS_EINVAL);
        if (kvs_episodes_load(model, NULL, buf, n, &loaded, &err) != KVS_OK)
            fail_msg("%s", err.message);
        assert_int_equal(kvs_episodes_save(loaded, again, n, &same, &err), KVS_OK);
        assert_memory_equal(buf, again, n);
        for (int turn = 0; turn < 6; turn++) { /* evictions with their words among them */
            heard got = {.n = 0}, want = {.n = 0};
            assert_int_equal(ask(loaded, topic_words[turn / 2 % 2], 60, &got),
                             ask(e, topic_words[turn / 2 % 2], 60, &want));
            assert_same_answer(&got, &want);
        }
        kvs_episodes_usage a, b;
        kvs_episodes_get_usage(e, &a);
        kvs_episodes_get_usage(loaded, &b);
        assert_int_equal(a.kv_bytes, b.kv_bytes);
        assert_int_equal(a.share_tokens, b.share_tokens);
        assert_int_equal(b.keep_turns, o.keep_turns);
        assert_true(b.kv_bytes_peak <= b.reserved_bytes);
        for (uint32_t i = 0; i < 2; i++)
            assert_same_sets(kvs_episodes_session(e, i), kvs_episodes_session(loaded, i));
        free(buf);
        free(again);
        kvs_episodes_free(&e);
        kvs_episodes_free(&loaded);
    }
}

/* ---- what is refused ---- */

static void wrong_option_is_let_through(void **state)
{
    (void)state;
    history h;
    write_history(&h);
    const float nan_at_1[2] = {0, NAN};
    kvs_episodes_options good = options(2, 1500);
    struct {
        kvs_episodes_options o;
        kvs_status status;
        const char *says;
    } cases[10];
    for (size_t i = 0; i < 10; i++)
        cases[i].o = good;
    size_t n = 0;
    cases[n].o.n_episodes = 0, cases[n].status = KVS_EINVAL, cases[n++].says = "0 episodes";
    cases[n].o.n_episodes = 65, cases[n].status = KVS_EINVAL, cases[n++].says = "65 episodes";
    cases[n].o.n_episodes = 5, cases[n].status = KVS_EINVAL, cases[n++].says = "at most 4";
    cases[n].o.budget_tokens = 300, cases[n].status = KVS_EBUDGET, cases[n++].says = "at least";
    cases[n].o.budget_bytes = 1 << 20, cases[n].status = KVS_EINVAL, cases[n++].says = "give one";
    cases[n].o.alpha = -1, cases[n].status = KVS_EINVAL, cases[n++].says = "alpha -1";
    cases[n].o.sensitivity = nan_at_1, cases[n].status = KVS_EINVAL, cases[n++].says = "layer 1";
    cases[n].o.window_utterances = 0, cases[n].status = KVS_EINVAL, cases[n++].says = "at least 1";
    cases[n].o.protect = "sinks:4,everything", cases[n].status = KVS_EINVAL, cases[n++].says = "everything";
    cases[n].o.encode = encode_topic, cases[n].status = KVS_EINVAL, cases[n++].says = "encode_dim";
    for (size_t i = 0; i < n; i++) {
        kvs_episodes *e = (void *)&h;
        kvs_error err = {.message = ""};
        assert_int_equal(kvs_episodes_create(model, &cases[i].o, h.messages, 2 * N_TURNS, &e, &err), cases[i].status);
        assert_null(e);
        if (strstr(err.message, cases[i].says) == NULL || strchr(err.message, '\n') != NULL)
            fail_msg("case %zu says: %s", i, err.message);
    }
    kvs_episodes *e;
    kvs_error err;
    assert_int_equal(kvs_episodes_create(model, &good, h.messages, 2 * N_TURNS - 1, &e, &err), KVS_EINVAL);
    assert_int_equal(kvs_episodes_create(model, &good, h.messages, 0, &e, &err), KVS_EINVAL);
}

/* The least budget that a refusal names is one. */
static void named_budget_does_not_do(void **state)
{
    (void)state;
    history h;
    write_history(&h);
    kvs_episodes_options o = options(3, 300);
    kvs_episodes *e;
    kvs_error err;
    assert_int_equal(kvs_episodes_create(model, &o, h.messages, 2 * N_TURNS, &e, &err), KVS_EBUDGET);
    const char *const at = strstr(err.message, "at least ");
    assert_non_null(at);
    o.budget_tokens = 0;
    o.budget_bytes = strtoull(at + 9, NULL, 10);
    assert_int_equal(kvs_episodes_create(model, &o, h.messages, 2 * N_TURNS, &e, &err), KVS_OK);
    kvs_episodes_usage u;
    kvs_episodes_get_usage(e, &u);
    assert_true(u.kv_bytes_peak <= u.budget_bytes);
    kvs_episodes_free(&e);
    o.budget_bytes--;
    assert_int_equal(kvs_episodes_create(model, &o, h.messages, 2 * N_TURNS, &e, &err), KVS_EBUDGET);
}

static void damaged_save_is_let_through(void **state)
{
    (void)state;
    const kvs_episodes_options o = options(2, 1500);
    kvs_episodes *e = make(&o), *loaded;
    size_t n;
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_episodes_save(e, NULL, 0, &n, &err), KVS_OK);
    uint8_t *const buf = malloc(n);
    assert_int_equal(kvs_episodes_save(e, buf, n, &n, &err), KVS_OK);
    for (size_t cut = 0; cut < n; cut += cut < 900 ? 97 : n / 7) {
        assert_int_equal(kvs_episodes_load(model, NULL, buf, cut, &loaded, &err), KVS_EFORMAT);
        assert_null(loaded);
    }
    for (size_t at = 0; at < 22 * 8; at += 8) { /* every number of the plan but those that only report */
        if (at / 8 == 5 || at / 8 == 6 || at / 8 == 13 || at / 8 == 14 || at / 8 == 16 || at / 8 == 20)
            continue; /* window, medoids, windows, chunk, seed, kept turns: any value goes */
        buf[at] ^= 0x41;
        buf[at + 5] ^= 1;
        assert_int_equal(kvs_episodes_load(model, NULL, buf, n, &loaded, &err), KVS_EFORMAT);
        assert_null(loaded);
        assert_null(strchr(err.message, '\n'));
        buf[at] ^= 0x41;
        buf[at + 5] ^= 1;
    }
    assert_int_equal(kvs_episodes_load(model, NULL, buf, n, &loaded, &err), KVS_OK);
    kvs_episodes_free(&loaded);
    tiny_options shape;
    fx_shape(&shape, GGML_TYPE_F32);
    kvs_model *other = fx_open(&shape, 2, 0);
    assert_int_equal(kvs_episodes_load(other, NULL, buf, n, &loaded, &err), KVS_EFORMAT);
    assert_non_null(strstr(err.message, "another model"));
    assert_null(loaded);
    kvs_model_close(&other);
    heard h = {.n = 0};
    ask(e, topic_words[0], 10, &h); /* and the one that was saved goes on */
    free(buf);
    kvs_episodes_free(&e);
}

/* ---- stopping ---- */

typedef struct progress {
    uint64_t last, total;
    uint32_t n, stop_at;
} progress;

static bool on_progress(void *ctx, uint32_t episode, uint64_t n_done, uint64_t n_total)
{
    progress *p = ctx;
    assert_true(episode < 2 && n_done > p->last && n_done <= n_total);
    p->last = n_done;
    p->total = n_total;
    return ++p->n != p->stop_at;
}

static void *counted_alloc(void *ctx, size_t size_bytes)
{
    void *const p = aligned_alloc(64, kvs_round_up(size_bytes, 64));
    *(int *)ctx += p != NULL;
    return p;
}

static void counted_free(void *ctx, void *p)
{
    *(int *)ctx -= p != NULL;
    free(p);
}

static void stopped_build_leaves_something(void **state)
{
    (void)state;
    history h;
    write_history(&h);
    int n_held = 0;
    const kvs_allocator a = {counted_alloc, counted_free, &n_held};
    progress p = {.n = 0};
    kvs_episodes_options o = options(2, 1500);
    o.on_progress = on_progress;
    o.ctx = &p;
    o.allocator = &a;
    kvs_episodes *e;
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_episodes_create(model, &o, h.messages, 2 * N_TURNS, &e, &err), KVS_OK);
    assert_int_equal(p.last, p.total);
    assert_true(n_held > 0);
    kvs_episodes_free(&e);
    assert_int_equal(n_held, 0);
    const uint32_t n_calls = p.n;
    for (uint32_t stop = 1; stop <= n_calls; stop += n_calls - 1) {
        p = (progress){.stop_at = stop};
        assert_int_equal(kvs_episodes_create(model, &o, h.messages, 2 * N_TURNS, &e, &err), KVS_ECANCELLED);
        assert_null(e);
        assert_int_equal(n_held, 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(score_differs_from_attention_over_the_held_keys),
        cmocka_unit_test(budget_that_holds_all_changes_a_bit),
        cmocka_unit_test(layers_get_other_shares_than_sensitivity_says),
        cmocka_unit_test(caches_pass_the_budget),
        cmocka_unit_test(early_block_depends_on_a_later_one),
        cmocka_unit_test(thread_count_shows),
        cmocka_unit_test(windows_are_not_cut_as_the_paper_does),
        cmocka_unit_test(grouping_is_not_the_best_one),
        cmocka_unit_test(question_goes_to_the_other_topic),
        cmocka_unit_test(own_encoder_is_not_asked),
        cmocka_unit_test(dropped_turn_leaves_a_trace),
        cmocka_unit_test(question_too_long_changes_something),
        cmocka_unit_test(save_goes_on_otherwise),
        cmocka_unit_test(wrong_option_is_let_through),
        cmocka_unit_test(named_budget_does_not_do),
        cmocka_unit_test(damaged_save_is_let_through),
        cmocka_unit_test(stopped_build_leaves_something),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

/* Memory is asked for when a session is created or forked, and at no other time: an allocator that refuses everything
 * sees whole conversations go by, and one that fails at each place in turn leaves nothing behind and nothing changed. */
#include "policy/policy.h"
#include "unit/session_fixture.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

/* ---- an allocator that counts and fails ------------------------------------------------------------------------- */

static struct {
    uint64_t n_asked, n_held;
    uint64_t fail_at; /* the n-th request from now on fails; UINT64_MAX: none does */
} heap;

static void *counting_alloc(void *ctx, size_t size_bytes)
{
    (void)ctx;
    heap.n_asked++;
    if (heap.fail_at != UINT64_MAX && heap.fail_at-- == 0) {
        heap.fail_at = 0; /* and so does every later one */
        return NULL;
    }
    const kvs_allocator *a = kvs_allocator_default();
    void *p = a->alloc(a->ctx, size_bytes);
    heap.n_held += p != NULL;
    return p;
}

static void counting_free(void *ctx, void *ptr)
{
    (void)ctx;
    heap.n_held -= ptr != NULL;
    kvs_allocator_default()->free(kvs_allocator_default()->ctx, ptr);
}

static const kvs_allocator counting = {counting_alloc, counting_free, NULL};

static kvs_model *open_model(void)
{
    tiny_options t;
    fx_shape(&t, GGML_TYPE_Q4_1);
    char path[TINY_PATH_BYTES];
    assert_true(tiny_temp(&t, path));
    kvs_model_options mo;
    kvs_model_options_default(&mo);
    mo.n_threads = 2;
    mo.allocator = &counting;
    kvs_model *m;
    kvs_error err = {.message = ""};
    if (kvs_model_open(path, &mo, &m, &err) != KVS_OK)
        fail_msg("%s", err.message);
    unlink(path);
    return m;
}

/* ---- a conversation without memory ------------------------------------------------------------------------------ */

typedef struct setting {
    const char *policy, *position, *ffn_skip;
    uint32_t budget_tokens;
    uint64_t budget_bytes;
    kvs_kv_type kv;
    kvs_arith arith;
    bool paper_compat;
} setting;

/* 6 heads of 32 dims: a page with its side arrays is about 9 KiB in f16. */
static const setting settings[] = {
    {.policy = "streaming", .budget_tokens = 150},
    {.policy = "streaming", .position = "rollback", .budget_bytes = 200000},
    {.policy = "attention_top:keep=0.8", .budget_tokens = 140},
    {.policy = "attention_top:keep=0.6", .position = "keep", .budget_tokens = 130, .kv = KVS_KV_F32},
    {.policy = "attention_top:acc=1,scope=2,keep=0.7", .position = "gapcap:8", .budget_bytes = 220000},
    {.policy = "attention_bottom:acc=2,scope=1", .position = "gapcap:4", .budget_tokens = 100, .arith = KVS_ARITH_F32},
    {.policy = "attention_top:acc=3,scope=2 +schedule=step", .budget_tokens = 90},
    {.policy = "random", .position = "recompute", .budget_tokens = 120},
    {.policy = "sliding_window_gist:gist=40,recent=20 +schedule=every:50",
     .position = "rollback",
     .budget_tokens = 150},
    {.policy = "sliding_window_gist_attentive:gist=20,recent=30", .budget_tokens = 128},
    {.policy = "evict_oldest +schedule=turn_end", .budget_tokens = 400, .ffn_skip = "threshold=0.5,cold=0:0"},
    {.policy = "llama_context_shift:n_keep=4 +schedule=tokens:90", .budget_tokens = 200},
    {.policy = "attention_top:keep=0.9 +schedule=tokens:100", .budget_tokens = 500, .paper_compat = true},
    {.policy = "sliding_window +protect=none", .position = "keep", .budget_tokens = 64},
    {.policy = "compactor:chunk=48", .budget_tokens = 200},
    {.policy = "expected_attention +budget=ada", .budget_bytes = 400000},
    {.policy = "snapkv:window=16 +select=sentence", .budget_tokens = 200},
    {.policy = "criticalkv:window=16", .budget_tokens = 200},
    {.policy = "laq:first=8 +probe=lookahead:rows=2", .budget_tokens = 200},
};
enum { N_SETTINGS = sizeof settings / sizeof *settings, TURNS = 12, TURN_MAX = 160 };

static void check_budget(const kvs_session *s)
{
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    kvs_policy policy;
    assert_int_equal(kvs_policy_parse(kvs_session_policy(s), NULL, false, &policy, NULL), KVS_OK);
    const bool too_many = !kvs_policy_is_ragged(&policy) && u.n_slots_max > u.budget_tokens; /* else: of the mean */
    if (u.kv_bytes_peak > u.budget_bytes || u.kv_bytes > u.budget_bytes || too_many)
        fail_msg("%s: %llu bytes, peak %llu, of %llu", kvs_session_policy(s), (unsigned long long)u.kv_bytes,
                 (unsigned long long)u.kv_bytes_peak, (unsigned long long)u.budget_bytes);
}

static void must(kvs_status status, const kvs_session *s, const kvs_error *err)
{
    if (status != KVS_OK)
        fail_msg("%s: %s", kvs_session_policy(s), err->message);
}

/* A prompt with markers and an answer, in one call or two; then what people do between turns. */
static void play_turn(kvs_session *s, uint32_t turn, kvs_rng *rng)
{
    static float logits[TINY_VOCAB_MIN];
    int32_t tokens[TURN_MAX];
    uint8_t flags[TURN_MAX];
    kvs_error err = {.message = ""};
    const uint32_t n_prompt = 5 + kvs_rng_below(rng, 120), n = n_prompt + 1 + kvs_rng_below(rng, 30);
    fx_tokens(turn, tokens, n);
    for (uint32_t i = 0; i < n; i++)
        flags[i] = i < 3 ? KVS_TOKEN_TEMPLATE : i < n_prompt ? KVS_TOKEN_USER : KVS_TOKEN_ASSISTANT;
    must(kvs_session_turn_begin(s, &err), s, &err);
    must(kvs_session_extend(s, tokens, flags, n_prompt, logits, &err), s, &err);
    check_budget(s);
    for (uint32_t i = n_prompt; i < n; i++)
        must(kvs_session_extend(s, tokens + i, flags + i, 1, logits, &err), s, &err);
    must(kvs_session_turn_end(s, &err), s, &err);
    check_budget(s);
    if (turn % 3 == 1) { /* said again, if no eviction is in the way */
        const uint64_t to = kvs_session_n_tokens(s) - 2;
        if (kvs_session_truncate(s, to, &err) == KVS_OK)
            must(kvs_session_extend(s, tokens + n - 2, flags + n - 2, 2, logits, &err), s, &err);
    }
    if (turn % 4 == 3)
        must(kvs_session_evict(s, 0, &err), s, &err);
    kvs_positions p;
    kvs_health h;
    kvs_session_get_positions(s, &p);
    kvs_session_get_health(s, &h);
    assert_false(h.alarms & (KVS_ALARM_BUDGET | KVS_ALARM_NAN));
}

static kvs_session *create(kvs_model *m, const setting *c)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = c->policy;
    o.position = c->position;
    o.ffn_skip = c->ffn_skip;
    o.budget_tokens = c->budget_tokens;
    o.budget_bytes = c->budget_bytes;
    o.kv_type = c->kv;
    o.arith = c->arith;
    o.paper_compat = c->paper_compat;
    kvs_session *s = fx_session(m, &o);
    assert_non_null(s);
    return s;
}

static void a_conversation_asks_for_memory(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N_SETTINGS; i++) {
        kvs_model *m = open_model(); /* a new one: what an earlier session reserved must not help */
        kvs_session *s = create(m, &settings[i]), *other = create(m, &settings[i]);
        kvs_rng rng = {i};
        heap.n_asked = 0;
        heap.fail_at = 0;
        for (uint32_t t = 0; t < TURNS; t++)
            play_turn(s, t, &rng);
        kvs_usage u;
        kvs_session_get_usage(s, &u);
        assert_true(u.n_evictions > 0);
        /* Saving, loading into a session that exists, and steps of both. */
        static uint8_t saved[1 << 20];
        size_t n;
        kvs_error err = {.message = ""};
        must(kvs_session_save(s, saved, sizeof saved, &n, &err), s, &err);
        must(kvs_session_load(other, saved, n, &err), s, &err);
        int32_t tokens[200];
        fx_tokens(i, tokens, 200);
        kvs_run runs[] = {{.session = s, .tokens = tokens, .n_tokens = 200},
                          {.session = other, .tokens = tokens, .n_tokens = 130}};
        must(kvs_step(runs, 2, &err), s, &err);
        check_budget(s);
        check_budget(other);
        if (heap.n_asked != 0)
            fail_msg("%s asked for memory %llu times", kvs_session_policy(s), (unsigned long long)heap.n_asked);
        heap.fail_at = UINT64_MAX;
        kvs_session_free(&s);
        kvs_session_free(&other);
        kvs_model_close(&m);
        assert_int_equal(heap.n_held, 0);
    }
}

/* ---- every allocation fails once -------------------------------------------------------------------------------- */

/* Every N until it works; what is left of a refusal is only the model's own workspace, which a close frees. */
static void a_refused_session_leaks(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N_SETTINGS; i += 2) {
        kvs_model *m = open_model();
        kvs_session_options o;
        kvs_session_options_default(&o);
        o.policy = settings[i].policy;
        o.budget_tokens = 150;
        kvs_session *s = NULL;
        kvs_error err = {.message = ""};
        uint64_t n = 0;
        for (;; n++) {
            heap.fail_at = n;
            const kvs_status status = kvs_session_create(m, &o, &s, &err);
            heap.fail_at = UINT64_MAX;
            if (status == KVS_OK)
                break;
            assert_int_equal(status, KVS_ENOMEM);
            assert_int_equal(err.status, KVS_ENOMEM);
            assert_null(s);
        }
        assert_true(n > 10);
        kvs_rng rng = {i};
        heap.fail_at = 0; /* what a refusal left behind is sound: the conversation goes on without memory */
        for (uint32_t t = 0; t < 3; t++)
            play_turn(s, t, &rng);
        heap.fail_at = UINT64_MAX;
        kvs_session_free(&s);
        kvs_model_close(&m);
        assert_int_equal(heap.n_held, 0);
    }
}

static void a_refused_fork_changes_its_parent(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N_SETTINGS; i++) {
        kvs_model *m = open_model();
        kvs_session *s = create(m, &settings[i]), *fork = NULL;
        kvs_rng rng = {i};
        for (uint32_t t = 0; t < 4; t++)
            play_turn(s, t, &rng);
        static uint8_t before[1 << 20], after[1 << 20];
        size_t n_before, n_after;
        kvs_error err = {.message = ""};
        must(kvs_session_save(s, before, sizeof before, &n_before, &err), s, &err);
        kvs_session_options o;
        kvs_session_options_default(&o);
        o.policy = "attention_top:acc=1,scope=2,keep=0.5"; /* taps and a larger scratch than the parent's */
        o.budget_tokens = i % 2 == 0 ? 700 : 60;
        o.kv_type = settings[i].kv;
        o.arith = settings[i].arith;
        uint64_t n = 0;
        for (kvs_status status = KVS_ENOMEM; status != KVS_OK; n++) {
            const uint64_t held = heap.n_held;
            heap.fail_at = n;
            status = kvs_session_fork(s, &o, &fork, &err);
            heap.fail_at = UINT64_MAX;
            if (status == KVS_OK)
                break;
            assert_int_equal(status, KVS_ENOMEM);
            assert_null(fork);
            assert_true(heap.n_held <= held + 1); /* the taps, which stay with the model */
            must(kvs_session_save(s, after, sizeof after, &n_after, &err), s, &err);
            assert_int_equal(n_after, n_before);
            assert_memory_equal(after, before, n_before);
        }
        assert_true(n > 10);
        heap.fail_at = 0;
        check_budget(fork);
        for (uint32_t t = 4; t < 8; t++) {
            play_turn(s, t, &rng);
            play_turn(fork, t, &rng);
        }
        heap.fail_at = UINT64_MAX;
        kvs_session_free(&s);
        play_turn(fork, 8, &rng);
        kvs_session_free(&fork);
        kvs_model_close(&m);
        assert_int_equal(heap.n_held, 0);
    }
}

/* ---- what grows with a conversation ----------------------------------------------------------------------------- */

/* The record of turns forgets those of which nothing is held: a save is as long after 40 budgets as after 4, and a
 * session that never evicts agrees with one that did about the turns both hold whole. */
static void a_long_conversation_grows(void **state)
{
    (void)state;
    kvs_model *m = open_model();
    const setting c = {.policy = "streaming", .budget_tokens = 150};
    kvs_session *s = create(m, &c);
    size_t early = 0, late = 0;
    kvs_error err = {.message = ""};
    for (uint32_t t = 0; t < 400; t++) {
        int32_t tokens[15];
        uint8_t flags[15];
        fx_tokens(t, tokens, 15);
        for (uint32_t i = 0; i < 15; i++) /* turns of two tokens between markers of one */
            flags[i] = i % 3 == 0 ? KVS_TOKEN_TEMPLATE : KVS_TOKEN_USER;
        must(kvs_session_extend(s, tokens, flags, 15, NULL, &err), s, &err);
        size_t n;
        must(kvs_session_save(s, NULL, 0, &n, &err), s, &err);
        if (t < 40)
            early = n > early ? n : early;
        late = n > late ? n : late;
        kvs_positions p;
        kvs_session_get_positions(s, &p);
        assert_true(p.template_integrity > 0.5 && p.template_integrity <= 1.0);
    }
    assert_int_equal(late, early);
    kvs_session_free(&s);
    kvs_model_close(&m);
}

int main(void)
{
    heap.fail_at = UINT64_MAX;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_conversation_asks_for_memory),
        cmocka_unit_test(a_refused_session_leaks),
        cmocka_unit_test(a_refused_fork_changes_its_parent),
        cmocka_unit_test(a_long_conversation_grows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* FFN-SkipLLM as an option: off and over 1 change no bit, a left-out block is a block of zeros, and nothing about batch,
 * threads, slices, forks, saves or truncation can be seen in what is left out. */
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 120, VOCAB = TINY_VOCAB_MIN, LAYERS = 6 };

static int32_t tokens[N];
static uint8_t flags[N], said[N]; /* turns; all said by the assistant */
static float full[N * VOCAB], got[N * VOCAB], other[N * VOCAB];

static void shape(tiny_options *o)
{
    fx_shape(o, GGML_TYPE_F32);
    o->n_layers = LAYERS;
    fx_tokens(3, tokens, N);
    fx_flags(4, flags, N);
    memset(said, KVS_TOKEN_ASSISTANT, N);
}

static kvs_session *open_session(kvs_model *m, const char *skip, const char *policy, uint32_t budget_tokens)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.ffn_skip = skip;
    o.policy = policy;
    o.budget_tokens = budget_tokens;
    kvs_session *s = fx_session(m, &o);
    assert_non_null(s);
    return s;
}

static void run(kvs_session *s, const uint8_t *f, uint32_t slice, float *out)
{
    kvs_error err = {.message = ""};
    if (fx_run(s, tokens, f, N, slice, out, VOCAB, &err) != KVS_OK)
        fail_msg("%s", err.message);
}

static kvs_usage usage_of(const kvs_session *s)
{
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    return u;
}

/* A threshold that about half of the rows reach at the first middle layer. */
static void half_threshold(kvs_model *m, uint32_t warmup, char *spec, size_t cap)
{
    kvs_session *s = open_session(m, "threshold=2,warmup=0,cold=1:1", NULL, N);
    run(s, said, N, got);
    kvs_ffn_layer l;
    assert_true(kvs_session_get_ffn(s, 1, &l));
    snprintf(spec, cap, "threshold=%.9f,warmup=%u,cold=1:1", l.cosine, warmup);
    kvs_session_free(&s);
}

static void off_and_out_of_reach_change_no_bit(void **state)
{
    (void)state;
    tiny_options o;
    shape(&o);
    kvs_model *m = fx_open(&o, 2, 0);
    assert_non_null(m);
    kvs_session *s = open_session(m, NULL, NULL, N);
    run(s, flags, 7, full);
    assert_string_equal(kvs_session_ffn_skip(s), "off");
    assert_int_equal(usage_of(s).n_ffn_blocks, 0);
    kvs_session_free(&s);
    static const char *const specs[] = {"off", "threshold=1.01,warmup=0,cold=0:0", "threshold=2"};
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        s = open_session(m, specs[i], NULL, N);
        run(s, flags, 7, got);
        assert_int_equal(fx_differs(full, got, N, VOCAB), N);
        assert_int_equal(usage_of(s).n_ffn_skipped, 0);
        kvs_ffn_layer l;
        for (uint32_t k = 0; i > 0 && k < LAYERS; k++)
            assert_true(kvs_session_get_ffn(s, k, &l) && l.n_run > 0 && l.cosine >= -1 && l.cosine <= 1);
        assert_false(kvs_session_get_ffn(s, i > 0 ? LAYERS : 0, &l));
        kvs_session_free(&s);
    }
    kvs_model_close(&m);
}

/* The independent check: a model whose blocks 2, 3 and 4 add zero says the same as one that leaves them out. */
static void a_left_out_block_adds_nothing_and_attention_still_runs(void **state)
{
    (void)state;
    tiny_options o;
    shape(&o);
    kvs_model *whole = fx_open(&o, 2, 0);
    o.no_ffn = 1u << 2 | 1u << 3 | 1u << 4;
    kvs_model *without = fx_open(&o, 2, 0);
    assert_non_null(whole);
    assert_non_null(without);
    kvs_session *a = open_session(without, NULL, NULL, N), *plain = open_session(whole, NULL, NULL, N);
    run(a, said, 9, full);
    run(plain, said, 9, other);
    assert_int_not_equal(fx_differs(full, other, N, VOCAB), N);
    /* The cosine of block 1 is above 0.0001 for every row here, or the counters below would say so. */
    for (uint32_t slice = 1; slice <= N; slice = slice == 1 ? 9 : slice + N - 9) {
        kvs_session *b = open_session(whole, "threshold=0.0001,warmup=0,cold=1:1", NULL, N);
        run(b, said, slice, got);
        assert_int_equal(usage_of(b).n_ffn_skipped, 3 * N);
        assert_int_equal(usage_of(b).n_ffn_blocks, LAYERS * N);
        assert_int_equal(fx_differs(full, got, N, VOCAB), N);
        assert_int_equal(usage_of(b).live_bytes, usage_of(a).live_bytes);
        assert_int_equal(usage_of(b).n_slots_min, N);
        kvs_session_free(&b);
    }
    kvs_session_free(&a);
    kvs_session_free(&plain);
    kvs_model_close(&whole);
    kvs_model_close(&without);
}

static void batch_threads_and_slices_cannot_be_seen(void **state)
{
    (void)state;
    static const enum ggml_type types[] = {GGML_TYPE_F32, GGML_TYPE_Q4_1};
    for (size_t t = 0; t < 2; t++) {
        tiny_options o;
        shape(&o);
        o.type = types[t];
        kvs_model *one = fx_open(&o, 1, 0), *three = fx_open(&o, 3, 0);
        assert_non_null(one);
        assert_non_null(three);
        char spec[80];
        half_threshold(one, 2, spec, sizeof spec);
        kvs_session *s = open_session(one, spec, NULL, N);
        run(s, flags, 1, full); /* a row at a time: nothing is gathered */
        const kvs_usage u = usage_of(s);
        assert_true(u.n_ffn_skipped > 0 && u.n_ffn_skipped < u.n_ffn_blocks / LAYERS * (LAYERS - 3));
        for (uint32_t slice = 5; slice <= N; slice += N - 5) {
            kvs_session *b = open_session(three, spec, NULL, N);
            run(b, flags, slice, got);
            assert_int_equal(fx_differs(full, got, N, VOCAB), N);
            assert_int_equal(usage_of(b).n_ffn_skipped, u.n_ffn_skipped);
            kvs_session_free(&b);
        }
        /* Beside a session without the option and one with another threshold. */
        kvs_session *all[3] = {open_session(three, NULL, NULL, N), open_session(three, spec, NULL, N),
                               open_session(three, "threshold=0.0001,cold=2:2", NULL, N)};
        uint8_t want[N];
        memset(want, 1, N);
        fx_rows rows[3] = {{other, VOCAB, 0}, {got, VOCAB, 0}, {other, VOCAB, 0}};
        kvs_run runs[3];
        for (int i = 0; i < 3; i++)
            runs[i] = (kvs_run){.session = all[i],
                                .tokens = tokens,
                                .flags = flags,
                                .n_tokens = N,
                                .on_logits = fx_keep_row,
                                .want = want,
                                .ctx = &rows[i]};
        kvs_error err = {.message = ""};
        assert_int_equal(kvs_step(runs, 3, &err), KVS_OK);
        assert_int_equal(fx_differs(full, got, N, VOCAB), N);
        for (int i = 0; i < 3; i++)
            kvs_session_free(&all[i]);
        kvs_session_free(&s);
        kvs_model_close(&one);
        kvs_model_close(&three);
    }
}

/* What follows token `from`, after a fork, a save, a truncation and an eviction with a lookahead's rows. */
static void rest(kvs_session *s, uint32_t from, float *out)
{
    kvs_error err = {.message = ""};
    if (fx_run(s, tokens + from, said + from, N - from, 3, out + (size_t)from * VOCAB, VOCAB, &err) != KVS_OK)
        fail_msg("%s", err.message);
}

static void assert_same_rest(uint32_t from)
{
    assert_int_equal(fx_differs(full + (size_t)from * VOCAB, got + (size_t)from * VOCAB, N - from, VOCAB), N - from);
}

static void forks_saves_and_truncation_keep_warm_up_and_option(void **state)
{
    (void)state;
    enum { CUT = 53, PROMPT = 40 };
    tiny_options o;
    shape(&o);
    memset(said, KVS_TOKEN_USER, PROMPT);
    kvs_model *m = fx_open(&o, 2, 0);
    assert_non_null(m);
    char spec[80];
    half_threshold(m, 20, spec, sizeof spec);
    memset(said, KVS_TOKEN_USER, PROMPT); /* the warm-up of 20 ends behind the cut */
    kvs_error err = {.message = ""};
    kvs_session *s = open_session(m, spec, NULL, N), *fork, *off, *loaded = open_session(m, spec, NULL, N);
    assert_int_equal(fx_run(s, tokens, said, CUT, 8, full, VOCAB, &err), KVS_OK);
    assert_int_equal(usage_of(s).n_ffn_blocks, 0);
    assert_int_equal(kvs_session_fork(s, NULL, &fork, &err), KVS_OK);
    assert_int_equal(fx_copy_by_save(s, loaded, &err), KVS_OK);
    kvs_session_options so;
    kvs_session_options_default(&so);
    so.ffn_skip = "off";
    so.budget_tokens = N;
    assert_int_equal(kvs_session_fork(s, &so, &off, &err), KVS_OK);
    rest(s, CUT, full);
    assert_int_equal(usage_of(s).n_ffn_blocks, (N - PROMPT - 20) * LAYERS);
    const uint64_t n_skipped = usage_of(s).n_ffn_skipped;
    assert_true(n_skipped > 0);
    rest(fork, CUT, got);
    assert_same_rest(CUT);
    assert_int_equal(usage_of(fork).n_ffn_skipped, n_skipped);
    rest(loaded, CUT, got);
    assert_same_rest(CUT);
    assert_int_equal(usage_of(loaded).n_ffn_skipped, n_skipped);
    rest(off, CUT, got);
    assert_int_equal(usage_of(off).n_ffn_blocks, 0);
    assert_int_not_equal(fx_differs(full + CUT * VOCAB, got + CUT * VOCAB, N - CUT, VOCAB), N - CUT);
    static const uint32_t cuts[] = {CUT, PROMPT + 21, PROMPT, PROMPT / 2};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        assert_int_equal(kvs_session_truncate(fork, cuts[i], &err), KVS_OK);
        rest(fork, cuts[i], got);
        assert_same_rest(kvs_max_u32(cuts[i], CUT));
    }
    /* A save of another option is refused, and says which. */
    assert_int_equal(fx_copy_by_save(s, off, &err), KVS_EFORMAT);
    assert_non_null(strstr(err.message, "ffn skip"));
    kvs_session_free(&s);
    kvs_session_free(&fork);
    kvs_session_free(&off);
    kvs_session_free(&loaded);
    kvs_model_close(&m);
}

static void evictions_and_probes_keep_it_independent_of_slices(void **state)
{
    (void)state;
    static const char *const policies[] = {"streaming:keep=40tok", "snapkv:keep=40tok +position=rerotate",
                                           "laq:keep=40tok +protect=none", "random:keep=40tok +position=recompute"};
    tiny_options o;
    shape(&o);
    kvs_model *m = fx_open(&o, 2, 0);
    assert_non_null(m);
    char spec[80];
    half_threshold(m, 3, spec, sizeof spec);
    for (size_t p = 0; p < sizeof policies / sizeof *policies; p++) {
        kvs_session *a = open_session(m, spec, policies[p], 70), *b = open_session(m, spec, policies[p], 70);
        run(a, flags, 1, full);
        run(b, flags, N, got);
        assert_true(usage_of(a).n_evictions > 0 && usage_of(a).n_ffn_skipped > 0);
        assert_int_equal(fx_differs(full, got, N, VOCAB), N);
        kvs_session_free(&a);
        kvs_session_free(&b);
    }
    kvs_model_close(&m);
}

/* A lookahead begins by running the newest token a second time, which writes its key anew. */
static void a_token_run_again_goes_without_the_same_blocks(void **state)
{
    (void)state;
    tiny_options o;
    shape(&o);
    kvs_model *m = fx_open(&o, 2, 0);
    assert_non_null(m);
    kvs_session *s = open_session(m, "threshold=0.0001,warmup=0,cold=1:1", "laq:keep=40tok +protect=recent:4", 2 * N);
    run(s, said, N, got);
    float before[2][KVS_HEAD_DIM_MAX], after[2][KVS_HEAD_DIM_MAX];
    kvs_error err = {.message = ""};
    kvs_cache_read_slot(s->cache, LAYERS - 1, 0, N - 1, before[0], before[1]);
    assert_int_equal(kvs_session_evict(s, 0, &err), KVS_OK);
    assert_int_equal(usage_of(s).n_slots_max, 40);
    assert_int_equal(usage_of(s).n_ffn_skipped, 3 * (N + 1)); /* it was run again */
    kvs_cache_read_slot(s->cache, LAYERS - 1, 0, 39, after[0], after[1]);
    for (int kv = 0; kv < 2; kv++)
        assert_memory_equal(before[kv], after[kv], o.head_dim * sizeof(float));
    kvs_session_free(&s);
    kvs_model_close(&m);
}

static void wrong_options_are_refused_by_name(void **state)
{
    (void)state;
    tiny_options o;
    shape(&o);
    kvs_model *m = fx_open(&o, 1, 0);
    assert_non_null(m);
    static const struct {
        const char *spec, *says;
    } bad[] = {{"", "ffn skip"},
               {"on", "'on'"},
               {"warmup=3", "threshold=S"},
               {"threshold=0", "'0'"},
               {"threshold=-1", "'-1'"},
               {"threshold=nan", "'nan'"},
               {"threshold=2.5", "'2.5'"},
               {"threshold=0.9,", "threshold=S"},
               {"threshold=0.9,warmup=-1", "'-1'"},
               {"threshold=0.9,cold=3", "threshold=S"},
               {"threshold=0.9,cold=3:3", "cold=3:3 leaves no middle layer of 6"},
               {"threshold=0.9,cold=6:0", "cold=6:0"},
               {"threshold=0.9,cold=1000000000:1000000000", "leaves no middle layer"},
               {"threshold=0.9;warmup=3", "';warmup=3'"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvs_session_options so;
        kvs_session_options_default(&so);
        so.budget_tokens = N;
        so.ffn_skip = bad[i].spec;
        kvs_session *s;
        kvs_error err = {.message = ""};
        assert_int_equal(kvs_session_create(m, &so, &s, &err), KVS_EINVAL);
        if (s != NULL || strstr(err.message, bad[i].says) == NULL)
            fail_msg("'%s' is refused with: %s", bad[i].spec, err.message);
    }
    kvs_session *s = open_session(m, "cold=2:1,warmup=0,threshold=0.98", NULL, N);
    assert_string_equal(kvs_session_ffn_skip(s), "threshold=0.98,warmup=0,cold=2:1");
    kvs_session_free(&s);
    kvs_model_close(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(off_and_out_of_reach_change_no_bit),
        cmocka_unit_test(a_left_out_block_adds_nothing_and_attention_still_runs),
        cmocka_unit_test(batch_threads_and_slices_cannot_be_seen),
        cmocka_unit_test(forks_saves_and_truncation_keep_warm_up_and_option),
        cmocka_unit_test(evictions_and_probes_keep_it_independent_of_slices),
        cmocka_unit_test(a_token_run_again_goes_without_the_same_blocks),
        cmocka_unit_test(wrong_options_are_refused_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

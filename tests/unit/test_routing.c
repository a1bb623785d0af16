/* Utilisation, drift and key channels: against their definitions, against the other ways the engine has to read attention,
 * and that looking changes nothing. */
#include "eval/keep_sets.h"
#include "eval/routing.h"
#include "eval/teacher.h"
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 150, VOCAB = TINY_VOCAB_MIN, ANSWER = 120 };

static int32_t tokens[N], everything[N];
static float plain[N * VOCAB], watched[N * VOCAB];

static kvs_model *open_model(uint32_t n_threads)
{
    tiny_options o;
    fx_shape(&o, GGML_TYPE_F32);
    fx_tokens(11, tokens, N);
    for (int32_t i = 0; i < N; i++)
        everything[i] = i;
    kvs_model *m = fx_open(&o, n_threads, 0);
    assert_non_null(m);
    return m;
}

static kvs_session *open_session(kvs_model *m, const char *policy, uint32_t budget_tokens)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = policy;
    o.budget_tokens = budget_tokens;
    o.kv_type = KVS_KV_F32;
    kvs_session *s = fx_session(m, &o);
    assert_non_null(s);
    return s;
}

static kvs_watch *open_watch(kvs_session *s, const int32_t *fact, uint32_t n, uint64_t from)
{
    const kvs_watch_options o = {.tokens = fact, .n_tokens = n, .from_query = from, .from_answer = from};
    kvs_watch *w;
    kvs_error err = {.message = ""};
    if (kvs_watch_create(s, &o, &w, &err) != KVS_OK)
        fail_msg("%s", err.message);
    kvs_session_watch(s, w);
    return w;
}

static void run(kvs_session *s, uint32_t slice, float *out)
{
    kvs_error err = {.message = ""};
    if (fx_run(s, tokens, NULL, N, slice, out, VOCAB, &err) != KVS_OK)
        fail_msg("%s", err.message);
}

/* ---- definitions ---- */

static void drift_is_one_minus_cosine(void **state)
{
    (void)state;
    enum { DIMS = 77 };
    kvs_rng rng = {5};
    float a[DIMS], b[DIMS], zero[DIMS] = {0};
    for (int round = 0; round < 50; round++) {
        double ab = 0, aa = 0, bb = 0;
        for (int i = 0; i < DIMS; i++) {
            a[i] = (float)(kvs_rng_double(&rng) - 0.4);
            b[i] = (float)(kvs_rng_double(&rng) * (round % 5) - 0.3) + a[i];
            ab += (double)a[i] * (double)b[i];
            aa += (double)a[i] * (double)a[i];
            bb += (double)b[i] * (double)b[i];
        }
        /* Both forms round a few dozen times DIMS terms of at most 1. */
        assert_true(fabs(kvs_drift(a, b, DIMS) - (1 - ab / sqrt(aa * bb))) < 4 * DIMS * 0x1p-52);
        assert_true(kvs_drift(a, a, DIMS) == 0);
        for (int i = 0; i < DIMS; i++)
            b[i] = -a[i];
        assert_true(fabs(kvs_drift(a, b, DIMS) - 2) < 1e-13);
    }
    assert_true(isnan(kvs_drift(a, zero, DIMS)));
}

static void channels_are_the_fewest_that_carry_the_share(void **state)
{
    (void)state;
    double even[10], one[10] = {0, 0, 0, 4}, none[10] = {0};
    for (int i = 0; i < 10; i++)
        even[i] = 0.5;
    assert_true(kvs_share_carrying(even, 10, 0.85) == 0.9);
    assert_true(kvs_share_carrying(even, 10, 1) == 1);
    assert_true(kvs_share_carrying(one, 10, 0.99) == 0.1);
    assert_true(isnan(kvs_share_carrying(none, 10, 0.5)));
    kvs_rng rng = {6};
    for (int round = 0; round < 40; round++) {
        double x[12], all = 0;
        for (int i = 0; i < 12; i++)
            all += x[i] = kvs_rng_double(&rng);
        uint32_t fewest = 12; /* of all subsets */
        for (uint32_t set = 0; set < 1u << 12; set++) {
            double sum = 0;
            for (int i = 0; i < 12; i++)
                sum += set >> i & 1 ? x[i] : 0;
            if (sum >= 0.7 * all)
                fewest = kvs_min_u32(fewest, (uint32_t)__builtin_popcount(set));
        }
        assert_true(kvs_share_carrying(x, 12, 0.7) == fewest / 12.0);
    }
}

/* ---- sessions ---- */

static void looking_on_changes_no_bit_and_sees_the_same_in_any_slices(void **state)
{
    (void)state;
    static const int32_t fact[] = {3, 4, 5, 40, 119};
    static const char *const policies[] = {"baseline", "streaming:keep=50tok", "snapkv:keep=50tok"};
    for (size_t p = 0; p < sizeof policies / sizeof *policies; p++) {
        kvs_model *one = open_model(1), *three = open_model(3);
        const uint32_t budget = p == 0 ? N : 80;
        kvs_session *a = open_session(one, policies[p], budget), *b = open_session(one, policies[p], budget);
        kvs_session *c = open_session(three, policies[p], budget);
        kvs_watch *wb = open_watch(b, fact, 5, ANSWER), *wc = open_watch(c, fact, 5, ANSWER);
        run(a, 1, plain);
        run(b, 1, watched);
        assert_int_equal(fx_differs(plain, watched, N, VOCAB), N);
        run(c, N, watched);
        assert_int_equal(fx_differs(plain, watched, N, VOCAB), N);
        const size_t n_heads = (size_t)wb->n_layers * wb->n_heads;
        assert_int_equal(wb->n_answers, N - ANSWER);
        assert_int_equal(wc->n_answers, N - ANSWER);
        assert_memory_equal(wb->mass, wc->mass, n_heads * sizeof *wb->mass);
        assert_memory_equal(wb->query_square, wc->query_square, n_heads * wb->head_dim * sizeof *wb->query_square);
        assert_memory_equal(wb->hidden, wc->hidden, (size_t)wb->n_layers * wb->n_embd * sizeof *wb->hidden);
        kvs_watch_free(&wb);
        kvs_watch_free(&wc);
        kvs_session_free(&a);
        kvs_session_free(&b);
        kvs_session_free(&c);
        kvs_model_close(&one);
        kvs_model_close(&three);
    }
}

/* The kernels' own tap records the newest row's mass by slot, on another path. */
static void mass_is_what_the_tap_records(void **state)
{
    (void)state;
    kvs_model *m = open_model(2);
    kvs_session *s = open_session(m, "attention_top", N), *t = open_session(m, "baseline", N);
    uint8_t flags[N] = {0};
    flags[N - 1] = KVS_TOKEN_ASSISTANT; /* a forward of its own */
    static const int32_t fact[] = {0, 7, 8, 9, 77, N - 1};
    kvs_watch *w = open_watch(s, fact, 6, N - 1), *all = open_watch(t, everything, N, ANSWER);
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_session_extend(s, tokens, flags, N, NULL, &err), KVS_OK);
    assert_int_equal(kvs_session_extend(t, tokens, NULL, N, NULL, &err), KVS_OK);
    assert_int_equal(w->n_answers, 1);
    for (uint32_t l = 0; l < w->n_layers; l++)
        for (uint32_t h = 0; h < w->n_kv_heads; h++) {
            const kvs_policy_view v = kvs_view_facts(s, l, h, &s->scratch.threads[0]);
            double want = 0, got = 0;
            for (uint32_t i = 0; i < 6; i++)
                want += (double)v.mass_sum[fact[i]];
            for (uint32_t g = 0; g < w->group; g++) {
                got += w->mass[(size_t)l * w->n_heads + h * w->group + g];
                const double whole = all->mass[(size_t)l * w->n_heads + h * w->group + g];
                assert_true(fabs(whole / (N - ANSWER) - 1) < 1e-6); /* f32 scores under an f64 sum */
            }
            assert_true(want > 0 && fabs(got - want) < 1e-5 * want + 1e-7); /* f32 sums of N terms */
        }
    kvs_watch_free(&w);
    kvs_watch_free(&all);
    kvs_session_free(&s);
    kvs_session_free(&t);
    kvs_model_close(&m);
}

/* Against what two policies see: a window of queries, and keys as they stand now. */
static void key_channels_are_norms_of_queries_and_keys(void **state)
{
    (void)state;
    kvs_model *m = open_model(2);
    kvs_session *s = open_session(m, "snapkv:window=16", N), *k = open_session(m, "keydiff:keep=60tok", N);
    kvs_watch *w = open_watch(s, NULL, 0, N - 16);
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_session_extend(s, tokens, NULL, N, NULL, &err), KVS_OK);
    assert_int_equal(kvs_session_extend(k, tokens, NULL, N, NULL, &err), KVS_OK);
    for (int evicted = 0; evicted < 2; evicted++) {
        for (uint32_t l = 0; l < w->n_layers; l++)
            for (uint32_t h = 0; h < w->n_kv_heads; h++) {
                const kvs_policy_view q = kvs_view_head(s, l, h, &s->scratch.threads[0]);
                const kvs_policy_view v = kvs_view_head(k, l, h, &k->scratch.threads[0]);
                assert_int_equal(q.n_window, 16);
                double score[KVS_HEAD_DIM_MAX];
                assert_int_equal(kvs_watch_key_channels(w, k, l, h, score, &err), KVS_OK);
                for (uint32_t c = 0; c < v.head_dim; c++) {
                    double keys = 0, queries = 0;
                    for (uint32_t i = 0; i < v.n_slots; i++)
                        keys += pow((double)v.keys[(size_t)i * v.head_dim + c], 2);
                    for (uint32_t g = 0; g < v.group; g++) {
                        double square = 0;
                        for (uint32_t r = 0; r < 16; r++)
                            square += pow((double)q.window_query[(r * v.group + g) * v.head_dim + c], 2);
                        queries += sqrt(square) / v.group;
                    }
                    assert_true(fabs(score[c] - sqrt(keys) * queries) <= 1e-6 * score[c]);
                }
            }
        assert_int_equal(kvs_session_evict(k, 0, &err), KVS_OK); /* keys move, and are read where they stand */
    }
    kvs_watch_free(&w);
    kvs_session_free(&s);
    kvs_session_free(&k);
    kvs_model_close(&m);
}

static kvs_routing force(kvs_model *m, const char *policy, uint32_t budget, const int32_t *fact, uint32_t n_fact,
                         kvs_teacher_ref ref)
{
    kvs_routing r;
    kvs_teacher_options o = {.ref = ref,
                             .ref_tokens = ref == KVS_TEACHER_REF_WINDOW ? 2 * KVS_TEACHER_STRIDE_TOKENS : 0,
                             .routing = &r,
                             .fact = fact,
                             .n_fact = n_fact,
                             .answer_from = ANSWER};
    kvs_session_options_default(&o.session);
    o.session.policy = policy;
    o.session.budget_tokens = budget;
    kvs_teacher_result result;
    kvs_error err = {.message = ""};
    if (kvs_eval_teacher_force(m, &o, tokens, N, &result, &err) != KVS_OK)
        fail_msg("%s", err.message);
    return r;
}

static void an_untouched_cache_does_not_drift_and_a_lost_fact_is_not_used(void **state)
{
    (void)state;
    kvs_model *m = open_model(2);
    static const int32_t fact[] = {20, 21, 22, 23};
    kvs_routing r = force(m, "streaming", N + 100, fact, 4, KVS_TEACHER_REF_FULL);
    assert_true(r.drift == 0 && r.drift_last == 0);
    assert_true(r.utilisation > 0 && r.utilisation == r.ref_utilisation);
    for (uint32_t l = 0; l < r.n_layers; l++)
        assert_true(r.drift_l[l] == 0 && r.utilisation_l[l] == r.ref_utilisation_l[l]);
    const double whole = r.ref_utilisation;
    kvs_routing_free(&r);
    r = force(m, "streaming:keep=40tok", 60, fact, 4, KVS_TEACHER_REF_FULL); /* all of it is gone before the answer */
    assert_true(r.utilisation == 0 && r.ref_utilisation == whole && r.drift > 0 && r.drift < 2);
    assert_true(r.drift_l[r.n_layers - 1] == r.drift_last);
    assert_true(r.key_channels_min <= r.key_channels_90 && r.key_channels_90 <= r.key_channels_max);
    assert_true(r.key_channels_50 < r.key_channels_90 && r.key_channels_max <= 1);
    kvs_routing_free(&r);
    r = force(m, "streaming:keep=40tok", 60, NULL, 0, KVS_TEACHER_REF_NONE);
    assert_true(isnan(r.utilisation) && isnan(r.ref_utilisation) && isnan(r.drift) && r.key_channels_90 > 0);
    kvs_routing_free(&r);
    r = force(m, "streaming:keep=40tok", 60, fact, 4, KVS_TEACHER_REF_WINDOW); /* counts its tokens anew */
    assert_true(r.utilisation == 0 && isnan(r.ref_utilisation) && isnan(r.drift));
    kvs_routing_free(&r);
    kvs_model_close(&m);
}

static void tokens_that_do_not_ascend_are_refused(void **state)
{
    (void)state;
    kvs_model *m = open_model(1);
    kvs_session *s = open_session(m, "baseline", N);
    static const int32_t twice[] = {4, 7, 7};
    const kvs_watch_options o = {.tokens = twice, .n_tokens = 3};
    kvs_watch *w;
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_watch_create(s, &o, &w, &err), KVS_EINVAL);
    assert_null(w);
    assert_non_null(strstr(err.message, "7 follows 7"));
    kvs_session_free(&s);
    kvs_model_close(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(drift_is_one_minus_cosine),
        cmocka_unit_test(channels_are_the_fewest_that_carry_the_share),
        cmocka_unit_test(looking_on_changes_no_bit_and_sees_the_same_in_any_slices),
        cmocka_unit_test(mass_is_what_the_tap_records),
        cmocka_unit_test(key_channels_are_norms_of_queries_and_keys),
        cmocka_unit_test(an_untouched_cache_does_not_drift_and_a_lost_fact_is_not_used),
        cmocka_unit_test(tokens_that_do_not_ascend_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

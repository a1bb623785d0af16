/* Diagnostics of keep sets against their definitions, the expectation of random eviction, and a session. */
#include "eval/keep_sets.h"
#include "unit/session_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 500, SETS_MAX = 12 };

static int32_t room[SETS_MAX][N];

/* Each of N tokens stays with probability keep, for each head alone. */
static void drop_at_random(kvs_rng *rng, double keep, kvs_keep_set *sets, uint32_t n_sets)
{
    for (uint32_t s = 0; s < n_sets; s++) {
        sets[s] = (kvs_keep_set){.pos = room[s]};
        for (int32_t t = 0; t < N; t++)
            if (kvs_rng_double(rng) < keep)
                room[s][sets[s].n++] = t;
    }
}

static bool holds(const kvs_keep_set *s, int32_t pos)
{
    for (uint32_t i = 0; i < s->n; i++)
        if (s->pos[i] == pos)
            return true;
    return false;
}

static void both_equal_their_definitions(void **state)
{
    (void)state;
    kvs_rng rng = {1};
    for (int round = 0; round < 60; round++) {
        kvs_keep_set sets[SETS_MAX];
        const uint32_t n_sets = 1 + kvs_rng_below(&rng, 6);
        drop_at_random(&rng, kvs_rng_double(&rng), sets, n_sets);
        int32_t tokens[N];
        uint32_t n_tokens = 0, n_lost = 0;
        for (int32_t t = 0; t < N; t++)
            if (kvs_rng_below(&rng, 7) == 0)
                tokens[n_tokens++] = t;
        for (uint32_t i = 0; i < n_tokens; i++) {
            bool held = false;
            for (uint32_t s = 0; s < n_sets; s++)
                held |= holds(&sets[s], tokens[i]);
            n_lost += !held;
        }
        assert_true(kvs_eviction_ratio(sets, n_sets, tokens, n_tokens) == (double)n_lost / n_tokens);
        double sum = 0;
        uint32_t n_pairs = 0;
        for (uint32_t a = 0; a < n_sets; a++)
            for (uint32_t b = a + 1; b < n_sets; b++, n_pairs++) {
                uint32_t n_both = 0, n_either = 0;
                for (int32_t t = 0; t < N; t++) {
                    n_both += holds(&sets[a], t) && holds(&sets[b], t);
                    n_either += holds(&sets[a], t) || holds(&sets[b], t);
                }
                sum += n_either > 0 ? (double)n_both / n_either : 1;
            }
        const double want = n_pairs > 0 ? sum / n_pairs : 1;
        assert_true(fabs(kvs_head_consensus(sets, n_sets) - want) < 1e-14);
    }
}

static void limits_are_what_the_paper_says(void **state)
{
    (void)state;
    int32_t all[N], odd[N / 2];
    for (int32_t t = 0; t < N; t++)
        all[t] = t;
    for (int32_t t = 0; t < N / 2; t++)
        odd[t] = 2 * t + 1;
    const kvs_keep_set full = {all, N}, none = {all, 0}, half = {odd, N / 2};
    const kvs_keep_set same[] = {half, half, half}, apart[] = {{all, 100}, {all + 100, 100}}, empty[] = {none, none};
    assert_true(kvs_eviction_ratio(&full, 1, all, N) == 0);
    assert_true(kvs_eviction_ratio(&none, 1, all, N) == 1);
    assert_true(kvs_eviction_ratio(NULL, 0, all, N) == 1);
    assert_true(kvs_eviction_ratio(same, 3, all, N) == 0.5);
    assert_true(isnan(kvs_eviction_ratio(&full, 1, all, 0)));
    assert_true(kvs_head_consensus(same, 3) == 1);
    assert_true(kvs_head_consensus(apart, 2) == 0);
    assert_true(kvs_head_consensus(empty, 2) == 1);
    assert_true(kvs_head_consensus(&half, 1) == 1);
    const kvs_keep_set nested[] = {full, half};
    assert_true(kvs_head_consensus(nested, 2) == 0.5);
}

/* E[GER] = (1 - rho)^(L Hkv), and two random sets of keep rate rho agree on rho / (2 - rho) of what either holds. */
static void random_eviction_is_as_expected(void **state)
{
    (void)state;
    kvs_rng rng = {2};
    static const struct {
        double keep;
        uint32_t n_sets;
    } cases[] = {{0.5, 4}, {0.1, 12}, {0.3, 6}, {0.9, 2}};
    int32_t all[N];
    for (int32_t t = 0; t < N; t++)
        all[t] = t;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        enum { ROUNDS = 200 };
        double sum = 0, agree = 0;
        for (int round = 0; round < ROUNDS; round++) {
            kvs_keep_set sets[SETS_MAX];
            drop_at_random(&rng, cases[c].keep, sets, cases[c].n_sets);
            sum += kvs_eviction_ratio(sets, cases[c].n_sets, all, N) / ROUNDS;
            agree += kvs_head_consensus(sets, 2) / ROUNDS;
        }
        const double want = pow(1 - cases[c].keep, cases[c].n_sets);
        assert_true(fabs(sum - want) < 5 * sqrt(want * (1 - want) / (N * ROUNDS))); /* tokens are independent */
        const double both = cases[c].keep / (2 - cases[c].keep);
        /* A ratio of means over some N (2 - rho) rho tokens a round; its bias is below the deviation of one round / N. */
        const double either = N * cases[c].keep * (2 - cases[c].keep);
        assert_true(fabs(agree - both) < 5 * sqrt(both * (1 - both) / (either * ROUNDS)) + 1.0 / N);
    }
}

static void a_session_reports_what_its_heads_hold(void **state)
{
    (void)state;
    tiny_options o;
    fx_shape(&o, GGML_TYPE_F32);
    kvs_model *m = fx_open(&o, 2, 0);
    assert_non_null(m);
    static const char *const policies[] = {"streaming:keep=60tok +protect=none", "knorm:keep=60tok +protect=none"};
    for (uint32_t c = 0; c < 2; c++) {
        kvs_session_options so;
        kvs_session_options_default(&so);
        so.policy = policies[c];
        so.budget_tokens = 300;
        kvs_session *s = fx_session(m, &so);
        assert_non_null(s);
        int32_t tokens[200], needles[20];
        fx_tokens(7, tokens, 200);
        for (int32_t i = 0; i < 20; i++)
            needles[i] = 90 + i;
        kvs_error err = {.message = ""};
        assert_int_equal(kvs_session_extend(s, tokens, NULL, 200, NULL, &err), KVS_OK);
        kvs_keep_report r;
        assert_int_equal(kvs_keep_report_make(m, s, needles, 20, &r, &err), KVS_OK);
        assert_true(r.ger == 0 && r.ger_layer_max == 0 && r.head_consensus == 1 && r.n_layers == 2);
        kvs_keep_report_free(&r);
        assert_int_equal(kvs_session_evict(s, 0, &err), KVS_OK);
        assert_int_equal(kvs_keep_report_make(m, s, needles, 20, &r, &err), KVS_OK);
        if (c == 0) /* one set for all: what is gone is gone everywhere */
            assert_true(r.ger == 1 && r.ger_layer_max == 1 && r.head_consensus == 1);
        else
            assert_true(r.ger <= r.ger_layer_max && r.ger_l[0] <= r.ger_layer_max && r.head_consensus < 1);
        kvs_keep_report_free(&r);
        assert_int_equal(kvs_keep_report_make(m, s, NULL, 0, &r, &err), KVS_OK);
        assert_true(isnan(r.ger) && isnan(r.ger_layer_max));
        kvs_keep_report_free(&r);
        kvs_session_free(&s);
    }
    kvs_model_close(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(both_equal_their_definitions),
        cmocka_unit_test(limits_are_what_the_paper_says),
        cmocka_unit_test(random_eviction_is_as_expected),
        cmocka_unit_test(a_session_reports_what_its_heads_hold),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Reported numbers against hand-computed ones: token scores, footprint, times, degeneration, recall, health. */
#include "eval/degeneration.h"
#include "eval/metrics.h"
#include "eval/recall.h"
#include "session/health.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const double TINY = 1e-14; /* a few roundings of numbers near 1 */

static void near(double a, double b)
{
    if (!(fabs(a - b) <= TINY * fmax(1.0, fabs(b))))
        fail_msg("%.17g is not %.17g", a, b);
}

/* ---- token scores ---- */

static kvs_token_score score(double nll, double nll_ref, double kl, double entropy)
{
    return (kvs_token_score){.nll = nll, .nll_ref = nll_ref, .kl = kl, .entropy_ref = entropy, .top5 = 1.0};
}

static void test_summary_of_five_tokens(void **state)
{
    (void)state;
    kvs_scores log;
    kvs_score_summary s;
    kvs_scores_init(&log, true, NULL);
    const double kl[5] = {0.4, 0.1, 0.0, 0.2, 0.3};
    for (int i = 0; i < 5; i++) {
        kvs_token_score t = score(1.0 + i, 0.5 + i, kl[i], (double)i);
        t.top1 = i < 3;
        t.delta_p = i == 0 ? 0.3 : 0.0;
        t.jsd = 0.05 * i;
        t.turn = i < 2 ? 0 : 1;
        t.sets = i == 4 ? KVS_SCORE_ASSISTANT | KVS_SCORE_KEY : KVS_SCORE_ASSISTANT;
        assert_int_equal(kvs_scores_add(&log, &t, NULL), KVS_OK);
    }
    assert_int_equal(kvs_scores_finish(&log, 0, KVS_SCORE_ALL_TURNS, &s, NULL), KVS_OK);
    assert_int_equal(s.n, 5);
    near(s.nll, 3.0);
    near(s.ppl, exp(3.0));
    near(s.ppl_ratio, exp(0.5));
    near(s.kl_mean, 0.2);
    near(s.kl_median, 0.2);
    near(s.kl_p95, 0.38); /* order statistics 0 .1 .2 .3 .4 at 4 * 0.95 = 3.8 */
    near(s.kl_p99, 0.396);
    near(s.kl_max, 0.4);
    near(s.jsd, 0.1);
    near(s.top1, 0.6);
    near(s.top5, 1.0);
    near(s.rms_delta_p, sqrt(0.09 / 5));
    assert_int_equal(kvs_scores_finish(&log, KVS_SCORE_KEY, KVS_SCORE_ALL_TURNS, &s, NULL), KVS_OK);
    assert_true(s.n == 1 && s.nll == 5.0);
    assert_int_equal(kvs_scores_finish(&log, KVS_SCORE_ASSISTANT, 0, &s, NULL), KVS_OK);
    assert_true(s.n == 2 && s.nll == 1.5 && s.kl_mean == 0.25);
    assert_int_equal(kvs_scores_finish(&log, KVS_SCORE_AFTER_EVICTION, 0, &s, NULL), KVS_OK);
    assert_true(s.n == 0 && isnan(s.nll) && isnan(s.kl_mean) && isnan(s.delta_nll[0]));
    kvs_scores_free(&log);
}

static void test_entropy_strata_are_quartiles(void **state)
{
    (void)state;
    kvs_scores log;
    kvs_score_summary s;
    kvs_scores_init(&log, true, NULL);
    for (int i = 8; i >= 0; i--) { /* entropies 0..8, delta NLL 1 for the lowest two, 0.1 else */
        const kvs_token_score t = score(i < 2 ? 2.0 : 1.1, 1.0, 0.0, (double)i);
        assert_int_equal(kvs_scores_add(&log, &t, NULL), KVS_OK);
    }
    assert_int_equal(kvs_scores_finish(&log, 0, KVS_SCORE_ALL_TURNS, &s, NULL), KVS_OK);
    near(s.entropy_edge[0], 2.0); /* an edge belongs to the stratum above it */
    near(s.entropy_edge[1], 4.0);
    near(s.entropy_edge[2], 6.0);
    for (int q = 0; q < 4; q++) {
        assert_int_equal(s.n_stratum[q], q == 3 ? 3 : 2);
        near(s.delta_nll[q], q == 0 ? 1.0 : 0.1);
    }
    kvs_scores_free(&log);
}

static void test_negative_kl_is_clipped_counted_or_refused(void **state)
{
    (void)state;
    kvs_scores log;
    kvs_error err;
    kvs_scores_init(&log, true, NULL);
    kvs_token_score t = score(1, 1, -1e-7, 1);
    assert_int_equal(kvs_scores_add(&log, &t, &err), KVS_OK);
    assert_true(log.n == 1 && log.n_clipped == 1 && log.items[0].kl == 0.0);
    t.kl = -1e-5;
    assert_int_equal(kvs_scores_add(&log, &t, &err), KVS_EINVAL);
    t.kl = 0.0;
    t.nll = INFINITY;
    assert_int_equal(kvs_scores_add(&log, &t, &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "token 1"));
    assert_int_equal(log.n, 1);
    kvs_scores_free(&log);
}

static void test_merge_equals_adding_in_order(void **state)
{
    (void)state;
    kvs_scores whole, part[2], plain;
    kvs_scores_init(&whole, true, NULL);
    kvs_scores_init(&part[0], true, NULL);
    kvs_scores_init(&part[1], true, NULL);
    kvs_scores_init(&plain, false, NULL);
    kvs_rng rng = {1};
    for (int i = 0; i < 700; i++) { /* past the first growth of the log */
        const double ref = kvs_rng_double(&rng);
        const kvs_token_score t = score(ref + kvs_rng_double(&rng), ref, kvs_rng_double(&rng), kvs_rng_double(&rng));
        assert_int_equal(kvs_scores_add(&whole, &t, NULL), KVS_OK);
        assert_int_equal(kvs_scores_add(&part[i >= 300], &t, NULL), KVS_OK);
    }
    assert_int_equal(kvs_scores_merge(&part[0], &part[1], NULL), KVS_OK);
    kvs_score_summary a, b;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    assert_int_equal(kvs_scores_finish(&whole, 0, KVS_SCORE_ALL_TURNS, &a, NULL), KVS_OK);
    assert_int_equal(kvs_scores_finish(&part[0], 0, KVS_SCORE_ALL_TURNS, &b, NULL), KVS_OK);
    assert_memory_equal(&a, &b, sizeof a);
    assert_int_equal(kvs_scores_merge(&part[0], &plain, NULL), KVS_EINVAL);
    const kvs_token_score t = {.nll = 2.0, .kl = NAN};
    assert_int_equal(kvs_scores_add(&plain, &t, NULL), KVS_OK); /* without a reference KL is not looked at */
    assert_int_equal(kvs_scores_finish(&plain, 0, KVS_SCORE_ALL_TURNS, &a, NULL), KVS_OK);
    assert_true(a.nll == 2.0 && isnan(a.kl_mean) && isnan(a.ppl_ratio));
    kvs_scores_free(&whole);
    kvs_scores_free(&part[0]);
    kvs_scores_free(&part[1]);
    kvs_scores_free(&plain);
}

static void test_score_of_a_pair(void **state)
{
    (void)state;
    /* p = (1/4, 3/4) from logits (0, ln 3), q = (1/2, 1/2) from (0, 0); x is token 1 */
    const kvs_dist_pair pair = {.kl = 0.1, .lse_p = log(4.0), .lse_q = log(2.0), .argmax_p = 1, .argmax_q = 0};
    const kvs_token_score t = kvs_token_score_of(&pair, logf(3.0f), 0.0f);
    near(t.nll, log(2.0));
    assert_true(fabs(t.nll_ref - log(4.0 / 3.0)) < 1e-7); /* ln 3 given as f32 */
    assert_true(fabs(t.delta_p + 0.25) < 1e-7);
    assert_false(t.top1);
    assert_true(isnan(t.top5));
    assert_true(kvs_score_is_key(4.1, 2.0 - 1e-9) && !kvs_score_is_key(3.9, 1.95) && !kvs_score_is_key(9.0, 2.0));
}

static void test_top_overlap_breaks_ties_low(void **state)
{
    (void)state;
    const float p[8] = {5, 1, 4, 3, 2, 0, 0, 0}, q[8] = {0, 0, 4, 3, 2, 5, 1, 0}, flat[8] = {0};
    near(kvs_top_overlap(p, q, 8, 5), 3.0 / 5); /* {0,2,3,4,1} and {5,2,3,4,6} */
    near(kvs_top_overlap(p, p, 8, 5), 1.0);
    near(kvs_top_overlap(p, flat, 8, 5), 1.0); /* flat's top five are 0..4 */
    near(kvs_top_overlap(q, flat, 8, 2), 0.0);
    near(kvs_top_overlap(p, q, 2, 5), 1.0); /* k is cut to n */
    const float late[3] = {1, 1, 5}, plain[3] = {4, 0, 5};
    near(kvs_top_overlap(late, plain, 3, 2), 1.0); /* a later maximum pushes out the higher index of a tie */
}

/* ---- memory and time ---- */

static void test_footprint_of_full_and_capped_caches(void **state)
{
    (void)state;
    kvs_footprint full = {0}, capped = {0};
    double footprint, peak;
    for (uint64_t t = 1; t <= 100; t++) {
        kvs_footprint_add(&full, 90 * t);
        kvs_footprint_add(&capped, 90 * (t < 10 ? t : 10));
    }
    kvs_footprint_finish(&full, 90, &footprint, &peak);
    assert_true(footprint == 1.0 && peak == 1.0);
    kvs_footprint_finish(&capped, 90, &footprint, &peak);
    near(footprint, (55.0 + 90 * 10) / 5050.0);
    near(peak, 0.1);
    kvs_footprint_finish(&(kvs_footprint){0}, 90, &footprint, &peak);
    assert_true(isnan(footprint) && isnan(peak));
    kvs_footprint figure = {0}; /* arXiv:2506.17121, figure 1: 26 of 36 cells over eight steps */
    for (uint64_t t = 1; t <= 8; t++)
        kvs_footprint_add(&figure, t < 4 ? t : 4);
    kvs_footprint_finish(&figure, 1, &footprint, &peak);
    near(footprint, 26.0 / 36.0);
    near(peak, 0.5);
    near(kvs_overshoot(150, 100), 0.5);
    near(kvs_overshoot(90, 100), -0.1);
    assert_true(isnan(kvs_overshoot(1, 0)));
}

static void test_times(void **state)
{
    (void)state;
    const double ms[5] = {5, 1, 4, 2, 3};
    double scratch[5];
    kvs_time_summary t;
    kvs_time_summarise(ms, 5, scratch, &t);
    assert_true(t.median == 3 && t.q1 == 2 && t.q3 == 4 && t.iqr == 2 && t.min == 1 && t.max == 5 && t.mean == 3);
    near(t.p95, 4.8);
    kvs_time_summarise(ms, 0, scratch, &t);
    assert_true(isnan(t.median) && isnan(t.iqr));
    near(kvs_tpot_ms(1000000, 10000000, 10), 1.0);
    assert_true(isnan(kvs_tpot_ms(5, 9, 1)));
}

/* ---- degeneration ---- */

static kvs_degeneration degeneration(const int32_t *y, size_t n, const int32_t *user, size_t n_user)
{
    kvs_degeneration d;
    assert_int_equal(kvs_degeneration_measure(y, n, user, n_user, NULL, &d, NULL), KVS_OK);
    return d;
}

static void test_repetition_of_known_texts(void **state)
{
    (void)state;
    int32_t y[200];
    for (int i = 0; i < 200; i++)
        y[i] = i;
    kvs_degeneration d = degeneration(y, 200, NULL, 0);
    assert_true(d.valid && d.rep[0] == 0.0 && d.rep[3] == 0.0 && !d.looped && d.max_run == 1 && d.period == 0);
    assert_true(d.longest_repeat == 0.0 && isnan(d.prompt_echo));
    for (int i = 0; i < 200; i++)
        y[i] = 7;
    d = degeneration(y, 200, NULL, 0);
    near(d.rep[0], 1.0 - 1.0 / 200);
    near(d.rep[3], 1.0 - 1.0 / 197);
    assert_true(d.looped && d.max_run == 200 && d.period == 1 && d.longest_repeat == 199.0 / 200);
    for (int i = 0; i < 200; i++)
        y[i] = i % 10;
    d = degeneration(y, 200, NULL, 0);
    near(d.rep[0], 1.0 - 10.0 / 200);
    near(d.rep[1], 1.0 - 10.0 / 199);
    assert_true(d.looped && d.max_run == 1 && d.period == 10 && d.longest_repeat == 190.0 / 200);
    d = degeneration(y, 31, NULL, 0);
    assert_true(!d.valid && isnan(d.rep[0]) && !d.looped);
}

/* Every figure by the definition, on random texts of few words. */
static void test_repetition_equals_counting(void **state)
{
    (void)state;
    kvs_rng rng = {9};
    for (int trial = 0; trial < 20; trial++) {
        int32_t y[150];
        const uint32_t n = 32 + kvs_rng_below(&rng, 118), words = 1 + kvs_rng_below(&rng, 6);
        for (uint32_t i = 0; i < n; i++)
            y[i] = (int32_t)kvs_rng_below(&rng, words) - 2; /* ids below 0 must sort too */
        uint32_t longest = 0;
        for (uint32_t i = 0; i < n; i++) {
            for (uint32_t j = i + 1; j < n; j++) {
                uint32_t length = 0;
                while (j + length < n && y[i + length] == y[j + length])
                    length++;
                longest = length > longest ? length : longest;
            }
        }
        const kvs_degeneration d = degeneration(y, n, NULL, 0);
        near(d.longest_repeat, (double)longest / n);
        for (uint32_t k = 1; k <= 4; k++) {
            uint32_t unique = 0;
            for (uint32_t i = 0; i + k <= n; i++) {
                bool seen = false;
                for (uint32_t j = 0; j < i; j++)
                    seen = seen || memcmp(y + i, y + j, k * sizeof *y) == 0;
                unique += !seen;
            }
            near(d.distinct[k - 1], (double)unique / (n - k + 1));
        }
    }
}

static void test_period_needs_nine_tenths_of_the_tail(void **state)
{
    (void)state;
    int32_t y[300];
    for (int i = 0; i < 300; i++)
        y[i] = i < 150 ? 1000 + i : i % 3;
    for (int i = 0; i < 6; i++)
        y[180 + 20 * i] = 5000 + i; /* each spoils two comparisons: 12 of 128 is 9.4 % */
    assert_int_equal(degeneration(y, 300, NULL, 0).period, 3);
    y[175] = 6000; /* 14 of 128 is 10.9 % */
    assert_int_equal(degeneration(y, 300, NULL, 0).period, 0);
    for (int i = 0; i < 40; i++)
        y[i] = i % 20;
    assert_int_equal(degeneration(y, 40, NULL, 0).period, 0); /* half the text has nothing before it */
}

static void test_prompt_echo(void **state)
{
    (void)state;
    int32_t y[40], user[20];
    for (int i = 0; i < 40; i++)
        y[i] = i;
    for (int i = 0; i < 20; i++)
        user[i] = 10 + i; /* 17 of the text's 37 4-grams */
    near(degeneration(y, 40, user, 20).prompt_echo, 17.0 / 37);
    near(degeneration(y, 40, y, 40).prompt_echo, 1.0);
    near(degeneration(y, 40, user, 3).prompt_echo, 0.0);
}

static void test_trajectory_and_bytes(void **state)
{
    (void)state;
    const int32_t a[4] = {1, 2, 3, 4}, b[3] = {1, 2, 9};
    near(kvs_trajectory_agreement(a, 4, b, 3), 0.5);
    near(kvs_trajectory_agreement(a, 4, a, 4), 1.0);
    near(kvs_trajectory_agreement(a, 4, a, 2), 0.5);
    near(kvs_trajectory_agreement(a, 0, a, 0), 1.0);
    near(kvs_trajectory_agreement(a, 0, a, 1), 0.0);
    near(kvs_invalid_utf8("h\xC3\xA9", 3), 0.0);
    near(kvs_invalid_utf8("h\xC3", 2), 1.0);
    near(kvs_replacement_rate("a\xEF\xBF\xBD", 4), 0.25);
}

/* ---- recall ---- */

static void expect_normal(const char *text, const char *expected)
{
    char out[100];
    const size_t length = kvs_recall_normalise(text, strlen(text), out);
    assert_string_equal(out, expected);
    assert_int_equal(length, strlen(expected));
}

static void test_normalisation(void **state)
{
    (void)state;
    expect_normal("  The  Paint-Colour, is: an OLIVE  green!  ", "paint colour is olive green");
    expect_normal("It's 1,024.5; (about)", "its 1024.5 about");
    expect_normal("a the an", "");
    expect_normal("theatre and another", "theatre and another");
    expect_normal("Zo\xC3\xAB.", "zo\xC3\xAB");
    expect_normal("", "");
    expect_normal("end a", "end");
}

static void test_recall_hit_and_confusers(void **state)
{
    (void)state;
    const char *values[] = {"the olive green", "42"}, *confusers[] = {"navy"}, *empty[] = {"the ..."};
    kvs_recall_result r;
    kvs_error err;
    const char *both = "It is Olive-green, number 42.", *one = "Olive green; 421?", *mixed = "olive green 42 or navy";
    assert_int_equal(kvs_recall_score(both, strlen(both), values, 2, confusers, 1, NULL, &r, &err), KVS_OK);
    assert_true(r.hit && r.fraction == 1.0 && !r.wrong_binding);
    assert_int_equal(kvs_recall_score(one, strlen(one), values, 2, confusers, 1, NULL, &r, &err), KVS_OK);
    assert_true(!r.hit && r.fraction == 0.5 && !r.wrong_binding); /* 421 does not hold the word 42 */
    assert_int_equal(kvs_recall_score(mixed, strlen(mixed), values, 2, confusers, 1, NULL, &r, &err), KVS_OK);
    assert_true(!r.hit && r.fraction == 1.0 && r.wrong_binding);
    assert_int_equal(kvs_recall_score(both, strlen(both), empty, 1, NULL, 0, NULL, &r, &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "the ..."));
    assert_int_equal(kvs_recall_score(both, strlen(both), values, 0, NULL, 0, NULL, &r, &err), KVS_EINVAL);
}

static void test_forced_choice_normalises_by_length(void **state)
{
    (void)state;
    const double logprob[3] = {-6.0, -2.5, -9.0};
    const uint32_t n_tokens[3] = {6, 2, 3}, none[3] = {6, 0, 3};
    kvs_choice c;
    assert_int_equal(kvs_recall_choice(logprob, n_tokens, 3, 0, &c, NULL), KVS_OK);
    assert_true(c.correct && c.margin == 0.25 && c.gold_logprob == -1.0);
    assert_int_equal(kvs_recall_choice(logprob, n_tokens, 3, 2, &c, NULL), KVS_OK);
    assert_true(!c.correct && c.margin == -2.0);
    assert_int_equal(kvs_recall_choice(logprob, none, 3, 0, &c, NULL), KVS_EINVAL);
    assert_int_equal(kvs_recall_choice(logprob, n_tokens, 3, 3, &c, NULL), KVS_EINVAL);
}

static void test_survival_and_retention(void **state)
{
    (void)state;
    const uint32_t held_in[4] = {90, 45, 0, 0};
    double survival, erased;
    kvs_recall_survival(held_in, 4, 90, &survival, &erased);
    assert_true(survival == 0.375 && erased == 0.5);
    const uint8_t policy[5] = {1, 1, 0, 1, 0}, full[5] = {1, 1, 1, 0, 0}, never[5] = {0};
    near(kvs_recall_retention(policy, full, 5), 2.0 / 3);
    assert_true(isnan(kvs_recall_retention(policy, never, 5)));
}

/* ---- health ---- */

static void test_health_of_a_whole_cache_is_100(void **state)
{
    (void)state;
    const kvs_positions p = {.prefix = 1.0, .template_integrity = 1.0, .mass_lost = -1.0};
    kvs_health_inputs in;
    kvs_health_weights w;
    kvs_health h;
    kvs_health_priors(&w);
    kvs_health_gather(&p, KVS_POSITION_KEEP, 100, 100, 8192, &in);
    kvs_health_compute(&in, &w, &h);
    assert_true(h.score == 100.0 && h.predicted == 0.0 && h.alarms == 0 && !h.calibrated && in.mass_unknown);
    assert_string_equal(h.worst, "none");
}

static void test_health_weighs_and_names_the_worst_term(void **state)
{
    (void)state;
    const kvs_positions p = {.future = 0.155,
                             .collision = 0.0109,
                             .order = 0.0033,
                             .backward = 0.25,
                             .seam = 0.1,
                             .mass_lost = 0.01,
                             .sinks_lost = 0.0,
                             .recent_lost = 0.5,
                             .template_integrity = 0.9,
                             .out_of_window = 0.0};
    kvs_health_inputs in;
    kvs_health_weights w;
    kvs_health h;
    kvs_health_priors(&w);
    kvs_health_gather(&p, KVS_POSITION_ROLLBACK, 7782, 9000, 8192, &in);
    kvs_health_compute(&in, &w, &h);
    const double window = (7782.0 / 8192 - 0.9) / 0.1;
    const double predicted =
        4 * 0.155 + 2 * 0.0109 + 4 * 0.0033 + 2 * 0.25 + window + 2 * 0.01 + 0.5 + 0.5 * 0.1 + 0.5 * (1 - 0.9);
    near(h.predicted, predicted);
    near(h.score / 100, exp(-predicted));
    assert_string_equal(h.worst, "future");
    assert_int_equal(h.alarms, KVS_ALARM_FUTURE | KVS_ALARM_BACKWARD); /* past the window, but not in keep */
    in.over_budget = true;
    in.term[KVS_HEALTH_SEAM] = NAN;
    kvs_health_compute(&in, &w, &h);
    assert_true(isfinite(h.score) && (h.alarms & KVS_ALARM_NAN) && (h.alarms & KVS_ALARM_BUDGET));
    near(h.predicted, predicted + 0.5 * 0.9); /* counted as 1 */
    kvs_health_gather(&p, KVS_POSITION_KEEP, 9000, 8192, 8192, &in);
    kvs_health_compute(&in, &w, &h);
    assert_true(in.term[KVS_HEALTH_WINDOW] == 1.0 && (h.alarms & KVS_ALARM_WINDOW));
    kvs_health_gather(&p, KVS_POSITION_KEEP, 9000, 8191, 8192, &in);
    kvs_health_compute(&in, &w, &h);
    assert_false(h.alarms & KVS_ALARM_WINDOW);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_summary_of_five_tokens),
        cmocka_unit_test(test_entropy_strata_are_quartiles),
        cmocka_unit_test(test_negative_kl_is_clipped_counted_or_refused),
        cmocka_unit_test(test_merge_equals_adding_in_order),
        cmocka_unit_test(test_score_of_a_pair),
        cmocka_unit_test(test_top_overlap_breaks_ties_low),
        cmocka_unit_test(test_footprint_of_full_and_capped_caches),
        cmocka_unit_test(test_times),
        cmocka_unit_test(test_repetition_of_known_texts),
        cmocka_unit_test(test_repetition_equals_counting),
        cmocka_unit_test(test_period_needs_nine_tenths_of_the_tail),
        cmocka_unit_test(test_prompt_echo),
        cmocka_unit_test(test_trajectory_and_bytes),
        cmocka_unit_test(test_normalisation),
        cmocka_unit_test(test_recall_hit_and_confusers),
        cmocka_unit_test(test_forced_choice_normalises_by_length),
        cmocka_unit_test(test_survival_and_retention),
        cmocka_unit_test(test_health_of_a_whole_cache_is_100),
        cmocka_unit_test(test_health_weighs_and_names_the_worst_term),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

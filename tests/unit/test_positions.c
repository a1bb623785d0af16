/* Position modes and indices: closed forms for hand-made sets, the rules each mode must keep, and the position history
 * of arXiv 2511.04686's script replayed without a model (docs/metrics.md, "What rollback does"). */
#include "cache/positions.h"
#include "cache/turns.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { CAP = 6000, WINDOW = 8192, N_FREQ = 32 };

/* One head's arrays and the query to come: what a cache would hold. */
typedef struct head {
    int32_t pos[CAP], rope[CAP];
    uint32_t n;
    int32_t true_next, rope_next;
    kvs_positions_ring ring;
} head;

static int32_t scratch_a[CAP], scratch_b[CAP];
static double theta[N_FREQ];

static void fill_theta(void)
{
    for (int i = 0; i < N_FREQ; i++)
        theta[i] = pow(1e5, -2.0 * i / (2.0 * N_FREQ));
}

static void say(head *h)
{
    h->pos[h->n] = h->true_next++;
    h->rope[h->n++] = h->rope_next;
    kvs_positions_ring_push(&h->ring, h->rope_next++);
}

static head *prefilled(uint32_t n)
{
    head *h = calloc(1, sizeof *h);
    assert_non_null(h);
    for (uint32_t j = 0; j < n; j++)
        say(h);
    return h;
}

/* Keeps [0, first) and the last `last` slots, then assigns positions. */
static void evict_middle(head *h, uint32_t first, uint32_t last, kvs_position_mode mode, int32_t gap_cap)
{
    memmove(h->pos + first, h->pos + h->n - last, last * sizeof *h->pos);
    memmove(h->rope + first, h->rope + h->n - last, last * sizeof *h->rope);
    h->n = first + last;
    kvs_positions_assign(mode, gap_cap, h->pos, h->rope, h->n, h->true_next, h->rope, &h->rope_next);
}

/* Drops uniformly chosen slots (selection sampling keeps the order). */
static void evict_random(head *h, uint32_t n_keep, kvs_rng *rng, kvs_position_mode mode)
{
    uint32_t kept = 0;
    for (uint32_t j = 0; j < h->n; j++) {
        if (kvs_rng_below(rng, h->n - j) < n_keep - kept) {
            h->pos[kept] = h->pos[j];
            h->rope[kept++] = h->rope[j];
        }
    }
    assert_int_equal(kept, n_keep);
    h->n = kept;
    kvs_positions_assign(mode, 1, h->pos, h->rope, h->n, h->true_next, h->rope, &h->rope_next);
}

static kvs_positions_indices measure(const head *h, const double *weight)
{
    const kvs_positions_view view = {.pos = h->pos,
                                     .rope_pos = h->rope,
                                     .n = h->n,
                                     .true_next = h->true_next,
                                     .rope_next = h->rope_next,
                                     .window_tokens = WINDOW,
                                     .theta = theta,
                                     .n_freq = N_FREQ,
                                     .weight = weight,
                                     .ring = &h->ring};
    kvs_positions_indices out;
    kvs_positions_measure(&view, scratch_a, scratch_b, &out);
    return out;
}

/* Definitions of evaluation section 3.6 written out with no shortcut, for comparison. */
static kvs_positions_indices measure_plainly(const head *h, const double *weight)
{
    kvs_positions_indices out = {0};
    double total = 0.0;
    uint64_t inversions = 0;
    uint32_t repeats = 0;
    for (uint32_t j = 0; j < h->n; j++)
        total += weight ? weight[j] : 1.0;
    for (uint32_t j = 0; j < h->n; j++) {
        const double w = (weight ? weight[j] : 1.0) / total;
        const double d = h->rope_next - h->rope[j], true_d = h->true_next - h->pos[j];
        double mean_cos = 0.0;
        for (int i = 0; i < N_FREQ; i++)
            mean_cos += cos(theta[i] * (d - true_d)) / N_FREQ;
        out.ldd += w * fabs(log2((1.0 + fabs(d)) / (1.0 + true_d)));
        out.rddi += w * (1.0 - mean_cos);
        out.future += d < 0 ? w : 0.0;
        out.out_of_window += d >= WINDOW ? w : 0.0;
        bool seen = false;
        for (uint32_t i = 0; i < j; i++) {
            inversions += h->rope[i] > h->rope[j];
            seen = seen || h->rope[i] == h->rope[j];
        }
        repeats += seen;
    }
    out.collision = (double)repeats / h->n;
    out.order = (double)inversions / (0.5 * h->n * (h->n - 1.0));
    return out;
}

/* ---- assignment ---- */

static void test_modes_stand_where_documented(void **state)
{
    (void)state;
    const int32_t pos[] = {0, 1, 5, 6, 40}, old[] = {0, 1, 5, 6, 40};
    int32_t now[5], next;
    kvs_positions_assign(KVS_POSITION_ROLLBACK, 0, pos, old, 5, 50, now, &next);
    assert_memory_equal(now, old, sizeof now);
    assert_int_equal(next, 5);
    kvs_positions_assign(KVS_POSITION_KEEP, 0, pos, old, 5, 50, now, &next);
    assert_memory_equal(now, old, sizeof now);
    assert_int_equal(next, 50);
    const int32_t ranks[] = {0, 1, 2, 3, 4}, capped[] = {0, 1, 4, 5, 8};
    kvs_positions_assign(KVS_POSITION_REROTATE, 0, pos, old, 5, 50, now, &next);
    assert_memory_equal(now, ranks, sizeof now);
    assert_int_equal(next, 5);
    kvs_positions_assign(KVS_POSITION_RECOMPUTE, 0, pos, old, 5, 50, now, &next);
    assert_memory_equal(now, ranks, sizeof now);
    kvs_positions_assign(KVS_POSITION_GAPCAP, 3, pos, old, 5, 50, now, &next);
    assert_memory_equal(now, capped, sizeof now);
    assert_int_equal(next, 11);
}

static void test_gapcap_bounds_are_rerotate_and_keep(void **state)
{
    (void)state;
    kvs_rng rng = {11};
    head *h = prefilled(500);
    evict_random(h, 300, &rng, KVS_POSITION_KEEP);
    h->pos[0] = 0; /* the equality with ranks is promised for a kept first token */
    int32_t a[CAP], b[CAP], next_a, next_b;
    kvs_positions_assign(KVS_POSITION_GAPCAP, 1, h->pos, h->rope, h->n, 500, a, &next_a);
    kvs_positions_assign(KVS_POSITION_REROTATE, 0, h->pos, h->rope, h->n, 500, b, &next_b);
    assert_memory_equal(a, b, h->n * sizeof *a);
    assert_int_equal(next_a, next_b);
    kvs_positions_assign(KVS_POSITION_GAPCAP, INT32_MAX, h->pos, h->rope, h->n, 500, a, &next_a);
    assert_memory_equal(a, h->pos, h->n * sizeof *a);
    assert_int_equal(next_a, 500);
    kvs_positions_assign(KVS_POSITION_GAPCAP, 7, h->pos, h->rope, 0, 500, a, &next_a);
    assert_int_equal(next_a, 7);
    free(h);
}

/* ---- indices ---- */

static void test_indices_of_a_hand_made_head(void **state)
{
    (void)state;
    fill_theta();
    head *h = calloc(1, sizeof *h);
    const int32_t pos[] = {0, 1, 10, 11, 12}, rope[] = {0, 1, 10, 3, 3};
    memcpy(h->pos, pos, sizeof pos);
    memcpy(h->rope, rope, sizeof rope);
    h->n = 5;
    h->true_next = 13;
    h->rope_next = 4;
    const kvs_positions_indices x = measure(h, NULL);
    /* distances: true 13 12 3 2 1, effective 4 3 -6 1 1 */
    const double ldd = (log2(14.0 / 5) + log2(13.0 / 4) + log2(7.0 / 4) + log2(3.0 / 2) + 0.0) / 5;
    assert_true(fabs(x.ldd - ldd) < 1e-14);
    assert_true(x.future == 1.0 / 5);
    assert_true(x.collision == 1.0 - 4.0 / 5);
    assert_true(x.order == 2.0 / 10); /* 10 stands before 3 and 3 */
    assert_true(x.gap == 1.0 - 5.0 / 13);
    assert_true(x.seam == 1.0 / 4);
    assert_true(x.adjacency == 2.0 / 4); /* 10 -> 3 and 3 -> 3 */
    assert_true(x.prefix == 3.0 / 5);
    assert_true(x.sinks_lost == 0.0);
    assert_true(fabs(x.recent_lost - (1.0 - 5.0 / 13)) < 1e-15);
    assert_int_equal(x.distance_max, 4);
    assert_int_equal(x.rope_max, 10);
    free(h);
}

/* Same sums in another order: 64-bit rounding of at most 5,000 terms, each at most 14 (ldd) or 2. */
static void test_fast_indices_equal_the_definitions(void **state)
{
    (void)state;
    fill_theta();
    kvs_rng rng = {5};
    head *h = prefilled(900);
    double *weight = calloc(CAP, sizeof *weight);
    for (int round = 0; round < 4; round++) {
        evict_random(h, h->n * 3 / 4, &rng, KVS_POSITION_ROLLBACK);
        for (int i = 0; i < 60; i++)
            say(h);
        for (uint32_t j = 0; j < h->n; j++)
            weight[j] = kvs_rng_double(&rng);
        for (int weighted = 0; weighted < 2; weighted++) {
            const kvs_positions_indices fast = measure(h, weighted ? weight : NULL);
            const kvs_positions_indices plain = measure_plainly(h, weighted ? weight : NULL);
            const double bound = 5000 * 14 * 2.3e-16;
            assert_true(fabs(fast.ldd - plain.ldd) < bound);
            assert_true(fabs(fast.rddi - plain.rddi) < bound);
            assert_true(fabs(fast.future - plain.future) < bound);
            assert_true(fast.out_of_window == plain.out_of_window);
            assert_true(fabs(fast.collision - plain.collision) < bound);
            assert_true(fabs(fast.order - plain.order) < bound);
            assert_true(fast.future > 0.0 && fast.order > 0.0);
        }
    }
    free(weight);
    free(h);
}

static void test_uniform_weights_equal_no_weights(void **state)
{
    (void)state;
    fill_theta();
    head *h = prefilled(1000);
    evict_middle(h, 100, 300, KVS_POSITION_ROLLBACK, 0);
    double *weight = calloc(CAP, sizeof *weight);
    const kvs_positions_indices none = measure(h, NULL), zero = measure(h, weight);
    assert_memory_equal(&none, &zero, sizeof none);
    for (uint32_t j = 0; j < h->n; j++)
        weight[j] = 2.0; /* a power of two scales every sum exactly */
    const kvs_positions_indices two = measure(h, weight);
    assert_true(two.future == none.future && two.ldd == none.ldd && two.rddi == none.rddi);
    /* all attention on the newest slot, which rollback left ahead of the query */
    memset(weight, 0, CAP * sizeof *weight);
    weight[h->n - 1] = 1.0;
    assert_true(measure(h, weight).future == 1.0);
    free(weight);
    free(h);
}

/* The sanity table of section 3.6: one eviction from a gap-free cache. */
static void test_one_eviction_in_each_mode(void **state)
{
    (void)state;
    fill_theta();
    for (int prefix_set = 0; prefix_set < 2; prefix_set++) {
        for (int mode = 0; mode < KVS_POSITION_RECOMPUTE; mode++) {
            head *h = prefilled(3000);
            evict_middle(h, 1000, prefix_set ? 0 : 500, (kvs_position_mode)mode, 16);
            const kvs_positions_indices x = measure(h, NULL);
            if (mode == KVS_POSITION_KEEP)
                assert_true(x.ldd == 0.0 && x.rddi == 0.0 && x.adjacency == 0.0 && x.prefix == 1.0);
            if (mode != KVS_POSITION_ROLLBACK || prefix_set)
                assert_true(x.future == 0.0 && x.order == 0.0 && x.collision == 0.0 && x.out_of_window == 0.0);
            else
                assert_true(x.future > 0.0);
            if (mode == KVS_POSITION_REROTATE)
                assert_true(x.rddi > 0.0 && x.rddi <= 2.0 && x.ldd > 0.0);
            free(h);
        }
    }
}

/* Equal distortion for every key (theorem of section 1.6): a prefix set gives the same arrays in both modes. */
static void test_rollback_is_rerotation_only_for_a_prefix(void **state)
{
    (void)state;
    for (int prefix_set = 0; prefix_set < 2; prefix_set++) {
        head *a = prefilled(2000), *b = prefilled(2000);
        evict_middle(a, 700, prefix_set ? 0 : 1, KVS_POSITION_ROLLBACK, 0);
        evict_middle(b, 700, prefix_set ? 0 : 1, KVS_POSITION_REROTATE, 0);
        assert_int_equal(a->rope_next, b->rope_next);
        assert_int_equal(memcmp(a->rope, b->rope, a->n * sizeof *a->rope) == 0, prefix_set);
        free(a);
        free(b);
    }
}

static void test_out_of_window_counts_far_keys(void **state)
{
    (void)state;
    head *h = prefilled(1000);
    h->true_next = h->rope_next = WINDOW + 100; /* keys 0..100 are a window or more away */
    assert_true(measure(h, NULL).out_of_window == 101.0 / 1000);
    assert_int_equal(measure(h, NULL).distance_max, WINDOW + 100);
    free(h);
}

static void test_an_empty_head_is_defined(void **state)
{
    (void)state;
    head *h = calloc(1, sizeof *h);
    kvs_positions_indices x = measure(h, NULL);
    assert_true(x.prefix == 1.0 && x.sinks_lost == 0.0 && x.recent_lost == 0.0 && x.ldd == 0.0);
    h->true_next = 10;
    x = measure(h, NULL);
    assert_true(x.sinks_lost == 1.0 && x.recent_lost == 1.0 && x.gap == 0.0);
    free(h);
}

static void test_ring_forgets_after_64_insertions(void **state)
{
    (void)state;
    kvs_positions_ring ring = {0};
    assert_true(kvs_positions_ring_rate(&ring) == 0.0);
    kvs_positions_ring_push(&ring, 9);
    assert_true(kvs_positions_ring_rate(&ring) == 0.0);
    kvs_positions_ring_push(&ring, 9); /* not greater is backward */
    assert_true(kvs_positions_ring_rate(&ring) == 0.5);
    for (int i = 0; i < 62; i++)
        kvs_positions_ring_push(&ring, 10 + i);
    assert_true(kvs_positions_ring_rate(&ring) == 1.0 / 64);
    kvs_positions_ring_push(&ring, 100);
    assert_true(kvs_positions_ring_rate(&ring) == 1.0 / 64);
    kvs_positions_ring_push(&ring, 101);
    assert_true(kvs_positions_ring_rate(&ring) == 0.0);
}

static void test_fold_means_and_worst_head(void **state)
{
    (void)state;
    const kvs_positions_indices a = {.future = 0.5, .order = 0.1, .distance_max = 7, .rope_max = 3, .ldd = 1.0};
    const kvs_positions_indices b = {.future = 0.25, .order = 0.3, .distance_max = -2, .rope_max = 9, .ldd = 2.0};
    kvs_positions_fold fold;
    kvs_positions out;
    kvs_positions_fold_begin(&fold);
    kvs_positions_fold_add(&fold, &a);
    kvs_positions_fold_add(&fold, &b);
    kvs_positions_fold_end(&fold, &out);
    assert_true(out.future == 0.375 && out.future_max == 0.5 && out.order == 0.2 && out.order_max == 0.3);
    assert_true(out.ldd == 1.5 && out.mass_lost == -1.0 && out.template_integrity == 1.0);
    assert_int_equal(fold.distance_max, 7);
    assert_int_equal(fold.rope_max, 9);
}

static void test_template_integrity_counts_turns_with_both_markers(void **state)
{
    (void)state;
    /* <h> a a <e h> b b b <e h> c c  : markers at 0, 3-4, 8-9; the last turn is open */
    uint8_t flags[12] = {0};
    flags[0] = flags[3] = flags[4] = flags[8] = flags[9] = KVS_TOKEN_TEMPLATE;
    int32_t all[12];
    for (int i = 0; i < 12; i++)
        all[i] = i;
    kvs_turn turns[12];
    kvs_turn_log log = {.turns = turns, .capacity = 12, .marker_from = -1};
    kvs_turn_log_append(&log, 0, flags, 12);
    assert_true(kvs_turn_log_integrity(&log, all, 12) == 1.0);
    const int32_t no_first_header[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    assert_true(kvs_turn_log_integrity(&log, no_first_header, 11) == 2.0 / 3);
    const int32_t half_marker[] = {0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11}; /* 4 belongs to turns a and b */
    assert_true(kvs_turn_log_integrity(&log, half_marker, 11) == 1.0 / 3);
    const int32_t turn_gone[] = {0, 8, 9, 10}; /* a and b hold nothing: only c counts */
    assert_true(kvs_turn_log_integrity(&log, turn_gone, 4) == 1.0);
    assert_true(kvs_turn_log_integrity(&log, NULL, 0) == 1.0);
}

/* ---- the paper's script, replayed: 5,600 tokens prefilled, trigger 4,800 (section 1.6) ---- */

enum { REPLAY_PREFILL = 5600, REPLAY_TRIGGER = 4800 };

typedef struct replay {
    uint32_t n_events;
    int32_t given[200]; /* position of each generated token */
    double survival;    /* product of n_after / n_before */
} replay;

/* The script's loop: before each token, evict if the cache is at the trigger, then write one slot. */
static replay attention_top_replay(head *h, uint64_t seed, uint32_t n_steps)
{
    kvs_rng rng = {seed};
    replay r = {.survival = 1.0};
    for (uint32_t step = 0; step < n_steps; step++) {
        if (h->n >= REPLAY_TRIGGER) {
            const uint32_t n_keep = (uint32_t)floor(h->n * 0.99);
            r.survival *= (double)n_keep / h->n;
            evict_random(h, n_keep, &rng, KVS_POSITION_ROLLBACK);
            r.n_events++;
        }
        r.given[step] = h->rope_next;
        say(h);
    }
    return r;
}

static void test_attention_top_walks_backward_sixteen_times(void **state)
{
    (void)state;
    fill_theta();
    head *h = prefilled(REPLAY_PREFILL);
    const replay r = attention_top_replay(h, 0, 60);
    assert_int_equal(r.given[0], 5544);
    assert_int_equal(r.given[1], 5489);
    assert_int_equal(r.given[2], 5435);
    assert_int_equal(r.given[3], 5381);
    assert_int_equal(r.given[15], 4775);
    int32_t last = REPLAY_PREFILL - 1;
    uint32_t n_backward = 0;
    for (int step = 0; step < 60; step++) {
        if (step < 16)
            assert_true(r.given[step] < last);
        n_backward += r.given[step] <= last;
        last = r.given[step];
    }
    for (int step = 16; step < 40; step++)
        assert_int_equal(r.given[step], r.given[step - 1] + 1);
    assert_int_equal(r.given[39], 4799);
    assert_int_equal(r.given[40], 4752); /* regrown to 4,800: the 17th event */
    assert_int_equal(r.n_events, 17);
    assert_int_equal(n_backward, 17);
    const kvs_positions_indices x = measure(h, NULL);
    assert_true(x.backward == 17.0 / 64);
    free(h);
}

/* Which slots go is chance; how many is not. A slot there from the start survives all 17 events with probability s =
 * product of n'/n, so each count below is a sum of indicators of mean s, pairwise negatively correlated (drawing
 * without replacement): its variance is at most m s (1 - s). Bounds are 5 standard deviations of that, which holds the
 * published seed's values too. Generated tokens die with less probability still and are m = 60 at most: added whole. */
static void test_attention_top_indices_over_seeds(void **state)
{
    (void)state;
    fill_theta();
    double sum_f = 0.0, sum_u = 0.0, sum_v = 0.0;
    for (uint64_t seed = 0; seed < 16; seed++) {
        head *h = prefilled(REPLAY_PREFILL);
        const replay r = attention_top_replay(h, seed, 60);
        const kvs_positions_indices x = measure(h, NULL);
        const double n = h->n, s = r.survival;
        const double ahead = REPLAY_PREFILL - 1 - h->rope_next; /* prefilled positions beyond the query's */
        const double slack_f = 5 * sqrt(ahead * s * (1 - s)) + 60;
        assert_true(fabs(x.future * n - ahead * s) < slack_f);
        /* the 60 positions given are all different, so one is shared iff the prefilled slot there survived and the
         * generated one did: at most a further 60 (1 - s) expected losses */
        assert_true(fabs(x.collision * n - 60 * s) < 5 * sqrt(60 * s * (1 - s)) + 60 * (1 - s));
        double pairs = 0.0, spread = 0.0; /* inversions: prefilled survivors beyond each generated token */
        for (int step = 0; step < 60; step++) {
            const double beyond = REPLAY_PREFILL - 1 - r.given[step];
            pairs += beyond * s;
            spread += 5 * sqrt(beyond * s * (1 - s)) + 17; /* and at most 17 descents among the generated */
        }
        assert_true(fabs(x.order * n * (n - 1) / 2 - pairs) < spread + 17 * pairs / 60);
        sum_f += x.future / 16;
        sum_u += x.collision / 16;
        sum_v += x.order / 16;
        free(h);
    }
    /* published: F 0.155, U 0.0109, V 0.0033 (another generator's seed 0), so within one draw's 5 deviations of our
     * mean: sqrt(840 * 0.85 * 0.15) / 4772 = 0.0022 and sqrt(60 * 0.85 * 0.15) / 4772 = 0.0006; V follows F */
    assert_true(fabs(sum_f - 0.155) < 5 * 0.0022);
    assert_true(fabs(sum_u - 0.0109) < 5 * 0.0006);
    assert_true(fabs(sum_v - 0.0033) < 5 * 0.0022 * 60 / 4772 * 2 + 5e-5);
    print_message("attention_top 0.99, 16 seeds: F %.4f U %.4f V %.5f\n", sum_f, sum_u, sum_v);
}

static void check_gist(uint32_t gist, uint32_t recent, uint32_t n_ahead, double future, double order)
{
    head *h = prefilled(REPLAY_PREFILL);
    evict_middle(h, gist, recent, KVS_POSITION_ROLLBACK, 0);
    for (int32_t step = 0; step < 200; step++) {
        assert_int_equal(h->rope_next, (int32_t)(gist + recent) + step);
        say(h);
    }
    const kvs_positions_indices x = measure(h, NULL);
    assert_true(x.future == (double)n_ahead / h->n);
    assert_true(x.collision == 0.0);
    assert_true(x.order == 200.0 * n_ahead / (0.5 * h->n * (h->n - 1.0)));
    assert_true(fabs(x.future - future) < 0.5e-3); /* the table's printed digits */
    assert_true(fabs(x.order - order) < 0.5e-4);
    free(h);
}

static void test_gist_replays_as_published(void **state)
{
    (void)state;
    fill_theta();
    check_gist(2000, 0, 0, 0.0, 0.0);
    check_gist(2000, 1000, 1000, 0.3125, 0.0391);
    check_gist(512, 2048, 2048, 0.742, 0.1076);
}

static void test_evict_oldest_replays_as_published(void **state)
{
    (void)state;
    fill_theta();
    head *h = prefilled(REPLAY_PREFILL);
    evict_middle(h, 0, REPLAY_PREFILL - REPLAY_PREFILL / 4, KVS_POSITION_ROLLBACK, 0);
    assert_int_equal(h->rope_next, 4200);
    for (int step = 0; step < 200; step++)
        say(h);
    const kvs_positions_indices x = measure(h, NULL);
    assert_true(x.future == 1199.0 / 4400);
    assert_true(fabs(x.collision - 200.0 / 4400) < 1e-15);
    assert_true(x.order == 259900.0 / (4400.0 * 4399 / 2)); /* sum over k < 200 of 1399 - k */
    assert_true(fabs(x.future - 0.2725) < 0.5e-4 && fabs(x.collision - 0.0455) < 0.5e-4);
    assert_true(fabs(x.order - 0.0269) < 0.5e-4);
    assert_true(x.sinks_lost == 1.0 && x.recent_lost == 0.0);
    free(h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_modes_stand_where_documented),
        cmocka_unit_test(test_gapcap_bounds_are_rerotate_and_keep),
        cmocka_unit_test(test_indices_of_a_hand_made_head),
        cmocka_unit_test(test_fast_indices_equal_the_definitions),
        cmocka_unit_test(test_uniform_weights_equal_no_weights),
        cmocka_unit_test(test_one_eviction_in_each_mode),
        cmocka_unit_test(test_rollback_is_rerotation_only_for_a_prefix),
        cmocka_unit_test(test_out_of_window_counts_far_keys),
        cmocka_unit_test(test_an_empty_head_is_defined),
        cmocka_unit_test(test_ring_forgets_after_64_insertions),
        cmocka_unit_test(test_fold_means_and_worst_head),
        cmocka_unit_test(test_template_integrity_counts_turns_with_both_markers),
        cmocka_unit_test(test_attention_top_walks_backward_sixteen_times),
        cmocka_unit_test(test_attention_top_indices_over_seeds),
        cmocka_unit_test(test_gist_replays_as_published),
        cmocka_unit_test(test_evict_oldest_replays_as_published),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

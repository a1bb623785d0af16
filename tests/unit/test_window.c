/* Policies that look at what the newest rows attend to: each against its paper's definition in plain double-precision
 * code, and in the limit cases where it must turn into another. */
#include "unit/policy_fixture.h"

/* Leaves the newest `rows` rows of the window. */
static void trim_window(uint32_t rows)
{
    const uint32_t less = b.view.n_window > rows ? b.view.n_window - rows : 0;
    b.view.n_window -= less;
    b.view.window_pos += less;
    b.view.window_prob += (size_t)less * GROUP * b.view.n_slots;
    b.view.window_logit += (size_t)less * GROUP * b.view.n_slots;
    b.view.window_query += (size_t)less * GROUP * HEAD_DIM;
}

/* A view as `spec` would get it: with at most the rows that it asks for. */
static kvs_policy prepare(kvs_rng *rng, const char *spec, uint32_t n)
{
    const kvs_policy p = parse(spec);
    fill_view(rng, n);
    trim_window(kvs_policy_window(&p));
    return p;
}

static void score(const kvs_policy *p, uint32_t n_keep)
{
    b.view.n_keep = n_keep;
    b.view.work = malloc((kvs_policy_work(p, b.view.n_slots, HEAD_DIM) + 1) * sizeof(float));
    assert_non_null(b.view.work);
    p->ops->score(p->params, &b.view, b.scores);
    if (p->rescore != NULL)
        p->rescore->rescore(p->rescore_params, &b.view, b.scores);
    free(b.view.work);
    b.view.work = NULL;
}

static double prob(uint32_t row, uint32_t g, uint32_t i)
{
    return (double)b.view.window_prob[((size_t)row * GROUP + g) * b.view.n_slots + i];
}

static double logit(uint32_t row, uint32_t g, uint32_t i)
{
    return (double)b.view.window_logit[((size_t)row * GROUP + g) * b.view.n_slots + i];
}

static double value(uint32_t i, uint32_t d)
{
    return (double)b.values[(size_t)i * HEAD_DIM + d];
}

/* A chain of k roundings is off by k units in the last place at most. */
static void assert_near(double got, double want, double scale, uint32_t roundings)
{
    if (!(fabs(got - want) <= scale * roundings * 0x1p-24))
        fail_msg("%.9g, expected %.9g", got, want);
}

static uint32_t n_of_window(void)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < b.view.n_slots; i++)
        n += b.pos[i] >= b.view.window_pos[0];
    return n;
}

static void scores_equal(const float *want, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (memcmp(&b.scores[i], &want[i], sizeof *want) != 0)
            fail_msg("slot %u: %.9g, expected %.9g", i, (double)b.scores[i], (double)want[i]);
}

/* Scores of `spec` on the view as it is, in other [n]. */
static void scores_of(const char *spec, uint32_t n_keep, float *other)
{
    const kvs_policy p = parse(spec);
    score(&p, n_keep);
    memcpy(other, b.scores, b.view.n_slots * sizeof *other);
}

static float other[SLOTS_MAX];

/* ---- the last row ---- */

static void tova_sage_and_a_window_of_one_rank_by_the_last_query(void **state)
{
    (void)state;
    kvs_rng rng = {1};
    for (int round = 0; round < 100; round++) {
        const uint32_t n = 2 + kvs_rng_below(&rng, 300);
        const kvs_policy p = prepare(&rng, "tova +protect=none", n);
        score(&p, n / 2);
        for (uint32_t i = 0; i < n; i++) {
            double sum = 0;
            for (uint32_t g = 0; g < GROUP; g++)
                sum += prob(0, g, i);
            assert_near((double)b.scores[i], sum / GROUP, 1, 4);
        }
        memcpy(other, b.scores, sizeof other);
        const kvs_policy snapkv = parse("snapkv:window=1,kernel=1"), sage = parse("sage-kv:sinks=0,recent=0");
        score(&snapkv, n / 2);
        scores_equal(other, n - 1);
        assert_true(isinf(b.scores[n - 1]));
        score(&sage, n / 2);
        scores_equal(other, n - 1);
        assert_true(isinf(b.scores[n - 1]));
        const kvs_policy kept = parse("tova:last=1");
        score(&kept, n / 2);
        assert_true(isinf(b.scores[n - 1]));
    }
}

static void sage_between_streaming_and_all(void **state)
{
    (void)state;
    kvs_rng rng = {2};
    for (int round = 0; round < 100; round++) {
        const uint32_t n = 20 + kvs_rng_below(&rng, 300), n_keep = 10 + kvs_rng_below(&rng, n - 10);
        const kvs_policy none = prepare(&rng, "sage-kv:recent=1 +protect=sinks:4", n);
        evict(&none, n_keep);
        static uint8_t keep[SLOTS_MAX];
        memcpy(keep, b.keep, n);
        const kvs_policy streaming = parse("streaming:sinks=4 +protect=sinks:4");
        evict(&streaming, n_keep);
        assert_memory_equal(keep, b.keep, n);
        const kvs_policy all = parse("sage-kv +protect=none");
        assert_int_equal(evict(&all, n), n);
    }
}

/* ---- the whole window ---- */

static void scissorhands_counts_queries_below_an_even_share(void **state)
{
    (void)state;
    kvs_rng rng = {3};
    for (int round = 0; round < 100; round++) {
        const uint32_t n = 2 + kvs_rng_below(&rng, 300);
        const kvs_policy p = prepare(&rng, "scissorhands:recent=3", n);
        score(&p, n / 2);
        for (uint32_t i = 0; i < n; i++) {
            int below = 0;
            for (uint32_t r = 0; r < b.view.n_window; r++) {
                uint32_t t = 0;
                for (uint32_t j = 0; j < n; j++)
                    t += b.pos[j] <= b.view.window_pos[r];
                for (uint32_t g = 0; g < GROUP; g++)
                    below += b.pos[i] <= b.view.window_pos[r] && (float)prob(r, g, i) < 1.0f / (float)t;
            }
            assert_true(i + 3 >= n ? isinf(b.scores[i]) : b.scores[i] == (float)-below);
        }
    }
}

static void finch_divides_by_the_queries_that_could_see_a_slot(void **state)
{
    (void)state;
    kvs_rng rng = {4};
    for (int round = 0; round < 60; round++) {
        const uint32_t n = 2 + kvs_rng_below(&rng, 300);
        const kvs_policy p = prepare(&rng, "finch", n);
        const uint32_t n_rows = b.view.n_window, n_before = n - n_of_window();
        score(&p, n / 2);
        memcpy(other, b.scores, sizeof other);
        for (uint32_t i = 0; i < n_before; i++) {
            double sum = 0;
            for (uint32_t r = 0; r < n_rows; r++)
                for (uint32_t g = 0; g < GROUP; g++)
                    sum += prob(r, g, i);
            assert_near((double)b.scores[i], sum / (n_rows * GROUP), 1, 2 * n_rows * GROUP);
        }
        for (uint32_t i = n_before; i < n; i++)
            assert_true(isinf(b.scores[i]));
        /* All rows see what stands before the window: there nothing is left to divide by. */
        const kvs_policy plain = parse("finch:norm=0"), rows = parse("finch:norm=2");
        score(&plain, n / 2);
        scores_equal(other, n);
        score(&rows, n / 2); /* kvpress: each row times what it can see */
        for (uint32_t i = 0; i < n_before; i++) {
            double sum = 0;
            for (uint32_t r = 0; r < n_rows; r++)
                for (uint32_t g = 0; g < GROUP; g++)
                    sum += prob(r, g, i) * (n_before + r + 1);
            assert_near((double)b.scores[i], sum / (n_rows * GROUP), n, 2 * n_rows * GROUP);
        }
    }
}

/* The full matrix of cosines, as the paper has it. */
static void redundancy(uint32_t n, double threshold, double *out)
{
    static double mean[SLOTS_MAX];
    memset(mean, 0, n * sizeof *mean);
    for (uint32_t i = 0; i < n; i++) {
        bool left_out = false;
        for (uint32_t j = n; j-- > 0;) {
            double dot = 0, a = 0, c = 0;
            for (uint32_t d = 0; d < HEAD_DIM; d++) {
                const double x = (double)b.keys[(size_t)i * HEAD_DIM + d], y = (double)b.keys[(size_t)j * HEAD_DIM + d];
                dot += x * y;
                a += x * x;
                c += y * y;
            }
            const double cosine = dot / (sqrt(a) * sqrt(c));
            if (j == i)
                continue;
            if (cosine > threshold && !left_out)
                left_out = true;
            else
                mean[j] += cosine / n;
        }
    }
    double sum = 0;
    for (uint32_t j = 0; j < n; j++)
        sum += exp(mean[j]);
    for (uint32_t j = 0; j < n; j++)
        out[j] = exp(mean[j]) / sum;
}

static double want[SLOTS_MAX], red[SLOTS_MAX];

/* Largest of the neighbours of want[0, n). */
static double pooled(uint32_t i, uint32_t n, uint32_t kernel)
{
    double most = 0;
    for (uint32_t j = i > kernel / 2 ? i - kernel / 2 : 0; j < n && j <= i + kernel / 2; j++)
        most = want[j] > most ? want[j] : most;
    return most;
}

static void r_kv_weighs_attention_against_redundancy(void **state)
{
    (void)state;
    kvs_rng rng = {5};
    for (int round = 0; round < 60; round++) {
        const uint32_t n = 20 + kvs_rng_below(&rng, 200);
        const kvs_policy p = prepare(&rng, "r-kv:lambda=0.3", n), only = parse("r-kv:lambda=1");
        const uint32_t n_before = n - n_of_window(), n_rows = b.view.n_window;
        memset(want, 0, sizeof want);
        for (uint32_t r = 0; r < n_rows; r++) {
            double sum = 0;
            for (uint32_t i = 0; i < n_before; i++)
                sum += exp(fmax(logit(r, 0, i), logit(r, 1, i)));
            for (uint32_t i = 0; i < n_before; i++)
                want[i] += exp(fmax(logit(r, 0, i), logit(r, 1, i))) / sum / n_rows;
        }
        redundancy(n, 0.5, red);
        score(&p, n / 2);
        for (uint32_t i = 0; i < n_before; i++)
            assert_near((double)b.scores[i], 0.3 * pooled(i, n_before, 7) - 0.7 * red[i], 1, 40);
        for (uint32_t i = n_before; i < n; i++)
            assert_true(isinf(b.scores[i]));
        score(&only, n / 2);
        for (uint32_t i = 0; i < n_before; i++)
            assert_near((double)b.scores[i], pooled(i, n_before, 7), 1, 40);
    }
}

/* Where attention does not count, of three copies among keys at right angles the earlier two go first. */
static void r_kv_drops_earlier_copies_first(void **state)
{
    (void)state;
    enum { N = HEAD_DIM + 2 };
    kvs_rng rng = {6};
    for (uint32_t a = 0; a < N - 1; a++)
        for (uint32_t c = a + 1; c < N - 1; c++)
            for (uint32_t e = c + 1; e < N - 1; e++) {
                const kvs_policy p = prepare(&rng, "r-kv:lambda=0,window=1 +protect=none", N);
                memset(b.keys, 0, N * HEAD_DIM * sizeof *b.keys);
                for (uint32_t i = 0, axis = 1; i < N; i++)
                    b.keys[i * HEAD_DIM + (i == a || i == c || i == e ? 0 : axis++)] = 1 + (float)i;
                score(&p, N - 2);
                for (uint32_t i = 0; i < N; i++)
                    if (i != a && i != c)
                        assert_true(b.scores[a] < b.scores[i] && b.scores[c] < b.scores[i]);
                assert_int_equal(evict(&p, N - 2), N - 2);
                assert_true(!b.keep[a] && !b.keep[c] && b.keep[e]);
            }
}

static void g_kv_remembers_with_decay(void **state)
{
    (void)state;
    kvs_rng rng = {7};
    static float before[SLOTS_MAX];
    static const char *const smooths[] = {"0", "1", "2"};
    for (int round = 0; round < 90; round++) {
        const uint32_t n = 20 + kvs_rng_below(&rng, 200);
        char spec[96];
        snprintf(spec, sizeof spec, "g-kv:alpha=0.8,lambda=%s,kernel=%s,smooth=%s", round % 2 ? "1" : "0.5",
                 round % 5 ? "1" : "7", smooths[round % 3]);
        const kvs_policy p = prepare(&rng, spec, n);
        const uint32_t n_before = n - n_of_window(), n_rows = b.view.n_window;
        memcpy(before, b.carry, sizeof before);
        double most = 0, most_red = 0;
        for (uint32_t i = 0; i < n_before; i++) {
            want[i] = 0;
            for (uint32_t r = 0; r < n_rows; r++)
                want[i] += fmax(prob(r, 0, i), prob(r, 1, i)) / n_rows;
            most = fmax(most, want[i]);
        }
        redundancy(n, 0.5, red);
        for (uint32_t i = 0; i < n_before; i++) {
            const double old = (double)before[i], local = want[i] / most;
            most_red = fmax(most_red, red[i]);
            want[i] = round % 3 == 0   ? fmax(0.8 * old, local)
                      : round % 3 == 2 ? 0.8 * old + local
                      : old == 0       ? local
                                       : 0.8 * old + 0.2 * local;
        }
        score(&p, n / 2);
        for (uint32_t i = 0; i < n_before; i++) {
            assert_near((double)b.carry[i], want[i], 2, 40);
            const double global = pooled(i, n_before, round % 5 ? 1 : 7);
            assert_near((double)b.scores[i], round % 2 ? global : 0.5 * global - 0.5 * red[i] / most_red, 2, 80);
        }
        for (uint32_t i = n_before; i < n; i++)
            assert_true(isinf(b.scores[i]) && b.carry[i] == 0);
    }
}

/* One row at a time, summed without decay and norm, is H2O's accumulator. */
static void g_kv_that_sums_is_h2o(void **state)
{
    (void)state;
    kvs_rng rng = {8};
    const uint32_t n = 120;
    const kvs_policy p = prepare(&rng, "g-kv:alpha=1,lambda=1,window=1,smooth=2,norm=0", n);
    fill_view(&rng, n);
    memset(b.carry, 0, sizeof b.carry);
    const uint32_t n_rows = b.view.n_window;
    const kvs_policy_view whole = b.view;
    for (uint32_t r = 0; r < n_rows; r++) {
        b.view = whole;
        b.view.n_window = r + 1;
        trim_window(1);
        score(&p, n / 2);
    }
    b.view = whole;
    for (uint32_t i = 0; i + n_rows < n; i++) {
        double sum = 0;
        for (uint32_t r = 0; r < n_rows; r++)
            sum += fmax(prob(r, 0, i), prob(r, 1, i));
        assert_near((double)b.carry[i], sum, 2, 20);
    }
}

/* ---- output changes ---- */

/* The output of query head g of a row, where slot j's score is times key and its value times scale. */
static void output(uint32_t row, uint32_t g, uint32_t j, double key, double scale, double *o)
{
    const uint32_t n = b.view.n_slots;
    double sum = 0;
    memset(o, 0, HEAD_DIM * sizeof *o);
    for (uint32_t i = 0; i < n; i++) {
        const double e = exp(logit(row, g, i) * (i == j && !isinf(logit(row, g, i)) ? key : 1));
        sum += e;
        for (uint32_t d = 0; d < HEAD_DIM; d++)
            o[d] += e * value(i, d) * (i == j ? scale : 1);
    }
    for (uint32_t d = 0; d < HEAD_DIM; d++)
        o[d] /= sum;
}

/* Squared length of the output's derivative along the way to zero, by central differences, over rows and heads. */
static double saliency(uint32_t j, bool key, bool val)
{
    const double h = 1e-4;
    double total = 0;
    for (uint32_t r = 0; r < b.view.n_window; r++)
        for (uint32_t g = 0; g < GROUP; g++) {
            double up[HEAD_DIM], down[HEAD_DIM];
            output(r, g, j, key ? 1 + h : 1, val ? 1 + h : 1, up);
            output(r, g, j, key ? 1 - h : 1, val ? 1 - h : 1, down);
            for (uint32_t d = 0; d < HEAD_DIM; d++)
                total += pow((up[d] - down[d]) / (2 * h), 2);
        }
    return total;
}

static void obcache_is_the_squared_first_order_change(void **state)
{
    (void)state;
    static const char *const names[] = {"obcache-v", "obcache-k", "obcache-vk"};
    kvs_rng rng = {9};
    for (int round = 0; round < 30; round++) {
        const uint32_t n = 2 + kvs_rng_below(&rng, 30), which = (uint32_t)round % 3;
        char spec[64];
        snprintf(spec, sizeof spec, "%s:acc=0,recent=0", names[which]);
        const kvs_policy p = prepare(&rng, spec, n);
        score(&p, n / 2);
        for (uint32_t i = 0; i < n; i++) {
            const double s = saliency(i, which != 0, which != 1);
            /* Differences err by h^2 and 1e-12 / h; f32 by its chains over slots, whose sums o are. */
            if (fabs((double)b.scores[i] - s) > 2e-5 * s + 1e-7)
                fail_msg("%s, slot %u of %u: %.9g, expected %.9g", names[which], i, n, (double)b.scores[i], s);
        }
    }
}

static void obcache_in_its_limits(void **state)
{
    (void)state;
    kvs_rng rng = {10};
    for (int round = 0; round < 50; round++) {
        const uint32_t n = 2 + kvs_rng_below(&rng, 200);
        /* No norm, first power: the attention itself, to the bit. */
        const kvs_policy p = prepare(&rng, "obcache-v:acc=0,recent=0,p=1,vnorm=0", n);
        score(&p, n / 2);
        memset(other, 0, sizeof other);
        for (uint32_t r = 0; r < b.view.n_window * GROUP; r++)
            for (uint32_t i = 0; i < n; i++)
                other[i] += b.view.window_prob[(size_t)r * n + i];
        scores_equal(other, n);
        /* Equal values: no key matters. One slot: nor does its. */
        const kvs_policy key = parse("obcache-k:acc=0,recent=0");
        for (uint32_t i = 1; i < n; i++)
            memcpy(b.values + (size_t)i * HEAD_DIM, b.values, HEAD_DIM * sizeof(float));
        score(&key, n / 2);
        for (uint32_t i = 0; i < n; i++)
            assert_true(b.scores[i] >= 0 && b.scores[i] < 1e-9f);
        prepare(&rng, "obcache-k:acc=0,recent=0", 1);
        score(&key, 1);
        assert_true(b.scores[0] < 1e-9f);
    }
}

/* What an eviction has counted is not counted again. */
static void obcache_sums_rows_once(void **state)
{
    (void)state;
    kvs_rng rng = {11};
    for (int round = 0; round < 30; round++) {
        const uint32_t n = 40 + kvs_rng_below(&rng, 100);
        const kvs_policy p = prepare(&rng, "obcache-vk:window=6,recent=0", n);
        memset(b.carry, 0, sizeof b.carry);
        score(&p, n / 2);
        memcpy(other, b.scores, sizeof other);
        memset(b.carry, 0, sizeof b.carry);
        const kvs_policy_view whole = b.view;
        b.view.n_window = 4;
        score(&p, n / 2);
        b.view = whole;
        b.view.n_tokens_last = b.view.window_pos[3] + 1;
        score(&p, n / 2);
        scores_equal(other, n);
    }
}

static void caote_is_what_the_output_loses(void **state)
{
    (void)state;
    kvs_rng rng = {12};
    for (int round = 0; round < 40; round++) {
        const uint32_t n = 2 + kvs_rng_below(&rng, 40);
        const kvs_policy p = prepare(&rng, "caote", n), fast = parse("fastcaote");
        score(&p, n / 2);
        for (uint32_t i = 0; i < n; i++) {
            double total = 0;
            for (uint32_t g = 0; g < GROUP; g++) {
                double with[HEAD_DIM] = {0}, without[HEAD_DIM] = {0}, sum = 0, less = 0;
                for (uint32_t j = 0; j < n; j++) {
                    sum += prob(0, g, j);
                    less += j == i ? 0 : prob(0, g, j);
                    for (uint32_t d = 0; d < HEAD_DIM; d++) {
                        with[d] += prob(0, g, j) * value(j, d);
                        without[d] += j == i ? 0 : prob(0, g, j) * value(j, d);
                    }
                }
                for (uint32_t d = 0; d < HEAD_DIM; d++)
                    total += pow(with[d] / sum - without[d] / less, 2);
            }
            if (fabs((double)b.scores[i] - sqrt(total)) > 1e-5 * sqrt(total) + 1e-6)
                fail_msg("slot %u of %u: %.9g, expected %.9g", i, n, (double)b.scores[i], sqrt(total));
        }
        /* Even attention: the fast one is the exact one. */
        for (uint32_t i = 0; i < n * GROUP; i++)
            ((float *)(uintptr_t)b.view.window_prob)[i] = 1.0f / (float)n;
        score(&p, n / 2);
        memcpy(other, b.scores, sizeof other);
        score(&fast, n / 2);
        for (uint32_t i = 0; i < n; i++)
            assert_near((double)b.scores[i], (double)other[i], 4, 4 * n);
        /* Equal values lose nothing; a slot with all the attention stays. */
        for (uint32_t i = 1; i < n; i++)
            memcpy(b.values + (size_t)i * HEAD_DIM, b.values, HEAD_DIM * sizeof(float));
        score(&p, n / 2);
        for (uint32_t i = 0; i < n; i++)
            assert_true(b.scores[i] < 1e-4f);
        for (uint32_t i = 0; i < n * GROUP; i++)
            ((float *)(uintptr_t)b.view.window_prob)[i] = i % n == 1 ? 1.0f : 0.0f;
        random_floats(&rng, b.values, (size_t)n * HEAD_DIM);
        score(&p, n / 2);
        assert_true(isinf(b.scores[1]) && b.scores[0] == 0);
    }
}

static void obcache_over_another_scorer(void **state)
{
    (void)state;
    kvs_rng rng = {13};
    for (int round = 0; round < 40; round++) {
        const uint32_t n = 10 + kvs_rng_below(&rng, 200), n_recent = n / 4;
        const kvs_policy p = prepare(&rng, "h2o:recent=0.5 +rescore=obcache-v", n);
        score(&p, n / 2);
        double sum = 0;
        for (uint32_t i = 0; i + n_recent < n; i++)
            sum += (double)b.mass_sum[i];
        for (uint32_t i = 0; i < n; i++) {
            double norm = 0;
            for (uint32_t d = 0; d < HEAD_DIM; d++)
                norm += value(i, d) * value(i, d);
            if (i + n_recent >= n)
                assert_true(isinf(b.scores[i]));
            else
                assert_near((double)b.scores[i], pow((double)b.mass_sum[i] / sum, 2) * norm,
                            pow((double)b.mass_sum[i] / sum, 2) * norm, 12);
        }
    }
}

/* ---- own targets ---- */

static void dbudgetkv_keeps_sinks_and_a_tail_that_holds_enough(void **state)
{
    (void)state;
    kvs_rng rng = {14};
    for (int round = 0; round < 100; round++) {
        const uint32_t n = 10 + kvs_rng_below(&rng, 300);
        const double threshold = 0.001 * (1 + kvs_rng_below(&rng, 300));
        char spec[96];
        snprintf(spec, sizeof spec, "dbudgetkv:threshold=%.3f +protect=none", threshold);
        const kvs_policy p = prepare(&rng, spec, n), all = parse("dbudgetkv:threshold=0 +protect=none"),
                         few = parse("dbudgetkv:threshold=1 +protect=none");
        b.view.layer = 2;
        uint32_t n_sinks = 0;
        while (n_sinks < n && b.pos[n_sinks] < 4)
            n_sinks++;
        double total = 0, kept = 0;
        for (uint32_t i = 0; i < n; i++)
            total += pow((prob(0, 0, i) + prob(0, 1, i)) / 2, 2);
        uint32_t n_want = 0;
        while (n_want < n && (n_want == 0 || 1 - sqrt(kept / total) >= threshold)) {
            const uint32_t i = n_want < n_sinks ? n_want : n - 1 - (n_want - n_sinks);
            kept += pow((prob(0, 0, i) + prob(0, 1, i)) / 2, 2);
            n_want++;
        }
        n_want = kvs_max_u32(n_want, kvs_max_u32(n_sinks, 1));
        /* f32 means may turn a comparison that is a tie in all digits but the last. */
        const uint32_t n_kept = evict(&p, n);
        assert_true(n_kept + 1 >= n_want && n_kept <= n_want + 1);
        for (uint32_t i = 0; i < n; i++)
            assert_int_equal(b.keep[i], i < n_sinks || i >= n - (n_kept - n_sinks));
        assert_int_equal(evict(&all, n), n);
        assert_true(evict(&few, n) <= n_sinks + 1);
        const uint32_t n_cap = n_sinks + 1 + kvs_rng_below(&rng, 5);
        assert_int_equal(evict(&p, n_cap), kvs_min_u32(n_kept, n_cap));
        b.view.layer = 1;
        assert_int_equal(evict(&p, n), n);
    }
}

static void simlayerkv_cuts_lazy_layers_only(void **state)
{
    (void)state;
    kvs_rng rng = {15};
    for (int round = 0; round < 100; round++) {
        const uint32_t n = 40 + kvs_rng_below(&rng, 200);
        const kvs_policy off = prepare(&rng, "simlayerkv:threshold=1,recent=20 +protect=none", n),
                         on = parse("simlayerkv:threshold=0,recent=20 +protect=none"),
                         wide = parse("simlayerkv:threshold=0,recent=1024 +protect=none");
        assert_int_equal(evict(&off, n), n);
        assert_int_equal(evict(&wide, n), n);
        uint32_t n_first = 0;
        while (b.pos[n_first] < 4)
            n_first++;
        assert_int_equal(evict(&on, n), n_first + 20);
        for (uint32_t i = 0; i < n; i++)
            assert_int_equal(b.keep[i], i < n_first || i + 20 >= n);
        double mass = 0;
        for (uint32_t i = 0; i < n; i++)
            mass += i < n_first || i + 20 >= n ? (prob(0, 0, i) + prob(0, 1, i)) / 2 : 0;
        for (int k = 0; k < 2; k++) {
            char spec[96];
            snprintf(spec, sizeof spec, "simlayerkv:threshold=%.6f,recent=20 +protect=none", mass + (k ? 1e-4 : -1e-4));
            const kvs_policy p = parse(spec);
            assert_int_equal(evict(&p, n), k ? n : n_first + 20);
        }
    }
}

/* ---- critical ---- */

static void critical_goes_half_by_the_base_and_half_by_projected_values(void **state)
{
    (void)state;
    kvs_rng rng = {16};
    for (int round = 0; round < 100; round++) {
        const uint32_t n = 30 + kvs_rng_below(&rng, 200), n_keep = n / 2;
        prepare(&rng, "snapkv:kernel=1", n);
        scores_of("snapkv:kernel=1", n_keep, other);
        const kvs_policy p = parse("criticalkv:kernel=1 +protect=none");
        score(&p, n_keep);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t better = 0;
            for (uint32_t j = 0; j < n; j++)
                better += other[j] > other[i] || (other[j] == other[i] && j > i);
            const double norm = ((double)b.out_norm[i] + (double)b.out_norm[n + i]) / 2;
            if (better < n_keep / 2)
                assert_true(isinf(b.scores[i]));
            else
                assert_near((double)b.scores[i], ((double)other[i] + 1e-4) * norm, ((double)other[i] + 1e-4) * norm, 8);
        }
        /* Equal norms: what the base keeps. */
        for (uint32_t i = 0; i < GROUP * n; i++)
            b.out_norm[i] = 0.75f;
        evict(&p, n_keep);
        static uint8_t keep[SLOTS_MAX];
        memcpy(keep, b.keep, n);
        const kvs_policy base = parse("snapkv:kernel=1 +protect=none");
        evict(&base, n_keep);
        assert_memory_equal(keep, b.keep, n);
    }
}

/* ---- stages over snapkv ---- */

enum { LAYERS = 3, HEADS = 4, HELD = 150 };

/* Random scores for all heads, head h's worth weights[h]; shares out `even` slots each. */
static void allocate(const char *spec, kvs_rng *rng, const double *weights, uint32_t even, float *scores,
                     uint32_t *keep)
{
    const kvs_policy p = parse(spec);
    static uint32_t keys[LAYERS * HEADS * HELD];
    uint32_t n_slots[LAYERS * HEADS], n_even[LAYERS * HEADS], n_protected[LAYERS * HEADS] = {0};
    for (uint32_t h = 0; h < LAYERS * HEADS; h++) {
        n_slots[h] = HELD;
        n_even[h] = keep[h] = even;
        for (uint32_t i = 0; i < HELD; i++)
            scores[h * HELD + i] = (float)(kvs_rng_double(rng) * weights[h % HEADS]);
    }
    const kvs_budget_view v = {LAYERS, HEADS, n_slots, n_protected, n_even, scores, HELD, keys, NULL, NULL};
    p.budget->allocate(p.budget_params, &v, keep);
}

/* What stays when each head keeps its best. */
static double kept_mass(const float *scores, const uint32_t *keep, uint32_t layer)
{
    double sum = 0;
    for (uint32_t h = layer * HEADS; h < (layer + 1) * HEADS; h++)
        for (uint32_t i = 0; i < HELD; i++) {
            uint32_t better = 0;
            for (uint32_t j = 0; j < HELD; j++)
                better += scores[h * HELD + j] > scores[h * HELD + i];
            sum += better < keep[h] ? (double)scores[h * HELD + i] : 0;
        }
    return sum;
}

static void adakv_moves_room_to_where_scores_are(void **state)
{
    (void)state;
    kvs_rng rng = {17};
    static float scores[LAYERS * HEADS * HELD];
    const double uneven[HEADS] = {0.2, 1, 3, 0.7}, same[HEADS] = {1, 1, 1, 1};
    for (int round = 0; round < 40; round++) {
        const uint32_t even = 10 + kvs_rng_below(&rng, HELD - 20);
        uint32_t keep[LAYERS * HEADS], flat[LAYERS * HEADS];
        for (uint32_t h = 0; h < LAYERS * HEADS; h++)
            flat[h] = even;
        allocate("adakv", &rng, uneven, even, scores, keep);
        for (uint32_t l = 0; l < LAYERS; l++) {
            uint32_t sum = 0;
            for (uint32_t h = l * HEADS; h < (l + 1) * HEADS; h++) {
                sum += keep[h];
                assert_true(keep[h] >= (uint32_t)(0.2 * even) && keep[h] <= HELD);
            }
            assert_int_equal(sum, HEADS * even);
        }
        allocate("adakv +budget=ada:floor=0", &rng, uneven, even, scores, keep);
        for (uint32_t l = 0; l < LAYERS; l++) /* the theory: never less than even shares keep */
            assert_true(kept_mass(scores, keep, l) >= kept_mass(scores, flat, l) - 1e-9);
        allocate("adakv +budget=ada:floor=1", &rng, uneven, even, scores, keep);
        assert_memory_equal(keep, flat, sizeof flat);
        allocate("critical-adakv +budget=ada:floor=1", &rng, same, even, scores, keep);
        assert_memory_equal(keep, flat, sizeof flat);
    }
}

static void pyramidkv_falls_linearly_and_keeps_the_sum(void **state)
{
    (void)state;
    kvs_rng rng = {18};
    static float scores[LAYERS * HEADS * HELD];
    const double same[HEADS] = {1, 1, 1, 1};
    for (uint32_t even = 20; even < 140; even += 7) {
        uint32_t keep[LAYERS * HEADS];
        allocate("pyramidkv +budget=pyramid:beta=20,window=8", &rng, same, even, scores, keep);
        uint32_t sum = 0;
        for (uint32_t h = 0; h < LAYERS * HEADS; h++) {
            sum += keep[h];
            assert_int_equal(keep[h], keep[h / HEADS * HEADS]);
        }
        assert_int_equal(sum, LAYERS * HEADS * even);
        assert_true(keep[0] >= keep[HEADS] && keep[HEADS] >= keep[2 * HEADS]);
        allocate("pyramidkv +budget=pyramid:beta=1,window=8", &rng, same, even, scores, keep);
        for (uint32_t h = 0; h < LAYERS * HEADS; h++)
            assert_int_equal(keep[h], even);
    }
}

static void chunkkv_keeps_whole_chunks(void **state)
{
    (void)state;
    kvs_rng rng = {19};
    for (int round = 0; round < 60; round++) {
        const uint32_t n = 60 + kvs_rng_below(&rng, 300), n_keep = n / 2;
        const kvs_policy p = prepare(&rng, "chunkkv +protect=none", n),
                         one = parse("chunkkv +select=chunk:length=1 "
                                     "+protect=none"),
                         base = parse("snapkv:kernel=1 +protect=none");
        evict(&p, n_keep);
        for (uint32_t i = 1; i < n; i++)
            assert_true(b.pos[i] / 10 != b.pos[i - 1] / 10 || b.keep[i] == b.keep[i - 1]);
        evict(&one, n_keep);
        static uint8_t keep[SLOTS_MAX];
        memcpy(keep, b.keep, n);
        evict(&base, n_keep);
        assert_memory_equal(keep, b.keep, n);
        const kvs_policy block = parse("chunkkv +select=block +protect=none");
        evict(&block, n_keep);
        for (uint32_t i = 1; i < n; i++)
            assert_true(b.pos[i] / 16 != b.pos[i - 1] / 16 || b.keep[i] == b.keep[i - 1]);
    }
}

static void sentences_stay_or_go_whole(void **state)
{
    (void)state;
    kvs_rng rng = {20};
    for (int round = 0; round < 100; round++) {
        const uint32_t n = 60 + kvs_rng_below(&rng, 300);
        const kvs_policy p = prepare(&rng, "h2o:recent=0 +select=sentence:longest=30 +protect=none", n);
        assert_true(evict(&p, n / 2) <= n / 2);
        uint32_t length = 0, n_units = 0;
        for (uint32_t i = 0; i < n; i++) {
            const bool begins = i == 0 || b.unit[i] != b.unit[i - 1];
            length = begins ? 1 : length + 1;
            n_units += begins;
            assert_true(length <= 30);
            if (!begins)
                assert_int_equal(b.keep[i], b.keep[i - 1]);
            if (i == 0 || b.pos[i] < 4)
                continue;
            const int32_t last = b.token[i - 1];
            const bool marker = (b.flags[i] & KVS_TOKEN_TEMPLATE) != 0,
                       was = (b.flags[i - 1] & KVS_TOKEN_TEMPLATE) != 0;
            const bool end = (b.sentence_ends[last / 64] >> (last % 64) & 1) != 0;
            const bool border = b.pos[i] != b.pos[i - 1] + 1 || marker != was || b.pos[i - 1] < 4 || (end && !was);
            assert_true(begins || !border);
            assert_true(!begins || border || length == 1);
        }
        assert_true(n_units > 1);
        /* Without knowledge of ends only borders and lengths are left. */
        b.view.sentence_ends = NULL;
        evict(&p, n / 2);
    }
}

/* Where no row is logged yet (just after a load of an older save, say) every method still orders the slots. */
static void an_empty_window_keeps_the_newest(void **state)
{
    (void)state;
    static const char *const names[] = {"tova",       "snapkv:kernel=1", "sage-kv",   "scissorhands",
                                        "finch",      "g-kv:lambda=1",   "obcache-v", "obcache-k",
                                        "obcache-vk", "caote",           "fastcaote", "r-kv:lambda=1"};
    kvs_rng rng = {21};
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        char spec[96];
        snprintf(spec, sizeof spec, "%s +protect=none", names[k]);
        const kvs_policy p = parse(spec);
        fill_view(&rng, 100);
        b.view.n_window = 0;
        memset(b.carry, 0, sizeof b.carry);
        for (uint32_t i = 0; i < 100; i++) /* no sinks */
            b.pos[i] += 10;
        b.view.n_tokens += 10;
        evict(&p, 40);
        for (uint32_t i = 0; i < 100; i++)
            if (b.keep[i] != (i >= 60))
                fail_msg("%s: slot %u", names[k], i);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tova_sage_and_a_window_of_one_rank_by_the_last_query),
        cmocka_unit_test(sage_between_streaming_and_all),
        cmocka_unit_test(scissorhands_counts_queries_below_an_even_share),
        cmocka_unit_test(finch_divides_by_the_queries_that_could_see_a_slot),
        cmocka_unit_test(r_kv_weighs_attention_against_redundancy),
        cmocka_unit_test(r_kv_drops_earlier_copies_first),
        cmocka_unit_test(g_kv_remembers_with_decay),
        cmocka_unit_test(g_kv_that_sums_is_h2o),
        cmocka_unit_test(obcache_is_the_squared_first_order_change),
        cmocka_unit_test(obcache_in_its_limits),
        cmocka_unit_test(obcache_sums_rows_once),
        cmocka_unit_test(caote_is_what_the_output_loses),
        cmocka_unit_test(obcache_over_another_scorer),
        cmocka_unit_test(dbudgetkv_keeps_sinks_and_a_tail_that_holds_enough),
        cmocka_unit_test(simlayerkv_cuts_lazy_layers_only),
        cmocka_unit_test(critical_goes_half_by_the_base_and_half_by_projected_values),
        cmocka_unit_test(adakv_moves_room_to_where_scores_are),
        cmocka_unit_test(pyramidkv_falls_linearly_and_keeps_the_sum),
        cmocka_unit_test(chunkkv_keeps_whole_chunks),
        cmocka_unit_test(sentences_stay_or_go_whole),
        cmocka_unit_test(an_empty_window_keeps_the_newest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Compactor and its two parts, leverage of keys and attention within chunks, against their definitions in double. */
#include "unit/head_fixture.h"

static void observe(const char *spec, head *x)
{
    const kvs_policy p = parse(spec);
    with_work(&p, x);
    p.ops->observe(p.params, &x->view);
    done_with_work(&p, x);
}

/* ---- leverage ---- */

static double exact_leverage(uint32_t n, uint32_t i)
{
    double mean[DH] = {0}, a[DH * DH], inverse[DH * DH], x[DH], sum = 0;
    for (uint32_t k = 0; k < n; k++)
        for (uint32_t d = 0; d < DH; d++)
            mean[d] += (double)keys[k][d] / n;
    for (uint32_t d = 0; d < DH * DH; d++) {
        a[d] = d / DH == d % DH ? 0.01 : 0;
        for (uint32_t k = 0; k < n; k++)
            a[d] += ((double)keys[k][d / DH] - mean[d / DH]) * ((double)keys[k][d % DH] - mean[d % DH]);
    }
    invert(DH, a, inverse);
    for (uint32_t d = 0; d < DH; d++)
        x[d] = (double)keys[i][d] - mean[d];
    for (uint32_t d = 0; d < DH * DH; d++)
        sum += x[d / DH] * x[d % DH] * inverse[d];
    return sum;
}

static void leverage_sums_to_the_rank_of_the_keys(void **state)
{
    (void)state;
    say(13);
    look(&h, 90, 0);
    const float *s = score("leverage:sketch=0", &h);
    double sum = 0;
    for (uint32_t i = 0; i < 90; i++) {
        near("leverage", i, (double)s[i], exact_leverage(90, i), 16 * DH * EPS);
        sum += (double)s[i];
    }
    assert_true(sum < DH && sum > DH - 0.02);
    /* Two keys c and -c along each of 5 dims: c^2 / (2 c^2 + 0.01) each, 5 in all but for the ridge. */
    memset(keys, 0, sizeof keys);
    for (uint32_t i = 0; i < 10; i++)
        keys[i][i / 2] = i % 2 ? -3.0f : 3.0f;
    look(&h, 10, 0);
    s = score("leverage:sketch=0", &h);
    for (uint32_t i = 0; i < 10; i++)
        near("leverage of five dims", i, (double)s[i], 9 / 18.01, 4 * EPS);
    look(&h, 1, 0); /* one key is its own mean */
    assert_true(score("leverage", &h)[0] == 0);
}

/* A sketch of as many dims as the keys have spans the same space: leverage is then what it was but for the ridge. */
static void a_wide_sketch_leaves_leverage_as_it_is(void **state)
{
    (void)state;
    say(14);
    for (uint32_t i = 0; i < N_MAX; i++)
        for (uint32_t d = 0; d < DH; d++)
            keys[i][d] *= 1000;
    look(&h, 120, 0);
    look(&other, 120, 0);
    const float *const exact = score("leverage:sketch=0", &h), *const wide = score("leverage:sketch=24", &other);
    for (uint32_t i = 0; i < 120; i++) /* 24 sums of DH products, in moments of rank 8 that the ridge of 0.01 bounds */
        near("sketch", i, (double)wide[i], (double)exact[i], 1e-3);
    const float *const narrow = score("leverage:sketch=4", &other);
    double sum = 0;
    for (uint32_t i = 0; i < 120; i++) {
        assert_true(narrow[i] >= 0 && narrow[i] <= 1);
        sum += (double)narrow[i];
    }
    assert_true(fabs(sum - 4) < 1e-3); /* the rank that is left */
    other.view.seed++;
    static float first[N_MAX];
    memcpy(first, narrow, sizeof first);
    assert_memory_not_equal(score("leverage:sketch=4", &other), first, 120 * sizeof *first);
}

/* ---- attention within chunks ---- */

/* Column sums of the softmax of unscaled products within the chunk [begin, end), times |v|, at slot i. */
static double mass_at(uint32_t begin, uint32_t end, uint32_t i)
{
    double mass = 0;
    for (uint32_t t = begin; t < end; t++)
        for (uint32_t g = 0; g < GROUP; g++) {
            double sum = 0, own = 0;
            for (uint32_t k = begin; k < end; k++) {
                double product = 0;
                for (uint32_t d = 0; d < DH; d++)
                    product += (double)q[t][g][d] * (double)keys[k][d];
                sum += exp(product);
                own = k == i ? exp(product) : own;
            }
            mass += own / sum / GROUP;
        }
    return mass * norm(values[i]);
}

/* n tokens of which [sinks, n - recent) are cut into chunks; the mean of three neighbours in there. */
static double attention_at(uint32_t n, uint32_t sinks, uint32_t recent, uint32_t chunk, uint32_t i)
{
    double sum = 0;
    for (uint32_t k = i > sinks ? i - 1 : i; k <= i + 1 && k < n - recent; k++) {
        const uint32_t begin = sinks + (k - sinks) / chunk * chunk;
        sum += mass_at(begin, kvs_min_u32(begin + chunk, n - recent), k) / 3;
    }
    return sum;
}

/* As a session does: observe whenever observe_at says so, then look at n tokens. */
static void live_through(const char *spec, head *x, uint32_t n, bool observe_the_last)
{
    const kvs_policy p = parse(spec);
    const uint32_t window = kvs_policy_window(&p);
    memset(x->carry, 0, sizeof x->carry);
    for (uint64_t at = 1; (at = p.ops->observe_at(p.params, at)) <= n; at++)
        if (at < n || observe_the_last) {
            look(x, (uint32_t)at, window);
            observe(spec, x);
        }
    look(x, n, window);
}

static void attention_within_chunks_meets_later_keys_too(void **state)
{
    (void)state;
    say(15);
    static const uint32_t lengths[] = {1, 30, 49, 50, 100, 137};
    for (uint32_t c = 0; c < 6; c++)
        for (int observed = 0; observed < 2; observed++) {
            const uint32_t n = lengths[c];
            live_through("non_causal_attention:chunk=50", &h, n, observed != 0);
            const float *const s = score("non_causal_attention:chunk=50", &h);
            for (uint32_t i = 0; i < n; i++) {
                const double want = attention_at(n, 0, 0, 50, i);
                near("attention", i, (double)s[i], want, (50 * GROUP + 16 * DH) * 2 * EPS * want); /* logits below 8 */
            }
        }
    /* Without queries nothing is known: zeros, and ties keep the newest. */
    memset(h.carry, 0, sizeof h.carry);
    look(&h, 40, 0);
    assert_true(score("non_causal_attention:chunk=50", &h)[39] == 0);
}

/* Mean and deviation over two heads' slots [begin, end). */
static void z_of(const double *x, uint32_t n, double *mean, double *deviation)
{
    *mean = *deviation = 0;
    for (uint32_t i = 0; i < n; i++)
        *mean += x[i] / n;
    for (uint32_t i = 0; i < n; i++)
        *deviation += (x[i] - *mean) * (x[i] - *mean);
    *deviation = sqrt(*deviation / (n - 1));
}

/* Two heads of one layer, the second with keys and values reversed in time. */
static void compactor_blends_what_is_standardised_over_the_layer(void **state)
{
    (void)state;
    enum { N = 120, MIDDLE = N - 12 };
    for (int blend = -1; blend < 2; blend++) {
        char spec[64];
        snprintf(spec, sizeof spec, "compactor:chunk=40,sketch=0,blend=%d", blend);
        const kvs_policy p = parse(spec);
        static double attention[2 * MIDDLE], leverage[2 * MIDDLE];
        head *const heads[] = {&h, &other};
        kvs_policy_view views[2];
        float *scores[2];
        for (uint32_t k = 0; k < 2; k++) {
            say(16 + k);
            live_through(spec, heads[k], N, true);
            heads[k]->view.n_kv_heads = 2;
            score(spec, heads[k]);
            /* The middle's leverage stands in for keys that begin at slot 0. */
            for (uint32_t i = 8; i < N - 4; i++)
                attention[k * MIDDLE + i - 8] = attention_at(N, 8, 4, 40, i);
            memmove(keys[0], keys[8], sizeof keys[0] * MIDDLE);
            for (uint32_t i = 0; i < MIDDLE; i++)
                leverage[k * MIDDLE + i] = exact_leverage(MIDDLE, i);
            views[k] = heads[k]->view;
            scores[k] = heads[k]->scores;
        }
        p.ops->score_layer(p.params, views, scores);
        double mean[2], deviation[2];
        z_of(attention, 2 * MIDDLE, &mean[0], &deviation[0]);
        z_of(leverage, 2 * MIDDLE, &mean[1], &deviation[1]);
        const double weight = blend < 0 ? 0.5 : blend; /* half of the slots go */
        for (uint32_t k = 0; k < 2; k++)
            for (uint32_t i = 0; i < N; i++) {
                if (i < 8 || i >= N - 4) {
                    assert_true(isinf(scores[k][i]) && scores[k][i] > 0);
                    continue;
                }
                const double want = (attention[k * MIDDLE + i - 8] - mean[0]) / deviation[0] +
                                    weight * (leverage[k * MIDDLE + i - 8] - mean[1]) / deviation[1];
                /* Each part's bound, in deviations. */
                near(spec, i, (double)scores[k][i], want,
                     (50 * GROUP + 16 * DH) * 2 * EPS * (mean[0] / deviation[0] + fabs(want) + 1) +
                         16 * DH * EPS / deviation[1]);
            }
    }
}

static void observations_fall_on_whole_chunks(void **state)
{
    (void)state;
    const kvs_policy p = parse("compactor"), a = parse("non_causal_attention");
    assert_int_equal(kvs_policy_window(&p), 260);
    for (uint64_t n = 0; n < 1500; n++) {
        uint64_t want = n;
        while (want < 8 + 4 + 256 || (want - 12) % 256 != 0)
            want++;
        assert_int_equal(p.ops->observe_at(p.params, n), want);
        for (want = n; want == 0 || want % 256 != 0;)
            want++;
        assert_int_equal(a.ops->observe_at(a.params, n), want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(leverage_sums_to_the_rank_of_the_keys),
        cmocka_unit_test(a_wide_sketch_leaves_leverage_as_it_is),
        cmocka_unit_test(attention_within_chunks_meets_later_keys_too),
        cmocka_unit_test(compactor_blends_what_is_standardised_over_the_layer),
        cmocka_unit_test(observations_fall_on_whole_chunks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

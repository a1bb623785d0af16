/* Scorers that read keys, values and query statistics, each against its definition in plain double precision, and the limits that
 * its paper gives; what Compactor is made of is in test_compactor.c. */
#include "unit/head_fixture.h"

static double dot(const float *x, const double *y)
{
    double sum = 0;
    for (uint32_t d = 0; d < DH; d++)
        sum += (double)x[d] * y[d];
    return sum;
}

/* ---- knorm, keydiff ---- */

static void keydiff_is_minus_the_cosine_with_the_mean_direction(void **state)
{
    (void)state;
    say(1);
    memcpy(keys[40], keys[7], sizeof keys[7]);
    look(&h, 300, 0);
    const float *const s = score("keydiff", &h);
    double anchor[DH] = {0}, length = 0;
    for (uint32_t i = 0; i < 300; i++)
        for (uint32_t d = 0; d < DH; d++)
            anchor[d] += (double)keys[i][d] / norm(keys[i]) / 300;
    for (uint32_t d = 0; d < DH; d++)
        length += anchor[d] * anchor[d];
    for (uint32_t i = 0; i < 300; i++) /* an anchor of 300 f32 terms, then a product of DH */
        near("keydiff", i, (double)s[i], -dot(keys[i], anchor) / norm(keys[i]) / sqrt(length),
             (300 + DH) * EPS / sqrt(length));
    assert_true(s[40] == s[7]);
    /* A key's length does not matter: powers of two leave every bit. */
    static float before[N_MAX];
    memcpy(before, s, sizeof before);
    kvs_rng rng = {2};
    for (uint32_t i = 0; i < 300; i++) {
        const float by = ldexpf(1, 2 * ((int)kvs_rng_below(&rng, 7) - 3));
        for (uint32_t d = 0; d < DH; d++)
            keys[i][d] *= by;
    }
    assert_memory_equal(score("keydiff", &h), before, 300 * sizeof *before);
    memset(keys[3], 0, sizeof keys[3]);
    assert_true(score("keydiff", &h)[3] == 0);
}

/* ---- lagkv ---- */

/* Softmax over the chunk of the deviation over channels, in the range of the chunk behind. */
static void spread(float (*x)[DH], uint32_t begin, uint32_t lag, double *out)
{
    double sum = 0;
    for (uint32_t i = begin; i < begin + lag; i++) {
        double scaled[DH], mean = 0, square = 0;
        for (uint32_t d = 0; d < DH; d++) {
            double low = INFINITY, high = -INFINITY;
            for (uint32_t j = begin + lag; j < begin + 2 * lag; j++) {
                low = fmin(low, (double)x[j][d]);
                high = fmax(high, (double)x[j][d]);
            }
            mean += (scaled[d] = ((double)x[i][d] - low) / (high - low)) / DH;
        }
        for (uint32_t d = 0; d < DH; d++)
            square += (scaled[d] - mean) * (scaled[d] - mean);
        sum += out[i - begin] = exp(sqrt(square / (DH - 1)));
    }
    for (uint32_t i = 0; i < lag; i++)
        out[i] /= sum;
}

static void lagkv_measures_a_chunk_in_the_range_of_the_next(void **state)
{
    (void)state;
    say(3);
    look(&h, 4 + 3 * 32 + 9, 0);
    const float *const cross = score("lagkv:lag=32,cross_scoring=1", &h);
    for (uint32_t chunk = 0; chunk < 2; chunk++) {
        double k[32], v[32];
        spread(keys, 4 + chunk * 32, 32, k);
        spread(values, 4 + chunk * 32, 32, v);
        for (uint32_t i = 0; i < 32; i++) /* scaled numbers up to 2 in size move the exponent by a few EPS each */
            near("lagkv", i, (double)cross[4 + chunk * 32 + i], (k[i] + v[i]) / 2, 8 * (DH + 32) * EPS * k[i]);
    }
    for (uint32_t i = 0; i < h.view.n_slots; i++)
        assert_true(i < 4 || i >= 4 + 64 ? cross[i] == 1 : cross[i] < 1);
    /* Ranks: a permutation of 0 .. 31 over 32 in every chunk, in the order of the scores. */
    static float by_score[N_MAX];
    memcpy(by_score, cross, sizeof by_score);
    const float *const rank = score("lagkv:lag=32", &h);
    for (uint32_t chunk = 0; chunk < 2; chunk++)
        for (uint32_t i = 0; i < 32; i++) {
            const uint32_t at = 4 + chunk * 32;
            uint32_t below = 0;
            for (uint32_t j = 0; j < 32; j++)
                below += by_score[at + j] < by_score[at + i];
            assert_true(rank[at + i] == (float)below / 32);
        }
}

static void lagkv_looks_one_chunk_ahead_and_no_further(void **state)
{
    (void)state;
    say(4);
    look(&h, 4 + 6 * 16, 0);
    static float whole[N_MAX];
    memcpy(whole, score("lagkv:lag=16,cross_scoring=1", &h), sizeof whole);
    for (uint32_t i = 4 + 4 * 16; i < N_MAX; i++)
        memset(keys[i], 0x40, sizeof keys[i]);
    const float *s = score("lagkv:lag=16,cross_scoring=1", &h);
    assert_memory_equal(s, whole, (4 + 3 * 16) * sizeof *s); /* chunk 2 looks at chunk 3, which is as it was */
    assert_true(memcmp(s + 4 + 3 * 16, whole + 4 + 3 * 16, 16 * sizeof *s) != 0);
    /* Streamed: with chunk 3 the newest, chunks 0 to 2 have the scores they keep. */
    look(&h, 4 + 4 * 16 + 3, 0);
    s = score("lagkv:lag=16,cross_scoring=1", &h);
    assert_memory_equal(s, whole, (4 + 3 * 16) * sizeof *s);
    /* Too short to compare anything: the newest stay, after the sinks. */
    look(&h, 4 + 31, 0);
    s = score("lagkv:lag=16", &h);
    for (uint32_t i = 0; i < 35; i++)
        assert_true(i < 4 ? s[i] == 1 : s[i] < 1 && (i == 4 || s[i] > s[i - 1]));
}

/* ---- cur ---- */

static void cur_takes_shares_of_squared_norms(void **state)
{
    (void)state;
    say(5);
    enum { N = 203 };
    look(&h, N, 0);
    double share[2][N];
    for (uint32_t kv = 0; kv < 2; kv++)
        for (uint32_t i = 0; i < N; i++) {
            double sum = 0;
            for (uint32_t j = i / 16 * 16; j < i / 16 * 16 + 16 && j < N; j++)
                sum += pow(norm(kv == 0 ? keys[j] : values[j]), 2);
            share[kv][i] = pow(norm(kv == 0 ? keys[i] : values[i]), 2) / sum;
        }
    for (uint32_t type = 0; type < 4; type++) {
        double want[N], sum = 0;
        for (uint32_t i = 0; i < N; i++)
            sum += want[i] = type == 0   ? share[0][i] * share[1][i]
                             : type == 1 ? share[0][i]
                             : type == 2 ? share[1][i]
                                         : (share[0][i] + share[1][i]) / 2;
        char spec[32];
        snprintf(spec, sizeof spec, "cur:type=%u", type);
        const float *const s = score(spec, &h);
        for (uint32_t i = 0; i < N; i++)
            near(spec, i, (double)s[i], i < 4 ? 1 : want[i] / sum, (N + 4 * (DH + 16)) * EPS * want[i] / sum);
    }
}

/* Keys alone and without shares it is knorm upside down: order of large norms instead of small ones. */
static void cur_of_keys_alone_is_knorm_reversed(void **state)
{
    (void)state;
    say(6);
    look(&h, 200, 0);
    look(&other, 200, 0);
    const float *const cur = score("cur:type=1,window=0,sinks=0", &h), *const knorm = score("knorm", &other);
    for (uint32_t i = 0; i < 200; i++)
        for (uint32_t j = 0; j < 200; j++)
            if (norm(keys[i]) > norm(keys[j]) * (1 + 4 * DH * EPS)) {
                assert_true(cur[i] > cur[j]);
                assert_true(knorm[i] < knorm[j]);
            }
}

static void a_projection_is_a_product(void **state)
{
    (void)state;
    say(6);
    float sketch[DH * 20], projected[50 * 20];
    kvs_sketch(77, DH, 20, sketch);
    kvs_project(sketch, DH, 20, keys[0], 50, projected);
    for (uint32_t i = 0; i < 50 * 20; i++) {
        double want = 0, size = 0;
        for (uint32_t d = 0; d < DH; d++) {
            const double term = (double)keys[i / 20][d] * (double)sketch[d * 20 + i % 20];
            want += term;
            size += fabs(term);
        }
        near("projection", i, (double)projected[i], want, (DH + 1) * EPS * size);
    }
}

static void a_sketch_has_mean_zero_and_the_variance_it_promises(void **state)
{
    (void)state;
    static float a[200 * 50];
    kvs_sketch(5, 200, 50, a);
    double sum = 0, square = 0, fourth = 0;
    for (uint32_t i = 0; i < 10000; i++) {
        const double x = (double)a[i] * sqrt(50);
        sum += x / 10000;
        square += x * x / 10000;
        fourth += x * x * x * x / 10000;
    }
    assert_true(fabs(sum) < 5 / sqrt(10000));                 /* five deviations of a mean of 10,000 */
    assert_true(fabs(square - 1) < 5 * sqrt(2 / 10000.0));    /* of a mean of squares */
    assert_true(fabs(fourth - 2.9) < 5 * sqrt(96 / 10000.0)); /* 3 - 1.2 / 12; fourth powers of a Gaussian vary by 96 */
}

/* ---- expected attention ---- */

/* Mean and covariance of query head g, turned by each of the next `future` rotations and averaged. */
static void expect(const head *x, uint32_t g, uint32_t future, double mean[DH], double cov[DH][DH])
{
    double turn[DH][DH] = {{0}}, mu[DH], sigma[DH][DH], half[DH][DH];
    for (uint32_t d = 0; d < DH; d++) {
        mu[d] = x->sum[g * DH + d] / (double)x->view.n_queries;
        turn[d][d] = d < 2 * N_FREQ ? 0 : 1;
    }
    for (uint32_t p = 0; p < future; p++)
        for (uint32_t f = 0; f < N_FREQ; f++) {
            const double angle = x->theta[f] * (x->view.rope_next + (double)p);
            turn[2 * f][2 * f] += cos(angle) / future;
            turn[2 * f][2 * f + 1] -= sin(angle) / future;
            turn[2 * f + 1][2 * f] += sin(angle) / future;
            turn[2 * f + 1][2 * f + 1] += cos(angle) / future;
        }
    for (uint32_t i = 0; i < DH; i++)
        for (uint32_t j = 0; j < DH; j++) {
            const uint32_t at = i > j ? i * DH + j : j * DH + i;
            sigma[i][j] = x->square[g * DH * DH + at] / (double)x->view.n_queries - mu[i] * mu[j];
        }
    for (uint32_t i = 0; i < DH; i++) {
        mean[i] = 0;
        for (uint32_t j = 0; j < DH; j++) {
            mean[i] += turn[i][j] * mu[j];
            half[i][j] = 0;
            for (uint32_t k = 0; k < DH; k++)
                half[i][j] += turn[i][k] * sigma[k][j];
        }
    }
    for (uint32_t i = 0; i < DH; i++)
        for (uint32_t j = 0; j < DH; j++) {
            cov[i][j] = 0;
            for (uint32_t k = 0; k < DH; k++)
                cov[i][j] += half[i][k] * turn[j][k];
        }
}

static void expected_attention_is_its_formula(void **state)
{
    (void)state;
    say(7);
    enum { N = 150 };
    look(&h, N, 0);
    static const char *const specs[] = {"expected_attention", "expected_attention:covariance=0,vnorm=0,future=1",
                                        "expected_attention:epsilon=0.02,sinks=0,future=37"};
    for (uint32_t c = 0; c < 3; c++) {
        const uint32_t future = c == 0 ? 512 : c == 1 ? 1 : 37, sinks = c == 2 ? 0 : 4;
        const float *const s = score(specs[c], &h);
        double want[N] = {0};
        for (uint32_t g = 0; g < GROUP; g++) {
            double mean[DH], cov[DH][DH], p[N], sum = 0;
            expect(&h, g, future, mean, cov);
            for (uint32_t i = sinks; i < N; i++) {
                double logit = dot(keys[i], mean) / sqrt(DH);
                for (uint32_t a = 0; c != 1 && a < DH; a++)
                    logit += (double)keys[i][a] * dot(keys[i], cov[a]) / (2 * DH);
                sum += p[i] = exp(logit);
            }
            for (uint32_t i = sinks; i < N; i++)
                want[i] += p[i] / sum / GROUP;
        }
        for (uint32_t i = 0; i < N; i++) {
            if (i < sinks) {
                assert_true(isinf(s[i]) && s[i] > 0);
                continue;
            }
            const double by = c == 1 ? 1 : norm(values[i]), value = (want[i] + (c == 2 ? 0.02 : 0)) * by;
            near(specs[c], i, (double)s[i], value, (N + 8 * DH * DH) * EPS * value); /* logits are below 8 in size */
        }
    }
    h.view.n_queries = 0;
    const float *const s = score("expected_attention", &h);
    for (uint32_t i = 4; i < N; i++)
        assert_true(s[i] == 0);
}

/* Without rotation and with Gaussian queries the score is what attention before normalisation is in the mean. */
static void expected_attention_foretells_gaussian_queries(void **state)
{
    (void)state;
    say(8);
    look(&h, 20, 0);
    memset(h.theta, 0, sizeof h.theta);
    enum { DRAWS = 40000 };
    static double weight[DRAWS][20];
    kvs_rng rng = {9};
    memset(h.sum, 0, sizeof h.sum);
    memset(h.square, 0, sizeof h.square);
    for (uint32_t t = 0; t < DRAWS; t++) {
        double x[DH], z[DH];
        for (uint32_t d = 0; d < DH; d++) { /* Box and Muller; then correlated with the dim before */
            const double u = 1 - kvs_rng_double(&rng), v = kvs_rng_double(&rng);
            z[d] = sqrt(-2 * log(u)) * cos(2 * acos(-1) * v);
            x[d] = 0.3 * d / DH + 0.5 * z[d] + (d > 0 ? 0.4 * z[d - 1] : 0);
        }
        for (uint32_t g = 0; g < GROUP; g++)
            for (uint32_t i = 0; i < DH; i++) {
                h.sum[g * DH + i] += x[i];
                for (uint32_t j = 0; j <= i; j++)
                    h.square[(g * DH + i) * DH + j] += x[i] * x[j];
            }
        for (uint32_t i = 0; i < 20; i++)
            weight[t][i] = exp(dot(keys[i], x) / sqrt(DH));
    }
    h.view.n_queries = DRAWS;
    const float *const s = score("expected_attention:vnorm=0,sinks=0", &h);
    double mean[20] = {0}, all = 0, square[20] = {0};
    for (uint32_t t = 0; t < DRAWS; t++)
        for (uint32_t i = 0; i < 20; i++)
            mean[i] += weight[t][i] / DRAWS;
    for (uint32_t i = 0; i < 20; i++) {
        all += mean[i];
        for (uint32_t t = 0; t < DRAWS; t++)
            square[i] += pow(weight[t][i] - mean[i], 2) / DRAWS;
    }
    for (uint32_t i = 0; i < 20; i++) /* five standard errors of the mean; the sum's are no larger */
        near("Monte Carlo", i, (double)s[i], mean[i] / all, 10 * sqrt(square[i] / DRAWS) / all);
}

/* Queries that are all the same have no covariance: the term must vanish. */
static void expected_attention_without_spread_needs_no_covariance(void **state)
{
    (void)state;
    say(10);
    for (uint32_t t = 0; t < N_MAX; t++)
        for (uint32_t g = 0; g < GROUP; g++)
            for (uint32_t d = 0; d < DH; d++)
                q[t][g][d] = (float)(d + g) / 8; /* sums are exact */
    look(&h, 132, 0);                            /* 128 queries: so are means */
    look(&other, 132, 0);
    const float *const with = score("expected_attention", &h), *const without =
                                                                   score("expected_attention:covariance=0", &other);
    assert_memory_equal(with, without, 132 * sizeof *with);
}

/* ---- cap ---- */

static void cap_is_its_formula(void **state)
{
    (void)state;
    say(11);
    enum { N = 130 };
    memset(values[60], 0, sizeof values[60]);
    look(&h, N, 0);
    for (uint32_t c = 0; c < 2; c++) {
        const double tau = c == 0 ? 5 : 0;
        const float *const s = score(c == 0 ? "cap" : "cap:tau=0", &h);
        double want[N] = {0};
        for (uint32_t g = 0; g < GROUP; g++) {
            double mean[DH], cov[DH][DH], w[N], most = -INFINITY, length = 0, a[DH * DH], inverse[DH * DH];
            expect(&h, g, 512, mean, cov);
            for (uint32_t d = 0; d < DH; d++)
                length += mean[d] * mean[d];
            for (uint32_t i = 4; i < N; i++)
                most = fmax(most, w[i] = tau * dot(keys[i], mean) / norm(keys[i]) / sqrt(length));
            for (uint32_t d = 0; d < DH * DH; d++)
                a[d] = d / DH == d % DH;
            for (uint32_t i = 4; i < N; i++) {
                w[i] = exp(w[i] - most);
                for (uint32_t d = 0; d < DH * DH; d++)
                    a[d] += (w[i] + 1e-6) * (double)values[i][d / DH] * (double)values[i][d % DH];
            }
            invert(DH, a, inverse);
            for (uint32_t i = 4; i < N; i++)
                for (uint32_t d = 0; d < DH; d++)
                    want[i] += w[i] * (double)values[i][d] * dot(values[i], inverse + d * DH) / GROUP;
        }
        double sum = 0;
        for (uint32_t i = 4; i < N; i++) { /* (w + 1e-6) - 1e-6 loses up to EPS of 1 */
            near("cap", i, (double)s[i], want[i], (4 * DH + 32) * EPS * want[i] + 2 * EPS);
            sum += (double)s[i];
        }
        assert_true(isinf(s[3]) && s[60] == 0);
        /* Leverages in the ridge sense: below the number of dims, and near it when each dim is held many times. */
        if (c == 1)
            assert_true(sum < DH && sum > DH - 1);
    }
}

/* ---- qfilter ---- */

static void qfilter_finds_the_direction_of_the_queries(void **state)
{
    (void)state;
    say(12);
    double u[DH], length = 0;
    for (uint32_t d = 0; d < DH; d++)
        length += pow(u[d] = (double)d - 2.5, 2);
    look(&h, 100, 0);
    for (int sign = 1; sign >= -1; sign -= 2) {
        /* 3 u u^T + I / 10 has u for its first vector, exactly. */
        for (uint32_t g = 0; g < GROUP; g++)
            for (uint32_t i = 0; i < DH; i++) {
                h.sum[g * DH + i] = sign * (u[i] + 0.2 * (i == 3));
                for (uint32_t j = 0; j <= i; j++)
                    h.square[(g * DH + i) * DH + j] = 3 * u[i] * u[j] + (i == j ? 0.1 : 0);
            }
        const float *const s = score("qfilter", &h);
        for (uint32_t i = 0; i < 100; i++)
            near("qfilter", i, (double)s[i], sign * dot(keys[i], u) / sqrt(length), 1e-8 + 2 * EPS * norm(keys[i]));
    }
    memset(h.sum, 0, sizeof h.sum);
    assert_true(score("qfilter", &h)[5] == 0); /* no direction: all equal */
}

/* ---- layers that are left alone ---- */

static void skipped_layers_keep_what_they_hold_within_bounds(void **state)
{
    (void)state;
    enum { LAYERS = 10, HEADS = 3 };
    const kvs_policy p = parse("knorm +budget=skip:layers=2"), none = parse("knorm +budget=skip:layers=0"),
                     every = parse("knorm +budget=skip:layers=10");
    static const struct {
        uint32_t n_slots, n_even, low, high; /* what a head of a skipped layer keeps, and of another at least */
    } cases[] = {
        {130, 100, 130, 92}, /* all they hold: 2 * 30 more, 8 layers share 740 */
        {500, 100, 250, 62}, /* half of 1,000 in two layers; 8 share 500 */
        {100, 100, 100, 100}, {40, 10, 25, 6}, {1, 1, 1, 1},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        uint32_t n_slots[LAYERS * HEADS], n_even[LAYERS * HEADS], n_hard[LAYERS * HEADS] = {0}, n_keep[LAYERS * HEADS];
        for (uint32_t at = 0; at < LAYERS * HEADS; at++) {
            n_slots[at] = cases[c].n_slots;
            n_even[at] = cases[c].n_even;
        }
        const kvs_budget_view v = {
            .n_layers = LAYERS, .n_kv_heads = HEADS, .n_slots = n_slots, .n_protected = n_hard, .n_even = n_even};
        const kvs_policy *const policies[] = {&p, &none, &every};
        for (uint32_t k = 0; k < 3; k++) {
            policies[k]->budget->allocate(policies[k]->budget_params, &v, n_keep);
            uint32_t sum = 0;
            for (uint32_t at = 0; at < LAYERS * HEADS; at++) {
                sum += n_keep[at];
                assert_int_equal(n_keep[at], n_keep[at - at % HEADS]);
                if (k > 0)
                    assert_int_equal(n_keep[at], cases[c].n_even);
                else if (at < 2 * HEADS)
                    assert_int_equal(n_keep[at], cases[c].low);
                else
                    assert_true(n_keep[at] >= cases[c].high && n_keep[at] <= cases[c].high + 1);
            }
            assert_int_equal(sum, LAYERS * HEADS * cases[c].n_even);
        }
    }
}

/* ---- the view's part of it, on a model ---- */

static void a_session_pairs_the_newest_rows_with_their_slots(void **state)
{
    (void)state;
    tiny_options o;
    fx_shape(&o, GGML_TYPE_F32);
    kvs_model *const m = fx_open(&o, 2, 0);
    assert_non_null(m);
    kvs_session_options so;
    kvs_session_options_default(&so);
    so.policy = "compactor:chunk=40,recent=0,keep=0.6 +protect=none";
    so.budget_tokens = 150;
    so.kv_type = KVS_KV_F32;
    kvs_session *const s = fx_session(m, &so);
    assert_non_null(s);
    int32_t tokens[400];
    fx_tokens(5, tokens, 400);
    kvs_error err = {.message = ""};
    for (uint32_t at = 0; at < 400; at += 50) {
        assert_int_equal(kvs_session_extend(s, tokens + at, NULL, 50, NULL, &err), KVS_OK);
        kvs_view_scratch *const t = &s->scratch.threads[0];
        const kvs_policy_view v = kvs_view_head(s, 1, 2, t);
        assert_int_equal(v.n_window, kvs_min_u32(40, at + 50));
        assert_int_equal(v.n_pair, kvs_window_slots(&v));
        assert_int_equal(v.window_pos[v.n_window - 1], at + 49);
        const uint32_t dh = v.head_dim, first = v.n_slots - v.n_pair;
        float row[KVS_HEAD_DIM_MAX], cos_sin[KVS_HEAD_DIM_MAX];
        for (uint32_t r = 0; r < v.n_window; r++)
            for (uint32_t g = 0; g < v.group; g++)
                for (uint32_t i = 0; i < v.n_pair; i++) {
                    memcpy(row, v.keys_raw + (size_t)(first + i) * dh, dh * sizeof *row);
                    kvs_rope_row(&m->rope, v.rope_pos[first + i], cos_sin);
                    m->kernels->rope(row, 1, dh, cos_sin, m->n_freq);
                    const float *const query = v.window_query + ((size_t)r * v.group + g) * dh;
                    double want = 0, size = 0;
                    for (uint32_t d = 0; d < dh; d++) {
                        want += (double)query[d] * (double)row[d];
                        size += fabs((double)query[d] * (double)row[d]);
                    }
                    /* Raw keys were turned back and forth: three roundings of two products each beside the sum's. */
                    near("pair", i, (double)v.window_pair[((size_t)r * v.group + g) * v.n_pair + i], want / sqrt(dh),
                         (dh + 16) * EPS * (size + 0.1) / sqrt(dh));
                }
    }
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    assert_true(u.n_evictions > 2);
    kvs_session *fresh = s;
    kvs_session_free(&fresh);
    kvs_model *model = m;
    kvs_model_close(&model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keydiff_is_minus_the_cosine_with_the_mean_direction),
        cmocka_unit_test(lagkv_measures_a_chunk_in_the_range_of_the_next),
        cmocka_unit_test(lagkv_looks_one_chunk_ahead_and_no_further),
        cmocka_unit_test(cur_takes_shares_of_squared_norms),
        cmocka_unit_test(cur_of_keys_alone_is_knorm_reversed),
        cmocka_unit_test(a_projection_is_a_product),
        cmocka_unit_test(a_sketch_has_mean_zero_and_the_variance_it_promises),
        cmocka_unit_test(expected_attention_is_its_formula),
        cmocka_unit_test(expected_attention_foretells_gaussian_queries),
        cmocka_unit_test(expected_attention_without_spread_needs_no_covariance),
        cmocka_unit_test(cap_is_its_formula),
        cmocka_unit_test(qfilter_finds_the_direction_of_the_queries),
        cmocka_unit_test(skipped_layers_keep_what_they_hold_within_bounds),
        cmocka_unit_test(a_session_pairs_the_newest_rows_with_their_slots),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* What becomes of slots that go: each way against its definition in double precision, and whole sessions that
 * merge, whose forks, saves and refusals must not show it. */
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include "unit/policy_fixture.h"

enum { N = 700, VOCAB = TINY_VOCAB_MIN, ROOMY = 512, TIGHT = 192, UNIT_MAX = 400 };

static uint8_t changed[SLOTS_MAX];
static float before[SLOTS_MAX * HEAD_DIM];

/* ---- one head ---------------------------------------------------------------------------------------------------- */

/* n slots of which about one in `one_in` goes; the newest stays. */
static void draw_keep(kvs_rng *rng, uint32_t n, uint32_t one_in)
{
    for (uint32_t i = 0; i < n; i++) {
        b.keep[i] = i + 1 == n || kvs_rng_below(rng, one_in) != 0;
        b.scores[i] = random_mass(rng);
    }
}

static void dispose(const char *spec)
{
    const kvs_policy p = parse(spec);
    const uint32_t n = b.view.n_slots;
    memcpy(before, b.values, (size_t)n * HEAD_DIM * sizeof *before);
    memset(changed, 0, n);
    b.view.work = malloc((kvs_policy_work(&p, n, HEAD_DIM) + 1) * sizeof(float));
    assert_non_null(b.view.work);
    float *const keys = p.dispose->writes_keys != NULL && p.dispose->writes_keys(p.dispose_params) ? b.keys_raw : NULL;
    p.dispose->merge(p.dispose_params, &b.view, b.scores, b.keep, keys, b.values, changed);
    free(b.view.work);
    b.view.work = NULL;
    for (uint32_t i = 0; i < n; i++) {
        assert_true(changed[i] <= b.keep[i]);
        if (!changed[i])
            assert_memory_equal(b.values + i * HEAD_DIM, before + i * HEAD_DIM, HEAD_DIM * sizeof *before);
    }
}

static double dot(const float *x, const float *y)
{
    double sum = 0;
    for (uint32_t d = 0; d < HEAD_DIM; d++)
        sum += (double)x[d] * (double)y[d];
    return sum;
}

static double cosine(uint32_t i, uint32_t k)
{
    const float *const x = b.keys + i * HEAD_DIM, *const y = b.keys + k * HEAD_DIM;
    return dot(x, y) / sqrt(dot(x, x) * dot(y, y));
}

/* What one slot that goes is nearest to; doubtful where rounding could say otherwise. */
typedef struct nearest {
    uint32_t slot;
    double like;
    bool doubtful;
} nearest;

static nearest near[UNIT_MAX];

static void find_all(uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        double second = -2;
        near[i] = (nearest){.like = -2};
        for (uint32_t k = 0; k < n && !b.keep[i]; k++) {
            if (!b.keep[k])
                continue;
            const double like = cosine(i, k);
            if (like > near[i].like) {
                second = near[i].like;
                near[i] = (nearest){.slot = k, .like = like};
            } else if (like > second) {
                second = like;
            }
        }
        near[i].doubtful = near[i].like - second < 1e-5;
    }
}

/* The least likeness that merges; *doubtful where two slots are too close to it to say. */
static double least_like(uint32_t n, double threshold, double fraction, double *gap)
{
    double sorted[UNIT_MAX];
    uint32_t n_gone = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (b.keep[i])
            continue;
        uint32_t at = n_gone++;
        for (; at > 0 && sorted[at - 1] < near[i].like; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = near[i].like;
    }
    *gap = 1;
    if (fraction >= 1 || n_gone == 0)
        return threshold;
    const uint32_t n_merged = n_gone - (uint32_t)ceil((1 - fraction) * (n_gone - 1));
    if (n_merged < n_gone)
        *gap = sorted[n_merged - 1] - sorted[n_merged];
    const double least = sorted[n_merged - 1] - *gap / 2;
    return least > threshold ? least : threshold;
}

/* Compares kept slot k; returns whether it took something in. */
static bool check_merged(uint32_t k, uint32_t n, double least)
{
    double sum[HEAD_DIM], weight_sum = 0, most = 0;
    uint32_t n_in = 0;
    for (uint32_t d = 0; d < HEAD_DIM; d++)
        sum[d] = (double)before[k * HEAD_DIM + d];
    for (uint32_t i = 0; i < n; i++) {
        if (b.keep[i])
            continue;
        if ((near[i].doubtful && fabs(cosine(i, k) - near[i].like) < 1e-5) || fabs(near[i].like - least) < 1e-6)
            return false;
        if (near[i].slot != k || near[i].like < least || near[i].like <= 0)
            continue;
        const float *const from = before + i * HEAD_DIM, *const into = before + k * HEAD_DIM;
        const double norm = sqrt(dot(from, from));
        const double weight = near[i].like * norm / (norm + sqrt(dot(into, into)) + 1e-6);
        weight_sum += weight;
        n_in++;
        for (uint32_t d = 0; d < HEAD_DIM; d++)
            sum[d] += weight * (double)from[d];
    }
    for (uint32_t i = 0; i < n * HEAD_DIM; i++)
        most = fmax(most, fabs((double)before[i]));
    assert_int_equal(changed[k], n_in > 0);
    /* A weight is off by 40 roundings at most (three products of 8 terms, a root each, 3 operations), times a difference of up to
     * 2 most; then one rounding each for the sum, the quotient and the result. */
    const double bound = 0x1p-24 * most * (2 * 44 * n_in + 4);
    for (uint32_t d = 0; d < HEAD_DIM; d++) {
        const double got = (double)b.values[k * HEAD_DIM + d], want = sum[d] / (1 + weight_sum);
        if (!(fabs(got - want) <= bound))
            fail_msg("slot %u of %u, dim %u: %.9g, expected %.9g (%u merged)", k, n, d, got, want, n_in);
    }
    return n_in > 0;
}

static void merge_is_not_the_weighted_mean_it_says(void **state)
{
    (void)state;
    kvs_rng rng = {11};
    static const char *const specs[] = {"streaming +dispose=merge", "streaming +dispose=merge:threshold=0.6",
                                        "streaming +dispose=merge:fraction=0.5",
                                        "streaming +dispose=merge:fraction=0.25,threshold=0.5"};
    static const double thresholds[] = {0, 0.6, 0, 0.5}, fractions[] = {1, 1, 0.5, 0.25};
    uint32_t n_checked = 0;
    for (uint32_t round = 0; round < 120; round++) {
        const uint32_t n = 2 + kvs_rng_below(&rng, UNIT_MAX - 2);
        fill_view(&rng, n);
        draw_keep(&rng, n, 2 + round % 3);
        find_all(n);
        dispose(specs[round % 4]);
        double gap;
        const double least = least_like(n, thresholds[round % 4], fractions[round % 4], &gap);
        if (gap < 1e-6)
            continue;
        for (uint32_t k = 0; k < n; k++)
            n_checked += b.keep[k] && check_merged(k, n, least);
    }
    assert_true(n_checked > 3000);
}

static void threshold_above_one_merges(void **state)
{
    (void)state;
    kvs_rng rng = {12};
    for (uint32_t n = 2; n < 300; n += 17) {
        fill_view(&rng, n);
        memcpy(b.keys + HEAD_DIM, b.keys, HEAD_DIM * sizeof *b.keys); /* a copy is no more alike than 1 */
        draw_keep(&rng, n, 2);
        b.keep[0] = 0;
        b.keep[1] = 1;
        dispose("streaming +dispose=merge:threshold=1.01");
        for (uint32_t i = 0; i < n; i++)
            assert_int_equal(changed[i], 0);
    }
}

/* The weights sum to 1: what all slots agree on no merge moves, not by a bit. */
static void equal_values_drift(void **state)
{
    (void)state;
    kvs_rng rng = {13};
    for (uint32_t n = 2; n < 300; n += 7) {
        fill_view(&rng, n);
        for (uint32_t i = 1; i < n; i++)
            memcpy(b.values + i * HEAD_DIM, b.values, HEAD_DIM * sizeof *b.values);
        draw_keep(&rng, n, 2);
        dispose(n % 2 ? "streaming +dispose=merge" : "streaming +dispose=nearest");
        assert_memory_equal(b.values, before, (size_t)n * HEAD_DIM * sizeof *before);
    }
}

/* ---- cam ---- */

/* Masses that make every chance 0 or 1: what goes weighs `gone`, what stays 1. */
static void set_masses(uint32_t n, float gone)
{
    for (uint32_t i = 0; i < n; i++)
        b.mass_sum[i] = b.keep[i] ? 1 : gone;
}

static void cam_shares_out_wrongly(void **state)
{
    (void)state;
    kvs_rng rng = {14};
    for (int round = 0; round < 60; round++) {
        const uint32_t n = 2 + kvs_rng_below(&rng, UNIT_MAX - 2), m_max = 1 + kvs_rng_below(&rng, 40);
        fill_view(&rng, n);
        draw_keep(&rng, n, 3);
        set_masses(n, 1);
        char spec[64];
        snprintf(spec, sizeof spec, "h2o +dispose=cam:next=%u,all=1", m_max);
        dispose(spec);
        static double want[UNIT_MAX * HEAD_DIM], size[UNIT_MAX];
        static uint32_t n_in[UNIT_MAX];
        memset(n_in, 0, sizeof n_in);
        memset(size, 0, sizeof size);
        for (uint32_t i = 0; i < n * HEAD_DIM; i++)
            want[i] = (double)before[i];
        for (uint32_t i = 0; i < n; i++) {
            uint32_t next[64], m = 0;
            for (uint32_t k = i + 1; k < n && m < m_max; k++)
                if (b.keep[k])
                    next[m++] = k;
            for (uint32_t k = 0; k < m && !b.keep[i]; k++) {
                n_in[next[k]]++;
                for (uint32_t d = 0; d < HEAD_DIM; d++) {
                    want[next[k] * HEAD_DIM + d] += (double)before[i * HEAD_DIM + d] / m;
                    size[next[k]] += fabs((double)before[i * HEAD_DIM + d]);
                }
            }
        }
        for (uint32_t i = 0; i < n; i++) {
            assert_int_equal(changed[i], n_in[i] > 0);
            for (uint32_t d = 0; d < HEAD_DIM; d++) {
                const double got = (double)b.values[i * HEAD_DIM + d];
                if (!(fabs(got - want[i * HEAD_DIM + d]) <= 0x1p-24 * (n_in[i] + 1) * (4 + size[i])))
                    fail_msg("slot %u of %u: %.9g, expected %.9g", i, n, got, want[i * HEAD_DIM + d]);
            }
        }
    }
}

static void cam_merges_what_got_no_attention(void **state)
{
    (void)state;
    kvs_rng rng = {15};
    for (uint32_t n = 2; n < 300; n += 7) {
        fill_view(&rng, n);
        draw_keep(&rng, n, 3);
        set_masses(n, 0);
        dispose("h2o +dispose=cam:all=1");
        assert_memory_equal(b.values, before, (size_t)n * HEAD_DIM * sizeof *before);
    }
}

/* Half the attention that the next slots get on average: merged in half of the events, and then with 1 / m each. */
static void cam_coin_is_loaded(void **state)
{
    (void)state;
    kvs_rng rng = {16};
    enum { EVENTS = 4000, M = 4 };
    for (uint32_t quarter = 1; quarter < 4; quarter++) {
        uint32_t n_merged = 0;
        fill_view(&rng, 12);
        memset(b.keep, 1, 12);
        b.keep[3] = 0;
        set_masses(12, (float)quarter / 4);
        static float saved[12 * HEAD_DIM];
        memcpy(saved, b.values, sizeof saved);
        for (b.view.event = 0; b.view.event < EVENTS; b.view.event++) {
            memcpy(b.values, saved, sizeof saved);
            dispose("h2o +dispose=cam:next=4");
            n_merged += changed[4];
            for (uint32_t i = 0; i < 12; i++)
                assert_int_equal(changed[i], i > 3 && i <= 3 + M ? changed[4] : 0);
        }
        const double p = quarter / 4.0, sigma = sqrt(EVENTS * p * (1 - p));
        assert_true(fabs(n_merged - EVENTS * p) < 5 * sigma);
    }
}

/* Of what goes only as many as tokens were said since the last eviction, the best scored. */
static void cam_merges_more_than_was_said(void **state)
{
    (void)state;
    kvs_rng rng = {17};
    fill_view(&rng, 40);
    for (uint32_t i = 0; i < 40; i++) {
        b.keep[i] = i >= 20;
        b.scores[i] = i == 4 || i == 11 || i == 17 ? 2 : 1;
    }
    set_masses(40, 5);
    b.view.n_tokens_last = b.view.n_tokens - 3;
    for (uint32_t i = 0; i < 20 * HEAD_DIM; i++)
        b.values[i] = i / HEAD_DIM == 4 || i / HEAD_DIM == 11 || i / HEAD_DIM == 17 ? 0 : NAN;
    dispose("h2o +dispose=cam:next=2");
    for (uint32_t d = 0; d < 2 * HEAD_DIM; d++)
        assert_true(b.values[20 * HEAD_DIM + d] == before[20 * HEAD_DIM + d]);
    assert_int_equal(changed[20] + changed[21], 2);
    assert_int_equal(changed[22], 0);
}

/* ---- nearest ---- */

static uint32_t nearest_kept(const int32_t *pos, const uint8_t *keep, uint32_t i, uint32_t n)
{
    uint32_t best = n;
    for (uint32_t k = 0; k < n; k++)
        if (keep[k] && (best == n || abs(pos[k] - pos[i]) < abs(pos[best] - pos[i])))
            best = k;
    return best;
}

/* Row k of rows and of those that join it, in double precision. */
static void mean_of(const float *rows, const int32_t *pos, const uint8_t *keep, uint32_t k, uint32_t n, uint32_t dim,
                    double *mean, uint32_t *n_in)
{
    *n_in = 0;
    for (uint32_t d = 0; d < dim; d++)
        mean[d] = (double)rows[(size_t)k * dim + d];
    for (uint32_t i = 0; i < n; i++) {
        if (keep[i] || nearest_kept(pos, keep, i, n) != k)
            continue;
        ++*n_in;
        for (uint32_t d = 0; d < dim; d++)
            mean[d] += (double)rows[(size_t)i * dim + d];
    }
    for (uint32_t d = 0; d < dim; d++)
        mean[d] /= *n_in + 1;
}

static void nearest_is_not_the_mean(void **state)
{
    (void)state;
    kvs_rng rng = {19};
    static float keys[UNIT_MAX * HEAD_DIM];
    for (int round = 0; round < 100; round++) {
        const uint32_t n = 2 + kvs_rng_below(&rng, UNIT_MAX - 2);
        fill_view(&rng, n);
        draw_keep(&rng, n, 2);
        memcpy(keys, b.keys_raw, (size_t)n * HEAD_DIM * sizeof *keys);
        dispose(round % 2 ? "streaming +dispose=nearest" : "streaming +dispose=nearest:keys=0");
        for (uint32_t k = 0; k < n; k++) {
            double value[HEAD_DIM], key[HEAD_DIM];
            uint32_t n_in;
            if (!b.keep[k])
                continue;
            mean_of(before, b.pos, b.keep, k, n, HEAD_DIM, value, &n_in);
            mean_of(keys, b.pos, b.keep, k, n, HEAD_DIM, key, &n_in);
            assert_int_equal(changed[k], n_in > 0);
            /* Two roundings a slot that joined, of what is below 3.1, and two more. */
            const double bound = 0x1p-24 * 3.1 * (2 * n_in + 2);
            for (uint32_t d = 0; d < HEAD_DIM; d++) {
                const double key_want = round % 2 ? key[d] : (double)keys[k * HEAD_DIM + d];
                assert_true(fabs((double)b.values[k * HEAD_DIM + d] - value[d]) <= bound);
                assert_true(fabs((double)b.keys_raw[k * HEAD_DIM + d] - key_want) <= bound);
            }
        }
    }
}

/* ---- sessions ------------------------------------------------------------------------------------------------------ */

static int32_t tokens[N], other[N];
static uint8_t flags[N];
static kvs_model *model;
static float *expected, *got; /* [N][VOCAB] */

static int set_up(void **state)
{
    (void)state;
    tiny_options o;
    fx_shape(&o, GGML_TYPE_Q4_1);
    model = fx_open(&o, 2, 0);
    fx_tokens(1, tokens, N);
    fx_tokens(2, other, N);
    fx_flags(3, flags, N);
    expected = malloc(sizeof(float) * N * VOCAB);
    got = malloc(sizeof(float) * N * VOCAB);
    return model == NULL || expected == NULL || got == NULL;
}

static int tear_down(void **state)
{
    (void)state;
    kvs_model_close(&model);
    free(expected);
    free(got);
    return 0;
}

static kvs_session_options options(const char *policy, uint32_t budget, kvs_kv_type kv)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = policy;
    o.budget_tokens = budget;
    o.chunk_tokens = 48;
    o.kv_type = kv;
    return o;
}

static kvs_session *open_session(const char *policy, uint32_t budget, kvs_kv_type kv)
{
    const kvs_session_options o = options(policy, budget, kv);
    kvs_session *s = fx_session(model, &o);
    assert_non_null(s);
    return s;
}

static void run(kvs_session *s, uint32_t from, uint32_t to, float *out)
{
    kvs_error err = {.message = ""};
    if (fx_run(s, tokens + from, flags + from, to - from, 64, out + (size_t)from * VOCAB, VOCAB, &err) != KVS_OK)
        fail_msg("rows %u to %u: %s", from, to, err.message);
}

static void run_whole(const char *policy, kvs_kv_type kv, float *out)
{
    kvs_session *s = open_session(policy, TIGHT, kv);
    run(s, 0, N, out);
    kvs_session_free(&s);
}

static const kvs_kv_type kv_types[] = {KVS_KV_F16, KVS_KV_F32};

static void merging_nothing_differs_from_dropping(void **state)
{
    (void)state;
    static const char *const bases[] = {"h2o", "streaming", "adakv:window=8", "random +schedule=every:37"};
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < 4; i++) {
            char spec[128];
            run_whole(bases[i], kv_types[k], expected);
            snprintf(spec, sizeof spec, "%s +dispose=merge:threshold=1.5", bases[i]);
            run_whole(spec, kv_types[k], got);
            assert_int_equal(fx_differs(expected, got, N, VOCAB), N);
            snprintf(spec, sizeof spec, "%s +dispose=merge", bases[i]);
            run_whole(spec, kv_types[k], got);
            assert_true(fx_differs(expected, got, N, VOCAB) < N);
        }
}

static void a_budget_that_holds_all_merges(void **state)
{
    (void)state;
    static const char *const ways[] = {"h2o +dispose=merge", "h2o +dispose=cam", "h2o +dispose=nearest"};
    kvs_session *s = open_session("baseline", N, KVS_KV_F16);
    run(s, 0, N, expected);
    kvs_session_free(&s);
    for (int i = 0; i < 3; i++) {
        s = open_session(ways[i], N, KVS_KV_F16);
        run(s, 0, N, got);
        assert_int_equal(fx_differs(expected, got, N, VOCAB), N);
        kvs_session_free(&s);
    }
}

/* Values, then keys of one head, f32. */
static uint32_t read_kv(const kvs_session *s, uint32_t layer, uint32_t head, float *out)
{
    const uint32_t n = kvs_cache_n_live(s->cache, layer, head);
    kvs_cache_read_kv(s->cache, layer, head, out + (size_t)n * 32, out);
    return n;
}

static void a_merge_shows_in_a_fork(void **state)
{
    (void)state;
    static float was[2 * N * 32], is[2 * N * 32];
    static const char *const ways[] = {"h2o +dispose=merge", "h2o +dispose=cam:all=1", "h2o +dispose=nearest"};
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < 3; i++) {
            kvs_session *s = open_session(ways[i], TIGHT, kv_types[k]), *child;
            kvs_error err = {.message = ""};
            run_whole(ways[i], kv_types[k], expected);
            run(s, 0, TIGHT, got);
            assert_int_equal(kvs_session_fork(s, NULL, &child, &err), KVS_OK);
            const uint32_t n = read_kv(child, 1, 2, was);
            run(s, TIGHT, N, got); /* evicts and merges with the first new row */
            assert_int_equal(fx_differs(expected, got, N, VOCAB), N);
            assert_int_equal(read_kv(child, 1, 2, is), n);
            assert_memory_equal(was, is, (size_t)n * 64 * sizeof *was);
            memset(got + (size_t)TIGHT * VOCAB, 0, sizeof(float) * VOCAB * (N - TIGHT));
            run(child, TIGHT, N, got);
            assert_int_equal(fx_differs(expected, got, N, VOCAB), N);
            kvs_session_free(&child);
            kvs_session_free(&s);
        }
}

/* What a session's heads hold after an eviction, before rotation, are the means of what they held before it. */
static void keys_are_merged_rotated(void **state)
{
    (void)state;
    static const char *const positions[] = {"keep", "rerotate", "rollback"};
    static float keys[200 * 32], values[200 * 32];
    for (int i = 0; i < 3; i++)
        for (uint32_t head = 0; head < 6; head++) {
            char spec[96];
            snprintf(spec, sizeof spec, "h2o +dispose=nearest +position=%s", positions[i]);
            kvs_session *s = open_session(spec, ROOMY, KVS_KV_F32);
            kvs_error err = {.message = ""};
            run(s, 0, 200, got);
            int32_t pos[200];
            uint8_t keep[200] = {0};
            kvs_policy_view v = kvs_view_kv(s, head / 3, head % 3, &s->scratch.threads[0]);
            memcpy(keys, v.keys_raw, sizeof keys);
            memcpy(values, v.values, sizeof values);
            memcpy(pos, v.pos, sizeof pos);
            assert_int_equal(kvs_session_evict(s, 90, &err), KVS_OK);
            v = kvs_view_kv(s, head / 3, head % 3, &s->scratch.threads[0]);
            assert_int_equal(v.n_slots, 90);
            for (uint32_t k = 0; k < 90; k++)
                keep[v.pos[k]] = 1;
            uint32_t n_merged = 0;
            for (uint32_t k = 0; k < 90; k++) {
                double key[32], value[32], most = 0;
                uint32_t n_in;
                mean_of(values, pos, keep, (uint32_t)v.pos[k], 200, 32, value, &n_in);
                mean_of(keys, pos, keep, (uint32_t)v.pos[k], 200, 32, key, &n_in);
                for (uint32_t d = 0; d < 200 * 32; d++)
                    most = fmax(most, fmax(fabs((double)keys[d]), fabs((double)values[d])));
                /* Two roundings a slot that joined; three for each of three rotations by angles that are themselves rounded. */
                const double bound = 0x1p-24 * most * 2 * (2 * n_in + 20);
                for (uint32_t d = 0; d < 32; d++) {
                    assert_true(fabs((double)v.values[k * 32 + d] - value[d]) <= bound);
                    if (!(fabs((double)v.keys_raw[k * 32 + d] - key[d]) <= bound))
                        fail_msg("%s, head %u, slot %u: key %.9g, expected %.9g", positions[i], head, k,
                                 (double)v.keys_raw[k * 32 + d], key[d]);
                }
                n_merged += n_in;
            }
            assert_int_equal(n_merged, 110);
            kvs_session_free(&s);
        }
}

/* A fork onto a smaller budget merges at its first eviction, when every page of it is still its parent's. */
static void a_smaller_fork_cannot_merge(void **state)
{
    (void)state;
    for (int k = 0; k < 2; k++) {
        kvs_session *parent = open_session("h2o +dispose=merge", ROOMY, kv_types[k]), *alone, *child;
        const kvs_session_options o = options("h2o +dispose=merge", TIGHT, kv_types[k]);
        kvs_error err = {.message = ""};
        run(parent, 0, 500, got);
        assert_int_equal(kvs_session_fork(parent, &o, &child, &err), KVS_OK);
        assert_int_equal(kvs_session_fork(parent, &o, &alone, &err), KVS_OK);
        run(child, 500, N, expected);
        kvs_session_free(&child);
        kvs_session_free(&parent);
        run(alone, 500, N, got); /* nobody shares its pages any more */
        assert_int_equal(fx_differs(expected + (size_t)500 * VOCAB, got + (size_t)500 * VOCAB, N - 500, VOCAB),
                         N - 500);
        kvs_session_free(&alone);
    }
}

/* ---- the cache: a fork onto a smaller budget that has yet to evict leaves one block ---- */

enum { ROOM = 2 * KVS_PAGE_SLOTS };

static kvs_cache *open_cache(kvs_rng *rng, bool kv_f32)
{
    const kvs_cache_config config = {
        .n_layers = 1, .n_kv_heads = 1, .head_dim = HEAD_DIM, .kv_f32 = kv_f32, .budget_tokens = ROOM};
    kvs_cache *c;
    assert_int_equal(kvs_cache_create(&config, &c, NULL), KVS_OK);
    for (int32_t i = 0; i < ROOM; i++) {
        float key[HEAD_DIM], value[HEAD_DIM];
        void *k, *v;
        uint32_t slot;
        random_floats(rng, key, HEAD_DIM);
        random_floats(rng, value, HEAD_DIM);
        assert_int_equal(kvs_cache_append(c, &i, &i, NULL, 1, NULL), KVS_OK);
        kvs_cache_locate(c, 0, 0, (uint32_t)i, &k, &v, &slot);
        kvs_page_write(k, v, slot, key, value, HEAD_DIM, kv_f32);
    }
    return c;
}

static kvs_cache *fork_smaller(const kvs_cache *parent, bool kv_f32)
{
    const kvs_cache_config config = {
        .n_layers = 1, .n_kv_heads = 1, .head_dim = HEAD_DIM, .kv_f32 = kv_f32, .budget_tokens = KVS_PAGE_SLOTS};
    kvs_cache *c;
    assert_int_equal(kvs_cache_fork(parent, &config, &c, NULL), KVS_OK);
    return c;
}

static void holds(const kvs_cache *c, const float *keys, const float *values, uint32_t n)
{
    static float k[ROOM * HEAD_DIM], v[ROOM * HEAD_DIM];
    assert_int_equal(kvs_cache_n_live(c, 0, 0), n);
    kvs_cache_read_kv(c, 0, 0, k, v);
    assert_memory_equal(k, keys, (size_t)n * HEAD_DIM * sizeof *k);
    assert_memory_equal(v, values, (size_t)n * HEAD_DIM * sizeof *v);
}

/* Slots from both pages stay, each third of them is written: only they change, in this cache alone, rounded once. */
static void writing_runs_out_of_blocks(void **state)
{
    (void)state;
    for (int kv_f32 = 0; kv_f32 < 2; kv_f32++) {
        static float keys[ROOM * HEAD_DIM], values[ROOM * HEAD_DIM], fresh[ROOM * HEAD_DIM];
        uint8_t keep[ROOM], all_but_one[ROOM];
        kvs_rng rng = {18};
        kvs_cache *parent = open_cache(&rng, kv_f32), *child = fork_smaller(parent, kv_f32);
        kvs_cache_read_kv(parent, 0, 0, keys, values);
        memset(all_but_one, 1, sizeof all_but_one);
        all_but_one[5] = 0;
        assert_false(kvs_cache_own_kept(parent, 0, 0, all_but_one)); /* two pages, one block */
        holds(parent, keys, values, ROOM);
        holds(child, keys, values, ROOM);
        kvs_cache_free(&child); /* the attempt took the block */
        kvs_cache_free(&parent);
        parent = open_cache(&rng, kv_f32);
        child = fork_smaller(parent, kv_f32);
        kvs_cache_read_kv(parent, 0, 0, keys, values);

        uint32_t n = 0;
        for (uint32_t i = 0; i < ROOM; i++)
            if ((keep[i] = i % 2 != 0) != 0)
                n++;
        assert_true(kvs_cache_own_kept(child, 0, 0, keep));
        holds(child, keys, values, ROOM);
        kvs_cache_keep(child, 0, 0, keep);
        static float kept_keys[ROOM * HEAD_DIM], kept_values[ROOM * HEAD_DIM];
        kvs_cache_read_kv(child, 0, 0, kept_keys, kept_values);
        uint8_t written[ROOM];
        random_floats(&rng, fresh, (size_t)n * HEAD_DIM);
        for (uint32_t i = 0; i < n; i++) {
            written[i] = i % 3 == 0;
            for (uint32_t d = 0; written[i] && d < HEAD_DIM; d++) {
                uint16_t half;
                float *const to = &kept_values[i * HEAD_DIM + d];
                kvs_kernels_get(0)->f32_to_f16(&half, &fresh[i * HEAD_DIM + d], 1);
                *to = fresh[i * HEAD_DIM + d];
                if (!kv_f32)
                    kvs_kernels_get(0)->f16_to_f32(to, &half, 1);
            }
        }
        kvs_cache_write_kv(child, 0, 0, NULL, fresh, written);
        holds(child, kept_keys, kept_values, n);
        holds(parent, keys, values, ROOM);
        kvs_cache_free(&child);
        kvs_cache_free(&parent);
    }
}

/* ---- the spec ---- */

static void refused(const char *spec, const char *word)
{
    kvs_policy p;
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_policy_parse(spec, NULL, false, &p, &err), KVS_EINVAL);
    if (strstr(err.message, word) == NULL)
        fail_msg("'%s': '%s' does not say '%s'", spec, err.message, word);
}

static void stages_that_cannot_stand_together_do(void **state)
{
    (void)state;
    refused("baseline +dispose=merge", "never evicts");
    refused("streaming +dispose=merge +position=recompute", "recompute");
    refused("attention_top +dispose=cam", "latest forward");
    refused("streaming +dispose=merg", "merge");
    refused("streaming +dispose=merge:threshold=3", "threshold");
    refused("streaming +dispose=drop:threshold=1", "drop");
    const kvs_policy p = parse("streaming +dispose=merge:fraction=0.75"), q = parse(p.text);
    assert_string_equal(p.text, q.text);
    assert_non_null(strstr(p.text, "+dispose=merge:threshold=0,fraction=0.75"));
    assert_null(parse("streaming +dispose=merge +dispose=drop").dispose);
    const kvs_policy elastic = parse("elastic"), bare = parse("elastic +dispose=drop"), again = parse(bare.text);
    assert_string_equal(elastic.dispose->info.name, "nearest");
    assert_null(again.dispose);
    assert_string_equal(bare.text, again.text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(merge_is_not_the_weighted_mean_it_says),
        cmocka_unit_test(threshold_above_one_merges),
        cmocka_unit_test(equal_values_drift),
        cmocka_unit_test(cam_shares_out_wrongly),
        cmocka_unit_test(cam_merges_what_got_no_attention),
        cmocka_unit_test(cam_coin_is_loaded),
        cmocka_unit_test(cam_merges_more_than_was_said),
        cmocka_unit_test(nearest_is_not_the_mean),
        cmocka_unit_test(keys_are_merged_rotated),
        cmocka_unit_test(merging_nothing_differs_from_dropping),
        cmocka_unit_test(a_budget_that_holds_all_merges),
        cmocka_unit_test(a_merge_shows_in_a_fork),
        cmocka_unit_test(a_smaller_fork_cannot_merge),
        cmocka_unit_test(writing_runs_out_of_blocks),
        cmocka_unit_test(stages_that_cannot_stand_together_do),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

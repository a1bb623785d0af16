/* The limit cases that the papers and their catalogue name, where one method must turn into another, and what the probes of
 * whole sessions record against plain code on the same queries and keys. */
#include "cache/cache.h"
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include "unit/policy_fixture.h"

static void trim_window(uint32_t rows)
{
    const uint32_t less = b.view.n_window > rows ? b.view.n_window - rows : 0;
    b.view.n_window -= less;
    b.view.window_pos += less;
    b.view.window_prob += (size_t)less * GROUP * b.view.n_slots;
    b.view.window_logit += (size_t)less * GROUP * b.view.n_slots;
    b.view.window_query += (size_t)less * GROUP * HEAD_DIM;
}

/* Every query head of the group asks the same. */
static void same_queries(void)
{
    const uint32_t n = b.view.n_slots;
    for (uint32_t r = 0; r < b.view.n_window; r++)
        for (uint32_t g = 1; g < GROUP; g++) {
            const size_t from = (size_t)r * GROUP * n, to = ((size_t)r * GROUP + g) * n;
            memcpy(b.logit + to, b.logit + from, n * sizeof *b.logit);
            memcpy(b.prob + to, b.prob + from, n * sizeof *b.prob);
        }
}

/* On the view as it is: `a` and `c` keep the same n_keep slots. */
static void same_set(const char *a, const char *c, uint32_t n_keep)
{
    static uint8_t keep[SLOTS_MAX];
    const kvs_policy_view whole = b.view;
    const kvs_policy first = parse(a), second = parse(c);
    memset(b.carry, 0, sizeof b.carry);
    trim_window(kvs_policy_window(&first));
    evict(&first, n_keep);
    memcpy(keep, b.keep, b.view.n_slots);
    b.view = whole;
    memset(b.carry, 0, sizeof b.carry);
    trim_window(kvs_policy_window(&second));
    evict(&second, n_keep);
    b.view = whole;
    for (uint32_t i = 0; i < b.view.n_slots; i++)
        if (b.keep[i] != keep[i])
            fail_msg("%s and %s differ at slot %u of %u", a, c, i, b.view.n_slots);
}

/* ---- one scorer as another ---- */

/* A sum of rows ranks as their mean does. */
static void laq_without_lookahead_is_not_snapkv(void **state)
{
    (void)state;
    kvs_rng rng = {1};
    for (int round = 0; round < 60; round++) {
        fill_view(&rng, 40 + kvs_rng_below(&rng, 200));
        for (uint32_t i = 0; i < b.view.n_slots; i++) /* LAQ's window is the newest slots, SnapKV's those of the rows */
            b.pos[i] = (int32_t)i;
        b.view.n_tokens = b.view.n_slots;
        for (uint32_t r = 0; r < WINDOW; r++)
            b.window_pos[r] = (int32_t)(b.view.n_slots - WINDOW + r);
        same_queries(); /* the mean over equal heads is exact, so ties stay ties */
        same_set("laq:first=4,kernel=7 +probe=none +protect=none", "snapkv:window=4,kernel=7,max=1 +protect=none",
                 b.view.n_slots / 2);
        same_set("laq++:first=4,kernel=1 +probe=none +protect=none", "snapkv:window=4,kernel=1 +protect=none",
                 b.view.n_slots / 3);
    }
}

static void r_kv_without_redundancy_is_not_snapkv(void **state)
{
    (void)state;
    kvs_rng rng = {2};
    for (int round = 0; round < 60; round++) {
        fill_view(&rng, 40 + kvs_rng_below(&rng, 200));
        same_queries();
        same_set("r-kv:lambda=1,window=1,kernel=7 +protect=none", "snapkv:window=1,kernel=7,max=1 +protect=none",
                 b.view.n_slots / 2);
    }
}

/* Its attention alone, forgetting at once, is SnapKV while decoding; its redundancy alone is R-KV's. */
static void g_kv_that_forgets_is_not_snapkv_or_r_kv(void **state)
{
    (void)state;
    kvs_rng rng = {3};
    for (int round = 0; round < 60; round++) {
        fill_view(&rng, 40 + kvs_rng_below(&rng, 200));
        same_queries();
        same_set("g-kv:alpha=0,lambda=1,window=4,kernel=1,norm=0 +protect=none",
                 "snapkv:window=4,kernel=1 +protect=none", b.view.n_slots / 2);
        same_set("g-kv:alpha=0,lambda=0,window=4 +protect=none", "r-kv:lambda=0,window=4 +protect=none",
                 b.view.n_slots / 2);
        same_set("g-kv:alpha=0,lambda=1,window=1,kernel=7 +protect=none",
                 "r-kv:lambda=1,window=1,kernel=7 +protect=none", b.view.n_slots / 2);
    }
}

/* alpha = 1: the largest local score so far, whatever came between. */
static void g_kv_that_never_forgets_is_no_running_maximum(void **state)
{
    (void)state;
    kvs_rng rng = {4};
    static float most[SLOTS_MAX];
    const uint32_t n = 150;
    const kvs_policy p = parse("g-kv:alpha=1,lambda=1,window=4,norm=0 +protect=none");
    memset(most, 0, sizeof most);
    fill_view(&rng, n);
    memset(b.carry, 0, sizeof b.carry);
    for (int round = 0; round < 5; round++) {
        static float carry[SLOTS_MAX];
        memcpy(carry, b.carry, sizeof carry);
        fill_view(&rng, n);
        memcpy(b.carry, carry, sizeof carry);
        trim_window(4);
        const uint32_t n_before = n - kvs_window_slots(&b.view);
        static float local[SLOTS_MAX];
        kvs_window_max(&b.view, local);
        evict(&p, n / 2);
        for (uint32_t i = 0; i < n_before; i++) {
            most[i] = local[i] > most[i] ? local[i] : most[i];
            assert_true(b.carry[i] == most[i]);
        }
    }
}

/* The same rows give the same scores, whatever was observed before. */
static void tova_has_a_memory(void **state)
{
    (void)state;
    kvs_rng rng = {5};
    static float before[SLOTS_MAX];
    const kvs_policy p = parse("tova +protect=none");
    assert_int_equal(kvs_policy_needs(&p), KVS_POLICY_NEEDS_WINDOW);
    for (int round = 0; round < 20; round++) {
        const uint32_t n = 20 + kvs_rng_below(&rng, 100);
        fill_view(&rng, n);
        trim_window(1);
        evict(&p, n / 2);
        memcpy(before, b.scores, n * sizeof *before);
        for (uint32_t i = 0; i < n; i++)
            b.mass_sum[i] = b.mass_ema[i] = b.mass_max[i] = b.carry[i] = (float)kvs_rng_double(&rng);
        b.view.event++;
        b.view.n_tokens_last += 7;
        evict(&p, n / 2);
        assert_memory_equal(b.scores, before, n * sizeof *before);
    }
}

/* A quarter turn of each pair of dims leaves the norm. */
static void knorm_sees_where_a_key_stands(void **state)
{
    (void)state;
    kvs_rng rng = {6};
    static float before[SLOTS_MAX];
    const kvs_policy p = parse("knorm +protect=none");
    fill_view(&rng, 200);
    evict(&p, 100);
    memcpy(before, b.scores, 200 * sizeof *before);
    for (uint32_t i = 0; i < 200 * HEAD_DIM; i += 2) {
        const float x = b.keys[i];
        b.keys[i] = -b.keys[i + 1];
        b.keys[i + 1] = x;
    }
    evict(&p, 100);
    for (uint32_t i = 0; i < 200; i++) /* a chain of squares in another order, and a root */
        assert_true(fabsf(b.scores[i] - before[i]) <= fabsf(before[i]) * (HEAD_DIM + 1) * 0x1p-23f);
}

static void dbudgetkv_keeps_less_under_a_smaller_threshold(void **state)
{
    (void)state;
    kvs_rng rng = {7};
    for (int round = 0; round < 60; round++) {
        const uint32_t n = 20 + kvs_rng_below(&rng, 200);
        static uint8_t kept[SLOTS_MAX];
        fill_view(&rng, n);
        b.view.layer = 2;
        memset(kept, 1, sizeof kept);
        for (int t = 0; t <= 10; t++) {
            char spec[64];
            snprintf(spec, sizeof spec, "dbudgetkv:threshold=%.1f +protect=none", t / 10.0);
            const kvs_policy p = parse(spec);
            const kvs_policy_view whole = b.view;
            trim_window(kvs_policy_window(&p));
            evict(&p, n);
            b.view = whole;
            for (uint32_t i = 0; i < n; i++)
                assert_true(b.keep[i] <= kept[i]);
            memcpy(kept, b.keep, n);
        }
    }
}

/* ---- sharing out ---- */

enum { LAYERS = 4, HEADS_MAX = 3, HELD = 90 };

static float shared[LAYERS * HEADS_MAX * HELD];

static void share(const char *spec, uint32_t n_heads, uint32_t even, uint32_t *keep)
{
    const kvs_policy p = parse(spec);
    static uint32_t keys[LAYERS * HEADS_MAX * HELD];
    uint32_t n_slots[LAYERS * HEADS_MAX], n_even[LAYERS * HEADS_MAX], n_protected[LAYERS * HEADS_MAX] = {0};
    for (uint32_t h = 0; h < LAYERS * n_heads; h++) {
        n_slots[h] = HELD;
        n_even[h] = keep[h] = even;
    }
    const kvs_budget_view v = {.n_layers = LAYERS,
                               .n_kv_heads = n_heads,
                               .n_slots = n_slots,
                               .n_protected = n_protected,
                               .n_even = n_even,
                               .scores = shared,
                               .stride = HELD,
                               .keys = keys};
    p.budget->allocate(p.budget_params, &v, keep);
}

static void random_shared(kvs_rng *rng, uint32_t n_heads)
{
    for (uint32_t h = 0; h < LAYERS * n_heads; h++) {
        const double worth = 0.2 + kvs_rng_double(rng);
        for (uint32_t i = 0; i < HELD; i++)
            shared[h * HELD + i] = (float)(kvs_rng_double(rng) * worth);
    }
}

static uint32_t n_above(uint32_t head, float x)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < HELD; i++)
        n += shared[head * HELD + i] > x;
    return n;
}

/* What stays under one threshold is better than all that goes. */
static void global_shares_are_not_the_best_of_all(void **state)
{
    (void)state;
    kvs_rng rng = {8};
    for (int round = 0; round < 40; round++) {
        const uint32_t even = 5 + kvs_rng_below(&rng, HELD - 10);
        uint32_t keep[LAYERS * HEADS_MAX], sum = 0;
        random_shared(&rng, HEADS_MAX);
        share("kvzip", HEADS_MAX, even, keep);
        float least = INFINITY, most = -INFINITY; /* of what stays, of what goes: heads rank their own */
        for (uint32_t h = 0; h < LAYERS * HEADS_MAX; h++) {
            sum += keep[h];
            for (uint32_t i = 0; i < HELD; i++) {
                const float x = shared[h * HELD + i];
                if (n_above(h, x) < keep[h])
                    least = x < least ? x : least;
                else
                    most = x > most ? x : most;
            }
        }
        assert_int_equal(sum, LAYERS * HEADS_MAX * even);
        assert_true(least >= most);
    }
}

/* Composite tokens of one head are its tokens; of several, all heads of a layer keep equally many. */
static void composite_shares_are_wrong(void **state)
{
    (void)state;
    kvs_rng rng = {9};
    for (int round = 0; round < 40; round++) {
        const uint32_t even = 5 + kvs_rng_below(&rng, HELD - 10);
        uint32_t keep[LAYERS * HEADS_MAX], flat[LAYERS * HEADS_MAX], sum = 0;
        random_shared(&rng, 1);
        share("kvcompose", 1, even, keep);
        share("kvcompose-ragged", 1, even, flat);
        assert_memory_equal(keep, flat, LAYERS * sizeof *keep);
        random_shared(&rng, HEADS_MAX);
        share("kvcompose", HEADS_MAX, even, keep);
        for (uint32_t h = 0; h < LAYERS * HEADS_MAX; h++) {
            sum += keep[h];
            assert_int_equal(keep[h], keep[h / HEADS_MAX * HEADS_MAX]);
        }
        assert_int_equal(sum, LAYERS * HEADS_MAX * even);
    }
}

static void adakv_favours_one_of_equal_heads(void **state)
{
    (void)state;
    kvs_rng rng = {10};
    for (int round = 0; round < 40; round++) {
        const uint32_t even = 5 + kvs_rng_below(&rng, HELD - 10);
        uint32_t keep[LAYERS * HEADS_MAX];
        random_shared(&rng, HEADS_MAX);
        for (uint32_t l = 0; l < LAYERS; l++) /* the first head's scores, in another order */
            for (uint32_t i = 0; i < HELD; i++)
                for (uint32_t h = 1; h < HEADS_MAX; h++)
                    shared[(l * HEADS_MAX + h) * HELD + (i * 7 + h) % HELD] = shared[l * HEADS_MAX * HELD + i];
        share("adakv", HEADS_MAX, even, keep);
        for (uint32_t h = 0; h < LAYERS * HEADS_MAX; h++)
            assert_int_equal(keep[h], even);
    }
}

/* ---- probes on a model ---- */

enum { N_SAID = 150, ROWS_MAX = 400, SLOTS = 700 };

static kvs_model *model;
static int32_t said[ROWS_MAX];
static uint8_t bytes_before[1 << 22], bytes_after[1 << 22];

static int open_model(void **state)
{
    (void)state;
    tiny_options t;
    fx_shape(&t, GGML_TYPE_F32);
    model = fx_open(&t, 2, 0);
    fx_tokens(11, said, ROWS_MAX);
    return model == NULL;
}

static int close_model(void **state)
{
    (void)state;
    kvs_model_close(&model);
    return 0;
}

static kvs_session *open_session(const char *policy, uint32_t budget_tokens)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = policy;
    o.budget_tokens = budget_tokens;
    o.arith = KVS_ARITH_F32;
    o.kv_type = KVS_KV_F32;
    kvs_session *s = fx_session(model, &o);
    assert_non_null(s);
    return s;
}

static void must(kvs_status status, const kvs_error *err)
{
    if (status != KVS_OK)
        fail_msg("%s", err->message);
}

static void say(kvs_session *s, const int32_t *tokens, uint32_t n)
{
    kvs_error err;
    must(kvs_session_extend(s, tokens, NULL, n, NULL, &err), &err);
}

static kvs_forward *forward_of(kvs_session *s)
{
    kvs_forward *f;
    kvs_error err;
    must(kvs_session_forward(s, &f, &err), &err);
    return f;
}

enum { FOOTPRINT_AT = 60 }; /* of a snapshot */

static void probing_changes_the_cache(void **state)
{
    (void)state;
    static const char *const specs[] = {
        "kvzip +probe=repeat:chunk=64",           "kvzip+ +probe=repeat:chunk=64",
        "kvcompose +probe=context:chunk=64",      "laq:first=8 +probe=lookahead:rows=5",
        "snapkv:window=16 +probe=prompt:rows=16",
    };
    for (size_t k = 0; k < sizeof specs / sizeof *specs; k++) {
        kvs_session *s = open_session(specs[k], SLOTS);
        kvs_forward *f = forward_of(s);
        kvs_error err;
        say(s, said, N_SAID);
        must(kvs_session_evict(s, N_SAID - 40, &err), &err); /* heads that hold different tokens */
        say(s, said + N_SAID, 20);
        const kvs_cache_meter meter = *kvs_cache_meter_now(s->cache);
        kvs_usage usage, after;
        kvs_session_get_usage(s, &usage);
        const uint32_t n_valid = s->queries.n_valid;
        const size_t n = kvs_cache_snapshot_bytes(s->cache);
        assert_true(n <= sizeof bytes_before);
        kvs_cache_snapshot_write(s->cache, bytes_before);
        s->pending = said + N_SAID + 20;
        s->n_pending = 30;
        must(kvs_probe_before(s, f, &err), &err);
        if (kvs_probe_wants_kept(s)) {
            const uint32_t stride = s->scratch.n_slots;
            uint8_t *const keep = calloc(s->scratch.n_heads, stride);
            assert_non_null(keep);
            for (size_t i = 0; i < (size_t)s->scratch.n_heads * stride; i++)
                keep[i] = i % 3 != 0;
            must(kvs_probe_on_kept(s, f, keep, stride, &err), &err);
            free(keep);
        }
        kvs_probe_end(s);
        s->pending = NULL;
        s->n_pending = 0;
        assert_int_equal(kvs_cache_snapshot_bytes(s->cache), n);
        kvs_cache_snapshot_write(s->cache, bytes_after);
        memcpy(bytes_after + FOOTPRINT_AT, bytes_before + FOOTPRINT_AT,
               8); /* counts what ran; the session takes it off */
        assert_memory_equal(bytes_after, bytes_before, n);
        assert_int_equal(kvs_cache_meter_now(s->cache)->live_bytes, meter.live_bytes);
        assert_int_equal(kvs_session_n_tokens(s), N_SAID + 20);
        kvs_session_get_usage(s, &after);
        assert_true(after.footprint == usage.footprint);
        if (s->policy.probe->kind == KVS_PROBE_REPEAT) /* probe rows are not of the conversation */
            assert_int_equal(s->queries.n_valid, n_valid);
        kvs_session_free(&s);
    }
}

/* The rows KVzip says for slots [begin, end) of what was said. */
static uint32_t repeat_rows(const kvs_probe *p, uint32_t begin, uint32_t end, int32_t *rows)
{
    const int which = begin > 0;
    uint32_t n = 0;
    for (uint32_t i = 0; i < p->n_text[which]; i++)
        rows[n++] = p->text[which][i];
    for (uint32_t i = begin >= 8 ? begin - 8 : 0; i < begin; i++)
        rows[n++] = said[i];
    for (uint32_t i = 0; i < p->n_text[2]; i++)
        rows[n++] = p->text[2][i];
    for (uint32_t i = begin; i < end; i++)
        rows[n++] = said[i];
    return n;
}

/* Lengths of what layer 0 reads for a row: of its embedding, or of that normalised. */
static double length_of(int32_t token, bool normed)
{
    const uint32_t n = model->info.n_embd;
    float x[1024];
    double square = 0, scaled = 0;
    assert_true(n <= 1024);
    kvs_weight_row(&model->embd, (uint32_t)token, x);
    for (uint32_t i = 0; i < n; i++)
        square += (double)x[i] * (double)x[i];
    const double by = 1 / sqrt(square / n + (double)model->norm_eps);
    for (uint32_t i = 0; i < n; i++)
        scaled += pow((double)x[i] * by * (double)model->layers[0].attn_norm[i], 2);
    return sqrt(normed ? scaled : square);
}

/* How the rows are weighed: 0 KVzip, 1 over the embedding, 2 over the normalised embedding (layer 0 only). */
static void check_repeat(const char *spec, int weighed)
{
    enum { CHUNK = 64 };
    kvs_session *s = open_session(spec, SLOTS), *r = open_session("r-kv:window=512", SLOTS);
    kvs_error err;
    say(s, said, N_SAID);
    say(r, said, N_SAID);
    must(kvs_probe_before(s, forward_of(s), &err), &err);
    const kvs_model_info *info = &model->info;
    const uint32_t group = info->n_heads / info->n_kv_heads;
    for (uint32_t begin = 0; begin < N_SAID; begin += CHUNK) {
        const uint32_t end = kvs_min_u32(N_SAID, begin + CHUNK);
        int32_t rows[ROWS_MAX];
        const uint32_t n_rows = repeat_rows(&s->probe, begin, end, rows);
        say(r, rows, n_rows);
        for (uint32_t h = 0; h < (weighed ? info->n_kv_heads : s->scratch.n_heads); h++) {
            const kvs_policy_view v =
                kvs_view_head(r, h / info->n_kv_heads, h % info->n_kv_heads, &r->scratch.threads[0]);
            const kvs_policy_view judged =
                kvs_view_head(s, h / info->n_kv_heads, h % info->n_kv_heads, &s->scratch.threads[0]);
            for (uint32_t g = 0; g < group; g++)
                for (uint32_t i = begin; i < end; i++) {
                    double most = 0, bound = 0;
                    for (uint32_t row = 0; row < n_rows; row++) {
                        const float *const x =
                            v.window_logit + ((size_t)(v.n_window - n_rows + row) * group + g) * v.n_slots;
                        double sum = 0;
                        for (uint32_t j = 0; j <= N_SAID + row; j++)
                            if (j < 4 || (j >= begin && j < end) || j >= N_SAID)
                                sum += exp((double)x[j]);
                        const double length = weighed ? length_of(rows[row], weighed == 2) : 1;
                        const double p = exp((double)x[i]) / sum / length;
                        if (p > most) {
                            most = p;
                            /* roundings of the logarithms and their difference; of the length; of exp */
                            bound = (fabs((double)x[i]) + 3 * fabs(log(sum) + log(length)) + 8) * 0x1p-23;
                        }
                    }
                    const double got = (double)judged.probe[(size_t)g * judged.n_slots + i];
                    if (!(fabs(got - most) <= bound * most))
                        fail_msg("%s: head %u, query head %u, slot %u: %.9g, expected %.9g", spec, h, g, i, got, most);
                    assert_true(weighed || (got > 0 && got <= 1));
                }
        }
        must(kvs_session_truncate(r, N_SAID, &err), &err);
    }
    kvs_session_free(&s);
    kvs_session_free(&r);
}

static void kvzip_is_not_the_largest_attention_of_a_repetition(void **state)
{
    (void)state;
    check_repeat("kvzip +probe=repeat:chunk=64", 0);
}

static void kvzip_plus_does_not_weigh_rows_by_their_stream(void **state)
{
    (void)state;
    check_repeat("kvzip+ +probe=repeat:chunk=64", 1);
    check_repeat("kvzip+:normed=1 +probe=repeat:chunk=64", 2);
}

/* The score is the recorded maximum times the length of the value behind the output projection. */
static void kvzip_plus_does_not_weigh_slots_by_their_values(void **state)
{
    (void)state;
    kvs_session *s = open_session("kvzip+ +probe=repeat:chunk=64", SLOTS);
    kvs_error err;
    say(s, said, N_SAID);
    must(kvs_probe_before(s, forward_of(s), &err), &err);
    const uint32_t dh = model->info.head_dim, n_in = model->info.n_heads * dh;
    float *const row = malloc(n_in * sizeof *row), *const scores = malloc(N_SAID * sizeof *scores);
    assert_non_null(row);
    assert_non_null(scores);
    for (uint32_t layer = 0; layer < model->info.n_layers; layer++)
        for (uint32_t head = 0; head < model->info.n_kv_heads; head++) {
            const kvs_policy_view v = kvs_view_head(s, layer, head, &s->scratch.threads[0]);
            s->policy.ops->score(s->policy.params, &v, scores);
            for (uint32_t i = 0; i < v.n_slots; i += 7) {
                double most = 0;
                for (uint32_t g = 0; g < v.group; g++) {
                    double square = 0;
                    for (uint32_t r = 0; r < model->info.n_embd; r++) {
                        kvs_weight_row(&model->layers[layer].attn_out, r, row);
                        double y = 0;
                        for (uint32_t d = 0; d < dh; d++)
                            y += (double)row[(head * v.group + g) * dh + d] * (double)v.values[(size_t)i * dh + d];
                        square += y * y;
                    }
                    most = fmax(most, (double)v.probe[(size_t)g * v.n_slots + i] * sqrt(square));
                }
                assert_true(fabs((double)scores[i] - most) <= most * 0x1p-22); /* two roundings, and double's */
            }
        }
    free(row);
    free(scores);
    kvs_session_free(&s);
}

static void a_ratio_of_all_slots_is_not_what_stays(void **state)
{
    (void)state;
    static const char *const specs[] = {"kvzip", "kvzip+", "kvcompose", "kvcompose-ragged"};
    for (size_t k = 0; k < sizeof specs / sizeof *specs; k++) {
        char spec[64];
        snprintf(spec, sizeof spec, "%s:keep=0.3 +protect=none", specs[k]);
        kvs_session *s = open_session(spec, 4 * SLOTS);
        kvs_error err;
        say(s, said, N_SAID);
        must(kvs_session_evict(s, 0, &err), &err);
        assert_int_equal(kvs_cache_live_total(s->cache), (uint64_t)(0.3 * N_SAID) * s->scratch.n_heads);
        kvs_session_free(&s);
    }
}

static int32_t best_of(const float *logits)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < model->info.vocab_size; i++)
        best = logits[i] > logits[best] ? i : best;
    return (int32_t)best;
}

/* A first stage that drops nothing says what the model says next. */
static void looking_ahead_on_all_slots_foretells_something_else(void **state)
{
    (void)state;
    enum { ROWS = 8 };
    kvs_session *s = open_session("laq:first=8 +probe=lookahead:rows=8", SLOTS), *r = open_session("baseline", SLOTS);
    kvs_error err;
    float *const logits = malloc(model->info.vocab_size * sizeof *logits);
    uint8_t *const keep = malloc((size_t)s->scratch.n_heads * s->scratch.n_slots);
    assert_non_null(logits);
    assert_non_null(keep);
    memset(keep, 1, (size_t)s->scratch.n_heads * s->scratch.n_slots);
    say(s, said, N_SAID);
    must(kvs_session_extend(r, said, NULL, N_SAID, logits, &err), &err);
    must(kvs_probe_before(s, forward_of(s), &err), &err);
    must(kvs_probe_on_kept(s, forward_of(s), keep, s->scratch.n_slots, &err), &err);
    assert_true(s->queries.n_ahead > 0);
    for (uint32_t i = 0; i < s->queries.n_ahead; i++) {
        const int32_t token = best_of(logits);
        assert_int_equal(s->probe.tokens[i], token);
        must(kvs_session_extend(r, &token, NULL, 1, logits, &err), &err);
    }
    assert_true(s->queries.n_ahead == ROWS || kvs_token_is_eog(model, best_of(logits)));
    kvs_probe_end(s);
    free(logits);
    free(keep);
    kvs_session_free(&s);
    kvs_session_free(&r);
}

/* ---- patched chunks ---- */

static void same_sets(const kvs_session *a, const kvs_session *c)
{
    int32_t pos[SLOTS], want[SLOTS];
    for (uint32_t h = 0; h < a->scratch.n_heads; h++) {
        const uint32_t layer = h / model->info.n_kv_heads, head = h % model->info.n_kv_heads;
        const uint32_t n = kvs_session_keep_set(a, layer, head, pos, NULL, SLOTS);
        assert_int_equal(kvs_session_keep_set(c, layer, head, want, NULL, SLOTS), n);
        assert_memory_equal(pos, want, n * sizeof *pos);
    }
}

/* A prompt that is one chunk is evicted once it is in: its own last rows are the window, patched or not. */
static void a_patched_single_chunk_is_not_snapkv(void **state)
{
    (void)state;
    static const uint8_t answer = KVS_TOKEN_ASSISTANT;
    kvs_session *s = open_session("snapkv:window=16,keep=60tok +probe=prompt:rows=16 +schedule=after_prefill "
                                  "+protect=none",
                                  SLOTS);
    kvs_session *r = open_session("snapkv:window=16,keep=60tok +schedule=after_prefill +protect=none", SLOTS);
    kvs_error err;
    for (int k = 0; k < 2; k++) {
        kvs_session *const t = k == 0 ? s : r;
        uint8_t flags[N_SAID];
        memset(flags, KVS_TOKEN_USER, sizeof flags);
        must(kvs_session_extend(t, said, flags, N_SAID, NULL, &err), &err);
        must(kvs_session_extend(t, said + N_SAID, &answer, 1, NULL, &err), &err);
        assert_int_equal(kvs_session_n_tokens(t), N_SAID + 1);
        assert_int_equal(kvs_cache_live_max(t->cache), 61);
        assert_int_equal(kvs_cache_next_rope(t->cache, 0, 0), N_SAID + 1);
    }
    same_sets(s, r);
    kvs_session_free(&s);
    kvs_session_free(&r);
}

/* A chunk is judged by the prompt's last rows as if they stood behind it; afterwards positions and counts are those of a
 * session that never ran them. */
static void a_patched_chunk_is_not_judged_by_the_prompts_end(void **state)
{
    (void)state;
    enum { CHUNK = 100, ROWS = 16, KEEP = 60 };
    kvs_session *s = open_session("snapkv:window=16,kernel=1,keep=60tok +probe=prompt:rows=16 +schedule=chunk "
                                  "+protect=none",
                                  SLOTS);
    kvs_session *r = open_session("r-kv:window=16", SLOTS);
    s->chunk_tokens = CHUNK;
    say(s, said, CHUNK + 40); /* one eviction, before the second chunk */
    say(r, said, CHUNK);
    say(r, said + CHUNK + 40 - ROWS, ROWS); /* the prompt's end behind the first chunk */
    assert_int_equal(s->n_evictions, 1);
    assert_int_equal(kvs_session_n_tokens(s), CHUNK + 40);
    for (uint32_t h = 0; h < s->scratch.n_heads; h++) {
        const uint32_t layer = h / model->info.n_kv_heads, head = h % model->info.n_kv_heads;
        kvs_policy_view v = kvs_view_head(r, layer, head, &r->scratch.threads[0]);
        static double mean[SLOTS];
        memset(mean, 0, sizeof mean);
        for (uint32_t row = 0; row < ROWS * v.group; row++) {
            const float *const x = v.window_logit + (size_t)row * v.n_slots;
            double sum = 0;
            for (uint32_t i = 0; i < v.n_slots; i++) /* the rows themselves too; -inf what is newer */
                sum += exp((double)x[i]);
            for (uint32_t i = 0; i < CHUNK; i++)
                mean[i] += exp((double)x[i]) / sum;
        }
        int32_t pos[SLOTS];
        const uint32_t n = kvs_session_keep_set(s, layer, head, pos, NULL, SLOTS);
        assert_int_equal(n, KEEP + 40);
        for (uint32_t k = 0; k < KEEP; k++) {
            uint32_t better = 0;
            assert_true(pos[k] < CHUNK);
            for (uint32_t i = 0; i < CHUNK; i++)
                better += mean[i] > mean[pos[k]] * (1 + 0x1p-18); /* f32 sums of 32 rows, where order may turn */
            assert_true(better < KEEP);
        }
        for (uint32_t k = 0; k < 40; k++)
            assert_int_equal(pos[KEEP + k], CHUNK + k);
        assert_int_equal(kvs_cache_next_rope(s->cache, layer, head), CHUNK + 40);
    }
    kvs_session_free(&s);
    kvs_session_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(laq_without_lookahead_is_not_snapkv),
        cmocka_unit_test(r_kv_without_redundancy_is_not_snapkv),
        cmocka_unit_test(g_kv_that_forgets_is_not_snapkv_or_r_kv),
        cmocka_unit_test(g_kv_that_never_forgets_is_no_running_maximum),
        cmocka_unit_test(tova_has_a_memory),
        cmocka_unit_test(knorm_sees_where_a_key_stands),
        cmocka_unit_test(dbudgetkv_keeps_less_under_a_smaller_threshold),
        cmocka_unit_test(global_shares_are_not_the_best_of_all),
        cmocka_unit_test(composite_shares_are_wrong),
        cmocka_unit_test(adakv_favours_one_of_equal_heads),
        cmocka_unit_test(probing_changes_the_cache),
        cmocka_unit_test(kvzip_is_not_the_largest_attention_of_a_repetition),
        cmocka_unit_test(kvzip_plus_does_not_weigh_rows_by_their_stream),
        cmocka_unit_test(kvzip_plus_does_not_weigh_slots_by_their_values),
        cmocka_unit_test(a_ratio_of_all_slots_is_not_what_stays),
        cmocka_unit_test(looking_ahead_on_all_slots_foretells_something_else),
        cmocka_unit_test(a_patched_single_chunk_is_not_snapkv),
        cmocka_unit_test(a_patched_chunk_is_not_judged_by_the_prompts_end),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}

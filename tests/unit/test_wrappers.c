/* Stages that wrap any scorer: a share of every stretch, a threshold in place of a count, the first score, and a bin that waits. */
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include "unit/policy_fixture.h"

enum { N = 700, VOCAB = TINY_VOCAB_MIN, ROOMY = 1024, TIGHT = 192 };

/* ---- +select=within ---- */

static uint32_t n_free_of(const kvs_policy *p, uint32_t begin, uint32_t end)
{
    kvs_policy_view v = b.view;
    v.pos += begin;
    v.flags += begin;
    v.n_slots = end - begin;
    return end - begin - kvs_protected_count(&p->protect, &v);
}

/* Every stretch keeps its share, to a slot, and no slot that goes scores more than an unprotected one of its stretch that stays. */
static void a_stretch_pays_for_another(void **state)
{
    (void)state;
    kvs_rng rng = {31};
    for (int round = 0; round < 200; round++) {
        const uint32_t length = 1 + kvs_rng_below(&rng, 200), n = 10 + kvs_rng_below(&rng, 500);
        const bool bare = round % 2 == 0;
        char spec[96];
        snprintf(spec, sizeof spec, "h2o:recent=0 +select=within:length=%u +protect=%s", length,
                 bare ? "none" : "sinks:3,recent:5,pinned");
        const kvs_policy p = parse(spec);
        fill_view(&rng, n);
        const uint32_t n_hard = n - n_free_of(&p, 0, n), n_keep = n_hard + kvs_rng_below(&rng, n - n_hard + 1);
        if (n_keep == 0 || n_keep >= n)
            continue;
        assert_int_equal(evict(&p, n_keep), n_keep);
        assert_int_equal(kvs_protected_dropped(&p.protect, &b.view, b.keep), n);
        for (uint32_t at = 0, end; at < n; at = end) {
            for (end = at; end < n && b.pos[end] / (int32_t)length == b.pos[at] / (int32_t)length;)
                end++;
            uint32_t n_stay = 0;
            for (uint32_t i = at; i < end; i++)
                n_stay += b.keep[i];
            const uint32_t n_free = n_free_of(&p, at, end);
            const double share = (double)(n_keep - n_hard) * n_free / (n - n_hard);
            const double got = (double)n_stay - (end - at - n_free);
            if (!(got > share - 1 && got <= share + 1))
                fail_msg("%s: %.0f of %u stay, a share of %.2f", spec, got, n_free, share);
            for (uint32_t i = at; bare && i < end; i++)
                for (uint32_t k = at; k < end; k++)
                    assert_true(!b.keep[i] || b.keep[k] || b.scores[i] >= b.scores[k]);
        }
    }
}

static void one_stretch_is_not_the_usual_selection(void **state)
{
    (void)state;
    kvs_rng rng = {32};
    static uint8_t want[SLOTS_MAX];
    const kvs_policy whole = parse("h2o"), one = parse("h2o +select=within:length=1000000");
    for (uint32_t n = 40; n < 400; n += 13) {
        fill_view(&rng, n);
        evict(&whole, n / 2);
        memcpy(want, b.keep, n);
        evict(&one, n / 2);
        assert_memory_equal(b.keep, want, n);
    }
}

/* ---- +rescore=first ---- */

static void a_slot_forgets_its_first_score(void **state)
{
    (void)state;
    kvs_rng rng = {33};
    const kvs_policy p = parse("h2o:recent=0 +rescore=first");
    fill_view(&rng, 100);
    memset(b.carry, 0, sizeof b.carry);
    static float first[100];
    for (int round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < 100; i++)
            b.scores[i] = round == 0 && i == 7  ? 0
                          : round < 2 && i == 9 ? INFINITY
                                                : (float)kvs_rng_double(&rng) - 0.5f;
        if (round == 0)
            memcpy(first, b.scores, sizeof first);
        if (round == 2)
            first[9] = b.scores[9];
        p.rescore->rescore(p.rescore_params, &b.view, b.scores);
        for (uint32_t i = 0; i < 100; i++)
            assert_true(b.scores[i] == first[i]);
    }
}

/* ---- +budget=threshold ---- */

static void a_threshold_keeps_a_count(void **state)
{
    (void)state;
    kvs_rng rng = {34};
    enum { HEADS = 6, STRIDE = 300 };
    static float scores[HEADS * STRIDE];
    static uint32_t keys[HEADS * STRIDE];
    const kvs_policy p = parse("knorm +budget=threshold:least=0.3");
    assert_int_equal(p.protect.recent, 128);
    assert_int_equal(parse("knorm +budget=threshold:window=7 +protect=none").protect.recent, 7);
    assert_int_equal(parse("knorm +budget=threshold:window=7 +protect=recent:9").protect.recent, 9);
    for (int round = 0; round < 100; round++) {
        uint32_t n_slots[HEADS], n_even[HEADS], n_hard[HEADS] = {0}, n_keep[HEADS], n_pass[HEADS], all = 0, room = 0,
                                                sum = 0;
        for (uint32_t h = 0; h < HEADS; h++) {
            n_slots[h] = 1 + kvs_rng_below(&rng, STRIDE);
            n_even[h] = round % 2 ? n_slots[h] : 1 + kvs_rng_below(&rng, n_slots[h]);
            n_pass[h] = 0;
            for (uint32_t i = 0; i < n_slots[h]; i++) {
                scores[h * STRIDE + i] = kvs_rng_below(&rng, 50) == 0 ? NAN : random_mass(&rng);
                n_pass[h] += scores[h * STRIDE + i] >= 0.3f;
            }
            all += n_pass[h];
            room += n_even[h];
        }
        const kvs_budget_view v = {.n_layers = 2,
                                   .n_kv_heads = 3,
                                   .n_slots = n_slots,
                                   .n_protected = n_hard,
                                   .n_even = n_even,
                                   .scores = scores,
                                   .stride = STRIDE,
                                   .keys = keys};
        p.budget->allocate(p.budget_params, &v, n_keep);
        for (uint32_t h = 0; h < HEADS; h++) {
            sum += n_keep[h];
            assert_true(n_keep[h] <= n_pass[h]);
            if (round % 2)
                assert_int_equal(n_keep[h], n_pass[h]);
        }
        assert_int_equal(sum, all < room ? all : room);
    }
}

/* ---- sessions ---- */

static int32_t tokens[N];
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

static kvs_session *open_session(const char *policy, uint32_t budget)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = policy;
    o.budget_tokens = budget;
    o.chunk_tokens = 48;
    o.kv_type = KVS_KV_F32;
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

static uint64_t n_evictions(const kvs_session *s)
{
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    return u.n_evictions;
}

static float norm_of(const float *key)
{
    float sum = 0;
    for (uint32_t d = 0; d < 32; d++)
        sum += key[d] * key[d];
    return sqrtf(sum);
}

/* The keys of layer 0 do not depend on what was evicted: what its heads hold is known from the full cache alone. */
static void a_slot_stays_below_the_threshold(void **state)
{
    (void)state;
    static float keys[N * 32], norms[3 * N];
    enum { RECENT = 50 };
    kvs_session *full = open_session("baseline", ROOMY);
    run(full, 0, N, expected);
    float least = 0;
    for (uint32_t h = 0; h < 3; h++) {
        kvs_cache_read_kv(full->cache, 0, h, keys, NULL);
        for (uint32_t i = 0; i < N; i++)
            norms[h * N + i] = norm_of(keys + (size_t)i * 32);
        least += norms[h * N] / 3;
    }
    kvs_session_free(&full);
    char spec[160];
    snprintf(spec, sizeof spec,
             "knorm +rescore=first +budget=threshold:least=%.6f,window=%d +schedule=step +protect=none +position=keep",
             -(double)least, RECENT);
    kvs_session *s = open_session(spec, ROOMY);
    kvs_error err = {.message = ""};
    run(s, 0, N, got);
    assert_int_equal(kvs_session_evict(s, 0, &err), KVS_OK);
    uint32_t n_held[3];
    for (uint32_t h = 0; h < 3; h++) {
        int32_t pos[N];
        const kvs_head_slots slots = {.pos = pos};
        n_held[h] = kvs_cache_read_head(s->cache, 0, h, &slots);
        uint32_t at = 0;
        for (uint32_t i = 0; i < N; i++) {
            if (fabsf(norms[h * N + i] - least) < 1e-5f) {
                at += at < n_held[h] && pos[at] == (int32_t)i;
                continue;
            }
            const bool stays = i >= N - RECENT || norms[h * N + i] < least,
                       held = at < n_held[h] && pos[at] == (int32_t)i;
            if (stays != held)
                fail_msg("head %u, slot %u of norm %g: %s", h, i, (double)norms[h * N + i], held ? "held" : "gone");
            at += held;
        }
        assert_int_equal(at, n_held[h]);
        assert_true(n_held[h] > RECENT && n_held[h] < N);
    }
    assert_true(n_held[0] != n_held[1] || n_held[1] != n_held[2]);
    kvs_session_free(&s);
}

static void a_threshold_that_all_pass_evicts(void **state)
{
    (void)state;
    static const char *const specs[] = {"knorm +budget=threshold:least=-1e30 +schedule=step",
                                        "knorm +budget=threshold:least=0,window=900 +schedule=step +rescore=first"};
    kvs_session *full = open_session("baseline", ROOMY);
    run(full, 0, N, expected);
    kvs_session_free(&full);
    for (int i = 0; i < 2; i++) {
        kvs_session *s = open_session(specs[i], ROOMY);
        run(s, 0, N, got);
        assert_int_equal(n_evictions(s), 0);
        assert_int_equal(fx_differs(expected, got, N, VOCAB), N);
        kvs_session_free(&s);
    }
}

/* A cap outranks the threshold: the session goes on, and never holds more. */
static void a_threshold_breaks_the_budget(void **state)
{
    (void)state;
    kvs_session *s = open_session("knorm +budget=threshold:least=-1e30,window=16", TIGHT);
    for (uint32_t at = 0; at < N; at += 50) {
        run(s, at, at + 50, got);
        assert_true(kvs_cache_live_total(s->cache) <= (uint64_t)TIGHT * 6);
    }
    assert_true(n_evictions(s) > 0);
    kvs_session_free(&s);
}

/* ---- +probe=prompt ---- */

typedef struct seen_scores {
    const kvs_session *s;
    uint32_t n; /* events */
    float scores[6][64];
} seen_scores;

static void on_first_eviction(void *ctx, const kvs_event *event)
{
    seen_scores *x = ctx;
    (void)event;
    for (uint32_t h = 0; h < 6 && x->n == 0; h++)
        memcpy(x->scores[h], x->s->scratch.scores + (size_t)h * x->s->scratch.stride, sizeof x->scores[h]);
    x->n++;
}

/* The prompt's last rows score a chunk as if they stood behind it for good: then they give themselves a part of their
 * attention, and so they do where they are thrown away. In every mode, after an eviction that left gaps too. */
static void rows_of_the_prompt_do_not_look_as_if_they_were_held(void **state)
{
    (void)state;
    enum { FIRST = 30, KEPT = 14, AT = 64, ROWS = 8, HELD = KEPT + AT - FIRST };
    static const char *const specs[] = {
        "snapkv:window=8,kernel=1 +probe=prompt:rows=8 +schedule=every:64 +protect=none +keep=12tok",
        "snapkv:window=8,kernel=1 +protect=none +keep=12tok"};
    static const char *const modes[] = {"keep", "rerotate", "gapcap:3"};
    static seen_scores seen[2];
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 2; k++) {
            kvs_session_options o;
            kvs_session_options_default(&o);
            o.policy = specs[k];
            o.position = modes[i];
            o.budget_tokens = ROOMY;
            o.kv_type = KVS_KV_F32;
            o.arith = KVS_ARITH_F32;
            kvs_error err = {.message = ""};
            kvs_session *s = fx_session(model, &o);
            assert_non_null(s);
            /* No prompt is coming in here: both keep the same, with gaps. */
            assert_int_equal(kvs_session_extend(s, tokens, NULL, FIRST, NULL, &err), KVS_OK);
            assert_int_equal(kvs_session_evict(s, KEPT, &err), KVS_OK);
            seen[k] = (seen_scores){.s = s};
            kvs_session_on_event(s, on_first_eviction, &seen[k]);
            assert_int_equal(kvs_session_extend(s, tokens + FIRST, NULL, AT + ROWS - FIRST, NULL, &err), KVS_OK);
            if (k == 1)
                assert_int_equal(kvs_session_evict(s, 12, &err), KVS_OK);
            assert_int_equal(seen[k].n, 1);
            kvs_session_free(&s);
        }
        for (uint32_t h = 0; h < 6; h++)
            for (uint32_t slot = 0; slot < HELD; slot++) {
                const double a = (double)seen[0].scores[h][slot], c = (double)seen[1].scores[h][slot];
                if (!(fabs(a - c) <= 1e-5 * fabs(c)))
                    fail_msg("%s, head %u, slot %u: %g instead of %g", modes[i], h, slot, a, c);
            }
    }
}

/* ---- hae ---- */

static void an_empty_bin_is_not_greedy(void **state)
{
    (void)state;
    kvs_session *s = open_session("h2o:recent=0,norm=0 +select=chunk:length=1 +schedule=step +keep=100tok", ROOMY);
    run(s, 0, N, expected);
    kvs_session_free(&s);
    s = open_session("hae:bin=0 +keep=100tok +schedule=step", ROOMY);
    run(s, 0, N, got);
    assert_int_equal(fx_differs(expected, got, N, VOCAB), N);
    kvs_session_free(&s);
}

static void a_bin_is_emptied_too_early(void **state)
{
    (void)state;
    kvs_session *s = open_session("hae:bin=10000 +keep=100tok +schedule=step", ROOMY);
    run(s, 0, N, got);
    assert_int_equal(n_evictions(s), 0);
    kvs_session_free(&s);
    s = open_session("hae:bin=20 +keep=100tok +schedule=step", ROOMY);
    for (uint32_t i = 0; i < 300; i++) { /* one token a call */
        kvs_error err = {.message = ""};
        const uint32_t before = kvs_cache_live_max(s->cache);
        assert_int_equal(kvs_session_extend(s, tokens + i, NULL, 1, NULL, &err), KVS_OK);
        const uint32_t after = kvs_cache_live_max(s->cache);
        if (after < before) {
            assert_int_equal(before, 121);
            assert_int_equal(after, 101);
        }
    }
    assert_int_equal(n_evictions(s), (300 - 100 - 1) / 21);
    kvs_session_free(&s);
}

/* HAE's pruning of prompts: the first layer's set for all. */
static void a_broadcast_set_differs_between_layers(void **state)
{
    (void)state;
    kvs_session *s = open_session("observed_attention +select=chunk:length=1,reuse=1024", TIGHT);
    run(s, 0, 300, got);
    assert_true(n_evictions(s) > 0);
    static int32_t first[TIGHT], pos[TIGHT];
    const uint32_t n = kvs_cache_read_head(s->cache, 0, 0, &(kvs_head_slots){.pos = first});
    for (uint32_t h = 1; h < 6; h++) {
        assert_int_equal(kvs_cache_read_head(s->cache, h / 3, h % 3, &(kvs_head_slots){.pos = pos}), n);
        assert_memory_equal(first, pos, n * sizeof *pos);
    }
    kvs_session_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_stretch_pays_for_another),
        cmocka_unit_test(one_stretch_is_not_the_usual_selection),
        cmocka_unit_test(a_slot_forgets_its_first_score),
        cmocka_unit_test(a_threshold_keeps_a_count),
        cmocka_unit_test(a_slot_stays_below_the_threshold),
        cmocka_unit_test(a_threshold_that_all_pass_evicts),
        cmocka_unit_test(rows_of_the_prompt_do_not_look_as_if_they_were_held),
        cmocka_unit_test(a_threshold_breaks_the_budget),
        cmocka_unit_test(an_empty_bin_is_not_greedy),
        cmocka_unit_test(a_bin_is_emptied_too_early),
        cmocka_unit_test(a_broadcast_set_differs_between_layers),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

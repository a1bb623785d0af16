/* Sentences that are said again: the log against plain code that starts from scratch each time, and what skipkv evicts. */
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

/* ---- the log ---- */

enum { EMBD = 6, N_MAX = 400, SLOTS = 120, SHORTEST = 3, LONGEST = 9, VOCAB = 64 };

static int32_t tokens[N_MAX];
static uint8_t flags[N_MAX];
static float hidden[N_MAX][EMBD];
static const uint64_t ends[2] = {0xf}; /* tokens 0 to 3 */

static kvs_sentence_log new_log(uint32_t n_slots)
{
    kvs_sentence_log log = {.ends = ends,
                            .n_embd = EMBD,
                            .vocab_size = VOCAB,
                            .threshold = 0.8f,
                            .segmenter = {.shortest = SHORTEST, .longest = LONGEST}};
    kvs_error err;
    assert_int_equal(kvs_sentence_log_create(&log, NULL, n_slots, &err), KVS_OK);
    return log;
}

static void add(kvs_sentence_log *log, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const uint64_t at = log->n_tokens;
        kvs_sentence_log_add(log, tokens[at], flags[at], hidden[at]);
    }
}

/* All sentences among the first n tokens, with what the log says of each; returns their number. */
static uint32_t list_sentences(uint32_t n, kvs_sentence *out, double (*meaning)[EMBD])
{
    uint32_t n_out = 0, begin = 0;
    for (uint32_t i = 0; i <= n; i++) {
        const bool open = i > begin;
        const bool here = i < n && !(flags[i] & KVS_TOKEN_TEMPLATE);
        const bool broken = open && i < n && (!here || flags[i] != flags[i - 1]);
        const bool marked = open && i - begin >= SHORTEST && tokens[i - 1] < 4;
        if (broken || marked || i - begin == LONGEST) {
            double square = 0;
            for (uint32_t d = 0; d < EMBD; d++) {
                meaning[n_out][d] = 0;
                for (uint32_t k = begin; k < i; k++)
                    meaning[n_out][d] += (double)hidden[k][d] / (i - begin);
                square += meaning[n_out][d] * meaning[n_out][d];
            }
            for (uint32_t d = 0; d < EMBD; d++)
                meaning[n_out][d] /= sqrt(square);
            if (i - begin >= SHORTEST)
                out[n_out++] = (kvs_sentence){.begin = (int32_t)begin, .end = (int32_t)i};
            begin = i;
        }
        if (!here && i < n)
            begin = i + 1;
    }
    for (uint32_t i = 0; i < n_out; i++)
        for (uint32_t j = i + 1; j < n_out && out[i].repeated_at == 0; j++) {
            double alike = 0;
            for (uint32_t d = 0; d < EMBD; d++)
                alike += meaning[i][d] * meaning[j][d];
            assert_true(fabs(alike - 0.8) > 1e-6); /* no tie that rounding decides */
            out[i].repeated_at = alike >= 0.8 ? out[j].end : 0;
        }
    return n_out;
}

static void check(const kvs_sentence_log *log)
{
    static kvs_sentence want[N_MAX];
    static double meaning[N_MAX][EMBD];
    const uint32_t n = list_sentences((uint32_t)log->n_tokens, want, meaning);
    assert_true(log->n <= n);
    for (uint32_t i = 0; i < log->n; i++) {
        const kvs_sentence *const x = &log->sentences[i], *const w = &want[n - log->n + i];
        if (x->begin != w->begin || x->end != w->end || x->repeated_at != w->repeated_at)
            fail_msg("after %u tokens: [%d, %d) repeated at %d, expected [%d, %d) at %d", (uint32_t)log->n_tokens,
                     x->begin, x->end, x->repeated_at, w->begin, w->end, w->repeated_at);
        for (uint32_t d = 0; d < EMBD; d++)
            assert_true(fabs((double)log->meanings[i * EMBD + d] - meaning[n - log->n + i][d]) <= 0x1p-23);
    }
}

static void fill(kvs_rng *rng)
{
    uint8_t role = KVS_TOKEN_USER;
    for (uint32_t i = 0; i < N_MAX; i++) {
        tokens[i] = (int32_t)kvs_rng_below(rng, 24);
        if (kvs_rng_below(rng, 20) == 0)
            role ^= KVS_TOKEN_USER | KVS_TOKEN_ASSISTANT;
        flags[i] = kvs_rng_below(rng, 20) == 0 ? role | KVS_TOKEN_TEMPLATE : role;
        for (uint32_t d = 0; d < EMBD; d++)
            hidden[i][d] = (float)(kvs_rng_double(rng) + (d == 0 ? 0.2 : -0.5));
    }
}

static void log_differs_from_one_that_starts_afresh(void **state)
{
    (void)state;
    kvs_rng rng = {1};
    uint32_t n_repeated = 0;
    for (int round = 0; round < 60; round++) {
        fill(&rng);
        kvs_sentence_log log = new_log(SLOTS), into = new_log(SLOTS + 40);
        uint64_t evicted_at = 0;
        while (log.n_tokens < N_MAX - 30) {
            add(&log, 1 + kvs_rng_below(&rng, 30));
            check(&log);
            const uint32_t what = kvs_rng_below(&rng, 6);
            if (what == 0) {
                kvs_sentence_log_truncate(&log,
                                          evicted_at + kvs_rng_below(&rng, (uint32_t)(log.n_tokens - evicted_at) + 1));
                check(&log);
            }
            if (what == 1) { /* through a save, into a log with more room and back */
                const size_t n = kvs_sentence_log_bytes(&log);
                uint8_t *const buf = malloc(n);
                size_t measured;
                kvs_error err;
                assert_non_null(buf);
                kvs_sentence_log_save(&log, buf);
                assert_int_equal(kvs_sentence_log_measure(&into, buf, n, log.n_tokens, &measured, &err), KVS_OK);
                assert_int_equal(measured, n);
                assert_int_equal(kvs_sentence_log_measure(&into, buf, n - 1, log.n_tokens, &measured, &err),
                                 KVS_EFORMAT);
                kvs_sentence_log_load(&into, buf);
                free(buf);
                check(&into);
                kvs_sentence_log_copy(&log, &into, into.n_tokens);
                check(&log);
            }
            if (what == 2 || log.n_tokens - evicted_at > SLOTS - 31) {
                evicted_at = log.n_tokens;
                kvs_sentence_log_evicted(&log);
                assert_true(log.n <= log.capacity / 2);
            }
        }
        for (uint32_t i = 0; i < log.n; i++)
            n_repeated += log.sentences[i].repeated_at != 0;
        kvs_sentence_log_free(&log, NULL);
        kvs_sentence_log_free(&into, NULL);
    }
    assert_true(n_repeated > 100);
}

/* Damaged bytes are refused, or read without going out of bounds (make asan). */
static void damaged_log_harms(void **state)
{
    (void)state;
    kvs_rng rng = {2};
    fill(&rng);
    kvs_sentence_log log = new_log(SLOTS), into = new_log(SLOTS);
    add(&log, 110);
    const size_t n = kvs_sentence_log_bytes(&log);
    uint8_t *const good = malloc(n), *const bad = malloc(n);
    assert_non_null(good);
    assert_non_null(bad);
    kvs_sentence_log_save(&log, good);
    uint32_t n_refused = 0;
    for (int i = 0; i < 3000; i++) {
        size_t measured;
        kvs_error err;
        memcpy(bad, good, n);
        for (int k = 0; k < 3; k++)
            bad[kvs_rng_below(&rng, i % 2 ? 40 : (uint32_t)n)] ^= (uint8_t)(1u << kvs_rng_below(&rng, 8));
        if (kvs_sentence_log_measure(&into, bad, n, 110, &measured, &err) != KVS_OK) {
            n_refused++;
            continue;
        }
        kvs_sentence_log_load(&into, bad);
        kvs_sentence_log_add(&into, 5, 0, hidden[0]);
        kvs_sentence_log_truncate(&into, 100);
    }
    assert_true(n_refused > 100 && n_refused < 3000);
    free(good);
    free(bad);
    kvs_sentence_log_free(&log, NULL);
    kvs_sentence_log_free(&into, NULL);
}

/* ---- skipkv ---- */

enum { SAID = 240, FIRST = 40, AGAIN = 150, COPY = 11 };

static kvs_model *model;
static int32_t said[600];

static int open_model(void **state)
{
    (void)state;
    tiny_options t;
    fx_shape(&t, GGML_TYPE_F32);
    model = fx_open(&t, 2, 0);
    fx_tokens(21, said, 600);
    said[FIRST - 1] = said[AGAIN - 1] = said[FIRST + COPY - 1] = TINY_FIRST_BYTE + '.';
    for (uint32_t i = 0; i + 1 < COPY; i++)
        said[FIRST + i] = TINY_FIRST_BYTE + 'a' + (int32_t)i;
    memcpy(said + AGAIN, said + FIRST, COPY * sizeof *said);
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
    kvs_session *s = fx_session(model, &o);
    assert_non_null(s);
    return s;
}

static const kvs_sentence *sentence_at(const kvs_sentence_log *log, int32_t begin)
{
    for (uint32_t i = 0; i < log->n; i++)
        if (log->sentences[i].begin == begin)
            return &log->sentences[i];
    fail_msg("no sentence begins at %d", begin);
    return NULL;
}

/* How alike the two copies are in this model. */
static double likeness(void)
{
    kvs_session *s = open_session("skipkv +select=unrepeated:threshold=1.01", 300);
    kvs_error err;
    assert_int_equal(kvs_session_extend(s, said, NULL, SAID, NULL, &err), KVS_OK);
    const kvs_sentence_log *const log = &s->sentences;
    const size_t n = log->n_embd, a = (size_t)(sentence_at(log, FIRST) - log->sentences),
                 c = (size_t)(sentence_at(log, AGAIN) - log->sentences);
    double alike = 0;
    for (size_t d = 0; d < n; d++)
        alike += (double)log->meanings[a * n + d] * (double)log->meanings[c * n + d];
    assert_int_equal(log->sentences[a].repeated_at, 0);
    kvs_session_free(&s);
    return alike;
}

/* The earlier copy goes whole in every head, the later one and what is unlike all others by r-kv. */
static void the_earlier_copy_stays_or_leaves_fragments(void **state)
{
    (void)state;
    enum { KEEP = 150 };
    char spec[128];
    snprintf(spec, sizeof spec, "skipkv:window=4 +protect=none +select=unrepeated:threshold=%.6f,longest=16",
             likeness() - 1e-5);
    kvs_session *s = open_session(spec, 300);
    kvs_error err;
    assert_int_equal(kvs_session_extend(s, said, NULL, SAID, NULL, &err), KVS_OK);
    static kvs_sentence before[SAID];
    const uint32_t n = s->sentences.n;
    memcpy(before, s->sentences.sentences, n * sizeof *before);
    /* Random weights: a sentence between may be as like as the copy. */
    const int32_t again = sentence_at(&s->sentences, FIRST)->repeated_at;
    assert_true(again > FIRST + COPY && again <= AGAIN + COPY);
    assert_int_equal(before[n - 1].repeated_at, 0);
    uint32_t n_repeated = 0;
    for (uint32_t i = 0; i < n; i++)
        n_repeated += before[i].repeated_at == 0 ? 0 : (uint32_t)(before[i].end - before[i].begin);
    assert_int_equal(kvs_session_evict(s, KEEP, &err), KVS_OK);
    for (uint32_t h = 0; h < s->scratch.n_heads; h++) {
        int32_t pos[SAID];
        const uint32_t held =
            kvs_session_keep_set(s, h / model->info.n_kv_heads, h % model->info.n_kv_heads, pos, NULL, SAID);
        assert_int_equal(held, kvs_min_u32(KEEP, SAID - n_repeated));
        for (uint32_t k = 0, i = 0; k < held; k++) {
            while (i < n && before[i].end <= pos[k])
                i++;
            assert_true(i == n || pos[k] < before[i].begin || before[i].repeated_at == 0);
        }
    }
    kvs_session_free(&s);
}

/* What a person pinned stays, and its sentence with it as far as r-kv wants. */
static void a_repeated_sentence_that_is_pinned_goes(void **state)
{
    (void)state;
    char spec[128];
    snprintf(spec, sizeof spec, "skipkv:window=4 +protect=pinned +select=unrepeated:threshold=%.6f", likeness() - 1e-5);
    kvs_session *s = open_session(spec, 300);
    kvs_error err;
    uint8_t pinned[SAID] = {0};
    pinned[FIRST + 2] = KVS_TOKEN_PINNED;
    assert_int_equal(kvs_session_extend(s, said, pinned, SAID, NULL, &err), KVS_OK);
    assert_true(sentence_at(&s->sentences, FIRST)->repeated_at != 0);
    assert_int_equal(kvs_session_evict(s, SAID - 1, &err), KVS_OK);
    int32_t pos[SAID];
    const uint32_t held = kvs_session_keep_set(s, 0, 0, pos, NULL, SAID);
    uint32_t n = 0;
    for (uint32_t k = 0; k < held; k++)
        n += pos[k] >= FIRST && pos[k] < FIRST + COPY;
    assert_true(n >= COPY - 1);
    kvs_session_free(&s);
}

static void no_threshold_is_not_r_kv(void **state)
{
    (void)state;
    kvs_session *s = open_session("skipkv +protect=none +select=unrepeated:threshold=1.01", 200);
    kvs_session *r = open_session("r-kv +protect=none", 200);
    kvs_error err;
    assert_int_equal(kvs_session_extend(s, said, NULL, 600, NULL, &err), KVS_OK);
    assert_int_equal(kvs_session_extend(r, said, NULL, 600, NULL, &err), KVS_OK);
    assert_true(s->n_evictions > 3);
    for (uint32_t h = 0; h < s->scratch.n_heads; h++) {
        int32_t pos[200], want[200];
        const uint32_t layer = h / model->info.n_kv_heads, head = h % model->info.n_kv_heads;
        const uint32_t n = kvs_session_keep_set(s, layer, head, pos, NULL, 200);
        assert_int_equal(kvs_session_keep_set(r, layer, head, want, NULL, 200), n);
        assert_memory_equal(pos, want, n * sizeof *pos);
    }
    kvs_session_free(&s);
    kvs_session_free(&r);
}

/* Of another scorer, whose newest slots need not stay, something always does. */
static void nothing_is_left_where_all_was_said_again(void **state)
{
    (void)state;
    kvs_session *s = open_session("knorm +protect=none +select=unrepeated:threshold=-1,shortest=1,longest=5", 300);
    kvs_error err;
    assert_int_equal(kvs_session_extend(s, said, NULL, 200, NULL, &err), KVS_OK);
    assert_int_equal(kvs_session_evict(s, 100, &err), KVS_OK);
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    assert_true(u.n_slots_min >= 1 && u.n_slots_max <= 100);
    assert_int_equal(kvs_session_extend(s, said + 200, NULL, 300, NULL, &err), KVS_OK);
    kvs_session_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(log_differs_from_one_that_starts_afresh),
        cmocka_unit_test(damaged_log_harms),
        cmocka_unit_test(the_earlier_copy_stays_or_leaves_fragments),
        cmocka_unit_test(a_repeated_sentence_that_is_pinned_goes),
        cmocka_unit_test(no_threshold_is_not_r_kv),
        cmocka_unit_test(nothing_is_left_where_all_was_said_again),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}

/* Results that depend on how the work was cut: chunks, slices, batches, threads, forks, saves, instruction sets, or a
 * policy that had nothing to evict. All must agree to the last bit, after evictions too. */
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

enum { N = 600, VOCAB = TINY_VOCAB_MIN, BUDGET = 3000, SMALL = 192, CHUNK = 48, FORK_AT = 331 };

static int32_t tokens[N], other[N];
static uint8_t flags[N];
static const uint32_t n_threads_of[] = {0, 1, 2, 3, 16};
static kvs_model *model[5];   /* each of n_threads_of[] threads; [0] unused */
static float *expected, *got; /* [N][VOCAB] */

static int set_up(void **state)
{
    (void)state;
    tiny_options o;
    fx_shape(&o, GGML_TYPE_Q4_1);
    for (uint32_t t = 1; t < 5; t++)
        if ((model[t] = fx_open(&o, n_threads_of[t], 0)) == NULL)
            return 1;
    fx_tokens(1, tokens, N);
    fx_tokens(2, other, N);
    fx_flags(3, flags, N);
    expected = malloc(sizeof(float) * N * VOCAB);
    got = malloc(sizeof(float) * N * VOCAB);
    return expected == NULL || got == NULL;
}

static int tear_down(void **state)
{
    (void)state;
    for (uint32_t t = 1; t < 5; t++)
        kvs_model_close(&model[t]);
    free(expected);
    free(got);
    return 0;
}

/* ---- helpers ---------------------------------------------------------------------------------------------------- */

typedef struct setting {
    const char *policy, *position;
    uint32_t budget, chunk;
    kvs_arith arith;
    kvs_kv_type kv;
} setting;

static kvs_session *open_session(kvs_model *m, const setting *c)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = c->policy;
    o.position = c->position;
    o.budget_tokens = c->budget;
    o.chunk_tokens = c->chunk;
    o.arith = c->arith;
    o.kv_type = c->kv;
    kvs_session *s = fx_session(m, &o);
    assert_non_null(s);
    return s;
}

static void run_rows(kvs_session *s, uint32_t from, uint32_t to, uint32_t slice, float *out)
{
    kvs_error err = {.message = ""};
    if (fx_run(s, tokens + from, flags + from, to - from, slice, out + (size_t)from * VOCAB, VOCAB, &err) != KVS_OK)
        fail_msg("rows %u to %u: %s", from, to, err.message);
}

static void check_same(const setting *c, const char *what, uint32_t detail, uint32_t from)
{
    const uint32_t row =
        from + fx_differs(expected + (size_t)from * VOCAB, got + (size_t)from * VOCAB, N - from, VOCAB);
    if (row < N)
        fail_msg("%s +position=%s, %s, kv %s: %s %u: token %u differs (%.9g, not %.9g)",
                 c->policy != NULL ? c->policy : "baseline", c->position != NULL ? c->position : "own",
                 c->arith == KVS_ARITH_F32 ? "f32" : "native", c->kv == KVS_KV_F32 ? "f32" : "f16", what, detail, row,
                 (double)got[(size_t)row * VOCAB], (double)expected[(size_t)row * VOCAB]);
}

static void reference(const setting *c)
{
    kvs_session *s = open_session(model[1], c);
    run_rows(s, 0, N, N, expected);
    kvs_session_free(&s);
}

static const kvs_arith ariths[] = {KVS_ARITH_NATIVE, KVS_ARITH_F32};
static const kvs_kv_type kv_types[] = {KVS_KV_F16, KVS_KV_F32};

/* ---- cutting the work ------------------------------------------------------------------------------------------- */

static void check_cut(const setting *c, uint32_t which_model, uint32_t slice)
{
    char what[32];
    snprintf(what, sizeof what, "%u threads, slices of", n_threads_of[which_model]);
    kvs_session *s = open_session(model[which_model], c);
    memset(got, 0, sizeof(float) * N * VOCAB);
    run_rows(s, 0, N, slice, got);
    kvs_session_free(&s);
    check_same(c, what, slice, 0);
}

static void result_depends_on_chunk_or_threads(void **state)
{
    (void)state;
    static const uint32_t slices[] = {1, 7, 64, 512};
    for (int a = 0; a < 2; a++)
        for (int k = 0; k < 2; k++) {
            setting c = {.budget = BUDGET, .chunk = 512, .arith = ariths[a], .kv = kv_types[k]};
            reference(&c);
            for (uint32_t i = 0; i < 4; i++)
                for (uint32_t t = 1; t <= 3; t++)
                    if (k == 0 || t == 1 + i % 3)
                        check_cut(&c, t, slices[i]);
            if (k == 0) /* more threads than heads: parts of a head are shared out */
                check_cut(&c, 4, 64);
            for (uint32_t i = 0; i < 4; i++) { /* the session's own chunks, the caller says all at once */
                c.chunk = slices[i];
                kvs_session *s = open_session(model[2], &c);
                run_rows(s, 0, N, N, got);
                kvs_session_free(&s);
                check_same(&c, "chunk_tokens", slices[i], 0);
            }
        }
}

/* ---- what a policy will judge by ---------------------------------------------------------------------------------- */

/* The masses of every slot of every head: [n_layers][n_kv_heads][n_slots]. */
static void read_masses(const kvs_session *s, float *out)
{
    const kvs_model_info *i = &s->model->info;
    for (uint32_t layer = 0; layer < i->n_layers; layer++)
        for (uint32_t head = 0; head < i->n_kv_heads; head++) {
            kvs_head_slots slots = {0};
            for (int k = 0; k < KVS_SIDE_COUNT; k++)
                if (kvs_side_mask(&s->policy) & 1u << k)
                    slots.side[k] = out;
            out += kvs_cache_read_head(s->cache, layer, head, &slots);
        }
}

static void masses_depend_on_chunk_or_threads(void **state)
{
    (void)state;
    static const char *const policies[] = {"attention_top:acc=0", "attention_top:acc=1", "attention_top:acc=2",
                                           "attention_top:acc=3"};
    static const uint32_t slices[] = {1, 7, 64, 512};
    const size_t n_masses = (size_t)model[1]->info.n_layers * model[1]->info.n_kv_heads * N;
    for (int p = 0; p < 4; p++) {
        const setting c = {.policy = policies[p], .budget = BUDGET, .chunk = 512, .arith = KVS_ARITH_F32};
        kvs_session *s = open_session(model[1], &c);
        run_rows(s, 0, N, N, got);
        read_masses(s, expected);
        kvs_session_free(&s);
        double sum = 0;
        for (size_t i = 0; i < n_masses; i++)
            sum += (double)expected[i];
        assert_true(sum > 1);
        for (uint32_t t = 1; t <= 4; t++)
            for (uint32_t i = 0; i < 4; i++) {
                s = open_session(model[t], &c);
                run_rows(s, 0, N, slices[i], got);
                read_masses(s, got);
                kvs_session_free(&s);
                if (memcmp(got, expected, n_masses * sizeof *got) != 0)
                    fail_msg("%s, %u threads, slices of %u: other masses", policies[p], n_threads_of[t], slices[i]);
            }
    }
}

typedef struct batch {
    kvs_session *others[5];
    uint32_t depth[5];
} batch;

static void batch_open(batch *b, kvs_model *m, uint32_t n, const setting *c)
{
    static const uint32_t depths[5] = {0, 13, 100, 64, 300};
    kvs_error err = {.message = ""};
    for (uint32_t i = 0; i < n; i++) {
        b->others[i] = open_session(m, c);
        b->depth[i] = depths[i];
        assert_int_equal(kvs_session_extend(b->others[i], other, NULL, depths[i], NULL, &err), KVS_OK);
    }
}

/* The session under test runs in slices, between others that bring rows of their own; its place among them moves. */
static void batch_run(batch *b, uint32_t n, kvs_session *s, uint32_t slice)
{
    fx_rows rows = {.out = got, .vocab = VOCAB};
    uint8_t want[N];
    memset(want, 1, sizeof want);
    for (uint32_t at = 0, step = 0; at < N; at += slice, step++) {
        kvs_run runs[6];
        uint32_t n_runs = 0;
        for (uint32_t i = 0; i <= n; i++) {
            if (i == step % (n + 1))
                runs[n_runs++] = (kvs_run){.session = s,
                                           .tokens = tokens + at,
                                           .flags = flags + at,
                                           .n_tokens = kvs_min_u32(slice, N - at),
                                           .on_logits = fx_keep_row,
                                           .want = want,
                                           .ctx = &rows};
            if (i == n)
                continue;
            const uint32_t more = kvs_min_u32((step + 1) * (i + 1) % 50, N - b->depth[i]);
            runs[n_runs++] = (kvs_run){.session = b->others[i], .tokens = other + b->depth[i], .n_tokens = more};
            b->depth[i] += more;
        }
        kvs_error err = {.message = ""};
        if (kvs_step(runs, n_runs, &err) != KVS_OK)
            fail_msg("batch of %u: %s", n_runs, err.message);
    }
    assert_int_equal(rows.n, N);
}

static void check_batches(const setting *c, uint32_t n_min, uint32_t n_max)
{
    for (uint32_t n = n_min; n <= n_max; n++) {
        batch b;
        batch_open(&b, model[2], n, c);
        kvs_session *s = open_session(model[2], c);
        batch_run(&b, n, s, n == 5 ? 200 : 37);
        kvs_session_free(&s);
        for (uint32_t i = 0; i < n; i++)
            kvs_session_free(&b.others[i]);
        check_same(c, "batched with others:", n, 0);
    }
}

static void result_depends_on_neighbours(void **state)
{
    (void)state;
    for (int a = 0; a < 2; a++)
        for (int k = 0; k < 2; k++) {
            const setting c = {.budget = BUDGET, .chunk = 256, .arith = ariths[a], .kv = kv_types[k]};
            reference(&c);
            check_batches(&c, 1, 5);
        }
}

/* ---- forks and saves -------------------------------------------------------------------------------------------- */

static void check_fork(const setting *c, uint32_t at)
{
    kvs_error err = {.message = ""};
    kvs_session *parent = open_session(model[2], c), *child = NULL;
    run_rows(parent, 0, at, 50, got);
    assert_int_equal(kvs_session_fork(parent, NULL, &child, &err), KVS_OK);
    run_rows(child, at, N, 41, got);
    check_same(c, "child of a fork at", at, 0);
    kvs_session_free(&child);

    if (kvs_session_fork(parent, NULL, &child, &err) != KVS_OK)
        fail_msg("%s", err.message);
    float logits[VOCAB];
    assert_int_equal(kvs_session_extend(child, other, NULL, 70, logits, &err), KVS_OK);
    memset(got + (size_t)at * VOCAB, 0, sizeof(float) * VOCAB * (N - at));
    run_rows(parent, at, N, 41, got);
    check_same(c, "parent, after its fork wrote, at", at, 0);
    kvs_session_free(&child);
    kvs_session_free(&parent);
}

static void check_save(const setting *c, uint32_t at)
{
    kvs_error err = {.message = ""};
    kvs_session *s = open_session(model[2], c), *loaded = open_session(model[2], c);
    run_rows(s, 0, at, 50, got);
    assert_int_equal(kvs_session_extend(loaded, other, NULL, 9, NULL, &err), KVS_OK); /* what was there goes */
    if (fx_copy_by_save(s, loaded, &err) != KVS_OK)
        fail_msg("%s", err.message);
    kvs_session_free(&s);
    run_rows(loaded, at, N, 41, got);
    kvs_session_free(&loaded);
    check_same(c, "saved and loaded at", at, 0);
}

static void fork_or_save_changes_the_future(void **state)
{
    (void)state;
    static const uint32_t at[] = {1, 63, 64, 65, FORK_AT};
    for (int a = 0; a < 2; a++)
        for (int k = 0; k < 2; k++) {
            const setting c = {.budget = BUDGET, .chunk = 256, .arith = ariths[a], .kv = kv_types[k]};
            reference(&c);
            for (uint32_t i = 0; i < 5; i++) {
                check_fork(&c, at[i]);
                check_save(&c, at[i]);
            }
        }
}

static void fork_or_save_of_an_empty_session_fails(void **state)
{
    (void)state;
    const setting c = {.budget = BUDGET};
    kvs_error err = {.message = ""};
    reference(&c);
    kvs_session *s = open_session(model[1], &c), *child, *loaded = open_session(model[1], &c);
    if (kvs_session_fork(s, NULL, &child, &err) != KVS_OK)
        fail_msg("%s", err.message);
    run_rows(child, 0, N, N, got);
    check_same(&c, "fork of an empty session", 0, 0);
    if (fx_copy_by_save(s, loaded, &err) != KVS_OK)
        fail_msg("%s", err.message);
    run_rows(loaded, 0, N, N, got);
    check_same(&c, "load of an empty session", 0, 0);
    kvs_session_free(&s);
    kvs_session_free(&child);
    kvs_session_free(&loaded);
}

/* ---- policies that have nothing to do --------------------------------------------------------------------------- */

static void policy_without_need_changes_results(void **state)
{
    (void)state;
    static const char *const modes[] = {"rollback", "keep", "rerotate", "gapcap:4", "recompute"};
    for (int a = 0; a < 2; a++) {
        setting c = {.budget = BUDGET, .chunk = 128, .arith = ariths[a]};
        reference(&c);
        kvs_policy_info info;
        for (uint32_t p = 0; kvs_policy_get_info(p, &info); p++)
            for (uint32_t i = 0; i < 5; i++) {
                if (strstr(info.doc, "needs file=") != NULL)
                    continue; /* test_shares.c has them */
                if (i == 4 && strstr(info.stages, "(shared)") == NULL)
                    continue; /* recompute wants one keep set for all heads */
                if ((p + i + (uint32_t)a) % 5 > 1)
                    continue; /* two modes a preset and arithmetic: no mode is asked before an eviction */
                c.policy = info.name;
                c.position = modes[i];
                c.budget = i % 2 ? N : BUDGET; /* the tightest budget that holds all is enough */
                if (strstr(info.stages, "probe=") != NULL)
                    c.budget = 2 * BUDGET; /* room for the probe's rows is kept free */
                kvs_session *s = open_session(model[2], &c);
                run_rows(s, 0, N, 100, got);
                kvs_usage u;
                kvs_session_get_usage(s, &u);
                kvs_session_free(&s);
                if (u.n_evictions != 0)
                    fail_msg("%s at %s, budget %u: %llu evictions", c.policy, c.position, c.budget,
                             (unsigned long long)u.n_evictions);
                check_same(&c, "budget", c.budget, 0);
            }
    }
}

/* ---- instruction sets ------------------------------------------------------------------------------------------- */

static void result_depends_on_instruction_set(void **state)
{
    (void)state;
    /* A mask without any known bit leaves the plain twins. */
    static const uint32_t masks[] = {1u << 31,
                                     KVS_CPU_AVX2,
                                     KVS_CPU_AVX2 | KVS_CPU_AVX512,
                                     KVS_CPU_AVX2 | KVS_CPU_AVX512 | KVS_CPU_VNNI,
                                     KVS_CPU_NEON,
                                     KVS_CPU_NEON | KVS_CPU_DOTPROD};
    tiny_options o;
    fx_shape(&o, GGML_TYPE_Q4_1);
    for (uint32_t i = 0; i < sizeof masks / sizeof *masks; i++) {
        if (i > 0 && (kvs_cpu_flags() & masks[i]) != masks[i])
            continue;
        kvs_model *m = fx_open(&o, 2, masks[i]);
        assert_non_null(m);
        for (int a = 0; a < 2; a++)
            for (int k = 0; k < 2; k++) {
                const setting c = {.policy = "attention_top:acc=1,keep=0.7,scope=2",
                                   .budget = SMALL,
                                   .chunk = CHUNK,
                                   .arith = ariths[a],
                                   .kv = kv_types[k]};
                reference(&c);
                kvs_session *s = open_session(m, &c);
                run_rows(s, 0, N, 90, got);
                kvs_session_free(&s);
                check_same(&c, "cpu mask", masks[i], 0);
            }
        kvs_model_close(&m);
    }
}

/* ---- after evictions -------------------------------------------------------------------------------------------- */

static const char *const evicting[] = {
    "streaming",
    "random:keep=0.7",
    "sliding_window_gist:gist=60,recent=50",
    "attention_top:keep=0.8",
    "attention_top:acc=1,norm=1,scope=2,keep=0.6",
    "attention_bottom:acc=2,scope=1",
    "attention_top:acc=3,keep=0.9 +schedule=tokens:150",
    "random:keep=0.9 +schedule=every:37",
    "llama_context_shift:n_keep=8 +protect=none",
    "g-kv:window=8",
    "critical-adakv:window=16",
    "obcache-vk +select=sentence:longest=12",
    "dbudgetkv:threshold=0.2 +schedule=every:61",
};
enum { N_EVICTING = sizeof evicting / sizeof *evicting };

static bool possible(const setting *c)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = c->policy;
    o.position = c->position;
    o.budget_tokens = c->budget;
    kvs_session *s;
    const bool ok = kvs_session_create(model[1], &o, &s, NULL) == KVS_OK;
    kvs_session_free(&s);
    return ok;
}

/* A sanitizer looks for other faults than wrong bits, and takes ten times as long: every third policy will do. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { EVICTING_STEP = 3 };
#else
enum { EVICTING_STEP = 1 };
#endif

static void check_evicting(const char *position, kvs_arith arith, kvs_kv_type kv)
{
    for (uint32_t p = 0; p < N_EVICTING; p += EVICTING_STEP) {
        const setting c = {
            .policy = evicting[p], .position = position, .budget = SMALL, .chunk = CHUNK, .arith = arith, .kv = kv};
        if (!possible(&c)) { /* recompute for sets that differ between heads */
            assert_string_equal(position, "recompute");
            kvs_policy parsed;
            assert_int_equal(kvs_policy_parse(c.policy, NULL, false, &parsed, NULL), KVS_OK);
            assert_int_not_equal(kvs_policy_scope_of(&parsed), KVS_SCOPE_SHARED);
            continue;
        }
        reference(&c);
        check_cut(&c, 2, 64);
        check_cut(&c, p % 2 ? 3 : 1, p % 2 ? 23 : 1);
        check_batches(&c, 2 + p % 4, 2 + p % 4);
        check_fork(&c, FORK_AT);
        check_save(&c, FORK_AT);
    }
}

static void evictions_in_rollback_are_not_exact(void **state)
{
    (void)state;
    check_evicting("rollback", KVS_ARITH_NATIVE, KVS_KV_F16);
}

static void evictions_in_keep_are_not_exact(void **state)
{
    (void)state;
    check_evicting("keep", KVS_ARITH_F32, KVS_KV_F16);
}

static void evictions_in_rerotate_are_not_exact(void **state)
{
    (void)state;
    check_evicting("rerotate", KVS_ARITH_NATIVE, KVS_KV_F32);
    check_evicting("rerotate", KVS_ARITH_F32, KVS_KV_F16);
}

static void evictions_in_gapcap_are_not_exact(void **state)
{
    (void)state;
    check_evicting("gapcap:3", KVS_ARITH_F32, KVS_KV_F32);
}

static void evictions_in_recompute_are_not_exact(void **state)
{
    (void)state;
    check_evicting("recompute", KVS_ARITH_NATIVE, KVS_KV_F16);
}

/* Policies that look at heads between evictions cut rows there: that must not show. */
static void observations_are_not_exact(void **state)
{
    (void)state;
    static const char *const observing[] = {
        "compactor:chunk=48",
        "non_causal_attention:chunk=40,keep=0.7 +schedule=every:40",
        "expected_attention:epsilon=0.01 +budget=ada",
        "qfilter +rescore=caote",
    };
    for (uint32_t p = 0; p < 4; p += EVICTING_STEP) {
        const setting c = {.policy = observing[p], .budget = SMALL, .chunk = CHUNK, .arith = KVS_ARITH_F32};
        reference(&c);
        check_cut(&c, 2, 64);
        check_cut(&c, p % 2 ? 3 : 1, p % 2 ? 23 : 1);
        check_batches(&c, 2 + p % 3, 2 + p % 3);
        check_fork(&c, FORK_AT);
        check_save(&c, FORK_AT);
    }
}

/* The script checks before each decoded token: rows of an answer must be seen one by one wherever a call begins. */
static void paper_compat_depends_on_slices(void **state)
{
    (void)state;
    static const uint32_t slices[] = {N, 1, 7, 64};
    for (uint32_t i = 0; i < 4; i++) {
        kvs_session_options o;
        kvs_session_options_default(&o);
        o.policy = "attention_top:keep=0.8 +schedule=tokens:300";
        o.paper_compat = true;
        o.budget_tokens = 900;
        kvs_session *s = fx_session(model[2], &o);
        assert_non_null(s);
        run_rows(s, 0, N, slices[i], i == 0 ? expected : got);
        kvs_usage u;
        kvs_session_get_usage(s, &u);
        assert_true(u.n_evictions > 3);
        kvs_session_free(&s);
        if (i > 0) {
            const setting c = {.policy = o.policy, .position = "paper_compat"};
            check_same(&c, "slices of", slices[i], 0);
        }
    }
}

/* A policy that chooses for each layer keeps doing so after its first eviction. */
static void layer_scope_lasts_one_eviction(void **state)
{
    (void)state;
    const setting c = {.policy = "attention_top:acc=1,scope=1,keep=0.7", .budget = SMALL, .chunk = CHUNK};
    kvs_session *s = open_session(model[1], &c), *loaded = open_session(model[1], &c);
    kvs_error err = {.message = ""};
    run_rows(s, 0, FORK_AT, N, got);
    if (fx_copy_by_save(s, loaded, &err) != KVS_OK)
        fail_msg("%s", err.message);
    run_rows(loaded, FORK_AT, N, N, got);
    int32_t a[SMALL], b[SMALL];
    bool layers_differ = false;
    for (uint32_t layer = 0; layer < 2; layer++) {
        const uint32_t n = kvs_session_keep_set(loaded, layer, 0, a, NULL, SMALL);
        for (uint32_t h = 1; h < 3; h++) {
            assert_int_equal(kvs_session_keep_set(loaded, layer, h, b, NULL, SMALL), n);
            assert_memory_equal(a, b, n * sizeof *a);
        }
        kvs_session_keep_set(loaded, 1 - layer, 0, b, NULL, SMALL);
        layers_differ |= memcmp(a, b, n * sizeof *a) != 0;
    }
    assert_true(layers_differ);
    kvs_session_free(&s);
    kvs_session_free(&loaded);
}

/* ---- truncation ------------------------------------------------------------------------------------------------- */

static void truncated_tokens_leave_a_trace(void **state)
{
    (void)state;
    static const setting settings[] = {
        {.budget = BUDGET, .chunk = 64},
        {.policy = "attention_top:keep=0.8", .budget = BUDGET, .chunk = 64},
        {.policy = "streaming", .position = "rerotate", .budget = SMALL, .chunk = CHUNK},
        {.policy = "random:keep=0.6", .position = "rollback", .budget = SMALL, .chunk = CHUNK},
        {.policy = "streaming", .position = "keep", .budget = SMALL, .chunk = CHUNK, .arith = KVS_ARITH_F32},
    };
    for (uint32_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        const setting *c = &settings[i];
        kvs_error err = {.message = ""};
        kvs_session *plain = open_session(model[2], c);
        run_rows(plain, 0, N, N, expected);
        kvs_usage u_plain, u;
        kvs_session_get_usage(plain, &u_plain);
        kvs_session_free(&plain);

        kvs_session *s = open_session(model[2], c);
        run_rows(s, 0, FORK_AT, N, got);
        kvs_session_get_usage(s, &u);
        /* As much as fits without an eviction: one cannot be taken back. */
        const uint32_t more = kvs_min_u32(70, (uint32_t)u.budget_tokens - u.n_slots_max);
        assert_int_equal(kvs_session_extend(s, other, NULL, more, NULL, &err), KVS_OK);
        assert_int_equal(kvs_session_truncate(s, FORK_AT, &err), KVS_OK);
        assert_int_equal(kvs_session_n_tokens(s), FORK_AT);
        run_rows(s, FORK_AT, N, N, got);
        kvs_session_get_usage(s, &u);
        check_same(c, "truncated after", more, 0);
        assert_int_equal(u.live_bytes, u_plain.live_bytes);
        assert_true(fabs(u.footprint - u_plain.footprint) <= 1e-12);
        kvs_session_free(&s);
    }
}

static void truncation_goes_below_an_eviction(void **state)
{
    (void)state;
    const setting c = {.policy = "streaming", .budget = SMALL, .chunk = CHUNK};
    kvs_session *s = open_session(model[1], &c);
    run_rows(s, 0, N, N, got);
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_session_truncate(s, 100, &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "100"));
    assert_int_equal(kvs_session_n_tokens(s), N);
    assert_int_equal(kvs_session_truncate(s, N + 1, &err), KVS_EINVAL);
    kvs_session_free(&s);
}

/* ---- memory that cannot be had ---------------------------------------------------------------------------------- */

static bool starve;

static void *starved_alloc(void *ctx, size_t size_bytes)
{
    (void)ctx;
    const kvs_allocator *a = kvs_allocator_default();
    return starve ? NULL : a->alloc(a->ctx, size_bytes);
}

static void starved_free(void *ctx, void *ptr)
{
    (void)ctx;
    kvs_allocator_default()->free(kvs_allocator_default()->ctx, ptr);
}

/* Even the first step finds all its scratch: the model's, and the session's own. */
static void step_needs_memory(void **state)
{
    (void)state;
    const kvs_allocator a = {starved_alloc, starved_free, NULL};
    tiny_options t;
    fx_shape(&t, GGML_TYPE_Q4_1);
    char path[TINY_PATH_BYTES];
    assert_true(tiny_temp(&t, path));
    kvs_model_options mo;
    kvs_model_options_default(&mo);
    mo.allocator = &a;
    kvs_model *m;
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_model_open(path, &mo, &m, &err), KVS_OK);
    unlink(path);
    const setting c = {.budget = BUDGET, .chunk = 256};
    reference(&c);
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.budget_tokens = c.budget;
    kvs_session *s = fx_session(m, &o);
    assert_non_null(s);
    starve = true;
    run_rows(s, 0, N, N, got);
    starve = false;
    check_same(&c, "without memory", 0, 0);
    kvs_session_free(&s);
    kvs_model_close(&m);
}

/* ---- hostile saves ---------------------------------------------------------------------------------------------- */

static void damaged_save_is_loaded_or_harms(void **state)
{
    (void)state;
    const setting c = {.policy = "streaming", .budget = SMALL, .chunk = CHUNK};
    kvs_session *s = open_session(model[1], &c), *t = open_session(model[1], &c);
    run_rows(s, 0, 100, N, got);
    size_t n;
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_session_save(s, NULL, 0, &n, &err), KVS_OK);
    uint8_t *good = malloc(n), *bad = malloc(n);
    assert_int_equal(kvs_session_save(s, good, n - 1, &n, &err), KVS_EINVAL);
    assert_int_equal(kvs_session_save(s, good, n, &n, &err), KVS_OK);
    for (size_t cut = 0; cut < n; cut += 1 + cut / 3)
        assert_int_equal(kvs_session_load(t, good, cut, &err), KVS_EFORMAT);
    /* A token count and a cache size whose sum wraps around to the true length. */
    memcpy(bad, good, n);
    uint64_t n_tokens, cache_bytes;
    memcpy(&n_tokens, bad + 5 * 8, 8);
    memcpy(&cache_bytes, bad + 19 * 8, 8);
    const uint64_t more = 1u << 29, wrapped = cache_bytes - (more - n_tokens);
    memcpy(bad + 5 * 8, &more, 8);
    memcpy(bad + 19 * 8, &wrapped, 8);
    assert_int_equal(kvs_session_load(t, bad, n, &err), KVS_EFORMAT);
    assert_int_equal(kvs_session_n_tokens(t), 0);
    /* Bytes that hold slots: refused, or another conversation of sound shape, but never out of bounds. */
    kvs_rng rng = {8};
    uint32_t n_refused = 0;
    for (int i = 0; i < 300; i++) {
        memcpy(bad, good, n);
        for (int k = 0; k < 4; k++)
            bad[kvs_rng_below(&rng, (uint32_t)n)] ^= (uint8_t)(1u << kvs_rng_below(&rng, 8));
        if (kvs_session_load(t, bad, n, &err) == KVS_OK) {
            assert_int_equal(kvs_session_extend(t, other, NULL, 2, NULL, &err), KVS_OK);
        } else {
            assert_true(err.status == KVS_EFORMAT || err.status == KVS_EBUDGET);
            n_refused++;
        }
    }
    assert_true(n_refused > 0);
    assert_int_equal(kvs_session_load(t, good, n, &err), KVS_OK);
    run_rows(t, 100, N, N, got);
    reference(&c);
    check_same(&c, "loaded after damaged ones", 0, 100);
    free(good);
    free(bad);
    kvs_session_free(&s);
    kvs_session_free(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(result_depends_on_chunk_or_threads),
        cmocka_unit_test(masses_depend_on_chunk_or_threads),
        cmocka_unit_test(result_depends_on_neighbours),
        cmocka_unit_test(fork_or_save_changes_the_future),
        cmocka_unit_test(fork_or_save_of_an_empty_session_fails),
        cmocka_unit_test(policy_without_need_changes_results),
        cmocka_unit_test(result_depends_on_instruction_set),
        cmocka_unit_test(evictions_in_rollback_are_not_exact),
        cmocka_unit_test(evictions_in_keep_are_not_exact),
        cmocka_unit_test(evictions_in_rerotate_are_not_exact),
        cmocka_unit_test(evictions_in_gapcap_are_not_exact),
        cmocka_unit_test(evictions_in_recompute_are_not_exact),
        cmocka_unit_test(observations_are_not_exact),
        cmocka_unit_test(paper_compat_depends_on_slices),
        cmocka_unit_test(layer_scope_lasts_one_eviction),
        cmocka_unit_test(truncated_tokens_leave_a_trace),
        cmocka_unit_test(truncation_goes_below_an_eviction),
        cmocka_unit_test(step_needs_memory),
        cmocka_unit_test(damaged_save_is_loaded_or_harms),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

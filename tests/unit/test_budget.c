/* The budget holds: whatever policy, position mode, unit and step size, a session never holds more than it was given,
 * refuses cleanly what cannot fit, and its own account agrees with what the operating system sees. */
#include "base/base.h"
#include "policy/policy.h"
#include "unit/tiny_gguf.h"

#include <setjmp.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cmocka.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

static char model_path[TINY_PATH_BYTES];
static kvs_model *model;

static int setup(void **state)
{
    (void)state;
    tiny_options o;
    tiny_defaults(&o);
    o.n_layers = 2;
    o.n_heads = 2;
    o.n_ff = 32;
    kvs_model_options mo;
    kvs_model_options_default(&mo);
    mo.n_threads = 1;
    return !tiny_temp(&o, model_path) || kvs_model_open(model_path, &mo, &model, NULL) != KVS_OK;
}

static int teardown(void **state)
{
    (void)state;
    kvs_model_close(&model);
    unlink(model_path);
    return 0;
}

static kvs_session *create(const kvs_session_options *o)
{
    kvs_session *s;
    kvs_error err = {0};
    if (kvs_session_create(model, o, &s, &err) != KVS_OK)
        fail_msg("%s: %s", o->policy, err.message);
    return s;
}

static void check_usage(const kvs_session *s)
{
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    kvs_policy policy;
    assert_int_equal(kvs_policy_parse(kvs_session_policy(s), NULL, false, &policy, NULL), KVS_OK);
    /* Heads that share a budget out may hold more than its even share, not more bytes. */
    const bool too_many = !kvs_policy_is_ragged(&policy) && u.n_slots_max > u.budget_tokens;
    if (u.kv_bytes_peak > u.budget_bytes || u.kv_bytes > u.kv_bytes_peak || too_many)
        fail_msg("%s: %llu bytes, peak %llu, of %llu; %u slots of %llu", kvs_session_policy(s),
                 (unsigned long long)u.kv_bytes, (unsigned long long)u.kv_bytes_peak,
                 (unsigned long long)u.budget_bytes, u.n_slots_max, (unsigned long long)u.budget_tokens);
    assert_true(u.live_bytes <= u.reserved_bytes && u.kv_bytes == u.reserved_bytes + u.side_bytes);
    kvs_health h;
    kvs_session_get_health(s, &h);
    assert_false(h.alarms & (KVS_ALARM_BUDGET | KVS_ALARM_NAN));
}

static int32_t random_token(kvs_rng *rng)
{
    return TINY_FIRST_BYTE + (int32_t)kvs_rng_below(rng, 256);
}

/* A prompt with a few markers now and then, an answer now and then. */
static uint32_t random_turn(kvs_rng *rng, int32_t *tokens, uint8_t *flags)
{
    const uint32_t n = 1 + kvs_rng_below(rng, 200);
    const bool answer = kvs_rng_below(rng, 4) == 0;
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = random_token(rng);
        flags[i] = answer ? KVS_TOKEN_ASSISTANT : i < 3 ? KVS_TOKEN_TEMPLATE : KVS_TOKEN_USER;
    }
    return n;
}

/* ---- thirty budgets' worth of text ---- */

static void talk_past(const kvs_session_options *o, uint64_t n_tokens, kvs_rng *rng)
{
    kvs_session *s = create(o);
    int32_t tokens[200];
    uint8_t flags[200];
    while (kvs_session_n_tokens(s) < n_tokens) {
        const uint32_t n = random_turn(rng, tokens, flags);
        const uint64_t before = kvs_session_n_tokens(s);
        kvs_run run = {.session = s, .tokens = tokens, .flags = flags, .n_tokens = n};
        kvs_error err = {0};
        if (kvs_step(&run, 1, &err) != KVS_OK)
            fail_msg("%s: %s", kvs_session_policy(s), err.message);
        assert_int_equal(kvs_session_n_tokens(s), before + n);
        check_usage(s);
    }
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    assert_true(u.n_evictions > 0);
    kvs_session_free(&s);
}

static void no_policy_in_no_mode_passes_its_budget(void **state)
{
    (void)state;
    static const char *const modes[] = {"rollback", "keep", "rerotate", "gapcap:16", "recompute"};
    kvs_rng rng = {1};
    for (uint32_t k = 0; k < kvs_policy_count(); k++) {
        const kvs_policy_ops *ops = kvs_policy_at(k);
        kvs_policy policy;
        assert_int_equal(kvs_policy_parse(ops->name, NULL, false, &policy, NULL), KVS_OK);
        if (ops->never_evicts || (policy.budget != NULL && policy.budget->file != NULL))
            continue; /* those that need a file: test_shares.c */
        /* Two modes each, by turns: what a mode does to room does not depend on the preset. */
        for (uint32_t m = k % 5, i = 0; i < 2; m = (m + 1 + (k / 5) % 4) % 5, i++)
            for (int in_bytes = 0; in_bytes < 2; in_bytes++) {
                if (strcmp(modes[m], "recompute") == 0 && kvs_policy_scope_of(&policy) != KVS_SCOPE_SHARED)
                    continue; /* refused, test_policy.c */
                kvs_session_options o;
                kvs_session_options_default(&o);
                o.policy = ops->name;
                o.position = modes[m];
                const uint32_t times = policy.probe != NULL ? 8 : 1; /* a probe's rows count */
                o.budget_tokens = in_bytes ? 0 : 50 * times;
                o.budget_bytes = in_bytes ? 40000 * times : 0; /* 4 heads, pages of 4096 bytes, their side arrays */
                o.kv_type = in_bytes ? KVS_KV_F16 : KVS_KV_F32;
                talk_past(&o, (in_bytes ? 30u * 64 : 30u * 50) * (times > 1 ? 2 : 1), &rng);
            }
    }
}

/* Sets that differ between heads, other schedules, and protection that leaves little to choose from. */
static void ragged_sets_and_every_schedule_stay_inside_too(void **state)
{
    (void)state;
    static const char *const specs[] = {
        "attention_top:acc=1,scope=2",
        "attention_bottom:acc=2,scope=1,keep=0.5",
        "attention_top:acc=3,scope=2,norm=1",
        "streaming +schedule=step",
        "random:keep=0.3 +schedule=every:7",
        "evict_oldest +schedule=chunk",
        "sliding_window +schedule=tokens:40",
        "sliding_window:keep=1",
        "random:keep=60tok +schedule=once:at=33tok",
        "attention_top +schedule=after_prefill +protect=recent:30",
        "streaming +schedule=bytes:9000B +protect=none",
        "llama_context_shift:n_keep=1000000",
        "sliding_window_gist:gist=0,recent=0 +protect=none",
        "sliding_window_gist:gist=30,recent=30",
        "streaming +schedule=turn_end +protect=sinks:20,recent:20,template",
    };
    kvs_rng rng = {2};
    for (uint32_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        kvs_session_options o;
        kvs_session_options_default(&o);
        o.policy = specs[i];
        o.budget_tokens = 50;
        talk_past(&o, 1500, &rng);
    }
}

/* ---- refusals ---- */

static void a_budget_below_what_is_protected_names_both(void **state)
{
    (void)state;
    kvs_session_options o;
    kvs_session_options_default(&o);
    kvs_error err;
    kvs_session *s = (kvs_session *)&o;
    o.policy = "streaming +protect=sinks:40,recent:30";
    o.budget_tokens = 70;
    assert_int_equal(kvs_session_create(model, &o, &s, &err), KVS_EBUDGET);
    assert_null(s);
    assert_non_null(strstr(err.message, "70"));
    assert_non_null(strstr(err.message, "71tok"));
    o.budget_tokens = 71;
    assert_int_equal(kvs_session_create(model, &o, &s, &err), KVS_OK);
    int32_t tokens[300];
    kvs_rng rng = {3};
    for (int i = 0; i < 300; i++)
        tokens[i] = random_token(&rng);
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 300, NULL, &err), KVS_OK);
    check_usage(s);
    kvs_session_free(&s);
    o.budget_tokens = 0;
    o.budget_bytes = 1000;
    assert_int_equal(kvs_session_create(model, &o, &s, &err), KVS_EBUDGET);
    assert_non_null(strstr(err.message, "1000 bytes"));
    o.budget_bytes = 21000;
    assert_int_equal(kvs_session_create(model, &o, &s, &err), KVS_EBUDGET); /* 64 slots a head */
    assert_non_null(strstr(err.message, "71tok"));
}

/* A system prompt that fills the budget cannot be evicted: the refusal says how many tokens are protected. */
static void a_system_prompt_that_fills_the_budget_is_refused_where_it_fills_it(void **state)
{
    (void)state;
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "streaming";
    o.budget_tokens = 64;
    kvs_session *s = create(&o);
    int32_t tokens[100];
    uint8_t flags[100];
    kvs_rng rng = {4};
    for (int i = 0; i < 100; i++) {
        tokens[i] = random_token(&rng);
        flags[i] = KVS_TOKEN_SYSTEM;
    }
    kvs_error err = {0};
    assert_int_equal(kvs_session_extend(s, tokens, flags, 100, NULL, &err), KVS_EBUDGET);
    assert_non_null(strstr(err.message, "64 tokens are protected"));
    assert_int_equal(kvs_session_n_tokens(s), 64);
    check_usage(s);
    assert_int_equal(kvs_session_truncate(s, 40, &err), KVS_OK);
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 100, NULL, &err), KVS_OK);
    check_usage(s);
    kvs_session_free(&s);
}

/* What a fresh session says after the same tokens. */
static void fresh_logits(const int32_t *tokens, uint32_t n, float *logits)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    kvs_session *s = create(&o);
    assert_int_equal(kvs_session_extend(s, tokens, NULL, n, logits, NULL), KVS_OK);
    kvs_session_free(&s);
}

static void a_full_baseline_keeps_what_fitted_and_goes_on_after_truncate(void **state)
{
    (void)state;
    kvs_rng rng = {5};
    int32_t tokens[200];
    for (int i = 0; i < 200; i++)
        tokens[i] = random_token(&rng);
    for (int in_bytes = 0; in_bytes < 2; in_bytes++) {
        kvs_session_options o;
        kvs_session_options_default(&o);
        o.budget_tokens = in_bytes ? 0 : 100;
        o.budget_bytes = in_bytes ? 48000 : 0;
        kvs_session *s = create(&o);
        kvs_usage u;
        kvs_session_get_usage(s, &u);
        const uint32_t fits = (uint32_t)u.budget_tokens;
        assert_true(fits == (in_bytes ? 128 : 100));
        kvs_error err = {0};
        assert_int_equal(kvs_session_extend(s, tokens, NULL, 200, NULL, &err), KVS_EBUDGET);
        assert_non_null(strstr(err.message, "baseline"));
        assert_non_null(strstr(err.message, in_bytes ? "128" : "100"));
        assert_int_equal(kvs_session_n_tokens(s), fits);
        check_usage(s);
        assert_int_equal(kvs_session_extend(s, tokens, NULL, 1, NULL, &err), KVS_EBUDGET);
        assert_int_equal(kvs_session_n_tokens(s), fits);
        assert_int_equal(kvs_session_truncate(s, 60, &err), KVS_OK);
        float logits[TINY_VOCAB_MIN], want[TINY_VOCAB_MIN];
        assert_int_equal(kvs_session_extend(s, tokens + 60, NULL, 30, logits, &err), KVS_OK);
        fresh_logits(tokens, 90, want);
        assert_memory_equal(logits, want, sizeof want);
        check_usage(s);
        kvs_session_free(&s);
    }
}

static void a_whole_prefill_over_the_budget_is_refused_before_it_begins(void **state)
{
    (void)state;
    kvs_rng rng = {6};
    int32_t tokens[200];
    for (int i = 0; i < 200; i++)
        tokens[i] = random_token(&rng);
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "streaming";
    o.budget_tokens = 100;
    o.prefill_full = true;
    kvs_session *s = create(&o);
    kvs_error err = {0};
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 101, NULL, &err), KVS_EBUDGET);
    assert_non_null(strstr(err.message, "101"));
    assert_non_null(strstr(err.message, "100"));
    assert_int_equal(kvs_session_n_tokens(s), 0);
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 100, NULL, &err), KVS_OK);
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    assert_int_equal(u.n_evictions, 0);
    check_usage(s);
    const uint8_t answer = KVS_TOKEN_ASSISTANT; /* the answer may evict */
    assert_int_equal(kvs_session_extend(s, tokens, &answer, 1, NULL, &err), KVS_OK);
    check_usage(s);
    kvs_session_free(&s);
}

static void a_fork_onto_a_smaller_budget_evicts_and_the_parent_goes_on(void **state)
{
    (void)state;
    kvs_rng rng = {7};
    int32_t tokens[400];
    for (int i = 0; i < 400; i++)
        tokens[i] = random_token(&rng);
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "streaming";
    o.budget_tokens = 200;
    kvs_session *s = create(&o);
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 190, NULL, NULL), KVS_OK);
    kvs_session *forks[3];
    for (uint32_t i = 0; i < 3; i++) {
        o.budget_tokens = 60 + 50 * i;
        assert_int_equal(kvs_session_fork(s, &o, &forks[i], NULL), KVS_OK);
        check_usage(forks[i]);
    }
    /* All four turn over everything they hold; each has its own budget whatever the others still read. */
    for (int round = 0; round < 3; round++)
        for (uint32_t i = 0; i < 4; i++) {
            kvs_session *one = i == 3 ? s : forks[i];
            kvs_error err = {0};
            if (kvs_session_extend(one, tokens, NULL, 400, NULL, &err) != KVS_OK)
                fail_msg("%s", err.message);
            check_usage(one);
        }
    kvs_session_free(&s);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(kvs_session_extend(forks[i], tokens, NULL, 100, NULL, NULL), KVS_OK);
        check_usage(forks[i]);
        kvs_session_free(&forks[i]);
    }
}

/* A fork must not come out over its budget because a system prompt cannot be evicted down to it. */
static void a_fork_whose_budget_is_below_the_system_prompt_is_refused(void **state)
{
    (void)state;
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "streaming";
    o.budget_tokens = 300;
    kvs_session *s = create(&o), *fork = NULL;
    int32_t tokens[200];
    uint8_t flags[200];
    kvs_rng rng = {9};
    for (int i = 0; i < 200; i++) {
        tokens[i] = random_token(&rng);
        flags[i] = i < 120 ? KVS_TOKEN_SYSTEM : KVS_TOKEN_USER;
    }
    assert_int_equal(kvs_session_extend(s, tokens, flags, 200, NULL, NULL), KVS_OK);
    for (uint32_t budget = 20; budget < 200; budget++) {
        o.budget_tokens = budget;
        kvs_error err = {0};
        const kvs_status status = kvs_session_fork(s, &o, &fork, &err);
        assert_int_equal(status, budget < 120 ? KVS_EBUDGET : KVS_OK);
        assert_true(status != KVS_OK || fork != NULL);
        if (status == KVS_OK)
            check_usage(fork);
        kvs_session_free(&fork);
    }
    check_usage(s);
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 200, NULL, NULL), KVS_OK);
    kvs_session_free(&s);
}

/* ---- what the operating system sees ---- */

/* Pages of the process from /proc/self/statm: which 0 is its address space, 1 what is resident. */
static uint64_t statm_bytes(int which)
{
    unsigned long long pages[2] = {0, 0};
    FILE *f = fopen("/proc/self/statm", "r");
    if (f == NULL)
        return 0;
    if (fscanf(f, "%llu %llu", &pages[0], &pages[1]) != 2)
        pages[which] = 0;
    fclose(f);
    return pages[which] * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Few weights and a wide cache: 64 KiB a token, so that a thousand tokens are 64 MiB. */
static kvs_model *open_wide(char path[TINY_PATH_BYTES])
{
    tiny_options o;
    tiny_defaults(&o);
    o.n_layers = 8;
    o.n_heads = o.n_kv_heads = 4;
    o.head_dim = 256;
    o.n_embd = 32;
    o.n_ff = 32;
    o.window_tokens = 2048;
    kvs_model_options mo;
    kvs_model_options_default(&mo);
    mo.n_threads = 1;
    kvs_model *m;
    if (!tiny_temp(&o, path) || kvs_model_open(path, &mo, &m, NULL) != KVS_OK)
        return NULL;
    return m;
}

static kvs_status fill(kvs_model *m, uint64_t budget_bytes, const char *policy, uint32_t n_tokens, kvs_session **out)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = policy;
    o.kv_type = KVS_KV_F32;
    o.budget_bytes = budget_bytes;
    o.chunk_tokens = 64;
    KVS_TRY(kvs_session_create(m, &o, out, NULL));
    kvs_rng rng = {8};
    for (uint32_t i = 0; i < n_tokens; i++) {
        int32_t tokens[64];
        uint32_t n = 0;
        while (n < 64 && i + n < n_tokens)
            tokens[n++] = random_token(&rng);
        KVS_TRY(kvs_session_extend(*out, tokens, NULL, n, NULL, NULL));
        i += n - 1;
    }
    return KVS_OK;
}

enum { WIDE_BUDGET_BYTES = 72 << 20 };

static void resident_memory_grows_by_what_usage_says(void **state)
{
    (void)state;
    if (SANITIZED || statm_bytes(1) == 0) {
        print_message("skipped: a sanitizer's memory is not ours to count\n");
        skip();
    }
    char path[TINY_PATH_BYTES];
    kvs_model *m = open_wide(path);
    assert_non_null(m);
    kvs_session *warm, *s;
    assert_int_equal(fill(m, 9 << 20, "streaming", 80, &warm), KVS_OK); /* activations, stacks, code */
    kvs_usage u, w;
    kvs_session_get_usage(warm, &w);
    const uint64_t before = statm_bytes(1);
    assert_int_equal(fill(m, WIDE_BUDGET_BYTES, "baseline", 1088, &s), KVS_OK);
    const uint64_t grown = statm_bytes(1) - before;
    kvs_session_get_usage(s, &u);
    assert_true(u.kv_bytes > 64u << 20 && u.kv_bytes <= WIDE_BUDGET_BYTES);
    print_message("resident %+.2f MiB, usage %.2f MiB\n", (double)grown / 0x1p20, (double)u.kv_bytes / 0x1p20);
    assert_true((double)grown > 0.95 * (double)u.kv_bytes && (double)grown < 1.05 * (double)u.kv_bytes);
    kvs_session_free(&s);
    kvs_session_free(&warm);
    kvs_model_close(&m);
    unlink(path);
}

/* In a child process: 0 when the session runs under the limit, else what failed. */
static int run_limited(const char *path, uint64_t scratch_bytes, uint64_t slack_bytes)
{
    kvs_model_options mo;
    kvs_model_options_default(&mo);
    mo.n_threads = 1;
    kvs_model *m;
    if (kvs_model_open(path, &mo, &m, NULL) != KVS_OK)
        return 1;
    const uint64_t now = statm_bytes(0), limit = now + WIDE_BUDGET_BYTES + scratch_bytes + slack_bytes;
    const struct rlimit r = {limit, limit};
    if (now == 0 || setrlimit(RLIMIT_AS, &r) != 0)
        return 2;
    kvs_session *s;
    const kvs_status status = fill(m, WIDE_BUDGET_BYTES, "streaming", 1500, &s);
    return status == KVS_OK ? 0 : status == KVS_ENOMEM ? 4 : 3;
}

static int in_child(const char *path, uint64_t scratch_bytes, uint64_t slack_bytes)
{
    const pid_t pid = fork();
    if (pid == 0)
        _exit(run_limited(path, scratch_bytes, slack_bytes));
    int status = -1;
    assert_true(pid > 0 && waitpid(pid, &status, 0) == pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void budget_and_stated_scratch_are_all_a_session_needs(void **state)
{
    (void)state;
    if (SANITIZED || statm_bytes(0) == 0) {
        print_message("skipped: a sanitizer reserves address space of its own\n");
        skip();
    }
    char path[TINY_PATH_BYTES];
    kvs_model *m = open_wide(path);
    assert_non_null(m);
    kvs_session *s;
    assert_int_equal(fill(m, WIDE_BUDGET_BYTES, "streaming", 1500, &s), KVS_OK);
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    kvs_session_free(&s);
    kvs_model_close(&m);
    /* Slack: a header and half a page for each of some sixty blocks, and the heap grows by 132 KiB at a time. */
    const uint64_t slack = 1u << 20;
    assert_int_equal(in_child(path, u.scratch_bytes_peak, slack), 0);
    /* The test can fail: with half the budget missing the arena cannot be had, and that is ENOMEM. */
    assert_int_equal(in_child(path, 0, (uint64_t)0 - WIDE_BUDGET_BYTES / 2), 4);
    unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_policy_in_no_mode_passes_its_budget),
        cmocka_unit_test(ragged_sets_and_every_schedule_stay_inside_too),
        cmocka_unit_test(a_budget_below_what_is_protected_names_both),
        cmocka_unit_test(a_system_prompt_that_fills_the_budget_is_refused_where_it_fills_it),
        cmocka_unit_test(a_full_baseline_keeps_what_fitted_and_goes_on_after_truncate),
        cmocka_unit_test(a_whole_prefill_over_the_budget_is_refused_before_it_begins),
        cmocka_unit_test(a_fork_onto_a_smaller_budget_evicts_and_the_parent_goes_on),
        cmocka_unit_test(a_fork_whose_budget_is_below_the_system_prompt_is_refused),
        cmocka_unit_test(resident_memory_grows_by_what_usage_says),
        cmocka_unit_test(budget_and_stated_scratch_are_all_a_session_needs),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}

/* Suite methods: runs that keep different numbers of slots or evict at different tokens, a preset left out, and above all
 * a run that goes on from the shared full cache without what its policy remembers of earlier rows: its first eviction
 * would then choose by less than it would alone. */
#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
#include <cmocka.h>

#include "bench/play.h"
#include "unit/session_fixture.h"

enum { N_TOKENS = 300, KEEP = 100, GAP = 32, BLOCK = 32 };

static void grid_of(const kvs_bench_options *opt, kvs_bench_run_spec *runs, uint32_t *n)
{
    kvs_suite suite = *kvs_suite_find("methods");
    suite.token_bytes = 23040;
    suite.model = (kvs_profile_model){"ab", 1, 1};
    kvs_error err = {.message = ""};
    if (kvs_suite_registry_runs(&suite, opt, runs, n, &err) != KVS_OK)
        fail_msg("%s", err.message);
}

static char folder[sizeof "/tmp/kvs-test-profiles-XXXXXX"];

/* A file for every budget stage that reads one, and what must not be taken: a text, and a file of another model. */
static void write_profiles(void)
{
    strcpy(folder, "/tmp/kvs-test-profiles-XXXXXX");
    assert_non_null(mkdtemp(folder));
    for (uint32_t i = 0; kvs_budget_at(i) != NULL; i++) {
        const kvs_profile_want *want = kvs_budget_at(i)->file;
        for (uint32_t k = 0; want != NULL && want->kinds[k] != NULL; k++) {
            char path[128];
            snprintf(path, sizeof path, "%s/%s-%u.json", folder, want->kinds[k], i);
            FILE *f = fopen(path, "w");
            assert_non_null(f);
            fprintf(
                f, "{\"kind\":\"%s\",\"model_sha256\":\"ab\",\"n_layers\":1,\"n_kv_heads\":1,\"layers\":[1],\"heads\":",
                want->kinds[k]);
            for (uint32_t t = 0; t < want->n_tables; t++)
                fputs(t == 0 ? "[[[1]]" : ",[[1]]", f);
            fputs(want->n_tables > 1 ? "]}" : "[[1]]}", f);
            fclose(f);
            snprintf(path, sizeof path, "%s/another-%s-%u.json", folder, want->kinds[k], i);
            assert_non_null(f = fopen(path, "w"));
            fprintf(f, "{\"kind\":\"%s\",\"model_sha256\":\"cd\",\"n_layers\":1,\"n_kv_heads\":1,\"heads\":[[1]]}",
                    want->kinds[k]);
            fclose(f);
        }
    }
    char path[128];
    snprintf(path, sizeof path, "%s/a-text.json", folder);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fclose(f);
}

static void remove_profiles(void)
{
    struct dirent **names;
    const int n = scandir(folder, &names, NULL, NULL);
    for (int i = 0; i < n; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%.200s", folder, names[i]->d_name);
        if (names[i]->d_name[0] != '.')
            unlink(path);
        free(names[i]);
    }
    free(names);
    rmdir(folder);
}

static void check_file_of(const kvs_bench_run_spec *run, const kvs_policy *p)
{
    if (p->budget == NULL || p->budget->file == NULL)
        return;
    /* the preset's own kind, or the stage's where the preset has none, before any other of the stage's */
    const char *const name = p->ops->budget != NULL ? p->ops->name : p->budget->info.name;
    bool has_kind = false;
    for (uint32_t k = 0; p->budget->file->kinds[k] != NULL; k++)
        has_kind |= strcmp(p->budget->file->kinds[k], name) == 0;
    char want[128];
    snprintf(want, sizeof want, "%s/%s-", folder, has_kind ? name : "");
    want[strlen(want) - !has_kind] = '\0';
    if (strncmp(p->budget_file, want, strlen(want)) != 0 || strstr(p->budget_file, "/a") != NULL)
        fail_msg("%s takes %s", run->id, p->budget_file);
    assert_null(strstr(run->id, "file="));
    assert_int_equal(strlen(p->budget_hash), KVS_POLICY_HASH_BYTES - 1);
}

static void a_preset_without_its_file_is_left_out(void **state)
{
    (void)state;
    kvs_bench_run_spec *runs = calloc(KVS_BENCH_RUNS_MAX, sizeof *runs);
    uint32_t n;
    kvs_policy p;
    grid_of(&(kvs_bench_options){0}, runs, &n);
    for (uint32_t i = 0; i < n; i++)
        assert_true(kvs_policy_parse(runs[i].policy, runs[i].position, false, &p, NULL) == KVS_OK &&
                    (p.budget == NULL || p.budget->file == NULL));
    kvs_suite suite = *kvs_suite_find("methods");
    kvs_error err;
    suite.token_bytes = 23040;
    const char *const named[] = {"duo"};
    assert_true(n > 200);
    assert_int_equal(
        kvs_suite_registry_runs(&suite, &(kvs_bench_options){.policies = named, .n_policies = 1}, runs, &n, &err),
        KVS_EINVAL); /* a person who asks for it is told */
    assert_non_null(strstr(err.message, "duo needs a file"));
    assert_int_equal(kvs_suite_registry_runs(&suite, &(kvs_bench_options){.profiles_dir = "/tmp/a, b"}, runs, &n, &err),
                     KVS_EINVAL);
    assert_non_null(strstr(err.message, "--profiles: '/tmp/a, b'"));
    const kvs_bench_options no_folder = {.profiles_dir = "/tmp/kvs-test-no-such-folder"};
    assert_int_equal(kvs_suite_registry_runs(&suite, &no_folder, runs, &n, &err), KVS_EIO);
    assert_non_null(strstr(err.message, "/tmp/kvs-test-no-such-folder"));
    free(runs);
}

/* The file of the stage that reads it, not of the preset whose stage it replaces; specs in any shape; small budgets. */
static void a_file_stands_behind_another_choice(void **state)
{
    (void)state;
    static const char *const specs[] = {"duo +budget=baklava", "kvzip-head\t+budget=roles:share=0.4", "prulong",
                                        "snapkv:window=8 +budget=lukv +select=token"};
    static const char *const kinds[] = {"/baklava-", "/kvzip-head-", "/prulong-", "/lukv-"};
    static const char *const budgets[] = {"1tok", "5tok"};
    kvs_bench_run_spec *runs = calloc(KVS_BENCH_RUNS_MAX, sizeof *runs);
    uint32_t n;
    write_profiles();
    grid_of(
        &(kvs_bench_options){
            .profiles_dir = folder, .policies = specs, .n_policies = 4, .budgets = budgets, .n_budgets = 2},
        runs, &n);
    remove_profiles();
    assert_int_equal(n, 9);
    for (uint32_t i = 1; i < n; i++) {
        kvs_policy p;
        assert_int_equal(kvs_policy_parse(runs[i].policy, runs[i].position, false, &p, NULL), KVS_OK);
        if (strstr(p.budget_file, kinds[(i - 1) / 2]) == NULL)
            fail_msg("%s reads %s", runs[i].policy, p.budget_file);
    }
    free(runs);
}

static void every_preset_is_held_at_the_same_slots(void **state)
{
    (void)state;
    kvs_bench_run_spec *runs = calloc(KVS_BENCH_RUNS_MAX, sizeof *runs);
    uint32_t n;
    write_profiles();
    grid_of(&(kvs_bench_options){.profiles_dir = folder}, runs, &n);
    remove_profiles();
    assert_true(runs[0].is_reference);
    for (uint32_t i = 0; i < n; i++)
        assert_null(strchr(runs[i].id, 0x7b)); /* a placeholder that nobody filled in */
    for (uint32_t i = 1; i < n; i++) {
        kvs_policy p;
        kvs_error err = {.message = ""};
        if (kvs_policy_parse(runs[i].policy, runs[i].position, false, &p, &err) != KVS_OK)
            fail_msg("%s", err.message);
        check_file_of(&runs[i], &p);
        const uint32_t keep = 800 * (uint32_t)atoi(runs[i].share) / 100;
        assert_int_equal(p.keep_tokens, keep);
        assert_false(p.protect.system || p.protect.template_markers || p.protect.sinks);
        if (p.schedule == KVS_SCHEDULE_ONCE) {
            assert_non_null(strstr(runs[i].label, "(full first)"));
            assert_int_equal(p.schedule_value, 480);
        } else {
            assert_int_equal(p.schedule, KVS_SCHEDULE_BYTES);
            assert_int_equal(p.schedule_value, 23040 * (keep + 32));
            assert_true(runs[i].budget_tokens >= keep + 32 &&
                        runs[i].budget_tokens <=
                            keep + 32 + 64 +
                                (strstr(runs[i].label, "epicache") != NULL ? 192u : 64u) /* a page, a probe's rows */);
        }
        for (uint32_t k = 1; k < i; k++)
            assert_string_not_equal(runs[i].id, runs[k].id);
    }
    const kvs_policy_ops *ops;
    for (uint32_t i = 0; (ops = kvs_policy_at(i)) != NULL; i++) {
        kvs_policy p;
        uint32_t n_found = 0;
        for (uint32_t k = 1; k < n && !ops->never_evicts; k++)
            n_found += strncmp(runs[k].label, ops->name, strlen(ops->name)) == 0;
        if (!ops->never_evicts && kvs_policy_parse(ops->name, NULL, false, &p, NULL) == KVS_OK && n_found < 3)
            fail_msg("%s is in %u runs, not in 3", ops->name, n_found);
    }
    free(runs);
}

static void a_budget_that_is_never_reached_is_refused(void **state)
{
    (void)state;
    kvs_suite suite = *kvs_suite_find("methods");
    suite.token_bytes = 23040;
    const char *const policies[] = {"snapkv"}, *const budgets[] = {"460tok"};
    const kvs_bench_options opt = {.policies = policies, .n_policies = 1, .budgets = budgets, .n_budgets = 1};
    kvs_bench_run_spec *runs = calloc(KVS_BENCH_RUNS_MAX, sizeof *runs);
    uint32_t n;
    kvs_error err;
    assert_int_equal(kvs_suite_registry_runs(&suite, &opt, runs, &n, &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "1 to 448"));
    free(runs);
}

static void a_cut_script_ends_where_it_is_cut(void **state)
{
    (void)state;
    kvs_script_turn turns[] = {{0, 4, 10, 2}, {10, 14, 20, 4}, {20, 24, 30, 6}};
    kvs_script s = {.n_tokens = 30, .turns = turns, .n_turns = 3};
    kvs_script_cut(&s, 12);
    assert_int_equal(s.n_tokens, 12);
    assert_int_equal(s.n_turns, 2);
    assert_int_equal(s.turns[1].end, 12);
    assert_int_equal(s.turns[1].answer, 12);
    kvs_script_cut(&s, 40);
    assert_int_equal(s.n_tokens, 12);
}

/* ---- sharing ---- */

typedef struct world {
    kvs_model *m;
    int32_t tokens[N_TOKENS];
    uint8_t flags[N_TOKENS];
} world;

static kvs_session *open_session(world *w, const char *spec, uint32_t budget_tokens)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = spec;
    o.position = "keep";
    o.budget_tokens = budget_tokens;
    o.arith = KVS_ARITH_F32;
    kvs_session *s = fx_session(w->m, &o);
    assert_non_null(s);
    return s;
}

static void feed(world *w, kvs_session *s, uint32_t begin, uint32_t end)
{
    kvs_error err = {.message = ""};
    for (uint32_t at = begin; at < end; at += BLOCK) {
        const uint32_t n = kvs_min_u32(BLOCK, end - at);
        if (kvs_session_extend(s, w->tokens + at, w->flags + at, n, NULL, &err) != KVS_OK)
            fail_msg("%s", err.message);
    }
}

static void compare(const char *spec, const kvs_session *a, const kvs_session *b)
{
    int32_t one[N_TOKENS], other[N_TOKENS];
    for (uint32_t layer = 0; layer < 2; layer++)
        for (uint32_t head = 0; head < 3; head++) {
            const uint32_t n = kvs_session_keep_set(a, layer, head, one, NULL, N_TOKENS);
            if (n != kvs_session_keep_set(b, layer, head, other, NULL, N_TOKENS) ||
                memcmp(one, other, n * sizeof *one) != 0)
                fail_msg("%s, layer %u, head %u: other slots after a fork than alone", spec, layer, head);
        }
}

/* Forked where the benchmark would fork; a run that may never be forked is not compared. */
static bool check_one(world *w, const char *name)
{
    kvs_bench_run_spec run = {.first_tokens = KEEP + GAP};
    const uint64_t token_bytes = 2 * 3 * 2 * 32 * 2;
    snprintf(run.policy, sizeof run.policy, "%s +protect=none +keep=%dtok +schedule=bytes:%lluB", name, KEEP,
             (unsigned long long)(token_bytes * (KEEP + GAP)));
    kvs_policy p;
    kvs_error err = {.message = ""};
    if (kvs_policy_parse(run.policy, "keep", false, &p, &err) != KVS_OK)
        fail_msg("%s", err.message);
    uint32_t at = 0;
    while (kvs_play_shares(&run, &p, at + BLOCK))
        at += BLOCK;
    if (at == 0)
        return false;
    const uint32_t room = p.probe != NULL && p.probe->kind == KVS_PROBE_EXTRACT ? 384 : 128; /* above the trigger */
    const bool taps = (kvs_policy_needs(&p) & KVS_POLICY_NEEDS_MASS) != 0;
    kvs_session *trunk = open_session(w, taps ? "attention_top +protect=none" : "baseline", 2 * N_TOKENS);
    feed(w, trunk, 0, at);
    kvs_session *alone = open_session(w, run.policy, KEEP + GAP + room), *forked;
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = run.policy;
    o.position = "keep";
    o.budget_tokens = KEEP + GAP + room;
    o.arith = KVS_ARITH_F32;
    if (kvs_session_fork(trunk, &o, &forked, &err) != KVS_OK)
        fail_msg("%s", err.message);
    feed(w, alone, 0, N_TOKENS);
    feed(w, forked, at, N_TOKENS);
    compare(name, alone, forked);
    kvs_usage u;
    kvs_session_get_usage(forked, &u);
    if (u.n_evictions == 0 || u.own_bytes == 0)
        fail_msg("%s: %llu evictions, %llu bytes of its own", name, (unsigned long long)u.n_evictions,
                 (unsigned long long)u.own_bytes);
    kvs_session_free(&alone);
    kvs_session_free(&forked);
    kvs_session_free(&trunk);
    return true;
}

static void a_shared_beginning_changes_no_keep_set(void **state)
{
    (void)state;
    tiny_options to;
    fx_shape(&to, GGML_TYPE_F32);
    world w = {.m = fx_open(&to, 2, 0)};
    assert_non_null(w.m);
    fx_tokens(3, w.tokens, N_TOKENS);
    fx_flags(3, w.flags, N_TOKENS);
    char spec[128];
    uint32_t n = 0, n_shared = 0;
    const kvs_policy_ops *ops;
    kvs_policy p;
    for (uint32_t i = 0; (ops = kvs_policy_at(i)) != NULL; i++)
        if (!ops->never_evicts && kvs_policy_parse(ops->name, "keep", false, &p, NULL) == KVS_OK && ++n > 0)
            n_shared += check_one(&w, ops->name);
    for (uint32_t i = 0; kvs_budget_at(i) != NULL; i++) {
        snprintf(spec, sizeof spec, "snapkv +budget=%s", kvs_budget_at(i)->info.name);
        if (kvs_policy_parse(spec, "keep", false, &p, NULL) == KVS_OK && ++n > 0)
            n_shared += check_one(&w, spec);
    }
    for (uint32_t i = 0; kvs_select_at(i) != NULL; i++) {
        snprintf(spec, sizeof spec, "snapkv +select=%s", kvs_select_at(i)->info.name);
        if (kvs_policy_parse(spec, "keep", false, &p, NULL) == KVS_OK && ++n > 0)
            n_shared += check_one(&w, spec);
    }
    n_shared += check_one(&w, "snapkv +probe=prompt");
    assert_true(n_shared > n / 2 && n_shared < n); /* some share, some sum over all rows */
    assert_false(check_one(&w, "h2o"));
    assert_false(check_one(&w, "expected_attention"));
    kvs_model_close(&w.m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_preset_without_its_file_is_left_out),
        cmocka_unit_test(a_file_stands_behind_another_choice),
        cmocka_unit_test(every_preset_is_held_at_the_same_slots),
        cmocka_unit_test(a_budget_that_is_never_reached_is_refused),
        cmocka_unit_test(a_cut_script_ends_where_it_is_cut),
        cmocka_unit_test(a_shared_beginning_changes_no_keep_set),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Plug-ins: a shared object that is wrong in any one way is refused with the words that say which, and adds nothing; one
 * that misbehaves during an eviction is refused by preset, layer and head, the session keeps every bit and goes on. */
#include "policy/policy.h"
#include "unit/plugin/fickle.h"
#include "unit/session_fixture.h"

#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { BUDGET = 64, N_MORE = 24, N = BUDGET + N_MORE };

static kvs_model *model;
static int *fickle_how;

static const char *path_of(const char *name)
{
    static char path[1024];
    snprintf(path, sizeof path, "%s/%s.so", KVS_PLUGIN_DIR, name);
    return path;
}

static void assert_says(const char *message, const char *words)
{
    if (strstr(message, words) == NULL)
        fail_msg("'%s' does not say '%s'", message, words);
    if (strchr(message, '\n') != NULL)
        fail_msg("'%s' is more than one line", message);
}

/* ---- loading ---- */

static void every_wrong_table_is_refused_and_adds_nothing(void **state)
{
    (void)state;
    char abi[64], needs[64];
    snprintf(needs, sizeof needs, "needs 0x%x holds a bit that is none", (unsigned)KVS_POLICY_NEEDS_END);
    snprintf(abi, sizeof abi, "policy ABI %d, this build has %d", KVS_POLICY_ABI + 1, KVS_POLICY_ABI);
    const struct {
        const char *way, *words;
        kvs_status status;
    } all[] = {
        {"ABI", abi, KVS_EUNSUPPORTED},
        {"NO_ENTRY", "exports no kvs_policy_plugin", KVS_EFORMAT},
        {"EMPTY", "holds no preset", KVS_EFORMAT},
        {"SAME_TWICE", "preset 1: the name broken_table is that of preset 0 too", KVS_EFORMAT},
        {"ENDLESS", "one more than the 64", KVS_EFORMAT},
        {"NAME", "needs a .name", KVS_EFORMAT},
        {"NO_NAME", "needs a .name", KVS_EFORMAT},
        {"TAKEN", "the name streaming is taken", KVS_EFORMAT},
        {"NO_DOC", "broken_table: .doc is NULL", KVS_EFORMAT},
        {"SCHEDULE", "unknown schedule 'ful': did you mean 'full'", KVS_EFORMAT},
        {"SCOPE", "scope 3 is none", KVS_EFORMAT},
        {"NEEDS", needs, KVS_EFORMAT},
        {"WINDOW", "window_of must say", KVS_EFORMAT},
        {"NO_SCORE", "broken_table: .score is NULL", KVS_EFORMAT},
        {"NO_PARAMS", ".n_params is 1 and .params is NULL", KVS_EFORMAT},
        {"PARAM_COUNT", ".n_params is 16, at most 15", KVS_EFORMAT},
        {"PARAM_NAME", "parameter 0 needs a name", KVS_EFORMAT},
        {"PARAM_KEEP", "parameter 0 is named keep", KVS_EFORMAT},
        {"PARAM_TWICE", "parameters 0 and 1 are both named a", KVS_EFORMAT},
        {"RANGE", "parameter a has the range 2 to 0", KVS_EFORMAT},
        {"DEFAULT", "parameter a has the default 7 outside its range 0 to 2", KVS_EFORMAT},
        {"DEFAULT_NAN", "parameter a has the default nan outside its range 0 to 2", KVS_EFORMAT},
        {"LONG_SPEC", "shorter parameter names help", KVS_EFORMAT},
    };
    const uint32_t n = kvs_policy_count();
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        kvs_error err = {.message = ""};
        const kvs_status status = kvs_policy_load_plugin(path_of(all[i].way), &err);
        if (status != all[i].status || err.status != status)
            fail_msg("%s gives status %d, not %d: %s", all[i].way, status, all[i].status, err.message);
        assert_says(err.message, all[i].words);
        assert_says(err.message, all[i].way); /* the file */
        assert_int_equal(kvs_policy_count(), n);
        assert_null(kvs_policy_find("broken_table"));
        assert_int_equal(kvs_policy_load_plugin(path_of(all[i].way), NULL), status); /* nothing of it is left */
    }
}

static void files_that_are_no_plugin_are_refused(void **state)
{
    (void)state;
    kvs_error err;
    assert_int_equal(kvs_policy_load_plugin(NULL, &err), KVS_EINVAL);
    assert_int_equal(kvs_policy_load_plugin("", &err), KVS_EINVAL);
    assert_says(err.message, "needs the path");
    assert_int_equal(kvs_policy_load_plugin(path_of("no_such_file"), &err), KVS_EIO);
    assert_says(err.message, "no_such_file");
    assert_int_equal(kvs_policy_load_plugin(KVS_SOURCE_DIR "/README.md", &err), KVS_EIO);
    assert_says(err.message, "README.md");
    /* A bare name is a file of the current folder; the loader would find this one elsewhere. */
    assert_int_equal(kvs_policy_load_plugin("libm.so.6", &err), KVS_EIO);
    assert_says(err.message, "./libm.so.6");
    char *const path = malloc(9001);
    assert_non_null(path);
    memset(path, 'a', 9000);
    path[9000] = '\0';
    assert_int_equal(kvs_policy_load_plugin(path, &err), KVS_EINVAL);
    assert_says(err.message, "at most 4096");
    free(path);
}

static void copy_file(const char *from, const char *to)
{
    FILE *const in = fopen(from, "rb"), *const out = fopen(to, "wb");
    assert_true(in != NULL && out != NULL);
    char buf[4096];
    for (size_t n; (n = fread(buf, 1, sizeof buf, in)) > 0;)
        assert_int_equal(fwrite(buf, 1, n, out), n);
    fclose(in);
    assert_int_equal(fclose(out), 0);
}

static void the_example_becomes_a_preset_like_any_other(void **state)
{
    (void)state;
    kvs_error err = {.message = ""};
    const uint32_t n = kvs_policy_count();
    assert_int_equal(kvs_policy_check("my_policy", &err), KVS_EINVAL);
    if (kvs_policy_load_plugin(path_of("my_policy"), &err) != KVS_OK)
        fail_msg("%s", err.message);
    assert_int_equal(kvs_policy_count(), n + 1);
    kvs_policy_info info;
    assert_true(kvs_policy_get_info(n, &info));
    assert_string_equal(info.name, "my_policy");
    assert_string_equal(info.needs, "attention mass, sum");
    assert_int_equal(info.n_params, 1);
    assert_int_equal(kvs_policy_check("my_policy:half=20,keep=0.5 +budget=ada +position=keep", &err), KVS_OK);
    assert_int_equal(kvs_policy_check("my_policy:half=0", &err), KVS_EINVAL);
    assert_says(err.message, "half '0' must be a number from 1 to 1e+09");
    assert_int_equal(kvs_policy_check("my_polcy", &err), KVS_EINVAL);
    assert_says(err.message, "did you mean 'my_policy'");

    /* The same file again is no error and no second preset; a copy of it is another file with a taken name. */
    assert_int_equal(kvs_policy_load_plugin(path_of("my_policy"), &err), KVS_OK);
    assert_int_equal(kvs_policy_count(), n + 1);
    char copy[1100];
    snprintf(copy, sizeof copy, "%s/copy_%d.so", KVS_PLUGIN_DIR, (int)getpid());
    copy_file(path_of("my_policy"), copy);
    const kvs_status status = kvs_policy_load_plugin(copy, &err);
    unlink(copy);
    assert_int_equal(status, KVS_EFORMAT);
    assert_says(err.message, "the name my_policy is taken");

    /* Attention counts half at age `half`. */
    enum { SLOTS = 50, HALF = 8 };
    int32_t pos[SLOTS];
    float mass[SLOTS], scores[SLOTS];
    for (int32_t i = 0; i < SLOTS; i++) {
        pos[i] = 2 * i;
        mass[i] = 3;
    }
    const kvs_policy_view view = {.n_slots = SLOTS, .n_tokens = 2 * SLOTS - 1, .pos = pos, .mass_sum = mass};
    const double params[] = {HALF, 0};
    kvs_policy_find("my_policy")->score(params, &view, scores);
    assert_true(scores[SLOTS - 1] == 3.0f && scores[SLOTS - 1 - HALF / 2] == 1.5f);
    for (uint32_t i = 1; i < SLOTS; i++)
        assert_true(scores[i] > scores[i - 1]);
}

static void *load_and_look(void *arg)
{
    (void)arg;
    if (kvs_policy_load_plugin(KVS_PLUGIN_DIR "/my_policy.so", NULL) != KVS_OK)
        return (void *)"not loaded";
    for (int i = 0; i < 50; i++) {
        const kvs_policy_ops *ops;
        for (uint32_t k = 0; (ops = kvs_policy_at(k)) != NULL; k++)
            if (kvs_policy_find(ops->name) != ops)
                return (void *)"a preset is not what its name finds";
        if (i == 25 && kvs_policy_load_plugin(KVS_PLUGIN_DIR "/fickle.so", NULL) != KVS_OK)
            return (void *)"fickle is not loaded";
    }
    return kvs_policy_find("fickle_choose") == NULL ? (void *)"fickle is not there" : NULL;
}

static void threads_may_load_and_look_at_once(void **state)
{
    (void)state;
    const uint32_t n = kvs_policy_count();
    assert_null(kvs_policy_find("fickle_choose"));
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, load_and_look, NULL), 0);
    for (int i = 0; i < 4; i++) {
        void *why;
        assert_int_equal(pthread_join(threads[i], &why), 0);
        if (why != NULL)
            fail_msg("%s", (const char *)why);
    }
    assert_int_equal(kvs_policy_count(), n + 4);
    void *const handle = dlopen(path_of("fickle"), RTLD_NOW | RTLD_NOLOAD);
    assert_non_null(handle);
    fickle_how = dlsym(handle, "fickle_how");
    assert_non_null(fickle_how);
}

/* ---- at work ---- */

static kvs_session *session_of(const char *spec)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = spec;
    o.budget_tokens = BUDGET;
    o.kv_type = KVS_KV_F32;
    kvs_session *const s = fx_session(model, &o);
    assert_non_null(s);
    return s;
}

static void extend(kvs_session *s, const int32_t *tokens, uint32_t n, float *out)
{
    kvs_error err = {.message = ""};
    if (fx_run(s, tokens, NULL, n, n, out, TINY_VOCAB_MIN, &err) != KVS_OK)
        fail_msg("%s: %s", kvs_session_policy(s), err.message);
}

static uint8_t *saved(const kvs_session *s, size_t *n_bytes)
{
    assert_int_equal(kvs_session_save(s, NULL, 0, n_bytes, NULL), KVS_OK);
    uint8_t *const buf = malloc(*n_bytes);
    assert_non_null(buf);
    assert_int_equal(kvs_session_save(s, buf, *n_bytes, n_bytes, NULL), KVS_OK);
    return buf;
}

/* A full session whose policy misbehaves at its next eviction: refused in these words, not a byte changed; once the
 * policy behaves, the session goes on as one that never met the fault. */
static void refused_when_full(const char *spec, uint32_t n_full, int how, const char *words)
{
    static float want[N_MORE * TINY_VOCAB_MIN], got[N_MORE * TINY_VOCAB_MIN], ignored[BUDGET * TINY_VOCAB_MIN];
    int32_t tokens[N];
    fx_tokens(3, tokens, N);
    *fickle_how = FICKLE_RIGHT;
    kvs_session *const sound = session_of(spec), *const s = session_of(spec);
    extend(sound, tokens, n_full, ignored);
    extend(sound, tokens + n_full, N_MORE, want);

    extend(s, tokens, n_full, ignored);
    size_t n_before, n_after;
    uint8_t *const before = saved(s, &n_before);
    *fickle_how = how;
    for (int again = 0; again < 2; again++) {
        kvs_error err = {.message = ""};
        const kvs_status status =
            again ? kvs_session_evict(s, 0, &err) : kvs_session_extend(s, tokens + n_full, NULL, N_MORE, got, &err);
        if (status != KVS_EPOLICY || err.status != KVS_EPOLICY)
            fail_msg("%s, %d: status %d: %s", spec, how, status, err.message);
        assert_says(err.message, words);
        char place[96];
        snprintf(place, sizeof place, "%.*s, layer %d, KV head %d: ", (int)strcspn(spec, ": "), spec, FICKLE_LAYER,
                 FICKLE_HEAD);
        assert_says(err.message, place);
        uint8_t *const after = saved(s, &n_after);
        assert_int_equal(n_before, n_after);
        if (n_full == BUDGET) /* else rows of a probe ran meanwhile, and peaks and footprint count them */
            assert_memory_equal(before, after, n_before);
        int32_t pos[N], rope_pos[N];
        assert_int_equal(kvs_session_keep_set(s, FICKLE_LAYER, FICKLE_HEAD, pos, rope_pos, N), n_full);
        for (int32_t i = 0; i < (int32_t)n_full; i++)
            assert_true(pos[i] == i && rope_pos[i] == i);
        free(after);
        kvs_usage u;
        kvs_session_get_usage(s, &u);
        assert_int_equal(u.n_evictions, 0);
    }
    free(before);

    /* A fork under another policy is a way out while it misbehaves. */
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "streaming";
    o.budget_tokens = BUDGET;
    o.kv_type = KVS_KV_F32;
    kvs_session *fork;
    assert_int_equal(kvs_session_fork(s, &o, &fork, NULL), KVS_OK);
    extend(fork, tokens + n_full, N_MORE, got);
    kvs_session_free(&fork);

    *fickle_how = FICKLE_RIGHT;
    extend(s, tokens + n_full, N_MORE, got);
    assert_int_equal(fx_differs(got, want, N_MORE, TINY_VOCAB_MIN), N_MORE);
    assert_int_equal(kvs_session_n_tokens(s), n_full + N_MORE);
    kvs_session *all[] = {sound, s};
    for (int i = 0; i < 2; i++)
        kvs_session_free(&all[i]);
}

static void refused_then_usable(const char *spec, int how, const char *words)
{
    refused_when_full(spec, BUDGET, how, words);
}

static void a_list_that_is_wrong_is_refused_and_the_session_goes_on(void **state)
{
    (void)state;
    /* 64 slots, 48 of them to keep: sinks 0 to 3, then from 20 on. */
    refused_then_usable("fickle_choose", FICKLE_UNSORTED, "choose gives slot 21 at index 5, which is not in ascending");
    refused_then_usable("fickle_choose", FICKLE_TWICE, "choose gives slot 20 at index 5, which comes twice");
    refused_then_usable("fickle_choose", FICKLE_OUT_OF_RANGE,
                        "choose gives slot 64 at index 47, which is out of range; slots are 0 to 63");
    refused_then_usable("fickle_choose", FICKLE_TOO_MANY, "choose keeps 49 of 64 slots, must keep 1 to 48");
    refused_then_usable("fickle_choose", FICKLE_HUGE_COUNT, "choose keeps 4294967295 of 64 slots");
    refused_then_usable("fickle_choose", FICKLE_NONE, "choose keeps 0 of 64 slots");
    refused_then_usable("fickle_choose", FICKLE_UNPROTECTED, "choose drops slot 0 (pos 0), which is protected");
    refused_then_usable("fickle_choose", FICKLE_CHOOSE_OVERRUN, "choose wrote past the end of its 64 slots");
    /* Rows that a probe ran on top of the cache are gone again. */
    refused_when_full("fickle_probe", BUDGET - 16, FICKLE_TWICE, "which comes twice");
}

static void a_score_past_the_end_and_a_target_above_what_is_there_are_too(void **state)
{
    (void)state;
    refused_then_usable("fickle_score", FICKLE_SCORE_OVERRUN, "a score was written past the end of the head's 64");
    refused_then_usable("fickle_score +rescore=caote", FICKLE_SCORE_OVERRUN, "a score was written past the end");
    refused_then_usable("fickle_target", FICKLE_TARGET_TOO_MANY, "target keeps 65 slots where 64 are held");
}

/* One session of a batch that is refused does not take the others with it. */
static void the_other_sessions_of_a_step_go_on(void **state)
{
    (void)state;
    static float want[N_MORE * TINY_VOCAB_MIN], got[N_MORE * TINY_VOCAB_MIN], ignored[BUDGET * TINY_VOCAB_MIN];
    int32_t tokens[N];
    fx_tokens(4, tokens, N);
    *fickle_how = FICKLE_RIGHT;
    kvs_session *alone = session_of("streaming"), *beside = session_of("streaming"),
                *broken = session_of("fickle_choose");
    extend(alone, tokens, BUDGET, ignored);
    extend(alone, tokens + BUDGET, N_MORE, want);
    extend(beside, tokens, BUDGET, ignored);
    extend(broken, tokens, BUDGET, ignored);
    *fickle_how = FICKLE_TWICE;
    uint8_t all[N_MORE];
    memset(all, 1, sizeof all);
    fx_rows rows = {.out = got, .vocab = TINY_VOCAB_MIN};
    kvs_run runs[] = {
        {.session = broken, .tokens = tokens + BUDGET, .n_tokens = N_MORE},
        {.session = beside,
         .tokens = tokens + BUDGET,
         .n_tokens = N_MORE,
         .on_logits = fx_keep_row,
         .want = all,
         .ctx = &rows},
    };
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_step(runs, 2, &err), KVS_EPOLICY);
    assert_int_equal(runs[0].status, KVS_EPOLICY);
    assert_int_equal(runs[1].status, KVS_OK);
    assert_int_equal(rows.n, N_MORE);
    assert_int_equal(fx_differs(got, want, N_MORE, TINY_VOCAB_MIN), N_MORE);
    *fickle_how = FICKLE_RIGHT;
    kvs_session_free(&alone);
    kvs_session_free(&beside);
    kvs_session_free(&broken);
}

/* The logits of a whole run. */
static void run_of(const char *spec, float *out)
{
    int32_t tokens[N];
    fx_tokens(5, tokens, N);
    kvs_session *s = session_of(spec);
    extend(s, tokens, N, out);
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    assert_true(u.n_evictions > 0 && u.kv_bytes_peak <= u.budget_bytes && u.n_slots_max <= BUDGET);
    kvs_session_free(&s);
}

static void what_is_allowed_works(void **state)
{
    (void)state;
    static float newest[N * TINY_VOCAB_MIN], other[N * TINY_VOCAB_MIN];
    *fickle_how = FICKLE_RIGHT;
    run_of("fickle_score", newest);
    run_of("fickle_choose", other); /* a list of the newest is what selecting the newest gives */
    assert_int_equal(fx_differs(newest, other, N, TINY_VOCAB_MIN), N);
    run_of("fickle_choose +budget=pyramid +position=rerotate", other);
    run_of("my_policy:half=10", other);
    *fickle_how = FICKLE_ALL_NAN; /* nothing to tell slots apart: the newest */
    run_of("fickle_score", other);
    assert_int_equal(fx_differs(newest, other, N, TINY_VOCAB_MIN), N);
    /* A preset that would drop nothing is overruled by a full budget: as if its target were what `keep` says. */
    *fickle_how = FICKLE_RIGHT;
    run_of("fickle_target", newest);
    *fickle_how = FICKLE_TARGET_ALL;
    run_of("fickle_target", other);
    assert_int_equal(fx_differs(newest, other, N, TINY_VOCAB_MIN), N);
    *fickle_how = FICKLE_RIGHT;
}

static void stages_and_sizes_that_cannot_be_are_refused_at_create(void **state)
{
    (void)state;
    kvs_error err;
    assert_int_equal(kvs_policy_check("fickle_choose +select=chunk", &err), KVS_EINVAL);
    assert_says(err.message, "fickle_choose chooses its slots itself");
    assert_int_equal(kvs_policy_check("fickle_target +budget=ada", &err), KVS_EINVAL);
    *fickle_how = FICKLE_WORK;
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "fickle_score";
    kvs_session *s;
    assert_int_equal(kvs_session_create(model, &o, &s, &err), KVS_EINVAL);
    assert_says(err.message, "fickle_score: work_of asks for");
    *fickle_how = FICKLE_RIGHT;
}

int main(void)
{
    tiny_options t;
    fx_shape(&t, GGML_TYPE_F32);
    model = fx_open(&t, 2, 0);
    if (model == NULL)
        return 1;
    const struct CMUnitTest tests[] = {
        /* In this order: each leaves its presets behind. */
        cmocka_unit_test(every_wrong_table_is_refused_and_adds_nothing),
        cmocka_unit_test(files_that_are_no_plugin_are_refused),
        cmocka_unit_test(the_example_becomes_a_preset_like_any_other),
        cmocka_unit_test(threads_may_load_and_look_at_once),
        cmocka_unit_test(a_list_that_is_wrong_is_refused_and_the_session_goes_on),
        cmocka_unit_test(a_score_past_the_end_and_a_target_above_what_is_there_are_too),
        cmocka_unit_test(the_other_sessions_of_a_step_go_on),
        cmocka_unit_test(what_is_allowed_works),
        cmocka_unit_test(stages_and_sizes_that_cannot_be_are_refused_at_create),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    kvs_model_close(&model);
    return failed;
}

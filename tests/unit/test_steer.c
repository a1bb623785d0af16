/* Steering: what it moves and what not, its count of thoughts however the tokens come, and files of another model. */
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

enum { N_MAX = 600, LAYER = 1 };

static kvs_model *model;
static char file[TINY_PATH_BYTES];
static int32_t tokens[N_MAX];
static uint8_t flags[N_MAX];
static uint32_t n_said;
static float *expected, *got;

/* A control vector of layer LAYER; empty path: none could be written. */
static void write_direction(const char *arch, const char *hint, uint32_t n, enum ggml_type type, float first,
                            char *path)
{
    snprintf(path, TINY_PATH_BYTES, "/tmp/kvs_direction_XXXXXX");
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    struct gguf_context *const g = gguf_init_empty();
    struct ggml_context *const c = ggml_init((struct ggml_init_params){.mem_size = 1 << 20});
    gguf_set_val_str(g, "general.architecture", arch);
    if (hint != NULL)
        gguf_set_val_str(g, "controlvector.model_hint", hint);
    struct ggml_tensor *const t = ggml_new_tensor_1d(c, type, n);
    ggml_set_name(t, "direction.1");
    memset(t->data, 0, ggml_nbytes(t));
    kvs_rng rng = {5};
    for (uint32_t i = 0; type == GGML_TYPE_F32 && i < n; i++)
        ((float *)t->data)[i] = i == 0 ? first : (float)(kvs_rng_double(&rng) - 0.5);
    gguf_add_tensor(g, t);
    assert_true(gguf_write_to_file(g, path, false));
    gguf_free(g);
    ggml_free(c);
}

/* A question, an answer that hesitates twice, another question and answer. */
static void write_text(void)
{
    static const struct {
        const char *text;
        uint8_t flags;
    } parts[] = {
        {"how much is it? wait. ", KVS_TOKEN_USER},
        {" the sum is seven. Wait, that is not right. so it is eight. ", KVS_TOKEN_ASSISTANT},
        {"Alternatively, take nine. let me check it again. done then. ", KVS_TOKEN_ASSISTANT},
        {"and now the other one?", KVS_TOKEN_USER},
        {" it is ten. Wait for it, it is hold on eleven. and that is all of it. ", KVS_TOKEN_ASSISTANT},
    };
    for (size_t k = 0; k < sizeof parts / sizeof *parts; k++) {
        size_t n;
        kvs_error err;
        assert_int_equal(kvs_tokenize(model, parts[k].text, strlen(parts[k].text), false, false, tokens + n_said,
                                      N_MAX - n_said, &n, &err),
                         KVS_OK);
        memset(flags + n_said, parts[k].flags, n);
        n_said += (uint32_t)n;
    }
}

static int set_up(void **state)
{
    (void)state;
    tiny_options t;
    fx_shape(&t, GGML_TYPE_F32);
    t.n_layers = 3;
    model = fx_open(&t, 2, 0);
    if (model == NULL)
        return 1;
    write_direction("controlvector", "llama", model->info.n_embd, GGML_TYPE_F32, 0.25f, file);
    write_text();
    expected = malloc(sizeof(float) * N_MAX * model->info.vocab_size);
    got = malloc(sizeof(float) * N_MAX * model->info.vocab_size);
    return expected == NULL || got == NULL;
}

static int tear_down(void **state)
{
    (void)state;
    unlink(file);
    free(expected);
    free(got);
    kvs_model_close(&model);
    return 0;
}

static kvs_session *open_session(const char *steer)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "streaming";
    o.budget_tokens = 400;
    o.arith = KVS_ARITH_F32;
    kvs_session *s = fx_session(model, &o);
    assert_non_null(s);
    if (steer != NULL) {
        char spec[TINY_PATH_BYTES + 64];
        kvs_error err;
        snprintf(spec, sizeof spec, "%s:%s", file, steer);
        if (kvs_session_steer(s, spec, &err) != KVS_OK)
            fail_msg("%s", err.message);
    }
    return s;
}

static void run_rows(kvs_session *s, uint32_t from, uint32_t to, uint32_t slice, float *out)
{
    kvs_error err;
    const uint32_t vocab = model->info.vocab_size;
    if (fx_run(s, tokens + from, flags + from, to - from, slice, out + (size_t)from * vocab, vocab, &err) != KVS_OK)
        fail_msg("%s", err.message);
}

static void reference(const char *steer)
{
    kvs_session *s = open_session(steer);
    run_rows(s, 0, n_said, n_said, expected);
    kvs_session_free(&s);
}

static void check_same(const char *what, uint32_t from)
{
    const uint32_t vocab = model->info.vocab_size, n = n_said - from;
    const size_t at = (size_t)from * vocab;
    const uint32_t row = fx_differs(got + at, expected + at, n, vocab);
    if (row != n)
        fail_msg("%s: row %u differs", what, from + row);
}

static void steering_by_nothing_changes_a_bit(void **state)
{
    (void)state;
    reference(NULL);
    kvs_session *s = open_session("layer=1,alpha=0,gamma=0");
    run_rows(s, 0, n_said, 7, got);
    check_same("alpha and gamma 0", 0);
    kvs_error err;
    assert_int_equal(kvs_session_steer(s, NULL, &err), KVS_OK);
    kvs_session_free(&s);
    s = open_session("layer=1,alpha=2,gamma=0"); /* and the prompt is not steered at all */
    run_rows(s, 0, n_said, 7, got);
    const uint32_t row = fx_differs(got, expected, n_said, model->info.vocab_size);
    assert_true(row < n_said && flags[row] == KVS_TOKEN_ASSISTANT && flags[row - 1] == KVS_TOKEN_USER);
    kvs_session_free(&s);
}

/* Behind the last layer nothing mixes rows any more: the residual stream is the plain one and alpha_t v. */
static void the_shift_is_not_alpha_t_times_the_direction(void **state)
{
    (void)state;
    const uint32_t n = model->info.n_embd;
    kvs_session *s = open_session(NULL), *r = open_session("layer=1,alpha=0.5,gamma=0.25");
    kvs_forward *f;
    kvs_error err;
    assert_int_equal(kvs_session_forward(s, &f, &err), KVS_OK);
    s->chunk_tokens = r->chunk_tokens = N_MAX;
    r->steer.layer = model->info.n_layers - 1; /* the same direction, further up */
    float *const plain = malloc((size_t)n_said * n * sizeof *plain);
    assert_non_null(plain);
    assert_int_equal(kvs_session_extend(s, tokens, flags, n_said, NULL, &err), KVS_OK);
    /* A chunk has rows of one kind: the last answer's are there. */
    uint32_t first = n_said;
    while (flags[first - 1] == KVS_TOKEN_ASSISTANT)
        first--;
    memcpy(plain, f->x, (size_t)(n_said - first) * n * sizeof *plain);
    assert_int_equal(kvs_session_extend(r, tokens, flags, n_said, NULL, &err), KVS_OK);
    bool moved[4] = {false};
    for (uint32_t i = 0; i < n_said - first; i++) {
        const double by = (double)r->steer.shift[i];
        const double n_other = (by - 0.5) / 0.25;
        assert_true(n_other == 0 || n_other == 1);
        moved[(int)n_other] = true;
        for (uint32_t d = 0; d < n; d++) {
            const double want = (double)plain[(size_t)i * n + d] + by * (double)r->steer.direction[d];
            const double is = (double)f->x[(size_t)i * n + d];
            /* the sum's two parts in another order, and the product's rounding */
            assert_true(fabs(is - want) <= 0x1p-22 * (fabs(want) + fabs((double)plain[(size_t)i * n + d]) + 4));
        }
    }
    assert_true(moved[0] && moved[1]);
    free(plain);
    kvs_session_free(&s);
    kvs_session_free(&r);
}

static void thoughts_are_miscounted(void **state)
{
    (void)state;
    static const char *const others[] = {"Wait, no",       "  wait a bit",    "So let me CHECK it", "Alternatively x",
                                         "by another way", "that's correct.", "I verify this"};
    static const char *const executions[] = {"Then we await", "x alternatively", "we add seven", "", " ", "mak sure"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        assert_true(kvs_steer_is_other(others[i], strlen(others[i])));
    for (size_t i = 0; i < sizeof executions / sizeof *executions; i++)
        assert_false(kvs_steer_is_other(executions[i], strlen(executions[i])));
    kvs_session *s = open_session("layer=1,alpha=0,gamma=0.5");
    uint32_t most = 0, at = 0;
    for (uint32_t i = 0; i < n_said; i++) {
        run_rows(s, i, i + 1, 1, got);
        if (flags[i] == KVS_TOKEN_USER)
            assert_int_equal(kvs_session_steer_count(s), 0);
        at = kvs_session_steer_count(s);
        most = at > most ? at : most;
    }
    assert_int_equal(most, 3); /* wait; alternatively; let me check */
    assert_int_equal(at, 1);
    kvs_session_free(&s);
}

static void steering_depends_on_how_tokens_come(void **state)
{
    (void)state;
    static const char steer[] = "layer=1,alpha=0.1,gamma=0.5";
    kvs_error err;
    reference(steer);
    for (uint32_t slice = 1; slice < 40; slice += 6) {
        kvs_session *s = open_session(steer);
        run_rows(s, 0, n_said, slice, got);
        check_same("slices", 0);
        kvs_session_free(&s);
    }
    for (uint32_t cut = 15; cut < n_said; cut += 11) {
        kvs_session *s = open_session(steer), *copy = open_session(steer), *fork;
        run_rows(s, 0, n_said, n_said, got);
        assert_int_equal(kvs_session_truncate(s, cut, &err), KVS_OK);
        assert_int_equal(kvs_session_fork(s, NULL, &fork, &err), KVS_OK);
        assert_int_equal(fx_copy_by_save(s, copy, &err), KVS_OK);
        run_rows(s, cut, n_said, 5, got);
        check_same("truncated", cut);
        run_rows(fork, cut, n_said, 9, got);
        check_same("forked", cut);
        run_rows(copy, cut, n_said, 300, got);
        check_same("loaded", cut);
        kvs_session_free(&s);
        kvs_session_free(&fork);
        kvs_session_free(&copy);
    }
    kvs_session *s = open_session(steer), *other = open_session(NULL);
    assert_int_equal(fx_copy_by_save(s, other, &err), KVS_EFORMAT);
    assert_int_equal(fx_copy_by_save(other, s, &err), KVS_EFORMAT);
    kvs_session_free(&s);
    kvs_session_free(&other);
}

static void refused(kvs_session *s, const char *path, const char *rest, kvs_status want, const char *words)
{
    char spec[2 * TINY_PATH_BYTES];
    kvs_error err = {.message = ""};
    snprintf(spec, sizeof spec, "%s%s", path, rest);
    assert_int_equal(kvs_session_steer(s, spec, &err), want);
    if (strstr(err.message, words) == NULL)
        fail_msg("'%s' does not name '%s'", err.message, words);
    assert_true(s->steer.on && s->steer.alpha == 0.25);
}

static void a_file_of_another_model_is_taken(void **state)
{
    (void)state;
    static const char right[] = ":layer=1,alpha=1,gamma=0";
    const uint32_t n = model->info.n_embd;
    kvs_session *s = open_session("layer=1,alpha=0.25,gamma=0");
    refused(s, file, ":layer=3,alpha=1,gamma=0", KVS_EINVAL, "layers 0 to 2");
    refused(s, file, ":layer=0.5,alpha=1,gamma=0", KVS_EINVAL, "layers 0 to 2");
    refused(s, file, ":layer=2,alpha=1,gamma=0", KVS_EFORMAT, "direction.2");
    refused(s, file, ":layer=1,alpha=1", KVS_EINVAL, "gamma");
    refused(s, file, ":layer=1,alpha=nan,gamma=0", KVS_EINVAL, "alpha");
    refused(s, file, "", KVS_EINVAL, "layer");
    refused(s, "", right, KVS_EINVAL, "file name");
    refused(s, "/nowhere/x.gguf", right, KVS_EIO, "cannot open");
    refused(s, "/tmp", right, KVS_EIO, "regular file");
    static const struct {
        const char *arch, *hint, *words;
        uint32_t more;
        enum ggml_type type;
        float first;
    } bad[] = {
        {"llama", NULL, "architecture", 0, GGML_TYPE_F32, 1},
        {"controlvector", "qwen2", "qwen2", 0, GGML_TYPE_F32, 1},
        {"controlvector", NULL, "numbers", 32, GGML_TYPE_F32, 1},
        {"controlvector", NULL, "type", 0, GGML_TYPE_F16, 1},
        {"controlvector", NULL, "element 0", 0, GGML_TYPE_F32, NAN},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char path[TINY_PATH_BYTES];
        write_direction(bad[i].arch, bad[i].hint, n + bad[i].more, bad[i].type, bad[i].first, path);
        refused(s, path, right, KVS_EFORMAT, bad[i].words);
        unlink(path);
    }
    kvs_session_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steering_by_nothing_changes_a_bit),
        cmocka_unit_test(the_shift_is_not_alpha_t_times_the_direction),
        cmocka_unit_test(thoughts_are_miscounted),
        cmocka_unit_test(steering_depends_on_how_tokens_come),
        cmocka_unit_test(a_file_of_another_model_is_taken),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

/* Exactness on the real model: slices, chunks, threads, neighbours, forks and saves leave every compared logit as it
 * was, to the last bit, in both arithmetics, with and without evictions.
 *
 *   oracle_exact_real [MODEL.gguf] [TEXT]
 *
 * tests/unit/test_exact.c asks the same, in more combinations, of a tiny model; here the widths, the 30 layers and the
 * packed kernels are the real ones. Prints `ok`/`not ok` lines and a closing count; exit 1 if any fails, 77 if there
 * is no model or text. */
#include "base/base.h"
#include "kvasir.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { N = 600, STRIDE = 23, N_KEPT = (N - 1) / STRIDE + 2, CUT = 317, TEXT_BYTES = 8000 };

static int n_passed, n_failed;
static uint32_t vocab;
static int32_t tokens[TEXT_BYTES];
static uint8_t flags[N];

static void check(bool ok, const char *name, const char *detail)
{
    printf("%s %s: %s\n", ok ? "ok" : "not ok", name, detail);
    fflush(stdout);
    *(ok ? &n_passed : &n_failed) += 1;
}

static void die(const char *what, const char *detail)
{
    fprintf(stderr, "oracle_exact_real: %s: %s\n", what, detail);
    exit(1);
}

/* ---- rows that are compared ---------------------------------------------------------------------------------------- */

typedef struct rows {
    float *logits; /* [N_KEPT][vocab] */
    uint32_t base; /* token index of row 0 of the call under way */
} rows;

static bool is_compared(uint32_t token)
{
    return token % STRIDE == 0 || token == N - 1;
}

static bool on_logits(void *ctx, uint32_t row, const float *logits)
{
    const rows *r = ctx;
    const uint32_t token = r->base + row, at = token == N - 1 ? N_KEPT - 1 : token / STRIDE;
    memcpy(r->logits + (size_t)at * vocab, logits, vocab * sizeof *logits);
    return true;
}

static kvs_run part(kvs_session *s, uint32_t from, uint32_t to, uint8_t want[N], rows *r)
{
    for (uint32_t i = from; i < to; i++)
        want[i - from] = is_compared(i);
    r->base = from;
    return (kvs_run){.session = s,
                     .tokens = tokens + from,
                     .flags = flags + from,
                     .n_tokens = to - from,
                     .on_logits = on_logits,
                     .want = want,
                     .ctx = r};
}

static void extend(kvs_session *s, uint32_t from, uint32_t to, uint32_t slice, rows *r)
{
    uint8_t want[N];
    kvs_error err = {.message = ""};
    for (uint32_t at = from; at < to; at += slice) {
        kvs_run run = part(s, at, kvs_min_u32(to, at + slice), want, r);
        if (kvs_step(&run, 1, &err) != KVS_OK)
            die("kvs_step", err.message);
    }
}

/* ---- variants ------------------------------------------------------------------------------------------------------ */

typedef struct setting {
    const char *name, *policy;
    uint32_t budget;
    kvs_arith arith;
    rows expected, got;
} setting;

static kvs_session *open_session(kvs_model *m, const setting *c, uint32_t chunk)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = c->policy;
    o.budget_tokens = c->budget;
    o.arith = c->arith;
    o.chunk_tokens = chunk;
    kvs_session *s;
    kvs_error err = {.message = ""};
    if (kvs_session_create(m, &o, &s, &err) != KVS_OK)
        die("session", err.message);
    return s;
}

static void compare(setting *c, const char *what)
{
    char name[200], line[100] = "bit-identical";
    uint32_t row = 0;
    while (row < N_KEPT && memcmp(c->got.logits + (size_t)row * vocab, c->expected.logits + (size_t)row * vocab,
                                  vocab * sizeof(float)) == 0)
        row++;
    snprintf(name, sizeof name, "%s: %s", c->name, what);
    if (row < N_KEPT)
        snprintf(line, sizeof line, "token %u differs", row == N_KEPT - 1 ? N - 1 : row * STRIDE);
    check(row == N_KEPT, name, line);
    memset(c->got.logits, 0, sizeof(float) * N_KEPT * vocab);
}

static void cuts(kvs_model *const *models, setting *c, uint32_t chunk)
{
    static const struct {
        uint32_t n_threads, slice;
    } cut[] = {{1, 64}, {2, 7}, {2, 512}, {3, 101}};
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++) {
        char what[64];
        kvs_session *s = open_session(models[cut[i].n_threads - 1], c, chunk);
        extend(s, 0, N, cut[i].slice, &c->got);
        kvs_session_free(&s);
        snprintf(what, sizeof what, "%u threads, slices of %u", cut[i].n_threads, cut[i].slice);
        compare(c, what);
    }
    kvs_session *s = open_session(models[1], c, chunk);
    extend(s, 0, N - 50, N, &c->got);
    extend(s, N - 50, N, 1, &c->got);
    kvs_session_free(&s);
    compare(c, "the last 50 tokens one by one");
}

static void neighbours(kvs_model *m, setting *c, uint32_t chunk)
{
    kvs_session *s = open_session(m, c, chunk), *a = open_session(m, c, chunk), *b = open_session(m, c, chunk);
    kvs_error err = {.message = ""};
    if (kvs_session_extend(a, tokens + 200, NULL, 150, NULL, &err) != KVS_OK)
        die("extend", err.message);
    uint8_t want[N];
    for (uint32_t at = 0, step = 0; at < N; at += 90, step++) {
        kvs_run runs[] = {{.session = a, .tokens = tokens + at, .n_tokens = 1 + step % 2 * 40},
                          part(s, at, kvs_min_u32(N, at + 90), want, &c->got),
                          {.session = b, .tokens = tokens + 300, .n_tokens = 17}};
        if (kvs_step(runs, 3, &err) != KVS_OK)
            die("kvs_step", err.message);
    }
    kvs_session_free(&s);
    kvs_session_free(&a);
    kvs_session_free(&b);
    compare(c, "batched with two others");
}

static void copies(kvs_model *m, setting *c, uint32_t chunk)
{
    kvs_error err = {.message = ""};
    kvs_session *s = open_session(m, c, chunk), *child, *loaded = open_session(m, c, chunk);
    size_t n_bytes = 0;
    extend(s, 0, CUT, N, &c->got);
    float *first = malloc(sizeof(float) * N_KEPT * vocab);
    if (first == NULL || kvs_session_save(s, NULL, 0, &n_bytes, &err) != KVS_OK)
        die("save", err.message);
    memcpy(first, c->got.logits, sizeof(float) * N_KEPT * vocab);
    void *buf = malloc(n_bytes);
    if (buf == NULL || kvs_session_save(s, buf, n_bytes, &n_bytes, &err) != KVS_OK ||
        kvs_session_load(loaded, buf, n_bytes, &err) != KVS_OK)
        die("save and load", err.message);
    extend(loaded, CUT, N, 64, &c->got);
    compare(c, "saved and loaded");
    kvs_session_free(&loaded);

    if (kvs_session_fork(s, NULL, &child, &err) != KVS_OK)
        die("fork", err.message);
    memcpy(c->got.logits, first, sizeof(float) * N_KEPT * vocab);
    extend(child, CUT, N, 64, &c->got);
    compare(c, "child of a fork");
    memcpy(c->got.logits, first, sizeof(float) * N_KEPT * vocab);
    extend(s, CUT, N, 64, &c->got);
    compare(c, "parent, after the child wrote");
    kvs_session_free(&child);
    kvs_session_free(&s);
    free(first);
    free(buf);
}

static void run_setting(kvs_model *const *models, setting *c, uint32_t chunk)
{
    c->expected.logits = calloc((size_t)N_KEPT * vocab, sizeof(float));
    c->got.logits = calloc((size_t)N_KEPT * vocab, sizeof(float));
    if (c->expected.logits == NULL || c->got.logits == NULL)
        die("out of memory", "");
    kvs_session *s = open_session(models[1], c, chunk);
    extend(s, 0, N, N, &c->expected);
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    if ((u.n_evictions > 0) != (c->budget < N))
        die("the setting does not do what it is meant to", c->name);
    kvs_session_free(&s);
    cuts(models, c, chunk);
    neighbours(models[1], c, chunk);
    copies(models[1], c, chunk);
    free(c->expected.logits);
    free(c->got.logits);
}

/* ---- main ---------------------------------------------------------------------------------------------------------- */

static kvs_model *open_model(const char *path, uint32_t n_threads)
{
    kvs_model_options o;
    kvs_model_options_default(&o);
    o.n_threads = n_threads;
    kvs_model *m;
    kvs_error err = {.message = ""};
    if (kvs_model_open(path, &o, &m, &err) != KVS_OK)
        die("open", err.message);
    return m;
}

int main(int argc, char **argv)
{
    char model_path[1024], text_path[1024], text[TEXT_BYTES];
    const char *home = getenv("HOME"), *env = getenv("KVASIR_MODEL"), *data = getenv("KVASIR_DATA");
    snprintf(model_path, sizeof model_path, "%s/.cache/kvasir/models/SmolLM2-135M-Instruct.Q4_1.gguf", home);
    if (argc > 1 || env != NULL)
        snprintf(model_path, sizeof model_path, "%s", argc > 1 ? argv[1] : env);
    snprintf(text_path, sizeof text_path, "%s/books_public_domain/sherlock_holmes.txt",
             data != NULL ? data : KVS_SOURCE_DIR "/../shared/data");
    FILE *in = fopen(argc > 2 ? argv[2] : text_path, "rb");
    if (access(model_path, R_OK) != 0 || in == NULL) {
        printf("skipped: no model at %s or no text at %s\n0 passed, 0 failed, 36 skipped\n", model_path, text_path);
        return 77;
    }
    const size_t n_text = fread(text, 1, TEXT_BYTES, in);
    fclose(in);
    kvs_model *models[3];
    for (uint32_t t = 0; t < 3; t++)
        models[t] = open_model(model_path, t + 1);
    kvs_model_info info;
    kvs_model_get_info(models[0], &info);
    vocab = info.vocab_size;
    size_t n_tokens;
    kvs_error err = {.message = ""};
    if (kvs_tokenize(models[0], text, kvs_utf8_valid_prefix(text, n_text), true, false, tokens, TEXT_BYTES, &n_tokens,
                     &err) != KVS_OK ||
        n_tokens < N)
        die("the text is too short or", err.message);
    for (uint32_t i = 0; i < N; i++) /* user and assistant in turns of 70 */
        flags[i] = i / 70 % 2 ? KVS_TOKEN_ASSISTANT : KVS_TOKEN_USER;
    setting settings[] = {
        {.name = "native", .budget = 8192, .arith = KVS_ARITH_NATIVE},
        {.name = "f32", .budget = 8192, .arith = KVS_ARITH_F32},
        {.name = "native, evicting", .policy = "attention_top:keep=0.8", .budget = 256, .arith = KVS_ARITH_NATIVE},
        {.name = "f32, evicting by head",
         .policy = "attention_top:acc=1,scope=2,keep=0.7 +position=rollback",
         .budget = 256,
         .arith = KVS_ARITH_F32},
    };
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        run_setting(models, &settings[i], 64);
    for (uint32_t t = 0; t < 3; t++)
        kvs_model_close(&models[t]);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0;
}

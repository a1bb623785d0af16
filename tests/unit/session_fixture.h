/* What the tests of whole sessions share: a tiny model, seeded tokens, runs in slices, and a comparison to the last
 * bit. Everything static, as in tiny_gguf.h. */
#ifndef KVS_SESSION_FIXTURE_H
#define KVS_SESSION_FIXTURE_H

#include "model/model.h"
#include "policy/policy.h"
#include "unit/tiny_gguf.h"

/* Three KV heads: two threads then share the heads of a single row, which is a code path of its own. */
static TINY_UNUSED void fx_shape(tiny_options *o, enum ggml_type type)
{
    tiny_defaults(o);
    o->n_layers = 2;
    o->n_heads = 6;
    o->n_kv_heads = 3;
    o->head_dim = 32;
    o->n_ff = 128;
    o->window_tokens = 4096;
    o->type = type;
}

/* NULL after a line on stderr. */
static TINY_UNUSED kvs_model *fx_open(const tiny_options *o, uint32_t n_threads, uint32_t cpu_mask)
{
    char path[TINY_PATH_BYTES];
    if (!tiny_temp(o, path))
        return NULL;
    kvs_model_options mo;
    kvs_model_options_default(&mo);
    mo.n_threads = n_threads;
    mo.cpu_mask = cpu_mask;
    kvs_model *m;
    kvs_error err = {.message = ""};
    if (kvs_model_open(path, &mo, &m, &err) != KVS_OK)
        fprintf(stderr, "%s\n", err.message);
    unlink(path);
    return m;
}

static TINY_UNUSED kvs_session *fx_session(kvs_model *m, const kvs_session_options *o)
{
    kvs_session *s;
    kvs_error err = {.message = ""};
    if (kvs_session_create(m, o, &s, &err) != KVS_OK)
        fprintf(stderr, "%s: %s\n", o->policy != NULL ? o->policy : "baseline", err.message);
    return s;
}

/* Any token but the markers. */
static TINY_UNUSED void fx_tokens(uint64_t seed, int32_t *tokens, uint32_t n)
{
    kvs_rng rng = {seed};
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = TINY_FIRST_BYTE + (int32_t)kvs_rng_below(&rng, TINY_VOCAB_MIN - TINY_FIRST_BYTE);
}

/* Turns of uneven length: user, then assistant. */
static TINY_UNUSED void fx_flags(uint64_t seed, uint8_t *flags, uint32_t n)
{
    kvs_rng rng = {seed};
    bool user = true;
    for (uint32_t i = 0; i < n; user = !user) {
        const uint32_t end = i + 5 + kvs_rng_below(&rng, user ? 90 : 40);
        for (; i < end && i < n; i++)
            flags[i] = user ? KVS_TOKEN_USER : KVS_TOKEN_ASSISTANT;
    }
}

typedef struct fx_rows {
    float *out; /* [n][vocab] */
    uint32_t vocab, n;
} fx_rows;

static TINY_UNUSED bool fx_keep_row(void *ctx, uint32_t row, const float *logits)
{
    (void)row;
    fx_rows *r = ctx;
    memcpy(r->out + (size_t)r->n++ * r->vocab, logits, r->vocab * sizeof *logits);
    return true;
}

/* Extends s in calls of `slice` tokens; every row's logits go to out [n][vocab]. */
static TINY_UNUSED kvs_status fx_run(kvs_session *s, const int32_t *tokens, const uint8_t *flags, uint32_t n,
                                     uint32_t slice, float *out, uint32_t vocab, kvs_error *err)
{
    uint8_t *want = malloc(n);
    if (want == NULL)
        abort();
    memset(want, 1, n);
    fx_rows rows = {.out = out, .vocab = vocab};
    kvs_status status = KVS_OK;
    for (uint32_t at = 0; at < n && status == KVS_OK; at += slice) {
        kvs_run run = {.session = s,
                       .tokens = tokens + at,
                       .flags = flags == NULL ? NULL : flags + at,
                       .n_tokens = kvs_min_u32(slice, n - at),
                       .on_logits = fx_keep_row,
                       .want = want,
                       .ctx = &rows};
        status = kvs_step(&run, 1, err);
    }
    free(want);
    return status;
}

/* Index of the first row whose bits differ, or n. */
static TINY_UNUSED uint32_t fx_differs(const float *a, const float *b, uint32_t n, uint32_t vocab)
{
    uint32_t row = 0;
    while (row < n && memcmp(a + (size_t)row * vocab, b + (size_t)row * vocab, vocab * sizeof *a) == 0)
        row++;
    return row;
}

/* Writes a profile of m's that the budget stages of this kind read, of numbers drawn from the seed. */
static TINY_UNUSED bool fx_profile(const char *path, kvs_model *m, const char *kind, uint64_t seed)
{
    const kvs_profile_want *want = NULL;
    const kvs_budget_ops *ops;
    for (uint32_t i = 0; want == NULL && (ops = kvs_budget_at(i)) != NULL; i++)
        for (uint32_t k = 0; ops->file != NULL && ops->file->kinds[k] != NULL; k++)
            if (strcmp(ops->file->kinds[k], kind) == 0)
                want = ops->file;
    FILE *const f = want == NULL ? NULL : fopen(path, "w");
    if (f == NULL)
        return false;
    kvs_rng rng = {seed};
    fprintf(f, "{\"kind\":\"%s\",\"model_sha256\":\"%s\",\"n_layers\":%u,\"n_kv_heads\":%u,\"%s\":", kind,
            kvs_model_sha256(m), m->info.n_layers, m->info.n_kv_heads, want->heads ? "heads" : "layers");
    const uint32_t n_tables = kvs_max_u32(want->n_tables, 1), n_heads = want->heads ? m->info.n_kv_heads : 1;
    for (uint32_t t = 0; t < n_tables; t++) {
        fputs(n_tables == 1 ? "[" : t == 0 ? "[[" : ",[", f);
        for (uint32_t i = 0; i < m->info.n_layers * n_heads; i++) {
            const double share = kvs_rng_double(&rng), high = want->max < want->min + 1 ? want->max : want->min + 1;
            const bool first = i % n_heads == 0, last = (i + 1) % n_heads == 0;
            fprintf(f, "%s%s%.6f%s", i > 0 ? "," : "", want->heads && first ? "[" : "",
                    want->min + share * (high - want->min), want->heads && last ? "]" : "");
        }
        fputs("]", f);
    }
    fputs(n_tables > 1 ? "]}\n" : "}\n", f);
    return fclose(f) == 0;
}

/* What a session saves to memory, loaded into `into`. */
static TINY_UNUSED kvs_status fx_copy_by_save(const kvs_session *from, kvs_session *into, kvs_error *err)
{
    size_t n;
    kvs_status status = kvs_session_save(from, NULL, 0, &n, err);
    void *buf = malloc(n);
    if (buf == NULL)
        abort();
    if (status == KVS_OK)
        status = kvs_session_save(from, buf, n, &n, err);
    if (status == KVS_OK)
        status = kvs_session_load(into, buf, n, err);
    free(buf);
    return status;
}

#endif

/* The full-cache oracle: Kvasir against libllama on the same weights.
 *
 *   oracle_llama [MODEL.gguf] [TEXT]
 *
 * 1. --arith f32 on the GGUF widened to F32: top-1 equal on >= 99.5 % of 2,000 tokens of real text at depths up to
 *    8,000, mean KL < 1e-5 (angles by ggml's recurrence, f32 KV on both sides, flash attention off).
 * 2. native on the quantised GGUF: KL to the F32 logits at most 1.25 times libllama's own.
 * Prints `ok`/`not ok` lines and a closing count; exit 1 if any fails, 77 if there is no model or text. */
#include "base/base.h"
#include "kernels/kernels.h"
#include "model/model.h"

#include <llama.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DEPTH = 8000, NATIVE_DEPTH = 4000, STRIDE = 4, BLOCK = 500 };

static int n_passed, n_failed;

static void check(bool ok, const char *name, const char *detail)
{
    printf("%s %s: %s\n", ok ? "ok" : "not ok", name, detail);
    fflush(stdout);
    *(ok ? &n_passed : &n_failed) += 1;
}

static void quiet(enum ggml_log_level level, const char *text, void *ctx)
{
    (void)ctx;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(text, stderr);
}

static void die(const char *what, const char *detail)
{
    fprintf(stderr, "oracle: %s: %s\n", what, detail);
    exit(1);
}

/* The widened file stands beside the model and is made once. */
static void widen(const char *path, char *wide, size_t cap)
{
    snprintf(wide, cap, "%s.f32", path);
    if (access(wide, R_OK) == 0)
        return;
    char tmp[1100];
    snprintf(tmp, sizeof tmp, "%s.%d", wide, (int)getpid());
    struct llama_model_quantize_params p = llama_model_quantize_default_params();
    p.ftype = LLAMA_FTYPE_ALL_F32;
    p.allow_requantize = true;
    p.nthread = 2;
    if (llama_model_quantize(path, tmp, &p) != 0 || rename(tmp, wide) != 0)
        die("cannot widen", path);
}

static char *read_text(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL)
        return NULL;
    char *text = calloc(1, 60001);
    const size_t n = fread(text, 1, 60000, f);
    fclose(f);
    text[kvs_utf8_valid_prefix(text, n)] = '\0';
    return text;
}

typedef struct reference {
    struct llama_model *model;
    struct llama_context *ctx;
} reference;

static reference open_reference(const char *path, bool kv_f32)
{
    struct llama_model_params mp = llama_model_default_params();
    reference r = {.model = llama_model_load_from_file(path, mp)};
    if (r.model == NULL)
        die("libllama cannot open", path);
    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = DEPTH + BLOCK;
    cp.n_batch = cp.n_ubatch = BLOCK;
    cp.n_threads = cp.n_threads_batch = 2;
    cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    cp.type_k = cp.type_v = kv_f32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
    r.ctx = llama_init_from_model(r.model, cp);
    if (r.ctx == NULL)
        die("libllama cannot make a context for", path);
    return r;
}

/* Logits of the wanted tokens of one block: out [BLOCK / STRIDE][vocab]. */
static void decode_reference(reference *r, const int32_t *tokens, uint32_t begin, const uint8_t *want, float *out,
                             uint32_t vocab)
{
    struct llama_batch b = llama_batch_init(BLOCK, 0, 1);
    b.n_tokens = BLOCK;
    for (int i = 0; i < BLOCK; i++) {
        b.token[i] = tokens[begin + (uint32_t)i];
        b.pos[i] = (int32_t)begin + i;
        b.n_seq_id[i] = 1;
        b.seq_id[i][0] = 0;
        b.logits[i] = (int8_t)want[i];
    }
    if (llama_decode(r->ctx, b) != 0)
        die("libllama", "decode failed");
    for (int i = 0, n = 0; i < BLOCK; i++)
        if (want[i])
            memcpy(out + (size_t)n++ * vocab, llama_get_logits_ith(r->ctx, i), vocab * sizeof(float));
    llama_batch_free(b);
}

typedef struct compare {
    const kvs_kernels *k;
    const float *reference; /* [wanted][vocab] */
    float *keep;            /* our own rows, may be NULL */
    uint32_t vocab, n, at;
    double kl;
    uint32_t top1;
} compare;

static bool on_logits(void *ctx, uint32_t row, const float *logits)
{
    (void)row;
    compare *c = ctx;
    kvs_dist_pair d;
    c->k->dist_pair(&d, c->reference + (size_t)c->at * c->vocab, logits, c->vocab);
    c->kl += d.kl;
    c->top1 += d.argmax_p == d.argmax_q;
    c->n++;
    c->at++;
    return true;
}

static kvs_session *open_session(kvs_model *m, kvs_arith arith, kvs_kv_type kv)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.arith = arith;
    o.kv_type = kv;
    o.budget_tokens = DEPTH + BLOCK;
    kvs_session *s;
    kvs_error err;
    if (kvs_session_create(m, &o, &s, &err) != KVS_OK)
        die("session", err.message);
    return s;
}

static void extend(kvs_session *s, const int32_t *tokens, uint32_t begin, const uint8_t *want, compare *c)
{
    c->at = 0;
    kvs_run run = {
        .session = s, .tokens = tokens + begin, .n_tokens = BLOCK, .on_logits = on_logits, .want = want, .ctx = c};
    kvs_error err;
    if (kvs_step(&run, 1, &err) != KVS_OK)
        die("kvs_step", err.message);
}

static kvs_model *open_model(const char *path, bool ggml_rope)
{
    kvs_model_options o;
    kvs_model_options_default(&o);
    o.rope_like_ggml = ggml_rope;
    kvs_model *m;
    kvs_error err;
    if (kvs_model_open(path, &o, &m, &err) != KVS_OK)
        die("open", err.message);
    return m;
}

int main(int argc, char **argv)
{
    char model_path[1024], text_path[1024], wide[1080], line[256];
    const char *home = getenv("HOME"), *env = getenv("KVASIR_MODEL"), *data = getenv("KVASIR_DATA");
    snprintf(model_path, sizeof model_path, "%s/.cache/kvasir/models/SmolLM2-135M-Instruct.Q4_1.gguf", home);
    if (argc > 1 || env != NULL)
        snprintf(model_path, sizeof model_path, "%s", argc > 1 ? argv[1] : env);
    snprintf(text_path, sizeof text_path, "%s/books_public_domain/sherlock_holmes.txt",
             data != NULL ? data : KVS_SOURCE_DIR "/../shared/data");
    char *text = read_text(argc > 2 ? argv[2] : text_path);
    if (access(model_path, R_OK) != 0 || text == NULL) {
        printf("skipped: no model at %s or no text at %s\n0 passed, 0 failed, 2 skipped\n", model_path, text_path);
        return 77;
    }
    llama_log_set(quiet, NULL);
    llama_backend_init();
    widen(model_path, wide, sizeof wide);
    kvs_model *m_wide = open_model(wide, true), *m = open_model(model_path, true);
    kvs_model_info info;
    kvs_model_get_info(m, &info);
    int32_t *tokens = calloc(60000, sizeof *tokens);
    size_t n_tokens;
    kvs_error err;
    if (kvs_tokenize(m, text, strlen(text), true, false, tokens, 60000, &n_tokens, &err) != KVS_OK || n_tokens < DEPTH)
        die("the text is too short or", err.message);
    uint8_t want[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        want[i] = i % STRIDE == 0;

    reference ref_wide = open_reference(wide, true), ref = open_reference(model_path, false);
    kvs_session *s_wide = open_session(m_wide, KVS_ARITH_F32, KVS_KV_F32);
    kvs_session *s_same = open_session(m, KVS_ARITH_F32, KVS_KV_F32),
                *s = open_session(m, KVS_ARITH_NATIVE, KVS_KV_F16);
    const uint32_t vocab = info.vocab_size;
    float *wide_logits = calloc((size_t)BLOCK / STRIDE * vocab, sizeof(float));
    float *ref_logits = calloc((size_t)BLOCK / STRIDE * vocab, sizeof(float));
    const kvs_kernels *k = kvs_kernels_get(kvs_cpu_masked(0));
    compare f32 = {.k = k, .reference = wide_logits, .vocab = vocab}, native = f32, same = f32, theirs = f32;
    for (uint32_t at = 0; at + BLOCK <= DEPTH; at += BLOCK) {
        decode_reference(&ref_wide, tokens, at, want, wide_logits, vocab);
        extend(s_wide, tokens, at, want, &f32);
        extend(s_same, tokens, at, want, &same);
        if (at >= NATIVE_DEPTH) /* libllama's own integer path is slow, and its noise does not change with depth */
            continue;
        extend(s, tokens, at, want, &native);
        decode_reference(&ref, tokens, at, want, ref_logits, vocab);
        theirs.at = 0;
        for (uint32_t i = 0; i < BLOCK / STRIDE; i++)
            on_logits(&theirs, i, ref_logits + (size_t)i * vocab);
        if (isatty(2))
            fprintf(stderr, "\r%u of %u tokens: f32 KL %.2e", at + BLOCK, DEPTH, f32.kl / f32.n);
    }
    snprintf(line, sizeof line, "top-1 %.3f %% (>= 99.5) of %u tokens to depth %d", 100.0 * f32.top1 / f32.n, f32.n,
             DEPTH);
    check(f32.top1 >= 0.995 * f32.n, "f32 top-1 against libllama on the widened GGUF", line);
    snprintf(line, sizeof line, "mean %.3e (< 1e-5)", f32.kl / f32.n);
    check(f32.kl / f32.n < 1e-5, "f32 KL against libllama on the widened GGUF", line);
    snprintf(line, sizeof line, "mean %.3e (< 1e-5)", same.kl / same.n);
    check(same.kl / same.n < 1e-5, "f32 arithmetic on the quantised GGUF equals the widened one", line);
    snprintf(line, sizeof line, "mean %.3e, libllama's own %.3e, ratio %.3f (<= 1.25); top-1 %.2f and %.2f %%",
             native.kl / native.n, theirs.kl / theirs.n, native.kl / theirs.kl, 100.0 * native.top1 / native.n,
             100.0 * theirs.top1 / theirs.n);
    check(native.kl <= 1.25 * theirs.kl, "native KL to the F32 logits", line);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    kvs_session_free(&s_wide);
    kvs_session_free(&s_same);
    kvs_session_free(&s);
    kvs_model_close(&m_wide);
    kvs_model_close(&m);
    llama_free(ref_wide.ctx);
    llama_free(ref.ctx);
    llama_model_free(ref_wide.model);
    llama_model_free(ref.model);
    free(tokens);
    free(text);
    free(wide_logits);
    free(ref_logits);
    return n_failed != 0;
}

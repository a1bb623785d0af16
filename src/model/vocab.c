/* Text to tokens and back, on libllama's vocabulary. What plain text may become is decided here: with special false no
 * control token comes out, whatever the text says. Templates are chat_template.c's. */
#include "model/vocab.h"

#include <ggml-cpu.h>
#include <ggml.h>
#include <llama.h>
#include <pthread.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

struct kvs_vocab {
    struct llama_model *model;
    const struct llama_vocab *vocab;
    int32_t n_tokens;
    int32_t bos; /* -1: none */
    bool add_bos;
};

/* The first error libllama logged on this thread since it was emptied: a failed load returns NULL and nothing else, and
 * what is logged after the first only says that loading failed. */
static _Thread_local char first_error[200];

static void on_log(enum ggml_log_level level, const char *text, void *ctx)
{
    (void)ctx;
    if (level != GGML_LOG_LEVEL_ERROR || first_error[0] != '\0')
        return;
    size_t n = 0;
    for (; text[n] != '\0' && text[n] != '\n' && n + 1 < sizeof first_error; n++)
        first_error[n] = text[n] >= 0x20 && text[n] < 0x7f ? text[n] : '?';
    first_error[n] = '\0';
}

static void init_once(void)
{
    llama_log_set(on_log, NULL);
    ggml_log_set(on_log, NULL);
    llama_backend_init();
    ggml_cpu_init();
}

void kvs_backend_init(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, init_once);
}

kvs_status kvs_vocab_load(const char *path, uint32_t n_tokens, kvs_vocab **out, kvs_error *err)
{
    *out = NULL;
    kvs_backend_init();
    kvs_vocab *v = calloc(1, sizeof *v);
    if (v == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory for the vocabulary", path);
    struct llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    params.n_gpu_layers = 0;
    first_error[0] = '\0';
    v->model = llama_model_load_from_file(path, params);
    if (v->model == NULL) {
        free(v);
        return kvs_error_set(err, KVS_EBACKEND, "%s: libllama refuses the vocabulary: %s", path,
                             first_error[0] != '\0' ? first_error : "it gives no reason");
    }
    v->vocab = llama_model_get_vocab(v->model);
    v->n_tokens = llama_vocab_n_tokens(v->vocab);
    v->bos = llama_vocab_bos(v->vocab);
    v->add_bos = llama_vocab_get_add_bos(v->vocab);
    if ((uint32_t)v->n_tokens != n_tokens) {
        const int32_t n = v->n_tokens;
        kvs_vocab_free(v);
        return kvs_error_set(err, KVS_EBACKEND, "%s: libllama reads %d tokens where the file has %u", path, n,
                             n_tokens);
    }
    *out = v;
    return KVS_OK;
}

void kvs_vocab_free(kvs_vocab *v)
{
    if (v == NULL)
        return;
    llama_model_free(v->model);
    free(v);
}

static bool in_range(const kvs_vocab *v, int32_t token)
{
    return token >= 0 && token < v->n_tokens;
}

bool kvs_vocab_is_control(const kvs_vocab *v, int32_t token)
{
    return in_range(v, token) && llama_vocab_is_control(v->vocab, token);
}

bool kvs_vocab_is_user_defined(const kvs_vocab *v, int32_t token)
{
    return in_range(v, token) && (llama_vocab_get_attr(v->vocab, token) & LLAMA_TOKEN_ATTR_USER_DEFINED) != 0;
}

const char *kvs_vocab_chat_template(const kvs_vocab *v)
{
    return llama_model_chat_template(v->model, NULL);
}

kvs_status kvs_tokenize(const kvs_model *m, const char *text, size_t text_bytes, bool add_bos, bool special,
                        int32_t *tokens, size_t cap_tokens, size_t *n_tokens, kvs_error *err)
{
    const kvs_vocab *v = m->vocab;
    *n_tokens = 0;
    if (text_bytes > INT32_MAX)
        return kvs_error_set(err, KVS_EINVAL, "text of %zu bytes: at most 2^31 - 1 are tokenised at once", text_bytes);
    const size_t valid = kvs_utf8_valid_prefix(text, text_bytes);
    if (valid != text_bytes)
        return kvs_error_set(err, KVS_EFORMAT, "invalid UTF-8 at byte %zu of %zu (0x%02x)", valid, text_bytes,
                             (unsigned)(unsigned char)text[valid]);
    /* BOS is put here, not by libllama, whose add_special would append an EOS too where the model asks for one. */
    const size_t n_bos = add_bos && v->add_bos && v->bos >= 0 ? 1 : 0;
    const size_t room = tokens != NULL && cap_tokens > n_bos ? cap_tokens - n_bos : 0;
    int32_t n = 0;
    if (text_bytes > 0)
        n = llama_tokenize(v->vocab, text, (int32_t)text_bytes, room > 0 ? tokens + n_bos : NULL,
                           room > INT32_MAX ? INT32_MAX : (int32_t)room, false, special);
    if (n == INT32_MIN)
        return kvs_error_set(err, KVS_EINVAL, "text of %zu bytes gives more than 2^31 - 1 tokens", text_bytes);
    const size_t needed = (size_t)(n < 0 ? -n : n) + n_bos;
    *n_tokens = needed;
    if (n < 0 || needed > cap_tokens || (tokens == NULL && needed > 0))
        return kvs_error_set(err, KVS_EINVAL, "room for %zu tokens where the text has %zu", cap_tokens, needed);
    if (n_bos > 0)
        tokens[0] = v->bos;
    return KVS_OK;
}

size_t kvs_token_text(const kvs_model *m, int32_t token, bool special, char *buf, size_t cap_bytes)
{
    const kvs_vocab *v = m->vocab;
    if (!in_range(v, token))
        return 0;
    const int32_t cap = buf == NULL ? 0 : cap_bytes > INT32_MAX ? INT32_MAX : (int32_t)cap_bytes;
    const int32_t n = llama_token_to_piece(v->vocab, token, buf, cap, 0, special);
    if (n >= 0)
        return (size_t)n;
    /* libllama writes nothing that does not fit whole. */
    const size_t needed = (size_t)-n;
    char *whole = cap > 0 ? malloc(needed) : NULL;
    if (whole != NULL && llama_token_to_piece(v->vocab, token, whole, -n, 0, special) == -n)
        memcpy(buf, whole, (size_t)cap);
    free(whole);
    return needed;
}

bool kvs_token_is_eog(const kvs_model *m, int32_t token)
{
    return in_range(m->vocab, token) && llama_vocab_is_eog(m->vocab->vocab, token);
}

int32_t kvs_token_bos(const kvs_model *m)
{
    return m->vocab->bos;
}

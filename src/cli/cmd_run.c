/* kvasir run: one prompt, raw or through the chat template, streamed to stdout as it comes. */
#include "cli/cli.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct output {
    bool stream; /* to stdout; with --json the text is kept instead */
    char *text;
    size_t n_bytes, cap_bytes;
    uint32_t n_tokens;
    uint64_t begin_ns, first_ns, last_ns;
} output;

static bool on_token(void *ctx, int32_t token, const char *bytes, size_t n_bytes)
{
    output *const out = ctx;
    (void)token;
    out->last_ns = kvs_now_ns();
    if (out->n_tokens++ == 0)
        out->first_ns = out->last_ns;
    if (out->stream) {
        fwrite(bytes, 1, n_bytes, stdout);
        if (fflush(stdout) != 0)
            return false;
    } else {
        if (out->n_bytes + n_bytes + 1 > out->cap_bytes) {
            const size_t cap = (out->n_bytes + n_bytes + 1) * 2;
            char *const grown = realloc(out->text, cap);
            if (grown == NULL)
                return false;
            out->text = grown;
            out->cap_bytes = cap;
        }
        memcpy(out->text + out->n_bytes, bytes, n_bytes);
        out->n_bytes += n_bytes;
        out->text[out->n_bytes] = '\0';
    }
    return kvs_cli_interrupted == 0;
}

static kvs_status tokenize(const kvs_model *m, const char *text, size_t n_bytes, int32_t **tokens, size_t *n_tokens,
                           kvs_error *err)
{
    size_t cap = n_bytes + 8; /* a token is a byte at least, and a BOS */
    *tokens = calloc(cap, sizeof **tokens);
    if (*tokens == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a prompt of %zu bytes", n_bytes);
    const kvs_status status = kvs_tokenize(m, text, n_bytes, true, false, *tokens, cap, n_tokens, err);
    if (status == KVS_OK && (*n_tokens == 0 || *n_tokens > UINT32_MAX))
        return kvs_error_set(err, KVS_EINVAL, "the prompt has %zu tokens; it needs 1 at least", *n_tokens);
    return status;
}

static kvs_status complete(kvs_model *m, kvs_session *s, const char *text, size_t n_bytes, const kvs_sampling *params,
                           output *out, kvs_generation *result, kvs_error *err)
{
    kvs_model_info info;
    kvs_model_get_info(m, &info);
    int32_t *tokens = NULL;
    size_t n_tokens = 0;
    float *const logits = calloc(info.vocab_size, sizeof *logits);
    kvs_status status = logits != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for logits");
    if (status == KVS_OK)
        status = tokenize(m, text, n_bytes, &tokens, &n_tokens, err);
    const uint64_t begin_ns = kvs_now_ns();
    if (status == KVS_OK)
        status = kvs_session_extend(s, tokens, NULL, (uint32_t)n_tokens, logits, err);
    const double prefill_ms = (double)(kvs_now_ns() - begin_ns) * 1e-6;
    if (status == KVS_OK)
        status = kvs_generate(s, logits, params, on_token, out, result, err);
    result->n_prompt_tokens = (uint32_t)n_tokens;
    result->prefill_ms = prefill_ms;
    free(tokens);
    free(logits);
    return status;
}

static int print_result(const kvs_cli_args *args, const kvs_model *m, const kvs_session *s, const output *out,
                        const kvs_generation *g)
{
    kvs_model_info info;
    kvs_usage u;
    kvs_positions p;
    kvs_health h;
    kvs_model_get_info(m, &info);
    kvs_session_get_usage(s, &u);
    kvs_session_get_positions(s, &p);
    kvs_session_get_health(s, &h);
    const double decode_s = (double)(out->last_ns - out->first_ns) * 1e-9;
    const uint32_t n_decoded = out->n_tokens > 1 ? out->n_tokens - 1 : 0;
    json_t *const o = json_object();
    kvs_cli_set_text(o, "text", out->text != NULL ? out->text : "");
    kvs_cli_set_text(o, "stop", g->stop);
    kvs_cli_set_int(o, "n_prompt_tokens", g->n_prompt_tokens);
    kvs_cli_set_int(o, "n_tokens", out->n_tokens);
    kvs_cli_set_real(o, "ttft_ms", out->n_tokens > 0 ? (double)(out->first_ns - out->begin_ns) * 1e-6 : 0.0 / 0.0);
    kvs_cli_set_real(o, "tpot_ms", decode_s * 1e3 / n_decoded);
    kvs_cli_set_real(o, "prefill_tok_per_s", g->n_prompt_tokens / (g->prefill_ms * 1e-3));
    kvs_cli_set_real(o, "decode_tok_per_s", n_decoded / decode_s);
    kvs_cli_set_state(o, &u, &p, &h);
    kvs_cli_set_ffn(o, s);
    kvs_cli_set_text(o, "policy", kvs_session_policy(s));
    kvs_cli_set_text(o, "position", kvs_position_name(kvs_session_position(s)));
    kvs_cli_set_text(o, "model", info.path);
    kvs_cli_set_text(o, "arith", args->arith != NULL ? args->arith : "native");
    kvs_cli_set_text(o, "isa", info.isa);
    return kvs_cli_print_json(o);
}

static kvs_status run(const kvs_cli_args *args, kvs_model *m, kvs_session *s, output *out, kvs_generation *g,
                      kvs_error *err)
{
    char *from_stdin = NULL;
    size_t n_bytes = strlen(args->prompt);
    const char *text = args->prompt;
    if (strcmp(args->prompt, "-") == 0) {
        KVS_TRY(kvs_cli_read_file("-", &from_stdin, &n_bytes, err));
        text = from_stdin;
    }
    kvs_sampling params;
    kvs_cli_sampling(args, &params);
    if (!kvs_cli_given(args, "n-tokens"))
        params.max_tokens = 128;
    kvs_status status;
    out->begin_ns = kvs_now_ns();
    if (args->chat)
        status = kvs_chat_turn(s, text, args->system, &params, on_token, out, g, err);
    else
        status = complete(m, s, text, n_bytes, &params, out, g, err);
    free(from_stdin);
    return status;
}

int kvs_cmd_run(const kvs_cli_args *args)
{
    if (args->prompt == NULL)
        return kvs_cli_usage_error(args->command, "needs a prompt: -p TEXT, or -p - to read stdin");
    if (args->system != NULL && !args->chat)
        return kvs_cli_usage_error(args->command, "--system needs --chat: a raw completion has no messages");
    kvs_error err = {0};
    kvs_model *m = NULL;
    kvs_session *s = NULL;
    kvs_session_options opt;
    kvs_cli_session_options(args, KVS_ARITH_NATIVE, &opt);
    output out = {.stream = !args->json};
    kvs_generation g = {.stop = "error"};
    kvs_status status = kvs_cli_open_model(args, &m, &err);
    if (status == KVS_OK)
        status = kvs_session_create(m, &opt, &s, &err);
    if (status == KVS_OK && args->steer != NULL)
        status = kvs_session_steer(s, args->steer, &err);
    kvs_cli_catch_interrupts();
    if (status == KVS_OK)
        status = run(args, m, s, &out, &g, &err);
    if (out.stream && out.n_tokens > 0 && isatty(STDOUT_FILENO))
        putchar('\n');
    fflush(stdout);
    int code = KVS_EXIT_OK;
    if (kvs_cli_interrupted > 0 && (status == KVS_OK || status == KVS_ECANCELLED))
        code = KVS_EXIT_INTERRUPTED;
    else if (status != KVS_OK)
        code = kvs_cli_report(args, &err);
    if (args->json && code != KVS_EXIT_FAILURE) {
        const int printed = print_result(args, m, s, &out, &g);
        code = printed != KVS_EXIT_OK ? printed : code;
    }
    free(out.text);
    kvs_session_free(&s);
    kvs_model_close(&m);
    return code;
}

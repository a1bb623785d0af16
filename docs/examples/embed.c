/* Kvasir in another program: open a model, hold a conversation inside a budget of 512 tokens, stream the answer.
 *   cc embed.c $(pkg-config --cflags --libs kvasir) && ./a.out model.gguf "Name three rivers." */
#include <kvasir.h>
#include <stdio.h>

static bool on_token(void *ctx, int32_t token, const char *bytes, size_t n_bytes)
{
    (void)token;
    return fwrite(bytes, 1, n_bytes, ctx) == n_bytes && fflush(ctx) == 0;
}

int main(int argc, char **argv)
{
    kvs_model *model = NULL;
    kvs_session *session = NULL;
    kvs_error err = {0};
    kvs_session_options options;
    kvs_sampling sampling;
    kvs_session_options_default(&options);
    kvs_sampling_default(&sampling);
    options.policy = "streaming";
    options.budget_tokens = 512;
    sampling.temperature = 0;
    sampling.max_tokens = 32;

    kvs_status status = argc < 3 ? KVS_EINVAL : kvs_model_open(argv[1], NULL, &model, &err);
    if (status == KVS_OK)
        status = kvs_session_create(model, &options, &session, &err);
    for (int i = 2; status == KVS_OK && i < argc; i++) { /* each argument is one turn of the same conversation */
        status = kvs_chat_turn(session, argv[i], NULL, &sampling, on_token, stdout, NULL, &err);
        putchar('\n');
    }
    if (status != KVS_OK)
        fprintf(stderr, "embed: %s\n", argc < 3 ? "usage: embed MODEL TURN..." : err.message);
    kvs_session_free(&session);
    kvs_model_close(&model);
    return status == KVS_OK ? 0 : 1;
}

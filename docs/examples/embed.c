/* Kvasir in another program: a conversation inside a hard cap of 512 cached tokens, each argument one turn of it.
 *   cc embed.c $(pkg-config --cflags --libs kvasir) && ./a.out model.gguf "Name three rivers." "And two lakes?" */
#include <kvasir.h>
#include <stdio.h>

static bool on_token(void *out, int32_t token, const char *bytes, size_t n_bytes)
{
    return token >= 0 && fwrite(bytes, 1, n_bytes, out) == n_bytes; /* false stops the answer */
}

int main(int argc, char **argv)
{
    kvs_model *model = NULL;
    kvs_session *session = NULL;
    kvs_error err = {.message = "usage: embed MODEL TURN..."};
    kvs_session_options options;
    kvs_session_options_default(&options);
    options.policy = "streaming";
    options.budget_tokens = 512;
    kvs_status status = argc < 3 ? KVS_EINVAL : kvs_model_open(argv[1], NULL, &model, &err);
    if (status == KVS_OK)
        status = kvs_session_create(model, &options, &session, &err);
    for (int i = 2; status == KVS_OK && i < argc; i++)
        status = kvs_chat_turn(session, argv[i], NULL, NULL, on_token, stdout, NULL, &err);
    fprintf(status == KVS_OK ? stdout : stderr, "%s\n", status == KVS_OK ? "" : err.message);
    kvs_session_free(&session);
    kvs_model_close(&model);
    return status == KVS_OK ? 0 : 1;
}

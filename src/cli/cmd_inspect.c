/* kvasir inspect: what a model, a saved session or a bench output folder holds; told apart by their first bytes. */
#include "cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int print_object(const kvs_cli_args *args, json_t *o)
{
    if (args->json)
        return kvs_cli_print_json(o);
    const char *name;
    json_t *value;
    json_object_foreach (o, name, value) {
        if (json_is_string(value)) {
            printf("%-20s %s\n", name, json_string_value(value));
        } else if (json_is_real(value)) {
            printf("%-20s %.6g\n", name, json_real_value(value));
        } else {
            char *const text = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY);
            printf("%-20s %s\n", name, text != NULL ? text : "-");
            free(text);
        }
    }
    json_decref(o);
    return KVS_EXIT_OK;
}

static int inspect_model(const kvs_cli_args *args, const char *path)
{
    kvs_error err = {0};
    kvs_model *m = NULL;
    kvs_model_options opt;
    kvs_model_options_default(&opt);
    opt.vocab_only = true;
    if (kvs_model_open(path, &opt, &m, &err) != KVS_OK)
        return kvs_cli_report(args, &err);
    kvs_model_info i;
    kvs_model_get_info(m, &i);
    json_t *const o = json_object();
    kvs_cli_set_text(o, "kind", "model");
    kvs_cli_set_text(o, "path", i.path);
    kvs_cli_set_text(o, "name", i.name);
    kvs_cli_set_text(o, "arch", i.arch);
    kvs_cli_set_int(o, "n_params", i.n_params);
    kvs_cli_set_int(o, "weight_bytes", i.weight_bytes);
    kvs_cli_set_int(o, "n_layers", i.n_layers);
    kvs_cli_set_int(o, "n_heads", i.n_heads);
    kvs_cli_set_int(o, "n_kv_heads", i.n_kv_heads);
    kvs_cli_set_int(o, "head_dim", i.head_dim);
    kvs_cli_set_int(o, "n_embd", i.n_embd);
    kvs_cli_set_int(o, "n_ff", i.n_ff);
    kvs_cli_set_int(o, "vocab_size", i.vocab_size);
    kvs_cli_set_int(o, "window_tokens", i.window_tokens);
    kvs_cli_set_real(o, "rope_base", i.rope_base);
    const uint64_t token_bytes = 2ull * 2 * i.n_layers * i.n_kv_heads * i.head_dim; /* K and V, two bytes each */
    kvs_cli_set_int(o, "kv_bytes_per_token_f16", token_bytes);
    kvs_cli_set_int(o, "kv_bytes_of_window_f16", token_bytes * i.window_tokens);
    const int code = print_object(args, o);
    kvs_model_close(&m);
    return code;
}

static int inspect_session(const kvs_cli_args *args, const char *path)
{
    kvs_error err = {0};
    kvs_cli_snapshot h;
    if (kvs_cli_snapshot_head(path, &h, &err) != KVS_OK)
        return kvs_cli_report(args, &err);
    json_t *const o = json_object();
    kvs_cli_set_text(o, "kind", "session");
    kvs_cli_set_text(o, "policy", h.policy);
    kvs_cli_set_text(o, "position", h.position[0] != '\0' ? h.position : "the policy's own");
    kvs_cli_set_int(o, "budget_bytes", h.budget.bytes);
    kvs_cli_set_int(o, "budget_tokens", h.budget.tokens);
    kvs_cli_set_text(o, "kv_type", h.kv_f32 ? "f32" : "f16");
    kvs_cli_set_text(o, "arith", h.arith_f32 ? "f32" : "native");
    kvs_cli_set_int(o, "n_tokens", h.n_tokens);
    kvs_cli_set_int(o, "body_bytes", h.body_bytes);
    kvs_cli_set_text(o, "model_sha256", h.model_sha256);
    return print_object(args, o);
}

static int inspect_folder(const kvs_cli_args *args, const char *dir)
{
    char path[4200];
    json_error_t at;
    snprintf(path, sizeof path, "%s/manifest.json", dir);
    json_t *const manifest = json_load_file(path, 0, &at);
    if (!json_is_object(manifest)) {
        json_decref(manifest);
        return kvs_cli_failure("%s is not a bench output folder: %s: %s", dir, path, at.text);
    }
    json_t *const o = json_object();
    kvs_cli_set_text(o, "kind", "bench");
    if (args->json) {
        json_object_update_missing(o, manifest);
    } else {
        const char *name;
        json_t *value;
        json_object_foreach (manifest, name, value) {
            /* lists of hundreds of runs are for --json */
            if (json_is_array(value))
                kvs_cli_set_int(o, name, json_array_size(value));
            else
                json_object_set(o, name, value);
        }
    }
    json_decref(manifest);
    return print_object(args, o);
}

int kvs_cmd_inspect(const kvs_cli_args *args)
{
    const char *const path = args->operands[0];
    struct stat file;
    if (stat(path, &file) != 0)
        return kvs_cli_failure("cannot read %s: %s", path, strerror(errno));
    if (S_ISDIR(file.st_mode))
        return inspect_folder(args, path);
    FILE *const f = fopen(path, "rb");
    if (f == NULL)
        return kvs_cli_failure("cannot read %s: %s", path, strerror(errno));
    char head[8] = "";
    const size_t n = fread(head, 1, sizeof head, f);
    fclose(f);
    if (n == sizeof head && memcmp(head, "KVASIR1 ", 8) == 0)
        return inspect_session(args, path);
    if (n >= 4 && memcmp(head, "GGUF", 4) == 0)
        return inspect_model(args, path);
    return kvs_cli_failure("%s is neither a GGUF model, nor a saved session, nor a bench output folder", path);
}

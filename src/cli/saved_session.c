/* A saved session: one line of JSON with what is needed to open it again, then the library's own snapshot.
 *
 *   "KVASIR1 " + decimal bytes of the JSON + "\n" + JSON + "\n" + body
 * The body is checked by kvs_session_load; the head only says how to create the session it goes into.
 */
#include "cli/cli.h"
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

static const char magic[] = "KVASIR1 ";

static json_t *head_json(kvs_model *m, const kvs_session *s, const kvs_session_options *opt, size_t body_bytes)
{
    json_t *const o = json_object();
    kvs_cli_set_text(o, "policy", opt->policy != NULL ? opt->policy : "baseline");
    kvs_cli_set_text(o, "position", opt->position != NULL ? opt->position : "");
    kvs_cli_set_int(o, "budget_bytes", opt->budget_bytes);
    kvs_cli_set_int(o, "budget_tokens", opt->budget_tokens);
    kvs_cli_set_text(o, "kv_type", opt->kv_type == KVS_KV_F32 ? "f32" : "f16");
    kvs_cli_set_text(o, "arith", opt->arith == KVS_ARITH_F32 ? "f32" : "native");
    json_object_set_new(o, "prefill_full", json_boolean(opt->prefill_full));
    json_object_set_new(o, "paper_compat", json_boolean(opt->paper_compat));
    kvs_cli_set_text(o, "ffn_skip", kvs_session_ffn_skip(s));
    char seed[24];
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)opt->seed);
    kvs_cli_set_text(o, "seed", seed); /* JSON integers end at 2^63 */
    kvs_cli_set_int(o, "n_tokens", kvs_session_n_tokens(s));
    kvs_cli_set_text(o, "model_sha256", kvs_model_sha256(m));
    kvs_cli_set_int(o, "body_bytes", body_bytes);
    return o;
}

kvs_status kvs_cli_snapshot_save(const char *path, kvs_model *m, const kvs_session *s, const kvs_session_options *opt,
                                 kvs_error *err)
{
    size_t body_bytes = 0;
    KVS_TRY(kvs_session_save(s, NULL, 0, &body_bytes, err));
    char *const body = malloc(body_bytes + 1);
    json_t *const object = head_json(m, s, opt, body_bytes);
    char *const text = json_dumps(object, JSON_COMPACT);
    json_decref(object);
    kvs_status status = KVS_OK;
    if (body == NULL || text == NULL)
        status = kvs_error_set(err, KVS_ENOMEM, "no memory for a snapshot of %zu bytes", body_bytes);
    if (status == KVS_OK)
        status = kvs_session_save(s, body, body_bytes, &body_bytes, err);
    if (status == KVS_OK) {
        char head[4096];
        const int n = snprintf(head, sizeof head, "%s%zu\n%s\n", magic, strlen(text), text);
        status = n > 0 && (size_t)n < sizeof head
                     ? kvs_cli_write_file(path, head, (size_t)n, body, body_bytes, err)
                     : kvs_error_set(err, KVS_EINVAL, "the policy spec is too long to be saved");
    }
    free(text);
    free(body);
    return status;
}

static bool copy_text(json_t *object, const char *name, char *out, size_t cap_bytes)
{
    const char *const value = json_string_value(json_object_get(object, name));
    if (value == NULL || strlen(value) >= cap_bytes)
        return false;
    strcpy(out, value);
    return true;
}

static kvs_status read_head(const char *path, FILE *f, kvs_cli_snapshot *out, kvs_error *err)
{
    char line[64], text[4096];
    const size_t n_magic = sizeof magic - 1;
    *out = (kvs_cli_snapshot){0};
    if (fgets(line, sizeof line, f) == NULL || strncmp(line, magic, n_magic) != 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s is not a saved session: it does not begin with %s", path, magic);
    const long n_bytes = strtol(line + n_magic, NULL, 10);
    if (n_bytes < 2 || (size_t)n_bytes >= sizeof text || fread(text, 1, (size_t)n_bytes, f) != (size_t)n_bytes ||
        fgetc(f) != '\n')
        return kvs_error_set(err, KVS_EFORMAT, "%s is a saved session whose head is truncated", path);
    json_t *const o = json_loadb(text, (size_t)n_bytes, 0, NULL);
    char kv_type[8], arith[8], seed[24];
    const bool good = copy_text(o, "policy", out->policy, sizeof out->policy) &&
                      copy_text(o, "position", out->position, sizeof out->position) &&
                      copy_text(o, "model_sha256", out->model_sha256, sizeof out->model_sha256) &&
                      copy_text(o, "kv_type", kv_type, sizeof kv_type) && copy_text(o, "arith", arith, sizeof arith) &&
                      copy_text(o, "seed", seed, sizeof seed);
    if (good) {
        copy_text(o, "ffn_skip", out->ffn_skip, sizeof out->ffn_skip);
        out->budget.bytes = (uint64_t)json_integer_value(json_object_get(o, "budget_bytes"));
        out->budget.tokens = (uint32_t)json_integer_value(json_object_get(o, "budget_tokens"));
        out->kv_f32 = strcmp(kv_type, "f32") == 0;
        out->arith_f32 = strcmp(arith, "f32") == 0;
        out->prefill_full = json_is_true(json_object_get(o, "prefill_full"));
        out->paper_compat = json_is_true(json_object_get(o, "paper_compat"));
        out->seed = strtoull(seed, NULL, 10);
        out->n_tokens = (uint64_t)json_integer_value(json_object_get(o, "n_tokens"));
        out->body_bytes = (uint64_t)json_integer_value(json_object_get(o, "body_bytes"));
    }
    json_decref(o);
    return good ? KVS_OK : kvs_error_set(err, KVS_EFORMAT, "%s is a saved session whose head lacks a field", path);
}

kvs_status kvs_cli_snapshot_head(const char *path, kvs_cli_snapshot *out, kvs_error *err)
{
    FILE *const f = fopen(path, "rb");
    if (f == NULL)
        return kvs_error_set(err, KVS_EIO, "cannot read %s", path);
    const kvs_status status = read_head(path, f, out, err);
    fclose(f);
    return status;
}

static void options_of_head(const kvs_cli_snapshot *head, kvs_session_options *opt)
{
    kvs_session_options_default(opt);
    opt->policy = head->policy;
    opt->position = head->position[0] != '\0' ? head->position : NULL;
    opt->budget_bytes = head->budget.bytes;
    opt->budget_tokens = head->budget.tokens;
    opt->kv_type = head->kv_f32 ? KVS_KV_F32 : KVS_KV_F16;
    opt->arith = head->arith_f32 ? KVS_ARITH_F32 : KVS_ARITH_NATIVE;
    opt->prefill_full = head->prefill_full;
    opt->paper_compat = head->paper_compat;
    opt->ffn_skip = head->ffn_skip[0] != '\0' ? head->ffn_skip : NULL;
    opt->seed = head->seed;
}

kvs_status kvs_cli_snapshot_load(const char *path, kvs_model *m, kvs_cli_snapshot *head, kvs_session_options *opt,
                                 kvs_session **out, kvs_error *err)
{
    char *bytes;
    size_t n_bytes;
    *out = NULL;
    KVS_TRY(kvs_cli_snapshot_head(path, head, err));
    if (strcmp(head->model_sha256, kvs_model_sha256(m)) != 0)
        return kvs_error_set(err, KVS_EFORMAT,
                             "%s was saved with another model (sha256 %.12s..., this one has %.12s...)", path,
                             head->model_sha256, kvs_model_sha256(m));
    KVS_TRY(kvs_cli_read_file(path, &bytes, &n_bytes, err));
    kvs_status status;
    if (head->body_bytes > n_bytes) {
        status = kvs_error_set(err, KVS_EFORMAT, "%s is truncated: %zu bytes, its body alone has %llu", path, n_bytes,
                               (unsigned long long)head->body_bytes);
    } else {
        options_of_head(head, opt);
        status = kvs_session_create(m, opt, out, err);
        if (status == KVS_OK)
            status = kvs_session_load(*out, bytes + (n_bytes - head->body_bytes), head->body_bytes, err);
        if (status != KVS_OK && *out != NULL)
            kvs_session_free(out);
    }
    free(bytes);
    return status;
}

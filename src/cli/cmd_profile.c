/* kvasir profile: measures a model's heads and layers on texts (eval/profile.h) and writes the file that budget stages
 * read (policy/profile.h). */
#include "cli/cli.h"

#include "eval/profile.h"
#include "model/model.h"

#include <math.h>
#include <sha256.h>
#include <stdlib.h>
#include <string.h>

typedef struct text {
    int32_t *tokens;
    size_t n_tokens;
    char sha256[SHA256_DIGEST_STRING_LENGTH]; /* of the file */
} text;

typedef struct texts {
    text items[KVS_CLI_LIST_MAX];
    kvs_profile_text views[KVS_CLI_LIST_MAX];
    uint32_t n;
} texts;

static kvs_status tokenise(const kvs_model *m, const char *path, const char *bytes, size_t n_bytes, uint32_t cap,
                           text *out, kvs_error *err)
{
    out->tokens = calloc(n_bytes + 8, sizeof *out->tokens); /* a token is a byte at least, and a BOS */
    if (out->tokens == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %s", path);
    kvs_error cause = {0};
    const kvs_status status =
        kvs_tokenize(m, bytes, n_bytes, true, false, out->tokens, n_bytes + 8, &out->n_tokens, &cause);
    if (status != KVS_OK)
        return kvs_error_set(err, status, "%s: %s", path, cause.message);
    if (out->n_tokens < 2)
        return kvs_error_set(err, KVS_EINVAL, "%s has %zu tokens; 2 at least are needed", path, out->n_tokens);
    out->n_tokens = out->n_tokens < cap ? out->n_tokens : cap;
    return KVS_OK;
}

static kvs_status read_texts(const kvs_cli_args *args, const kvs_model *m, texts *out, kvs_error *err)
{
    kvs_model_info info;
    kvs_model_get_info(m, &info);
    const uint32_t cap = args->text_tokens != 0 ? args->text_tokens : info.window_tokens;
    for (; out->n < args->texts.n; out->n++) {
        text *const t = &out->items[out->n];
        char *bytes;
        size_t n_bytes;
        KVS_TRY(kvs_cli_read_file(args->texts.items[out->n], &bytes, &n_bytes, err));
        SHA256Data((const uint8_t *)bytes, n_bytes, t->sha256);
        const kvs_status status = tokenise(m, args->texts.items[out->n], bytes, n_bytes, cap, t, err);
        free(bytes);
        if (status != KVS_OK) {
            free(t->tokens);
            return status;
        }
        out->views[out->n] = (kvs_profile_text){t->tokens, (uint32_t)t->n_tokens};
    }
    return KVS_OK;
}

/* ---- the file --------------------------------------------------------------------------------------------------- */

static json_t *list_of(const double *x, uint32_t n)
{
    json_t *const list = json_array();
    for (uint32_t i = 0; i < n; i++)
        json_array_append_new(list, json_real(x[i]));
    return list;
}

static json_t *table_of(const double *x, uint32_t n_layers, uint32_t n_kv_heads)
{
    json_t *const table = json_array();
    for (uint32_t l = 0; l < n_layers; l++)
        json_array_append_new(table, list_of(x + (size_t)l * n_kv_heads, n_kv_heads));
    return table;
}

static json_t *tables_of(const kvs_profile_made *p)
{
    if (p->n_tables == 1)
        return table_of(p->heads, p->n_layers, p->n_kv_heads);
    json_t *const list = json_array();
    for (uint32_t t = 0; t < p->n_tables; t++)
        json_array_append_new(list,
                              table_of(p->heads + (size_t)t * p->n_layers * p->n_kv_heads, p->n_layers, p->n_kv_heads));
    return list;
}

/* Where the numbers come from, so that anyone can make them again. */
static void set_origin(json_t *o, const kvs_cli_args *args, const kvs_model_info *info, const texts *t)
{
    const char *const slash = strrchr(info->path, '/');
    kvs_cli_set_text(o, "model", slash != NULL ? slash + 1 : info->path);
    kvs_cli_set_text(o, "made_by", kvs_version());
    kvs_cli_set_text(o, "arith", args->arith != NULL ? args->arith : "f32");
    json_t *const list = json_array();
    for (uint32_t i = 0; i < t->n; i++) {
        json_t *const x = json_object();
        const char *const name = args->texts.items[i], *const end = strrchr(name, '/');
        kvs_cli_set_text(x, "text", end != NULL ? end + 1 : name);
        kvs_cli_set_text(x, "sha256", t->items[i].sha256);
        kvs_cli_set_int(x, "n_tokens", t->items[i].n_tokens);
        json_array_append_new(list, x);
    }
    json_object_set_new(o, "texts", list);
}

static void set_search(json_t *o, const kvs_profile_made *p)
{
    kvs_cli_set_int(o, "budget_tokens", p->budget_tokens);
    kvs_cli_set_int(o, "n_tried", p->n_tried);
    kvs_cli_set_real(o, "low", p->low);
    kvs_cli_set_real(o, "few", p->few);
    kvs_cli_set_real(o, "high", p->high);
    kvs_cli_set_real(o, "many", p->many);
    kvs_cli_set_real(o, "ppl_even", exp(p->nll_even));
    kvs_cli_set_real(o, "ppl", exp(p->nll_chosen));
    kvs_cli_set_real(o, "held_out_ppl_even", exp(p->held_nll_even));
    kvs_cli_set_real(o, "held_out_ppl", exp(p->held_nll_chosen));
}

static json_t *as_json(const kvs_cli_args *args, kvs_model *m, const texts *t, const kvs_profile_made *p)
{
    kvs_model_info info;
    kvs_model_get_info(m, &info);
    json_t *const o = json_object();
    kvs_cli_set_text(o, "kind", args->operands[0]);
    kvs_cli_set_text(o, "model_sha256", kvs_model_sha256(m));
    kvs_cli_set_int(o, "n_layers", p->n_layers);
    kvs_cli_set_int(o, "n_kv_heads", p->n_kv_heads);
    set_origin(o, args, &info, t);
    if (p->block_tokens != 0)
        kvs_cli_set_int(o, "block_tokens", p->block_tokens);
    if (p->n_tried != 0)
        set_search(o, p);
    if (p->heads != NULL)
        json_object_set_new(o, "heads", tables_of(p));
    if (p->layers != NULL)
        json_object_set_new(o, "layers", list_of(p->layers, p->n_layers));
    if (p->n_tried != 0) {
        json_object_set_new(o, "head_importance", table_of(p->head_importance, p->n_layers, p->n_kv_heads));
        json_object_set_new(o, "layer_importance", list_of(p->layer_importance, p->n_layers));
    }
    return o;
}

static kvs_status write_profile(const char *path, const json_t *o, kvs_error *err)
{
    char *const body = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(9));
    if (body == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %s", path);
    const kvs_status status = kvs_cli_write_file(path, body, strlen(body), "\n", 1, err);
    free(body);
    return status;
}

/* ---- the command ------------------------------------------------------------------------------------------------ */

static void on_progress(void *ctx, uint64_t n_done, uint64_t n_total)
{
    kvs_cli_progress_show(ctx, n_done, n_total, -1);
}

static kvs_status measure(const kvs_cli_args *args, kvs_model *m, const texts *t, kvs_profile_made *made,
                          kvs_error *err)
{
    kvs_session_options o;
    kvs_cli_session_options(args, KVS_ARITH_F32, &o);
    if (o.budget_bytes != 0)
        return kvs_error_set(err, KVS_EINVAL,
                             "--budget must be in tokens here, as 512tok: a profile is for slots a head");
    kvs_cli_progress progress;
    const kvs_profile_options opt = {.arith = o.arith,
                                     .budget_tokens = o.budget_tokens,
                                     .block_tokens = args->block_tokens,
                                     .cancel = &kvs_cli_interrupted,
                                     .on_progress = on_progress,
                                     .ctx = &progress};
    kvs_cli_progress_begin(&progress, "profile: tokens");
    const kvs_status status = kvs_eval_profile(m, args->operands[0], &opt, t->views, t->n, made, err);
    kvs_cli_progress_end(&progress);
    return status;
}

static void print_made(const kvs_cli_args *args, const kvs_profile_made *p)
{
    printf("%s: %u layers of %u KV heads, kind %s\n", args->out, p->n_layers, p->n_kv_heads, args->operands[0]);
    if (p->n_tried == 0)
        return;
    printf("perplexity at %u slots a head: %.4f with even shares, %.4f with these\n", p->budget_tokens,
           exp(p->nll_even), exp(p->nll_chosen));
    if (!isnan(p->held_nll_even))
        printf("on the text held out: %.4f and %.4f\n", exp(p->held_nll_even), exp(p->held_nll_chosen));
}

static int check_usage(const kvs_cli_args *args)
{
    if (args->texts.n == 0)
        return kvs_cli_usage_error(args->command, "needs --text FILE");
    if (args->out == NULL)
        return kvs_cli_usage_error(args->command, "needs -o FILE.json");
    const char *names[16];
    uint32_t n = 0;
    for (; n < 16 && kvs_eval_profile_kind(n) != NULL; n++) {
        names[n] = kvs_eval_profile_kind(n);
        if (strcmp(names[n], args->operands[0]) == 0)
            return 0;
    }
    const char *const near = kvs_nearest(args->operands[0], names, n);
    return kvs_cli_usage_error(args->command, "unknown kind '%s'%s%s%s", args->operands[0],
                               near != NULL ? "; did you mean '"
                                            : ": known are baklava, sensitivity, duo, kvzip-head, lukv",
                               near != NULL ? near : "", near != NULL ? "'?" : "");
}

int kvs_cmd_profile(const kvs_cli_args *args)
{
    const int usage = check_usage(args);
    if (usage != 0)
        return usage;
    kvs_error err = {0};
    kvs_model *m = NULL;
    texts t = {.n = 0};
    kvs_profile_made made = {0};
    json_t *o = NULL;
    kvs_cli_catch_interrupts();
    kvs_status status = kvs_cli_open_model(args, &m, &err);
    if (status == KVS_OK)
        status = read_texts(args, m, &t, &err);
    if (status == KVS_OK)
        status = measure(args, m, &t, &made, &err);
    if (status == KVS_OK) {
        o = as_json(args, m, &t, &made);
        status = write_profile(args->out, o, &err);
    }
    int code = KVS_EXIT_OK;
    if (status != KVS_OK)
        code = kvs_cli_report(args, &err);
    else if (args->json)
        code = kvs_cli_print_json(json_incref(o));
    else
        print_made(args, &made);
    if (kvs_cli_interrupted && status == KVS_ECANCELLED)
        code = KVS_EXIT_INTERRUPTED;
    json_decref(o);
    kvs_profile_made_free(&made);
    for (uint32_t i = 0; i < t.n; i++)
        free(t.items[i].tokens);
    kvs_model_close(&m);
    return code;
}

/* kvasir bench: hands the options to the runner (bench/runner.h), then prints the claims and where the report is. */
#include "cli/cli.h"

#include "bench/runner.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void on_progress(void *ctx, const char *stage, uint64_t done, uint64_t total, double seconds_left)
{
    kvs_cli_progress *const p = ctx;
    p->label = stage;
    kvs_cli_progress_show(p, done, total, seconds_left);
}

/* The command as it could be typed again, without the program's own path. */
static void command_line(const kvs_cli_args *args, const char *out_dir, char *text, size_t cap_bytes)
{
    size_t n = (size_t)snprintf(text, cap_bytes, "kvasir bench --suite %s --out %s",
                                args->suite != NULL ? args->suite : "demo", out_dir);
    const struct {
        const char *name;
        const kvs_cli_list *list;
    } lists[] = {{"policy", &args->policies}, {"budget", &args->budgets}, {"position", &args->positions}};
    for (size_t i = 0; i < 3; i++)
        for (uint32_t k = 0; k < lists[i].list->n && n < cap_bytes; k++)
            n += (size_t)snprintf(text + n, cap_bytes - n, " --%s '%s'", lists[i].name, lists[i].list->items[k]);
    const struct {
        const char *name, *value;
    } words[] = {{"data", args->data},       {"profiles", args->profiles}, {"shard", args->shard},
                 {"kv-type", args->kv_type}, {"arith", args->arith},       {"cpu-mask", args->cpu_mask}};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (words[i].value != NULL && n < cap_bytes)
            n += (size_t)snprintf(text + n, cap_bytes - n, " --%s '%s'", words[i].name, words[i].value);
    if (args->n_dialogues > 0 && n < cap_bytes)
        n += (size_t)snprintf(text + n, cap_bytes - n, " --dialogues %u", args->n_dialogues);
    if (n < cap_bytes)
        snprintf(text + n, cap_bytes - n, "%s%s --seed %llu", args->paper_compat ? " --paper-compat" : "",
                 args->free_running ? " --free-running" : "", (unsigned long long)args->seed);
}

static int parse_shard(const kvs_cli_args *args, kvs_bench_options *opt)
{
    opt->shard_count = 1;
    if (args->shard == NULL)
        return 0;
    unsigned index, count;
    char rest;
    if (strspn(args->shard, "0123456789/") != strlen(args->shard) ||
        sscanf(args->shard, "%9u/%9u%c", &index, &count, &rest) != 2 || count == 0 || index >= count)
        return kvs_cli_usage_error(args->command, "--shard: '%s' is not I/N with I from 0 to N - 1", args->shard);
    opt->shard_index = index;
    opt->shard_count = count;
    return 0;
}

/* "confirmed", true or 0.3, as text. */
static void value_text(json_t *v, char *text, size_t cap_bytes)
{
    if (json_is_string(v))
        snprintf(text, cap_bytes, "%s", json_string_value(v));
    else if (json_is_integer(v))
        snprintf(text, cap_bytes, "%lld", (long long)json_integer_value(v));
    else if (json_is_real(v))
        snprintf(text, cap_bytes, "%.4g", json_real_value(v));
    else if (json_is_boolean(v))
        snprintf(text, cap_bytes, "%s", json_is_true(v) ? "true" : "false");
    else
        snprintf(text, cap_bytes, "-");
}

static void number_text(const json_t *value, char *text, size_t cap_bytes)
{
    if (json_is_number(value))
        snprintf(text, cap_bytes, "%.4g", json_number_value(value));
    else
        snprintf(text, cap_bytes, "-");
}

/* One block a claim: verdict, number with its interval against the threshold, what stands beside it. */
static void print_claims(json_t *claims)
{
    size_t i, k;
    json_t *claim, *detail;
    printf("%lld dialogues%s\n", (long long)json_integer_value(json_object_get(claims, "n_dialogues")),
           json_is_true(json_object_get(claims, "preliminary")) ? ": PRELIMINARY, verdicts need 30" : "");
    json_array_foreach (json_object_get(claims, "claims"), i, claim) {
        char id[32], verdict[32], leaning[32], unit[120], text[400], value[32], low[32], high[32], threshold[32];
        value_text(json_object_get(claim, "id"), id, sizeof id);
        value_text(json_object_get(claim, "verdict"), verdict, sizeof verdict);
        value_text(json_object_get(claim, "leaning"), leaning, sizeof leaning);
        value_text(json_object_get(claim, "unit"), unit, sizeof unit);
        value_text(json_object_get(claim, "statement"), text, sizeof text);
        number_text(json_object_get(claim, "estimate"), value, sizeof value);
        number_text(json_object_get(claim, "ci_low"), low, sizeof low);
        number_text(json_object_get(claim, "ci_high"), high, sizeof high);
        number_text(json_object_get(claim, "threshold"), threshold, sizeof threshold);
        const bool leans = json_is_string(json_object_get(claim, "leaning")) && strcmp(verdict, "PRELIMINARY") == 0;
        printf("\n%-4s %s%s%s%s  %s\n", id, verdict, leans ? " (leaning " : "", leans ? leaning : "", leans ? ")" : "",
               text);
        printf("     %s [%s, %s], threshold %s, n = %lld: %s\n", value, low, high, threshold,
               (long long)json_integer_value(json_object_get(claim, "n")), unit);
        json_array_foreach (json_object_get(claim, "detail"), k, detail) {
            char name[200];
            value_text(json_object_get(detail, "name"), name, sizeof name);
            number_text(json_object_get(detail, "value"), value, sizeof value);
            number_text(json_object_get(detail, "ci_low"), low, sizeof low);
            number_text(json_object_get(detail, "ci_high"), high, sizeof high);
            printf("       %-9s [%s, %s]  %s\n", value, low, high, name);
        }
    }
}

static int print_results(const kvs_cli_args *args, const char *out_dir)
{
    char path[4200];
    json_error_t at;
    snprintf(path, sizeof path, "%s/claims.json", out_dir);
    json_t *const claims = json_load_file(path, 0, &at);
    if (claims == NULL)
        return kvs_cli_failure("%s, line %d: %s", path, at.line, at.text);
    snprintf(path, sizeof path, "%s/report.html", out_dir);
    if (args->json) {
        json_t *const o = json_object();
        kvs_cli_set_text(o, "out", out_dir);
        kvs_cli_set_text(o, "report", path);
        json_object_update_missing(o, claims);
        json_decref(claims);
        return kvs_cli_print_json(o);
    }
    print_claims(claims);
    json_decref(claims);
    printf("\nreport: %s\n", path);
    return KVS_EXIT_OK;
}

/* --data, else the real dialogues where KVASIR_DATA has them, else NULL: the embedded ones. */
static const char *data_path(const char *given)
{
    static char path[4096];
    const char *const root = getenv("KVASIR_DATA");
    if (given != NULL || root == NULL || root[0] == '\0')
        return given;
    snprintf(path, sizeof path, "%s/sharegpt_subset", root);
    return access(path, R_OK) == 0 ? path : NULL;
}

int kvs_cmd_bench(const kvs_cli_args *args)
{
    kvs_error err = {0};
    char model_path[4096], out_dir[4096], line[8192];
    kvs_bench_options opt = {.suite = args->suite != NULL ? args->suite : "demo",
                             .data_path = data_path(args->data),
                             .out_dir = out_dir,
                             .model_path = model_path,
                             .kv_type = args->kv_type != NULL ? args->kv_type : "f16",
                             .arith = args->arith != NULL ? args->arith : "f32",
                             .command_line = line,
                             .profiles_dir = args->profiles,
                             .policies = args->policies.items,
                             .n_policies = args->policies.n,
                             .budgets = args->budgets.items,
                             .n_budgets = args->budgets.n,
                             .positions = args->positions.items,
                             .n_positions = args->positions.n,
                             .n_dialogues = args->n_dialogues,
                             .resume = args->resume,
                             .paper_compat = args->paper_compat,
                             .free_running = args->free_running,
                             .seed = args->seed,
                             .n_threads = args->threads,
                             .cpu_mask = kvs_cli_cpu_bits(args),
                             .on_progress = on_progress,
                             .cancel = &kvs_cli_interrupted};
    int code = parse_shard(args, &opt);
    if (code != 0)
        return code;
    if (args->out != NULL)
        snprintf(out_dir, sizeof out_dir, "%s", args->out);
    else
        snprintf(out_dir, sizeof out_dir, "kvasir-bench-%s", opt.suite);
    command_line(args, out_dir, line, sizeof line);
    if (kvs_cli_model_path(args, model_path, sizeof model_path, &err) != KVS_OK)
        return kvs_cli_report(args, &err);
    kvs_cli_progress progress;
    kvs_cli_progress_begin(&progress, "bench");
    opt.ctx = &progress;
    kvs_cli_catch_interrupts();
    const kvs_status status = kvs_bench_run(&opt, &err);
    kvs_cli_progress_end(&progress);
    if (status == KVS_ECANCELLED) {
        fprintf(stderr, "kvasir bench: stopped; what is done is in %s, and the same command with --resume goes on\n",
                out_dir);
        return KVS_EXIT_INTERRUPTED;
    }
    if (status != KVS_OK)
        return kvs_cli_report(args, &err);
    return print_results(args, out_dir);
}

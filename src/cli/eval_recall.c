/* kvasir eval --recall: planted facts (bench/play_recall.c), asked about under policies and under episodes, side by side
 * at equal budgets. */
#include "cli/cli.h"

#include "bench/play.h"
#include "policy/policy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { FACTS = 8, HISTORY_TOKENS = 2000 };

typedef struct tally {
    uint32_t n_asked, n_correct, n_failed;
    double margin, survival;
    uint64_t kv_bytes_peak;
    char failure[200];
} tally;

typedef struct recall {
    const kvs_cli_args *args;
    kvs_bench_run_spec runs[KVS_BENCH_RUNS_MAX];
    tally tallies[KVS_BENCH_RUNS_MAX];
    uint32_t n_runs;
    float *sensitivity; /* of --episodes; NULL: layers share alike */
    kvs_cli_progress progress;
} recall;

static kvs_bench_run_spec *add_run(recall *r, const char *name, const char *budget, kvs_error *err)
{
    if (r->n_runs == KVS_BENCH_RUNS_MAX) {
        kvs_error_set(err, KVS_EINVAL, "policies, episodes and budgets come to more than %d runs", KVS_BENCH_RUNS_MAX);
        return NULL;
    }
    kvs_bench_run_spec *const spec = &r->runs[r->n_runs++];
    kvs_cli_size size = {0};
    *spec = (kvs_bench_run_spec){0};
    if (budget != NULL && kvs_cli_parse_size(budget, &size, err) != KVS_OK)
        return NULL;
    spec->budget_bytes = size.bytes;
    spec->budget_tokens = size.tokens;
    snprintf(spec->id, sizeof spec->id, "%.120s%s%.30s", name, budget != NULL ? "/" : "", budget != NULL ? budget : "");
    return spec;
}

static kvs_status add_policy(recall *r, const char *policy, const char *position, const char *budget, kvs_error *err)
{
    kvs_bench_run_spec *const spec = add_run(r, policy, budget, err);
    if (spec == NULL)
        return KVS_EINVAL;
    snprintf(spec->policy, sizeof spec->policy, "%s", policy);
    snprintf(spec->position, sizeof spec->position, "%s", position);
    return KVS_OK;
}

static kvs_status add_episodes(recall *r, uint32_t k, const char *budget, kvs_error *err)
{
    char name[64];
    snprintf(name, sizeof name, "%u episode%s%s%s", k, k > 1 ? "s" : "", r->args->uniform_heads ? ", uniform" : "",
             r->sensitivity != NULL ? ", sensitivity" : "");
    kvs_bench_run_spec *const spec = add_run(r, name, budget, err);
    if (spec == NULL)
        return KVS_EINVAL;
    snprintf(spec->position, sizeof spec->position, "keep");
    spec->n_episodes = k;
    spec->uniform_heads = r->args->uniform_heads;
    spec->sensitivity = r->sensitivity;
    return KVS_OK;
}

/* The full cache, then every policy and every number of episodes at every budget. A policy's own position mode, unless
 * one is given. */
static kvs_status make_runs(recall *r, kvs_error *err)
{
    const kvs_cli_args *const a = r->args;
    KVS_TRY(add_policy(r, "baseline", "keep", NULL, err));
    r->runs[0].is_reference = true;
    for (uint32_t b = 0; b < a->budgets.n; b++) {
        for (uint32_t p = 0; p < a->policies.n; p++) {
            kvs_policy policy;
            const char *const position = kvs_cli_last(&a->positions, NULL);
            KVS_TRY(kvs_policy_parse(a->policies.items[p], position, false, &policy, err));
            char own[24];
            snprintf(own, sizeof own, policy.position == KVS_POSITION_GAPCAP ? "%s:%d" : "%s",
                     kvs_position_name(policy.position), policy.gap_cap);
            KVS_TRY(add_policy(r, a->policies.items[p], own, a->budgets.items[b], err));
        }
        for (uint32_t k = 0; k < a->episodes.n; k++)
            KVS_TRY(add_episodes(r, a->episodes.items[k], a->budgets.items[b], err));
    }
    return KVS_OK;
}

/* ---- counting --------------------------------------------------------------------------------------------------- */

static tally *tally_of(recall *r, const char *id)
{
    for (uint32_t i = 0; i < r->n_runs; i++)
        if (id != NULL && strcmp(r->runs[i].id, id) == 0)
            return &r->tallies[i];
    return NULL;
}

static void count(recall *r, const json_t *part)
{
    size_t i;
    const json_t *row;
    json_array_foreach (json_object_get(part, "recall"), i, row) {
        tally *const t = tally_of(r, json_string_value(json_object_get(row, "run")));
        const json_t *const correct = json_object_get(row, "correct");
        if (t == NULL)
            continue;
        t->n_asked++;
        if (!json_is_boolean(correct)) {
            const char *const why = json_string_value(json_object_get(row, "failure"));
            t->n_failed++;
            snprintf(t->failure, sizeof t->failure, "%s", why != NULL ? why : "");
            continue;
        }
        t->n_correct += json_is_true(correct);
        t->margin += json_number_value(json_object_get(row, "margin"));
        t->survival += json_number_value(json_object_get(row, "survival"));
    }
    for (uint32_t k = 0; k < r->n_runs; k++) {
        const json_t *const peak = json_object_get(json_object_get(part, "kv_bytes_peak"), r->runs[k].id);
        if (json_is_integer(peak) && (uint64_t)json_integer_value(peak) > r->tallies[k].kv_bytes_peak)
            r->tallies[k].kv_bytes_peak = (uint64_t)json_integer_value(peak);
    }
}

static json_t *results_of(const recall *r, uint32_t n_dialogues, uint32_t history_tokens)
{
    json_t *const o = json_object(), *const runs = json_array();
    kvs_cli_set_int(o, "n_dialogues", n_dialogues);
    kvs_cli_set_int(o, "history_tokens", history_tokens);
    for (uint32_t i = 0; i < r->n_runs; i++) {
        const tally *const t = &r->tallies[i];
        const uint32_t n = t->n_asked - t->n_failed;
        json_t *const row = json_object();
        kvs_cli_set_text(row, "run", r->runs[i].id);
        kvs_cli_set_int(row, "n_questions", t->n_asked);
        kvs_cli_set_int(row, "n_correct", t->n_correct);
        kvs_cli_set_int(row, "n_failed", t->n_failed);
        kvs_cli_set_real(row, "margin", n > 0 ? t->margin / n : NAN);
        kvs_cli_set_real(row, "survival", n > 0 ? t->survival / n : NAN);
        kvs_cli_set_int(row, "kv_bytes_peak", t->kv_bytes_peak);
        kvs_cli_set_text(row, "failure", t->n_failed > 0 ? t->failure : NULL);
        json_array_append_new(runs, row);
    }
    json_object_set_new(o, "runs", runs);
    return o;
}

static int print_table(json_t *o)
{
    size_t i;
    const json_t *row;
    printf("%-44s %9s %8s %9s %10s\n", "run", "correct", "margin", "survival", "peak MiB");
    json_array_foreach (json_object_get(o, "runs"), i, row) {
        char correct[32];
        snprintf(correct, sizeof correct, "%lld/%lld", (long long)json_integer_value(json_object_get(row, "n_correct")),
                 (long long)json_integer_value(json_object_get(row, "n_questions")));
        printf("%-44.44s %9s %8.3f %9.3f %10.2f\n", json_string_value(json_object_get(row, "run")), correct,
               json_number_value(json_object_get(row, "margin")), json_number_value(json_object_get(row, "survival")),
               kvs_cli_mib((uint64_t)json_integer_value(json_object_get(row, "kv_bytes_peak"))));
        const char *const failure = json_string_value(json_object_get(row, "failure"));
        if (failure != NULL)
            printf("    %lld failed: %s\n", (long long)json_integer_value(json_object_get(row, "n_failed")), failure);
    }
    json_decref(o);
    return ferror(stdout) ? kvs_cli_failure("stdout cannot be written") : KVS_EXIT_OK;
}

/* ---- playing ---------------------------------------------------------------------------------------------------- */

static void on_progress(void *ctx, uint64_t done, uint64_t total)
{
    kvs_cli_progress_show(ctx, done, total, -1);
}

static kvs_status play_one(recall *r, const kvs_play *play, const kvs_dialogue_set *fillers, uint64_t index,
                           kvs_error *err)
{
    kvs_dialogue d;
    kvs_script script;
    json_t *part = NULL;
    KVS_TRY(kvs_recall_dialogue(play, fillers, index, &d, &script, err));
    const kvs_status status = kvs_play_recall(play, &script, &part, err);
    if (status == KVS_OK)
        count(r, part);
    json_decref(part);
    kvs_script_free(&script);
    kvs_dialogue_free(&d);
    return status;
}

static kvs_status play_all(recall *r, kvs_model *m, uint32_t history_tokens, kvs_error *err)
{
    const kvs_cli_args *const a = r->args;
    kvs_session_options so;
    kvs_cli_session_options(a, KVS_ARITH_F32, &so);
    const kvs_bench_options opt = {.seed = a->seed, .cancel = &kvs_cli_interrupted};
    const kvs_suite suite = {.trigger_tokens = history_tokens, .recall_facts = FACTS};
    const kvs_play play = {.model = m,
                           .suite = &suite,
                           .opt = &opt,
                           .runs = r->runs,
                           .n_runs = r->n_runs,
                           .arith = so.arith,
                           .kv_type = so.kv_type,
                           .progress = on_progress,
                           .ctx = &r->progress};
    kvs_dialogue_set fillers;
    KVS_TRY(a->dialogue != NULL ? kvs_dialogue_set_load(a->dialogue, &fillers, err)
                                : kvs_dialogue_set_embedded(&fillers, err));
    kvs_status status = KVS_OK;
    kvs_cli_progress_begin(&r->progress, "recall: tokens");
    for (uint32_t i = 0; i < a->n_recall && status == KVS_OK; i++)
        status = play_one(r, &play, &fillers, i, err);
    kvs_cli_progress_end(&r->progress);
    kvs_dialogue_set_free(&fillers);
    return status;
}

int kvs_eval_recall(const kvs_cli_args *args)
{
    if (args->budgets.n == 0)
        return kvs_cli_usage_error(args->command, "--recall needs --budget SIZE, which policies and episodes share");
    recall *const r = calloc(1, sizeof *r);
    if (r == NULL)
        return kvs_cli_failure("no memory for the runs");
    r->args = args;
    const uint32_t history_tokens = args->history_tokens != 0 ? args->history_tokens : HISTORY_TOKENS;
    kvs_error err = {0};
    kvs_model *m = NULL;
    kvs_status status = kvs_cli_open_model(args, &m, &err);
    if (status == KVS_OK)
        status = kvs_cli_sensitivity(args, m, &r->sensitivity, &err);
    if (status == KVS_OK)
        status = make_runs(r, &err);
    kvs_cli_catch_interrupts();
    if (status == KVS_OK)
        status = play_all(r, m, history_tokens, &err);
    int code;
    if (status == KVS_OK) {
        json_t *const results = results_of(r, args->n_recall, history_tokens);
        code = args->json ? kvs_cli_print_json(results) : print_table(results);
    } else {
        code = kvs_cli_report(args, &err);
    }
    if (status == KVS_ECANCELLED && kvs_cli_interrupted > 0)
        code = KVS_EXIT_INTERRUPTED;
    kvs_model_close(&m);
    free(r->sensitivity);
    free(r);
    return code;
}

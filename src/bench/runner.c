/* The benchmark: dialogues one after another, each finished one a part file, then the folder's files from the parts.
 * So a stop loses at most the dialogue in work, --resume goes on, and shards share a folder. */
#include "bench/runner.h"

#include "base/base.h"
#include "bench/claims.h"
#include "bench/output.h"
#include "bench/play.h"
#include "bench/report.h"
#include "model/model.h"
#include "policy/policy.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <xxhash.h>

typedef struct bench {
    const kvs_bench_options *opt;
    const kvs_suite *suite;
    kvs_suite scaled; /* the suite with what the command line changed */
    kvs_model *model;
    kvs_bench_run_spec runs[KVS_BENCH_RUNS_MAX];
    uint32_t n_runs, n_dialogues;
    kvs_dialogue_set data, dialogues;
    kvs_script *scripts; /* [n_dialogues] */
    kvs_arith arith;
    kvs_kv_type kv_type;
    char key[17]; /* of the configuration: parts of another are not reused */
    char started[32];
    json_t *parts;        /* loaded or made, in dialogue order */
    json_t *recall_parts; /* the same of dialogues with planted facts */
    /* progress */
    double *cost, cost_done, cost_total;
    uint32_t current;
    bool free_stage;
    uint64_t t0_ns;
} bench;

/* ---- set-up ---- */

static void utc_now(char out[32])
{
    const time_t now = time(NULL);
    struct tm tm;
    gmtime_r(&now, &tm);
    strftime(out, 32, "%Y-%m-%dT%H:%M:%SZ", &tm);
}

static kvs_status unknown_suite(const char *name, kvs_error *err)
{
    const char *names[8];
    size_t n = 0;
    for (const kvs_suite *s; n < 8 && (s = kvs_suite_at((uint32_t)n)) != NULL; n++)
        names[n] = s->name;
    const char *near = kvs_nearest(name, names, n);
    return kvs_error_set(err, KVS_EINVAL, "unknown suite '%s'%s%s%s: known are smoke, demo, paper, full, methods", name,
                         near ? ", did you mean '" : "", near ? near : "", near ? "'" : "");
}

static kvs_status read_options(bench *b, kvs_error *err)
{
    const kvs_bench_options *o = b->opt;
    b->suite = kvs_suite_find(o->suite != NULL ? o->suite : "demo");
    if (b->suite == NULL)
        return unknown_suite(o->suite, err);
    b->scaled = *b->suite;
    if (o->n_dialogues != 0) {
        b->scaled.n_dialogues = o->n_dialogues;
        b->scaled.n_long = kvs_min_u32(b->scaled.n_long, o->n_dialogues);
        b->scaled.n_recall = kvs_min_u32(b->scaled.n_recall, o->n_dialogues);
    }
    if (o->free_running)
        b->scaled.free_dialogues = b->scaled.n_dialogues;
    if (!b->suite->registry && o->profiles_dir != NULL)
        return kvs_error_set(err, KVS_EINVAL, "suite %s names no preset that needs a file: --profiles is for methods",
                             b->suite->name);
    if (b->suite->registry && (o->paper_compat || o->free_running))
        return kvs_error_set(err, KVS_EINVAL, "suite %s is teacher-forced and holds every policy alike: it takes no %s",
                             b->suite->name, o->paper_compat ? "--paper-compat" : "--free-running");
    if (o->shard_count > 1 && o->shard_index >= o->shard_count)
        return kvs_error_set(err, KVS_EINVAL, "shard %u of %u does not exist: they count from 0", o->shard_index,
                             o->shard_count);
    const char *arith = o->arith != NULL ? o->arith : "f32", *kv = o->kv_type != NULL ? o->kv_type : "f16";
    b->arith = strcmp(arith, "native") == 0 ? KVS_ARITH_NATIVE : KVS_ARITH_F32;
    b->kv_type = strcmp(kv, "f32") == 0 ? KVS_KV_F32 : KVS_KV_F16;
    return b->scaled.registry ? KVS_OK : kvs_suite_runs(&b->scaled, o, b->runs, &b->n_runs, err);
}

static uint32_t count_tokens(void *ctx, const char *role, const char *content)
{
    (void)role;
    const bench *b = ctx;
    int32_t one;
    size_t n = 0;
    (void)kvs_tokenize(b->model, content, strlen(content), false, false, &one, 0, &n, NULL);
    return (uint32_t)n + 5; /* role header and end marker of the template */
}

/* The first n_long dialogues are chained longer; a dialogue depends on its index and length only. */
static kvs_status make_dialogues(bench *b, kvs_error *err)
{
    const kvs_bench_options *o = b->opt;
    if (o->data_path != NULL)
        KVS_TRY(kvs_dialogue_set_load(o->data_path, &b->data, err));
    else
        KVS_TRY(kvs_dialogue_set_embedded(&b->data, err));
    kvs_extend_options e = {.target_tokens = b->scaled.target_tokens, .seed = o->seed};
    KVS_TRY(kvs_dialogue_extend(&b->data, &e, count_tokens, b, b->scaled.n_dialogues, &b->dialogues, err));
    if (b->scaled.n_long > 0) {
        kvs_dialogue_set longer = {0};
        e.target_tokens = b->scaled.long_tokens;
        KVS_TRY(kvs_dialogue_extend(&b->data, &e, count_tokens, b, b->scaled.n_long, &longer, err));
        for (uint32_t i = 0; i < b->scaled.n_long; i++) {
            const kvs_dialogue swap = b->dialogues.items[i];
            b->dialogues.items[i] = longer.items[i];
            longer.items[i] = swap;
        }
        kvs_dialogue_set_free(&longer);
    }
    b->n_dialogues = b->dialogues.n_items;
    b->scripts = calloc(b->n_dialogues, sizeof *b->scripts);
    b->cost = calloc(b->n_dialogues, sizeof *b->cost);
    if (b->scripts == NULL || b->cost == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %u dialogues", b->n_dialogues);
    for (uint32_t i = 0; i < b->n_dialogues; i++) {
        char *id = NULL; /* short and unique: the sources are in the part */
        if (asprintf(&id, "d%04u-%.60s", i, b->dialogues.items[i].id) < 0)
            return kvs_error_set(err, KVS_ENOMEM, "no memory for a dialogue's name");
        free(b->dialogues.items[i].id);
        b->dialogues.items[i].id = id;
        KVS_TRY(kvs_script_render(b->model, &b->dialogues.items[i], &b->scripts[i], err));
        if (b->scaled.registry)
            kvs_script_cut(&b->scripts[i], b->scaled.target_tokens);
    }
    return KVS_OK;
}

/* Everything a part's numbers depend on. */
static void make_key(bench *b)
{
    XXH64_state_t *h = XXH64_createState();
    XXH64_reset(h, 0);
    const char *sha = kvs_model_sha256(b->model);
    XXH64_update(h, sha, strlen(sha));
    for (uint32_t i = 0; i < b->n_runs; i++)
        XXH64_update(h, &b->runs[i], offsetof(kvs_bench_run_spec, sensitivity)); /* no suite has episodes */
    const uint64_t words[] = {
        b->opt->seed,         (uint64_t)b->arith,       (uint64_t)b->kv_type,    b->data.xxh64,
        b->opt->paper_compat, b->scaled.trigger_tokens, b->scaled.target_tokens, b->scaled.long_tokens,
        b->scaled.n_long,     b->scaled.free_turns,     b->scaled.free_tokens,   b->scaled.score_from_tokens};
    XXH64_update(h, words, sizeof words);
    snprintf(b->key, sizeof b->key, "%016llx", (unsigned long long)XXH64_digest(h));
    XXH64_freeState(h);
}

/* ---- progress ---- */

/* Rough work of a dialogue in token-runs: before the trigger two caches run, after it all of them. */
static double dialogue_cost(const bench *b, uint32_t i)
{
    const double n = b->scripts[i].n_tokens, shared = fmin(n, b->scaled.trigger_tokens);
    double cost = 2 * shared + (n - shared) * (b->n_runs + 2) * 1.3;
    if (i < b->scaled.n_long) /* two of three runs retire early */
        cost = 2 * shared + (n - shared) * (b->n_runs / 3.0 + 2) * 1.5;
    if (i < b->scaled.free_dialogues)
        cost += 0.7 * shared + (double)b->n_runs * b->scaled.free_turns * (b->scaled.free_tokens * 6.0 + 100);
    if (i < b->scaled.n_long)
        cost += fmax(0, n - 4096) / 512 * 4096;
    return cost;
}

/* Questions come soon after the trigger; each is scored by a few rows of every run. */
static double recall_cost(const bench *b)
{
    const double trigger = b->scaled.trigger_tokens, facts = b->scaled.recall_facts;
    return 2 * trigger + (0.1 * trigger + facts * 70) * (b->n_runs + 2);
}

static double forced_share(const bench *b, double done, double total)
{
    const double trigger = fmin(total, b->scaled.trigger_tokens), late = (b->n_runs + 2) * 1.3;
    const double all = 2 * trigger + (total - trigger) * late;
    return (2 * fmin(done, trigger) + fmax(0, done - trigger) * late) / all;
}

static void on_progress(void *ctx, uint64_t done, uint64_t total)
{
    bench *b = ctx;
    if (b->opt->on_progress == NULL)
        return;
    const double cost = b->cost[b->current], n = b->scripts[b->current].n_tokens;
    const double forced = forced_share(b, n, n);
    const double share = b->free_stage ? 0.75 + 0.25 * (double)done / (double)total
                                       : (b->current < b->scaled.free_dialogues ? 0.75 : 1.0) *
                                             forced_share(b, (double)done, (double)total) / forced;
    const double at = b->cost_done + cost * share, seconds = (double)(kvs_now_ns() - b->t0_ns) / 1e9;
    char stage[96];
    snprintf(stage, sizeof stage, "dialogue %u of %u, %s, %u runs", b->current + 1, b->n_dialogues,
             b->free_stage ? "free-running" : "teacher-forced", b->n_runs);
    const double left = at > 0.02 * b->cost_total ? seconds / at * (b->cost_total - at) : -1;
    b->opt->on_progress(b->opt->ctx, stage, (uint64_t)(1000 * at / b->cost_total), 1000, left);
}

static void on_recall_progress(void *ctx, uint64_t done, uint64_t total)
{
    bench *b = ctx;
    if (b->opt->on_progress == NULL)
        return;
    const double at = b->cost_done + recall_cost(b) * forced_share(b, (double)done, (double)total);
    const double seconds = (double)(kvs_now_ns() - b->t0_ns) / 1e9;
    char stage[96];
    snprintf(stage, sizeof stage, "recall %u of %u, %u runs", b->current + 1, b->scaled.n_recall, b->n_runs);
    const double left = at > 0.02 * b->cost_total ? seconds / at * (b->cost_total - at) : -1;
    b->opt->on_progress(b->opt->ctx, stage, (uint64_t)(1000 * at / b->cost_total), 1000, left);
}

/* ---- dialogues ---- */

/* kind: d for a dialogue, r for one with planted facts. */
static bool part_path(const bench *b, char kind, uint32_t i, char *name, size_t cap)
{
    return snprintf(name, cap, "parts/%c%04u.json", kind, i) < (int)cap && b->opt->out_dir != NULL;
}

static json_t *load_part(const bench *b, char kind, uint32_t i)
{
    char name[64], path[2200];
    if (!part_path(b, kind, i, name, sizeof name))
        return NULL;
    snprintf(path, sizeof path, "%s/%s", b->opt->out_dir, name);
    json_t *part = json_load_file(path, 0, NULL);
    const char *key = json_string_value(json_object_get(part, "key"));
    if (part != NULL && (key == NULL || strcmp(key, b->key) != 0)) {
        json_decref(part);
        return NULL;
    }
    return part;
}

static kvs_status play_dialogue(bench *b, uint32_t i, json_t **part, kvs_error *err)
{
    kvs_play play = {
        .model = b->model,
        .suite = &b->scaled,
        .opt = b->opt,
        .runs = b->runs,
        .n_runs = b->n_runs,
        .arith = b->arith,
        .kv_type = b->kv_type,
        .keep_sets = i == 0 && !b->scaled.registry,
        .window = i < b->scaled.n_long,
        .progress = on_progress,
        .ctx = b,
    };
    b->current = i;
    b->free_stage = false;
    KVS_TRY(kvs_play_forced(&play, &b->scripts[i], part, err));
    if (i < b->scaled.free_dialogues) {
        b->free_stage = true;
        const kvs_status status = kvs_play_free(&play, &b->scripts[i], *part, err);
        if (status != KVS_OK) {
            json_decref(*part);
            *part = NULL;
            return status;
        }
    }
    json_object_set_new(*part, "key", json_string(b->key));
    json_object_set_new(*part, "sources", json_string(b->dialogues.items[i].origin));
    char name[64];
    part_path(b, 'd', i, name, sizeof name);
    return kvs_output_json(b->opt->out_dir, name, *part, err);
}

static kvs_status play_dialogues(bench *b, bool *complete, kvs_error *err)
{
    const kvs_bench_options *o = b->opt;
    *complete = true;
    for (uint32_t i = 0; i < b->n_dialogues; i++)
        b->cost_total += b->cost[i] = dialogue_cost(b, i);
    b->cost_total += recall_cost(b) * b->scaled.n_recall;
    b->t0_ns = kvs_now_ns();
    kvs_status stopped = KVS_OK;
    for (uint32_t i = 0; i < b->n_dialogues; i++) {
        json_t *part = o->resume || o->shard_count > 1 ? load_part(b, 'd', i) : NULL;
        const bool mine = o->shard_count <= 1 || i % o->shard_count == o->shard_index;
        if (part != NULL || !mine || stopped != KVS_OK) {
            b->cost_total -= b->cost[i];
        } else {
            stopped = play_dialogue(b, i, &part, err);
            b->cost_done += b->cost[i];
            if (stopped != KVS_OK && stopped != KVS_ECANCELLED)
                return stopped;
        }
        if (part != NULL)
            json_array_append_new(b->parts, part);
        else
            *complete = false;
    }
    return stopped;
}

static kvs_status play_recall(bench *b, uint32_t i, json_t **part, kvs_error *err)
{
    const kvs_play play = {.model = b->model,
                           .suite = &b->scaled,
                           .opt = b->opt,
                           .runs = b->runs,
                           .n_runs = b->n_runs,
                           .arith = b->arith,
                           .kv_type = b->kv_type,
                           .progress = on_recall_progress,
                           .ctx = b};
    kvs_dialogue d;
    kvs_script script;
    b->current = i;
    KVS_TRY(kvs_recall_dialogue(&play, &b->data, i, &d, &script, err));
    kvs_status status = kvs_play_recall(&play, &script, part, err);
    if (status == KVS_OK) {
        json_object_set_new(*part, "key", json_string(b->key));
        json_object_set_new(*part, "sources", json_string(d.origin));
        char name[64];
        part_path(b, 'r', i, name, sizeof name);
        status = kvs_output_json(b->opt->out_dir, name, *part, err);
    }
    kvs_script_free(&script);
    kvs_dialogue_free(&d);
    return status;
}

/* stopped: KVS_OK, or that a stop was asked for: then it only loads what is there. */
static kvs_status play_recalls(bench *b, kvs_status stopped, bool *complete, kvs_error *err)
{
    const kvs_bench_options *o = b->opt;
    for (uint32_t i = 0; i < b->scaled.n_recall; i++) {
        json_t *part = o->resume || o->shard_count > 1 ? load_part(b, 'r', i) : NULL;
        const json_t *n_questions = json_object_get(json_object_get(part, "dialogue"), "n_questions");
        if (part != NULL && json_integer_value(n_questions) != b->scaled.recall_facts) {
            json_decref(part);
            part = NULL;
        }
        /* From the end, where the short dialogues are; a shard that has one of these has an ordinary one too. */
        const bool mine = o->shard_count <= 1 || (b->n_dialogues - 1 - i) % o->shard_count == o->shard_index;
        if (part != NULL || !mine || stopped != KVS_OK) {
            b->cost_total -= recall_cost(b);
        } else {
            stopped = play_recall(b, i, &part, err);
            b->cost_done += recall_cost(b);
            if (stopped != KVS_OK && stopped != KVS_ECANCELLED)
                return stopped;
        }
        if (part != NULL)
            json_array_append_new(b->recall_parts, part);
        else
            *complete = false;
    }
    return stopped;
}

/* ---- the folder's files ---- */

static json_t *cpu_json(const bench *b)
{
    char model[128] = "unknown", line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "model name : %127[^\n]", model) == 1)
            break;
    if (f != NULL)
        fclose(f);
    kvs_model_info info;
    kvs_model_get_info(b->model, &info);
    return json_pack("{s:s,s:s,s:i}", "model", model, "isa", info.isa, "threads", (int)info.n_threads);
}

static json_t *model_json(const bench *b)
{
    kvs_model_info i;
    kvs_model_get_info(b->model, &i);
    return json_pack("{s:s,s:s,s:s,s:i,s:i,s:i,s:i,s:i,s:i}", "name", i.name, "arch", i.arch, "sha256",
                     kvs_model_sha256(b->model), "n_layers", (int)i.n_layers, "n_heads", (int)i.n_heads, "n_kv_heads",
                     (int)i.n_kv_heads, "head_dim", (int)i.head_dim, "window_tokens", (int)i.window_tokens,
                     "kv_bytes_per_token",
                     (int)(2 * i.n_layers * i.n_kv_heads * i.head_dim * (b->kv_type == KVS_KV_F32 ? 4 : 2)));
}

static json_t *runs_json(const bench *b, uint64_t token_bytes)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < b->n_runs; i++) {
        const kvs_bench_run_spec *r = &b->runs[i];
        kvs_policy p;
        const bool ok =
            kvs_policy_parse(r->policy, r->position, b->opt->paper_compat && !r->is_reference, &p, NULL) == KVS_OK;
        const uint64_t tokens = r->budget_tokens;
        json_array_append_new(
            list, json_pack("{s:s,s:s,s:s,s:s,s:I,s:I,s:b,s:s*}", "run", r->id, "policy",
                            r->label[0] != '\0' ? r->label : r->policy, "policy_full", ok ? p.text : r->policy,
                            "position", r->position, "budget_tokens", (json_int_t)tokens, "budget_bytes",
                            (json_int_t)(r->budget_bytes != 0 ? r->budget_bytes : tokens * token_bytes), "paper_compat",
                            b->opt->paper_compat && !r->is_reference, "share", r->share[0] != '\0' ? r->share : NULL));
    }
    return list;
}

static json_t *dialogues_json(const json_t *parts)
{
    json_t *list = json_array();
    size_t i;
    json_t *part;
    json_array_foreach (parts, i, part)
        json_array_append(list, json_object_get(part, "dialogue"));
    return list;
}

static kvs_status write_manifest(bench *b, const json_t *claims, double noise_floor, bool complete, kvs_error *err)
{
    struct utsname os = {0};
    uname(&os);
    char os_text[256], ended[32], data_hash[20];
    snprintf(os_text, sizeof os_text, "%.80s %.80s %.40s", os.sysname, os.release, os.machine);
    utc_now(ended);
    snprintf(data_hash, sizeof data_hash, "%016llx", (unsigned long long)b->data.xxh64);
    json_t *model = model_json(b);
    const uint64_t token_bytes = (uint64_t)json_integer_value(json_object_get(model, "kv_bytes_per_token"));
    json_t *m = json_object();
    json_object_set_new(m, "schema", json_integer(1));
    json_object_set_new(
        m, "kvasir",
        json_pack("{s:s,s:s,s:b}", "version", kvs_version(), "commit", KVS_GIT_COMMIT, "dirty", KVS_GIT_DIRTY));
#ifdef __clang__
    json_object_set_new(m, "compiler", json_string("clang " __clang_version__));
#else
    json_object_set_new(m, "compiler", json_string("gcc " __VERSION__));
#endif
    json_object_set_new(m, "cpu", cpu_json(b));
    json_object_set_new(m, "os", json_string(os_text));
    json_object_set_new(m, "model", model);
    json_object_set_new(m, "suite", json_string(b->suite->name));
    json_object_set_new(m, "command", json_string(b->opt->command_line != NULL ? b->opt->command_line : ""));
    json_object_set_new(m, "data",
                        json_pack("{s:s,s:s,s:s,s:i}", "name", b->data.name, "xxh64", data_hash, "licence",
                                  b->data.licence != NULL ? b->data.licence : "unknown", "n_dialogues",
                                  (int)b->data.n_items));
    json_object_set_new(m, "seed", json_integer((json_int_t)b->opt->seed));
    json_object_set_new(m, "arith", json_string(b->arith == KVS_ARITH_F32 ? "f32" : "native"));
    json_object_set_new(m, "kv_type", json_string(b->kv_type == KVS_KV_F32 ? "f32" : "f16"));
    json_object_set_new(m, "trigger",
                        json_pack("{s:I,s:I}", "tokens", (json_int_t)b->scaled.trigger_tokens, "bytes",
                                  (json_int_t)b->scaled.trigger_tokens * (json_int_t)token_bytes));
    json_object_set_new(m, "runs", runs_json(b, token_bytes));
    json_object_set_new(m, "protocols",
                        b->scaled.free_dialogues >= b->n_dialogues ? json_pack("[s,s]", "tf", "fr")
                                                                   : json_pack("[s]", "tf"));
    json_object_set_new(m, "dialogues", dialogues_json(b->parts));
    json_object_set_new(m, "recall_dialogues", dialogues_json(b->recall_parts));
    json_object_set_new(m, "noise_floor_kl", kvs_json_real(noise_floor));
    json_object_set_new(m, "started", json_string(b->started));
    json_object_set_new(m, "ended", json_string(ended));
    json_object_set_new(m, "complete", json_boolean(complete));
    json_object_set(m, "preliminary", json_object_get(claims, "preliminary"));
    const kvs_status status = kvs_output_json(b->opt->out_dir, "manifest.json", m, err);
    json_decref(m);
    return status;
}

static kvs_status write_folder(bench *b, bool complete, kvs_error *err)
{
    kvs_model_info info;
    kvs_model_get_info(b->model, &info);
    json_t *runs = runs_json(b, 1);
    const kvs_claims_input in = {b->parts,     runs,           info.window_tokens, b->scaled.trigger_tokens,
                                 b->opt->seed, b->recall_parts};
    double noise_floor;
    json_t *claims = kvs_claims(&in, &noise_floor);
    const char *dir = b->opt->out_dir;
    kvs_status status = write_manifest(b, claims, noise_floor, complete, err);
    if (status == KVS_OK)
        status = kvs_output_lines(dir, "turns.jsonl", b->parts, "turns", err);
    if (status == KVS_OK)
        status = kvs_output_lines(dir, "events.jsonl", b->parts, "events", err);
    if (status == KVS_OK)
        status = kvs_output_lines(dir, "keepsets.jsonl", b->parts, "keepsets", err);
    if (status == KVS_OK)
        status = kvs_output_lines(dir, "recall.jsonl", b->recall_parts, "recall", err);
    if (status == KVS_OK)
        status = kvs_output_summary(dir, b->parts, err);
    if (status == KVS_OK)
        status = kvs_output_json(dir, "claims.json", claims, err);
    json_decref(claims);
    json_decref(runs);
    KVS_TRY(status);
    return kvs_report_write(dir, err);
}

/* ---- run ---- */

/* Sizes in bytes, which only the model knows. */
static kvs_status make_registry_runs(bench *b, kvs_error *err)
{
    if (!b->scaled.registry)
        return KVS_OK;
    json_t *model = model_json(b);
    b->scaled.token_bytes = (uint64_t)json_integer_value(json_object_get(model, "kv_bytes_per_token"));
    json_decref(model);
    kvs_model_info i;
    kvs_model_get_info(b->model, &i);
    b->scaled.model = (kvs_profile_model){kvs_model_sha256(b->model), i.n_layers, i.n_kv_heads};
    return kvs_suite_registry_runs(&b->scaled, b->opt, b->runs, &b->n_runs, err);
}

static kvs_status run_bench(bench *b, kvs_error *err)
{
    char parts_dir[2200];
    snprintf(parts_dir, sizeof parts_dir, "%s/parts", b->opt->out_dir);
    const kvs_model_options options = {.n_threads = b->opt->n_threads, .cpu_mask = b->opt->cpu_mask};
    KVS_TRY(kvs_model_open(b->opt->model_path, &options, &b->model, err));
    KVS_TRY(make_registry_runs(b, err));
    KVS_TRY(kvs_output_make_dir(parts_dir, err)); /* what is refused leaves no folder behind */
    KVS_TRY(make_dialogues(b, err));
    make_key(b);
    bool complete;
    kvs_status played = play_dialogues(b, &complete, err);
    if (played == KVS_OK || played == KVS_ECANCELLED)
        played = play_recalls(b, played, &complete, err);
    if (played != KVS_OK && played != KVS_ECANCELLED)
        return played;
    if (json_array_size(b->parts) == 0)
        return played == KVS_OK ? kvs_error_set(err, KVS_EINVAL, "this shard has no dialogue")
                                : kvs_error_set(err, KVS_ECANCELLED, "stopped before the first dialogue was finished");
    kvs_error e = {0};
    const kvs_status written = write_folder(b, complete, &e);
    if (written != KVS_OK) {
        if (err != NULL)
            *err = e;
        return written;
    }
    return played;
}

kvs_status kvs_bench_run(const kvs_bench_options *opt, kvs_error *err)
{
    bench *b = calloc(1, sizeof *b);
    if (b == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the benchmark");
    b->opt = opt;
    b->parts = json_array();
    b->recall_parts = json_array();
    utc_now(b->started);
    kvs_status status = read_options(b, err);
    if (status == KVS_OK)
        status = run_bench(b, err);
    for (uint32_t i = 0; b->scripts != NULL && i < b->n_dialogues; i++)
        kvs_script_free(&b->scripts[i]);
    kvs_dialogue_set_free(&b->data);
    kvs_dialogue_set_free(&b->dialogues);
    kvs_model_close(&b->model);
    json_decref(b->parts);
    json_decref(b->recall_parts);
    free(b->scripts);
    free(b->cost);
    free(b);
    return status;
}

/* The grid of suite `methods`: every preset of the registry, and what papers say improves any host, held at 10, 20 and
 * 50 % of the dialogue's length. All runs keep as many slots a head and evict at the same tokens, so that what differs is
 * what is kept. */
#include "bench/suite.h"

#include "policy/policy.h"

#include <stdio.h>
#include <string.h>

/* Slots above what is kept at which a run evicts: a block of teacher-forced play. */
enum { GAP_TOKENS = 32, N_SHARES = 3 };
static const uint32_t share_percent[N_SHARES] = {10, 20, 50};

/* {K} is what a run keeps, {G} and {R} the paper script's gist and recent (2,000 of 4,800 and the rest), {g} and {r} its
 * attentive strategy's (512 and 2,048 of 4,800): those presets count in slots, and their defaults are longer than a
 * dialogue of this suite. Streaming heads keep a quarter of {K}, divided as the papers do (128:256, 128:1,024, 4 and the
 * query): at their own sizes no head would have less than an even share. */
static const struct {
    const char *name, *spec;
} scaled[] = {
    {"sliding_window_gist", "sliding_window_gist:gist={G},recent={R}"},
    {"sliding_window_gist_attentive", "sliding_window_gist_attentive:gist={g},recent={r}"},
    {"duo", "duo +budget=roles:share=0.5,sinks={d},recent={D}"},
    {"prulong", "prulong +budget=roles:share=0.7,sinks={p},recent={P}"},
    {"kvzip-head", "kvzip-head +budget=roles:share=0.4,sinks=4,recent={q}"},
    {"snapkv +budget=roles", "snapkv +budget=roles:share=0.5,sinks={d},recent={D}"},
};

/* Claims of the form "improves every host", each beside its host among the presets. */
static const char *const combinations[] = {
    "snapkv +rescore=caote",
    "h2o +rescore=caote",
    "tova +rescore=caote",
    "snapkv +rescore=obcache-v",
    "h2o +rescore=obcache-v",
    "tova +rescore=obcache-v",
    "h2o +rescore=critical",
    "obcache-v:acc=0,kernel=7 +probe=lookahead",
    "caote +probe=lookahead",
    "tova +probe=lookahead",
    "snapkv +probe=prompt",
    "expected_attention +budget=ada",
    "knorm +budget=global",
    "chunkkv +select=chunk:length=10,reuse=2",
    "h2o +dispose=cam",
    "snapkv +dispose=merge",
    NULL,
};

/* Presets that score what is held as a whole see the full cache first; these stand beside them, treated the same. */
static const char *const after_full[] = {"snapkv", "streaming",          "random", "tova", "pyramidkv", "adakv",
                                         "lukv",   "expected_attention", NULL};

typedef struct grid {
    const kvs_suite *suite;
    const kvs_bench_options *opt;
    kvs_bench_run_spec *runs;
    uint32_t n;
} grid;

static uint32_t placeholder(char c, uint32_t keep)
{
    const double scale = keep / 4800.0;
    const uint32_t gist = (uint32_t)(2000 * scale + 0.5);
    switch (c) {
    case 'K':
        return keep;
    case 'G':
        return gist;
    case 'R':
        return keep - gist;
    case 'g':
        return (uint32_t)(512 * scale + 0.5);
    case 'd':
        return keep / 12;
    case 'D':
        return kvs_max_u32(keep / 6, 1);
    case 'p':
        return keep / 36;
    case 'P':
        return kvs_max_u32(keep * 2 / 9, 1);
    case 'q':
        return kvs_max_u32(keep / 4, 1);
    default:
        return (uint32_t)(2048 * scale + 0.5);
    }
}

static const char *pattern_of(const char *name)
{
    for (size_t i = 0; i < sizeof scaled / sizeof *scaled; i++)
        if (strcmp(scaled[i].name, name) == 0)
            return scaled[i].spec;
    return name;
}

/* Puts `file` behind the choice whose file it is, as duo:file=PATH or snapkv +budget=lukv:file=PATH. */
static void insert_file(const char *spec, const char *file, char *out, size_t cap_bytes)
{
    const char *at = strstr(spec, "+budget=");
    at = at == NULL ? spec : at + strlen("+budget=");
    at += strcspn(at, ": +\t\n\v\f\r");
    const bool more = *at == ':';
    snprintf(out, cap_bytes, "%.*s:file=%s%s%s", (int)(at - spec), spec, file, more ? "," : "", more ? at + 1 : at);
}

/* The kinds of file that may stand for this policy's, the best first: a preset's own (PruLong's roles come from training, which
 * is not here: DuoAttention's scores stand in); a stage's in the order that it names them. */
static uint32_t kinds_for(const kvs_policy *p, const char *kinds[8])
{
    uint32_t n = 0;
    for (uint32_t i = 0; p->budget->file->kinds[i] != NULL && n < 8; i++) {
        const char *const kind = p->budget->file->kinds[i];
        if (strcmp(kind, p->ops->name) == 0) { /* its own: no other */
            kinds[0] = kind;
            kinds[1] = "duo";
            return strcmp(kind, "prulong") == 0 ? 2 : 1;
        }
        kinds[n++] = kind;
    }
    return n;
}

/* Whose file is not given and not found: *missing. Else the spec, with the file that fits this model and its hash. */
static kvs_status with_file(const grid *g, const char *spec, char *out, size_t cap_bytes, bool *missing, kvs_error *err)
{
    char path[337] = "", sha256[KVS_PROFILE_SHA_BYTES], file[KVS_POLICY_FILE_BYTES];
    const char *kinds[8];
    kvs_policy p;
    snprintf(out, cap_bytes, "%s", spec);
    KVS_TRY(kvs_policy_parse(spec, NULL, false, &p, err));
    *missing = p.budget != NULL && p.budget->file != NULL && p.budget_file[0] == '\0';
    if (!*missing || g->opt->profiles_dir == NULL)
        return KVS_OK;
    const uint32_t n = kinds_for(&p, kinds);
    for (uint32_t i = 0; i < n && path[0] == '\0'; i++)
        KVS_TRY(kvs_profile_find(g->opt->profiles_dir, p.budget->file, kinds[i], &g->suite->model, path, sizeof path,
                                 sha256, err));
    if (path[0] == '\0')
        return KVS_OK;
    *missing = false;
    snprintf(file, sizeof file, "%.336s,hash=%.*s", path, KVS_POLICY_HASH_BYTES - 1, sha256);
    insert_file(spec, file, out, cap_bytes);
    return KVS_OK;
}

/* A folder goes into specs, where some characters mean something else. */
static kvs_status check_folder(const char *folder, kvs_error *err)
{
    enum { FOLDER_BYTES_MAX = 160 };
    if (folder != NULL && (strlen(folder) > FOLDER_BYTES_MAX || strpbrk(folder, ",+ \t\n\v\f\r") != NULL))
        return kvs_error_set(err, KVS_EINVAL,
                             "--profiles: '%.200s' must be a folder without blank, comma and plus, of %d characters at "
                             "most",
                             folder, FOLDER_BYTES_MAX);
    return KVS_OK;
}

enum { REQUEST_TOKENS = 192 }; /* EpiCache's, and the template round it: more than they have */

/* A probe that says again what is held costs that much at every eviction; its papers run it once, on the full cache. */
static bool wants_full_first(const char *spec)
{
    kvs_policy p;
    return kvs_policy_parse(spec, NULL, false, &p, NULL) == KVS_OK && p.probe != NULL &&
           (p.probe->kind == KVS_PROBE_REPEAT || p.probe->kind == KVS_PROBE_CONTEXT);
}

/* Held: evicts whenever the mean head has GAP_TOKENS more than it keeps. Full first: once, where scoring begins, in a
 * cache that has room for everything, as papers that compress after the prompt. */
static kvs_status add_cell(grid *g, const char *spec, bool full_first, const char *position, uint32_t keep,
                           const char *budget, kvs_error *err)
{
    const kvs_suite *suite = g->suite;
    if (g->n == KVS_BENCH_RUNS_MAX)
        return kvs_error_set(err, KVS_EINVAL, "the grid has more than %d runs", KVS_BENCH_RUNS_MAX);
    kvs_bench_run_spec *r = &g->runs[g->n];
    *r = (kvs_bench_run_spec){0};
    char filled[320], text[sizeof r->policy];
    bool missing;
    kvs_suite_fill(pattern_of(spec), placeholder, keep, filled, sizeof filled);
    KVS_TRY(with_file(g, filled, text, sizeof text, &missing, err));
    if (missing && g->opt->n_policies > 0)
        return kvs_error_set(
            err, KVS_EINVAL,
            "%.120s needs a file: give file=PATH, or --profiles with a folder that has one of this model "
            "(kvasir profile)",
            spec);
    if (missing)
        return KVS_OK; /* left out */
    int length;
    if (full_first)
        length = snprintf(r->policy, sizeof r->policy, "%s +protect=none +keep=%utok +schedule=once:%utok", text, keep,
                          suite->score_from_tokens);
    else
        length = snprintf(r->policy, sizeof r->policy, "%s +protect=none +keep=%utok +schedule=bytes:%lluB", text, keep,
                          (unsigned long long)(suite->token_bytes * (keep + GAP_TOKENS)));
    if (length < 0 || (size_t)length >= sizeof r->policy)
        return kvs_error_set(err, KVS_EINVAL, "spec '%s' is too long for suite %s", spec, suite->name);
    kvs_policy p;
    KVS_TRY(kvs_policy_parse(r->policy, position, false, &p, err));
    r->first_tokens = full_first ? suite->score_from_tokens : keep + GAP_TOKENS;
    r->budget_tokens = keep + GAP_TOKENS;
    if (full_first) /* 0 would be the dialogue's length, without room for a probe's rows */
        r->budget_tokens = 2 * suite->target_tokens;
    else if (kvs_policy_is_ragged(&p)) /* its last page of each head is half empty on average: the cap is in pages */
        r->budget_tokens += 64;
    if (!full_first && p.probe != NULL)
        r->budget_tokens += (uint32_t)p.probe_params[0] + (p.probe->kind == KVS_PROBE_EXTRACT ? REQUEST_TOKENS : 0);
    snprintf(r->position, sizeof r->position, "%s", position);
    snprintf(r->id, sizeof r->id, "%.110s%s/%s/%.20s", spec, full_first ? KVS_SUITE_FULL_FIRST : "", position, budget);
    snprintf(r->label, sizeof r->label, "%.80s%s", spec, full_first ? KVS_SUITE_FULL_FIRST : "");
    snprintf(r->share, sizeof r->share, "%.20s", budget);
    for (uint32_t i = 0; i < g->n; i++)
        if (strcmp(g->runs[i].id, r->id) == 0)
            return KVS_OK; /* given twice */
    g->n++;
    return KVS_OK;
}

static kvs_status add_spec(grid *g, const char *spec, bool full_first, kvs_error *err)
{
    const kvs_bench_options *o = g->opt;
    static const char *const keep_mode[] = {"keep"}; /* what the papers measured */
    const char *const *positions = o->n_positions > 0 ? o->positions : keep_mode;
    const uint32_t n_positions = o->n_positions > 0 ? o->n_positions : 1;
    const uint32_t n_budgets = o->n_budgets > 0 ? o->n_budgets : N_SHARES;
    for (uint32_t m = 0; m < n_positions; m++)
        for (uint32_t b = 0; b < n_budgets; b++) {
            char text[24];
            uint64_t bytes = 0, tokens;
            if (o->n_budgets > 0) {
                KVS_TRY(kvs_size_parse(o->budgets[b], &bytes, &tokens, err));
                if (bytes != 0)
                    tokens = bytes / g->suite->token_bytes;
                snprintf(text, sizeof text, "%.20s", o->budgets[b]);
            } else {
                tokens = (uint64_t)g->suite->target_tokens * share_percent[b] / 100;
                snprintf(text, sizeof text, "%u%%", share_percent[b]);
            }
            if (tokens == 0 || tokens + GAP_TOKENS > g->suite->score_from_tokens)
                return kvs_error_set(
                    err, KVS_EINVAL,
                    "budget %s is %llu tokens: suite %s scores from token %u on and evicts %d above the "
                    "budget, so 1 to %u can be held",
                    text, (unsigned long long)tokens, g->suite->name, g->suite->score_from_tokens, GAP_TOKENS,
                    g->suite->score_from_tokens - GAP_TOKENS);
            KVS_TRY(add_cell(g, spec, full_first, positions[m], (uint32_t)tokens, text, err));
        }
    return KVS_OK;
}

static kvs_status add_presets(grid *g, kvs_error *err)
{
    const kvs_policy_ops *ops;
    for (uint32_t i = 0; (ops = kvs_policy_at(i)) != NULL; i++) {
        kvs_policy p;
        if (!ops->never_evicts && kvs_policy_parse(ops->name, NULL, false, &p, NULL) == KVS_OK)
            KVS_TRY(add_spec(g, ops->name, wants_full_first(ops->name), err));
    }
    return KVS_OK;
}

/* Every choice of two stages over one scorer, apart from those that a preset of that scorer already is. */
static kvs_status add_stages(grid *g, kvs_error *err)
{
    char spec[128];
    kvs_policy p;
    for (uint32_t i = 0; kvs_budget_at(i) != NULL; i++) {
        const char *name = kvs_budget_at(i)->info.name;
        snprintf(spec, sizeof spec, "snapkv +budget=%.60s", name);
        if (strcmp(name, "ada") != 0 && strcmp(name, "pyramid") != 0 &&
            kvs_policy_parse(spec, NULL, false, &p, NULL) == KVS_OK)
            KVS_TRY(add_spec(g, spec, false, err));
    }
    for (uint32_t i = 0; kvs_select_at(i) != NULL; i++) {
        const char *name = kvs_select_at(i)->info.name;
        snprintf(spec, sizeof spec, "snapkv +select=%.60s", name);
        if (strcmp(name, "chunk") != 0 && kvs_policy_parse(spec, NULL, false, &p, NULL) == KVS_OK)
            KVS_TRY(add_spec(g, spec, false, err));
    }
    for (uint32_t i = 0; combinations[i] != NULL; i++)
        if (kvs_policy_parse(combinations[i], NULL, false, &p, NULL) ==
            KVS_OK) /* one that is refused is told as not run */
            KVS_TRY(add_spec(g, combinations[i], false, err));
    for (uint32_t i = 0; after_full[i] != NULL; i++)
        KVS_TRY(add_spec(g, after_full[i], true, err));
    return KVS_OK;
}

/* A spec as a person gives it, or as tables name it: with the mark behind it the full cache comes first. */
static kvs_status add_named(grid *g, const char *spec, kvs_error *err)
{
    char text[400];
    const size_t n = strlen(spec), n_mark = sizeof KVS_SUITE_FULL_FIRST - 1;
    const bool marked = n > n_mark && strcmp(spec + n - n_mark, KVS_SUITE_FULL_FIRST) == 0;
    if (n >= sizeof text)
        return kvs_error_set(err, KVS_EINVAL, "policy spec of %zu characters is over the longest, %zu", n,
                             sizeof text - 1);
    snprintf(text, sizeof text, "%.*s", (int)(marked ? n - n_mark : n), spec);
    return add_spec(g, text, marked || wants_full_first(text), err);
}

kvs_status kvs_suite_registry_runs(const kvs_suite *suite, const kvs_bench_options *opt, kvs_bench_run_spec *runs,
                                   uint32_t *n_runs, kvs_error *err)
{
    grid g = {suite, opt, runs, 0};
    KVS_TRY(check_folder(opt->profiles_dir, err));
    kvs_suite_reference(&runs[g.n++]);
    for (uint32_t i = 0; i < opt->n_policies; i++)
        if (strncmp(opt->policies[i], "baseline", 8) != 0)
            KVS_TRY(add_named(&g, opt->policies[i], err));
    if (opt->n_policies == 0) {
        KVS_TRY(add_presets(&g, err));
        KVS_TRY(add_stages(&g, err));
    }
    *n_runs = g.n;
    return KVS_OK;
}

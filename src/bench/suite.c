/* The suites and the grid of runs they stand for. */
#include "bench/suite.h"

#include "base/base.h"
#include "policy/policy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The paper's strategies (arXiv 2511.04686 and its script) and two that users know, bare: +protect=none. {T} is the
 * trigger, {G} the gist (2,000 of 4,800), {R} what fills a gist up to 99 % of the trigger, {g} and {r} the script's
 * gist 512 and recent 2,048 at the paper's trigger: all scale with T, so that small suites keep the proportions. */
static const char *const paper_policies[] = {
    "attention_top:keep=0.99",
    "random:keep=0.99",
    "sliding_window_gist:gist={G},recent=0",
    "sliding_window_gist:gist={G},recent={R}",
    "evict_oldest",
    "sliding_window",
    "random",
    "attention_bottom",
    "sliding_window_gist_attentive:gist={g},recent={r}",
    "streaming",
    "llama_context_shift",
    NULL,
};
static const char *const demo_policies[] = {
    "attention_top:keep=0.99",
    "sliding_window_gist:gist={G},recent=0",
    "sliding_window_gist:gist={G},recent={R}",
    "evict_oldest",
    "random",
    "streaming",
    "llama_context_shift",
    NULL,
};
static const char *const smoke_policies[] = {"attention_top:keep=0.99", "sliding_window_gist:gist={G},recent=0",
                                             "sliding_window_gist:gist={G},recent={R}", "streaming", NULL};
static const char *const three_modes[] = {"rollback", "keep", "rerotate", NULL};
static const char *const all_modes[] = {"rollback", "keep", "rerotate", "gapcap:16", NULL};

static const kvs_suite suites[] = {
    {.name = "smoke",
     .doc = "seconds: one short dialogue, for tests",
     .n_dialogues = 1,
     .target_tokens = 520,
     .trigger_tokens = 320,
     .free_dialogues = 1,
     .free_turns = 1,
     .free_tokens = 40,
     .policies = smoke_policies,
     .positions = three_modes},
    {.name = "demo",
     .doc = "`make bench`: a few minutes on two cores",
     .n_dialogues = 4,
     .target_tokens = 2000,
     .trigger_tokens = 1200,
     .free_dialogues = 1,
     .free_turns = 2,
     .free_tokens = 64,
     .n_recall = 1,
     .recall_facts = 6,
     .policies = demo_policies,
     .positions = three_modes},
    {.name = "paper",
     .doc = "arXiv 2511.04686: trigger 4,800 tokens, gist 2,000, all strategies x three modes",
     .n_dialogues = 8,
     .n_long = 2,
     .target_tokens = 5600,
     .long_tokens = 10300,
     .trigger_tokens = 4800,
     .free_dialogues = 4,
     .free_turns = 2,
     .free_tokens = 128,
     .n_recall = 6,
     .recall_facts = 8,
     .policies = paper_policies,
     .positions = three_modes},
    {.name = "full",
     .doc = "the paper suite on 30 dialogues and with gapcap",
     .n_dialogues = 30,
     .n_long = 4,
     .target_tokens = 5600,
     .long_tokens = 10300,
     .trigger_tokens = 4800,
     .free_dialogues = 8,
     .free_turns = 2,
     .free_tokens = 128,
     .n_recall = 12,
     .recall_facts = 8,
     .policies = paper_policies,
     .positions = all_modes},
    {.name = "methods",
     .doc = "`make methods`: every preset at 10, 20 and 50 % of the cache, for docs/methods.md",
     .n_dialogues = 8,
     .target_tokens = 800,
     .trigger_tokens = 800,
     .n_recall = 2,
     .recall_facts = 6,
     .registry = true,
     .score_from_tokens = 480},
};

enum { N_SUITES = sizeof suites / sizeof *suites };

const kvs_suite *kvs_suite_at(uint32_t index)
{
    return index < N_SUITES ? &suites[index] : NULL;
}

const kvs_suite *kvs_suite_find(const char *name)
{
    for (size_t i = 0; i < N_SUITES; i++)
        if (strcmp(suites[i].name, name) == 0)
            return &suites[i];
    return NULL;
}

/* ---- the grid ---- */

static uint32_t placeholder(char c, uint32_t trigger)
{
    const double scale = trigger / 4800.0;
    const uint32_t gist = (uint32_t)(2000 * scale + 0.5);
    switch (c) {
    case 'T':
        return trigger;
    case 'G':
        return gist;
    case 'R':
        return (uint32_t)(trigger * 0.99) - gist;
    case 'g':
        return (uint32_t)(512 * scale + 0.5);
    default:
        return (uint32_t)(2048 * scale + 0.5);
    }
}

void kvs_suite_fill(const char *pattern, uint32_t (*value)(char c, uint32_t base), uint32_t base, char *out, size_t cap)
{
    size_t at = 0;
    while (*pattern != '\0' && at + 12 < cap) {
        if (pattern[0] == '{' && pattern[1] != '\0' && pattern[2] == '}') {
            at += (size_t)snprintf(out + at, cap - at, "%u", value(pattern[1], base));
            pattern += 3;
        } else {
            out[at++] = *pattern++;
        }
    }
    out[at] = '\0';
}

typedef struct grid {
    const kvs_suite *suite;
    const kvs_bench_options *opt;
    kvs_bench_run_spec *runs;
    uint32_t n;
} grid;

/* The size at which the run's schedule first acts, as tokens a head; a byte trigger counts as its budget. */
static uint32_t first_tokens(const kvs_policy *p, uint32_t budget_tokens)
{
    switch (p->schedule) {
    case KVS_SCHEDULE_FULL:
        return budget_tokens;
    case KVS_SCHEDULE_TOKENS:
    case KVS_SCHEDULE_ONCE:
        return (uint32_t)p->schedule_value < budget_tokens ? (uint32_t)p->schedule_value : budget_tokens;
    default:
        return 0; /* acts by moments, not by size: active from the first token */
    }
}

static kvs_status add_run(grid *g, const char *spec, const char *position, const char *budget, bool from_suite,
                          kvs_error *err)
{
    if (g->n == KVS_BENCH_RUNS_MAX)
        return kvs_error_set(err, KVS_EINVAL, "the grid has more than %d runs", KVS_BENCH_RUNS_MAX);
    kvs_bench_run_spec *r = &g->runs[g->n];
    *r = (kvs_bench_run_spec){0};
    char short_name[128];
    snprintf(short_name, sizeof short_name, "%.127s", spec);
    snprintf(r->policy, sizeof r->policy, "%s%s", spec, from_suite ? " +protect=none" : "");
    if (from_suite && g->opt->paper_compat) {
        const size_t n = strlen(r->policy);
        snprintf(r->policy + n, sizeof r->policy - n, " +schedule=tokens:%u", g->suite->trigger_tokens);
    }
    kvs_policy p;
    KVS_TRY(kvs_policy_parse(r->policy, position, g->opt->paper_compat, &p, err));
    uint64_t bytes = 0, tokens = g->suite->trigger_tokens;
    if (budget != NULL)
        KVS_TRY(kvs_size_parse(budget, &bytes, &tokens, err));
    r->budget_bytes = bytes;
    r->budget_tokens = (uint32_t)tokens;
    r->first_tokens = bytes != 0 ? 0 : first_tokens(&p, r->budget_tokens);
    if (g->opt->paper_compat) { /* the script has a trigger and no cap: a turn may overshoot */
        r->budget_tokens = 0;
        r->budget_bytes = 0;
    }
    snprintf(r->position, sizeof r->position, "%s", position != NULL ? position : kvs_position_name(p.position));
    snprintf(r->id, sizeof r->id, "%.110s/%s%s%.20s", short_name, r->position, budget != NULL ? "/" : "",
             budget != NULL ? budget : "");
    for (uint32_t i = 0; i < g->n; i++)
        if (strcmp(g->runs[i].id, r->id) == 0)
            return KVS_OK; /* given twice */
    g->n++;
    return KVS_OK;
}

void kvs_suite_reference(kvs_bench_run_spec *r)
{
    *r = (kvs_bench_run_spec){.is_reference = true};
    snprintf(r->id, sizeof r->id, "baseline/keep");
    snprintf(r->policy, sizeof r->policy, "baseline");
    snprintf(r->position, sizeof r->position, "keep");
}

kvs_status kvs_suite_runs(const kvs_suite *suite, const kvs_bench_options *opt, kvs_bench_run_spec *runs,
                          uint32_t *n_runs, kvs_error *err)
{
    grid g = {suite, opt, runs, 0};
    kvs_suite_reference(&runs[g.n++]);
    const char *const *positions = opt->n_positions > 0 ? opt->positions : suite->positions;
    uint32_t n_positions = opt->n_positions;
    while (opt->n_positions == 0 && positions[n_positions] != NULL)
        n_positions++;
    const uint32_t n_budgets = opt->n_budgets > 0 ? opt->n_budgets : 1;
    uint32_t n_policies = opt->n_policies;
    while (opt->n_policies == 0 && suite->policies[n_policies] != NULL)
        n_policies++;
    for (uint32_t p = 0; p < n_policies; p++)
        for (uint32_t m = 0; m < n_positions; m++)
            for (uint32_t b = 0; b < n_budgets; b++) {
                char spec[320];
                kvs_suite_fill(opt->n_policies > 0 ? opt->policies[p] : suite->policies[p], placeholder,
                               suite->trigger_tokens, spec, sizeof spec);
                if (strncmp(spec, "baseline", 8) == 0)
                    continue; /* always run 0 */
                KVS_TRY(add_run(&g, spec, positions[m], opt->n_budgets > 0 ? opt->budgets[b] : NULL,
                                opt->n_policies == 0, err));
            }
    *n_runs = g.n;
    return KVS_OK;
}

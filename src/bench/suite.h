/* What a suite runs: dialogues, trigger, runs. Tables only; nothing here touches a model. */
#ifndef KVS_BENCH_SUITE_H
#define KVS_BENCH_SUITE_H

#include "bench/runner.h"
#include "policy/profile.h"

enum { KVS_BENCH_RUNS_MAX = 480 };

typedef struct kvs_suite {
    const char *name, *doc;
    uint32_t n_dialogues; /* chained to target_tokens */
    uint32_t n_long;      /* the first n_long of them are chained to long_tokens instead: past the window */
    uint32_t target_tokens, long_tokens;
    uint32_t trigger_tokens;          /* where the schedule acts */
    uint32_t free_dialogues;          /* that are also played free-running */
    uint32_t free_turns, free_tokens; /* turns after the trigger, tokens an answer */
    uint32_t n_recall;                /* dialogues with planted facts, past the trigger before the first question */
    uint32_t recall_facts;            /* planted in each, one question about each */
    const char *const *policies;      /* [NULL-terminated] with %T, %G, %R, ... filled in by kvs_suite_runs */
    const char *const *positions;     /* [NULL-terminated] */
    /* Of a suite that walks the registry (suite_methods.c), else 0. */
    bool registry;
    uint32_t score_from_tokens; /* what stands before is read and not scored */
    /* What only the model knows; the runner fills it in. */
    uint64_t token_bytes; /* K and V of a token, all heads */
    kvs_profile_model model;
} kvs_suite;

/* Behind a spec in suite methods: the cache is full until scoring begins, then evicted once. */
#define KVS_SUITE_FULL_FIRST " (full first)"

/* One cell of the grid. */
typedef struct kvs_bench_run_spec {
    char id[160];     /* unique: what a person reads in tables */
    char policy[416]; /* as given to the session */
    char label[96];   /* of a suite that adds sizes to it: the policy without them; else empty */
    char share[24];   /* the same: what is held, as 10% */
    char position[24];
    uint32_t budget_tokens; /* 0: the whole dialogue */
    uint64_t budget_bytes;
    uint32_t first_tokens;    /* no eviction can happen before this many tokens were said */
    bool is_reference;        /* the full cache */
    uint32_t n_episodes;      /* not 0: episodes of the dialogue so far (kvs_episodes); only recall can play that */
    bool uniform_heads;       /* of episodes */
    const float *sensitivity; /* the same, [n_layers], or NULL; last, for it says nothing in a key */
} kvs_bench_run_spec;

const kvs_suite *kvs_suite_find(const char *name);
const kvs_suite *kvs_suite_at(uint32_t index);

/* The grid of a suite, changed by what the command line gave. runs [KVS_BENCH_RUNS_MAX]; run 0 is the reference.
 * EINVAL names the spec, budget or position that is wrong. */
kvs_status kvs_suite_runs(const kvs_suite *suite, const kvs_bench_options *opt, kvs_bench_run_spec *runs,
                          uint32_t *n_runs, kvs_error *err);

/* The same of a suite that walks the registry: each preset and the combinations that papers name, held at three shares of
 * the dialogue's length. suite->token_bytes and suite->model are filled in. EIO: the profiles' folder cannot be read. */
kvs_status kvs_suite_registry_runs(const kvs_suite *suite, const kvs_bench_options *opt, kvs_bench_run_spec *runs,
                                   uint32_t *n_runs, kvs_error *err);
/* Run 0 of every grid. */
void kvs_suite_reference(kvs_bench_run_spec *run);

/* pattern with each {c} replaced by value(c, base). A text that does not fit is cut. */
void kvs_suite_fill(const char *pattern, uint32_t (*value)(char c, uint32_t base), uint32_t base, char *out,
                    size_t cap);

#endif

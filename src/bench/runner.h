/* Runs dialogues x policies x budgets x position modes and writes the output folder of `kvasir bench`. */
#ifndef KVS_BENCH_RUNNER_H
#define KVS_BENCH_RUNNER_H

#include "kvasir.h"

typedef struct kvs_bench_options {
    const char *suite, *data_path, *out_dir, *model_path, *kv_type, *arith, *command_line;
    const char
        *profiles_dir; /* where a registry suite looks for the files that presets need; NULL: these are left out */
    const char *const *policies;
    uint32_t n_policies;
    const char *const *budgets;
    uint32_t n_budgets;
    const char *const *positions;
    uint32_t n_positions;
    uint32_t n_dialogues /* 0: suite's own */, shard_index, shard_count;
    bool resume, paper_compat, free_running;
    uint64_t seed;
    uint32_t n_threads, cpu_mask;
    void (*on_progress)(void *ctx, const char *stage, uint64_t done, uint64_t total, double seconds_left);
    void *ctx;
    volatile int *cancel; /* set by SIGINT handler */
} kvs_bench_options;

kvs_status kvs_bench_run(const kvs_bench_options *opt, kvs_error *err);

#endif

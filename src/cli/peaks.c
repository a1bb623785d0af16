/* The machine's limits: read bandwidth and the peaks of its arithmetic, by all threads at once. */
#include "cli/cli.h"

#include "kernels/peak.h"

#include <string.h>

enum {
    READ_TASKS = 256,
    READ_TASK_BYTES = 1 << 20, /* 256 MiB in all: more than a core's share of any cache */
    READ_SWEEPS = 5,
    LOOP_TASKS = 8,    /* of each thread, so that one that is late costs an eighth */
    LOOP_NS = 2000000, /* shorter than a scheduler's slice: some sweep is undisturbed */
    LOOP_SWEEPS = 60,
};
_Static_assert(READ_TASK_BYTES % KVS_PEAK_READ_UNIT == 0, "a task reads whole units");

typedef struct probe {
    const kvs_peak_kernels *kernels;
    const uint8_t *bytes;
    uint64_t n_rounds;
    uint64_t sums[READ_TASKS];
    double ops; /* of one task: all do the same */
} probe;

static void read_task(void *ctx, uint32_t task, uint32_t thread)
{
    (void)thread;
    probe *const p = ctx;
    p->sums[task] = p->kernels->read(p->bytes + (size_t)task * READ_TASK_BYTES, READ_TASK_BYTES);
}

static void f32_task(void *ctx, uint32_t task, uint32_t thread)
{
    (void)thread;
    probe *const p = ctx;
    float sum = 0;
    const double ops = p->kernels->fma_f32(p->n_rounds, &sum);
    if (task == 0)
        p->ops = ops;
}

static void int8_task(void *ctx, uint32_t task, uint32_t thread)
{
    (void)thread;
    probe *const p = ctx;
    int32_t sum = 1;
    const double ops = p->kernels->dot_int8(p->n_rounds, &sum);
    if (task == 0)
        p->ops = ops;
}

static double run_seconds(kvs_pool *pool, kvs_task_fn fn, probe *p, uint32_t n_tasks)
{
    const uint64_t begin_ns = kvs_now_ns();
    kvs_pool_run(pool, fn, p, n_tasks);
    return (double)(kvs_now_ns() - begin_ns) * 1e-9;
}

/* Operations a second of a loop in registers: as many rounds as fill LOOP_NS, best of LOOP_SWEEPS. */
static double loop_rate(kvs_pool *pool, kvs_task_fn fn, probe *p)
{
    const uint32_t n_tasks = LOOP_TASKS * kvs_pool_n_threads(pool);
    p->n_rounds = 200;
    const double trial_s = run_seconds(pool, fn, p, n_tasks);
    const double more = LOOP_NS * 1e-9 / (trial_s > 1e-6 ? trial_s : 1e-6);
    p->n_rounds = (uint64_t)((double)p->n_rounds * more) + 1;
    double best = 0;
    for (int sweep = 0; sweep < LOOP_SWEEPS; sweep++) {
        const double seconds = run_seconds(pool, fn, p, n_tasks), rate = p->ops * n_tasks / seconds;
        best = rate > best ? rate : best;
    }
    return best;
}

static double read_rate(kvs_pool *pool, probe *p)
{
    const size_t n_bytes = (size_t)READ_TASKS * READ_TASK_BYTES;
    uint8_t *const bytes = kvs_alloc(kvs_allocator_default(), 1, n_bytes);
    if (bytes == NULL)
        return 0;
    memset(bytes, 1, n_bytes); /* untouched pages are all the same zero page, which a cache would hold */
    p->bytes = bytes;
    double best = 0;
    for (int sweep = 0; sweep < READ_SWEEPS; sweep++) {
        const double rate = (double)n_bytes / run_seconds(pool, read_task, p, READ_TASKS);
        best = rate > best ? rate : best;
    }
    kvs_free(kvs_allocator_default(), bytes);
    return best;
}

static void measure(uint32_t n_threads, uint32_t cpu, bool arithmetic, kvs_cli_peaks *out)
{
    *out = (kvs_cli_peaks){.read_bytes_per_s = 0};
    kvs_pool *const pool = kvs_pool_create(kvs_allocator_default(), n_threads > 0 ? n_threads : kvs_cores_available());
    if (pool == NULL)
        return;
    probe p = {.kernels = kvs_peak_kernels_get(cpu)};
    kvs_affinity saved;
    kvs_pool_enter(pool, &saved);
    out->read_bytes_per_s = read_rate(pool, &p);
    if (arithmetic) {
        out->f32_flops = loop_rate(pool, f32_task, &p);
        out->int8_ops = p.kernels->dot_int8 != NULL ? loop_rate(pool, int8_task, &p) : 0;
    }
    kvs_pool_leave(&saved);
    kvs_pool_free(pool);
}

void kvs_cli_measure_peaks(uint32_t n_threads, uint32_t cpu, kvs_cli_peaks *out)
{
    measure(n_threads, cpu, true, out);
}

double kvs_cli_read_bandwidth(uint32_t n_threads)
{
    kvs_cli_peaks peaks;
    measure(n_threads, kvs_cpu_masked(0), false, &peaks);
    return peaks.read_bytes_per_s;
}

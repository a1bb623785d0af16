/* What everything else stands on: errors, memory, threads, CPU flags, random numbers, time. Includes libc only. */
#ifndef KVS_BASE_H
#define KVS_BASE_H

#include "kvasir.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- errors ---- */

/* Fills err (may be NULL) and returns status, so that `return kvs_error_set(...)` reads as one thought. */
kvs_status kvs_error_set(kvs_error *err, kvs_status status, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
#ifdef __clang_analyzer__ /* which does not look into error.c and would follow the path on which no error comes back */
#define kvs_error_set(err, status, ...) (kvs_error_set(err, status, __VA_ARGS__), (status))
#endif

#define KVS_TRY(expr)                                                                                                  \
    do {                                                                                                               \
        const kvs_status kvs_try_status_ = (expr);                                                                     \
        if (kvs_try_status_ != KVS_OK)                                                                                 \
            return kvs_try_status_;                                                                                    \
    } while (0)

/* The candidate nearest to word by edit distance, or NULL if none is near enough to suggest. */
const char *kvs_nearest(const char *word, const char *const *candidates, size_t n_candidates);

/* ---- memory ---- */

#define KVS_ALIGN 64u /* one cache line, one AVX-512 vector */

const kvs_allocator *kvs_allocator_default(void);
/* Zeroed, 64-byte aligned; NULL on failure or when n * size overflows. */
void *kvs_alloc(const kvs_allocator *a, size_t n, size_t size_bytes);
void kvs_free(const kvs_allocator *a, void *ptr);
bool kvs_mul_size(size_t a, size_t b, size_t *out);
static inline size_t kvs_round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}
static inline uint32_t kvs_min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}
static inline uint32_t kvs_max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* ---- threads ---- */

/* A pool of n_threads - 1 workers and the caller. A task writes only what its index owns, so results never depend on
 * which thread ran it. */
typedef struct kvs_pool kvs_pool;
typedef void (*kvs_task_fn)(void *ctx, uint32_t task, uint32_t thread);
kvs_pool *kvs_pool_create(const kvs_allocator *a, uint32_t n_threads);
void kvs_pool_free(kvs_pool *pool);
uint32_t kvs_pool_n_threads(const kvs_pool *pool);
/* Around many runs by one thread: gives the caller the core that the pool's workers leave free, and puts it back. */
typedef struct kvs_affinity {
    uint64_t mask[16];
    bool valid;
} kvs_affinity;
void kvs_pool_enter(kvs_pool *pool, kvs_affinity *saved);
void kvs_pool_leave(const kvs_affinity *saved);
/* Runs fn for task 0..n_tasks-1, handed out in order, and returns when all are done. Calls from different threads
 * are serialised. */
void kvs_pool_run(kvs_pool *pool, kvs_task_fn fn, void *ctx, uint32_t n_tasks);
uint32_t kvs_cores_available(void);

/* ---- CPU ---- */

enum {
    KVS_CPU_AVX2 = 1u << 0,   /* with FMA, F16C, BMI2 */
    KVS_CPU_AVX512 = 1u << 1, /* F, BW, DQ, VL */
    KVS_CPU_VNNI = 1u << 2,   /* AVX512-VNNI */
    KVS_CPU_BF16 = 1u << 3,   /* AVX512-BF16 */
    KVS_CPU_NEON = 1u << 4,
    KVS_CPU_DOTPROD = 1u << 5, /* NEON's 8-bit dot products, SDOT */
    KVS_CPU_END = 1u << 6,
};
/* What the machine and its operating system allow. */
uint32_t kvs_cpu_flags(void);
/* flags & mask with levels made consistent (no VNNI without AVX512, ...); mask 0 means all. */
uint32_t kvs_cpu_masked(uint32_t mask);
const char *kvs_cpu_isa_name(uint32_t flags);

/* ---- random numbers ---- */

/* splitmix64: the generator every seeded thing here uses, so that a seed means the same on every machine. */
typedef struct kvs_rng {
    uint64_t state;
} kvs_rng;
uint64_t kvs_rng_next(kvs_rng *rng);
double kvs_rng_double(kvs_rng *rng);              /* [0, 1) with 53 bits */
uint32_t kvs_rng_below(kvs_rng *rng, uint32_t n); /* [0, n), unbiased; n > 0 */
/* A draw that depends only on its arguments: (seed, a, b) -> 64 bits. */
uint64_t kvs_hash3(uint64_t seed, uint64_t a, uint64_t b);

/* ---- time ---- */

uint64_t kvs_now_ns(void); /* monotonic */

/* ---- text ---- */

/* Offset of the first byte that is not valid UTF-8, or n_bytes. */
size_t kvs_utf8_valid_prefix(const char *text, size_t n_bytes);

#endif

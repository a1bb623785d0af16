/* The thread pool: tasks are handed out in order from one counter; whoever waits spins briefly, then sleeps. */
#include "base/base.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

/* Decode steps follow each other within microseconds, a conversation pauses for seconds: spin for the first, sleep
 * for the second. 20 to 200 us, as long as a pause instruction takes. Where there are more threads than cores, who
 * spins keeps the one he waits for from running: nobody spins then. */
enum { SPINS_BEFORE_SLEEP = 4000 };

struct kvs_pool {
    const kvs_allocator *allocator;
    uint32_t n_threads;
    pthread_t *threads;       /* [n_threads - 1] */
    pthread_mutex_t run_lock; /* one kvs_pool_run at a time */
    pthread_mutex_t sleep_lock;
    pthread_cond_t wake, done;
    atomic_uint generation; /* bumped once per run: what workers wait for */
    atomic_uint n_sleeping;
    atomic_uint n_busy; /* workers still inside the current run */
    atomic_bool caller_sleeps;
    unsigned n_spins;
    atomic_uint next_task;
    atomic_bool stop;
    bool pinned;
    kvs_task_fn fn;
    void *ctx;
    uint32_t n_tasks;
    struct worker_arg {
        struct kvs_pool *pool;
        uint32_t thread;
    } * args; /* [n_threads - 1] */
};

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Schedulers that pack threads (some virtual machines put two busy threads on one core for whole seconds) cost a
 * factor of two and more here, where every product waits for the slowest thread. So when the pool may use every core
 * it has, thread i stays on the i-th. The caller is one of the pool's threads while a step runs: kvs_pool_enter moves
 * it, kvs_pool_leave puts it back, since threads that it starts would inherit its place. A pool of fewer threads than
 * cores pins nothing, so that several processes can share a machine. */
static void pin_to_core(const cpu_set_t *cores, uint32_t index)
{
    cpu_set_t one;
    for (uint32_t cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, cores) && index-- == 0) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            (void)sched_setaffinity(0, sizeof one, &one); /* a refusal costs speed only */
            return;
        }
}

/* The cores this process was given, read before any thread of it was pinned. */
static cpu_set_t process_cores;
static pthread_once_t process_cores_once = PTHREAD_ONCE_INIT;

static void read_process_cores(void)
{
    if (sched_getaffinity(0, sizeof process_cores, &process_cores) != 0)
        CPU_ZERO(&process_cores);
}

static void work(kvs_pool *p, uint32_t thread)
{
    const uint32_t n = p->n_tasks;
    for (;;) {
        const uint32_t task = atomic_fetch_add_explicit(&p->next_task, 1, memory_order_relaxed);
        if (task >= n)
            return;
        p->fn(p->ctx, task, thread);
    }
}

static void *worker_main(void *arg)
{
    kvs_pool *p = ((struct worker_arg *)arg)->pool;
    const uint32_t thread = ((struct worker_arg *)arg)->thread;
    unsigned seen = 0;
    if (p->pinned)
        pin_to_core(&process_cores, thread);
    for (;;) {
        unsigned spins = 0;
        while (atomic_load_explicit(&p->generation, memory_order_acquire) == seen) {
            if (++spins < p->n_spins) {
                cpu_relax();
                continue;
            }
            pthread_mutex_lock(&p->sleep_lock);
            atomic_fetch_add(&p->n_sleeping, 1);
            while (atomic_load(&p->generation) == seen)
                pthread_cond_wait(&p->wake, &p->sleep_lock);
            atomic_fetch_sub(&p->n_sleeping, 1);
            pthread_mutex_unlock(&p->sleep_lock);
        }
        seen++;
        if (atomic_load(&p->stop))
            return NULL;
        work(p, thread);
        if (atomic_fetch_sub(&p->n_busy, 1) == 1 && atomic_load(&p->caller_sleeps)) {
            pthread_mutex_lock(&p->sleep_lock);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->sleep_lock);
        }
    }
}

/* Sequentially consistent like the worker's count down: one of the two sees the other. */
static void wait_for_workers(kvs_pool *p)
{
    for (unsigned spins = 0; spins < p->n_spins; spins++) {
        if (atomic_load_explicit(&p->n_busy, memory_order_acquire) == 0)
            return;
        cpu_relax();
    }
    pthread_mutex_lock(&p->sleep_lock);
    atomic_store(&p->caller_sleeps, true);
    while (atomic_load(&p->n_busy) != 0)
        pthread_cond_wait(&p->done, &p->sleep_lock);
    atomic_store(&p->caller_sleeps, false);
    pthread_mutex_unlock(&p->sleep_lock);
}

static void start_run(kvs_pool *p)
{
    atomic_store_explicit(&p->next_task, 0, memory_order_relaxed);
    atomic_store_explicit(&p->n_busy, p->n_threads - 1, memory_order_relaxed);
    atomic_fetch_add(&p->generation, 1); /* sequentially consistent: pairs with n_sleeping below */
    if (atomic_load(&p->n_sleeping) != 0) {
        pthread_mutex_lock(&p->sleep_lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->sleep_lock);
    }
}

void kvs_pool_run(kvs_pool *p, kvs_task_fn fn, void *ctx, uint32_t n_tasks)
{
    if (n_tasks == 0)
        return;
    pthread_mutex_lock(&p->run_lock);
    if (p->n_threads == 1 || n_tasks == 1) {
        for (uint32_t i = 0; i < n_tasks; i++)
            fn(ctx, i, 0);
        pthread_mutex_unlock(&p->run_lock);
        return;
    }
    p->fn = fn;
    p->ctx = ctx;
    p->n_tasks = n_tasks;
    start_run(p);
    work(p, 0);
    wait_for_workers(p);
    pthread_mutex_unlock(&p->run_lock);
}

void kvs_pool_enter(kvs_pool *p, kvs_affinity *saved)
{
    _Static_assert(sizeof(cpu_set_t) <= sizeof saved->mask, "kvs_affinity holds a CPU set");
    saved->valid = p->pinned && sched_getaffinity(0, sizeof(cpu_set_t), (cpu_set_t *)(void *)saved->mask) == 0;
    if (saved->valid)
        pin_to_core(&process_cores, 0);
}

void kvs_pool_leave(const kvs_affinity *saved)
{
    if (saved->valid)
        (void)sched_setaffinity(0, sizeof(cpu_set_t), (const cpu_set_t *)(const void *)saved->mask);
}

uint32_t kvs_cores_available(void)
{
    pthread_once(&process_cores_once, read_process_cores);
    if (CPU_COUNT(&process_cores) > 0)
        return (uint32_t)CPU_COUNT(&process_cores);
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (uint32_t)n : 1;
}

kvs_pool *kvs_pool_create(const kvs_allocator *a, uint32_t n_threads)
{
    if (n_threads == 0)
        n_threads = 1;
    kvs_pool *p = kvs_alloc(a, 1, sizeof *p);
    if (p == NULL)
        return NULL;
    p->allocator = a;
    p->threads = kvs_alloc(a, n_threads, sizeof *p->threads);
    p->args = kvs_alloc(a, n_threads, sizeof *p->args);
    pthread_mutex_init(&p->run_lock, NULL);
    pthread_mutex_init(&p->sleep_lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    p->n_threads = 1;
    p->pinned = n_threads > 1 && n_threads == kvs_cores_available();
    p->n_spins = n_threads <= kvs_cores_available() ? SPINS_BEFORE_SLEEP : 0;
    if (p->threads == NULL || p->args == NULL) {
        kvs_pool_free(p);
        return NULL;
    }
    for (uint32_t i = 1; i < n_threads; i++) {
        p->args[i - 1].pool = p;
        p->args[i - 1].thread = i;
        if (pthread_create(&p->threads[i - 1], NULL, worker_main, &p->args[i - 1]) != 0)
            break; /* fewer threads are slower, not wrong */
        p->n_threads = i + 1;
    }
    return p;
}

void kvs_pool_free(kvs_pool *p)
{
    if (p == NULL)
        return;
    if (p->n_threads > 1) {
        atomic_store(&p->stop, true);
        start_run(p);
        for (uint32_t i = 1; i < p->n_threads; i++)
            pthread_join(p->threads[i - 1], NULL);
    }
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->done);
    pthread_mutex_destroy(&p->sleep_lock);
    pthread_mutex_destroy(&p->run_lock);
    kvs_free(p->allocator, p->threads);
    kvs_free(p->allocator, p->args);
    kvs_free(p->allocator, p);
}

uint32_t kvs_pool_n_threads(const kvs_pool *p)
{
    return p->n_threads;
}

/* The loops behind the roofline: a limit is only as good as the count of what its loop did. */
#include "kernels/peak.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

/* Each table with the floats of its vectors. */
static const struct level {
    uint32_t cpu;
    double lanes;
} levels[] = {{0, 1},
              {KVS_CPU_AVX2, 8},
              {KVS_CPU_AVX2 | KVS_CPU_AVX512, 16},
              {KVS_CPU_AVX2 | KVS_CPU_AVX512 | KVS_CPU_VNNI, 16},
              {KVS_CPU_NEON, 4},
              {KVS_CPU_NEON | KVS_CPU_DOTPROD, 4}};
enum { N_LEVELS = sizeof levels / sizeof levels[0], N_WORDS = 3 * KVS_PEAK_READ_UNIT / 8 };

static const kvs_peak_kernels *kernels(const struct level *l)
{
    return (kvs_cpu_flags() & l->cpu) == l->cpu ? kvs_peak_kernels_get(l->cpu) : NULL;
}

/* Chain c begins at c. With a factor of 0 it stays there, so that the first lane's sum tells how many there are. */
static void more_operations_counted_than_done(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_LEVELS; i++) {
        const kvs_peak_kernels *const k = kernels(&levels[i]);
        if (k == NULL)
            continue;
        float sum = 0;
        const double n_chains = k->fma_f32(1000, &sum) / (2.0 * 1000 * levels[i].lanes);
        assert_true(n_chains >= 1);
        assert_true((double)sum == n_chains * (n_chains - 1) / 2);
    }
}

static void integer_operations_do_not_grow_with_rounds(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_LEVELS; i++) {
        const kvs_peak_kernels *const k = kernels(&levels[i]);
        int32_t sink = 1;
        if (k != NULL && k->dot_int8 != NULL)
            assert_true(k->dot_int8(3000, &sink) == 3 * k->dot_int8(1000, &sink));
    }
}

static void some_bytes_are_never_read(void **state)
{
    (void)state;
    uint64_t *const words = kvs_alloc(kvs_allocator_default(), N_WORDS, sizeof *words);
    assert_non_null(words);
    kvs_rng rng = {.state = 7};
    uint64_t want = 0;
    for (size_t i = 0; i < N_WORDS; i++) {
        words[i] = kvs_rng_next(&rng);
        want ^= words[i];
    }
    for (size_t i = 0; i < N_LEVELS; i++) {
        const kvs_peak_kernels *const k = kernels(&levels[i]);
        if (k != NULL)
            assert_true(k->read(words, N_WORDS * sizeof *words) == want);
    }
    kvs_free(kvs_allocator_default(), words);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(more_operations_counted_than_done),
        cmocka_unit_test(integer_operations_do_not_grow_with_rounds),
        cmocka_unit_test(some_bytes_are_never_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

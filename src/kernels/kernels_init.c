/* Which function runs on which instruction set. Tables are filled once, plain C first and each level over it, then
 * never change. Finding out what the machine has is base's work, the products' inner loops are matmul_init's.
 */
#include "kernels/kernels_impl.h"
#include "kernels/matmul.h"

#include <pthread.h>

enum { LEVELS = 16 }; /* one per combination of the four KVS_CPU_* bits */

static kvs_kernels tables[LEVELS];
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static void fill_tables(void)
{
    for (uint32_t cpu = 0; cpu < LEVELS; cpu++) {
        kvs_kernels *const k = &tables[cpu];
        k->cpu = cpu;
        kvs_vector_fill_ref(k);
        kvs_attention_fill_ref(k);
#if defined(__x86_64__)
        if (cpu & KVS_CPU_AVX2) {
            kvs_vector_fill_avx2(k);
            kvs_attention_fill_avx2(k);
        }
        if (cpu & KVS_CPU_AVX512) {
            kvs_vector_fill_avx512(k);
            kvs_attention_fill_avx512(k);
        }
#endif
        k->matmul = kvs_matmul_kernels_get(cpu);
    }
}

const kvs_kernels *kvs_kernels_get(uint32_t cpu)
{
    pthread_once(&tables_once, fill_tables);
    return &tables[cpu % LEVELS];
}

/* Which function runs on which instruction set. Tables are filled once, plain C first and each level over it, then
 * never change. Finding out what the machine has is base's work, the products' inner loops are matmul_init's.
 */
#include "kernels/kernels_impl.h"
#include "kernels/matmul.h"
#include "kernels/peak.h"

#include <pthread.h>

enum { LEVELS = KVS_CPU_END }; /* one per combination of the KVS_CPU_* bits */

static kvs_kernels tables[LEVELS];
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static void fill_tables(void)
{
    for (uint32_t cpu = 0; cpu < LEVELS; cpu++) {
        kvs_kernels *const k = &tables[cpu];
        k->cpu = cpu;
        kvs_vector_fill_ref(k);
        kvs_attention_fill_ref(k);
        kvs_norm_fill_ref(k);
#if defined(__x86_64__)
        if (cpu & KVS_CPU_AVX2) {
            kvs_vector_fill_avx2(k);
            kvs_attention_fill_avx2(k);
            kvs_norm_fill_avx2(k);
        }
        if (cpu & KVS_CPU_AVX512) {
            kvs_vector_fill_avx512(k);
            kvs_attention_fill_avx512(k);
            kvs_norm_fill_avx512(k);
        }
#elif defined(__aarch64__)
        if (cpu & KVS_CPU_NEON) {
            kvs_vector_fill_neon(k);
            kvs_attention_fill_neon(k);
            kvs_norm_fill_neon(k);
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

const kvs_peak_kernels *kvs_peak_kernels_get(uint32_t cpu)
{
#if defined(__x86_64__)
    if (cpu & KVS_CPU_VNNI)
        return &kvs_peak_kernels_avx512vnni;
    if (cpu & KVS_CPU_AVX512)
        return &kvs_peak_kernels_avx512;
    if (cpu & KVS_CPU_AVX2)
        return &kvs_peak_kernels_avx2;
#elif defined(__aarch64__)
    if (cpu & KVS_CPU_DOTPROD)
        return &kvs_peak_kernels_neondot;
    if (cpu & KVS_CPU_NEON)
        return &kvs_peak_kernels_neon;
#endif
    (void)cpu;
    return &kvs_peak_kernels_ref;
}

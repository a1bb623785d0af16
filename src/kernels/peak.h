/* Loops made of nothing but a machine's limits: fused multiply-adds, products of 8-bit codes, reads. They are the
 * roofline of `kvasir speed`; no part of the forward pass. One table per instruction set, so that a limit belongs to the
 * instructions that the kernels really use.
 */
#ifndef KVS_PEAK_H
#define KVS_PEAK_H

#include "base/base.h"

/* Reads run in four streams side by side: one alone leaves the hardware's prefetchers idle at every page's end. */
enum { KVS_PEAK_STREAMS = 4, KVS_PEAK_READ_UNIT = 2048 };

typedef struct kvs_peak_kernels {
    /* n_rounds rounds on registers alone; returns the operations done, a multiply-add counting as two. *sink takes the
     * sums, so that the work cannot be left out. */
    double (*fma_f32)(uint64_t n_rounds, float *sink);
    /* The same for products of 8-bit codes: VPDPBUSD or SDOT where there is one, else products added in 16 bits, which
     * is what 4-bit codes allow. NULL: the set has no such instruction. */
    double (*dot_int8)(uint64_t n_rounds, int32_t *sink);
    /* Reads n_bytes, a multiple of KVS_PEAK_READ_UNIT, from a 64-byte aligned address; returns the exclusive or of the
     * 64-bit words there. */
    uint64_t (*read)(const void *bytes, size_t n_bytes);
} kvs_peak_kernels;

/* cpu: KVS_CPU_* bits as from kvs_cpu_masked(). */
const kvs_peak_kernels *kvs_peak_kernels_get(uint32_t cpu);

extern const kvs_peak_kernels kvs_peak_kernels_ref, kvs_peak_kernels_avx2, kvs_peak_kernels_avx512,
    kvs_peak_kernels_avx512vnni, kvs_peak_kernels_neon, kvs_peak_kernels_neondot;

/* Shared by the tables of one register width. */
double kvs_peak_fma_f32_avx512(uint64_t n_rounds, float *sink);
uint64_t kvs_peak_read_avx512(const void *bytes, size_t n_bytes);
double kvs_peak_fma_f32_neon(uint64_t n_rounds, float *sink);
uint64_t kvs_peak_read_neon(const void *bytes, size_t n_bytes);

#endif

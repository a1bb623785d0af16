/* The limit of vpdpbusd: 64 products of 8-bit codes added into 16 sums. */
#include "kernels/peak.h"

#include <immintrin.h>

enum { CHAINS = 16 };

static double dot_int8(uint64_t n_rounds, int32_t *sink)
{
    __m512i acc[CHAINS];
    const __m512i a = _mm512_set1_epi8((char)*sink), b = _mm512_set1_epi8((char)(*sink + 1));
    for (int c = 0; c < CHAINS; c++)
        acc[c] = _mm512_set1_epi32(c);
    for (uint64_t i = 0; i < n_rounds; i++)
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; c++)
            acc[c] = _mm512_dpbusd_epi32(acc[c], a, b);
    for (int c = 1; c < CHAINS; c++)
        acc[0] = _mm512_add_epi32(acc[0], acc[c]);
    *sink += _mm512_cvtsi512_si32(acc[0]);
    return 2.0 * 64 * CHAINS * (double)n_rounds;
}

const kvs_peak_kernels kvs_peak_kernels_avx512vnni = {kvs_peak_fma_f32_avx512, dot_int8, kvs_peak_read_avx512};

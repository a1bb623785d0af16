/* The limits of AVX-512: 32 registers, so 16 chains hide any latency. */
#include "kernels/peak.h"

#include <immintrin.h>

enum { CHAINS = 16 };

double kvs_peak_fma_f32_avx512(uint64_t n_rounds, float *sink)
{
    __m512 acc[CHAINS];
    const __m512 a = _mm512_set1_ps(*sink), b = _mm512_set1_ps(*sink + 1);
    for (int c = 0; c < CHAINS; c++)
        acc[c] = _mm512_set1_ps((float)c);
    for (uint64_t i = 0; i < n_rounds; i++)
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; c++)
            acc[c] = _mm512_fmadd_ps(a, b, acc[c]);
    for (int c = 1; c < CHAINS; c++)
        acc[0] = _mm512_add_ps(acc[0], acc[c]);
    *sink += _mm512_cvtss_f32(acc[0]);
    return 2.0 * 16 * CHAINS * (double)n_rounds;
}

static double dot_int8(uint64_t n_rounds, int32_t *sink)
{
    __m512i acc[CHAINS];
    const __m512i b = _mm512_set1_epi8((char)*sink);
    for (int c = 0; c < CHAINS; c++)
        acc[c] = _mm512_set1_epi16((int16_t)c);
    for (uint64_t i = 0; i < n_rounds; i++)
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; c++)
            acc[c] = _mm512_add_epi16(b, _mm512_maddubs_epi16(acc[c], b));
    for (int c = 1; c < CHAINS; c++)
        acc[0] = _mm512_add_epi16(acc[0], acc[c]);
    *sink += _mm512_cvtsi512_si32(acc[0]);
    return 2.0 * 64 * CHAINS * (double)n_rounds;
}

uint64_t kvs_peak_read_avx512(const void *bytes, size_t n_bytes)
{
    const __m512i *const v = bytes;
    const size_t n = n_bytes / KVS_PEAK_STREAMS / sizeof *v; /* vectors of one stream */
    __m512i acc[KVS_PEAK_STREAMS];
    for (size_t s = 0; s < KVS_PEAK_STREAMS; s++)
        acc[s] = _mm512_setzero_si512();
    for (size_t i = 0; i < n; i += 4)
#pragma GCC unroll 4
        for (size_t s = 0; s < KVS_PEAK_STREAMS; s++)
#pragma GCC unroll 4
            for (size_t c = 0; c < 4; c++)
                acc[s] = _mm512_xor_si512(acc[s], _mm512_load_si512(v + s * n + i + c));
    acc[0] = _mm512_xor_si512(_mm512_xor_si512(acc[0], acc[1]), _mm512_xor_si512(acc[2], acc[3]));
    const __m256i low = _mm512_castsi512_si256(acc[0]), high = _mm512_extracti64x4_epi64(acc[0], 1);
    const __m256i half = _mm256_xor_si256(low, high);
    const __m128i quarter = _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return (uint64_t)(_mm_extract_epi64(quarter, 0) ^ _mm_extract_epi64(quarter, 1));
}

const kvs_peak_kernels kvs_peak_kernels_avx512 = {kvs_peak_fma_f32_avx512, dot_int8, kvs_peak_read_avx512};

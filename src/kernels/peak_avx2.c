/* The limits of AVX2 with FMA. Of its 16 registers 12 can be chains, or 10 where every step needs one for a moment. */
#include "kernels/peak.h"

#include <immintrin.h>

enum { CHAINS = 12, INT8_CHAINS = 10 };

static double fma_f32(uint64_t n_rounds, float *sink)
{
    __m256 acc[CHAINS];
    const __m256 a = _mm256_set1_ps(*sink), b = _mm256_set1_ps(*sink + 1);
    for (int c = 0; c < CHAINS; c++)
        acc[c] = _mm256_set1_ps((float)c);
    for (uint64_t i = 0; i < n_rounds; i++)
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++)
            acc[c] = _mm256_fmadd_ps(a, b, acc[c]);
    for (int c = 1; c < CHAINS; c++)
        acc[0] = _mm256_add_ps(acc[0], acc[c]);
    *sink += _mm256_cvtss_f32(acc[0]);
    return 2.0 * 8 * CHAINS * (double)n_rounds;
}

static double dot_int8(uint64_t n_rounds, int32_t *sink)
{
    __m256i acc[INT8_CHAINS];
    const __m256i b = _mm256_set1_epi8((char)*sink);
    for (int c = 0; c < INT8_CHAINS; c++)
        acc[c] = _mm256_set1_epi16((int16_t)c);
    for (uint64_t i = 0; i < n_rounds; i++)
#pragma GCC unroll 10
        for (int c = 0; c < INT8_CHAINS; c++)
            acc[c] = _mm256_add_epi16(b, _mm256_maddubs_epi16(acc[c], b));
    for (int c = 1; c < INT8_CHAINS; c++)
        acc[0] = _mm256_add_epi16(acc[0], acc[c]);
    *sink += _mm256_cvtsi256_si32(acc[0]);
    return 2.0 * 32 * INT8_CHAINS * (double)n_rounds;
}

static uint64_t read_bytes(const void *bytes, size_t n_bytes)
{
    const __m256i *const v = bytes;
    const size_t n = n_bytes / KVS_PEAK_STREAMS / sizeof *v; /* vectors of one stream */
    __m256i acc[KVS_PEAK_STREAMS];
    for (size_t s = 0; s < KVS_PEAK_STREAMS; s++)
        acc[s] = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 8)
#pragma GCC unroll 4
        for (size_t s = 0; s < KVS_PEAK_STREAMS; s++)
#pragma GCC unroll 8
            for (size_t c = 0; c < 8; c++)
                acc[s] = _mm256_xor_si256(acc[s], _mm256_load_si256(v + s * n + i + c));
    acc[0] = _mm256_xor_si256(_mm256_xor_si256(acc[0], acc[1]), _mm256_xor_si256(acc[2], acc[3]));
    const __m128i half = _mm_xor_si128(_mm256_castsi256_si128(acc[0]), _mm256_extracti128_si256(acc[0], 1));
    return (uint64_t)(_mm_extract_epi64(half, 0) ^ _mm_extract_epi64(half, 1));
}

const kvs_peak_kernels kvs_peak_kernels_avx2 = {fma_f32, dot_int8, read_bytes};

/* What simd_avx2.h and simd_avx512.h share. Only they include this. */
#ifndef KVS_SIMD_X86_H
#define KVS_SIMD_X86_H

#include <immintrin.h>
#include <stddef.h>

/* Floats at .. at + 7 of eight rows, as eight rows of out. */
static inline void vf_transpose_8x8(const float *const *rows, size_t at, float *out, size_t out_stride)
{
    __m256 a[8], b[8];
    for (int r = 0; r < 4; r++) { /* rows r and r + 4 side by side: only in-lane shuffles are left */
        const float *const top = rows[r] + at, *const low = rows[r + 4] + at;
        a[r] = _mm256_set_m128(_mm_loadu_ps(low), _mm_loadu_ps(top));
        a[r + 4] = _mm256_set_m128(_mm_loadu_ps(low + 4), _mm_loadu_ps(top + 4));
    }
    for (int q = 0; q < 8; q += 4) {
        const __m256 x = _mm256_unpacklo_ps(a[q], a[q + 1]), y = _mm256_unpackhi_ps(a[q], a[q + 1]);
        const __m256 z = _mm256_unpacklo_ps(a[q + 2], a[q + 3]), w = _mm256_unpackhi_ps(a[q + 2], a[q + 3]);
        b[q] = _mm256_shuffle_ps(x, z, 0x44);
        b[q + 1] = _mm256_shuffle_ps(x, z, 0xee);
        b[q + 2] = _mm256_shuffle_ps(y, w, 0x44);
        b[q + 3] = _mm256_shuffle_ps(y, w, 0xee);
    }
    for (int f = 0; f < 8; f++)
        _mm256_storeu_ps(out + (size_t)f * out_stride, b[f]);
}

#endif

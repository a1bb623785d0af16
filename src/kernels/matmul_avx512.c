/* AVX-512 (F, BW, DQ, VL) inner loops of the products: one panel of 16 outputs is one vector. The f32 loops serve
 * machines with VNNI too; the integer products here are for those without. */
#define F32_NAME(name) kvs_matmul_##name##_avx512
enum { ROW_TILE = 12, FEW_PANELS_MAX = 4 };

#include "kernels/matmul_f32_body.h"
#include "kernels/matmul_native_body.h"

/* 2 vectors x 12 rows: 24 accumulators, 2 weights and an activation of 32 registers. */
ALWAYS_INLINE void tile_rows(const int n_rows, const float *w0, const float *w1, const float *x, uint32_t n_k,
                             const float *from, float *to, size_t to_stride)
{
    __m512 s[2 * ROW_TILE];
#pragma GCC unroll 24
    for (int i = 0; i < 2 * n_rows; i++)
        s[i] = from != NULL ? _mm512_loadu_ps(from + i * KVS_PANEL) : _mm512_setzero_ps();
    for (uint32_t k = 0; k < n_k; k++, w0 += KVS_PANEL, w1 += KVS_PANEL, x += ROW_TILE) {
        const __m512 a0 = _mm512_load_ps(w0), a1 = _mm512_load_ps(w1);
#pragma GCC unroll 12
        for (int r = 0; r < n_rows; r++) {
            const __m512 v = _mm512_set1_ps(x[r]);
            s[2 * r] = _mm512_fmadd_ps(a0, v, s[2 * r]);
            s[2 * r + 1] = _mm512_fmadd_ps(a1, v, s[2 * r + 1]);
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < 2 * n_rows; i++)
        _mm512_storeu_ps(to + (size_t)(i / 2) * to_stride + i % 2 * KVS_PANEL, s[i]);
}

void kvs_matmul_f32_tile_avx512(const float *w0, const float *w1, const float *x, uint32_t n_k, uint32_t n_rows,
                                const float *from, float *to, size_t to_stride)
{
    if (n_rows <= 4)
        tile_rows(4, w0, w1, x, n_k, from, to, to_stride);
    else if (n_rows <= 8)
        tile_rows(8, w0, w1, x, n_k, from, to, to_stride);
    else
        tile_rows(ROW_TILE, w0, w1, x, n_k, from, to, to_stride);
}

const struct kvs_matmul_kernels kvs_matmul_kernels_avx512 = {ROW_TILE,
                                                             F32_NAME(f32_few),
                                                             F32_NAME(widen),
                                                             F32_NAME(f32_tile),
                                                             F32_NAME(round),
                                                             kvs_matmul_quantise_avx2,
                                                             kvs_matmul_quantise_k_avx2,
                                                             native};

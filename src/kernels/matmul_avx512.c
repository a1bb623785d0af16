/* AVX-512 (F, BW, DQ, VL) inner loops of the products: one panel of 16 outputs is one vector. The f32 loops serve
 * machines with VNNI too; the integer products here are for those without. */
#include "kernels/matmul.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { ROW_TILE = 12, FEW_PANELS_MAX = 4 };

ALWAYS_INLINE void load_scales(const kvs_weight_type type, const uint16_t *d, size_t m_offset, __m512 *dv, __m512 *mv)
{
    *dv = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)d));
    if (type == KVS_WEIGHT_Q4_1)
        *mv = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(d + m_offset)));
    else
        *mv = _mm512_mul_ps(*dv, _mm512_set1_ps(type == KVS_WEIGHT_Q4_0 ? -8.0f : -128.0f));
}

/* Code n (0..7 of nibbles, 0..3 of bytes) of each word as f32. A nibble needs no mask: the permute that looks its
 * value up reads four bits of the index. */
ALWAYS_INLINE __m512 code_ps(const kvs_weight_type type, __m512i words, const unsigned n)
{
    if (type == KVS_WEIGHT_Q8_0)
        return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, n * 8), _mm512_set1_epi32(255)));
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, n * 4), values);
}

/* One block of n_panels panels x n_rows rows, weights widened in registers; several panels hide the FMA's latency. */
ALWAYS_INLINE void few_block(const kvs_weight_type type, const unsigned n_rows, const unsigned n_panels,
                             const uint8_t *codes, const uint16_t *d, size_t stride_bytes, size_t m_offset,
                             const float *x, size_t x_stride, __m512 *acc)
{
    __m512 dv[FEW_PANELS_MAX], mv[FEW_PANELS_MAX];
#pragma GCC unroll 4
    for (unsigned p = 0; p < n_panels; p++)
        load_scales(type, d + p * (stride_bytes / sizeof *d), m_offset, &dv[p], &mv[p]);
    const unsigned n_high = type == KVS_WEIGHT_Q8_0 ? 1 : 2, n_words = type == KVS_WEIGHT_Q8_0 ? 8 : 4;
#pragma GCC unroll 2
    for (unsigned high = 0; high < n_high; high++)
#pragma GCC unroll 1
        for (unsigned j = 0; j < n_words; j++) {
#pragma GCC unroll 4
            for (unsigned b = 0; b < 4; b++) {
                const unsigned n = type == KVS_WEIGHT_Q8_0 ? b : 2 * b + high;
                __m512 a[KVS_F32_FEW_ROWS];
#pragma GCC unroll 4
                for (unsigned r = 0; r < n_rows; r++)
                    a[r] = _mm512_set1_ps(x[r * x_stride + high * 16 + j * 4 + b]);
#pragma GCC unroll 4
                for (unsigned p = 0; p < n_panels; p++) {
                    const __m512i words = _mm512_load_si512(codes + p * stride_bytes + (size_t)j * 64);
                    const __m512 w = _mm512_fmadd_ps(code_ps(type, words, n), dv[p], mv[p]);
#pragma GCC unroll 4
                    for (unsigned r = 0; r < n_rows; r++)
                        acc[p * n_rows + r] = _mm512_fmadd_ps(w, a[r], acc[p * n_rows + r]);
                }
            }
        }
}

ALWAYS_INLINE void few_panels(const kvs_weight_type type, const unsigned n_rows, const unsigned n_panels,
                              const struct kvs_panels *p, const uint8_t *panel, const float *x, size_t x_stride,
                              float *y, size_t y_stride)
{
    const size_t stride_bytes = p->stride_bytes;
    __m512 acc[FEW_PANELS_MAX * KVS_F32_FEW_ROWS];
#pragma GCC unroll 16
    for (unsigned i = 0; i < n_panels * n_rows; i++)
        acc[i] = _mm512_setzero_ps();
    if (type == KVS_WEIGHT_F32) {
        for (size_t k = 0; k < p->n_in; k++)
#pragma GCC unroll 4
            for (unsigned i = 0; i < n_panels; i++) {
                const __m512 w = _mm512_load_ps(panel + i * stride_bytes + k * 64);
#pragma GCC unroll 4
                for (unsigned r = 0; r < n_rows; r++)
                    acc[i * n_rows + r] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[r * x_stride + k]), acc[i * n_rows + r]);
            }
    } else {
        const uint32_t n_blocks = p->n_in / KVS_QBLOCK;
        const uint16_t *d = kvs_panel_scales(p, panel);
        for (uint32_t b = 0; b < n_blocks; b++, x += KVS_QBLOCK, d += KVS_PANEL)
            few_block(type, n_rows, n_panels, panel + b * kvs_panel_code_bytes(type), d, stride_bytes,
                      (size_t)n_blocks * KVS_PANEL, x, x_stride, acc);
    }
#pragma GCC unroll 4
    for (unsigned i = 0; i < n_panels; i++)
#pragma GCC unroll 4
        for (unsigned r = 0; r < n_rows; r++)
            _mm512_storeu_ps(y + r * y_stride + (size_t)i * KVS_PANEL, acc[i * n_rows + r]);
}

/* step panels at a time, the rest one by one. */
ALWAYS_INLINE void few_rows(const kvs_weight_type type, const unsigned n_rows, const unsigned step,
                            const struct kvs_panels *p, const float *x, size_t x_stride, float *y, size_t y_stride)
{
    const uint8_t *panel = p->base;
    uint32_t n = 0;
    for (; n + step <= p->n_panels; n += step, panel += step * p->stride_bytes)
        few_panels(type, n_rows, step, p, panel, x, x_stride, y + (size_t)n * KVS_PANEL, y_stride);
    for (; n < p->n_panels; n++, panel += p->stride_bytes)
        few_panels(type, n_rows, 1, p, panel, x, x_stride, y + (size_t)n * KVS_PANEL, y_stride);
}

ALWAYS_INLINE void few_type(const kvs_weight_type type, const struct kvs_panels *p, const float *x, size_t x_stride,
                            uint32_t n_rows, float *y, size_t y_stride)
{
    switch (n_rows) {
    case 1:
        few_rows(type, 1, 4, p, x, x_stride, y, y_stride);
        break;
    case 2:
        few_rows(type, 2, 2, p, x, x_stride, y, y_stride);
        break;
    case 3:
        few_rows(type, 3, 2, p, x, x_stride, y, y_stride);
        break;
    default:
        few_rows(type, 4, 2, p, x, x_stride, y, y_stride);
    }
}

void kvs_matmul_f32_few_avx512(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
                               size_t y_stride)
{
    switch (p->type) {
    case KVS_WEIGHT_Q4_0:
        few_type(KVS_WEIGHT_Q4_0, p, x, x_stride, n_rows, y, y_stride);
        break;
    case KVS_WEIGHT_Q4_1:
        few_type(KVS_WEIGHT_Q4_1, p, x, x_stride, n_rows, y, y_stride);
        break;
    case KVS_WEIGHT_Q8_0:
        few_type(KVS_WEIGHT_Q8_0, p, x, x_stride, n_rows, y, y_stride);
        break;
    default:
        few_type(KVS_WEIGHT_F32, p, x, x_stride, n_rows, y, y_stride);
    }
}

ALWAYS_INLINE void widen_type(const kvs_weight_type type, const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k,
                              float *out)
{
    const size_t m_offset = (size_t)(p->n_in / KVS_QBLOCK) * KVS_PANEL;
    const unsigned n_codes = type == KVS_WEIGHT_Q8_0 ? 4 : 8; /* of one word */
    for (uint32_t b = k_begin / KVS_QBLOCK; b < (k_begin + n_k) / KVS_QBLOCK; b++, out += KVS_QBLOCK * KVS_PANEL) {
        const uint8_t *codes = p->base + b * kvs_panel_code_bytes(type);
        __m512 d, m;
        load_scales(type, kvs_panel_scales(p, p->base) + (size_t)b * KVS_PANEL, m_offset, &d, &m);
        for (uint32_t j = 0; j < (type == KVS_WEIGHT_Q8_0 ? 8u : 4u); j++) {
            const __m512i words = _mm512_load_si512(codes + (size_t)j * 64);
#pragma GCC unroll 8
            for (unsigned n = 0; n < n_codes; n++) {
                const uint32_t k = j * 4 + (type == KVS_WEIGHT_Q8_0 ? n : n / 2 + n % 2 * 16);
                _mm512_store_ps(out + k * KVS_PANEL, _mm512_fmadd_ps(code_ps(type, words, n), d, m));
            }
        }
    }
}

void kvs_matmul_widen_avx512(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out)
{
    if (p->type == KVS_WEIGHT_Q4_0)
        widen_type(KVS_WEIGHT_Q4_0, p, k_begin, n_k, out);
    else if (p->type == KVS_WEIGHT_Q4_1)
        widen_type(KVS_WEIGHT_Q4_1, p, k_begin, n_k, out);
    else
        widen_type(KVS_WEIGHT_Q8_0, p, k_begin, n_k, out);
}

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

ALWAYS_INLINE __m512i broadcast_codes(const int8_t *q, uint32_t j)
{
    int32_t word;
    memcpy(&word, q + j * 4, sizeof word);
    return _mm512_set1_epi32(word);
}

/* Sixteen outputs x n_rows with vpmaddubsw. A pair of products of a nibble and a code is at most 2 * 15 * 128, so
 * eight of them stay within 16 bits and are widened once; bytes are split in nibbles for that. */
ALWAYS_INLINE void native_rows(const kvs_weight_type type, const unsigned n_rows, const struct kvs_panels *p,
                               const uint8_t *panel, const struct kvs_act_block *tile, uint32_t row, float *y,
                               size_t y_stride)
{
    const uint32_t n_blocks = p->n_in / KVS_QBLOCK, n_words = type == KVS_WEIGHT_Q8_0 ? 8 : 4;
    const __m512i low = _mm512_set1_epi8(15), ones = _mm512_set1_epi16(1);
    const uint16_t *d = kvs_panel_scales(p, panel);
    const uint8_t *codes = panel;
    __m512 acc[4];
#pragma GCC unroll 4
    for (unsigned r = 0; r < n_rows; r++)
        acc[r] = _mm512_setzero_ps();
    for (uint32_t b = 0; b < n_blocks; b++, tile++, d += KVS_PANEL, codes += kvs_panel_code_bytes(type)) {
        __m512i s16[4], h16[4];
        __m512 dv, mv;
        load_scales(type, d, (size_t)n_blocks * KVS_PANEL, &dv, &mv);
#pragma GCC unroll 4
        for (unsigned r = 0; r < n_rows; r++)
            s16[r] = h16[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (uint32_t j = 0; j < n_words; j++) {
            const __m512i words = _mm512_load_si512(codes + (size_t)j * 64);
            const __m512i lo = _mm512_and_si512(words, low);
            const __m512i hi = _mm512_and_si512(_mm512_srli_epi16(words, 4), low);
#pragma GCC unroll 4
            for (unsigned r = 0; r < n_rows; r++) {
                const int8_t *q = tile->q[row + r];
                const __m512i a = broadcast_codes(q, j);
                s16[r] = _mm512_add_epi16(s16[r], _mm512_maddubs_epi16(lo, a));
                if (type == KVS_WEIGHT_Q8_0)
                    h16[r] = _mm512_add_epi16(h16[r], _mm512_maddubs_epi16(hi, a));
                else
                    s16[r] = _mm512_add_epi16(s16[r], _mm512_maddubs_epi16(hi, broadcast_codes(q, j + 4)));
            }
        }
#pragma GCC unroll 4
        for (unsigned r = 0; r < n_rows; r++) {
            __m512i s = _mm512_madd_epi16(s16[r], ones);
            if (type == KVS_WEIGHT_Q8_0)
                s = _mm512_add_epi32(s, _mm512_slli_epi32(_mm512_madd_epi16(h16[r], ones), 4));
            if (type != KVS_WEIGHT_Q4_1)
                s = _mm512_sub_epi32(s, _mm512_set1_epi32((type == KVS_WEIGHT_Q8_0 ? 128 : 8) * tile->sum[row + r]));
            const __m512 scale = _mm512_mul_ps(dv, _mm512_set1_ps(tile->d[row + r]));
            acc[r] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(s), acc[r]);
            if (type == KVS_WEIGHT_Q4_1)
                acc[r] = _mm512_fmadd_ps(mv, _mm512_set1_ps(tile->s[row + r]), acc[r]);
        }
    }
#pragma GCC unroll 4
    for (unsigned r = 0; r < n_rows; r++)
        _mm512_storeu_ps(y + (row + r) * y_stride, acc[r]);
}

ALWAYS_INLINE void native_type(const kvs_weight_type type, const struct kvs_panels *p, const struct kvs_act_block *tile,
                               uint32_t n_rows, float *y, size_t y_stride)
{
    const uint8_t *panel = p->base;
    for (uint32_t n = 0; n < p->n_panels; n++, panel += p->stride_bytes, y += KVS_PANEL) {
        uint32_t row = 0;
        for (; row + 4 <= n_rows; row += 4)
            native_rows(type, 4, p, panel, tile, row, y, y_stride);
        if (row + 2 <= n_rows) {
            native_rows(type, 2, p, panel, tile, row, y, y_stride);
            row += 2;
        }
        if (row < n_rows)
            native_rows(type, 1, p, panel, tile, row, y, y_stride);
    }
}

static void native(const struct kvs_panels *p, const struct kvs_act_block *tile, uint32_t n_rows, float *y,
                   size_t y_stride)
{
    if (p->type == KVS_WEIGHT_Q4_0)
        native_type(KVS_WEIGHT_Q4_0, p, tile, n_rows, y, y_stride);
    else if (p->type == KVS_WEIGHT_Q4_1)
        native_type(KVS_WEIGHT_Q4_1, p, tile, n_rows, y, y_stride);
    else
        native_type(KVS_WEIGHT_Q8_0, p, tile, n_rows, y, y_stride);
}

const struct kvs_matmul_kernels kvs_matmul_kernels_avx512 = {
    ROW_TILE, kvs_matmul_f32_few_avx512, kvs_matmul_widen_avx512, kvs_matmul_f32_tile_avx512, kvs_matmul_quantise_avx2,
    native};

/* Integer products with AVX512-VNNI: vpdpbusd takes four u8 codes of 16 outputs and four s8 activations at once. The
 * rest of the table is matmul_avx512.c's. */
#include "kernels/matmul.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { ROW_TILE = 12, N_ACC = 8 };

ALWAYS_INLINE __m512i broadcast_codes(const int8_t *q, unsigned j)
{
    int32_t word;
    memcpy(&word, q + j * 4, sizeof word);
    return _mm512_set1_epi32(word);
}

/* Exact dot products of one block of one panel: code words outside, rows inside, so that the rows' chains hide each
 * other's latency. Few rows get two chains each instead. */
ALWAYS_INLINE void block_dots(const kvs_weight_type type, const unsigned n_rows, const uint8_t *codes,
                              const struct kvs_act_block *a, __m512i *sums)
{
    const int32_t above = type == KVS_WEIGHT_Q8_0 ? 128 : type == KVS_WEIGHT_Q4_0 ? 8 : 0; /* codes over weights */
    const __m512i low = _mm512_set1_epi8(15);
    __m512i odd[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++)
        sums[r] = above == 0 ? _mm512_setzero_si512() : _mm512_set1_epi32(-above * a->sum[r]);
#pragma GCC unroll 8
    for (unsigned i = 0; i < 8; i++) {
        const unsigned j = type == KVS_WEIGHT_Q8_0 ? i : i / 2 + i % 2 * 4; /* elements 4j .. 4j + 3 */
        __m512i w = _mm512_load_si512(codes + (size_t)(type == KVS_WEIGHT_Q8_0 ? j : j % 4) * 64);
        if (type != KVS_WEIGHT_Q8_0)
            w = _mm512_and_si512(j < 4 ? w : _mm512_srli_epi16(w, 4), low);
#pragma GCC unroll 8
        for (unsigned r = 0; r < n_rows; r++) {
            __m512i *const sum = n_rows > 2 || i % 2 == 0 ? &sums[r] : &odd[r];
            *sum = _mm512_dpbusd_epi32(*sum, w, broadcast_codes(a->q[r], j));
        }
    }
#pragma GCC unroll 2
    for (unsigned r = 0; n_rows <= 2 && r < n_rows; r++)
        sums[r] = _mm512_add_epi32(sums[r], odd[r]);
}

/* One row is bound by memory, and the hardware prefetchers follow the codes and scales of two panels badly, above all
 * where a panel ends. Short panels are fetched a pair ahead; of long ones that would be too early for the first-level
 * cache, and only their codes are fetched. */
ALWAYS_INLINE void prefetch(const void *at, size_t n_bytes)
{
#pragma GCC unroll 8
    for (size_t i = 0; i < n_bytes; i += 64)
        _mm_prefetch((const char *)at + i, _MM_HINT_T0);
}

ALWAYS_INLINE __m512 load_half(const uint16_t *h)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)h));
}

/* n_panels panels x n_rows rows, n_panels * n_rows <= N_ACC: codes are unpacked once for all rows, and several panels
 * hide the latency of the two FMAs of a block when rows are few. */
ALWAYS_INLINE void native_block_rows(const kvs_weight_type type, const unsigned n_rows, const unsigned n_panels,
                                     const struct kvs_panels *p, const uint8_t *panel, const struct kvs_act_block *tile,
                                     float *y, size_t y_stride)
{
    const uint32_t n_blocks = p->n_in / KVS_QBLOCK;
    const size_t stride_bytes = p->stride_bytes, m_offset = (size_t)n_blocks * KVS_PANEL;
    const size_t block_bytes = kvs_panel_code_bytes(type) + (type == KVS_WEIGHT_Q4_1 ? 64 : 32);
    const bool pair_ahead = n_panels * stride_bytes <= 12288;
    const uint16_t *d = kvs_panel_scales(p, panel);
    const uint8_t *codes = panel;
    __m512 acc[N_ACC];
#pragma GCC unroll 8
    for (unsigned i = 0; i < n_rows * n_panels; i++)
        acc[i] = _mm512_setzero_ps();
    for (uint32_t b = 0; b < n_blocks; b++, tile++, d += KVS_PANEL, codes += kvs_panel_code_bytes(type))
#pragma GCC unroll 4
        for (unsigned i = 0; i < n_panels; i++) {
            const uint16_t *di = d + i * (stride_bytes / sizeof *d);
            const __m512 dv = load_half(di);
            const __m512 mv = type == KVS_WEIGHT_Q4_1 ? load_half(di + m_offset) : _mm512_setzero_ps();
            __m512i sums[N_ACC];
            if (n_rows == 1 && pair_ahead)
                prefetch(panel + (n_panels + i) * stride_bytes + b * block_bytes, block_bytes);
            else if (n_rows == 1)
                prefetch(codes + i * stride_bytes + 2048, kvs_panel_code_bytes(type));
            block_dots(type, n_rows, codes + i * stride_bytes, tile, sums);
#pragma GCC unroll 8
            for (unsigned r = 0; r < n_rows; r++) {
                const __m512 sum = _mm512_cvtepi32_ps(sums[r]);
                __m512 *s = &acc[i * n_rows + r];
                *s = _mm512_fmadd_ps(_mm512_mul_ps(dv, _mm512_set1_ps(tile->d[r])), sum, *s);
                if (type == KVS_WEIGHT_Q4_1)
                    *s = _mm512_fmadd_ps(mv, _mm512_set1_ps(tile->s[r]), *s);
            }
        }
        /* NOLINTNEXTLINE(readability-misleading-indentation): a pragma stands at the margin */
#pragma GCC unroll 4
    for (unsigned i = 0; i < n_panels; i++) {
        float *const to = y + (size_t)i * KVS_PANEL;
#pragma GCC unroll 8
        for (unsigned r = 0; r < n_rows; r++)
            _mm512_storeu_ps(to + r * y_stride, acc[i * n_rows + r]);
    }
}

/* step panels at a time, the rest one by one. */
ALWAYS_INLINE void native_panels(const kvs_weight_type type, const unsigned n_rows, const unsigned step,
                                 const struct kvs_panels *p, const struct kvs_act_block *tile, float *y,
                                 size_t y_stride)
{
    const uint8_t *panel = p->base;
    uint32_t n = 0;
    for (; n + step <= p->n_panels; n += step, panel += step * p->stride_bytes)
        native_block_rows(type, n_rows, step, p, panel, tile, y + (size_t)n * KVS_PANEL, y_stride);
    for (; n < p->n_panels; n++, panel += p->stride_bytes)
        native_block_rows(type, n_rows, 1, p, panel, tile, y + (size_t)n * KVS_PANEL, y_stride);
}

ALWAYS_INLINE void native_type(const kvs_weight_type type, const struct kvs_panels *p, const struct kvs_act_block *tile,
                               uint32_t n_rows, float *y, size_t y_stride)
{
#define ROWS_CASE(rows, step)                                                                                          \
    case rows:                                                                                                         \
        native_panels(type, rows, step, p, tile, y, y_stride);                                                         \
        break
    switch (n_rows) {
        ROWS_CASE(1, 2);
        ROWS_CASE(2, 2);
        ROWS_CASE(3, 1);
        ROWS_CASE(4, 1);
        ROWS_CASE(5, 1);
        ROWS_CASE(6, 1);
        ROWS_CASE(7, 1);
        ROWS_CASE(8, 1);
    default:
        break;
    }
#undef ROWS_CASE
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

const struct kvs_matmul_kernels kvs_matmul_kernels_avx512vnni = {
    ROW_TILE, kvs_matmul_f32_few_avx512, kvs_matmul_widen_avx512, kvs_matmul_f32_tile_avx512, kvs_matmul_quantise_avx2,
    native};

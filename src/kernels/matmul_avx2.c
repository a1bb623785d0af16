/* AVX2 inner loops of the products: a panel of 16 outputs is two vectors of eight. Integer products go through
 * vpmaddubsw; the 8-bit codes are split in nibbles there, because its 16-bit sums would saturate. */
#include "kernels/matmul.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { ROW_TILE = 6, LANES = 8 };

/* d and m of lanes 8 * half .. + 8 of one block. */
ALWAYS_INLINE void load_scales(const kvs_weight_type type, const uint16_t *d, size_t m_offset, uint32_t half,
                               __m256 *dv, __m256 *mv)
{
    d += half * LANES;
    *dv = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)d));
    if (type == KVS_WEIGHT_Q4_1)
        *mv = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(d + m_offset)));
    else
        *mv = _mm256_mul_ps(*dv, _mm256_set1_ps(type == KVS_WEIGHT_Q4_0 ? -8.0f : -128.0f));
}

/* Code b (0..7 of nibbles, 0..3 of bytes) of each word as f32. */
ALWAYS_INLINE __m256 code_ps(const kvs_weight_type type, __m256i words, const int b)
{
    const int bits = type == KVS_WEIGHT_Q8_0 ? 8 : 4;
    const __m256i shifted = _mm256_srli_epi32(words, b * bits);
    return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32((1 << bits) - 1)));
}

/* Nibble of byte b: low ones are elements 4j + b, high ones 16 + 4j + b. */
#define NIBBLE(b, high) (2 * (b) + (high))

ALWAYS_INLINE __m256i load_words(const uint8_t *codes, uint32_t j, uint32_t half)
{
    return _mm256_load_si256((const __m256i *)(const void *)(codes + j * 64 + half * 32));
}

/* acc[2r + half] over one block of one panel, weights widened in registers. */
ALWAYS_INLINE void few_block(const kvs_weight_type type, const int n_rows, const uint8_t *codes, const uint16_t *d,
                             size_t m_offset, const float *x, size_t x_stride, __m256 *acc)
{
    __m256 dv[2], mv[2];
    load_scales(type, d, m_offset, 0, &dv[0], &mv[0]);
    load_scales(type, d, m_offset, 1, &dv[1], &mv[1]);
    const int n_high = type == KVS_WEIGHT_Q8_0 ? 1 : 2;
    const uint32_t n_words = type == KVS_WEIGHT_Q8_0 ? 8 : 4;
#pragma GCC unroll 2
    for (int high = 0; high < n_high; high++)
#pragma GCC unroll 1
        for (uint32_t j = 0; j < n_words; j++) {
            const __m256i words[2] = {load_words(codes, j, 0), load_words(codes, j, 1)};
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) {
                const int n = type == KVS_WEIGHT_Q8_0 ? b : NIBBLE(b, high);
                const __m256 w0 = _mm256_fmadd_ps(code_ps(type, words[0], n), dv[0], mv[0]);
                const __m256 w1 = _mm256_fmadd_ps(code_ps(type, words[1], n), dv[1], mv[1]);
#pragma GCC unroll 4
                for (int r = 0; r < n_rows; r++) {
                    const __m256 a = _mm256_set1_ps(x[(size_t)r * x_stride + (uint32_t)(high * 16 + b) + j * 4]);
                    acc[2 * r] = _mm256_fmadd_ps(w0, a, acc[2 * r]);
                    acc[2 * r + 1] = _mm256_fmadd_ps(w1, a, acc[2 * r + 1]);
                }
            }
        }
}

ALWAYS_INLINE void few_panel(const kvs_weight_type type, const int n_rows, const struct kvs_panels *p,
                             const uint8_t *panel, const float *x, size_t x_stride, float *y, size_t y_stride)
{
    __m256 acc[2 * KVS_F32_FEW_ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * n_rows; i++)
        acc[i] = _mm256_setzero_ps();
    if (type == KVS_WEIGHT_F32) {
        const float *w = (const float *)(const void *)panel;
        for (uint32_t k = 0; k < p->n_in; k++, w += KVS_PANEL) {
            const __m256 w0 = _mm256_load_ps(w), w1 = _mm256_load_ps(w + LANES);
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++) {
                const __m256 a = _mm256_set1_ps(x[(size_t)r * x_stride + k]);
                acc[2 * r] = _mm256_fmadd_ps(w0, a, acc[2 * r]);
                acc[2 * r + 1] = _mm256_fmadd_ps(w1, a, acc[2 * r + 1]);
            }
        }
    } else {
        const uint32_t n_blocks = p->n_in / KVS_QBLOCK;
        const uint16_t *d = kvs_panel_scales(p, panel);
        for (uint32_t b = 0; b < n_blocks; b++, x += KVS_QBLOCK, d += KVS_PANEL)
            few_block(type, n_rows, panel + b * kvs_panel_code_bytes(type), d, (size_t)n_blocks * KVS_PANEL, x,
                      x_stride, acc);
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        _mm256_storeu_ps(y + (size_t)r * y_stride, acc[2 * r]);
        _mm256_storeu_ps(y + (size_t)r * y_stride + LANES, acc[2 * r + 1]);
    }
}

ALWAYS_INLINE void few_type(const kvs_weight_type type, const struct kvs_panels *p, const float *x, size_t x_stride,
                            uint32_t n_rows, float *y, size_t y_stride)
{
    const uint8_t *panel = p->base;
    for (uint32_t n = 0; n < p->n_panels; n++, panel += p->stride_bytes, y += KVS_PANEL) {
        switch (n_rows) {
        case 1:
            few_panel(type, 1, p, panel, x, x_stride, y, y_stride);
            break;
        case 2:
            few_panel(type, 2, p, panel, x, x_stride, y, y_stride);
            break;
        case 3:
            few_panel(type, 3, p, panel, x, x_stride, y, y_stride);
            break;
        default:
            few_panel(type, 4, p, panel, x, x_stride, y, y_stride);
        }
    }
}

static void f32_few(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
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
    const int n_codes = type == KVS_WEIGHT_Q8_0 ? 4 : 8; /* of one word */
    for (uint32_t b = k_begin / KVS_QBLOCK; b < (k_begin + n_k) / KVS_QBLOCK; b++, out += KVS_QBLOCK * KVS_PANEL)
        for (uint32_t half = 0; half < 2; half++) {
            const uint8_t *codes = p->base + b * kvs_panel_code_bytes(type);
            float *dst = out + half * LANES;
            __m256 d, m;
            load_scales(type, kvs_panel_scales(p, p->base) + (size_t)b * KVS_PANEL, m_offset, half, &d, &m);
            for (uint32_t j = 0; j < (type == KVS_WEIGHT_Q8_0 ? 8u : 4u); j++) {
                const __m256i words = load_words(codes, j, half);
#pragma GCC unroll 8
                for (int n = 0; n < n_codes; n++) {
                    const uint32_t k =
                        type == KVS_WEIGHT_Q8_0 ? j * 4 + (uint32_t)n : j * 4 + (uint32_t)(n / 2 + n % 2 * 16);
                    _mm256_store_ps(dst + k * KVS_PANEL, _mm256_fmadd_ps(code_ps(type, words, n), d, m));
                }
            }
        }
}

static void widen(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out)
{
    if (p->type == KVS_WEIGHT_Q4_0)
        widen_type(KVS_WEIGHT_Q4_0, p, k_begin, n_k, out);
    else if (p->type == KVS_WEIGHT_Q4_1)
        widen_type(KVS_WEIGHT_Q4_1, p, k_begin, n_k, out);
    else
        widen_type(KVS_WEIGHT_Q8_0, p, k_begin, n_k, out);
}

/* 2 vectors x 6 rows: 12 accumulators, 2 weights and an activation of 16 registers. */
ALWAYS_INLINE void tile_panel(const int n_rows, const float *w, const float *x, uint32_t n_k, const float *from,
                              float *to, size_t to_stride)
{
    __m256 s[2 * ROW_TILE];
#pragma GCC unroll 12
    for (int i = 0; i < 2 * n_rows; i++)
        s[i] = from != NULL ? _mm256_loadu_ps(from + i / 2 * 2 * KVS_PANEL + i % 2 * LANES) : _mm256_setzero_ps();
    for (uint32_t k = 0; k < n_k; k++, w += KVS_PANEL, x += ROW_TILE) {
        const __m256 w0 = _mm256_load_ps(w), w1 = _mm256_load_ps(w + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < n_rows; r++) {
            const __m256 a = _mm256_set1_ps(x[r]);
            s[2 * r] = _mm256_fmadd_ps(w0, a, s[2 * r]);
            s[2 * r + 1] = _mm256_fmadd_ps(w1, a, s[2 * r + 1]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < 2 * n_rows; i++)
        _mm256_storeu_ps(to + (size_t)(i / 2) * to_stride + i % 2 * LANES, s[i]);
}

static void f32_tile(const float *w0, const float *w1, const float *x, uint32_t n_k, uint32_t n_rows, const float *from,
                     float *to, size_t to_stride)
{
    const float *w[2] = {w0, w1};
    for (uint32_t i = 0; i < 2; i++) {
        const float *const at = from != NULL ? from + i * KVS_PANEL : NULL;
        if (n_rows <= 2)
            tile_panel(2, w[i], x, n_k, at, to + i * KVS_PANEL, to_stride);
        else if (n_rows <= 4)
            tile_panel(4, w[i], x, n_k, at, to + i * KVS_PANEL, to_stride);
        else
            tile_panel(ROW_TILE, w[i], x, n_k, at, to + i * KVS_PANEL, to_stride);
    }
}

static inline int32_t sum_epi32(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}

static inline float max_ps(__m256 v)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static inline float round_to_half(float v)
{
    return _cvtsh_ss(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
}

void kvs_matmul_quantise_avx2(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (uint32_t b = 0; b < n_in / KVS_QBLOCK; b++, x += KVS_QBLOCK, tile++) {
        __m256 v[4], amax8 = _mm256_setzero_ps();
        __m256i q[4];
        for (uint32_t i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + i * LANES);
            amax8 = _mm256_max_ps(_mm256_andnot_ps(sign, v[i]), amax8);
        }
        const float amax = max_ps(amax8), d = amax / 127.0f;
        const __m256 id = _mm256_set1_ps(amax > 1e-30f ? 127.0f / amax : 0.0f); /* see matmul_ref.c */
        for (uint32_t i = 0; i < 4; i++)
            q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], id));
        const __m256i least = _mm256_set1_epi16(-128); /* of inf and NaN, in the sum as in the bytes */
        const __m256i w01 = _mm256_max_epi16(_mm256_packs_epi32(q[0], q[1]), least);
        const __m256i w23 = _mm256_max_epi16(_mm256_packs_epi32(q[2], q[3]), least);
        const __m256i bytes =
            _mm256_permutevar8x32_epi32(_mm256_packs_epi16(w01, w23), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(void *)tile->q[row], bytes);
        const __m256i ones = _mm256_set1_epi16(1);
        const int32_t sum = sum_epi32(_mm256_madd_epi16(_mm256_add_epi16(w01, w23), ones));
        tile->d[row] = round_to_half(d);
        tile->s[row] = round_to_half(d * (float)sum);
        tile->sum[row] = sum;
    }
}

ALWAYS_INLINE __m256i broadcast_codes(const int8_t *q, uint32_t j)
{
    int32_t word;
    memcpy(&word, q + j * 4, sizeof word);
    return _mm256_set1_epi32(word);
}

/* Eight outputs x n_rows. A pair of products of a nibble and a code is at most 2 * 15 * 128, so eight of them stay
 * within 16 bits and are widened once. */
ALWAYS_INLINE void native_half(const kvs_weight_type type, const int n_rows, const struct kvs_panels *p,
                               const uint8_t *panel, uint32_t half, const struct kvs_act_block *tile, uint32_t row,
                               float *y, size_t y_stride)
{
    const uint32_t n_blocks = p->n_in / KVS_QBLOCK, n_words = type == KVS_WEIGHT_Q8_0 ? 8 : 4;
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int32_t offset = type == KVS_WEIGHT_Q8_0 ? 128 : 8;
    const uint16_t *d = kvs_panel_scales(p, panel);
    const uint8_t *codes = panel;
    __m256 acc[4];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
        acc[r] = _mm256_setzero_ps();
    for (uint32_t b = 0; b < n_blocks; b++, tile++, d += KVS_PANEL, codes += kvs_panel_code_bytes(type)) {
        __m256i s16[4], h16[4];
        __m256 dv, mv;
        load_scales(type, d, (size_t)n_blocks * KVS_PANEL, half, &dv, &mv);
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
            s16[r] = h16[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (uint32_t j = 0; j < n_words; j++) {
            const __m256i words = load_words(codes, j, half);
            const __m256i lo = _mm256_and_si256(words, low);
            const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++) {
                const int8_t *q = tile->q[row + (uint32_t)r];
                const __m256i a = broadcast_codes(q, j);
                s16[r] = _mm256_add_epi16(s16[r], _mm256_maddubs_epi16(lo, a));
                if (type == KVS_WEIGHT_Q8_0)
                    h16[r] = _mm256_add_epi16(h16[r], _mm256_maddubs_epi16(hi, a));
                else
                    s16[r] = _mm256_add_epi16(s16[r], _mm256_maddubs_epi16(hi, broadcast_codes(q, j + 4)));
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            const uint32_t ar = row + (uint32_t)r;
            __m256i s = _mm256_madd_epi16(s16[r], ones);
            if (type == KVS_WEIGHT_Q8_0)
                s = _mm256_add_epi32(s, _mm256_slli_epi32(_mm256_madd_epi16(h16[r], ones), 4));
            if (type != KVS_WEIGHT_Q4_1)
                s = _mm256_sub_epi32(s, _mm256_set1_epi32(offset * tile->sum[ar]));
            const __m256 scale = _mm256_mul_ps(dv, _mm256_set1_ps(tile->d[ar]));
            acc[r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(s), acc[r]);
            if (type == KVS_WEIGHT_Q4_1)
                acc[r] = _mm256_fmadd_ps(mv, _mm256_set1_ps(tile->s[ar]), acc[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
        _mm256_storeu_ps(y + (row + (size_t)r) * y_stride + half * LANES, acc[r]);
}

ALWAYS_INLINE void native_type(const kvs_weight_type type, const struct kvs_panels *p, const struct kvs_act_block *tile,
                               uint32_t n_rows, float *y, size_t y_stride)
{
    const uint8_t *panel = p->base;
    for (uint32_t n = 0; n < p->n_panels; n++, panel += p->stride_bytes, y += KVS_PANEL)
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t row = 0;
            for (; row + 4 <= n_rows; row += 4)
                native_half(type, 4, p, panel, half, tile, row, y, y_stride);
            if (row + 2 <= n_rows) {
                native_half(type, 2, p, panel, half, tile, row, y, y_stride);
                row += 2;
            }
            if (row < n_rows)
                native_half(type, 1, p, panel, half, tile, row, y, y_stride);
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

const struct kvs_matmul_kernels kvs_matmul_kernels_avx2 = {ROW_TILE, f32_few, widen, f32_tile, kvs_matmul_quantise_avx2,
                                                           native};

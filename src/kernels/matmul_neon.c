/* NEON inner loops of the products: a panel of 16 outputs is four vectors of four, called quarters. Integer products go
 * through SMULL here; matmul_neondot.c has them with SDOT. */
#include "kernels/matmul_neon.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { ROW_TILE = 6 };

/* ---- f32 ---- */

/* A shift by an immediate once bits is known. */
ALWAYS_INLINE uint32x4_t shift_right(uint32x4_t v, const int bits)
{
    switch (bits) {
    case 4:
        return vshrq_n_u32(v, 4);
    case 8:
        return vshrq_n_u32(v, 8);
    case 12:
        return vshrq_n_u32(v, 12);
    case 16:
        return vshrq_n_u32(v, 16);
    case 20:
        return vshrq_n_u32(v, 20);
    case 24:
        return vshrq_n_u32(v, 24);
    case 28:
        return vshrq_n_u32(v, 28);
    default:
        return v;
    }
}

/* Code n (0..7 of nibbles, 0..3 of bytes) of each word as f32. */
ALWAYS_INLINE float32x4_t code_f32(const kvs_weight_type type, uint32x4_t words, const int n)
{
    const int bits = type == KVS_WEIGHT_Q8_0 ? 8 : 4;
    return vcvtq_f32_u32(vandq_u32(shift_right(words, n * bits), vdupq_n_u32((1u << bits) - 1)));
}

/* Nibble of byte b: low ones are elements 4j + b, high ones 16 + 4j + b. */
#define NIBBLE(b, high) (2 * (b) + (high))

/* Word j of four outputs. */
ALWAYS_INLINE uint32x4_t load_words(const uint8_t *codes, uint32_t j)
{
    return vreinterpretq_u32_u8(vld1q_u8(codes + (size_t)j * 64));
}

/* acc[q][r] over one block of one panel, weights widened in registers; codes and d stand at the first quarter. */
ALWAYS_INLINE void few_block(const kvs_weight_type type, const int n_rows, const int n_quarters, const uint8_t *codes,
                             const uint16_t *d, size_t m_offset, const float *x, size_t x_stride,
                             float32x4_t (*acc)[KVS_F32_FEW_ROWS])
{
    float32x4_t dv[4], mv[4];
#pragma GCC unroll 4
    for (int q = 0; q < n_quarters; q++)
        kvs_neon_scales(type, d + q * 4, m_offset, &dv[q], &mv[q]);
    const int n_high = type == KVS_WEIGHT_Q8_0 ? 1 : 2;
    const uint32_t n_words = type == KVS_WEIGHT_Q8_0 ? 8 : 4;
#pragma GCC unroll 2
    for (int high = 0; high < n_high; high++)
#pragma GCC unroll 1
        for (uint32_t j = 0; j < n_words; j++) {
            uint32x4_t words[4];
#pragma GCC unroll 4
            for (int q = 0; q < n_quarters; q++)
                words[q] = load_words(codes + q * 16, j);
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) {
                const int n = type == KVS_WEIGHT_Q8_0 ? b : NIBBLE(b, high);
                const float *const at = x + (uint32_t)(high * 16 + b) + j * 4;
#pragma GCC unroll 4
                for (int q = 0; q < n_quarters; q++) {
                    const float32x4_t w = vfmaq_f32(mv[q], code_f32(type, words[q], n), dv[q]);
#pragma GCC unroll 4
                    for (int r = 0; r < n_rows; r++)
                        acc[q][r] = vfmaq_n_f32(acc[q][r], w, at[(size_t)r * x_stride]);
                }
            }
        }
}

ALWAYS_INLINE void few_quarters(const kvs_weight_type type, const int n_rows, const int n_quarters,
                                const struct kvs_panels *p, const uint8_t *panel, uint32_t quarter, const float *x,
                                size_t x_stride, float *y, size_t y_stride)
{
    float32x4_t acc[4][KVS_F32_FEW_ROWS];
#pragma GCC unroll 4
    for (int q = 0; q < n_quarters; q++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
            acc[q][r] = vdupq_n_f32(0.0f);
    if (type == KVS_WEIGHT_F32) {
        const float *w = (const float *)(const void *)panel + (size_t)quarter * 4;
        for (uint32_t k = 0; k < p->n_in; k++, w += KVS_PANEL)
#pragma GCC unroll 4
            for (int q = 0; q < n_quarters; q++) {
                const float32x4_t wq = vld1q_f32(w + q * 4);
#pragma GCC unroll 4
                for (int r = 0; r < n_rows; r++)
                    acc[q][r] = vfmaq_n_f32(acc[q][r], wq, x[(size_t)r * x_stride + k]);
            }
    } else {
        const uint32_t n_blocks = p->n_in / KVS_QBLOCK;
        const uint16_t *d = kvs_panel_scales(p, panel) + (size_t)quarter * 4;
        const uint8_t *codes = panel + (size_t)quarter * 16;
        for (uint32_t b = 0; b < n_blocks; b++, x += KVS_QBLOCK, d += KVS_PANEL, codes += kvs_panel_code_bytes(type))
            few_block(type, n_rows, n_quarters, codes, d, (size_t)n_blocks * KVS_PANEL, x, x_stride, acc);
    }
#pragma GCC unroll 4
    for (int q = 0; q < n_quarters; q++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
            vst1q_f32(y + (size_t)r * y_stride + (quarter + (uint32_t)q) * 4, acc[q][r]);
}

/* As many quarters at a time as leave accumulators, scales, codes and activations in registers. */
ALWAYS_INLINE void few_type(const kvs_weight_type type, const struct kvs_panels *p, const float *x, size_t x_stride,
                            uint32_t n_rows, float *y, size_t y_stride)
{
    const uint8_t *panel = p->base;
    for (uint32_t n = 0; n < p->n_panels; n++, panel += p->stride_bytes, y += KVS_PANEL) {
        if (n_rows == 1) {
            few_quarters(type, 1, 4, p, panel, 0, x, x_stride, y, y_stride);
            continue;
        }
        for (uint32_t q = 0; q < 4; q += 2) {
            if (n_rows == 2)
                few_quarters(type, 2, 2, p, panel, q, x, x_stride, y, y_stride);
            else if (n_rows == 3)
                few_quarters(type, 3, 2, p, panel, q, x, x_stride, y, y_stride);
            else
                few_quarters(type, 4, 2, p, panel, q, x, x_stride, y, y_stride);
        }
    }
}

void kvs_matmul_f32_few_neon(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
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
    case KVS_WEIGHT_F32:
        few_type(KVS_WEIGHT_F32, p, x, x_stride, n_rows, y, y_stride);
        break;
    default: /* types without loops here yet: the twin's bits are the same */
        kvs_matmul_kernels_ref.f32_few(p, x, x_stride, n_rows, y, y_stride);
    }
}

ALWAYS_INLINE void widen_type(const kvs_weight_type type, const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k,
                              float *out)
{
    const size_t m_offset = (size_t)(p->n_in / KVS_QBLOCK) * KVS_PANEL;
    const int n_codes = type == KVS_WEIGHT_Q8_0 ? 4 : 8; /* of one word */
    for (uint32_t b = k_begin / KVS_QBLOCK; b < (k_begin + n_k) / KVS_QBLOCK; b++, out += KVS_QBLOCK * KVS_PANEL)
        for (uint32_t quarter = 0; quarter < 4; quarter++) {
            const uint8_t *codes = p->base + b * kvs_panel_code_bytes(type) + (size_t)quarter * 16;
            const uint16_t *scales = kvs_panel_scales(p, p->base) + (size_t)b * KVS_PANEL + (size_t)quarter * 4;
            float *dst = out + (size_t)quarter * 4;
            float32x4_t d, m;
            kvs_neon_scales(type, scales, m_offset, &d, &m);
            for (uint32_t j = 0; j < (type == KVS_WEIGHT_Q8_0 ? 8u : 4u); j++) {
                const uint32x4_t words = load_words(codes, j);
#pragma GCC unroll 8
                for (int n = 0; n < n_codes; n++) {
                    const uint32_t k =
                        type == KVS_WEIGHT_Q8_0 ? j * 4 + (uint32_t)n : j * 4 + (uint32_t)(n / 2 + n % 2 * 16);
                    vst1q_f32(dst + k * KVS_PANEL, vfmaq_f32(m, code_f32(type, words, n), d));
                }
            }
        }
}

void kvs_matmul_widen_neon(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out)
{
    if (p->type == KVS_WEIGHT_Q4_0)
        widen_type(KVS_WEIGHT_Q4_0, p, k_begin, n_k, out);
    else if (p->type == KVS_WEIGHT_Q4_1)
        widen_type(KVS_WEIGHT_Q4_1, p, k_begin, n_k, out);
    else if (p->type == KVS_WEIGHT_Q8_0)
        widen_type(KVS_WEIGHT_Q8_0, p, k_begin, n_k, out);
    else
        kvs_matmul_kernels_ref.widen(p, k_begin, n_k, out);
}

/* 4 vectors x 6 rows: 24 accumulators, 4 weights and 2 vectors of activations of 32 registers. */
ALWAYS_INLINE void tile_panel(const int n_rows, const float *w, const float *x, uint32_t n_k, const float *from,
                              float *to, size_t to_stride)
{
    float32x4_t s[ROW_TILE][4];
#pragma GCC unroll 6
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++)
            s[r][q] = from != NULL ? vld1q_f32(from + r * 2 * KVS_PANEL + q * 4) : vdupq_n_f32(0.0f);
    for (uint32_t k = 0; k < n_k; k++, w += KVS_PANEL, x += ROW_TILE) {
        const float32x4_t x0 = vld1q_f32(x);
        const float32x2_t x4 = vld1_f32(x + 4);
#define TILE_ROW(r, fma_lane, v, lane)                                                                                 \
    if ((r) < n_rows)                                                                                                  \
    s[r][q] = fma_lane(s[r][q], wq, v, lane)
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            const float32x4_t wq = vld1q_f32(w + q * 4);
            TILE_ROW(0, vfmaq_laneq_f32, x0, 0);
            TILE_ROW(1, vfmaq_laneq_f32, x0, 1);
            TILE_ROW(2, vfmaq_laneq_f32, x0, 2);
            TILE_ROW(3, vfmaq_laneq_f32, x0, 3);
            TILE_ROW(4, vfmaq_lane_f32, x4, 0);
            TILE_ROW(5, vfmaq_lane_f32, x4, 1);
        }
#undef TILE_ROW
    }
#pragma GCC unroll 6
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++)
            vst1q_f32(to + (size_t)r * to_stride + q * 4, s[r][q]);
}

void kvs_matmul_f32_tile_neon(const float *w0, const float *w1, const float *x, uint32_t n_k, uint32_t n_rows,
                              const float *from, float *to, size_t to_stride)
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

/* ---- native ---- */

/* Nearest even; what no int8 can hold (only from inf or NaN) is -128, see matmul_ref.c. */
ALWAYS_INLINE int32x4_t round_codes(float32x4_t v)
{
    const uint32x4_t fits = vandq_u32(vcgeq_f32(v, vdupq_n_f32(-127.5f)), vcltq_f32(v, vdupq_n_f32(127.5f)));
    return vbslq_s32(fits, vcvtnq_s32_f32(v), vdupq_n_s32(-128));
}

static inline float round_to_half(float v)
{
    return vgetq_lane_f32(vcvt_f32_f16(vcvt_f16_f32(vdupq_n_f32(v))), 0);
}

void kvs_matmul_quantise_neon(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row)
{
    for (uint32_t b = 0; b < n_in / KVS_QBLOCK; b++, x += KVS_QBLOCK, tile++) {
        float32x4_t v[8], amax4 = vdupq_n_f32(0.0f);
        for (uint32_t i = 0; i < 8; i++) {
            v[i] = vld1q_f32(x + i * 4);
            const float32x4_t a = vabsq_f32(v[i]);
            amax4 = vbslq_f32(vcgtq_f32(a, amax4), a, amax4); /* passes over NaN, which FMAX would not */
        }
        const float amax = vmaxvq_f32(amax4), d = amax / 127.0f;
        const float id = amax > 1e-30f ? 127.0f / amax : 0.0f; /* see matmul_ref.c */
        int32x4_t sum4 = vdupq_n_s32(0);
        for (uint32_t i = 0; i < 8; i += 2) {
            const int32x4_t lo = round_codes(vmulq_n_f32(v[i], id)), hi = round_codes(vmulq_n_f32(v[i + 1], id));
            sum4 = vaddq_s32(sum4, vaddq_s32(lo, hi));
            vst1_s8(tile->q[row] + i * 4, vmovn_s16(vcombine_s16(vmovn_s32(lo), vmovn_s32(hi))));
        }
        const int32_t sum = vaddvq_s32(sum4);
        tile->d[row] = round_to_half(d);
        tile->s[row] = round_to_half(d * (float)sum);
        tile->sum[row] = sum;
    }
}

enum { QUARTERS_OF_4_ROWS = 1 }; /* two halves of 16-bit sums a quarter and row fill the register file */

/* A nibble times a code is at most 15 * 128, so the eight of a 16-bit lane are added there and widened once; of two
 * bytes each product is widened. */
ALWAYS_INLINE void block_dots(const kvs_weight_type type, const int n_rows, const int n_quarters, const uint8_t *codes,
                              const struct kvs_act_block *a, uint32_t row, int32x4_t (*sums)[4])
{
    int16x8_t s16[4][4][2];
    int32x4_t s32[4][4][2];
#pragma GCC unroll 4
    for (int q = 0; q < n_quarters; q++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            s16[q][r][0] = s16[q][r][1] = vdupq_n_s16(0);
            s32[q][r][0] = s32[q][r][1] = vdupq_n_s32(0);
        }
#pragma GCC unroll 4
    for (unsigned j = 0; j < 4; j++)
#pragma GCC unroll 4
        for (int q = 0; q < n_quarters; q++) {
            int8x16_t w[2];
            kvs_neon_codes(type, codes + q * 16, j, w);
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
                for (unsigned high = 0; high < 2; high++) {
                    int32_t word;
                    memcpy(&word, a->q[row + (uint32_t)r] + (j + high * 4) * 4, sizeof word);
                    const int8x8_t act = vreinterpret_s8_s32(vdup_n_s32(word));
                    if (type == KVS_WEIGHT_Q8_0) {
                        s32[q][r][0] = vpadalq_s16(s32[q][r][0], vmull_s8(vget_low_s8(w[high]), act));
                        s32[q][r][1] = vpadalq_s16(s32[q][r][1], vmull_s8(vget_high_s8(w[high]), act));
                    } else {
                        s16[q][r][0] = vmlal_s8(s16[q][r][0], vget_low_s8(w[high]), act);
                        s16[q][r][1] = vmlal_s8(s16[q][r][1], vget_high_s8(w[high]), act);
                    }
                }
        }
#pragma GCC unroll 4
    for (int q = 0; q < n_quarters; q++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
            sums[q][r] = type == KVS_WEIGHT_Q8_0 ? vpaddq_s32(s32[q][r][0], s32[q][r][1])
                                                 : vpaddq_s32(vpaddlq_s16(s16[q][r][0]), vpaddlq_s16(s16[q][r][1]));
}

#include "kernels/matmul_neon_body.h"

void kvs_matmul_round_neon(kvs_weight_type type, const float *x, uint32_t n, float *y)
{
    kvs_matmul_kernels_ref.round(type, x, n, y);
}

void kvs_matmul_quantise_k_neon(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row)
{
    kvs_matmul_kernels_ref.quantise_k(x, n_in, tile, row);
}

const struct kvs_matmul_kernels kvs_matmul_kernels_neon = {ROW_TILE,
                                                           kvs_matmul_f32_few_neon,
                                                           kvs_matmul_widen_neon,
                                                           kvs_matmul_f32_tile_neon,
                                                           kvs_matmul_round_neon,
                                                           kvs_matmul_quantise_neon,
                                                           kvs_matmul_quantise_k_neon,
                                                           native};

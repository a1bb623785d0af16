/* What matmul_neon.c and matmul_neondot.c share. Only they include this. */
#ifndef KVS_MATMUL_NEON_H
#define KVS_MATMUL_NEON_H

#include "kernels/matmul.h"

#include <arm_neon.h>

void kvs_matmul_f32_few_neon(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
                             size_t y_stride);
void kvs_matmul_widen_neon(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out);
void kvs_matmul_f32_tile_neon(const float *w0, const float *w1, const float *x, uint32_t n_k, uint32_t n_rows,
                              const float *from, float *to, size_t to_stride);
void kvs_matmul_quantise_neon(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row);
/* The plain twin's. */
void kvs_matmul_round_neon(kvs_weight_type type, const float *x, uint32_t n, float *y);
void kvs_matmul_quantise_k_neon(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row);

static inline float32x4_t kvs_neon_halves(const uint16_t *h)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h)));
}

/* Scales and minima of four outputs. */
static inline void kvs_neon_scales(kvs_weight_type type, const uint16_t *d, size_t m_offset, float32x4_t *dv,
                                   float32x4_t *mv)
{
    *dv = kvs_neon_halves(d);
    *mv = type == KVS_WEIGHT_Q4_1 ? kvs_neon_halves(d + m_offset)
                                  : vmulq_n_f32(*dv, type == KVS_WEIGHT_Q4_0 ? -8.0f : -128.0f);
}

/* Four weights each of four outputs as signed bytes: elements 4j .. + 4 and 16 + 4j .. + 4 of a block. Of Q8_0 these are
 * the weights themselves, of the nibbles the codes. */
static inline void kvs_neon_codes(kvs_weight_type type, const uint8_t *codes, uint32_t j, int8x16_t w[2])
{
    const uint8x16_t v = vld1q_u8(codes + (size_t)j * 64);
    if (type == KVS_WEIGHT_Q8_0) {
        w[0] = vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(0x80)));
        w[1] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + (size_t)(j + 4) * 64), vdupq_n_u8(0x80)));
    } else {
        w[0] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
        w[1] = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
    }
}

#endif

/* Vectors of 4 floats in the words vector_body.h and attention_body.h are written in. Only *_neon.c includes this.
 * Each polynomial repeats the steps of its scalar definition in vector_ref.c, so that the bits agree.
 */
/* Unrolled steps stand in columns, one step a line. */
/* clang-format off */
#ifndef KVS_SIMD_NEON_H
#define KVS_SIMD_NEON_H

#include "kernels/kernels_impl.h"

#include <arm_neon.h>

#define VF_NAME(name) name##_neon
#define VF_PAGE_AT_ONCE 0 /* a register tile spans one key tile */
enum { VF_LANES = 4, VF_TILE = 4 }; /* VF_TILE: vectors beside six rows that fill the register file */
typedef float32x4_t vf;
typedef uint32x4_t vm; /* lanes all ones or all zeros */
typedef struct vd {
    float64x2_t lo, hi;
} vd;

static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline void vf_store(float *p, vf a) { vst1q_f32(p, a); }
static inline vf vf_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void vf_store_f16(uint16_t *p, vf a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
static inline vf vf_set1(float x) { return vdupq_n_f32(x); }
static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_neg(vf a) { return vnegq_f32(a); }
static inline vf vf_abs(vf a) { return vabsq_f32(a); }
static inline vm vf_gt(vf a, vf b) { return vcgtq_f32(a, b); }
static inline vm vf_eq(vf a, vf b) { return vceqq_f32(a, b); }
static inline vf vf_select(vm m, vf yes, vf no) { return vbslq_f32(m, yes, no); }
/* a > b ? a : b: a NaN in a is passed over, as in the plain twin's comparison; FMAX and FMAXNM do otherwise. */
static inline vf vf_max(vf a, vf b) { return vf_select(vcgtq_f32(a, b), a, b); }
static inline vf vf_min(vf a, vf b) { return vf_select(vcltq_f32(a, b), a, b); }
static inline bool vm_any(vm m) { return vmaxvq_u32(m) != 0; }
static inline vm vm_from_bits(uint32_t bits)
{
    static const uint32_t lane[VF_LANES] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits), vld1q_u32(lane));
}
/* Lanes as uint32: indices of argmax. */
static inline vf vf_iota(uint32_t first)
{
    static const uint32_t step[VF_LANES] = {0, 1, 2, 3};
    return vreinterpretq_f32_u32(vaddq_u32(vdupq_n_u32(first), vld1q_u32(step)));
}
/* Even lanes over their pair, odd lanes over theirs. */
static inline vf vf_dup_even(vf a) { return vtrn1q_f32(a, a); }
static inline vf vf_dup_odd(vf a) { return vtrn2q_f32(a, a); }
/* [a0 b0 a1 b1 ...] of VF_LANES / 2 floats each. */
static inline vf vf_interleave(const float *a, const float *b)
{
    const float32x2_t x = vld1_f32(a), y = vld1_f32(b);
    return vcombine_f32(vzip1_f32(x, y), vzip2_f32(x, y));
}

/* Floats at .. at + 7 of eight rows, as eight rows of out. */
static inline void vf_transpose_8x8(const float *const *rows, size_t at, float *out, size_t out_stride)
{
    for (size_t r = 0; r < 8; r += 4) {
        for (size_t c = 0; c < 8; c += 4) {
            const vf a0 = vld1q_f32(rows[r] + at + c), a1 = vld1q_f32(rows[r + 1] + at + c);
            const vf a2 = vld1q_f32(rows[r + 2] + at + c), a3 = vld1q_f32(rows[r + 3] + at + c);
            /* Rows 0 and 2, 1 and 3 zipped: lanes of columns 0, 1 | 2, 3; zipped again: columns. */
            const vf even_lo = vzip1q_f32(a0, a2), even_hi = vzip2q_f32(a0, a2);
            const vf odd_lo = vzip1q_f32(a1, a3), odd_hi = vzip2q_f32(a1, a3);
            float *const to = out + c * out_stride + r;
            vst1q_f32(to, vzip1q_f32(even_lo, odd_lo));
            vst1q_f32(to + out_stride, vzip2q_f32(even_lo, odd_lo));
            vst1q_f32(to + 2 * out_stride, vzip1q_f32(even_hi, odd_hi));
            vst1q_f32(to + 3 * out_stride, vzip2q_f32(even_hi, odd_hi));
        }
    }
}

static inline vd vd_zero(void) { return (vd){vdupq_n_f64(0.0), vdupq_n_f64(0.0)}; }
static inline vd vd_add(vd acc, vf x)
{
    acc.lo = vaddq_f64(acc.lo, vcvt_f64_f32(vget_low_f32(x)));
    acc.hi = vaddq_f64(acc.hi, vcvt_high_f64_f32(x));
    return acc;
}
static inline void vd_store(double *p, vd a)
{
    vst1q_f64(p, a.lo);
    vst1q_f64(p + 2, a.hi);
}

static inline vf vf_exp(vf x)
{
    const vf shifted = vf_fma(x, vf_set1(KVS_EXP_LOG2E), vf_set1(KVS_EXP_ROUND));
    const vf n = vf_sub(shifted, vf_set1(KVS_EXP_ROUND));
    const vf r = vf_fma(n, vf_set1(-KVS_EXP_LN2_LO), vf_fma(n, vf_set1(-KVS_EXP_LN2_HI), x));
    vf y = vf_fma(vf_set1(KVS_EXP_C6), r, vf_set1(KVS_EXP_C5));
    y = vf_fma(y, r, vf_set1(KVS_EXP_C4));
    y = vf_fma(y, r, vf_set1(KVS_EXP_C3));
    y = vf_fma(y, r, vf_set1(KVS_EXP_C2));
    y = vf_fma(y, r, vf_set1(1.0f));
    y = vf_fma(y, r, vf_set1(1.0f));
    const uint32x4_t bits =
        vaddq_u32(vreinterpretq_u32_f32(y), vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23));
    y = vreinterpretq_f32_u32(vbicq_u32(bits, vcltq_f32(x, vf_set1(KVS_EXP_MIN))));
    /* Over MAX or NaN: infinity, or x itself. x * infinity is both. */
    return vf_select(vcleq_f32(x, vf_set1(KVS_EXP_MAX)), y, vf_mul(x, vf_set1(INFINITY)));
}

static inline vf vf_log(vf x)
{
    const int32x4_t u = vreinterpretq_s32_f32(x);
    const int32x4_t e = vshrq_n_s32(vsubq_s32(u, vdupq_n_s32(KVS_LOG_SQRT_HALF)), 23);
    const vf f = vf_sub(vreinterpretq_f32_s32(vsubq_s32(u, vshlq_n_s32(e, 23))), vf_set1(1.0f));
    const vf n = vcvtq_f32_s32(e), f2 = vf_mul(f, f);
    vf g = vf_fma(vf_set1(KVS_LOG_C7), f, vf_set1(KVS_LOG_C6));
    g = vf_fma(g, f, vf_set1(KVS_LOG_C5));
    g = vf_fma(g, f, vf_set1(KVS_LOG_C4));
    g = vf_fma(g, f, vf_set1(KVS_LOG_C3));
    g = vf_fma(g, f, vf_set1(KVS_LOG_C2));
    g = vf_fma(g, f, vf_set1(KVS_LOG_C1));
    g = vf_fma(g, f, vf_set1(KVS_LOG_C0));
    g = vf_fma(g, f, vf_set1(-0.5f));
    g = vf_fma(g, f2, vf_mul(n, vf_set1(KVS_EXP_LN2_LO)));
    return vf_fma(n, vf_set1(KVS_EXP_LN2_HI), vf_add(f, g));
}

#endif

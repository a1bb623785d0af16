/* Vectors of 8 floats in the words vector_body.h and attention_body.h are written in. Only *_avx2.c includes this.
 * Each polynomial repeats the steps of its scalar definition in vector_ref.c, so that the bits agree.
 */
/* Unrolled steps stand in columns, one step a line. */
/* clang-format off */
#ifndef KVS_SIMD_AVX2_H
#define KVS_SIMD_AVX2_H

#include "kernels/kernels_impl.h"
#include "kernels/simd_x86.h"

#define VF_NAME(name) name##_avx2
#define VF_PAGE_AT_ONCE 0 /* a register tile spans one key tile */
enum { VF_LANES = 8, VF_TILE = 2 }; /* VF_TILE: vectors beside six rows that fill the register file */
typedef __m256 vf;
typedef __m256 vm; /* lanes all ones or all zeros */
typedef struct vd {
    __m256d lo, hi;
} vd;

static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void vf_store_f16(uint16_t *p, vf a)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
static inline vf vf_set1(float x) { return _mm256_set1_ps(x); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_neg(vf a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
static inline vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
/* a > b ? a : b: a NaN in a is passed over, as in the plain twin's comparison. */
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vm vf_gt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline vm vf_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline vf vf_select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
static inline bool vm_any(vm m) { return _mm256_movemask_ps(m) != 0; }
static inline vm vm_from_bits(uint32_t bits)
{
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane));
}
/* Lanes as uint32: indices of argmax. */
static inline vf vf_iota(uint32_t first)
{
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_set1_epi32((int)first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
/* Even lanes over their pair, odd lanes over theirs. */
static inline vf vf_dup_even(vf a) { return _mm256_moveldup_ps(a); }
static inline vf vf_dup_odd(vf a) { return _mm256_movehdup_ps(a); }
/* [a0 b0 a1 b1 ...] of VF_LANES / 2 floats each. */
static inline vf vf_interleave(const float *a, const float *b)
{
    const __m128 x = _mm_loadu_ps(a), y = _mm_loadu_ps(b);
    return _mm256_set_m128(_mm_unpackhi_ps(x, y), _mm_unpacklo_ps(x, y));
}

static inline vd vd_zero(void) { return (vd){_mm256_setzero_pd(), _mm256_setzero_pd()}; }
static inline vd vd_add(vd acc, vf x)
{
    acc.lo = _mm256_add_pd(acc.lo, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    acc.hi = _mm256_add_pd(acc.hi, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    return acc;
}
static inline void vd_store(double *p, vd a)
{
    _mm256_storeu_pd(p, a.lo);
    _mm256_storeu_pd(p + 4, a.hi);
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
    y = _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
    y = _mm256_and_ps(_mm256_cmp_ps(x, vf_set1(KVS_EXP_MIN), _CMP_NLT_UQ), y);
    /* Over MAX or NaN: infinity, or x itself. x * infinity is both. */
    return vf_select(_mm256_cmp_ps(x, vf_set1(KVS_EXP_MAX), _CMP_NLE_UQ), vf_mul(x, vf_set1(INFINITY)), y);
}

static inline vf vf_log(vf x)
{
    const __m256i u = _mm256_castps_si256(x);
    const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(u, _mm256_set1_epi32(KVS_LOG_SQRT_HALF)), 23);
    const vf f = vf_sub(_mm256_castsi256_ps(_mm256_sub_epi32(u, _mm256_slli_epi32(e, 23))), vf_set1(1.0f));
    const vf n = _mm256_cvtepi32_ps(e), f2 = vf_mul(f, f);
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

/* Vectors of 16 floats in the words vector_body.h and attention_body.h are written in. Only *_avx512.c includes this.
 * Each polynomial repeats the steps of its scalar definition in vector_ref.c, so that the bits agree.
 */
/* Unrolled steps stand in columns, one step a line. */
/* clang-format off */
#ifndef KVS_SIMD_AVX512_H
#define KVS_SIMD_AVX512_H

#include "kernels/kernels_impl.h"
#include "kernels/simd_x86.h"

#define VF_NAME(name) name##_avx512
#define VF_PAGE_AT_ONCE 1 /* a register tile spans a page: attention_body.h has kernels for it */
enum { VF_LANES = 16, VF_TILE = 4 }; /* VF_TILE: vectors beside six rows that fill the register file */
typedef __m512 vf;
typedef __mmask16 vm;
typedef struct vd {
    __m512d lo, hi;
} vd;

static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void vf_store_f16(uint16_t *p, vf a)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_neg(vf a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
static inline vf vf_abs(vf a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
/* a > b ? a : b: a NaN in a is passed over, as in the plain twin's comparison. */
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vm vf_gt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline vm vf_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline vf vf_select(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
static inline bool vm_any(vm m) { return m != 0; }
static inline vm vm_from_bits(uint32_t bits) { return (vm)bits; }
/* Lanes as uint32: indices of argmax. */
static inline vf vf_iota(uint32_t first)
{
    const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_set1_epi32((int)first), step));
}
/* Even lanes over their pair, odd lanes over theirs. */
static inline vf vf_dup_even(vf a) { return _mm512_moveldup_ps(a); }
static inline vf vf_dup_odd(vf a) { return _mm512_movehdup_ps(a); }
/* [a0 b0 a1 b1 ...] of VF_LANES / 2 floats each. */
static inline vf vf_interleave(const float *a, const float *b)
{
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(_mm512_castps256_ps512(_mm256_loadu_ps(a)), order,
                                  _mm512_castps256_ps512(_mm256_loadu_ps(b)));
}

static inline vd vd_zero(void) { return (vd){_mm512_setzero_pd(), _mm512_setzero_pd()}; }
static inline vd vd_add(vd acc, vf x)
{
    acc.lo = _mm512_add_pd(acc.lo, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    acc.hi = _mm512_add_pd(acc.hi, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
    return acc;
}
static inline void vd_store(double *p, vd a)
{
    _mm512_storeu_pd(p, a.lo);
    _mm512_storeu_pd(p + 8, a.hi);
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
    y = _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
    y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, vf_set1(KVS_EXP_MIN), _CMP_NLT_UQ), y);
    /* Over MAX or NaN: infinity, or x itself. x * infinity is both. */
    return _mm512_mask_mul_ps(y, _mm512_cmp_ps_mask(x, vf_set1(KVS_EXP_MAX), _CMP_NLE_UQ), x, vf_set1(INFINITY));
}

static inline vf vf_log(vf x)
{
    const __m512i u = _mm512_castps_si512(x);
    const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(u, _mm512_set1_epi32(KVS_LOG_SQRT_HALF)), 23);
    const vf f = vf_sub(_mm512_castsi512_ps(_mm512_sub_epi32(u, _mm512_slli_epi32(e, 23))), vf_set1(1.0f));
    const vf n = _mm512_cvtepi32_ps(e), f2 = vf_mul(f, f);
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

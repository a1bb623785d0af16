/* Vectors of one panel's outputs in the words that matmul_f32_body.h and matmul_native_body.h are written in, for AVX2
 * (two parts of 8 to a panel) and AVX-512 (one of 16, with or without VNNI), whichever the file is compiled for. Only
 * matmul_avx2.c, matmul_avx512.c and matmul_avx512vnni.c include this. */
#ifndef KVS_MATMUL_SIMD_H
#define KVS_MATMUL_SIMD_H

#include "kernels/matmul.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
typedef __m512i vi;
typedef __m512 vf;
#define V(op)      _mm512_##op
#define V_INT(op)  _mm512_##op##_si512
#define V_HALF(op) _mm256_##op##_si256
enum { V_LANES = 16 };
#else
typedef __m256i vi;
typedef __m256 vf;
#define V(op)      _mm256_##op
#define V_INT(op)  _mm256_##op##_si256
#define V_HALF(op) _mm_##op##_si128
enum { V_LANES = 8 };
#endif
#ifdef __AVX512VNNI__
enum { V_HAS_DOT = 1 };
#else
enum { V_HAS_DOT = 0 };
#endif
enum { V_BYTES = V_LANES * 4, V_PARTS = KVS_PANEL / V_LANES };

ALWAYS_INLINE vi vi_load(const void *at)
{
    return V_INT(load)(at);
}

/* w | (h & mask) */
ALWAYS_INLINE vi vi_or_and(vi w, vi h, vi mask)
{
#ifdef __AVX512F__
    return _mm512_ternarylogic_epi32(w, h, mask, 0xf8);
#else
    return V_INT(or)(w, V_INT(and)(h, mask));
#endif
}

/* The same bits of every word at another place: towards the top where to > from. */
ALWAYS_INLINE vi vi_move_bits(vi v, const int from, const int to)
{
#ifdef __AVX512F__
    const unsigned left = (unsigned)(to - from), right = (unsigned)(from - to);
#else
    const int left = to - from, right = from - to;
#endif
    if (to > from)
        return V(slli_epi32)(v, left);
    return to < from ? V(srli_epi32)(v, right) : v;
}

/* Four bytes, in every word. */
ALWAYS_INLINE vi vi_words(const int8_t *at)
{
    int32_t word;
    memcpy(&word, at, sizeof word);
    return V(set1_epi32)(word);
}

/* acc + the four products of unsigned w and signed a in each word. */
#ifdef __AVX512VNNI__
ALWAYS_INLINE vi vi_dot(vi acc, vi w, vi a)
{
    return _mm512_dpbusd_epi32(acc, w, a);
}
#else
ALWAYS_INLINE vi vi_dot(vi acc, vi w, vi a)
{
    const vi pairs = V(maddubs_epi16)(w, a);
    return V(add_epi32)(acc, V(madd_epi16)(pairs, V(set1_epi16)(1)));
}
#endif

/* Loads of one part's halves, bfloats, bytes. */
ALWAYS_INLINE vf vf_half(const void *at)
{
    return V(cvtph_ps)(V_HALF(loadu)(at));
}

ALWAYS_INLINE vf vf_bf16(const void *at)
{
    return (vf)V(slli_epi32)(V(cvtepu16_epi32)(V_HALF(loadu)(at)), 16);
}

ALWAYS_INLINE vi vi_u8(const void *at)
{
#ifdef __AVX512F__
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(at));
#else
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(at));
#endif
}

ALWAYS_INLINE vi vi_s8(const void *at)
{
#ifdef __AVX512F__
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(at));
#else
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(at));
#endif
}

/* Pairs of bytes as pairs of 16 bits. */
ALWAYS_INLINE vi vi_u8_pairs(const void *at)
{
    return V(cvtepu8_epi16)(V_HALF(loadu)(at));
}

/* Codes 4j .. 4j + 3 of a block as bytes; codes stand at the part. */
ALWAYS_INLINE vi code_word(const kvs_weight_type type, const uint8_t *codes, const unsigned j)
{
    const unsigned bits = kvs_code_bits(type);
    if (bits == 8)
        return vi_load(codes + (size_t)j * 64);
    const vi pairs = vi_load(codes + (size_t)(j % 4) * 64);
    const vi w = V_INT(and)(j < 4 ? pairs : V(srli_epi16)(pairs, 4), V(set1_epi8)(15));
    if (bits == 5)
        return vi_or_and(w, vi_move_bits(vi_load(codes + 256), (int)j, 4), V(set1_epi8)(0x10));
    if (bits == 6)
        return vi_or_and(w, vi_move_bits(vi_load(codes + 256 + (size_t)(j / 4) * 64), (int)(j % 4 * 2), 4),
                         V(set1_epi8)(0x30));
    return w;
}

ALWAYS_INLINE vf vf_select_nan(vf v, vf if_nan, vf otherwise)
{
#ifdef __AVX512F__
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), if_nan);
#else
    return _mm256_blendv_ps(otherwise, if_nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
#endif
}

#endif

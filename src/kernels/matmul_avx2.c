/* AVX2 inner loops of the products: a panel of 16 outputs is two vectors of eight. Integer products go through
 * vpmaddubsw; the 8-bit codes are split in nibbles there, because its 16-bit sums would saturate. */
#include <math.h>

#define F32_NAME(name) kvs_matmul_##name##_avx2
enum { ROW_TILE = 6, LANES = 8, FEW_PANELS_MAX = 1 };

#include "kernels/matmul_f32_body.h"
#include "kernels/matmul_native_body.h"

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

/* First element of the largest magnitude of 256; 0 if there is only 0 and NaN. */
static float extreme(const float *x)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 amax8 = _mm256_setzero_ps();
    for (uint32_t i = 0; i < KVS_SUPER_BLOCKS * KVS_QBLOCK; i += LANES)
        amax8 = _mm256_max_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)), amax8);
    const __m256 amax = _mm256_set1_ps(max_ps(amax8));
    for (uint32_t i = 0; i < KVS_SUPER_BLOCKS * KVS_QBLOCK; i += LANES) {
        const __m256 found = _mm256_cmp_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)), amax, _CMP_EQ_OQ);
        const int lanes = _mm256_movemask_ps(found);
        if (lanes != 0)
            return x[i + (uint32_t)__builtin_ctz((unsigned)lanes)];
    }
    return 0.0f;
}

/* 32 codes; sums of each eight in order. */
static void quantise_block(const float *x, float id, int8_t *q, int32_t *sum, int32_t *sum_half)
{
    const __m256 scale = _mm256_set1_ps(id);
    __m256i c[4];
    for (uint32_t i = 0; i < 4; i++)
        c[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i * LANES), scale));
    const __m256i least = _mm256_set1_epi16(-128), ones = _mm256_set1_epi16(1);
    const __m256i w01 = _mm256_max_epi16(_mm256_packs_epi32(c[0], c[1]), least);
    const __m256i w23 = _mm256_max_epi16(_mm256_packs_epi32(c[2], c[3]), least);
    const __m256i bytes =
        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(w01, w23), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)(void *)q, bytes);
    *sum_half = sum_epi32(_mm256_madd_epi16(w01, ones));
    *sum = *sum_half + sum_epi32(_mm256_madd_epi16(w23, ones));
}

void kvs_matmul_quantise_k_avx2(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row)
{
    for (uint32_t k = 0; k < n_in; k += KVS_SUPER_BLOCKS * KVS_QBLOCK, tile += KVS_SUPER_BLOCKS) {
        const float max = extreme(x + k);
        const bool tiny = !(fabsf(max) > 1e-30f); /* see matmul_ref.c */
        const float id = tiny ? 0.0f : -127.0f / max, d = tiny ? 0.0f : 1.0f / id;
        for (uint32_t b = 0; b < KVS_SUPER_BLOCKS; b++) {
            quantise_block(x + k + (size_t)b * KVS_QBLOCK, id, tile[b].q[row], &tile[b].sum[row],
                           &tile[b].sum_half[row]);
            tile[b].d[row] = d;
        }
        for (uint32_t b = 0; b < KVS_SUPER_BLOCKS; b += 2)
            tile[b].sum_pair[row] = kvs_sum_pair(tile[b].sum[row], tile[b + 1].sum[row]);
    }
}

const struct kvs_matmul_kernels kvs_matmul_kernels_avx2 = {
    ROW_TILE,        F32_NAME(f32_few),  F32_NAME(widen),      f32_tile,
    F32_NAME(round), F32_NAME(quantise), F32_NAME(quantise_k), native};

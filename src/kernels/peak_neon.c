/* The limits of NEON: 32 registers, so 24 chains. */
#include "kernels/peak.h"

#include <arm_neon.h>

enum { CHAINS = 24 };

double kvs_peak_fma_f32_neon(uint64_t n_rounds, float *sink)
{
    float32x4_t acc[CHAINS];
    const float32x4_t a = vdupq_n_f32(*sink), b = vdupq_n_f32(*sink + 1);
    for (int c = 0; c < CHAINS; c++)
        acc[c] = vdupq_n_f32((float)c);
    for (uint64_t i = 0; i < n_rounds; i++)
#pragma GCC unroll 24
        for (int c = 0; c < CHAINS; c++)
            acc[c] = vfmaq_f32(acc[c], a, b);
    for (int c = 1; c < CHAINS; c++)
        acc[0] = vaddq_f32(acc[0], acc[c]);
    *sink += vgetq_lane_f32(acc[0], 0);
    return 2.0 * 4 * CHAINS * (double)n_rounds;
}

static double dot_int8(uint64_t n_rounds, int32_t *sink)
{
    int16x8_t acc[CHAINS];
    const int8x8_t a = vdup_n_s8((int8_t)*sink), b = vdup_n_s8((int8_t)(*sink + 1));
    for (int c = 0; c < CHAINS; c++)
        acc[c] = vdupq_n_s16((int16_t)c);
    for (uint64_t i = 0; i < n_rounds; i++)
#pragma GCC unroll 24
        for (int c = 0; c < CHAINS; c++)
            acc[c] = vmlal_s8(acc[c], a, b);
    for (int c = 1; c < CHAINS; c++)
        acc[0] = vaddq_s16(acc[0], acc[c]);
    *sink += vgetq_lane_s16(acc[0], 0);
    return 2.0 * 8 * CHAINS * (double)n_rounds;
}

uint64_t kvs_peak_read_neon(const void *bytes, size_t n_bytes)
{
    const uint64_t *const w = bytes;
    const size_t n = n_bytes / KVS_PEAK_STREAMS / sizeof *w; /* words of one stream */
    uint64x2_t acc[KVS_PEAK_STREAMS];
    for (size_t s = 0; s < KVS_PEAK_STREAMS; s++)
        acc[s] = vdupq_n_u64(0);
    for (size_t i = 0; i < n; i += 16)
#pragma GCC unroll 4
        for (size_t s = 0; s < KVS_PEAK_STREAMS; s++)
#pragma GCC unroll 8
            for (size_t c = 0; c < 16; c += 2)
                acc[s] = veorq_u64(acc[s], vld1q_u64(w + s * n + i + c));
    acc[0] = veorq_u64(veorq_u64(acc[0], acc[1]), veorq_u64(acc[2], acc[3]));
    return vgetq_lane_u64(acc[0], 0) ^ vgetq_lane_u64(acc[0], 1);
}

const kvs_peak_kernels kvs_peak_kernels_neon = {kvs_peak_fma_f32_neon, dot_int8, kvs_peak_read_neon};

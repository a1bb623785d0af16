/* The limit of SDOT: 16 products of 8-bit codes added into 4 sums. */
#include "kernels/peak.h"

#include <arm_neon.h>

enum { CHAINS = 24 };

static double dot_int8(uint64_t n_rounds, int32_t *sink)
{
    int32x4_t acc[CHAINS];
    const int8x16_t a = vdupq_n_s8((int8_t)*sink), b = vdupq_n_s8((int8_t)(*sink + 1));
    for (int c = 0; c < CHAINS; c++)
        acc[c] = vdupq_n_s32(c);
    for (uint64_t i = 0; i < n_rounds; i++)
#pragma GCC unroll 24
        for (int c = 0; c < CHAINS; c++)
            acc[c] = vdotq_s32(acc[c], a, b);
    for (int c = 1; c < CHAINS; c++)
        acc[0] = vaddq_s32(acc[0], acc[c]);
    *sink += vgetq_lane_s32(acc[0], 0);
    return 2.0 * 16 * CHAINS * (double)n_rounds;
}

const kvs_peak_kernels kvs_peak_kernels_neondot = {kvs_peak_fma_f32_neon, dot_int8, kvs_peak_read_neon};

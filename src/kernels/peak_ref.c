/* The limits of plain C, as the compiler turns it into baseline instructions. */
#include "kernels/peak.h"

#include <math.h>

enum { CHAINS = 8 }; /* enough for the latency of a scalar multiply-add */

static double fma_f32(uint64_t n_rounds, float *sink)
{
    float acc[CHAINS] = {0, 1, 2, 3, 4, 5, 6, 7};
    const float a = *sink, b = *sink + 1;
    for (uint64_t i = 0; i < n_rounds; i++)
        for (int c = 0; c < CHAINS; c++)
            acc[c] = fmaf(a, b, acc[c]);
    for (int c = 0; c < CHAINS; c++)
        *sink += acc[c];
    return 2.0 * CHAINS * (double)n_rounds;
}

static uint64_t read_bytes(const void *bytes, size_t n_bytes)
{
    const uint64_t *const w = bytes;
    const size_t n = n_bytes / KVS_PEAK_STREAMS / sizeof *w; /* words of one stream */
    uint64_t sum[KVS_PEAK_STREAMS] = {0};
    for (size_t i = 0; i < n; i += 8)
        for (size_t s = 0; s < KVS_PEAK_STREAMS; s++)
            for (size_t c = 0; c < 8; c++)
                sum[s] ^= w[s * n + i + c];
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

const kvs_peak_kernels kvs_peak_kernels_ref = {fma_f32, NULL, read_bytes};

/* Integer products with SDOT: four bytes of four outputs times four activation codes at once. The rest of the table is
 * matmul_neon.c's. */
#include "kernels/matmul_neon.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { ROW_TILE = 6, QUARTERS_OF_4_ROWS = 2 };

ALWAYS_INLINE void block_dots(const kvs_weight_type type, const int n_rows, const int n_quarters, const uint8_t *codes,
                              const struct kvs_act_block *a, uint32_t row, int32x4_t (*sums)[4])
{
    int8x16_t act[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        act[r][0] = vld1q_s8(a->q[row + (uint32_t)r]);
        act[r][1] = vld1q_s8(a->q[row + (uint32_t)r] + 16);
#pragma GCC unroll 4
        for (int q = 0; q < n_quarters; q++)
            sums[q][r] = vdupq_n_s32(0);
    }
/* Lane indices must be literals. */
#define WORD(j)                                                                                                        \
    _Pragma("GCC unroll 4") for (int q = 0; q < n_quarters; q++)                                                       \
    {                                                                                                                  \
        int8x16_t w[2];                                                                                                \
        kvs_neon_codes(type, codes + q * 16, j, w);                                                                    \
        _Pragma("GCC unroll 4") for (int r = 0; r < n_rows; r++)                                                       \
        {                                                                                                              \
            sums[q][r] = vdotq_laneq_s32(sums[q][r], w[0], act[r][0], j);                                              \
            sums[q][r] = vdotq_laneq_s32(sums[q][r], w[1], act[r][1], j);                                              \
        }                                                                                                              \
    }
    WORD(0)
    WORD(1)
    WORD(2)
    WORD(3)
#undef WORD
}

#include "kernels/matmul_neon_body.h"

const struct kvs_matmul_kernels kvs_matmul_kernels_neondot = {ROW_TILE,
                                                              kvs_matmul_f32_few_neon,
                                                              kvs_matmul_widen_neon,
                                                              kvs_matmul_f32_tile_neon,
                                                              kvs_matmul_round_neon,
                                                              kvs_matmul_quantise_neon,
                                                              kvs_matmul_quantise_k_neon,
                                                              native};

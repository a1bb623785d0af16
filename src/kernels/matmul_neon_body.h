/* Native products over blocks of a panel, for one way of taking integer dot products. matmul_neon.c and
 * matmul_neondot.c define block_dots and QUARTERS_OF_4_ROWS first:
 *   sums[q][r] = exact products of the codes of quarter q with activation row `row + r`, in four lanes
 */

/* n_quarters of four outputs x n_rows. */
ALWAYS_INLINE void native_quarters(const kvs_weight_type type, const int n_rows, const int n_quarters,
                                   const struct kvs_panels *p, const uint8_t *panel, uint32_t quarter,
                                   const struct kvs_act_block *tile, uint32_t row, float *y, size_t y_stride)
{
    const uint32_t n_blocks = p->n_in / KVS_QBLOCK;
    const uint16_t *d = kvs_panel_scales(p, panel) + (size_t)quarter * 4;
    const uint8_t *codes = panel + (size_t)quarter * 16;
    float32x4_t acc[4][4];
#pragma GCC unroll 4
    for (int q = 0; q < n_quarters; q++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
            acc[q][r] = vdupq_n_f32(0.0f);
    for (uint32_t b = 0; b < n_blocks; b++, tile++, d += KVS_PANEL, codes += kvs_panel_code_bytes(type)) {
        int32x4_t sums[4][4];
        block_dots(type, n_rows, n_quarters, codes, tile, row, sums);
#pragma GCC unroll 4
        for (int q = 0; q < n_quarters; q++) {
            float32x4_t dv, mv;
            kvs_neon_scales(type, d + q * 4, (size_t)n_blocks * KVS_PANEL, &dv, &mv);
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++) {
                const uint32_t at = row + (uint32_t)r;
                int32x4_t sum = sums[q][r];
                if (type == KVS_WEIGHT_Q4_0)
                    sum = vsubq_s32(sum, vdupq_n_s32(8 * tile->sum[at]));
                acc[q][r] = vfmaq_f32(acc[q][r], vmulq_n_f32(dv, tile->d[at]), vcvtq_f32_s32(sum));
                if (type == KVS_WEIGHT_Q4_1)
                    acc[q][r] = vfmaq_n_f32(acc[q][r], mv, tile->s[at]);
            }
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < n_quarters; q++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
            vst1q_f32(y + (row + (size_t)r) * y_stride + (quarter + (size_t)q) * 4, acc[q][r]);
}

/* One row takes a whole panel at once and so reads it as a stream; more rows take fewer quarters, again and again. */
ALWAYS_INLINE void native_type(const kvs_weight_type type, const struct kvs_panels *p, const struct kvs_act_block *tile,
                               uint32_t n_rows, float *y, size_t y_stride)
{
    const uint8_t *panel = p->base;
    for (uint32_t n = 0; n < p->n_panels; n++, panel += p->stride_bytes, y += KVS_PANEL) {
        uint32_t row = 0;
        for (; row + 4 <= n_rows; row += 4)
            for (uint32_t q = 0; q < 4; q += QUARTERS_OF_4_ROWS)
                native_quarters(type, 4, QUARTERS_OF_4_ROWS, p, panel, q, tile, row, y, y_stride);
        for (; row + 2 <= n_rows; row += 2)
            for (uint32_t q = 0; q < 4; q += 2)
                native_quarters(type, 2, 2, p, panel, q, tile, row, y, y_stride);
        if (row < n_rows)
            native_quarters(type, 1, 4, p, panel, 0, tile, row, y, y_stride);
    }
}

static void native(const struct kvs_panels *p, const struct kvs_act_block *tile, uint32_t n_rows, float *y,
                   size_t y_stride)
{
    if (p->type == KVS_WEIGHT_Q4_0)
        native_type(KVS_WEIGHT_Q4_0, p, tile, n_rows, y, y_stride);
    else if (p->type == KVS_WEIGHT_Q4_1)
        native_type(KVS_WEIGHT_Q4_1, p, tile, n_rows, y, y_stride);
    else if (p->type == KVS_WEIGHT_Q8_0)
        native_type(KVS_WEIGHT_Q8_0, p, tile, n_rows, y, y_stride);
    else /* types without loops here yet: the twin's bits are the same */
        kvs_matmul_kernels_ref.native(p, tile, n_rows, y, y_stride);
}

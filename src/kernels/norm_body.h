/* The L1 norm of products with a matrix, for one vector width: norm_avx2.c, norm_avx512.c and norm_neon.c include a simd_*.h
 * first. Lanes are slots, so that each slot's chains are those of the plain twin; a tile of values is turned once and
 * serves all rows. */

enum {
    NORM_SLOTS = 32,
    NORM_VECTORS = NORM_SLOTS / VF_LANES,
    NORM_STEP = NORM_VECTORS == 2   ? 6
                : NORM_VECTORS == 4 ? 3
                                    : 2, /* rows whose sums fit the registers */
};
_Static_assert(KVS_NORM_ROWS % NORM_STEP == 0, "rows come in whole steps");

static void norm_tile(const float *w, uint32_t n_rows, uint32_t dim, const float *tile, float *norm)
{
    vf sum[NORM_VECTORS];
    for (int k = 0; k < NORM_VECTORS; k++)
        sum[k] = vf_set1(0.0f);
    for (uint32_t r = 0; r < n_rows; r += NORM_STEP, w += (size_t)NORM_STEP * dim) {
        vf y[NORM_STEP][NORM_VECTORS];
        for (int j = 0; j < NORM_STEP; j++)
            for (int k = 0; k < NORM_VECTORS; k++)
                y[j][k] = vf_set1(0.0f);
        for (uint32_t d = 0; d < dim; d++)
            for (int j = 0; j < NORM_STEP; j++) {
                const vf x = vf_set1(w[(size_t)j * dim + d]);
                for (int k = 0; k < NORM_VECTORS; k++)
                    y[j][k] = vf_fma(x, vf_load(tile + (size_t)d * NORM_SLOTS + k * VF_LANES), y[j][k]);
            }
        for (int j = 0; j < NORM_STEP; j++)
            for (int k = 0; k < NORM_VECTORS; k++)
                sum[k] = vf_add(sum[k], vf_abs(y[j][k]));
    }
    for (int k = 0; k < NORM_VECTORS; k++)
        vf_store(norm + k * VF_LANES, sum[k]);
}

static void product_norm(const float *w, uint32_t n_rows, uint32_t dim, const float *v, uint32_t n, float *norm)
{
    _Alignas(64) float tile[KVS_NORM_DIM_MAX * NORM_SLOTS], out[NORM_SLOTS];
    for (uint32_t i = 0; i < n; i += NORM_SLOTS) {
        const uint32_t n_here = n - i < NORM_SLOTS ? n - i : NORM_SLOTS;
        for (uint32_t d = 0; d < dim; d++)
            for (uint32_t k = 0; k < NORM_SLOTS; k++)
                tile[d * NORM_SLOTS + k] = k < n_here ? v[(size_t)(i + k) * dim + d] : 0.0f;
        norm_tile(w, n_rows, dim, tile, out);
        memcpy(norm + i, out, n_here * sizeof *norm);
    }
}

void VF_NAME(kvs_norm_fill)(kvs_kernels *k)
{
    k->product_norm = product_norm;
}

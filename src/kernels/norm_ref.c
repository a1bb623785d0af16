/* Plain twin of the norm of products. */
#include "kernels/kernels_impl.h"

static void product_norm_ref(const float *w, uint32_t n_rows, uint32_t dim, const float *v, uint32_t n, float *norm)
{
    for (uint32_t i = 0; i < n; i++) {
        float sum = 0;
        for (uint32_t r = 0; r < n_rows; r++) {
            float y = 0;
            for (uint32_t d = 0; d < dim; d++)
                y = fmaf(w[(size_t)r * dim + d], v[(size_t)i * dim + d], y);
            sum += fabsf(y);
        }
        norm[i] = sum;
    }
}

void kvs_norm_fill_ref(kvs_kernels *k)
{
    k->product_norm = product_norm_ref;
}

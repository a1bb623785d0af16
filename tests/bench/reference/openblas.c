/* OpenBLAS: sgemm with W as it stands in the file, sgemv for one row. Variant: f32. */
#include "reference.h"

#include <cblas.h>
#include <stdio.h>
#include <string.h>

static struct {
    float *weights[REFERENCE_SHAPES][REFERENCE_LAYERS];
    const float *x;
    float *y;
    uint32_t n_rows;
} blas;

static bool open(const char *variant, uint32_t n_threads, const char **why)
{
    *why = "OpenBLAS has f32 only";
    openblas_set_num_threads((int)n_threads);
    return strcmp(variant, "f32") == 0;
}

static bool products(uint32_t n_rows, const float *x, float *y, const char **why)
{
    (void)why;
    for (uint32_t s = 0; s < REFERENCE_SHAPES; s++)
        for (uint32_t l = 0; l < reference_shapes[s].n_layers && blas.weights[s][l] == NULL; l++) {
            const uint32_t n_out = reference_shapes[s].n_out, n_in = reference_shapes[s].n_in;
            blas.weights[s][l] = reference_alloc((uint64_t)n_out * n_in * sizeof(float));
            reference_weights(s, l, 0, n_out, blas.weights[s][l]);
        }
    blas.x = x, blas.y = y, blas.n_rows = n_rows;
    return true;
}

static void product_run(uint32_t shape)
{
    const int n_out = (int)reference_shapes[shape].n_out, n_in = (int)reference_shapes[shape].n_in;
    for (uint32_t l = 0; l < reference_shapes[shape].n_layers; l++) {
        const float *w = blas.weights[shape][l];
        if (blas.n_rows == 1)
            cblas_sgemv(CblasRowMajor, CblasNoTrans, n_out, n_in, 1.0f, w, n_in, blas.x, 1, 0.0f, blas.y, 1);
        else
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)blas.n_rows, n_out, n_in, 1.0f, blas.x, n_in, w,
                        n_in, 0.0f, blas.y, n_out);
    }
}

static void describe(char *text, uint32_t text_bytes)
{
    snprintf(text, text_bytes, "%s", openblas_get_config());
}

const reference_engine reference_openblas = {"openblas", open, products, product_run, NULL, NULL, describe};

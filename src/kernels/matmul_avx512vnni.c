/* Integer products with AVX512-VNNI: vpdpbusd takes four u8 codes of 16 outputs and four s8 activations at once. The
 * rest of the table is matmul_avx512.c's. */
#include "kernels/matmul_native_body.h"

enum { ROW_TILE = 12 };

const struct kvs_matmul_kernels kvs_matmul_kernels_avx512vnni = {ROW_TILE,
                                                                 kvs_matmul_f32_few_avx512,
                                                                 kvs_matmul_widen_avx512,
                                                                 kvs_matmul_f32_tile_avx512,
                                                                 kvs_matmul_round_avx512,
                                                                 kvs_matmul_quantise_avx2,
                                                                 kvs_matmul_quantise_k_avx2,
                                                                 native};

/* The norm of products on 8-lane vectors. */
#include "kernels/simd_avx2.h"
#include "kernels/norm_body.h"

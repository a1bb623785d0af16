/* The norm of products on 16-lane vectors. */
#include "kernels/simd_avx512.h"
#include "kernels/norm_body.h"

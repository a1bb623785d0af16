/* The norm of products on 4-lane vectors. */
#include "kernels/simd_neon.h"
#include "kernels/norm_body.h"

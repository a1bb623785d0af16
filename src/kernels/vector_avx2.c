/* The elementwise kernels on 8-lane vectors; the text they share over widths is vector_body.h. */
#include "kernels/simd_avx2.h"
#include "kernels/vector_body.h"

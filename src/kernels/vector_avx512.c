/* The elementwise kernels on 16-lane vectors; the text they share over widths is vector_body.h. */
#include "kernels/simd_avx512.h"
#include "kernels/vector_body.h"

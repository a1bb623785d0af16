/* Elementwise kernels on 4-lane vectors; the text all widths share is vector_body.h. */
#include "kernels/simd_neon.h"
#include "kernels/vector_body.h"

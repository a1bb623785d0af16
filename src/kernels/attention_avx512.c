/* Attention over pages on 16-lane vectors; the text both widths share is attention_body.h. */
#include "kernels/simd_avx512.h"
#include "kernels/attention_body.h"

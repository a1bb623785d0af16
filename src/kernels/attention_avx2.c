/* Attention over pages on 8-lane vectors; the text both widths share is attention_body.h. */
#include "kernels/simd_avx2.h"
#include "kernels/attention_body.h"

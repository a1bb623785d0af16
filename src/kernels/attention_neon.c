/* Attention over pages on 4-lane vectors; the text all widths share is attention_body.h. */
#include "kernels/simd_neon.h"
#include "kernels/attention_body.h"

/* Inner loops of the products with a weight matrix and what they share: the packed panel, the quantised activation
 * tile, half-precision conversion. Internal to src/kernels; the drivers in matmul.c own threads, scratch and edges, so
 * an inner loop sees whole panels of 16 outputs only.
 *
 * Exactness: one output is one chain over ascending k (f32) or ascending blocks of 32 (native). A vector lane is one
 * output, so every instruction set, tile shape and split gives the same bits; K-blocks continue a chain through memory.
 */
#ifndef KVS_MATMUL_H
#define KVS_MATMUL_H

#include "kernels/kernels.h"

#include <string.h>

enum {
    KVS_PANEL = 16,             /* outputs of one panel: one AVX-512 vector of f32 */
    KVS_QBLOCK = 32,            /* weights that share a scale in Q4_0, Q4_1, Q8_0 */
    KVS_ACT_TILE = 8,           /* activation rows of one native tile */
    KVS_F32_FEW_ROWS = 4,       /* up to here weights are widened in registers, beyond in scratch */
    KVS_F32_TILE_ROWS_MAX = 12, /* largest row_tile of any kernel table */
};

/* Packed form of one panel of n_blocks = n_in / 32 blocks, 64-byte aligned, padded to 64 bytes:
 *   codes  [n_blocks][4 or 8][16 rows][4 bytes]   d [n_blocks][16] f16   m [n_blocks][16] f16 (Q4_1 only)
 * Q4: byte b of row r in vector j has element 4j + b in its low nibble and 16 + 4j + b in its high one - ggml's own
 * pairing, so packing moves whole 32-bit words. Q8_0: byte b of vector j is element 4j + b, plus 128.
 * F32: [n_in][16]. All codes are unsigned, as the u8 x s8 instructions want; a weight is fmaf(code, d, m) with
 * m = -8 d (Q4_0) and -128 d (Q8_0). Both are exact, so that this is (code - 8) * d and q * d rounded once. */
struct kvs_panels {
    kvs_weight_type type; /* not KVS_WEIGHT_OTHER */
    uint32_t n_in;
    const uint8_t *base; /* first panel */
    size_t stride_bytes; /* to the next */
    uint32_t n_panels;
};

/* One block of 32 of up to KVS_ACT_TILE quantised activation rows. */
struct kvs_act_block {
    int8_t q[KVS_ACT_TILE][KVS_QBLOCK];
    float d[KVS_ACT_TILE];     /* f16(amax / 127), widened */
    float s[KVS_ACT_TILE];     /* f16(amax / 127 * sum), widened */
    int32_t sum[KVS_ACT_TILE]; /* of the codes */
};

struct kvs_matmul_kernels {
    uint32_t row_tile; /* rows f32_tile takes at most */
    /* y[r][16 p + i] of all panels for n_rows <= KVS_F32_FEW_ROWS rows of x [n_rows][x_stride]. */
    void (*f32_few)(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
                    size_t y_stride);
    /* Weights k_begin .. k_begin + n_k (multiples of 32) of the first panel: out [n_k][16] f32. Not for F32. */
    void (*widen)(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out);
    /* Continues the sums `from` [row_tile][32] (NULL: zeros) with w0, w1 [n_k][16] (outputs 0-15, 16-31) and x
     * [n_k][row_tile] into to [row_tile][to_stride]. Rows from n_rows on are padding: x holds zeros there, and what is
     * at `to` may be touched. */
    void (*f32_tile)(const float *w0, const float *w1, const float *x, uint32_t n_k, uint32_t n_rows, const float *from,
                     float *to, size_t to_stride);
    /* Quantises x [n_in] into row `row` of a tile of n_in / 32 blocks. */
    void (*quantise)(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row);
    /* y[r][16 p + i] of all panels for the n_rows <= KVS_ACT_TILE rows of a tile. Not for F32. */
    void (*native)(const struct kvs_panels *p, const struct kvs_act_block *tile, uint32_t n_rows, float *y,
                   size_t y_stride);
};

/* The best table for KVS_CPU_* bits as kvs_cpu_masked() gives them. */
const struct kvs_matmul_kernels *kvs_matmul_kernels_get(uint32_t cpu);

extern const struct kvs_matmul_kernels kvs_matmul_kernels_ref, kvs_matmul_kernels_avx2, kvs_matmul_kernels_avx512,
    kvs_matmul_kernels_avx512vnni, kvs_matmul_kernels_neon, kvs_matmul_kernels_neondot;

/* Shared by both AVX-512 tables. */
void kvs_matmul_f32_few_avx512(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
                               size_t y_stride);
void kvs_matmul_widen_avx512(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out);
void kvs_matmul_f32_tile_avx512(const float *w0, const float *w1, const float *x, uint32_t n_k, uint32_t n_rows,
                                const float *from, float *to, size_t to_stride);
void kvs_matmul_quantise_avx2(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row);

/* Bytes of the codes of one block of a panel; of one panel. 0 for KVS_WEIGHT_OTHER. */
static inline size_t kvs_panel_code_bytes(kvs_weight_type type)
{
    return type == KVS_WEIGHT_Q8_0 ? 512 : type == KVS_WEIGHT_Q4_0 || type == KVS_WEIGHT_Q4_1 ? 256 : 0;
}
size_t kvs_panel_bytes(kvs_weight_type type, uint32_t n_in);

static inline struct kvs_panels kvs_weight_panels(const kvs_weight *w, uint32_t panel_begin, uint32_t n_panels)
{
    const size_t stride_bytes = kvs_panel_bytes(w->type, w->n_in);
    return (struct kvs_panels){w->type, w->n_in, (const uint8_t *)w->packed + panel_begin * stride_bytes, stride_bytes,
                               n_panels};
}

/* Start of d [n_blocks][16] f16 of a panel of a quantised type; m follows it at n_blocks * 16. */
static inline const uint16_t *kvs_panel_scales(const struct kvs_panels *p, const uint8_t *panel)
{
    return (const uint16_t *)(const void *)(panel + p->n_in / KVS_QBLOCK * kvs_panel_code_bytes(p->type));
}

static inline float kvs_half_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
    uint32_t bits;
    float f;
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 is exact */
        f = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &f, sizeof bits);
    } else {
        bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    }
    bits |= sign;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Round to nearest even, overflow to infinity, as F16C does. */
static inline uint16_t kvs_float_to_half(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) /* NaN stays a quiet NaN */
        return (uint16_t)(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
    if (bits >= 0x477ff000u) /* 65520 and beyond round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (bits < 0x38800000u) { /* subnormal: adding 0.5 leaves the value in units of 2^-24 in the mantissa */
        float a;
        memcpy(&a, &bits, sizeof a);
        a += 0.5f;
        memcpy(&bits, &a, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    const uint32_t odd = bits >> 13 & 1u;
    return (uint16_t)(sign | ((bits - 0x38000000u + 0xfffu + odd) >> 13));
}

#endif

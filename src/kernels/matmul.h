/* Inner loops of the products with a weight matrix and what they share: the packed panel, the quantised activation
 * tile, half-precision conversion. Internal to src/kernels; the drivers in matmul.c own threads, scratch and edges, so
 * an inner loop sees whole panels of 16 outputs only.
 *
 * Exactness: one output is one chain over ascending k (f32) or ascending blocks of 32 (native). A vector lane is one
 * output, so every instruction set, tile shape and split gives the same bits; K-blocks continue a chain through memory.
 */
#ifndef KVS_MATMUL_H
#define KVS_MATMUL_H

#include "kernels/matmul_codes.h"

#include <string.h>

enum {
    KVS_ACT_TILE = 8,           /* activation rows of one native tile */
    KVS_F32_FEW_ROWS = 4,       /* up to here weights are widened in registers, beyond in scratch */
    KVS_F32_TILE_ROWS_MAX = 12, /* largest row_tile of any kernel table */
};

/* Packed panels, 64-byte aligned; their layout is matmul_codes.h's. */
struct kvs_panels {
    kvs_weight_type type; /* not KVS_WEIGHT_OTHER */
    uint32_t n_in;
    const uint8_t *base; /* first panel */
    size_t stride_bytes; /* to the next */
    uint32_t n_panels;
};

/* One block of 32 of up to KVS_ACT_TILE quantised activation rows. A super-block of q8_K is eight of these with one d. */
struct kvs_act_block {
    int8_t q[KVS_ACT_TILE][KVS_QBLOCK];
    float d[KVS_ACT_TILE]; /* f16(amax / 127), widened; q8_K: f32 */
    union {
        float s[KVS_ACT_TILE]; /* f16(amax / 127 * sum), widened */
        int32_t
            sum_pair[KVS_ACT_TILE]; /* q8_K, even blocks: sum of this block in the low half, of the next in the high */
    };
    int32_t sum[KVS_ACT_TILE];      /* of the codes */
    int32_t sum_half[KVS_ACT_TILE]; /* q8_K: of the first 16 */
};

static inline int32_t kvs_sum_pair(int32_t low, int32_t high)
{
    return (int32_t)(((uint32_t)low & 0xffffu) | (uint32_t)high << 16);
}

struct kvs_matmul_kernels {
    uint32_t row_tile; /* rows f32_tile takes at most */
    /* y[r][16 p + i] of all panels for n_rows <= KVS_F32_FEW_ROWS rows of x [n_rows][x_stride]. */
    void (*f32_few)(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
                    size_t y_stride);
    /* Weights k_begin .. k_begin + n_k (multiples of 32 if quantised) of the first panel: out [n_k][16] f32. */
    void (*widen)(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out);
    /* Continues the sums `from` [row_tile][32] (NULL: zeros) with w0, w1 [n_k][16] (outputs 0-15, 16-31) and x
     * [n_k][row_tile] into to [row_tile][to_stride]. Rows from n_rows on are padding: x holds zeros there, and what is
     * at `to` may be touched. */
    void (*f32_tile)(const float *w0, const float *w1, const float *x, uint32_t n_k, uint32_t n_rows, const float *from,
                     float *to, size_t to_stride);
    /* x [n] rounded to F16 or BF16 and widened again; y may be x. */
    void (*round)(kvs_weight_type type, const float *x, uint32_t n, float *y);
    /* Quantises x [n_in] into row `row` of a tile of n_in / 32 blocks: q8_0 and q8_1, and q8_K. */
    void (*quantise)(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row);
    void (*quantise_k)(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row);
    /* y[r][16 p + i] of all panels for the n_rows <= KVS_ACT_TILE rows of a tile. Quantised types only. */
    void (*native)(const struct kvs_panels *p, const struct kvs_act_block *tile, uint32_t n_rows, float *y,
                   size_t y_stride);
};

/* The best table for KVS_CPU_* bits as kvs_cpu_masked() gives them. */
const struct kvs_matmul_kernels *kvs_matmul_kernels_get(uint32_t cpu);

extern const struct kvs_matmul_kernels kvs_matmul_kernels_ref, kvs_matmul_kernels_avx2, kvs_matmul_kernels_avx512,
    kvs_matmul_kernels_avx512vnni, kvs_matmul_kernels_neon, kvs_matmul_kernels_neondot;

/* What x86 tables share. */
void kvs_matmul_f32_few_avx2(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
                             size_t y_stride);
void kvs_matmul_widen_avx2(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out);
void kvs_matmul_round_avx2(kvs_weight_type type, const float *x, uint32_t n, float *y);
void kvs_matmul_quantise_avx2(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row);
void kvs_matmul_quantise_k_avx2(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row);
void kvs_matmul_f32_few_avx512(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
                               size_t y_stride);
void kvs_matmul_widen_avx512(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out);
void kvs_matmul_f32_tile_avx512(const float *w0, const float *w1, const float *x, uint32_t n_k, uint32_t n_rows,
                                const float *from, float *to, size_t to_stride);
void kvs_matmul_round_avx512(kvs_weight_type type, const float *x, uint32_t n, float *y);

/* Bytes of one panel, 0 for KVS_WEIGHT_OTHER. */
size_t kvs_panel_bytes(kvs_weight_type type, uint32_t n_in);

static inline struct kvs_panels kvs_weight_panels(const kvs_weight *w, uint32_t panel_begin, uint32_t n_panels)
{
    const size_t stride_bytes = kvs_panel_bytes(w->type, w->n_in);
    return (struct kvs_panels){w->type, w->n_in, (const uint8_t *)w->packed + panel_begin * stride_bytes, stride_bytes,
                               n_panels};
}

/* Start of a quantised panel's scales: d [n_blocks][16] f16, m following it at n_blocks * 16; or super-blocks of K. */
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

static inline float kvs_bf16_to_float(uint16_t h)
{
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Round to nearest even; NaN stays a quiet NaN. */
static inline uint16_t kvs_float_to_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* One element of a dense type. */
static inline float kvs_dense_at(kvs_weight_type type, const uint8_t *at)
{
    float f;
    uint16_t h;
    if (type == KVS_WEIGHT_F32) {
        memcpy(&f, at, sizeof f);
        return f;
    }
    memcpy(&h, at, sizeof h);
    return type == KVS_WEIGHT_F16 ? kvs_half_to_float(h) : kvs_bf16_to_float(h);
}

/* d and m of element k, the same for KVS_SCALE_ELEMENTS from a multiple of it on, of one output of a quantised panel. */
static inline void kvs_panel_scales_at(const struct kvs_panels *p, const uint8_t *panel, uint32_t k, uint32_t lane,
                                       float *d, float *m)
{
    const uint16_t *const scales = kvs_panel_scales(p, panel);
    const uint32_t block = k / KVS_QBLOCK, n_blocks = p->n_in / KVS_QBLOCK;
    if (!kvs_is_k(p->type)) {
        *d = kvs_half_to_float(scales[(size_t)block * KVS_PANEL + lane]);
        *m = kvs_has_min(p->type) ? kvs_half_to_float(scales[(size_t)(n_blocks + block) * KVS_PANEL + lane])
                                  : -(float)kvs_code_above(p->type) * *d;
        return;
    }
    const uint16_t *const super = scales + block / KVS_SUPER_BLOCKS * (KVS_SUPER_BYTES / sizeof *super);
    const uint8_t *const sc = (const uint8_t *)super + KVS_SUPER_SC, *const mins =
                                                                         (const uint8_t *)super + KVS_SUPER_MINS;
    const uint32_t b = block % KVS_SUPER_BLOCKS;
    *d = kvs_half_to_float(super[lane]);
    if (p->type == KVS_WEIGHT_Q6_K) {
        *d *= (float)(int8_t)sc[(b * 2 + k / 16 % 2) * KVS_PANEL + lane];
        *m = -(float)kvs_code_above(p->type) * *d;
    } else {
        *d *= (float)sc[b * KVS_PANEL + lane];
        *m = -(kvs_half_to_float(super[KVS_PANEL + lane]) * (float)mins[(b / 2 * KVS_PANEL + lane) * 2 + b % 2]);
    }
}

#endif

/* Products in f32 of up to four rows, widening of panels, rounding of activations. matmul_avx2.c and matmul_avx512.c
 * include this, and define before it F32_NAME(name), what the functions are called, and FEW_PANELS_MAX, how many panels
 * side by side hide the latency of one row's chains. */
#include "kernels/matmul_simd.h"

/* d and m of sixteen elements (half 0 or 1 of block b) of one part. */
ALWAYS_INLINE void load_scales(const kvs_weight_type type, const struct kvs_panels *p, const uint8_t *panel, uint32_t b,
                               const unsigned half, const unsigned part, vf *d, vf *m)
{
    const uint8_t *const scales = (const uint8_t *)kvs_panel_scales(p, panel);
    const size_t first = part * V_LANES;
    if (kvs_is_k(type)) {
        const uint8_t *const super = scales + (size_t)(b / KVS_SUPER_BLOCKS) * KVS_SUPER_BYTES;
        const uint8_t *const sc = super + KVS_SUPER_SC + first;
        const size_t sub = b % KVS_SUPER_BLOCKS;
        const vi scale =
            type == KVS_WEIGHT_Q6_K ? vi_s8(sc + (sub * 2 + half) * KVS_PANEL) : vi_u8(sc + sub * KVS_PANEL);
        *d = V(mul_ps)(vf_half(super + first * 2), V(cvtepi32_ps)(scale));
        if (kvs_has_min(type)) {
            const vi pairs = vi_u8_pairs(super + KVS_SUPER_MINS + (sub / 2 * KVS_PANEL + first) * 2);
            const vi min = sub % 2 == 0 ? V_INT(and)(pairs, V(set1_epi32)(0xffff)) : V(srli_epi32)(pairs, 16);
            *m = V(sub_ps)(V(set1_ps)(-0.0f), V(mul_ps)(vf_half(super + 32 + first * 2), V(cvtepi32_ps)(min)));
        }
    } else {
        const size_t at = ((size_t)b * KVS_PANEL + first) * 2;
        *d = vf_half(scales + at);
        if (kvs_has_min(type))
            *m = vf_half(scales + (size_t)(p->n_in / KVS_QBLOCK) * KVS_PANEL * 2 + at);
    }
    if (!kvs_has_min(type))
        *m = V(mul_ps)(*d, V(set1_ps)((float)-kvs_code_above(type)));
}

/* Where code_ps() finds codes 4j .. 4j + 3: as bytes, or of four bits together with those 16 before or after. */
ALWAYS_INLINE vi code_source(const kvs_weight_type type, const uint8_t *codes, const unsigned j)
{
    return kvs_code_bits(type) == 4 ? vi_load(codes + (size_t)(j % 4) * 64) : code_word(type, codes, j);
}

/* Code i of them, in half `half` of the block. A nibble needs no mask in AVX-512: the permute that looks its value up
 * reads four bits of the index. */
ALWAYS_INLINE vf code_ps(const kvs_weight_type type, vi source, const unsigned half, const unsigned i)
{
    const unsigned bits = kvs_code_bits(type) == 4 ? 4 : 8;
    const int by = (int)(bits == 4 ? (2 * i + half) * 4 : i * 8);
    const vi shifted = vi_move_bits(source, by, 0);
#ifdef __AVX512F__
    if (bits == 4)
        return _mm512_permutexvar_ps(shifted, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
#endif
    return V(cvtepi32_ps)(V_INT(and)(shifted, V(set1_epi32)((1 << bits) - 1)));
}

/* Sixteen elements of block b of one part: out[k][KVS_PANEL]. */
ALWAYS_INLINE void widen_half(const kvs_weight_type type, const struct kvs_panels *p, uint32_t b, const unsigned half,
                              const unsigned part, float *out)
{
    const uint8_t *const codes = p->base + b * kvs_panel_code_bytes(type) + part * V_BYTES;
    vf d, m;
    load_scales(type, p, p->base, b, half, part, &d, &m);
#pragma GCC unroll 4
    for (unsigned j = 0; j < 4; j++) {
        const vi source = code_source(type, codes, half * 4 + j);
#pragma GCC unroll 4
        for (unsigned i = 0; i < 4; i++)
            V(store_ps)
        (out + (size_t)(j * 4 + i) * KVS_PANEL + part * V_LANES, V(fmadd_ps)(code_ps(type, source, half, i), d, m));
    }
}

/* One part's element of a dense panel. */
ALWAYS_INLINE vf load_dense(const kvs_weight_type type, const uint8_t *at)
{
    return type == KVS_WEIGHT_F16    ? vf_half(at)
           : type == KVS_WEIGHT_BF16 ? vf_bf16(at)
                                     : V(load_ps)((const float *)(const void *)at);
}

ALWAYS_INLINE void widen_type(const kvs_weight_type type, const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k,
                              float *out)
{
    const size_t dense = kvs_dense_bytes(type);
    if (dense != 0) {
        const uint8_t *at = p->base + (size_t)k_begin * KVS_PANEL * dense;
        for (size_t i = 0; i < (size_t)n_k * KVS_PANEL; i += V_LANES)
            V(store_ps)(out + i, load_dense(type, at + i * dense));
        return;
    }
    for (uint32_t b = k_begin / KVS_QBLOCK; b < (k_begin + n_k) / KVS_QBLOCK; b++)
#pragma GCC unroll 2
        for (unsigned half = 0; half < 2; half++, out += KVS_QBLOCK / 2 * KVS_PANEL)
#pragma GCC unroll 2
            for (unsigned part = 0; part < V_PARTS; part++)
                widen_half(type, p, b, half, part, out);
}

void F32_NAME(widen)(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out)
{
#define WIDEN(type)                                                                                                    \
    case type:                                                                                                         \
        widen_type(type, p, k_begin, n_k, out);                                                                        \
        break;
    switch (p->type) {
        EACH_QUANTISED_TYPE(WIDEN)
        EACH_DENSE_TYPE(WIDEN)
    default:
        break;
    }
#undef WIDEN
}

/* Sums of n_panels panels, each of V_PARTS parts, x n_rows rows. */
#define ACC(i, part, r) acc[((i)*V_PARTS + (part)) * n_rows + (r)]

ALWAYS_INLINE void few_dense(const kvs_weight_type type, const unsigned n_rows, const unsigned n_panels,
                             const struct kvs_panels *p, const uint8_t *panel, const float *x, size_t x_stride, vf *acc)
{
    const size_t part_bytes = V_LANES * kvs_dense_bytes(type), stride_bytes = p->stride_bytes;
    for (size_t k = 0; k < p->n_in; k++, panel += V_PARTS * part_bytes)
#pragma GCC unroll 4
        for (unsigned i = 0; i < n_panels; i++)
#pragma GCC unroll 2
            for (unsigned part = 0; part < V_PARTS; part++) {
                const vf w = load_dense(type, panel + i * stride_bytes + part * part_bytes);
#pragma GCC unroll 4
                for (unsigned r = 0; r < n_rows; r++)
                    ACC(i, part, r) = V(fmadd_ps)(w, V(set1_ps)(x[r * x_stride + k]), ACC(i, part, r));
            }
}

/* Elements 4j .. 4j + 3 of a block; x stands at the block. */
ALWAYS_INLINE void few_word(const kvs_weight_type type, const unsigned n_rows, const unsigned n_panels,
                            const uint8_t *codes, size_t stride_bytes, const vf *d, const vf *m, const unsigned half,
                            const unsigned j, const float *x, size_t x_stride, vf *acc)
{
#pragma GCC unroll 4
    for (unsigned i = 0; i < 4; i++) {
        vf a[KVS_F32_FEW_ROWS];
#pragma GCC unroll 4
        for (unsigned r = 0; r < n_rows; r++)
            a[r] = V(set1_ps)(x[r * x_stride + j * 4 + i]);
#pragma GCC unroll 4
        for (unsigned n = 0; n < n_panels; n++)
#pragma GCC unroll 2
            for (unsigned part = 0; part < V_PARTS; part++) {
                const vi source = code_source(type, codes + n * stride_bytes + part * V_BYTES, j);
                const vf w = V(fmadd_ps)(code_ps(type, source, half, i), d[n * V_PARTS + part], m[n * V_PARTS + part]);
#pragma GCC unroll 4
                for (unsigned r = 0; r < n_rows; r++)
                    ACC(n, part, r) = V(fmadd_ps)(w, a[r], ACC(n, part, r));
            }
    }
}

/* One block, widened in registers. */
ALWAYS_INLINE void few_block(const kvs_weight_type type, const unsigned n_rows, const unsigned n_panels,
                             const struct kvs_panels *p, const uint8_t *panel, size_t stride_bytes, uint32_t b,
                             const float *x, size_t x_stride, vf *acc)
{
    const uint8_t *const codes = panel + b * kvs_panel_code_bytes(type);
    vf d[FEW_PANELS_MAX * V_PARTS], m[FEW_PANELS_MAX * V_PARTS];
#pragma GCC unroll 4
    for (unsigned n = 0; n < n_panels; n++)
#pragma GCC unroll 2
        for (unsigned part = 0; part < V_PARTS; part++)
            load_scales(type, p, panel + n * stride_bytes, b, 0, part, &d[n * V_PARTS + part], &m[n * V_PARTS + part]);
#pragma GCC unroll 2
    for (unsigned half = 0; half < 2; half++)
#pragma GCC unroll 1
        for (unsigned j = half * 4; j < half * 4 + 4; j++)
            few_word(type, n_rows, n_panels, codes, stride_bytes, d, m, half, j, x, x_stride, acc);
}

/* One block of panels of any type, widened into the first-level cache. */
ALWAYS_INLINE void few_widened(const unsigned n_rows, const unsigned n_panels, const struct kvs_panels *p,
                               const uint8_t *panel, uint32_t b, const float *x, size_t x_stride, vf *acc)
{
    _Alignas(KVS_ALIGN) float block[FEW_PANELS_MAX][KVS_QBLOCK * KVS_PANEL];
    struct kvs_panels one = *p;
    for (unsigned n = 0; n < n_panels; n++) {
        one.base = panel + n * p->stride_bytes;
        F32_NAME(widen)(&one, b * KVS_QBLOCK, KVS_QBLOCK, block[n]);
    }
    one.n_in = KVS_QBLOCK;
    one.stride_bytes = sizeof block[0];
    few_dense(KVS_WEIGHT_F32, n_rows, n_panels, &one, (const uint8_t *)block, x, x_stride, acc);
}

/* type: KVS_WEIGHT_OTHER stands for all that have no loop of their own. */
ALWAYS_INLINE void few_panels(const kvs_weight_type type, const unsigned n_rows, const unsigned n_panels,
                              const struct kvs_panels *p, const uint8_t *panel, const float *x, size_t x_stride,
                              float *y, size_t y_stride)
{
    vf acc[FEW_PANELS_MAX * V_PARTS * KVS_F32_FEW_ROWS];
#pragma GCC unroll 16
    for (unsigned i = 0; i < n_panels * V_PARTS * n_rows; i++)
        acc[i] = V(setzero_ps)();
    const size_t stride_bytes = p->stride_bytes;
    if (kvs_dense_bytes(type) != 0)
        few_dense(type, n_rows, n_panels, p, panel, x, x_stride, acc);
    for (uint32_t b = 0; kvs_dense_bytes(type) == 0 && b < p->n_in / KVS_QBLOCK; b++, x += KVS_QBLOCK)
        if (type == KVS_WEIGHT_OTHER)
            few_widened(n_rows, n_panels, p, panel, b, x, x_stride, acc);
        else
            few_block(type, n_rows, n_panels, p, panel, stride_bytes, b, x, x_stride, acc);
#pragma GCC unroll 4
    for (unsigned i = 0; i < n_panels; i++)
#pragma GCC unroll 2
        for (unsigned part = 0; part < V_PARTS; part++)
#pragma GCC unroll 4
            for (unsigned r = 0; r < n_rows; r++)
                V(storeu_ps)(y + r * y_stride + (size_t)i * KVS_PANEL + part * V_LANES, ACC(i, part, r));
}

ALWAYS_INLINE void few_rows(const kvs_weight_type type, const unsigned n_rows, const unsigned step,
                            const struct kvs_panels *p, const float *x, size_t x_stride, float *y, size_t y_stride)
{
    const uint8_t *panel = p->base;
    uint32_t n = 0;
    for (; n + step <= p->n_panels; n += step, panel += step * p->stride_bytes)
        few_panels(type, n_rows, step, p, panel, x, x_stride, y + (size_t)n * KVS_PANEL, y_stride);
    for (; n < p->n_panels; n++, panel += p->stride_bytes)
        few_panels(type, n_rows, 1, p, panel, x, x_stride, y + (size_t)n * KVS_PANEL, y_stride);
}

ALWAYS_INLINE void few_type(const kvs_weight_type type, const struct kvs_panels *p, const float *x, size_t x_stride,
                            uint32_t n_rows, float *y, size_t y_stride)
{
    switch (n_rows) {
    case 1:
        few_rows(type, 1, FEW_PANELS_MAX, p, x, x_stride, y, y_stride);
        break;
    case 2:
        few_rows(type, 2, FEW_PANELS_MAX > 2 ? 2 : 1, p, x, x_stride, y, y_stride);
        break;
    case 3:
        few_rows(type, 3, FEW_PANELS_MAX > 2 ? 2 : 1, p, x, x_stride, y, y_stride);
        break;
    default:
        few_rows(type, 4, FEW_PANELS_MAX > 2 ? 2 : 1, p, x, x_stride, y, y_stride);
    }
}

void F32_NAME(f32_few)(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
                       size_t y_stride)
{
#define FEW(type)                                                                                                      \
    case type:                                                                                                         \
        few_type(type, p, x, x_stride, n_rows, y, y_stride);                                                           \
        break;
    switch (p->type) {
        EACH_DENSE_TYPE(FEW)
        FEW(KVS_WEIGHT_Q4_0)
        FEW(KVS_WEIGHT_Q4_1)
        FEW(KVS_WEIGHT_Q8_0)
    default:
        few_type(KVS_WEIGHT_OTHER, p, x, x_stride, n_rows, y, y_stride);
    }
#undef FEW
}

/* NaN becomes the quiet one that kvs_float_to_bf16() makes. */
ALWAYS_INLINE vf round_bf16(vf v)
{
    const vi bits = (vi)v, odd = V_INT(and)(V(srli_epi32)(bits, 16), V(set1_epi32)(1));
    const vi up = V(add_epi32)(bits, V(add_epi32)(odd, V(set1_epi32)(0x7fff)));
    const vi kept = V_INT(and)(up, V(set1_epi32)((int32_t)0xffff0000u));
    const vi quiet = V_INT(or)(V_INT(and)(bits, V(set1_epi32)((int32_t)0xffff0000u)), V(set1_epi32)(0x400000));
    return vf_select_nan(v, (vf)quiet, (vf)kept);
}

void F32_NAME(round)(kvs_weight_type type, const float *x, uint32_t n, float *y)
{
    uint32_t i = 0;
    for (; i + V_LANES <= n; i += V_LANES) {
        const vf v = V(loadu_ps)(x + i);
        const vf f16 = V(cvtph_ps)(V(cvtps_ph)(v, _MM_FROUND_TO_NEAREST_INT));
        V(storeu_ps)(y + i, type == KVS_WEIGHT_F16 ? f16 : round_bf16(v));
    }
    if (i < n)
        kvs_matmul_kernels_ref.round(type, x + i, n - i, y + i);
}

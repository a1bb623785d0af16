/* Plain C twin of the matrix-product inner loops: the definition the vector variants repeat bit for bit, and the path
 * of machines without AVX2. */
#include "kernels/matmul.h"

#include <math.h>

enum { ROW_TILE = 4 };

static void widen(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out)
{
    const size_t dense = kvs_dense_bytes(p->type), code_bytes = kvs_panel_code_bytes(p->type);
    float d[KVS_PANEL], m[KVS_PANEL];
    for (uint32_t k = k_begin; k < k_begin + n_k; k++)
        for (uint32_t i = 0; i < KVS_PANEL; i++) {
            if (dense != 0) {
                *out++ = kvs_dense_at(p->type, p->base + ((size_t)k * KVS_PANEL + i) * dense);
                continue;
            }
            if (k % KVS_SCALE_ELEMENTS == 0)
                kvs_panel_scales_at(p, p->base, k, i, &d[i], &m[i]);
            const uint8_t *const codes = p->base + k / KVS_QBLOCK * code_bytes + (size_t)i * 4;
            *out++ = fmaf((float)kvs_code_at(p->type, codes, k % KVS_QBLOCK), d[i], m[i]);
        }
}

static void f32_few(const struct kvs_panels *p, const float *x, size_t x_stride, uint32_t n_rows, float *y,
                    size_t y_stride)
{
    struct kvs_panels one = *p;
    for (uint32_t panel = 0; panel < p->n_panels; panel++, one.base += p->stride_bytes, y += KVS_PANEL) {
        float block[KVS_QBLOCK * KVS_PANEL];
        for (uint32_t r = 0; r < n_rows; r++)
            memset(y + r * y_stride, 0, KVS_PANEL * sizeof *y);
        for (uint32_t k0 = 0; k0 < p->n_in; k0 += KVS_QBLOCK) {
            const uint32_t n_k = kvs_min_u32(KVS_QBLOCK, p->n_in - k0);
            const float *w = block;
            if (p->type == KVS_WEIGHT_F32)
                w = (const float *)(const void *)one.base + (size_t)k0 * KVS_PANEL;
            else
                widen(&one, k0, n_k, block);
            for (uint32_t r = 0; r < n_rows; r++)
                for (uint32_t k = 0; k < n_k; k++)
                    for (uint32_t i = 0; i < KVS_PANEL; i++)
                        y[r * y_stride + i] = fmaf(w[k * KVS_PANEL + i], x[r * x_stride + k0 + k], y[r * y_stride + i]);
        }
    }
}

static void f32_tile(const float *w0, const float *w1, const float *x, uint32_t n_k, uint32_t n_rows, const float *from,
                     float *to, size_t to_stride)
{
    for (uint32_t r = 0; r < n_rows; r++, to += to_stride) {
        float acc[2 * KVS_PANEL] = {0};
        if (from != NULL)
            memcpy(acc, from + (size_t)r * 2 * KVS_PANEL, sizeof acc);
        for (uint32_t k = 0; k < n_k; k++)
            for (uint32_t i = 0; i < KVS_PANEL; i++) {
                const float a = x[k * ROW_TILE + r];
                acc[i] = fmaf(w0[(size_t)k * KVS_PANEL + i], a, acc[i]);
                acc[KVS_PANEL + i] = fmaf(w1[(size_t)k * KVS_PANEL + i], a, acc[KVS_PANEL + i]);
            }
        memcpy(to, acc, sizeof acc);
    }
}

/* Nearest even; what no int8 can hold (only from inf or NaN) is -128, as packing with saturation leaves it. */
static int8_t round_code(float v)
{
    return v >= -127.5f && v < 127.5f ? (int8_t)nearbyintf(v) : (int8_t)-128;
}

static void quantise(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row)
{
    for (uint32_t b = 0; b < n_in / KVS_QBLOCK; b++, x += KVS_QBLOCK) {
        float amax = 0.0f;
        for (uint32_t i = 0; i < KVS_QBLOCK; i++)
            amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        const float d = amax / 127.0f;
        /* Below 1e-30 the scale is 0 in f16 whatever the codes; 127 / amax must not overflow. */
        const float id = amax > 1e-30f ? 127.0f / amax : 0.0f;
        int32_t sum = 0;
        for (uint32_t i = 0; i < KVS_QBLOCK; i++) {
            tile[b].q[row][i] = round_code(x[i] * id);
            sum += tile[b].q[row][i];
        }
        tile[b].d[row] = kvs_half_to_float(kvs_float_to_half(d));
        tile[b].s[row] = kvs_half_to_float(kvs_float_to_half(d * (float)sum));
        tile[b].sum[row] = sum;
    }
}

/* First element of the largest magnitude; its magnitude becomes code 127 with the sign turned, as ggml has it. */
static void quantise_super(const float *x, struct kvs_act_block *tile, uint32_t row)
{
    float amax = 0.0f, max = 0.0f;
    for (uint32_t i = 0; i < KVS_SUPER_BLOCKS * KVS_QBLOCK; i++)
        if (fabsf(x[i]) > amax) {
            amax = fabsf(x[i]);
            max = x[i];
        }
    const bool tiny = !(amax > 1e-30f); /* -127 / max must not overflow */
    const float id = tiny ? 0.0f : -127.0f / max, d = tiny ? 0.0f : 1.0f / id;
    for (uint32_t b = 0; b < KVS_SUPER_BLOCKS; b++, x += KVS_QBLOCK) {
        tile[b].d[row] = d;
        tile[b].sum[row] = 0;
        for (uint32_t i = 0; i < KVS_QBLOCK; i++) {
            tile[b].q[row][i] = round_code(x[i] * id);
            tile[b].sum[row] += tile[b].q[row][i];
            if (i == KVS_QBLOCK / 2 - 1)
                tile[b].sum_half[row] = tile[b].sum[row];
        }
    }
    for (uint32_t b = 0; b < KVS_SUPER_BLOCKS; b += 2)
        tile[b].sum_pair[row] = kvs_sum_pair(tile[b].sum[row], tile[b + 1].sum[row]);
}

static void quantise_k(const float *x, uint32_t n_in, struct kvs_act_block *tile, uint32_t row)
{
    for (uint32_t k = 0; k < n_in; k += KVS_SUPER_BLOCKS * KVS_QBLOCK)
        quantise_super(x + k, tile + k / KVS_QBLOCK, row);
}

static void round_acts(kvs_weight_type type, const float *x, uint32_t n, float *y)
{
    for (uint32_t i = 0; i < n; i++)
        y[i] = type == KVS_WEIGHT_F16 ? kvs_half_to_float(kvs_float_to_half(x[i]))
                                      : kvs_bf16_to_float(kvs_float_to_bf16(x[i]));
}

/* Codes k .. k + n of one output times those of a row. */
static int32_t dot(const struct kvs_panels *p, const uint8_t *panel, const struct kvs_act_block *tile, uint32_t r,
                   uint32_t lane, uint32_t k, uint32_t n)
{
    const uint8_t *const codes = panel + k / KVS_QBLOCK * kvs_panel_code_bytes(p->type) + (size_t)lane * 4;
    int32_t sum = 0;
    for (uint32_t i = k; i < k + n; i++)
        sum += ((int32_t)kvs_code_at(p->type, codes, i % KVS_QBLOCK) - kvs_code_above(p->type)) *
               tile[i / KVS_QBLOCK].q[r][i % KVS_QBLOCK];
    return sum;
}

static float super_block(const struct kvs_panels *p, const uint8_t *panel, const struct kvs_act_block *tile, uint32_t r,
                         uint32_t lane, uint32_t super, float acc)
{
    const uint8_t *const s = (const uint8_t *)kvs_panel_scales(p, panel) + (size_t)super * KVS_SUPER_BYTES;
    const uint8_t *const sc = s + KVS_SUPER_SC + lane, *const mins = s + KVS_SUPER_MINS + (size_t)lane * 2;
    const uint32_t block = super * KVS_SUPER_BLOCKS, k = block * KVS_QBLOCK;
    const float dx = tile[block].d[r];
    uint16_t half[2];
    memcpy(&half[0], s + (size_t)lane * 2, 2);
    memcpy(&half[1], s + 32 + (size_t)lane * 2, 2);
    int32_t isum = 0, msum = 0;
    for (uint32_t b = 0; b < 2 * KVS_SUPER_BLOCKS && p->type == KVS_WEIGHT_Q6_K; b++)
        isum += (int8_t)sc[b * KVS_PANEL] * dot(p, panel, tile, r, lane, k + b * 16, 16);
    for (uint32_t b = 0; b < KVS_SUPER_BLOCKS && p->type != KVS_WEIGHT_Q6_K; b++) {
        isum += sc[b * KVS_PANEL] * dot(p, panel, tile, r, lane, k + b * KVS_QBLOCK, KVS_QBLOCK);
        msum += mins[b / 2 * 2 * KVS_PANEL + b % 2] * tile[block + b].sum[r];
    }
    acc = fmaf(kvs_half_to_float(half[0]) * dx, (float)isum, acc);
    return kvs_has_min(p->type) ? fmaf(-(kvs_half_to_float(half[1]) * dx), (float)msum, acc) : acc;
}

static float block(const struct kvs_panels *p, const uint8_t *panel, const struct kvs_act_block *tile, uint32_t r,
                   uint32_t lane, uint32_t b, float acc)
{
    float d, m;
    kvs_panel_scales_at(p, panel, b * KVS_QBLOCK, lane, &d, &m);
    acc = fmaf(d * tile[b].d[r], (float)dot(p, panel, tile, r, lane, b * KVS_QBLOCK, KVS_QBLOCK), acc);
    return kvs_has_min(p->type) ? fmaf(m, tile[b].s[r], acc) : acc;
}

static void native(const struct kvs_panels *p, const struct kvs_act_block *tile, uint32_t n_rows, float *y,
                   size_t y_stride)
{
    const bool is_k = kvs_is_k(p->type);
    const uint32_t n = p->n_in / KVS_QBLOCK / (is_k ? KVS_SUPER_BLOCKS : 1);
    const uint8_t *panel = p->base;
    for (uint32_t i = 0; i < p->n_panels; i++, panel += p->stride_bytes, y += KVS_PANEL)
        for (uint32_t r = 0; r < n_rows; r++)
            for (uint32_t lane = 0; lane < KVS_PANEL; lane++) {
                float acc = 0.0f;
                for (uint32_t b = 0; b < n; b++)
                    acc = is_k ? super_block(p, panel, tile, r, lane, b, acc) : block(p, panel, tile, r, lane, b, acc);
                y[r * y_stride + lane] = acc;
            }
}

const struct kvs_matmul_kernels kvs_matmul_kernels_ref = {ROW_TILE,   f32_few,  widen,      f32_tile,
                                                          round_acts, quantise, quantise_k, native};

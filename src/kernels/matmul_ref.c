/* Plain C twin of the matrix-product inner loops: the definition the vector variants repeat bit for bit, and the path
 * of machines without AVX2. */
#include "kernels/matmul.h"

#include <math.h>

enum { ROW_TILE = 4 };

struct block_scales {
    float d[KVS_PANEL], m[KVS_PANEL];
};

static void load_scales(const struct kvs_panels *p, const uint8_t *panel, uint32_t block, struct block_scales *s)
{
    const uint16_t *d = kvs_panel_scales(p, panel) + (size_t)block * KVS_PANEL;
    const uint16_t *m = d + (size_t)(p->n_in / KVS_QBLOCK) * KVS_PANEL;
    for (uint32_t i = 0; i < KVS_PANEL; i++) {
        s->d[i] = kvs_half_to_float(d[i]);
        s->m[i] = p->type == KVS_WEIGHT_Q4_1   ? kvs_half_to_float(m[i])
                  : p->type == KVS_WEIGHT_Q4_0 ? -8.0f * s->d[i]
                                               : -128.0f * s->d[i];
    }
}

static uint32_t code_at(const struct kvs_panels *p, const uint8_t *panel, uint32_t k, uint32_t lane)
{
    const uint8_t *codes = panel + k / KVS_QBLOCK * kvs_panel_code_bytes(p->type) + lane * 4;
    const uint32_t i = k % KVS_QBLOCK;
    if (p->type == KVS_WEIGHT_Q8_0)
        return codes[i / 4 * 64 + i % 4];
    const uint8_t pair = codes[i % 16 / 4 * 64 + i % 4];
    return i < 16 ? pair & 15u : pair >> 4;
}

static void widen(const struct kvs_panels *p, uint32_t k_begin, uint32_t n_k, float *out)
{
    struct block_scales s;
    for (uint32_t k = k_begin; k < k_begin + n_k; k++) {
        if (k % KVS_QBLOCK == 0)
            load_scales(p, p->base, k / KVS_QBLOCK, &s);
        for (uint32_t i = 0; i < KVS_PANEL; i++)
            *out++ = fmaf((float)code_at(p, p->base, k, i), s.d[i], s.m[i]);
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

static void native(const struct kvs_panels *p, const struct kvs_act_block *tile, uint32_t n_rows, float *y,
                   size_t y_stride)
{
    const int32_t offset = p->type == KVS_WEIGHT_Q8_0 ? 128 : p->type == KVS_WEIGHT_Q4_0 ? 8 : 0;
    const uint8_t *panel = p->base;
    for (uint32_t n = 0; n < p->n_panels; n++, panel += p->stride_bytes, y += KVS_PANEL) {
        for (uint32_t r = 0; r < n_rows; r++)
            memset(y + r * y_stride, 0, KVS_PANEL * sizeof *y);
        for (uint32_t b = 0; b < p->n_in / KVS_QBLOCK; b++) {
            struct block_scales s;
            load_scales(p, panel, b, &s);
            for (uint32_t r = 0; r < n_rows; r++)
                for (uint32_t i = 0; i < KVS_PANEL; i++) {
                    int32_t sum = -offset * tile[b].sum[r];
                    for (uint32_t k = 0; k < KVS_QBLOCK; k++)
                        sum += (int32_t)code_at(p, panel, b * KVS_QBLOCK + k, i) * tile[b].q[r][k];
                    float *acc = y + r * y_stride + i;
                    *acc = fmaf(s.d[i] * tile[b].d[r], (float)sum, *acc);
                    if (p->type == KVS_WEIGHT_Q4_1)
                        *acc = fmaf(s.m[i], tile[b].s[r], *acc);
                }
        }
    }
}

const struct kvs_matmul_kernels kvs_matmul_kernels_ref = {ROW_TILE, f32_few, widen, f32_tile, quantise, native};

/* Packs GGUF rows into panels of 16 interleaved rows (layout: matmul.h) and widens single rows for embeddings. */
#include "kernels/matmul.h"

#include <math.h>

/* ggml's blocks of 32, as they stand in the file: f16 d, for Q4_1 f16 m, then the codes. */
static size_t raw_block_bytes(kvs_weight_type type)
{
    return type == KVS_WEIGHT_Q4_0 ? 18 : type == KVS_WEIGHT_Q4_1 ? 20 : type == KVS_WEIGHT_Q8_0 ? 34 : 0;
}

static size_t raw_row_bytes(kvs_weight_type type, uint32_t n_in)
{
    return type == KVS_WEIGHT_F32 ? (size_t)n_in * sizeof(float) : n_in / KVS_QBLOCK * raw_block_bytes(type);
}

size_t kvs_panel_bytes(kvs_weight_type type, uint32_t n_in)
{
    if (type == KVS_WEIGHT_F32)
        return (size_t)n_in * KVS_PANEL * sizeof(float);
    const size_t scales = type == KVS_WEIGHT_OTHER ? 0 : type == KVS_WEIGHT_Q4_1 ? 2 : 1;
    return kvs_round_up(n_in / KVS_QBLOCK * (kvs_panel_code_bytes(type) + scales * KVS_PANEL * sizeof(uint16_t)),
                        KVS_ALIGN);
}

size_t kvs_weight_packed_bytes(kvs_weight_type type, uint32_t n_out, uint32_t n_in)
{
    return kvs_round_up(n_out, KVS_PANEL) / KVS_PANEL * kvs_panel_bytes(type, n_in);
}

/* One quantised row into lane `lane` of its panel. */
static void pack_row(kvs_weight_type type, uint32_t n_in, const uint8_t *raw, uint8_t *panel, uint32_t lane)
{
    const uint32_t n_blocks = n_in / KVS_QBLOCK;
    const size_t code_bytes = kvs_panel_code_bytes(type), raw_bytes = raw_block_bytes(type);
    const size_t head_bytes = type == KVS_WEIGHT_Q4_1 ? 4 : 2;
    uint8_t *scales = panel + n_blocks * code_bytes;
    for (uint32_t b = 0; b < n_blocks; b++, raw += raw_bytes) {
        memcpy(scales + ((size_t)b * KVS_PANEL + lane) * 2, raw, 2);
        if (type == KVS_WEIGHT_Q4_1)
            memcpy(scales + ((size_t)(n_blocks + b) * KVS_PANEL + lane) * 2, raw + 2, 2);
        for (size_t j = 0; j < code_bytes / 64; j++) {
            uint32_t word;
            memcpy(&word, raw + head_bytes + j * 4, 4);
            if (type == KVS_WEIGHT_Q8_0)
                word ^= 0x80808080u; /* two's complement plus 128 */
            memcpy(panel + b * code_bytes + j * 64 + lane * 4, &word, 4);
        }
    }
}

void kvs_weight_pack(kvs_weight *w, const void *raw, uint32_t row_begin, uint32_t n_rows)
{
    const size_t panel_bytes = kvs_panel_bytes(w->type, w->n_in), row_bytes = raw_row_bytes(w->type, w->n_in);
    for (uint32_t i = 0; i < n_rows; i++) {
        const uint32_t row = row_begin + i, lane = row % KVS_PANEL;
        const uint8_t *src = (const uint8_t *)raw + i * row_bytes;
        uint8_t *panel = (uint8_t *)w->packed + row / KVS_PANEL * panel_bytes;
        if (w->type != KVS_WEIGHT_F32) {
            pack_row(w->type, w->n_in, src, panel, lane);
            continue;
        }
        for (size_t k = 0; k < w->n_in; k++)
            memcpy(panel + (k * KVS_PANEL + lane) * sizeof(float), src + k * sizeof(float), sizeof(float));
    }
}

/* Element k of a block as its unsigned code; codes of one row in a panel stand 64 bytes apart in words of four. */
static uint32_t code_at(kvs_weight_type type, const uint8_t *codes, size_t word_stride, uint32_t k)
{
    if (type == KVS_WEIGHT_Q8_0)
        return codes[k / 4 * word_stride + k % 4];
    const uint32_t i = k % 16;
    const uint8_t pair = codes[i / 4 * word_stride + i % 4];
    return k < 16 ? pair & 15u : pair >> 4;
}

static void row_from_packed(const kvs_weight *w, uint32_t row, float *out)
{
    const struct kvs_panels p = kvs_weight_panels(w, row / KVS_PANEL, 1);
    const uint32_t lane = row % KVS_PANEL, n_blocks = w->n_in / KVS_QBLOCK;
    if (w->type == KVS_WEIGHT_F32) {
        for (size_t k = 0; k < w->n_in; k++)
            memcpy(out + k, p.base + (k * KVS_PANEL + lane) * sizeof(float), sizeof(float));
        return;
    }
    const uint16_t *scales = kvs_panel_scales(&p, p.base);
    const size_t code_bytes = kvs_panel_code_bytes(w->type);
    for (uint32_t b = 0; b < n_blocks; b++) {
        const float d = kvs_half_to_float(scales[(size_t)b * KVS_PANEL + lane]);
        const float m = w->type == KVS_WEIGHT_Q4_1
                            ? kvs_half_to_float(scales[(size_t)(n_blocks + b) * KVS_PANEL + lane])
                        : w->type == KVS_WEIGHT_Q4_0 ? -8.0f * d
                                                     : -128.0f * d;
        for (uint32_t k = 0; k < KVS_QBLOCK; k++)
            out[b * KVS_QBLOCK + k] = fmaf((float)code_at(w->type, p.base + b * code_bytes + lane * 4, 64, k), d, m);
    }
}

static void row_from_raw(const kvs_weight *w, uint32_t row, float *out)
{
    const uint8_t *raw = (const uint8_t *)w->raw + row * w->raw_row_bytes;
    if (w->type == KVS_WEIGHT_F32) {
        memcpy(out, raw, (size_t)w->n_in * sizeof(float));
        return;
    }
    for (uint32_t b = 0; b < w->n_in / KVS_QBLOCK; b++, raw += raw_block_bytes(w->type)) {
        uint16_t half[2];
        memcpy(half, raw, sizeof half);
        const float d = kvs_half_to_float(half[0]);
        const float m = w->type == KVS_WEIGHT_Q4_1 ? kvs_half_to_float(half[1]) : -8.0f * d;
        for (uint32_t k = 0; k < KVS_QBLOCK; k++) {
            float *dst = out + b * KVS_QBLOCK + k;
            if (w->type == KVS_WEIGHT_Q8_0)
                *dst = fmaf((float)(raw[2 + k] ^ 0x80u), d, -128.0f * d);
            else
                *dst = fmaf((float)code_at(w->type, raw + (w->type == KVS_WEIGHT_Q4_1 ? 4 : 2), 4, k), d, m);
        }
    }
}

void kvs_weight_row(const kvs_weight *w, uint32_t row, float *out)
{
    if (w->type == KVS_WEIGHT_OTHER)
        w->to_float((const uint8_t *)w->raw + row * w->raw_row_bytes, out, w->n_in);
    else if (w->packed != NULL)
        row_from_packed(w, row, out);
    else
        row_from_raw(w, row, out);
}

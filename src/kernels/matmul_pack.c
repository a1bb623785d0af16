/* Packs GGUF rows into panels of 16 interleaved rows (layout: matmul_codes.h) and widens single rows for embeddings. */
#include "kernels/matmul.h"

#include <math.h>

enum { UNIT_MAX = KVS_QBLOCK * KVS_SUPER_BLOCKS };

/* Elements that stand together in the file, read out: a block of 32, or a super-block of the K types. */
struct unit {
    uint16_t d, m;          /* f16: scale and minimum, or what those of the sub-blocks are multiplied by */
    uint8_t sc[16];         /* K: of each sub-block of 32 (Q6_K: of 16, signed bytes) */
    uint8_t min[8];         /* Q4_K, Q5_K */
    uint8_t code[UNIT_MAX]; /* unsigned, in order */
};

static uint32_t unit_elements(kvs_weight_type type)
{
    return kvs_is_k(type) ? UNIT_MAX : KVS_QBLOCK;
}

static size_t unit_bytes(kvs_weight_type type)
{
    switch (type) {
    case KVS_WEIGHT_Q4_0:
        return 18;
    case KVS_WEIGHT_Q4_1:
        return 20;
    case KVS_WEIGHT_Q5_0:
        return 22;
    case KVS_WEIGHT_Q5_1:
        return 24;
    case KVS_WEIGHT_Q8_0:
        return 34;
    case KVS_WEIGHT_Q4_K:
        return 144;
    case KVS_WEIGHT_Q5_K:
        return 176;
    case KVS_WEIGHT_Q6_K:
        return 210;
    default:
        return 0;
    }
}

static size_t raw_row_bytes(kvs_weight_type type, uint32_t n_in)
{
    const size_t dense = kvs_dense_bytes(type);
    return dense != 0 ? n_in * dense : n_in / unit_elements(type) * unit_bytes(type);
}

static uint32_t load_word(const uint8_t *at)
{
    uint32_t w;
    memcpy(&w, at, sizeof w);
    return w;
}

static void store_word(uint8_t *at, uint32_t w)
{
    memcpy(at, &w, sizeof w);
}

/* ---- ggml's formats (ggml-common.h) ---- */

/* f16 d, with minima f16 m, of 5 bits a word of high bits, 16 bytes of nibbles: low halves first. Q8_0: 32 signed bytes. */
static void read_block(kvs_weight_type type, const uint8_t *raw, struct unit *u)
{
    const unsigned bits = kvs_code_bits(type);
    memcpy(&u->d, raw, 2);
    raw += 2;
    if (kvs_has_min(type)) {
        memcpy(&u->m, raw, 2);
        raw += 2;
    }
    uint32_t high = 0;
    if (bits == 5) {
        high = load_word(raw);
        raw += 4;
    }
    for (uint32_t j = 0; j < 8; j++) {
        const uint32_t w = load_word(raw + (bits == 8 ? j : j % 4) * 4);
        store_word(u->code + (size_t)j * 4, bits == 8 ? w ^ 0x80808080u : (j < 4 ? w : w >> 4) & 0x0f0f0f0fu);
    }
    for (uint32_t k = 0; bits == 5 && k < KVS_QBLOCK; k++)
        u->code[k] |= (uint8_t)((high >> k & 1u) << 4);
}

/* f16 d, f16 dmin, 12 bytes of 6-bit scales and minima, with 5 bits 32 bytes of high bits, 128 bytes of nibbles: 64
 * elements share 32 bytes, the first half their low nibbles. */
static void read_k45(kvs_weight_type type, const uint8_t *raw, struct unit *u)
{
    memcpy(&u->d, raw, 2);
    memcpy(&u->m, raw + 2, 2);
    const uint8_t *s = raw + 4, *high = raw + 16, *low = raw + (type == KVS_WEIGHT_Q5_K ? 48 : 16);
    for (uint32_t i = 0; i < 4; i++) {
        u->sc[i] = s[i] & 63u;
        u->min[i] = s[i + 4] & 63u;
        u->sc[i + 4] = (uint8_t)((s[i + 8] & 15u) | (unsigned)(s[i] >> 6) << 4);
        u->min[i + 4] = (uint8_t)(s[i + 8] >> 4 | s[i + 4] >> 6 << 4);
    }
    for (uint32_t k = 0; k < UNIT_MAX; k++) {
        const uint32_t at = k / 64 * 32 + k % 32, sub = k / 32;
        uint32_t code = sub % 2 == 0 ? low[at] & 15u : low[at] >> 4;
        if (type == KVS_WEIGHT_Q5_K)
            code |= (high[k % 32] >> sub & 1u) << 4;
        u->code[k] = (uint8_t)code;
    }
}

/* 128 bytes of nibbles, 64 bytes of two high bits, 16 signed scales, f16 d. Elements 32 i + l of each half of 128 have
 * their nibble in byte 32 (i % 2) + l, the low one where i < 2, and bits 2i, 2i + 1 of byte l on top. */
static void read_k6(const uint8_t *raw, struct unit *u)
{
    memcpy(u->sc, raw + 192, 16);
    memcpy(&u->d, raw + 208, 2);
    for (uint32_t k = 0; k < UNIT_MAX; k++) {
        const uint32_t half = k / 128, i = k / 32 % 4, l = k % 32;
        const uint8_t pair = raw[half * 64 + i % 2 * 32 + l], high = raw[128 + half * 32 + l];
        u->code[k] = (uint8_t)((i < 2 ? pair & 15u : pair >> 4) | (high >> (2 * i) & 3u) << 4);
    }
}

static void read_unit(kvs_weight_type type, const uint8_t *raw, struct unit *u)
{
    if (type == KVS_WEIGHT_Q6_K)
        read_k6(raw, u);
    else if (kvs_is_k(type))
        read_k45(type, raw, u);
    else
        read_block(type, raw, u);
}

/* Scale and minimum of the elements around k. */
static void unit_scales(kvs_weight_type type, const struct unit *u, uint32_t k, float *d, float *m)
{
    *d = kvs_half_to_float(u->d);
    if (type == KVS_WEIGHT_Q6_K)
        *d *= (float)(int8_t)u->sc[k / 16];
    else if (kvs_is_k(type))
        *d *= (float)u->sc[k / KVS_QBLOCK];
    *m = -(float)kvs_code_above(type) * *d;
    if (kvs_has_min(type))
        *m = kvs_is_k(type) ? -(kvs_half_to_float(u->m) * (float)u->min[k / KVS_QBLOCK]) : kvs_half_to_float(u->m);
}

/* ---- panels ---- */

size_t kvs_panel_bytes(kvs_weight_type type, uint32_t n_in)
{
    const size_t n_blocks = n_in / KVS_QBLOCK, dense = kvs_dense_bytes(type);
    if (dense != 0)
        return kvs_round_up(n_in * KVS_PANEL * dense, KVS_ALIGN);
    if (kvs_code_bits(type) == 0)
        return 0;
    const size_t scales = kvs_is_k(type) ? n_blocks / KVS_SUPER_BLOCKS * KVS_SUPER_BYTES
                                         : n_blocks * KVS_PANEL * (kvs_has_min(type) ? 4 : 2);
    return kvs_round_up(n_blocks * kvs_panel_code_bytes(type) + scales, KVS_ALIGN);
}

size_t kvs_weight_packed_bytes(kvs_weight_type type, uint32_t n_out, uint32_t n_in)
{
    return kvs_round_up(n_out, KVS_PANEL) / KVS_PANEL * kvs_panel_bytes(type, n_in);
}

/* Scales of unit i of the row in lane `lane`. */
static void pack_scales(kvs_weight_type type, uint32_t n_blocks, const struct unit *u, uint8_t *scales, uint32_t i,
                        uint32_t lane)
{
    if (!kvs_is_k(type)) {
        memcpy(scales + ((size_t)i * KVS_PANEL + lane) * 2, &u->d, 2);
        if (kvs_has_min(type))
            memcpy(scales + ((size_t)(n_blocks + i) * KVS_PANEL + lane) * 2, &u->m, 2);
        return;
    }
    uint8_t *const super = scales + (size_t)i * KVS_SUPER_BYTES;
    memcpy(super + (size_t)lane * 2, &u->d, 2);
    if (type == KVS_WEIGHT_Q6_K) {
        for (uint32_t b = 0; b < 2 * KVS_SUPER_BLOCKS; b++)
            super[KVS_SUPER_SC + b * KVS_PANEL + lane] = u->sc[b];
        return;
    }
    memcpy(super + 32 + (size_t)lane * 2, &u->m, 2);
    for (uint32_t b = 0; b < KVS_SUPER_BLOCKS; b++) {
        super[KVS_SUPER_SC + b * KVS_PANEL + lane] = u->sc[b];
        super[KVS_SUPER_MINS + b / 2 * 2 * KVS_PANEL + lane * 2 + b % 2] = u->min[b];
    }
}

/* Four bytes of one output in each plane of a block; code [32]. */
static void pack_codes(kvs_weight_type type, const uint8_t *code, uint8_t *to)
{
    const unsigned bits = kvs_code_bits(type);
    uint32_t high[2] = {0, 0};
    for (unsigned j = 0; j < 8; j++) {
        const uint32_t w = load_word(code + j * 4);
        if (bits == 8)
            store_word(to + j * 64, w);
        else if (j < 4)
            store_word(to + j * 64, (w & 0x0f0f0f0fu) | (load_word(code + (j + 4) * 4) & 0x0f0f0f0fu) << 4);
        if (bits == 5)
            high[0] |= (w >> 4 & 0x01010101u) << j;
        if (bits == 6)
            high[j / 4] |= (w >> 4 & 0x03030303u) << (j % 4 * 2);
    }
    if (bits == 5 || bits == 6)
        store_word(to + 256, high[0]);
    if (bits == 6)
        store_word(to + 320, high[1]);
}

/* One quantised row into lane `lane` of its panel. */
static void pack_row(kvs_weight_type type, uint32_t n_in, const uint8_t *raw, uint8_t *panel, uint32_t lane)
{
    const uint32_t n_blocks = n_in / KVS_QBLOCK, n_units = n_in / unit_elements(type), per_unit = n_blocks / n_units;
    const size_t code_bytes = kvs_panel_code_bytes(type);
    for (uint32_t i = 0; i < n_units; i++, raw += unit_bytes(type)) {
        struct unit u;
        read_unit(type, raw, &u);
        pack_scales(type, n_blocks, &u, panel + n_blocks * code_bytes, i, lane);
        for (uint32_t b = 0; b < per_unit; b++)
            pack_codes(type, u.code + (size_t)b * KVS_QBLOCK,
                       panel + ((size_t)i * per_unit + b) * code_bytes + (size_t)lane * 4);
    }
}

void kvs_weight_pack(kvs_weight *w, const void *raw, uint32_t row_begin, uint32_t n_rows)
{
    const size_t panel_bytes = kvs_panel_bytes(w->type, w->n_in), row_bytes = raw_row_bytes(w->type, w->n_in);
    const size_t dense = kvs_dense_bytes(w->type);
    for (uint32_t i = 0; i < n_rows; i++) {
        const uint32_t row = row_begin + i, lane = row % KVS_PANEL;
        const uint8_t *src = (const uint8_t *)raw + i * row_bytes;
        uint8_t *panel = (uint8_t *)w->packed + row / KVS_PANEL * panel_bytes;
        if (dense == 0) {
            pack_row(w->type, w->n_in, src, panel, lane);
            continue;
        }
        for (size_t k = 0; k < w->n_in; k++)
            memcpy(panel + (k * KVS_PANEL + lane) * dense, src + k * dense, dense);
    }
}

/* ---- single rows ---- */

static void row_from_raw(const kvs_weight *w, uint32_t row, float *out)
{
    const uint8_t *raw = (const uint8_t *)w->raw + row * w->raw_row_bytes;
    const size_t dense = kvs_dense_bytes(w->type);
    for (size_t k = 0; dense != 0 && k < w->n_in; k++)
        out[k] = kvs_dense_at(w->type, raw + k * dense);
    const uint32_t n = unit_elements(w->type);
    for (uint32_t k0 = 0; dense == 0 && k0 < w->n_in; k0 += n, raw += unit_bytes(w->type)) {
        struct unit u;
        float d, m;
        read_unit(w->type, raw, &u);
        for (uint32_t k = 0; k < n; k++) {
            unit_scales(w->type, &u, k, &d, &m);
            out[k0 + k] = fmaf((float)u.code[k], d, m);
        }
    }
}

static void row_from_packed(const kvs_weight *w, uint32_t row, float *out)
{
    const struct kvs_panels p = kvs_weight_panels(w, row / KVS_PANEL, 1);
    const size_t dense = kvs_dense_bytes(w->type), code_bytes = kvs_panel_code_bytes(w->type);
    const uint32_t lane = row % KVS_PANEL;
    float d = 0, m = 0;
    for (uint32_t k = 0; k < w->n_in; k++) {
        if (dense != 0) {
            out[k] = kvs_dense_at(w->type, p.base + ((size_t)k * KVS_PANEL + lane) * dense);
            continue;
        }
        if (k % KVS_SCALE_ELEMENTS == 0)
            kvs_panel_scales_at(&p, p.base, k, lane, &d, &m);
        const uint8_t *const codes = p.base + k / KVS_QBLOCK * code_bytes + (size_t)lane * 4;
        out[k] = fmaf((float)kvs_code_at(w->type, codes, k % KVS_QBLOCK), d, m);
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

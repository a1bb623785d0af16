/* How a page is laid out, and rotations by table. K stands in tiles of 16 slots, [4][head_dim][16], so that a vector
 * lane is a slot and no score needs a sum across lanes; V is [64][head_dim]. Owns the f16 conversion in plain C too.
 * Who owns pages, live masks and positions is src/cache.
 */
#include "kernels/kernels_impl.h"

/* Rounds to nearest even as VCVTPS2PH does, NaN made quiet. */
uint16_t kvs_f32_to_f16_one(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, mag = bits & 0x7fffffffu;
    if (mag > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | (mag >> 13 & 0x3ffu));
    if (mag >= 0x47800000u) /* 65536 and up; what rounds up to 65536 carries into infinity below */
        return (uint16_t)(sign | 0x7c00u);
    if (mag < 0x38800000u) { /* below 2^-14: adding 0.5 leaves the subnormal's 10 bits, rounded by the FPU */
        float y;
        memcpy(&y, &mag, sizeof y);
        y += 0.5f;
        uint32_t r;
        memcpy(&r, &y, sizeof r);
        return (uint16_t)(sign | (r - 0x3f000000u));
    }
    const uint32_t odd = mag >> 13 & 1u;
    return (uint16_t)(sign | ((mag + 0xfffu + odd - 0x38000000u) >> 13));
}

float kvs_f16_to_f32_one(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 0x1fu, mantissa = h & 0x3ffu;
    uint32_t bits;
    float y;
    if (exponent == 0x1fu) {
        bits = sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0u);
    } else if (exponent == 0) {
        y = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &y, sizeof bits);
        bits |= sign;
    } else {
        bits = sign | (exponent + 112u) << 23 | mantissa << 13;
    }
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* Element d of a key lies at base + d * 16. */
static size_t key_base(uint32_t slot, uint32_t head_dim)
{
    return (size_t)(slot / KVS_TILE_SLOTS) * head_dim * KVS_TILE_SLOTS + slot % KVS_TILE_SLOTS;
}

void kvs_page_write(void *k, void *v, uint32_t slot, const float *key, const float *value, uint32_t head_dim,
                    bool kv_f32)
{
    const size_t kb = key_base(slot, head_dim), vb = (size_t)slot * head_dim;
    if (kv_f32) {
        float *const kf = (float *)k + kb, *const vf = (float *)v + vb;
        for (uint32_t d = 0; d < head_dim; d++)
            kf[(size_t)d * KVS_TILE_SLOTS] = key[d];
        memcpy(vf, value, head_dim * sizeof *vf);
        return;
    }
    uint16_t *const kh = (uint16_t *)k + kb, *const vh = (uint16_t *)v + vb;
    for (uint32_t d = 0; d < head_dim; d++) {
        kh[(size_t)d * KVS_TILE_SLOTS] = kvs_f32_to_f16_one(key[d]);
        vh[d] = kvs_f32_to_f16_one(value[d]);
    }
}

void kvs_page_move(void *k_dst, void *v_dst, uint32_t dst, const void *k_src, const void *v_src, uint32_t src,
                   uint32_t head_dim, bool kv_f32)
{
    const size_t kd = key_base(dst, head_dim), ks = key_base(src, head_dim);
    const size_t vd = (size_t)dst * head_dim, vs = (size_t)src * head_dim;
    if (kv_f32) {
        for (size_t d = 0; d < (size_t)head_dim * KVS_TILE_SLOTS; d += KVS_TILE_SLOTS)
            ((float *)k_dst)[kd + d] = ((const float *)k_src)[ks + d];
        memmove((float *)v_dst + vd, (const float *)v_src + vs, head_dim * sizeof(float));
        return;
    }
    for (size_t d = 0; d < (size_t)head_dim * KVS_TILE_SLOTS; d += KVS_TILE_SLOTS)
        ((uint16_t *)k_dst)[kd + d] = ((const uint16_t *)k_src)[ks + d];
    memmove((uint16_t *)v_dst + vd, (const uint16_t *)v_src + vs, head_dim * sizeof(uint16_t));
}

void kvs_page_read(const void *k, const void *v, uint32_t slot, float *key, float *value, uint32_t head_dim,
                   bool kv_f32)
{
    const size_t kb = key_base(slot, head_dim), vb = (size_t)slot * head_dim;
    for (uint32_t d = 0; key && d < head_dim; d++) {
        const size_t at = kb + (size_t)d * KVS_TILE_SLOTS;
        key[d] = kv_f32 ? ((const float *)k)[at] : kvs_f16_to_f32_one(((const uint16_t *)k)[at]);
    }
    for (uint32_t d = 0; value && d < head_dim; d++)
        value[d] = kv_f32 ? ((const float *)v)[vb + d] : kvs_f16_to_f32_one(((const uint16_t *)v)[vb + d]);
}

void kvs_rope_row(const kvs_rope_table *t, int32_t pos, float *out)
{
    const uint32_t n = t->n_freq;
    const uint64_t dist = pos < 0 ? (uint64_t) - (int64_t)pos : (uint64_t)pos;
    if (dist < t->n_pos) {
        memcpy(out, t->rows + dist * 2 * n, 2 * (size_t)n * sizeof *out);
    } else {
        for (uint32_t i = 0; i < n; i++) {
            out[i] = (float)cos((double)dist * t->theta[i]);
            out[n + i] = (float)sin((double)dist * t->theta[i]);
        }
    }
    for (uint32_t i = 0; pos < 0 && i < n; i++)
        out[n + i] = -out[n + i];
}

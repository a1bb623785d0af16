/* Where the numbers of a weight type stand in a packed panel: all that the loops, the packing and the plain twin have to
 * know about a type. Internal to src/kernels.
 *
 * A panel is 16 outputs. Dense types (f32, f16, bf16) stand as [n_in][16]. Of the quantised ones 32 elements along k are
 * a block, and a panel is first the codes of all blocks, then their scales, padded to 64 bytes.
 *
 * Codes of one block, unsigned, 4, 5, 6 or 8 bits: planes of [16 rows][4 bytes].
 *   8 bits: plane j, byte b is element 4j + b.
 *   less:   planes 0 to 3 hold the low four bits: byte b of plane j has element 4j + b in its low nibble and 16 + 4j + b
 *           in its high one, ggml's own pairing. Of 5 bits one more plane follows: bit j of byte b tops element 4j + b.
 *           Of 6 bits two: bits 2j, 2j + 1 of byte b of the first top element 4j + b, of the second 16 + 4j + b.
 * Scales, blocks of 32: d [n_blocks][16] f16, then with minima m [n_blocks][16] f16.
 * Scales, super-blocks of 256 (K types), KVS_SUPER_BYTES each: d [16] f16, dmin [16] f16 (zero in Q6_K), then
 *   Q4_K, Q5_K: sc [8 blocks][16] u8, mins [4 pairs of blocks][16][2] u8;  Q6_K: sc [16 halves of blocks][16] s8.
 *
 * A weight is fmaf(code, d, m). m is the type's own; or, with K, -(dmin * min); or -above * d for types whose codes are
 * signed in the file. d of a K type is d * sc. All of these are exact in f32. */
#ifndef KVS_MATMUL_CODES_H
#define KVS_MATMUL_CODES_H

#include "kernels/kernels.h"

enum {
    KVS_PANEL = 16,          /* outputs of one panel: one AVX-512 vector of f32 */
    KVS_QBLOCK = 32,         /* weights of one block of codes */
    KVS_SCALE_ELEMENTS = 16, /* the least that share a scale in any type */
    KVS_SUPER_BLOCKS = 8,    /* blocks of a super-block of the K types */
    KVS_SUPER_BYTES = 320,   /* its scales */
    KVS_SUPER_SC = 64,       /* where sc and mins start in them */
    KVS_SUPER_MINS = 192,
};

#define EACH_QUANTISED_TYPE(DO)                                                                                        \
    DO(KVS_WEIGHT_Q4_0)                                                                                                \
    DO(KVS_WEIGHT_Q4_1)                                                                                                \
    DO(KVS_WEIGHT_Q5_0)                                                                                                \
    DO(KVS_WEIGHT_Q5_1)                                                                                                \
    DO(KVS_WEIGHT_Q8_0)                                                                                                \
    DO(KVS_WEIGHT_Q4_K)                                                                                                \
    DO(KVS_WEIGHT_Q5_K)                                                                                                \
    DO(KVS_WEIGHT_Q6_K)
#define EACH_DENSE_TYPE(DO)                                                                                            \
    DO(KVS_WEIGHT_F32)                                                                                                 \
    DO(KVS_WEIGHT_F16)                                                                                                 \
    DO(KVS_WEIGHT_BF16)

/* Bytes of one element of a dense type, 0 for the others. */
static inline size_t kvs_dense_bytes(kvs_weight_type type)
{
    return type == KVS_WEIGHT_F32 ? 4 : type == KVS_WEIGHT_F16 || type == KVS_WEIGHT_BF16 ? 2 : 0;
}

/* Bits of a code, 0 for dense types and KVS_WEIGHT_OTHER. */
static inline unsigned kvs_code_bits(kvs_weight_type type)
{
    switch (type) {
    case KVS_WEIGHT_Q4_0:
    case KVS_WEIGHT_Q4_1:
    case KVS_WEIGHT_Q4_K:
        return 4;
    case KVS_WEIGHT_Q5_0:
    case KVS_WEIGHT_Q5_1:
    case KVS_WEIGHT_Q5_K:
        return 5;
    case KVS_WEIGHT_Q6_K:
        return 6;
    case KVS_WEIGHT_Q8_0:
        return 8;
    default:
        return 0;
    }
}

static inline bool kvs_is_k(kvs_weight_type type)
{
    return type == KVS_WEIGHT_Q4_K || type == KVS_WEIGHT_Q5_K || type == KVS_WEIGHT_Q6_K;
}

/* Whether the file has minima beside the scales. */
static inline bool kvs_has_min(kvs_weight_type type)
{
    return type == KVS_WEIGHT_Q4_1 || type == KVS_WEIGHT_Q5_1 || type == KVS_WEIGHT_Q4_K || type == KVS_WEIGHT_Q5_K;
}

/* How much the codes are above the numbers they stand for. */
static inline int32_t kvs_code_above(kvs_weight_type type)
{
    return kvs_has_min(type) ? 0 : 1 << (kvs_code_bits(type) - 1);
}

/* Bytes of the codes of one block of a panel. */
static inline size_t kvs_panel_code_bytes(kvs_weight_type type)
{
    return (size_t)kvs_code_bits(type) * 64;
}

/* Code k of a block, of the output whose bytes start at codes (panel's block + 4 * lane). */
static inline uint32_t kvs_code_at(kvs_weight_type type, const uint8_t *codes, uint32_t k)
{
    const unsigned bits = kvs_code_bits(type), j = k / 4, b = k % 4;
    if (bits == 8)
        return codes[j * 64 + b];
    uint32_t code = j < 4 ? codes[j * 64 + b] & 15u : codes[(j - 4) * 64 + b] >> 4;
    if (bits == 5)
        code |= (codes[256 + b] >> j & 1u) << 4;
    if (bits == 6)
        code |= (codes[256 + j / 4 * 64 + b] >> (j % 4 * 2) & 3u) << 4;
    return code;
}

#endif

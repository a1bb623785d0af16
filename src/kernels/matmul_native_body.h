/* Integer products of up to KVS_ACT_TILE rows, for every quantised type and x86 instruction set: matmul_avx2.c,
 * matmul_avx512.c and matmul_avx512vnni.c include this, and each gets its own `native`. A type is what matmul_codes.h and
 * code_word() say about it. */
#include "kernels/matmul_simd.h"

enum {
    ROWS_MAX = V_HAS_DOT ? 8 : 4, /* whose sums and accumulators stay in registers */
    SHORT_PAIR_BYTES = 16384,     /* two panels that the first-level cache holds beside the activations */
    AHEAD_BYTES = 2048,
};

/* Codes and scales of one block. */
ALWAYS_INLINE size_t block_bytes(const kvs_weight_type type)
{
    return kvs_panel_code_bytes(type) + (kvs_is_k(type)      ? KVS_SUPER_BYTES / KVS_SUPER_BLOCKS
                                         : kvs_has_min(type) ? KVS_PANEL * 4
                                                             : KVS_PANEL * 2);
}

/* One row is bound by memory, and the hardware prefetchers follow the codes and scales of two panels badly, above all
 * where a panel ends. Short panels are fetched a pair ahead; of long ones that would be too early for the first-level
 * cache, and only their codes are fetched. */
struct ahead {
    const uint8_t *at; /* NULL: nothing to fetch */
    bool pair;         /* the same place of the next pair: scales too */
};

ALWAYS_INLINE void prefetch_block(const kvs_weight_type type, const struct ahead ahead)
{
    const size_t n_bytes = block_bytes(type);
    if (ahead.at == NULL)
        return;
#pragma GCC unroll 10
    for (size_t i = 0; i < n_bytes; i += 64)
        if (i < kvs_panel_code_bytes(type) || ahead.pair)
            _mm_prefetch((const char *)ahead.at + i, _MM_HINT_T0);
}

/* Words of codes whose products with activations, two to a 16-bit lane, add up without leaving 16 bits: at most
 * 2 * 15 * 128 each of 4 bits, 2 * 31 * 128 of 5, 2 * 63 * 128 of 6. Bytes are split in nibbles. */
ALWAYS_INLINE unsigned words_of_16_bits(const kvs_weight_type type)
{
    const unsigned bits = kvs_code_bits(type);
    return bits == 5 ? 4 : bits == 6 ? 2 : 8;
}

/* sums[r]: exact dot products of code words [begin, end) of one block of one part with each row are added. Words are
 * outside and rows inside, so that the rows' chains hide each other's latency; few rows get two chains each instead. */
ALWAYS_INLINE void block_dots(const kvs_weight_type type, const unsigned n_rows, const unsigned begin,
                              const unsigned end, const uint8_t *codes, const struct kvs_act_block *a, uint32_t row,
                              vi *sums)
{
    const bool nibbles = !V_HAS_DOT && kvs_code_bits(type) == 8, pairs = end - begin == 8 && kvs_code_bits(type) < 8;
    const unsigned group = words_of_16_bits(type);
    const vi low = V(set1_epi8)(15), ones = V(set1_epi16)(1);
    vi odd[ROWS_MAX], s16[ROWS_MAX], h16[ROWS_MAX];
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++)
        odd[r] = s16[r] = h16[r] = V_INT(setzero)();
#pragma GCC unroll 8
    for (unsigned i = 0; i < end - begin; i++) {
        const unsigned j = pairs ? i / 2 + i % 2 * 4 : begin + i; /* words that share nibbles one after the other */
        const vi w = code_word(type, codes, j);
        const vi w_low = nibbles ? V_INT(and)(w, low) : w;
        const vi w_high = V_INT(and)(V(srli_epi16)(w, 4), low);
#pragma GCC unroll 8
        for (unsigned r = 0; r < n_rows; r++) {
            const vi q = vi_words(a->q[row + r] + (size_t)j * 4);
            if (V_HAS_DOT) {
                vi *const sum = n_rows > 2 || i % 2 == 0 ? &sums[r] : &odd[r];
                *sum = vi_dot(*sum, w, q);
                continue;
            }
            s16[r] = V(add_epi16)(s16[r], V(maddubs_epi16)(w_low, q));
            if (nibbles)
                h16[r] = V(add_epi16)(h16[r], V(maddubs_epi16)(w_high, q));
            if ((i + 1) % group == 0 || i + 1 == end - begin) {
                sums[r] = V(add_epi32)(sums[r], V(madd_epi16)(s16[r], ones));
                s16[r] = V_INT(setzero)();
            }
        }
    }
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++) {
        if (V_HAS_DOT && n_rows <= 2)
            sums[r] = V(add_epi32)(sums[r], odd[r]);
        if (nibbles)
            sums[r] = V(add_epi32)(sums[r], V(slli_epi32)(V(madd_epi16)(h16[r], ones), 4));
    }
}

/* Of rows beyond the last one anything may come in: no signed overflow. */
static inline int32_t times(int32_t a, int32_t b)
{
    return (int32_t)((uint32_t)a * (uint32_t)b);
}

static inline int32_t minus(int32_t a, int32_t b)
{
    return (int32_t)((uint32_t)a - (uint32_t)b);
}

/* One block of 32 into acc[r]; codes and d stand at the part. */
ALWAYS_INLINE void add_block(const kvs_weight_type type, const unsigned n_rows, const uint8_t *codes, const uint8_t *d,
                             size_t m_offset, const struct ahead ahead, const struct kvs_act_block *a, uint32_t row,
                             vf *acc)
{
    prefetch_block(type, ahead);
    const int32_t above = kvs_code_above(type);
    const vf dv = vf_half(d), mv = kvs_has_min(type) ? vf_half(d + m_offset) : V(setzero_ps)();
    vi sums[ROWS_MAX];
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++)
        sums[r] = above == 0 ? V_INT(setzero)() : V(set1_epi32)(times(-above, a->sum[row + r]));
    block_dots(type, n_rows, 0, 8, codes, a, row, sums);
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++) {
        const vf scale = V(mul_ps)(dv, V(set1_ps)(a->d[row + r]));
        acc[r] = V(fmadd_ps)(scale, V(cvtepi32_ps)(sums[r]), acc[r]);
        if (kvs_has_min(type))
            acc[r] = V(fmadd_ps)(mv, V(set1_ps)(a->s[row + r]), acc[r]);
    }
}

/* One super-block of 256 into acc[r]; codes stand at the part, super is the super-block's scales, first the part's first
 * output. */
ALWAYS_INLINE void add_super(const kvs_weight_type type, const unsigned n_rows, const uint8_t *codes,
                             const uint8_t *super, const uint32_t first, struct ahead ahead,
                             const struct kvs_act_block *a, uint32_t row, vf *acc)
{
    const unsigned n_halves = type == KVS_WEIGHT_Q6_K ? 2 : 1;
    const uint8_t *sc = super + KVS_SUPER_SC + first;
    vi isum[ROWS_MAX];
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++)
        isum[r] = V_INT(setzero)();
#pragma GCC unroll 1
    for (unsigned b = 0; b < KVS_SUPER_BLOCKS; b++, codes += kvs_panel_code_bytes(type)) {
        prefetch_block(type, ahead);
        if (ahead.at != NULL)
            ahead.at += ahead.pair ? block_bytes(type) : kvs_panel_code_bytes(type);
#pragma GCC unroll 2
        for (unsigned half = 0; half < n_halves; half++, sc += KVS_PANEL) {
            const vi scale = type == KVS_WEIGHT_Q6_K ? vi_s8(sc) : vi_u8(sc);
            vi sums[ROWS_MAX];
#pragma GCC unroll 8
            for (unsigned r = 0; r < n_rows; r++) {
                const int32_t first_sum = a[b].sum_half[row + r];
                const int32_t half_sum = half == 0 ? first_sum : minus(a[b].sum[row + r], first_sum);
                sums[r] = n_halves == 2 ? V(set1_epi32)(times(-kvs_code_above(type), half_sum)) : V_INT(setzero)();
            }
            block_dots(type, n_rows, half * 4, n_halves == 1 ? 8 : half * 4 + 4, codes, a + b, row, sums);
#pragma GCC unroll 8
            for (unsigned r = 0; r < n_rows; r++)
                isum[r] = V(add_epi32)(isum[r], V(mullo_epi32)(sums[r], scale));
        }
    }
    const vf dv = vf_half(super + (size_t)first * 2);
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++)
        acc[r] = V(fmadd_ps)(V(mul_ps)(dv, V(set1_ps)(a->d[row + r])), V(cvtepi32_ps)(isum[r]), acc[r]);
    if (!kvs_has_min(type))
        return;
    const vf mv = vf_half(super + 32 + (size_t)first * 2);
    const uint8_t *const mins = super + KVS_SUPER_MINS + (size_t)first * 2;
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++) {
        vi msum = V_INT(setzero)();
#pragma GCC unroll 4
        for (unsigned b = 0; b < KVS_SUPER_BLOCKS; b += 2) {
            const vi pairs = vi_u8_pairs(mins + (size_t)b * KVS_PANEL);
            msum = V(add_epi32)(msum, V(madd_epi16)(pairs, V(set1_epi32)(a[b].sum_pair[row + r])));
        }
        acc[r] = V(fnmadd_ps)(V(mul_ps)(mv, V(set1_ps)(a->d[row + r])), V(cvtepi32_ps)(msum), acc[r]);
    }
}

/* n_panels panels x n_rows rows, n_parts parts of each panel from `part`: several panels or parts hide the latency of the
 * two FMAs of a block when rows are few, and parts side by side read each line once. */
ALWAYS_INLINE void native_rows(const kvs_weight_type type, const unsigned n_rows, const unsigned n_panels,
                               const struct kvs_panels *p, const uint8_t *panel, const unsigned part,
                               const unsigned n_parts, const struct kvs_act_block *a, uint32_t row, uint32_t n_stored,
                               float *y, size_t y_stride)
{
    const uint32_t unit = kvs_is_k(type) ? KVS_SUPER_BLOCKS : 1, n_blocks = p->n_in / KVS_QBLOCK;
    const size_t scale_bytes = kvs_is_k(type) ? KVS_SUPER_BYTES : (size_t)KVS_PANEL * 2;
    const size_t code_bytes = unit * kvs_panel_code_bytes(type), stride_bytes = p->stride_bytes;
    const uint8_t *codes = panel, *scales = (const uint8_t *)kvs_panel_scales(p, panel);
    const bool pair_ahead = n_panels * stride_bytes <= SHORT_PAIR_BYTES;
    vf acc[2][ROWS_MAX];
#pragma GCC unroll 2
    for (unsigned i = 0; i < n_panels * n_parts; i++)
#pragma GCC unroll 8
        for (unsigned r = 0; r < n_rows; r++)
            acc[i][r] = V(setzero_ps)();
    for (uint32_t b = 0; b < n_blocks; b += unit, a += unit, codes += code_bytes, scales += scale_bytes)
#pragma GCC unroll 2
        for (unsigned i = 0; i < n_panels * n_parts; i++) {
            const unsigned n = i / n_parts, first = (part + i % n_parts) * V_LANES;
            const uint8_t *const c = codes + n * stride_bytes, *const s = scales + n * stride_bytes;
            struct ahead ahead = {NULL, pair_ahead};
            if (n_rows == 1 && first == 0)
                ahead.at = pair_ahead ? panel + (n_panels + n) * stride_bytes + b * block_bytes(type) : c + AHEAD_BYTES;
            if (kvs_is_k(type))
                add_super(type, n_rows, c + (size_t)first * 4, s, first, ahead, a, row, acc[i]);
            else
                add_block(type, n_rows, c + (size_t)first * 4, s + (size_t)first * 2, (size_t)n_blocks * KVS_PANEL * 2,
                          ahead, a, row, acc[i]);
        }
        /* NOLINTNEXTLINE(readability-misleading-indentation): a pragma stands at the margin */
#pragma GCC unroll 2
    for (unsigned i = 0; i < n_panels * n_parts; i++)
#pragma GCC unroll 8
        for (unsigned r = 0; r < n_rows; r++)
            if (r < n_stored)
                V(storeu_ps)
    (y + (row + r) * y_stride + (size_t)(i / n_parts) * KVS_PANEL + (part + i % n_parts) * V_LANES, acc[i][r]);
}

/* step panels at a time, the rest one by one. */
ALWAYS_INLINE void native_panels(const kvs_weight_type type, const unsigned n_rows, const unsigned step,
                                 const struct kvs_panels *p, const struct kvs_act_block *a, uint32_t row,
                                 uint32_t n_stored, float *y, size_t y_stride)
{
    const unsigned n_parts = n_rows <= 2 ? (unsigned)V_PARTS : 1;
    const uint8_t *panel = p->base;
    uint32_t n = 0;
    for (; n + step <= p->n_panels; n += step, panel += step * p->stride_bytes)
        for (unsigned part = 0; part < V_PARTS; part += n_parts)
            native_rows(type, n_rows, step, p, panel, part, n_parts, a, row, n_stored, y + (size_t)n * KVS_PANEL,
                        y_stride);
    for (; n < p->n_panels; n++, panel += p->stride_bytes)
        for (unsigned part = 0; part < V_PARTS; part += n_parts)
            native_rows(type, n_rows, 1, p, panel, part, n_parts, a, row, n_stored, y + (size_t)n * KVS_PANEL,
                        y_stride);
}

ALWAYS_INLINE void native_type(const kvs_weight_type type, const struct kvs_panels *p, const struct kvs_act_block *a,
                               uint32_t n_rows, float *y, size_t y_stride)
{
/* Up to `rows` rows as if they were as many: those beyond are read from the tile, where anything may stand, and dropped. */
#define UP_TO(rows, step)                                                                                              \
    if (left <= (rows)) {                                                                                              \
        native_panels(type, rows, step, &some, a, row, left, y, y_stride);                                             \
        continue;                                                                                                      \
    }
    struct kvs_panels some = *p; /* one at a time if rows come in turns */
    some.n_panels = n_rows > ROWS_MAX ? 1 : p->n_panels;
    for (uint32_t n = 0; n < p->n_panels; n += some.n_panels, some.base += p->stride_bytes, y += KVS_PANEL)
        for (uint32_t row = 0; row < n_rows; row += ROWS_MAX) {
            const uint32_t left = kvs_min_u32(n_rows - row, ROWS_MAX);
            UP_TO(1, V_HAS_DOT + 1)
            UP_TO(2, V_HAS_DOT + 1)
            UP_TO(4, 1)
#ifdef __AVX512VNNI__
            UP_TO(6, 1)
            UP_TO(8, 1)
#endif
        }
#undef UP_TO
}

static void native(const struct kvs_panels *p, const struct kvs_act_block *a, uint32_t n_rows, float *y,
                   size_t y_stride)
{
#define NATIVE(type)                                                                                                   \
    case type:                                                                                                         \
        native_type(type, p, a, n_rows, y, y_stride);                                                                  \
        break;
    switch (p->type) {
        EACH_QUANTISED_TYPE(NATIVE)
    default:
        break;
    }
#undef NATIVE
}

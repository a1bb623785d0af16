/* Numeric kernels: products with packed weights, attention over pages, and the elementwise rest. Includes base only.
 *
 * Two rules make every result independent of batch, chunk, thread count and instruction set:
 *  1. One output element is one chain of operations in an order fixed by its own inputs alone (ascending k, ascending
 *     slot), never by how many rows, tiles or threads ran beside it. SIMD lanes are different elements, never parts of
 *     one sum - except where a comment fixes the partial sums (16 of them, folded as a fixed tree) for every ISA.
 *  2. All multiply-adds are fused (fmaf / FMA instructions), and exp, log are our own polynomials written with the same
 *     fused steps in every variant. So AVX2, AVX-512 and the plain twin agree to the last bit, and tests ask for that.
 * The plain twins live in *_ref.c and are also checked against double precision with a derived bound.
 */
#ifndef KVS_KERNELS_H
#define KVS_KERNELS_H

#include "base/base.h"

/* ---- products with a weight matrix ---------------------------------------------------------------------------- */

/* Types with a packed path; everything else runs through ggml's functions in kvs_weight. */
typedef enum kvs_weight_type {
    KVS_WEIGHT_F32 = 0,
    KVS_WEIGHT_Q4_0,
    KVS_WEIGHT_Q4_1,
    KVS_WEIGHT_Q8_0,
    KVS_WEIGHT_F16,
    KVS_WEIGHT_BF16,
    KVS_WEIGHT_Q5_0,
    KVS_WEIGHT_Q5_1,
    KVS_WEIGHT_Q4_K,
    KVS_WEIGHT_Q5_K,
    KVS_WEIGHT_Q6_K,
    KVS_WEIGHT_OTHER,
} kvs_weight_type;

/* y = W x for W [n_out][n_in]. Rows beyond n_out in the last panel of 16 are zero. */
typedef struct kvs_weight {
    kvs_weight_type type;
    uint32_t n_out, n_in; /* n_in is a multiple of the type's block */
    const void *raw;      /* [n_out] rows of raw_row_bytes, the GGUF's own bytes (mmapped); may be NULL once packed */
    size_t raw_row_bytes;
    void *packed; /* panels of 16 rows, see matmul_pack.c; NULL for KVS_WEIGHT_OTHER */
    size_t packed_bytes;
    /* KVS_WEIGHT_OTHER (ggml's type traits): */
    void (*to_float)(const void *x, float *y, int64_t n);
    void (*from_float)(const float *x, void *y, int64_t n); /* activations into the type vec_dot takes */
    void (*vec_dot)(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc);
    size_t act_row_bytes; /* bytes of one activation row in that type */
} kvs_weight;

/* Bytes of the packed form, 0 for types without one. */
size_t kvs_weight_packed_bytes(kvs_weight_type type, uint32_t n_out, uint32_t n_in);
/* Rearranges GGUF rows [row_begin, row_begin + n_rows) into w->packed (already allocated, zeroed): weights of several
 * tensors with equal n_in can thus be packed as one (q, k, v; gate, up). row_begin need not be a multiple of 16. */
void kvs_weight_pack(kvs_weight *w, const void *raw, uint32_t row_begin, uint32_t n_rows);

/* Scratch one call needs, for at most n_rows rows on n_threads threads; the caller allocates it once. */
size_t kvs_matmul_scratch_bytes(const kvs_weight *w, uint32_t n_rows, uint32_t n_threads);

/* y[r][n] = sum over k of W[n][k] x[r][k].
 *   x [n_rows][x_stride] f32, y [n_rows][y_stride] f32, strides in elements; scratch 64-byte aligned
 * f32: acc = fmaf(W[n][k], x[r][k], acc), k ascending, one chain; W widened with one rounding (matmul_codes.h), or to_float.
 * native: what ggml does with the type, in an order of our own. F16 and BF16: x rounded to the type, then the f32 chain.
 * Blocks of 32: x is first quantised a block at a time (q8_0 for Q4_0, Q5_0 and Q8_0: d = f16(amax / 127); q8_1 for Q4_1
 * and Q5_1: s = f16(d * sum q) besides; rounding to nearest even of x / d_unrounded as ggml's AVX2 code does), then per
 * block, ascending: acc = fmaf(dw * dx, (float)sumi, acc) with sumi the exact int32 sum, and with minima then
 * acc = fmaf(mw, sx, acc). K types: x quantised 256 at a time (q8_K: f32 dx), and per super-block, ascending:
 * acc = fmaf(dw * dx, (float)isum, acc), isum = sum over sub-blocks of sc * sumi, and with minima then
 * acc = fmaf(-(dmin * dx), (float)msum, acc), msum = sum of min * (sum of the sub-block's activation codes); both exact
 * in int32. KVS_WEIGHT_F32 is the f32 chain in both. KVS_WEIGHT_OTHER is one vec_dot per element. */
typedef struct kvs_kernels kvs_kernels;
void kvs_matmul_f32(const kvs_kernels *k, kvs_pool *pool, const kvs_weight *w, const float *x, size_t x_stride,
                    float *y, size_t y_stride, uint32_t n_rows, void *scratch);
void kvs_matmul_native(const kvs_kernels *k, kvs_pool *pool, const kvs_weight *w, const float *x, size_t x_stride,
                       float *y, size_t y_stride, uint32_t n_rows, void *scratch);
/* Widens one row of W: out [n_in] f32. For token embeddings. Works from packed or raw. */
void kvs_weight_row(const kvs_weight *w, uint32_t row, float *out);

/* ---- attention over pages --------------------------------------------------------------------------------------- */

enum {
    KVS_PAGE_SLOTS = 64, /* slots of one page: one live mask word */
    KVS_TILE_SLOTS = 16, /* keys stand in tiles of 16 slots, [dim][16]: no horizontal sums, any head size */
};

/* cos and sin of pos * theta_i, correctly rounded to f32 from double: [n_pos][head_dim / 2][2] as two rows of
 * head_dim / 2: first the cosines, then the sines. Negative angles use sin(-x) = -sin(x). */
typedef struct kvs_rope_table {
    const float *rows;      /* [n_pos][2][n_freq] */
    uint32_t n_pos, n_freq; /* n_freq = rotated dims / 2 */
    const double *theta;    /* [n_freq]: angles beyond the table are computed from it, same values */
} kvs_rope_table;

/* One page of one (layer, KV head) as a kernel sees it. K is f16 or f32 [4 tiles][head_dim][16]; V [64][head_dim]. */
typedef struct kvs_page_view {
    const void *k, *v;
    uint64_t live;           /* bit s: slot s counts */
    const int32_t *rope_pos; /* [64] where the key stands now */
    const int32_t *key_rot;  /* [64] the rotation it was written with */
    bool rotated;            /* some live slot has rope_pos != key_rot */
} kvs_page_view;

/* Attention of n_rows consecutive tokens of one session over one KV head, all query heads of its group.
 * Row r attends to the live slots with physical index (page * 64 + slot) < limit0 + r.
 * score = (sum over d ascending, fmaf chain, of q[d] * k'[d]) * scale, where k' is the widened key, rotated by
 * rope_pos - key_rot in pairs (2i, 2i+1) when they differ:  k'[2i] = fmaf(k[2i], c, -(k[2i+1] * s)),
 * k'[2i+1] = fmaf(k[2i], s, k[2i+1] * c).  Dead slots and slots beyond the limit weigh exactly 0.
 * m = max of scores; p = kvs_expf(score - m); l = sum of p and out[d] = sum of p * v[d], fmaf chains over ascending
 * slots; out is divided by l at the end (out * (1 / l)). No live slot: out = 0, lse = -inf. */
typedef struct kvs_attn_job {
    const kvs_page_view *pages;
    uint32_t limit0; /* physical slots row 0 sees; row r sees limit0 + r */
    uint32_t n_rows, group, head_dim;
    bool kv_f32;
    float scale;
    const float *q; /* [n_rows][q_stride]; query head g of the group at g * head_dim */
    size_t q_stride;
    float *out; /* [n_rows][out_stride], same layout */
    size_t out_stride;
    float *m, *l; /* [n_rows][group]: max score, sum of exp; each may be NULL */
    /* NULL, or [n_rows * group][weights_stride], the stride a multiple of 16: p of each physical slot, not yet divided by
     * l, as it is computed on the way to out; what stands at slots that no row attends to means nothing. May be the
     * scores' own rows. Whoever asks what attention looked at reads it here: nothing is computed a second time, and
     * with NULL nothing is stored. */
    float *weights;
    size_t weights_stride;
    const kvs_rope_table *rope;
} kvs_attn_job;

/* Rows one call takes at most, and the scratch bytes a thread needs for a cache of n_slots physical slots. */
enum { KVS_ATTN_ROWS_MAX = 8 };
size_t kvs_attn_scratch_bytes(uint32_t group, uint32_t head_dim, uint32_t n_slots);
/* Where attend keeps its score rows in its scratch, which it needs no more once it has read them: room for job->weights
 * until the scratch is used again. Sets job->weights and job->weights_stride. */
void kvs_attn_weights_in_scratch(kvs_attn_job *job, void *scratch);

/* Tap: the weights of rows [row_begin, n_rows) as probabilities, reduced over the group and the rows into columns.
 *   a = sum over the group's heads, ascending, of p = weight * (1 / l);  rows ascending:
 *   sum[slot] += a;  ema[slot] = fmaf(1 - decay, ema, decay * a) per row;  max[slot] = max(max, p of any head)
 * Slots that the last row does not attend to stay as they are.
 * Arrays are [64] f32 per page, given as pointers per page; each pointer array may be NULL. */
typedef struct kvs_attn_tap {
    uint32_t row_begin;
    float *const *sum, *const *ema, *const *max; /* [n_pages] pointers to [64] */
    float ema_decay;
} kvs_attn_tap;

/* ---- the dispatch table ------------------------------------------------------------------------------------------ */

/* How far two distributions over the vocabulary are apart; natural logarithms, f32 elements, f64 sums in 16 fixed
 * partial sums. */
typedef struct kvs_dist_pair {
    double kl;                   /* sum p ln(p/q) */
    double jsd;                  /* [0, ln 2] */
    double entropy_p;            /* nats */
    double lse_p, lse_q;         /* ln sum exp(logits), so that ln p(x) = logit[x] - lse */
    uint32_t argmax_p, argmax_q; /* lowest index among equals */
} kvs_dist_pair;

/* Elementwise and small kernels; no allocation, any length, any alignment. */
enum {
    KVS_NORM_ROWS = 6, /* rows that product_norm takes at a time; 2, 3 and 6 divide it */
    KVS_NORM_DIM_MAX = 512,
};

struct kvs_kernels {
    uint32_t cpu; /* KVS_CPU_* in force */
    /* y[i] = x[i] * (1 / sqrt(mean(x^2) + eps)) * w[i]; the sum of squares in 16 partial sums (i mod 16), fmaf chains,
     * folded 8+8, 4+4, 2+2, 1+1. */
    void (*rmsnorm)(float *y, const float *x, const float *w, uint32_t n, float eps);
    /* x [n_heads][head_dim] in place, pairs (2i, 2i+1) for i < n_freq; cos_sin = [2][n_freq]. Same formula as k' above. */
    void (*rope)(float *x, uint32_t n_heads, uint32_t head_dim, const float *cos_sin, uint32_t n_freq);
    /* y[i] = (a[i] / (1 + kvs_expf(-a[i]))) * b[i] */
    void (*swiglu)(float *y, const float *a, const float *b, uint32_t n);
    void (*add)(float *y, const float *x, uint32_t n);                 /* y += x */
    void (*exp_scale)(float *x, uint32_t n, float less, float scale);  /* x = kvs_expf(x - less) * scale */
    double (*logsumexp)(const float *x, uint32_t n, uint32_t *argmax); /* argmax may be NULL */
    void (*dist_pair)(kvs_dist_pair *out, const float *p_logits, const float *q_logits, uint32_t n);
    /* norm[i] = sum over r of |y|, y = sum over d of w[r][d] v[i][d]: fmaf chains over ascending d, then a chain over
     * ascending r. w [n_rows][dim], n_rows a multiple of KVS_NORM_ROWS (rows of zeros add nothing), v [n][dim], dim at most
     * KVS_NORM_DIM_MAX. */
    void (*product_norm)(const float *w, uint32_t n_rows, uint32_t dim, const float *v, uint32_t n, float *norm);
    /* f32 <-> IEEE half, round to nearest even */
    void (*f32_to_f16)(uint16_t *y, const float *x, size_t n);
    void (*f16_to_f32)(float *y, const uint16_t *x, size_t n);

    /* Whole attention of one job (n_rows <= KVS_ATTN_ROWS_MAX). */
    void (*attend)(const kvs_attn_job *job, void *scratch);
    /* The same in two phases, so that threads can share one job: scores of physical slots [slot_begin, slot_end)
     * (multiples of 64, or the end) into scores [n_rows * group][score_stride] f32, and each row's max over that
     * range into m_part [n_rows * group]; then the output for dims [dim_begin, dim_end) (multiples of 16 or the end)
     * with m [n_rows * group] the max over all ranges. Phase two exponentiates for itself and leaves scores intact;
     * it writes job->l and job->weights when dim_begin is 0 (into the scores' own rows only where no other call reads
     * them). scratch as for attend. Results equal attend's bit for bit. */
    void (*attend_scores)(const kvs_attn_job *job, uint32_t slot_begin, uint32_t slot_end, float *scores,
                          size_t score_stride, float *m_part);
    void (*attend_output)(const kvs_attn_job *job, const float *scores, size_t score_stride, const float *m,
                          uint32_t dim_begin, uint32_t dim_end, void *scratch);
    /* After attend with l and weights; of scratch only what kvs_attn_weights_in_scratch does not give away is used. */
    void (*attend_tap)(const kvs_attn_job *job, const kvs_attn_tap *tap, void *scratch);

    /* Inner loops of the products; their own contract is in matmul.h. */
    const struct kvs_matmul_kernels *matmul;
};

/* cpu: KVS_CPU_* bits as from kvs_cpu_masked(). The table is constant and shared. */
const kvs_kernels *kvs_kernels_get(uint32_t cpu);

/* Writes one key into a page's tile layout and one value row, converting to f16 if asked. slot in [0, 64). */
void kvs_page_write(void *k, void *v, uint32_t slot, const float *key, const float *value, uint32_t head_dim,
                    bool kv_f32);
/* Copies slot src of one page to slot dst of another (or the same). */
void kvs_page_move(void *k_dst, void *v_dst, uint32_t dst, const void *k_src, const void *v_src, uint32_t src,
                   uint32_t head_dim, bool kv_f32);
/* Reads one key back (unrotated, as written), f32 [head_dim]; value likewise; either may be NULL. */
void kvs_page_read(const void *k, const void *v, uint32_t slot, float *key, float *value, uint32_t head_dim,
                   bool kv_f32);
/* cos/sin row for any pos, from the table or computed: out [2][n_freq]. */
void kvs_rope_row(const kvs_rope_table *t, int32_t pos, float *out);

/* exp(x) for x <= 0 and any x: relative error under 2 ulp, exactly 0 below -87.33 and for -inf, 1 at 0. The scalar
 * definition every vector variant repeats step by step. */
float kvs_expf(float x);

#endif

/* What the files behind kvs_kernels_get() share: constants of the polynomials, the scratch layout of attention, and the
 * functions that fill one instruction set's part of the table. Internal to src/kernels.
 */
#ifndef KVS_KERNELS_IMPL_H
#define KVS_KERNELS_IMPL_H

#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

/* Each overwrites its members of k; called upward from ref, so that what a level lacks stays from below. */
void kvs_vector_fill_ref(kvs_kernels *k);
void kvs_attention_fill_ref(kvs_kernels *k);
void kvs_norm_fill_ref(kvs_kernels *k);
#if defined(__x86_64__)
void kvs_vector_fill_avx2(kvs_kernels *k);
void kvs_attention_fill_avx2(kvs_kernels *k);
void kvs_norm_fill_avx2(kvs_kernels *k);
void kvs_vector_fill_avx512(kvs_kernels *k);
void kvs_attention_fill_avx512(kvs_kernels *k);
void kvs_norm_fill_avx512(kvs_kernels *k);
#elif defined(__aarch64__)
void kvs_vector_fill_neon(kvs_kernels *k);
void kvs_attention_fill_neon(kvs_kernels *k);
void kvs_norm_fill_neon(kvs_kernels *k);
#endif

/* exp: x = n ln 2 + r with |r| <= 0.3466; exp(r) = 1 + r + r^2 q(r), q of degree 4 by weighted least maximum (Lawson's
 * iteration on 400 Chebyshev nodes): relative error 3.1e-9, so that rounding dominates. Adding 1.5 * 2^23 rounds to the
 * nearest integer and leaves it in the low bits. Above MAX the true value is over FLT_MAX; below MIN it is called 0, so
 * that no result is subnormal and 2^n is one addition to the exponent field. */
#define KVS_EXP_MAX    0x1.62e42ep+6f /* 88.72283 */
#define KVS_EXP_MIN    -87.33f
#define KVS_EXP_LOG2E  0x1.715476p+0f
#define KVS_EXP_ROUND  12582912.0f
#define KVS_EXP_LN2_HI 0x1.62e430p-1f
#define KVS_EXP_LN2_LO -0x1.05c610p-29f
#define KVS_EXP_C2     0x1.fffffcp-2f
#define KVS_EXP_C3     0x1.555490p-3f
#define KVS_EXP_C4     0x1.5558f4p-5f
#define KVS_EXP_C5     0x1.123a36p-7f
#define KVS_EXP_C6     0x1.6a23a4p-10f

/* ln x for x > 0: x = 2^e (1 + f), f in [-0.293, 0.415]; ln(1 + f) = f - f^2 / 2 + f^3 g(f), g of degree 7 fitted the
 * same way, relative error 5.9e-9. Zero gives a finite value near -88, which b ln b turns into 0. */
#define KVS_LOG_SQRT_HALF 0x3f3504f3 /* bits of sqrt(1/2) */
#define KVS_LOG_C0        0x1.555554p-2f
#define KVS_LOG_C1        -0x1.000228p-2f
#define KVS_LOG_C2        0x1.99a014p-3f
#define KVS_LOG_C3        -0x1.5471f8p-3f
#define KVS_LOG_C4        0x1.22d8cep-3f
#define KVS_LOG_C5        -0x1.0d86fep-3f
#define KVS_LOG_C6        0x1.056632p-3f
#define KVS_LOG_C7        -0x1.38c7eep-4f

/* h(t) = (1 + t) ln(1 + t) + (1 - t) ln(1 - t) = u (1 + u g(u)) with u = t^2 <= 1/4, g of degree 4, relative error
 * 3e-9. Jensen-Shannon needs it near 0, where the two logarithms cancel. */
#define KVS_JSD_SPLIT 0.5f
#define KVS_JSD_C1    0x1.55559cp-3f
#define KVS_JSD_C2    0x1.10f2cap-4f
#define KVS_JSD_C3    0x1.28baeap-5f
#define KVS_JSD_C4    0x1.2dad32p-6f
#define KVS_JSD_C5    0x1.c0773ap-6f

/* Partial sums of reductions: element i belongs to partial i mod 16. */
enum { KVS_PARTIALS = 16 };

/* Folds 8+8, 4+4, 2+2, 1+1. */
static inline double kvs_fold_f64(double *part)
{
    for (uint32_t n = KVS_PARTIALS / 2; n > 0; n /= 2)
        for (uint32_t i = 0; i < n; i++)
            part[i] += part[i + n];
    return part[0];
}

static inline float kvs_fold_f32(float *part)
{
    for (uint32_t n = KVS_PARTIALS / 2; n > 0; n /= 2)
        for (uint32_t i = 0; i < n; i++)
            part[i] += part[i + n];
    return part[0];
}

/* Sums over a vocabulary that dist_pair needs, the same in every variant. */
typedef struct kvs_dist_sums {
    double sum, dist; /* sum of e = exp(x - max); sum of e * (max - x) */
    float max;
    uint32_t argmax;
} kvs_dist_sums;

/* Where a row without finite logits stands: subtracting an infinite maximum would make NaN of exp(-inf). */
static inline float kvs_max_or_zero(float max)
{
    return max == -INFINITY ? 0.0f : max;
}

static inline double kvs_lse_of(const kvs_dist_sums *s)
{
    return (double)kvs_max_or_zero(s->max) + log(s->sum);
}

/* Parts of attention scratch for one job; all but scores are small. */
typedef struct kvs_attn_scratch {
    float *acc;         /* [n_query][dim_stride] sums of p v */
    float *p;           /* [n_query][64] weights of the page at hand */
    float *v;           /* [64][dim_stride] widened values of the page at hand */
    float *m, *l, *sub; /* [n_query]; sub is m, or 0 where no slot was live */
    float *scores;      /* [n_query][score_stride] */
    size_t score_stride, dim_stride;
} kvs_attn_scratch;

kvs_attn_scratch kvs_attn_scratch_split(const kvs_attn_job *job, void *scratch);
static inline uint32_t kvs_attn_n_slots(const kvs_attn_job *job)
{
    return job->limit0 + job->n_rows - 1;
}

/* Bits of the slots of page that row attends to. */
static inline uint64_t kvs_attn_row_mask(const kvs_attn_job *job, uint32_t page, uint32_t row)
{
    const uint64_t limit = (uint64_t)job->limit0 + row, first = (uint64_t)page * KVS_PAGE_SLOTS;
    if (limit <= first)
        return 0;
    const uint64_t n = limit - first;
    return job->pages[page].live & (n >= KVS_PAGE_SLOTS ? UINT64_MAX : (UINT64_C(1) << n) - 1);
}

/* Rows [first, last) of (row, query head) pairs: their query vectors. */
static inline const float *kvs_attn_query(const kvs_attn_job *job, uint32_t query)
{
    return job->q + (query / job->group) * job->q_stride + (size_t)(query % job->group) * job->head_dim;
}

float kvs_f16_to_f32_one(uint16_t h);
uint16_t kvs_f32_to_f16_one(float x);

#endif

/* Plain twins of the elementwise kernels: what every vector variant must equal to the last bit. Written for reading,
 * not for speed; fmaf stands wherever the variants use an FMA instruction.
 */
#include "kernels/kernels_impl.h"

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

float kvs_expf(float x)
{
    if (x != x)
        return x;
    if (x < KVS_EXP_MIN)
        return 0.0f;
    if (x > KVS_EXP_MAX)
        return INFINITY;
    const float shifted = fmaf(x, KVS_EXP_LOG2E, KVS_EXP_ROUND), n = shifted - KVS_EXP_ROUND;
    const float r = fmaf(n, -KVS_EXP_LN2_LO, fmaf(n, -KVS_EXP_LN2_HI, x));
    float y = fmaf(KVS_EXP_C6, r, KVS_EXP_C5);
    y = fmaf(y, r, KVS_EXP_C4);
    y = fmaf(y, r, KVS_EXP_C3);
    y = fmaf(y, r, KVS_EXP_C2);
    y = fmaf(y, r, 1.0f);
    y = fmaf(y, r, 1.0f);
    return float_of(bits_of(y) + (bits_of(shifted) << 23));
}

static float log_ref(float x)
{
    const uint32_t u = bits_of(x), e = (uint32_t)((int32_t)(u - KVS_LOG_SQRT_HALF) >> 23);
    const float f = float_of(u - (e << 23)) - 1.0f, n = (float)(int32_t)e, f2 = f * f;
    float g = fmaf(KVS_LOG_C7, f, KVS_LOG_C6);
    g = fmaf(g, f, KVS_LOG_C5);
    g = fmaf(g, f, KVS_LOG_C4);
    g = fmaf(g, f, KVS_LOG_C3);
    g = fmaf(g, f, KVS_LOG_C2);
    g = fmaf(g, f, KVS_LOG_C1);
    g = fmaf(g, f, KVS_LOG_C0);
    g = fmaf(g, f, -0.5f);
    g = fmaf(g, f2, n * KVS_EXP_LN2_LO);
    return fmaf(n, KVS_EXP_LN2_HI, f + g);
}

static void rmsnorm_ref(float *y, const float *x, const float *w, uint32_t n, float eps)
{
    float part[KVS_PARTIALS] = {0};
    for (uint32_t i = 0; i < n; i++)
        part[i % KVS_PARTIALS] = fmaf(x[i], x[i], part[i % KVS_PARTIALS]);
    const float inv = 1.0f / sqrtf(kvs_fold_f32(part) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++)
        y[i] = x[i] * inv * w[i];
}

static void rope_ref(float *x, uint32_t n_heads, uint32_t head_dim, const float *cos_sin, uint32_t n_freq)
{
    for (uint32_t h = 0; h < n_heads; h++) {
        for (uint32_t i = 0; i < n_freq; i++) {
            float *const pair = x + (size_t)h * head_dim + 2 * (size_t)i;
            const float a = pair[0], b = pair[1], c = cos_sin[i], s = cos_sin[n_freq + i];
            pair[0] = fmaf(a, c, -(b * s));
            pair[1] = fmaf(a, s, b * c);
        }
    }
}

static void exp_scale_ref(float *x, uint32_t n, float less, float scale)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] = kvs_expf(x[i] - less) * scale;
}

static void swiglu_ref(float *y, const float *a, const float *b, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        y[i] = a[i] / (1.0f + kvs_expf(-a[i])) * b[i];
}

static void add_ref(float *y, const float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        y[i] += x[i];
}

static kvs_dist_sums sums_ref(const float *x, uint32_t n)
{
    kvs_dist_sums s = {.max = -INFINITY};
    for (uint32_t i = 0; i < n; i++) {
        if (x[i] > s.max) {
            s.max = x[i];
            s.argmax = i;
        }
    }
    const float max = kvs_max_or_zero(s.max);
    double sum[KVS_PARTIALS] = {0}, dist[KVS_PARTIALS] = {0};
    for (uint32_t i = 0; i < n; i++) {
        const float e = kvs_expf(x[i] - max);
        sum[i % KVS_PARTIALS] += (double)e;
        dist[i % KVS_PARTIALS] += e == 0.0f ? 0.0 : (double)(e * (max - x[i]));
    }
    s.sum = kvs_fold_f64(sum);
    s.dist = kvs_fold_f64(dist);
    return s;
}

static double logsumexp_ref(const float *x, uint32_t n, uint32_t *argmax)
{
    const kvs_dist_sums s = sums_ref(x, n);
    if (argmax)
        *argmax = s.argmax;
    return kvs_lse_of(&s);
}

/* One element's share of the Jensen-Shannon divergence: (p + q) / 4 * h(t), t = (p - q) / (p + q), which is never
 * negative and exactly 0 where p equals q. */
static float jsd_term_ref(float p, float q)
{
    const float sum = p + q;
    if (sum == 0.0f)
        return 0.0f;
    const float t = (p - q) / sum;
    float h;
    if (fabsf(t) <= KVS_JSD_SPLIT) {
        const float u = t * t;
        float g = fmaf(KVS_JSD_C5, u, KVS_JSD_C4);
        g = fmaf(g, u, KVS_JSD_C3);
        g = fmaf(g, u, KVS_JSD_C2);
        g = fmaf(g, u, KVS_JSD_C1);
        h = fmaf(g, u, 1.0f) * u;
    } else {
        const float lo = q > p ? p : q, hi = q > p ? q : p, a = 2.0f * hi / sum, b = 2.0f * lo / sum;
        h = fmaf(a, log_ref(a), b * log_ref(b));
    }
    return 0.25f * sum * h;
}

static void dist_pair_ref(kvs_dist_pair *out, const float *p_logits, const float *q_logits, uint32_t n)
{
    const kvs_dist_sums ps = sums_ref(p_logits, n), qs = sums_ref(q_logits, n);
    const float p_max = kvs_max_or_zero(ps.max), q_max = kvs_max_or_zero(qs.max);
    const float p_inv = (float)(1.0 / ps.sum), q_inv = (float)(1.0 / qs.sum);
    const double lse_p = kvs_lse_of(&ps), lse_q = kvs_lse_of(&qs);
    const float shift = (float)(lse_p - lse_q);
    double kl[KVS_PARTIALS] = {0}, jsd[KVS_PARTIALS] = {0};
    for (uint32_t i = 0; i < n; i++) {
        const float p = kvs_expf(p_logits[i] - p_max) * p_inv, q = kvs_expf(q_logits[i] - q_max) * q_inv;
        const float log_ratio = p_logits[i] - q_logits[i] - shift;
        kl[i % KVS_PARTIALS] += p == 0.0f ? 0.0 : (double)(p * log_ratio);
        jsd[i % KVS_PARTIALS] += (double)jsd_term_ref(p, q);
    }
    *out = (kvs_dist_pair){.kl = kvs_fold_f64(kl),
                           .jsd = kvs_fold_f64(jsd),
                           .lse_p = lse_p,
                           .lse_q = lse_q,
                           .entropy_p = ps.dist / ps.sum + log(ps.sum),
                           .argmax_p = ps.argmax,
                           .argmax_q = qs.argmax};
}

static void f32_to_f16_ref(uint16_t *y, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = kvs_f32_to_f16_one(x[i]);
}

static void f16_to_f32_ref(float *y, const uint16_t *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = kvs_f16_to_f32_one(x[i]);
}

void kvs_vector_fill_ref(kvs_kernels *k)
{
    k->rmsnorm = rmsnorm_ref;
    k->rope = rope_ref;
    k->swiglu = swiglu_ref;
    k->exp_scale = exp_scale_ref;
    k->add = add_ref;
    k->logsumexp = logsumexp_ref;
    k->dist_pair = dist_pair_ref;
    k->f32_to_f16 = f32_to_f16_ref;
    k->f16_to_f32 = f16_to_f32_ref;
}

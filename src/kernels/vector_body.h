/* The elementwise kernels for one vector width. vector_avx2.c and vector_avx512.c include a simd_*.h first, which says
 * how wide; sums stand in KVS_PARTIALS partial sums whatever the width. Tails go through a padded copy of 16 elements,
 * padded with what leaves the partial sums as they are.
 */

enum { PARTS = KVS_PARTIALS / VF_LANES }; /* vectors that hold the partial sums */

static void rmsnorm(float *y, const float *x, const float *w, uint32_t n, float eps)
{
    vf acc[PARTS];
    for (int h = 0; h < PARTS; h++)
        acc[h] = vf_set1(0.0f);
    const uint32_t n_whole = n / KVS_PARTIALS * KVS_PARTIALS;
    for (uint32_t i = 0; i < n_whole; i += KVS_PARTIALS) {
        for (int h = 0; h < PARTS; h++) {
            const vf v = vf_load(x + i + h * VF_LANES);
            acc[h] = vf_fma(v, v, acc[h]);
        }
    }
    float part[KVS_PARTIALS];
    for (int h = 0; h < PARTS; h++)
        vf_store(part + h * VF_LANES, acc[h]);
    for (uint32_t i = n_whole; i < n; i++)
        part[i - n_whole] = fmaf(x[i], x[i], part[i - n_whole]);
    const float inv = 1.0f / sqrtf(kvs_fold_f32(part) / (float)n + eps);
    uint32_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(y + i, vf_mul(vf_mul(vf_load(x + i), vf_set1(inv)), vf_load(w + i)));
    for (; i < n; i++)
        y[i] = x[i] * inv * w[i];
}

static void rope(float *x, uint32_t n_heads, uint32_t head_dim, const float *cos_sin, uint32_t n_freq)
{
    enum { PAIRS = VF_LANES / 2 };
    const float *const cosines = cos_sin, *const sines = cos_sin + n_freq;
    for (uint32_t h = 0; h < n_heads; h++) {
        float *const head = x + (size_t)h * head_dim;
        uint32_t i = 0;
        for (; i + PAIRS <= n_freq; i += PAIRS) {
            /* Lane 2i: fma(a, c, b * -s); lane 2i + 1: fma(a, s, b * c). Negation is exact. */
            const vf pairs = vf_load(head + 2 * (size_t)i);
            const vf cs = vf_interleave(cosines + i, sines + i), sc = vf_interleave(sines + i, cosines + i);
            const vf sc_signed = vf_select(vm_from_bits(0x5555u), vf_neg(sc), sc);
            vf_store(head + 2 * (size_t)i, vf_fma(vf_dup_even(pairs), cs, vf_mul(vf_dup_odd(pairs), sc_signed)));
        }
        for (; i < n_freq; i++) {
            float *const pair = head + 2 * (size_t)i;
            const float a = pair[0], b = pair[1];
            pair[0] = fmaf(a, cosines[i], -(b * sines[i]));
            pair[1] = fmaf(a, sines[i], b * cosines[i]);
        }
    }
}

static inline vf swiglu_lanes(vf a, vf b)
{
    return vf_mul(vf_div(a, vf_add(vf_set1(1.0f), vf_exp(vf_neg(a)))), b);
}

static void swiglu(float *y, const float *a, const float *b, uint32_t n)
{
    uint32_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(y + i, swiglu_lanes(vf_load(a + i), vf_load(b + i)));
    for (; i < n; i++)
        y[i] = a[i] / (1.0f + kvs_expf(-a[i])) * b[i];
}

static void add(float *y, const float *x, uint32_t n)
{
    uint32_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(y + i, vf_add(vf_load(y + i), vf_load(x + i)));
    for (; i < n; i++)
        y[i] += x[i];
}

static void exp_scale(float *x, uint32_t n, float less, float scale)
{
    uint32_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(x + i, vf_mul(vf_exp(vf_sub(vf_load(x + i), vf_set1(less))), vf_set1(scale)));
    for (; i < n; i++)
        x[i] = kvs_expf(x[i] - less) * scale;
}

/* Up to 16 elements from x, the rest -inf: they weigh exp(-inf) = 0. */
static const float *padded(const float *x, uint32_t i, uint32_t n, float *buf)
{
    if (i + KVS_PARTIALS <= n)
        return x + i;
    for (uint32_t j = 0; j < KVS_PARTIALS; j++)
        buf[j] = i + j < n ? x[i + j] : -INFINITY;
    return buf;
}

/* The largest element and its lowest index. Lanes keep their own first maximum; NaN is passed over. */
static void max_of(const float *x, uint32_t n, kvs_dist_sums *s)
{
    vf best[PARTS], at[PARTS];
    for (int h = 0; h < PARTS; h++) {
        best[h] = vf_set1(-INFINITY);
        at[h] = vf_set1(0.0f);
    }
    float buf[KVS_PARTIALS];
    for (uint32_t i = 0; i < n; i += KVS_PARTIALS) {
        const float *const src = padded(x, i, n, buf);
        for (int h = 0; h < PARTS; h++) {
            const vf v = vf_load(src + h * VF_LANES);
            const vm more = vf_gt(v, best[h]);
            best[h] = vf_select(more, v, best[h]);
            at[h] = vf_select(more, vf_iota(i + (uint32_t)h * VF_LANES), at[h]);
        }
    }
    float bests[KVS_PARTIALS];
    uint32_t ats[KVS_PARTIALS];
    for (int h = 0; h < PARTS; h++) {
        float bits[VF_LANES];
        vf_store(bests + h * VF_LANES, best[h]);
        vf_store(bits, at[h]);
        memcpy(ats + h * VF_LANES, bits, sizeof bits);
    }
    s->max = bests[0];
    s->argmax = ats[0];
    for (int j = 1; j < KVS_PARTIALS; j++) {
        if (bests[j] > s->max || (bests[j] == s->max && ats[j] < s->argmax)) {
            s->max = bests[j];
            s->argmax = ats[j];
        }
    }
}

static double fold(const vd *acc)
{
    double part[KVS_PARTIALS];
    for (int h = 0; h < PARTS; h++)
        vd_store(part + h * VF_LANES, acc[h]);
    return kvs_fold_f64(part);
}

static kvs_dist_sums sums_of(const float *x, uint32_t n)
{
    kvs_dist_sums s = {0};
    max_of(x, n, &s);
    const vf max = vf_set1(kvs_max_or_zero(s.max)), zero = vf_set1(0.0f);
    vd sum[PARTS], dist[PARTS];
    for (int h = 0; h < PARTS; h++)
        sum[h] = dist[h] = vd_zero();
    float buf[KVS_PARTIALS];
    for (uint32_t i = 0; i < n; i += KVS_PARTIALS) {
        const float *const src = padded(x, i, n, buf);
        for (int h = 0; h < PARTS; h++) {
            const vf v = vf_load(src + h * VF_LANES), e = vf_exp(vf_sub(v, max));
            sum[h] = vd_add(sum[h], e);
            dist[h] = vd_add(dist[h], vf_select(vf_eq(e, zero), zero, vf_mul(e, vf_sub(max, v))));
        }
    }
    s.sum = fold(sum);
    s.dist = fold(dist);
    return s;
}

static double logsumexp(const float *x, uint32_t n, uint32_t *argmax)
{
    const kvs_dist_sums s = sums_of(x, n);
    if (argmax)
        *argmax = s.argmax;
    return kvs_lse_of(&s);
}

static inline vf jsd_terms(vf p, vf q)
{
    const vf zero = vf_set1(0.0f), sum = vf_add(p, q), t = vf_div(vf_sub(p, q), sum), u = vf_mul(t, t);
    vf g = vf_fma(vf_set1(KVS_JSD_C5), u, vf_set1(KVS_JSD_C4));
    g = vf_fma(g, u, vf_set1(KVS_JSD_C3));
    g = vf_fma(g, u, vf_set1(KVS_JSD_C2));
    g = vf_fma(g, u, vf_set1(KVS_JSD_C1));
    vf h = vf_mul(vf_fma(g, u, vf_set1(1.0f)), u);
    const vm far = vf_gt(vf_abs(t), vf_set1(KVS_JSD_SPLIT));
    if (vm_any(far)) {
        const vf hi = vf_max(p, q), lo = vf_min(p, q), two = vf_set1(2.0f);
        const vf a = vf_div(vf_mul(two, hi), sum), b = vf_div(vf_mul(two, lo), sum);
        h = vf_select(far, vf_fma(a, vf_log(a), vf_mul(b, vf_log(b))), h);
    }
    return vf_select(vf_eq(sum, zero), zero, vf_mul(vf_mul(vf_set1(0.25f), sum), h));
}

static void dist_pair(kvs_dist_pair *out, const float *p_logits, const float *q_logits, uint32_t n)
{
    const kvs_dist_sums ps = sums_of(p_logits, n), qs = sums_of(q_logits, n);
    const double lse_p = kvs_lse_of(&ps), lse_q = kvs_lse_of(&qs);
    const vf p_max = vf_set1(kvs_max_or_zero(ps.max)), q_max = vf_set1(kvs_max_or_zero(qs.max));
    const vf p_inv = vf_set1((float)(1.0 / ps.sum)), q_inv = vf_set1((float)(1.0 / qs.sum));
    const vf shift = vf_set1((float)(lse_p - lse_q)), zero = vf_set1(0.0f);
    vd kl[PARTS], jsd[PARTS];
    for (int h = 0; h < PARTS; h++)
        kl[h] = jsd[h] = vd_zero();
    float p_buf[KVS_PARTIALS], q_buf[KVS_PARTIALS];
    for (uint32_t i = 0; i < n; i += KVS_PARTIALS) {
        const float *const ps_at = padded(p_logits, i, n, p_buf), *const qs_at = padded(q_logits, i, n, q_buf);
        for (int h = 0; h < PARTS; h++) {
            const vf x = vf_load(ps_at + h * VF_LANES), y = vf_load(qs_at + h * VF_LANES);
            const vf p = vf_mul(vf_exp(vf_sub(x, p_max)), p_inv), q = vf_mul(vf_exp(vf_sub(y, q_max)), q_inv);
            const vf term = vf_mul(p, vf_sub(vf_sub(x, y), shift));
            kl[h] = vd_add(kl[h], vf_select(vf_eq(p, zero), zero, term));
            jsd[h] = vd_add(jsd[h], jsd_terms(p, q));
        }
    }
    *out = (kvs_dist_pair){.kl = fold(kl),
                           .jsd = fold(jsd),
                           .lse_p = lse_p,
                           .lse_q = lse_q,
                           .entropy_p = ps.dist / ps.sum + log(ps.sum),
                           .argmax_p = ps.argmax,
                           .argmax_q = qs.argmax};
}

static void f32_to_f16(uint16_t *y, const float *x, size_t n)
{
    size_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store_f16(y + i, vf_load(x + i));
    for (; i < n; i++)
        y[i] = kvs_f32_to_f16_one(x[i]);
}

static void f16_to_f32(float *y, const uint16_t *x, size_t n)
{
    size_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(y + i, vf_load_f16(x + i));
    for (; i < n; i++)
        y[i] = kvs_f16_to_f32_one(x[i]);
}

void VF_NAME(kvs_vector_fill)(kvs_kernels *k)
{
    k->rmsnorm = rmsnorm;
    k->rope = rope;
    k->swiglu = swiglu;
    k->add = add;
    k->exp_scale = exp_scale;
    k->logsumexp = logsumexp;
    k->dist_pair = dist_pair;
    k->f32_to_f16 = f32_to_f16;
    k->f16_to_f32 = f16_to_f32;
}

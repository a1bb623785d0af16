/* The plain twin of attention over pages, slot by slot as kernels.h words it, and the scratch layout all variants
 * share. Every output element is one chain over ascending slots. A slot of weight 0 leaves a chain as it is, up to the
 * sign of a zero (0 * v may be -0), and that is settled by adding +0 at the end: so where the live slots lie changes no
 * bit.
 */
#include "kernels/kernels_impl.h"

enum { DIM_MAX = 256 };

static size_t small_floats(uint32_t group, uint32_t head_dim)
{
    const size_t n_query = (size_t)KVS_ATTN_ROWS_MAX * group, dims = kvs_round_up(head_dim, 16);
    return n_query * dims + n_query * KVS_PAGE_SLOTS + KVS_PAGE_SLOTS * dims + 3 * kvs_round_up(n_query, 16);
}

size_t kvs_attn_scratch_bytes(uint32_t group, uint32_t head_dim, uint32_t n_slots)
{
    const size_t score_stride = kvs_round_up(n_slots, KVS_TILE_SLOTS);
    return (small_floats(group, head_dim) + KVS_ATTN_ROWS_MAX * (size_t)group * score_stride) * sizeof(float);
}

kvs_attn_scratch kvs_attn_scratch_split(const kvs_attn_job *job, void *scratch)
{
    const size_t n_query = (size_t)KVS_ATTN_ROWS_MAX * job->group, dims = kvs_round_up(job->head_dim, 16);
    kvs_attn_scratch s = {.acc = scratch, .dim_stride = dims};
    s.v = s.acc + n_query * dims;
    s.p = s.v + KVS_PAGE_SLOTS * dims;
    s.m = s.p + n_query * KVS_PAGE_SLOTS;
    s.l = s.m + kvs_round_up(n_query, 16);
    s.sub = s.l + kvs_round_up(n_query, 16);
    s.scores = s.sub + kvs_round_up(n_query, 16);
    s.score_stride = kvs_round_up(kvs_attn_n_slots(job), KVS_TILE_SLOTS);
    return s;
}

void kvs_attn_weights_in_scratch(kvs_attn_job *job, void *scratch)
{
    const kvs_attn_scratch s = kvs_attn_scratch_split(job, scratch);
    job->weights = s.scores;
    job->weights_stride = s.score_stride;
}

/* The key as it stands now: widened, rotated by rope_pos - key_rot. */
static void key_of(const kvs_attn_job *job, const kvs_page_view *page, uint32_t slot, float *key)
{
    kvs_page_read(page->k, NULL, slot, key, NULL, job->head_dim, job->kv_f32);
    const int32_t delta = page->rotated ? page->rope_pos[slot] - page->key_rot[slot] : 0;
    if (!delta)
        return;
    float row[DIM_MAX];
    kvs_rope_row(job->rope, delta, row);
    for (uint32_t i = 0; i < job->rope->n_freq; i++) {
        const float a = key[2 * i], b = key[2 * i + 1], c = row[i], s = row[job->rope->n_freq + i];
        key[2 * i] = fmaf(a, c, -(b * s));
        key[2 * i + 1] = fmaf(a, s, b * c);
    }
}

static void attend_scores_ref(const kvs_attn_job *job, uint32_t slot_begin, uint32_t slot_end, float *scores,
                              size_t score_stride, float *m_part)
{
    const uint32_t n_query = job->n_rows * job->group;
    const uint32_t end = (uint32_t)kvs_round_up(kvs_min_u32(slot_end, kvs_attn_n_slots(job)), KVS_TILE_SLOTS);
    for (uint32_t j = 0; j < n_query; j++)
        m_part[j] = -INFINITY;
    for (uint32_t slot = slot_begin; slot < end; slot++) {
        const uint32_t page = slot / KVS_PAGE_SLOTS, s = slot % KVS_PAGE_SLOTS;
        float key[DIM_MAX] = {0};
        if (job->pages[page].live >> s & 1u)
            key_of(job, &job->pages[page], s, key);
        for (uint32_t j = 0; j < n_query; j++) {
            float score = -INFINITY;
            if (kvs_attn_row_mask(job, page, j / job->group) >> s & 1u) {
                const float *const q = kvs_attn_query(job, j);
                float acc = 0.0f;
                for (uint32_t d = 0; d < job->head_dim; d++)
                    acc = fmaf(q[d], key[d], acc);
                score = acc * job->scale;
            }
            scores[j * score_stride + slot] = score;
            if (score > m_part[j])
                m_part[j] = score;
        }
    }
    for (uint32_t j = 0; j < n_query; j++)
        m_part[j] += 0.0f;
}

static void attend_output_ref(const kvs_attn_job *job, const float *scores, size_t score_stride, const float *m,
                              uint32_t dim_begin, uint32_t dim_end, void *scratch)
{
    const kvs_attn_scratch sc = kvs_attn_scratch_split(job, scratch);
    const uint32_t n_query = job->n_rows * job->group, n_slots = kvs_attn_n_slots(job);
    memset(sc.acc, 0, n_query * sc.dim_stride * sizeof *sc.acc);
    memset(sc.l, 0, n_query * sizeof *sc.l);
    for (uint32_t slot = 0; slot < n_slots; slot++) {
        const kvs_page_view *const page = &job->pages[slot / KVS_PAGE_SLOTS];
        if (!(page->live >> slot % KVS_PAGE_SLOTS & 1u))
            continue;
        float value[DIM_MAX];
        kvs_page_read(NULL, page->v, slot % KVS_PAGE_SLOTS, NULL, value, job->head_dim, job->kv_f32);
        for (uint32_t j = 0; j < n_query; j++) {
            const float p = kvs_expf(scores[j * score_stride + slot] - kvs_max_or_zero(m[j]));
            float *const acc = sc.acc + j * sc.dim_stride;
            if (job->weights && dim_begin == 0)
                job->weights[j * job->weights_stride + slot] = p;
            sc.l[j] += p;
            for (uint32_t d = dim_begin; d < dim_end; d++)
                acc[d] = fmaf(p, value[d], acc[d]);
        }
    }
    for (uint32_t j = 0; j < n_query; j++) {
        float *const out = job->out + (j / job->group) * job->out_stride + (size_t)(j % job->group) * job->head_dim;
        const float inv = sc.l[j] == 0.0f ? 0.0f : 1.0f / sc.l[j];
        for (uint32_t d = dim_begin; d < dim_end; d++)
            out[d] = sc.acc[j * sc.dim_stride + d] * inv + 0.0f;
        if (job->l && dim_begin == 0)
            job->l[j] = sc.l[j];
    }
}

static void attend_ref(const kvs_attn_job *job, void *scratch)
{
    const kvs_attn_scratch sc = kvs_attn_scratch_split(job, scratch);
    attend_scores_ref(job, 0, kvs_attn_n_slots(job), sc.scores, sc.score_stride, sc.m);
    attend_output_ref(job, sc.scores, sc.score_stride, sc.m, 0, job->head_dim, scratch);
    if (job->m)
        memcpy(job->m, sc.m, (size_t)job->n_rows * job->group * sizeof *job->m);
}

static void tap_row_ref(const kvs_attn_job *job, const kvs_attn_tap *tap, uint32_t row)
{
    const float keep = 1.0f - tap->ema_decay;
    for (uint32_t slot = 0; slot < kvs_attn_n_slots(job); slot++) {
        const uint32_t page = slot / KVS_PAGE_SLOTS, s = slot % KVS_PAGE_SLOTS;
        if (!(kvs_attn_row_mask(job, page, job->n_rows - 1) >> s & 1u))
            continue;
        float a = 0.0f;
        for (uint32_t j = row * job->group; j < (row + 1) * job->group; j++) {
            const float inv = job->l[j] == 0.0f ? 0.0f : 1.0f / job->l[j];
            const float p = job->weights[j * job->weights_stride + slot] * inv;
            a += p;
            if (tap->max && p > tap->max[page][s])
                tap->max[page][s] = p;
        }
        if (tap->sum)
            tap->sum[page][s] += a;
        if (tap->ema)
            tap->ema[page][s] = fmaf(keep, tap->ema[page][s], tap->ema_decay * a);
    }
}

static void attend_tap_ref(const kvs_attn_job *job, const kvs_attn_tap *tap, void *scratch)
{
    (void)scratch;
    for (uint32_t row = tap->row_begin; row < job->n_rows; row++)
        tap_row_ref(job, tap, row);
}

void kvs_attention_fill_ref(kvs_kernels *k)
{
    k->attend = attend_ref;
    k->attend_scores = attend_scores_ref;
    k->attend_output = attend_output_ref;
    k->attend_tap = attend_tap_ref;
}

/* Attention over pages: every instruction set equals the plain twin bit for bit, the plain twin stands within derived
 * bounds of double precision, and neither where slots lie nor how the work is cut changes a bit.
 */
#include "kernels/kernels.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define EPS (FLT_EPSILON / 2.0)

enum { N_POS = 300, SLOTS_MAX = 448, PAGES_MAX = SLOTS_MAX / KVS_PAGE_SLOTS, QUERY_MAX = KVS_ATTN_ROWS_MAX * 16 };

static const uint32_t masks[] = {0, KVS_CPU_AVX2, KVS_CPU_AVX2 | KVS_CPU_AVX512, KVS_CPU_NEON};
static const uint32_t *const levels = masks + 1; /* beside the plain twins */
enum { N_MASKS = sizeof masks / sizeof masks[0], N_LEVELS = N_MASKS - 1 };

typedef enum rotation { ROT_NONE, ROT_PAGE, ROT_SLOT, ROT_FAR } rotation;

/* One cache with its queries; everything a job points at. */
typedef struct fixture {
    kvs_attn_job job;
    kvs_page_view pages[PAGES_MAX];
    int32_t rope_pos[PAGES_MAX][KVS_PAGE_SLOTS], key_rot[PAGES_MAX][KVS_PAGE_SLOTS];
    void *k[PAGES_MAX], *v[PAGES_MAX];
    float *q, *out, *scores, m[QUERY_MAX], l[QUERY_MAX];
    kvs_rope_table rope;
    double theta[128];
    void *scratch;
    uint32_t n_slots, n_pages;
} fixture;

static void *zeroed(size_t n_bytes)
{
    void *const p = kvs_alloc(kvs_allocator_default(), 1, n_bytes);
    assert_non_null(p);
    return p;
}

static float uniform(kvs_rng *rng)
{
    return 2.0f * (float)kvs_rng_double(rng) - 1.0f;
}

static void rope_init(fixture *f, uint32_t n_freq)
{
    float *const rows = zeroed((size_t)N_POS * 2 * (n_freq + 1) * sizeof *rows);
    for (uint32_t i = 0; i < n_freq; i++) {
        f->theta[i] = pow(1e4, -(double)i / n_freq);
        for (uint32_t pos = 0; pos < N_POS; pos++) {
            rows[(size_t)pos * 2 * n_freq + i] = (float)cos(pos * f->theta[i]);
            rows[(size_t)pos * 2 * n_freq + n_freq + i] = (float)sin(pos * f->theta[i]);
        }
    }
    f->rope = (kvs_rope_table){.rows = rows, .n_pos = N_POS, .n_freq = n_freq, .theta = f->theta};
}

static int32_t random_delta(kvs_rng *rng, rotation rot)
{
    const int32_t span = rot == ROT_FAR ? 5000 : N_POS - 1;
    return (int32_t)kvs_rng_below(rng, (uint32_t)(2 * span + 1)) - span;
}

static void fixture_init(fixture *f, kvs_rng *rng, uint32_t head_dim, uint32_t group, uint32_t rows, uint32_t limit0,
                         bool kv_f32, rotation rot, double live_share, float key_scale)
{
    memset(f, 0, sizeof *f);
    const uint32_t n_query = rows * group, extra = kvs_rng_below(rng, 4);
    f->n_slots = limit0 + rows - 1;
    f->n_pages = (f->n_slots + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
    rope_init(f, rot == ROT_NONE ? 0 : kvs_max_u32(head_dim / 2, 1) - (head_dim > 8 ? kvs_rng_below(rng, 3) : 0));
    float key[256], value[256];
    for (uint32_t page = 0; page < f->n_pages; page++) {
        f->k[page] = zeroed((size_t)KVS_PAGE_SLOTS * head_dim * 4);
        f->v[page] = zeroed((size_t)KVS_PAGE_SLOTS * head_dim * 4);
        uint64_t live = 0;
        const int32_t page_delta = random_delta(rng, rot);
        for (uint32_t s = 0; s < KVS_PAGE_SLOTS; s++) {
            for (uint32_t d = 0; d < head_dim; d++) {
                key[d] = uniform(rng) * key_scale;
                value[d] = uniform(rng) * 3.0f;
            }
            kvs_page_write(f->k[page], f->v[page], s, key, value, head_dim, kv_f32);
            live |= (uint64_t)(kvs_rng_double(rng) < live_share) << s;
            f->key_rot[page][s] = (int32_t)kvs_rng_below(rng, 1000);
            const int32_t delta = rot == ROT_PAGE ? page_delta : random_delta(rng, rot) * (int32_t)(s % 3 != 0);
            f->rope_pos[page][s] = f->key_rot[page][s] + (rot == ROT_NONE ? 0 : delta);
        }
        if (live_share < 1.0 && kvs_rng_below(rng, 4) == 0)
            live &= kvs_rng_next(rng) & 1 ? UINT64_C(0xffff0000) : 0; /* whole tiles or the page dead */
        f->pages[page] = (kvs_page_view){.k = f->k[page],
                                         .v = f->v[page],
                                         .live = live,
                                         .rope_pos = f->rope_pos[page],
                                         .key_rot = f->key_rot[page],
                                         .rotated = rot != ROT_NONE};
    }
    const size_t stride = (size_t)group * head_dim + extra;
    f->q = zeroed(rows * stride * sizeof *f->q);
    f->out = zeroed(rows * stride * sizeof *f->out);
    for (size_t i = 0; i < rows * stride; i++)
        f->q[i] = uniform(rng);
    f->scores = zeroed((size_t)n_query * (SLOTS_MAX + 16) * sizeof *f->scores);
    f->scratch = zeroed(kvs_attn_scratch_bytes(group, head_dim, f->n_slots));
    f->job = (kvs_attn_job){.pages = f->pages,
                            .limit0 = limit0,
                            .n_rows = rows,
                            .group = group,
                            .head_dim = head_dim,
                            .kv_f32 = kv_f32,
                            .scale = 1.0f / sqrtf((float)head_dim),
                            .q = f->q,
                            .q_stride = stride,
                            .out = f->out,
                            .out_stride = stride,
                            .m = f->m,
                            .l = f->l,
                            .rope = &f->rope};
}

static void fixture_free(fixture *f)
{
    const kvs_allocator *const a = kvs_allocator_default();
    for (uint32_t page = 0; page < f->n_pages; page++) {
        kvs_free(a, f->k[page]);
        kvs_free(a, f->v[page]);
    }
    void *const rows = (void *)(uintptr_t)f->rope.rows;
    kvs_free(a, rows), kvs_free(a, f->q), kvs_free(a, f->out), kvs_free(a, f->scores), kvs_free(a, f->scratch);
}

typedef struct answer {
    float *out, m[QUERY_MAX], l[QUERY_MAX];
    size_t n_out;
} answer;

static answer answer_take(const fixture *f)
{
    answer a = {.n_out = f->job.n_rows * f->job.out_stride};
    a.out = zeroed(a.n_out * sizeof *a.out);
    memcpy(a.out, f->out, a.n_out * sizeof *a.out);
    memcpy(a.m, f->m, sizeof a.m);
    memcpy(a.l, f->l, sizeof a.l);
    memset(f->out, 0, a.n_out * sizeof *f->out);
    return a;
}

static void answer_free(answer *a)
{
    kvs_free(kvs_allocator_default(), a->out);
}

/* Bits equal; and a score row's maximum, sum and every output. */
static void assert_same(const answer *a, const answer *b, uint32_t n_query)
{
    assert_int_equal(a->n_out, b->n_out);
    for (size_t i = 0; i < a->n_out; i++)
        if (memcmp(&a->out[i], &b->out[i], sizeof(float)) != 0)
            fail_msg("out[%zu]: %a is not %a", i, (double)a->out[i], (double)b->out[i]);
    assert_memory_equal(a->m, b->m, n_query * sizeof(float));
    assert_memory_equal(a->l, b->l, n_query * sizeof(float));
}

static answer attend_with(const kvs_kernels *k, fixture *f)
{
    memset(f->scratch, 0xff,
           kvs_attn_scratch_bytes(f->job.group, f->job.head_dim, f->n_slots)); /* NaN: a stale read shows */
    k->attend(&f->job, f->scratch);
    return answer_take(f);
}

/* Three pieces of slots, then two of dims, as two threads would. */
static answer two_phases_with(const kvs_kernels *k, fixture *f)
{
    const uint32_t n_query = f->job.n_rows * f->job.group, dims = f->job.head_dim, cut = dims > 16 ? dims / 32 * 16 : 0;
    const size_t stride = kvs_round_up(f->n_slots, 16) + 16;
    float part[QUERY_MAX], m[QUERY_MAX];
    memset(f->scores, 0xff, (size_t)n_query * (SLOTS_MAX + 16) * sizeof *f->scores);
    for (uint32_t j = 0; j < n_query; j++)
        m[j] = -INFINITY;
    for (uint32_t begin = 0; begin < f->n_slots; begin += 128) {
        k->attend_scores(&f->job, begin, kvs_min_u32(begin + 128, f->n_slots), f->scores, stride, part);
        for (uint32_t j = 0; j < n_query; j++)
            m[j] = part[j] > m[j] ? part[j] : m[j];
    }
    memset(f->scratch, 0xff, kvs_attn_scratch_bytes(f->job.group, dims, f->n_slots));
    if (cut)
        k->attend_output(&f->job, f->scores, stride, m, cut, dims, f->scratch);
    k->attend_output(&f->job, f->scores, stride, m, 0, cut ? cut : dims, f->scratch);
    memcpy(f->m, m, n_query * sizeof *m);
    return answer_take(f);
}

/* Double precision, with the error bound of each output beside it.
 * A score is a chain of d + 1 roundings over sum |q k|: es = (d + 2) EPS scale sum |q k|, rotation adding 4 EPS a term
 * (two roundings and a rounded cosine and sine, on sqrt 2 the size). A weight exp(s - m) is then off by e^(2 es) and
 * (|s - m| + 4) EPS relative; the sums of n weights by n EPS more; 3 for the division. */
static void check_double(const fixture *f, const answer *a)
{
    const kvs_attn_job *const job = &f->job;
    for (uint32_t j = 0; j < job->n_rows * job->group; j++) {
        const float *const q = f->q + j / job->group * job->q_stride + (size_t)(j % job->group) * job->head_dim;
        double score[SLOTS_MAX], error = 0, m = -INFINITY, low = INFINITY, sum = 0, out[256] = {0}, mag[256] = {0};
        for (uint32_t slot = 0; slot < f->n_slots; slot++) {
            const uint32_t page = slot / KVS_PAGE_SLOTS, s = slot % KVS_PAGE_SLOTS;
            score[slot] = -INFINITY;
            if (!(f->pages[page].live >> s & 1) || slot >= job->limit0 + j / job->group)
                continue;
            float key[256];
            double dot = 0, abs_dot = 0;
            kvs_page_read(f->k[page], NULL, s, key, NULL, job->head_dim, job->kv_f32);
            const double delta = (double)f->rope_pos[page][s] - (double)f->key_rot[page][s];
            for (uint32_t d = 0; d < job->head_dim; d++) {
                double x = (double)key[d];
                double size = fabs(x);
                if (d / 2 < f->rope.n_freq && f->pages[page].rotated) {
                    const double c = cos(delta * f->theta[d / 2]), sn = sin(delta * f->theta[d / 2]);
                    const double even = (double)key[d & ~1u], odd = (double)key[d | 1u];
                    x = d % 2 ? even * sn + odd * c : even * c - odd * sn;
                    size = fabs(even) + fabs(odd);
                }
                dot += (double)q[d] * x;
                abs_dot += fabs((double)q[d]) * size;
            }
            score[slot] = dot * (double)job->scale;
            error = fmax(error, (job->head_dim + 6) * EPS * abs_dot * (double)job->scale);
            m = fmax(m, score[slot]);
            low = fmin(low, score[slot]);
        }
        for (uint32_t slot = 0; slot < f->n_slots; slot++) {
            if (score[slot] == -INFINITY)
                continue;
            float value[256];
            kvs_page_read(NULL, f->v[slot / 64], slot % 64, NULL, value, job->head_dim, job->kv_f32);
            const double p = exp(score[slot] - m);
            sum += p;
            for (uint32_t d = 0; d < job->head_dim; d++) {
                out[d] += p * (double)value[d];
                mag[d] += p * fabs((double)value[d]);
            }
        }
        const double spread = fmin(m - low, 90);
        const double rel = sum > 0 ? 2 * (expm1(2 * error) + (spread + 4 + f->n_slots + 3) * EPS) : 0;
        const float *const got = a->out + j / job->group * job->out_stride + (size_t)(j % job->group) * job->head_dim;
        for (uint32_t d = 0; d < job->head_dim; d++) {
            const double want = sum > 0 ? out[d] / sum : 0,
                         bound = sum > 0 ? rel * mag[d] / sum + f->n_slots * 1e-37 : 0;
            if (!(fabs((double)got[d] - want) <= bound))
                fail_msg("query %u dim %u: %g, double says %g +- %g", j, d, (double)got[d], want, bound);
        }
        if (sum > 0)
            assert_true(fabs((double)a->l[j] - sum) <= rel * sum && fabs((double)a->m[j] - m) <= error);
        else
            assert_true(a->l[j] == 0.0f && a->m[j] == -INFINITY);
    }
}

static void check_all(fixture *f)
{
    const uint32_t n_query = f->job.n_rows * f->job.group;
    const kvs_kernels *const ref = kvs_kernels_get(0);
    answer want = attend_with(ref, f);
    check_double(f, &want);
    answer phases = two_phases_with(ref, f);
    assert_same(&phases, &want, n_query);
    answer_free(&phases);
    for (size_t i = 0; i < N_LEVELS; i++) {
        if ((kvs_cpu_flags() & levels[i]) != levels[i])
            continue;
        answer got = attend_with(kvs_kernels_get(levels[i]), f);
        assert_same(&got, &want, n_query);
        answer_free(&got);
        got = two_phases_with(kvs_kernels_get(levels[i]), f);
        assert_same(&got, &want, n_query);
        answer_free(&got);
    }
    answer_free(&want);
}

static void a_shape_differs_between_instruction_sets_or_from_double(void **state)
{
    (void)state;
    const uint32_t dims[] = {1, 3, 16, 31, 64, 80, 128}, groups[] = {1, 3, 4};
    kvs_rng rng = {1};
    uint32_t round = 0;
    for (size_t d = 0; d < sizeof dims / sizeof dims[0]; d++) {
        for (size_t g = 0; g < 3; g++) {
            for (uint32_t rows = 1; rows <= KVS_ATTN_ROWS_MAX; rows++, round++) {
                fixture f;
                const rotation rot = dims[d] % 2 ? ROT_NONE : (rotation)(round % 4);
                const float scales[] = {1, 1, 20, 1e-3f};
                const uint32_t limit0 = 1 + kvs_rng_below(&rng, round % 3 ? 150 : 390);
                fixture_init(&f, &rng, dims[d], groups[g], rows, limit0, round % 2, rot, round % 5 ? 0.6 : 1.0,
                             scales[round % 4 + (round % 7 == 0 && round % 4 < 3)]);
                check_all(&f);
                fixture_free(&f);
            }
        }
    }
}

static void a_slot_count_at_a_boundary_is_wrong(void **state)
{
    (void)state;
    kvs_rng rng = {2};
    const uint32_t limits[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 79, 80, 81, 127, 128, 129, 192, 400};
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        for (uint32_t variant = 0; variant < 4; variant++) {
            fixture f;
            fixture_init(&f, &rng, variant == 3 ? 33 : 32, variant == 2 ? 16 : 2, variant == 1 ? 5 : 1, limits[i],
                         false, ROT_NONE, i % 2 ? 1.0 : 0.7, 2.0f);
            check_all(&f);
            fixture_free(&f);
        }
    }
}

static void head_dim_256_or_group_16_overruns(void **state)
{
    (void)state;
    kvs_rng rng = {3};
    for (int variant = 0; variant < 4; variant++) {
        fixture f;
        fixture_init(&f, &rng, variant < 2 ? 256 : 255, 16, 8, 70, variant & 1, variant < 2 ? ROT_FAR : ROT_NONE, 0.9,
                     1.0f);
        check_all(&f);
        fixture_free(&f);
    }
}

/* Scores of up to 1e30 leave one winner; scores of 1e-30 an average. f16 holds neither scale, so f32 keys. */
static void huge_or_tiny_values_break_the_softmax(void **state)
{
    (void)state;
    kvs_rng rng = {4};
    const float scales[] = {1e30f, 1e-30f, 1e-38f};
    for (int i = 0; i < 3; i++) {
        fixture f;
        fixture_init(&f, &rng, 64, 3, 3, 200, true, ROT_NONE, 0.8, scales[i]);
        const kvs_kernels *const ref = kvs_kernels_get(0);
        answer want = attend_with(ref, &f);
        for (size_t j = 0; j < want.n_out; j++)
            assert_true(isfinite(want.out[j]) && fabsf(want.out[j]) <= 3.01f);
        if (i)
            check_double(&f, &want);
        for (size_t l = 0; l < N_LEVELS; l++) {
            if ((kvs_cpu_flags() & levels[l]) == levels[l]) {
                answer got = attend_with(kvs_kernels_get(levels[l]), &f);
                assert_same(&got, &want, 9);
                answer_free(&got);
            }
        }
        answer_free(&want);
        fixture_free(&f);
    }
}

static void a_row_without_live_slots_is_not_zero(void **state)
{
    (void)state;
    kvs_rng rng = {5};
    for (int variant = 0; variant < 2; variant++) {
        fixture f;
        fixture_init(&f, &rng, 64, 3, 4, 60, false, ROT_NONE, variant ? 0.0 : 1.0, 1.0f);
        if (!variant) /* only the last row sees the one live slot */
            f.pages[0].live = UINT64_C(1) << 62;
        check_all(&f);
        fixture_free(&f);
    }
}

static void a_nan_key_hides_in_a_masked_looking_answer(void **state)
{
    (void)state;
    kvs_rng rng = {6};
    fixture f;
    fixture_init(&f, &rng, 64, 3, 2, 60, true, ROT_NONE, 1.0, 1.0f);
    for (uint32_t i = 0; i < 64 * 64; i++)
        ((float *)f.k[0])[i] = NAN;
    for (size_t l = 0; l < N_MASKS; l++) {
        if ((kvs_cpu_flags() & masks[l]) == masks[l]) {
            answer a = attend_with(kvs_kernels_get(masks[l]), &f);
            assert_true(isnan(a.out[0]) && isnan(a.l[0]));
            answer_free(&a);
        }
    }
    fixture_free(&f);
}

/* The maximum passes over a NaN wherever among the slots it stands, and the answer is one. */
static void one_nan_key_decides_the_maximum(void **state)
{
    (void)state;
    kvs_rng rng = {16};
    for (uint32_t slot = 0; slot < KVS_PAGE_SLOTS; slot++) {
        fixture f;
        fixture_init(&f, &rng, 16, 3, 1, KVS_PAGE_SLOTS, true, ROT_NONE, 1.0, 1.0f);
        float *const key = (float *)f.k[0] + slot / KVS_TILE_SLOTS * 16 * KVS_TILE_SLOTS + slot % KVS_TILE_SLOTS;
        for (uint32_t d = 0; d < 16; d++)
            key[d * KVS_TILE_SLOTS] = NAN;
        answer want = attend_with(kvs_kernels_get(0), &f);
        for (size_t l = 0; l < N_LEVELS; l++) {
            if ((kvs_cpu_flags() & levels[l]) != levels[l])
                continue;
            answer got = attend_with(kvs_kernels_get(levels[l]), &f);
            assert_memory_equal(got.m, want.m, 3 * sizeof *got.m);
            assert_true(!isnan(want.m[0]) && isnan(got.l[0]) && isnan(got.out[0]));
            answer_free(&got);
        }
        answer_free(&want);
        fixture_free(&f);
    }
}

/* The same live slots, compacted to the front of fresh pages: same bits, m and l included. */
static void where_slots_lie_changes_the_answer(void **state)
{
    (void)state;
    kvs_rng rng = {8};
    for (int round = 0; round < 24; round++) {
        fixture f, dense;
        const bool f32 = round % 2;
        const uint32_t dims = round % 3 ? 64 : 48;
        const rotation rot = (rotation)(round % 4);
        fixture_init(&f, &rng, dims, 3, 1, 1 + kvs_rng_below(&rng, 400), f32, rot, 0.4, 3.0f);
        fixture_init(&dense, &rng, dims, 3, 1, f.job.limit0, f32, rot, 0.0, 1.0f);
        uint32_t n = 0;
        for (uint32_t page = 0; page < f.n_pages; page++) {
            for (uint32_t s = 0; s < KVS_PAGE_SLOTS; s++) {
                if (!(f.pages[page].live >> s & 1) || page * KVS_PAGE_SLOTS + s >= f.job.limit0)
                    continue;
                const uint32_t to = n / KVS_PAGE_SLOTS, at = n % KVS_PAGE_SLOTS;
                kvs_page_move(dense.k[to], dense.v[to], at, f.k[page], f.v[page], s, dims, f32);
                dense.rope_pos[to][at] = f.rope_pos[page][s];
                dense.key_rot[to][at] = f.key_rot[page][s];
                dense.pages[to].live |= UINT64_C(1) << at;
                n++;
            }
        }
        dense.job.limit0 = n ? n : 1;
        dense.job.q = f.q, dense.job.q_stride = f.job.q_stride, dense.job.rope = &f.rope;
        for (size_t l = 0; l < N_MASKS; l++) {
            if ((kvs_cpu_flags() & masks[l]) != masks[l])
                continue;
            dense.job.out = f.out, dense.job.out_stride = f.job.out_stride;
            kvs_kernels_get(masks[l])->attend(&dense.job, dense.scratch);
            memcpy(f.m, dense.m, sizeof f.m), memcpy(f.l, dense.l, sizeof f.l);
            answer compact = answer_take(&f), scattered = attend_with(kvs_kernels_get(masks[l]), &f);
            assert_same(&scattered, &compact, 3);
            answer_free(&compact), answer_free(&scattered);
        }
        fixture_free(&f), fixture_free(&dense);
    }
}

/* One key rotated in the kernel by delta, against the key written as rotated by kvs_kernels.rope with the same row. */
static void rotation_in_the_kernel_differs_from_rotation_at_writing(void **state)
{
    (void)state;
    kvs_rng rng = {10};
    for (int round = 0; round < 12; round++) {
        fixture f;
        fixture_init(&f, &rng, 64, 3, 2, 140, true, round % 2 ? ROT_SLOT : ROT_PAGE, 0.8, 1.0f);
        answer turned = attend_with(kvs_kernels_get(kvs_cpu_flags()), &f);
        for (uint32_t page = 0; page < f.n_pages; page++) {
            for (uint32_t s = 0; s < KVS_PAGE_SLOTS; s++) {
                float key[64], value[64], row[64];
                kvs_page_read(f.k[page], f.v[page], s, key, value, 64, true);
                kvs_rope_row(&f.rope, f.rope_pos[page][s] - f.key_rot[page][s], row);
                kvs_kernels_get(0)->rope(key, 1, 64, row, f.rope.n_freq);
                kvs_page_write(f.k[page], f.v[page], s, key, value, 64, true);
            }
            f.pages[page].rotated = false;
        }
        answer written = attend_with(kvs_kernels_get(kvs_cpu_flags()), &f);
        assert_same(&turned, &written, 6); /* same formula, f32 keys: not merely near */
        answer_free(&turned), answer_free(&written);
        fixture_free(&f);
    }
}

/* Attends and taps rows from row_begin on; the weights lie in the scratch, or where a second thread would leave them. */
static void tap_with(const kvs_kernels *k, fixture *f, float *arrays, uint32_t row_begin, bool in_scratch)
{
    float *ptr[3][PAGES_MAX];
    for (int i = 0; i < 3 * SLOTS_MAX; i++)
        arrays[i] = i % 64 == 63 ? 0.125f : 0.0f;
    for (int a = 0; a < 3; a++)
        for (int p = 0; p < PAGES_MAX; p++)
            ptr[a][p] = arrays + a * SLOTS_MAX + p * KVS_PAGE_SLOTS;
    memset(f->scratch, 0xff, kvs_attn_scratch_bytes(f->job.group, f->job.head_dim, f->n_slots));
    kvs_attn_job job = f->job;
    float *const apart = zeroed((size_t)QUERY_MAX * SLOTS_MAX * sizeof *apart);
    memset(apart, 0xff, (size_t)QUERY_MAX * SLOTS_MAX * sizeof *apart);
    if (in_scratch)
        kvs_attn_weights_in_scratch(&job, f->scratch);
    else
        job.weights = apart, job.weights_stride = SLOTS_MAX;
    k->attend(&job, f->scratch);
    const kvs_attn_tap tap = {.row_begin = row_begin, .sum = ptr[0], .ema = ptr[1], .max = ptr[2], .ema_decay = 0.1f};
    k->attend_tap(&job, &tap, f->scratch);
    const kvs_attn_tap sum = {.row_begin = row_begin, .sum = ptr[0]}, none = {.row_begin = row_begin};
    float again[SLOTS_MAX];
    memcpy(again, ptr[0][0], sizeof again);
    for (int i = 0; i < SLOTS_MAX; i++)
        ptr[0][0][i] = i % 64 == 63 ? 0.125f : 0.0f;
    k->attend_tap(&job, &sum, f->scratch);
    k->attend_tap(&job, &none, f->scratch);
    assert_memory_equal(again, ptr[0][0], sizeof again); /* whatever else is asked for */
    kvs_free(kvs_allocator_default(), apart);
}

static void tap_columns_do_not_add_up_or_differ(void **state)
{
    (void)state;
    kvs_rng rng = {12};
    static float want[3 * SLOTS_MAX], got[3 * SLOTS_MAX];
    for (int round = 0; round < 40; round++) {
        fixture f;
        const uint32_t rows = 1 + (uint32_t)round % 8, group = round % 3 ? 3 : 4, from = (uint32_t)round / 8 % rows;
        fixture_init(&f, &rng, 64, group, rows, 1 + kvs_rng_below(&rng, 380), round % 2, (rotation)(round % 4), 0.7,
                     3.0f);
        f.pages[0].live |= 1;
        answer a = attend_with(kvs_kernels_get(0), &f);
        tap_with(kvs_kernels_get(0), &f, want, from, false);
        answer beside = answer_take(&f);
        assert_same(&beside, &a, rows * group); /* recording changes no output */
        answer_free(&beside);
        double sum = 0;
        for (uint32_t i = 0; i < f.n_slots; i++) {
            sum += (double)want[i] - (i % 64 == 63 ? 0.125 : 0);
            assert_true(want[2 * SLOTS_MAX + i] <= 1.0f + 8 * FLT_EPSILON && want[i] >= 0);
            for (int k = 0; k < 3 && !(f.pages[i / 64].live >> i % 64 & 1); k++)
                assert_true(want[k * SLOTS_MAX + (int)i] == (i % 64 == 63 ? 0.125f : 0.0f));
        }
        /* l is off by n EPS, each of n columns by rows * group roundings of numbers up to rows * group + 1. */
        const double total = (rows - from) * group;
        assert_true(fabs(sum - total) <= total * (f.n_slots + 4 + total) * EPS + f.n_slots * total * EPS);
        for (uint32_t i = f.n_slots; i < SLOTS_MAX; i++) /* untouched past the end */
            assert_true(want[SLOTS_MAX + i] == (i % 64 == 63 ? 0.125f : 0.0f));
        for (size_t l = 0; l < N_LEVELS; l++) {
            if ((kvs_cpu_flags() & levels[l]) == levels[l]) {
                for (int in_scratch = 0; in_scratch < 2; in_scratch++) {
                    tap_with(kvs_kernels_get(levels[l]), &f, got, from, in_scratch);
                    assert_memory_equal(got, want, sizeof want);
                }
            }
        }
        answer_free(&a);
        fixture_free(&f);
    }
}

/* A prompt in one call of eight rows or eight calls of one row: same outputs. */
static void rows_beside_a_row_change_it(void **state)
{
    (void)state;
    kvs_rng rng = {13};
    for (int round = 0; round < 8; round++) {
        fixture f;
        fixture_init(&f, &rng, 64, 3, 8, 100 + (uint32_t)round * 17, false, (rotation)(round % 4), 0.9, 2.0f);
        const kvs_kernels *const k = kvs_kernels_get(kvs_cpu_flags());
        answer all = attend_with(k, &f);
        for (uint32_t r = 0; r < 8; r++) {
            kvs_attn_job one = f.job;
            one.q += r * one.q_stride, one.out += r * one.out_stride, one.m += r * 3, one.l += r * 3;
            one.limit0 += r, one.n_rows = 1;
            k->attend(&one, f.scratch);
        }
        answer each = answer_take(&f);
        assert_same(&each, &all, 24);
        answer_free(&all), answer_free(&each);
        fixture_free(&f);
    }
}

/* A product that underflows leaves -0 in a chain, and the +0 a dead slot adds would turn it: no answer may tell. */
static void the_sign_of_a_zero_tells_where_slots_lie(void **state)
{
    (void)state;
    kvs_rng rng = {15};
    for (size_t l = 0; l < N_MASKS; l++) {
        for (int gap = 0; gap < 2 && (kvs_cpu_flags() & masks[l]) == masks[l]; gap++) {
            fixture f;
            fixture_init(&f, &rng, 1, 1, 1, 3, true, ROT_NONE, 1.0, 1.0f);
            const float one = 1.0f, low = -80.0f, zero = 0.0f, tiny = -1e-20f, minus = -0.0f;
            f.q[0] = 1.0f;
            const float below = -1.0f; /* behind the last live slot: 0 * -1 keeps a -0 */
            for (uint32_t s = 3; s < KVS_PAGE_SLOTS; s++)
                kvs_page_write(f.k[0], f.v[0], s, &one, &below, 1, true);
            kvs_page_write(f.k[0], f.v[0], 0, &low, &tiny, 1, true); /* weight e^-80: the product is -0 */
            kvs_page_write(f.k[0], f.v[0], 1, gap ? &one : &zero, gap ? &one : &minus, 1, true);
            kvs_page_write(f.k[0], f.v[0], 2, &zero, gap ? &minus : &below, 1, true);
            f.pages[0].live = gap ? 5 : 3;
            kvs_kernels_get(masks[l])->attend(&f.job, f.scratch);
            assert_true(f.out[0] == 0.0f && !signbit(f.out[0]));

            const float up = 1e-30f, down = -1e-30f; /* scores +0 and -0: their maximum is one zero */
            f.q[0] = 1e-30f;
            for (uint32_t s = 0; s < 3; s++)
                kvs_page_write(f.k[0], f.v[0], s, s == 0 ? &down : gap ? &up : &down, &one, 1, true);
            kvs_kernels_get(masks[l])->attend(&f.job, f.scratch);
            assert_true(f.m[0] == 0.0f && !signbit(f.m[0]));
            fixture_free(&f);
        }
    }
}

static void a_page_gives_back_another_slot(void **state)
{
    (void)state;
    for (int f32 = 0; f32 < 2; f32++) {
        for (uint32_t dims = 1; dims <= 65; dims += 16) {
            void *const k = zeroed(64 * 65 * 4), *const v = zeroed(64 * 65 * 4);
            float key[65], value[65], got_key[65], got_value[65];
            for (uint32_t s = 0; s < 64; s++) {
                for (uint32_t d = 0; d < dims; d++)
                    key[d] = (float)(s * 8 + d % 8), value[d] = -key[d]; /* whole numbers under 2048: exact in f16 */
                kvs_page_write(k, v, s, key, value, dims, f32);
            }
            kvs_page_move(k, v, 5, k, v, 60, dims, f32);
            for (uint32_t s = 0; s < 64; s++) {
                const uint32_t from = s == 5 ? 60 : s;
                kvs_page_read(k, v, s, got_key, got_value, dims, f32);
                for (uint32_t d = 0; d < dims; d++)
                    assert_true(got_key[d] == (float)(from * 8 + d % 8) && got_value[d] == -got_key[d]);
            }
            kvs_free(kvs_allocator_default(), k), kvs_free(kvs_allocator_default(), v);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_shape_differs_between_instruction_sets_or_from_double),
        cmocka_unit_test(a_slot_count_at_a_boundary_is_wrong),
        cmocka_unit_test(head_dim_256_or_group_16_overruns),
        cmocka_unit_test(huge_or_tiny_values_break_the_softmax),
        cmocka_unit_test(a_row_without_live_slots_is_not_zero),
        cmocka_unit_test(a_nan_key_hides_in_a_masked_looking_answer),
        cmocka_unit_test(one_nan_key_decides_the_maximum),
        cmocka_unit_test(where_slots_lie_changes_the_answer),
        cmocka_unit_test(rotation_in_the_kernel_differs_from_rotation_at_writing),
        cmocka_unit_test(tap_columns_do_not_add_up_or_differ),
        cmocka_unit_test(rows_beside_a_row_change_it),
        cmocka_unit_test(the_sign_of_a_zero_tells_where_slots_lie),
        cmocka_unit_test(a_page_gives_back_another_slot),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

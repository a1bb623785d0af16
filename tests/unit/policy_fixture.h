/* What tests of policies share: one head's slots, filled at random, and what an eviction does to them. Everything
 * static; one translation unit has one bench. */
#ifndef KVS_POLICY_FIXTURE_H
#define KVS_POLICY_FIXTURE_H

#include "kernels/kernels.h"
#include "policy/policy.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#if defined(__GNUC__)
#define FIXTURE_UNUSED __attribute__((unused))
#else
#define FIXTURE_UNUSED
#endif

enum { SLOTS_MAX = 9000, GROUP = 2, HEAD_DIM = 8, WINDOW = 6, N_QUERIES = 50 };

/* One head's slots and room for a selection. */
typedef struct bench {
    kvs_policy_view view;
    int32_t pos[SLOTS_MAX], rope_pos[SLOTS_MAX], token[SLOTS_MAX];
    uint8_t flags[SLOTS_MAX];
    float mass_sum[SLOTS_MAX], mass_ema[SLOTS_MAX], mass_max[SLOTS_MAX];
    float scores[SLOTS_MAX];
    float carry[SLOTS_MAX], out_norm[GROUP * SLOTS_MAX], probe[GROUP * SLOTS_MAX];
    float keys[SLOTS_MAX * HEAD_DIM], keys_raw[SLOTS_MAX * HEAD_DIM], values[SLOTS_MAX * HEAD_DIM];
    int32_t window_pos[WINDOW];
    float prob[WINDOW * GROUP * SLOTS_MAX], logit[WINDOW * GROUP * SLOTS_MAX], query[WINDOW * GROUP * HEAD_DIM];
    float pair[WINDOW * GROUP * WINDOW], part[SLOTS_MAX];
    double query_sum[GROUP * HEAD_DIM], query_square[GROUP * HEAD_DIM * HEAD_DIM], theta[HEAD_DIM / 2];
    uint8_t keep[SLOTS_MAX], want[SLOTS_MAX];
    uint32_t unit[SLOTS_MAX];
    uint64_t scratch[2 * SLOTS_MAX + 2], sentence_ends[1000 / 64 + 1];
    uint32_t target;
} bench;

static bench b; /* too large for the stack */

static FIXTURE_UNUSED float random_mass(kvs_rng *rng)
{
    /* Quarters, so that ties are common. */
    return kvs_rng_below(rng, 3) == 0 ? (float)kvs_rng_below(rng, 20) / 4.0f : (float)kvs_rng_double(rng);
}

static FIXTURE_UNUSED void random_floats(kvs_rng *rng, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(kvs_rng_double(rng) + kvs_rng_double(rng) + kvs_rng_double(rng)) - 1.5f;
}

/* Keys, values, a window of the newest rows and the moments of some queries. */
static FIXTURE_UNUSED void fill_contents(kvs_rng *rng, uint32_t n)
{
    random_floats(rng, b.keys, (size_t)n * HEAD_DIM);
    random_floats(rng, b.keys_raw, (size_t)n * HEAD_DIM);
    random_floats(rng, b.values, (size_t)n * HEAD_DIM);
    random_floats(rng, b.query, sizeof b.query / sizeof *b.query);
    for (uint32_t i = 0; i < GROUP * n; i++)
        b.out_norm[i] = b.probe[i] = (float)kvs_rng_double(rng);
    for (uint32_t i = 0; i < n; i++)
        b.carry[i] = kvs_rng_below(rng, 3) == 0 ? 0 : (float)kvs_rng_double(rng);
    b.view.n_window = kvs_min_u32(WINDOW, n);
    for (uint32_t r = 0; r < b.view.n_window; r++) {
        b.window_pos[r] = b.pos[n - b.view.n_window + r];
        for (uint32_t g = 0; g < GROUP; g++) {
            const size_t row = ((size_t)r * GROUP + g) * n;
            double sum = 0;
            for (uint32_t i = 0; i < n; i++) {
                const bool seen = b.pos[i] <= b.window_pos[r];
                b.logit[row + i] = seen ? 4 * (float)kvs_rng_double(rng) : -INFINITY;
                b.prob[row + i] = seen ? expf(b.logit[row + i]) : 0;
                sum += (double)b.prob[row + i];
            }
            for (uint32_t i = 0; i < n; i++)
                b.prob[row + i] = (float)((double)b.prob[row + i] / sum);
        }
    }
    memset(b.query_sum, 0, sizeof b.query_sum);
    memset(b.query_square, 0, sizeof b.query_square);
    for (uint32_t k = 0; k < N_QUERIES * GROUP; k++) {
        float q[HEAD_DIM];
        random_floats(rng, q, HEAD_DIM);
        for (uint32_t i = 0; i < HEAD_DIM; i++) {
            b.query_sum[k % GROUP * HEAD_DIM + i] += (double)q[i];
            for (uint32_t j = 0; j <= i; j++)
                b.query_square[(k % GROUP * HEAD_DIM + i) * HEAD_DIM + j] += (double)q[i] * (double)q[j];
        }
    }
    for (uint32_t i = 0; i < HEAD_DIM / 2; i++)
        b.theta[i] = pow(10000, -2.0 * i / HEAD_DIM);
    b.view.n_pair = kvs_window_slots(
        &(kvs_policy_view){.n_slots = n, .n_window = b.view.n_window, .pos = b.pos, .window_pos = b.window_pos});
    random_floats(rng, b.pair, sizeof b.pair / sizeof *b.pair);
    b.view.window_pair = b.pair;
    b.view.part = b.part;
    b.view.exp_scale = kvs_kernels_get(0)->exp_scale;
    b.view.carry = b.carry;
    b.view.keys = b.keys;
    b.view.keys_raw = b.keys_raw;
    b.view.values = b.values;
    b.view.window_pos = b.window_pos;
    b.view.window_prob = b.prob;
    b.view.window_logit = b.logit;
    b.view.window_query = b.query;
    b.view.n_queries = N_QUERIES;
    b.view.query_sum = b.query_sum;
    b.view.query_square = b.query_square;
    b.view.rope_theta = b.theta;
    b.view.n_freq = HEAD_DIM / 2;
    b.view.rope_next = (int32_t)b.view.n_tokens;
    b.view.out_norm = b.view.out_length = b.out_norm;
    b.view.probe = b.probe;
    for (uint32_t i = 0; i < sizeof b.sentence_ends / sizeof *b.sentence_ends; i++)
        b.sentence_ends[i] = kvs_rng_next(rng) & kvs_rng_next(rng) & kvs_rng_next(rng); /* every eighth token */
    b.view.sentence_ends = b.sentence_ends;
}

/* n slots of a conversation with gaps; markers, a system prompt at the start, a few pinned. */
static FIXTURE_UNUSED void fill_view(kvs_rng *rng, uint32_t n)
{
    int32_t at = kvs_rng_below(rng, 2) ? 0 : (int32_t)kvs_rng_below(rng, 10);
    const int32_t system_end = (int32_t)kvs_rng_below(rng, 12);
    for (uint32_t i = 0; i < n; i++, at += 1 + (kvs_rng_below(rng, 6) == 0 ? (int32_t)kvs_rng_below(rng, 9) : 0)) {
        b.pos[i] = b.rope_pos[i] = at;
        b.token[i] = (int32_t)kvs_rng_below(rng, 1000);
        b.flags[i] =
            (uint8_t)((kvs_rng_below(rng, 10) == 0 ? KVS_TOKEN_TEMPLATE : 0) |
                      (at < system_end ? KVS_TOKEN_SYSTEM : 0) | (kvs_rng_below(rng, 100) == 0 ? KVS_TOKEN_PINNED : 0));
        b.mass_sum[i] = random_mass(rng);
        b.mass_ema[i] = random_mass(rng);
        b.mass_max[i] = random_mass(rng);
    }
    b.view = (kvs_policy_view){.n_layers = 2,
                               .n_kv_heads = 2,
                               .group = GROUP,
                               .head_dim = HEAD_DIM,
                               .n_slots = n,
                               .n_tokens = at + (int32_t)kvs_rng_below(rng, 3),
                               .pos = b.pos,
                               .rope_pos = b.rope_pos,
                               .token = b.token,
                               .flags = b.flags,
                               .mass_sum = b.mass_sum,
                               .mass_ema = b.mass_ema,
                               .mass_max = b.mass_max,
                               .seed = kvs_rng_next(rng),
                               .event = kvs_rng_below(rng, 9)};
    fill_contents(rng, n);
}

static FIXTURE_UNUSED kvs_policy parse(const char *spec)
{
    kvs_policy p;
    kvs_error err = {0};
    if (kvs_policy_parse(spec, NULL, false, &p, &err) != KVS_OK)
        fail_msg("'%s' is refused: %s", spec, err.message);
    return p;
}

/* What an eviction does to one head: score, target, select. Returns how many stay; b.target is what was aimed at. */
static FIXTURE_UNUSED uint32_t evict(const kvs_policy *p, uint32_t n_full)
{
    uint32_t target = kvs_policy_target(p, &b.view, n_full);
    b.view.n_keep = target;
    b.view.work = malloc((kvs_policy_work(p, b.view.n_slots, HEAD_DIM) + 1) * sizeof(float));
    assert_non_null(b.view.work);
    p->ops->score(p->params, &b.view, b.scores);
    if (p->rescore != NULL)
        p->rescore->rescore(p->rescore_params, &b.view, b.scores);
    free(b.view.work);
    b.view.work = NULL;
    b.target = target = kvs_policy_target_scored(p, &b.view, b.scores, n_full);
    kvs_error err = {0};
    kvs_status status;
    if (p->select != NULL && p->select->units != NULL) { /* else the session marks what goes first */
        p->select->units(p->select_params, &b.view, b.unit);
        status = (p->select->choose != NULL ? p->select->choose : kvs_select_by_units)(
            &p->protect, &b.view, b.scores, b.unit, target, b.keep, b.scratch, &err);
    } else {
        status = kvs_select(&p->protect, &b.view, b.scores, target, b.keep, b.scratch, &err);
    }
    if (status != KVS_OK)
        fail_msg("%s: %s", p->text, err.message);
    uint32_t n = 0;
    for (uint32_t i = 0; i < b.view.n_slots; i++) {
        assert_true(b.keep[i] <= 1);
        n += b.keep[i];
    }
    return n;
}

#endif

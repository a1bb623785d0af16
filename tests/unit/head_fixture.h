/* What tests of scorers that read keys, values and query statistics share: a conversation of tokens with queries, keys and
 * values of their own, a head that holds them, and a scorer asked about it. Everything static. */
#ifndef KVS_HEAD_FIXTURE_H
#define KVS_HEAD_FIXTURE_H

#include "kernels/kernels.h"
#include "policy/dense.h"
#include "policy/policy.h"
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N_MAX = 700, GROUP = 2, DH = 8, N_FREQ = 3, ROWS_MAX = 320 }; /* two dims are not rotated */
#define EPS (double)FLT_EPSILON

/* What was said: token t has pos t. */
static float q[N_MAX][GROUP][DH], keys[N_MAX][DH], values[N_MAX][DH];

typedef struct head {
    kvs_policy_view view;
    int32_t pos[N_MAX], window_pos[ROWS_MAX];
    float carry[N_MAX], part[N_MAX], scores[N_MAX];
    float pair[ROWS_MAX * GROUP * ROWS_MAX];
    double sum[GROUP * DH], square[GROUP * DH * DH], theta[N_FREQ];
} head;

static head h, other;

static float draw(kvs_rng *rng)
{
    return (float)(kvs_rng_double(rng) + kvs_rng_double(rng) + kvs_rng_double(rng) - 1.5);
}

static void say(uint64_t seed)
{
    kvs_rng rng = {seed};
    for (uint32_t t = 0; t < N_MAX; t++)
        for (uint32_t d = 0; d < DH; d++) {
            for (uint32_t g = 0; g < GROUP; g++)
                q[t][g][d] = draw(&rng) + (d == 1 ? 0.7f : 0.0f);
            keys[t][d] = draw(&rng) + (d == 2 ? 0.5f : 0.0f);
            values[t][d] = draw(&rng);
        }
}

/* The head once n tokens were said and all are held; carry stays what it is. Moments are of tokens 4 and later. */
static void look(head *x, uint32_t n, uint32_t window)
{
    x->view = (kvs_policy_view){.n_layers = 1,
                                .n_kv_heads = 1,
                                .group = GROUP,
                                .head_dim = DH,
                                .n_slots = n,
                                .n_keep = n / 2,
                                .n_tokens = n,
                                .pos = x->pos,
                                .rope_pos = x->pos,
                                .keys = keys[0],
                                .keys_raw = keys[0],
                                .values = values[0],
                                .carry = x->carry,
                                .part = x->part,
                                .n_window = kvs_min_u32(window, n),
                                .window_pos = x->window_pos,
                                .window_pair = x->pair,
                                .n_pair = kvs_min_u32(window, n),
                                .query_sum = x->sum,
                                .query_square = x->square,
                                .rope_theta = x->theta,
                                .n_freq = N_FREQ,
                                .rope_next = (int32_t)n,
                                .exp_scale = kvs_kernels_get(0)->exp_scale,
                                .seed = 77};
    for (uint32_t i = 0; i < n; i++)
        x->pos[i] = (int32_t)i;
    for (uint32_t i = 0; i < N_FREQ; i++)
        x->theta[i] = pow(100, -(double)i / N_FREQ);
    memset(x->sum, 0, sizeof x->sum);
    memset(x->square, 0, sizeof x->square);
    for (uint32_t t = 4; t < n; t++, x->view.n_queries++)
        for (uint32_t g = 0; g < GROUP; g++)
            for (uint32_t i = 0; i < DH; i++) {
                x->sum[g * DH + i] += (double)q[t][g][i];
                for (uint32_t j = 0; j <= i; j++)
                    x->square[(g * DH + i) * DH + j] += (double)q[t][g][i] * (double)q[t][g][j];
            }
    const uint32_t first = n - x->view.n_window;
    for (uint32_t r = 0; r < x->view.n_window; r++) {
        x->window_pos[r] = (int32_t)(first + r);
        for (uint32_t g = 0; g < GROUP; g++)
            for (uint32_t i = 0; i < x->view.n_pair; i++) {
                double dot = 0;
                for (uint32_t d = 0; d < DH; d++)
                    dot += (double)q[first + r][g][d] * (double)keys[first + i][d];
                x->pair[(r * GROUP + g) * x->view.n_pair + i] = (float)(dot / sqrt(DH));
            }
    }
}

static kvs_policy parse(const char *spec)
{
    kvs_policy p;
    kvs_error err = {.message = ""};
    if (kvs_policy_parse(spec, NULL, false, &p, &err) != KVS_OK)
        fail_msg("'%s' is refused: %s", spec, err.message);
    return p;
}

static void with_work(const kvs_policy *p, head *x)
{
    /* A guard behind it: a scorer that asks for too little is seen. */
    const size_t n = kvs_policy_work(p, x->view.n_slots, DH);
    x->view.work = malloc((n + 4) * sizeof(float));
    assert_non_null(x->view.work);
    memset(x->view.work, 0xa5, (n + 4) * sizeof(float));
}

static void done_with_work(const kvs_policy *p, head *x)
{
    const size_t n = kvs_policy_work(p, x->view.n_slots, DH);
    uint8_t guard[4 * sizeof(float)];
    memset(guard, 0xa5, sizeof guard);
    assert_memory_equal(x->view.work + n, guard, sizeof guard);
    free(x->view.work);
    x->view.work = NULL;
}

static const float *score(const char *spec, head *x)
{
    const kvs_policy p = parse(spec);
    with_work(&p, x);
    p.ops->score(p.params, &x->view, x->scores);
    done_with_work(&p, x);
    return x->scores;
}

static void near(const char *what, uint32_t i, double got, double want, double tolerance)
{
    if (!(fabs(got - want) <= tolerance))
        fail_msg("%s, slot %u: %.9g instead of %.9g (%.2g apart, %.2g allowed)", what, i, got, want, fabs(got - want),
                 tolerance);
}

static double norm(const float *x)
{
    double sum = 0;
    for (uint32_t d = 0; d < DH; d++)
        sum += (double)x[d] * (double)x[d];
    return sqrt(sum);
}

/* A^-1 by Gauss and Jordan with pivots. */
static void invert(uint32_t n, double *a, double *out)
{
    for (uint32_t i = 0; i < n * n; i++)
        out[i] = i / n == i % n;
    for (uint32_t c = 0; c < n; c++) {
        uint32_t best = c;
        for (uint32_t r = c + 1; r < n; r++)
            best = fabs(a[r * n + c]) > fabs(a[best * n + c]) ? r : best;
        for (uint32_t k = 0; k < n; k++) {
            double swap = a[c * n + k];
            a[c * n + k] = a[best * n + k];
            a[best * n + k] = swap;
            swap = out[c * n + k];
            out[c * n + k] = out[best * n + k];
            out[best * n + k] = swap;
        }
        const double pivot = a[c * n + c];
        for (uint32_t k = 0; k < n; k++) {
            a[c * n + k] /= pivot;
            out[c * n + k] /= pivot;
        }
        for (uint32_t r = 0; r < n; r++) {
            const double by = a[r * n + c];
            for (uint32_t k = 0; k < n && r != c; k++) {
                a[r * n + k] -= by * a[c * n + k];
                out[r * n + k] -= by * out[c * n + k];
            }
        }
    }
}

#endif

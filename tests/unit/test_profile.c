/* What profiles measure is what their definitions say, in double precision and by other means; it does not depend on
 * threads; shares that are searched are never worse than even ones on the text; and what is measured is a file that a
 * session takes. */
#include "eval/profile_internal.h"
#include "unit/session_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum { LAYERS = 3, KV = 3, GROUP = 2, DH = 32, HEADS = LAYERS * KV, N = 1400 };

static kvs_model *model;
static int32_t tokens[N];

static kvs_model *open_model(uint32_t n_threads)
{
    tiny_options o;
    fx_shape(&o, GGML_TYPE_F32);
    o.n_layers = LAYERS;
    return fx_open(&o, n_threads, 0);
}

static int setup(void **state)
{
    (void)state;
    model = open_model(2);
    fx_tokens(3, tokens, N);
    return model == NULL;
}

static int teardown(void **state)
{
    (void)state;
    kvs_model_close(&model);
    return 0;
}

static kvs_profile_made measure(kvs_model *m, const char *kind, uint32_t budget, uint32_t block, uint32_t n_tokens,
                                uint32_t n_texts)
{
    const kvs_profile_options opt = {.arith = KVS_ARITH_F32, .budget_tokens = budget, .block_tokens = block};
    kvs_profile_text texts[2] = {{tokens, n_tokens}, {tokens + 5, n_tokens}};
    kvs_profile_made made;
    kvs_error err = {0};
    if (kvs_eval_profile(m, kind, &opt, texts, n_texts, &made, &err) != KVS_OK)
        fail_msg("%s: %s", kind, err.message);
    return made;
}

/* ---- duo -------------------------------------------------------------------------------------------------------- */

/* Both vectors rotated where they stand, all weights written down, their running sums averaged. */
static double area_by_hand(const double *q, const double *k, const double *theta, uint32_t n)
{
    static double weights[500];
    double sum = 0, running = 0, area = 0;
    for (uint32_t j = 0; j < n; j++) {
        double dot = 0;
        for (uint32_t i = 0; i < DH / 2; i++) {
            const double a = theta[i] * (n - 1), b = theta[i] * j;
            const double q0 = q[2 * i] * cos(a) - q[2 * i + 1] * sin(a), q1 = q[2 * i] * sin(a) + q[2 * i + 1] * cos(a);
            const double k0 = k[2 * i] * cos(b) - k[2 * i + 1] * sin(b), k1 = k[2 * i] * sin(b) + k[2 * i + 1] * cos(b);
            dot += q0 * k0 + q1 * k1;
        }
        sum += weights[j] = exp(dot / sqrt(DH));
    }
    for (uint32_t j = 0; j < n; j++) {
        running += weights[j] / sum;
        area += running / n;
    }
    return area;
}

static void the_reach_of_a_head_is_the_area_under_its_cumulated_attention(void **state)
{
    (void)state;
    kvs_rng rng = {4};
    double q[DH], k[DH], theta[DH / 2];
    for (uint32_t i = 0; i < DH / 2; i++)
        theta[i] = pow(10000, -2.0 * i / DH);
    for (int round = 0; round < 40; round++) {
        for (uint32_t d = 0; d < DH; d++) {
            q[d] = 4 * kvs_rng_double(&rng) - 2;
            k[d] = 4 * kvs_rng_double(&rng) - 2;
        }
        const uint32_t n = 1 + kvs_rng_below(&rng, 500);
        assert_true(fabs(kvs_profile_reach(q, k, DH, theta, DH / 2, n) - area_by_hand(q, k, theta, n)) < 1e-10);
    }
    memset(q, 0, sizeof q); /* looks everywhere alike */
    assert_true(fabs(kvs_profile_reach(q, k, DH, theta, DH / 2, 500) - 501.0 / 1000) < 1e-12);
    assert_true(kvs_profile_reach(k, k, DH, (double[DH / 2]){[0] = 0.01}, DH / 2, 500) <= 1);
}

/* Means of queries and keys from what a session stores: keys from its cache, queries from the log of a policy. */
static void duo_takes_the_means_of_the_text(void **state)
{
    (void)state;
    kvs_profile_made made = measure(model, "duo", 0, 0, 300, 1);
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "qfilter";
    o.budget_tokens = 400;
    o.arith = KVS_ARITH_F32;
    o.kv_type = KVS_KV_F32;
    kvs_session *s = fx_session(model, &o);
    assert_non_null(s);
    kvs_error err;
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 300, NULL, &err), KVS_OK);
    for (uint32_t h = 0; h < HEADS; h++) {
        const kvs_policy_view v = kvs_view_head(s, h / KV, h % KV, &s->scratch.threads[0]);
        assert_int_equal(v.n_queries, 296);
        assert_true(made.heads[h] > 0 && made.heads[h] < 1);
        double k[DH] = {0}, area = 0;
        for (uint32_t i = 0; i < v.n_slots; i++)
            for (uint32_t d = 0; d < DH; d++)
                k[d] += (double)v.keys_raw[i * DH + d] / 300;
        for (uint32_t g = 0; g < GROUP; g++) {
            double q[DH];
            for (uint32_t d = 0; d < DH; d++)
                q[d] = v.query_sum[g * DH + d] / 296;
            area += area_by_hand(q, k, model->theta, 500) / GROUP;
        }
        assert_true(fabs(area - made.heads[h]) < 0.02); /* the first 4 queries of 300 are not in its sums */
    }
    kvs_session_free(&s);
    kvs_profile_made_free(&made);
}

/* ---- sensitivity ------------------------------------------------------------------------------------------------ */

static void the_first_layer_is_never_sensitive_and_the_first_block_is_full(void **state)
{
    (void)state;
    kvs_profile_made made = measure(model, "sensitivity", 0, 300, 1000, 1);
    assert_int_equal(made.block_tokens, 300);
    assert_true(fabs(made.layers[0] - 1) < 1e-12); /* its keys see no attention */
    /* Windows 0 to 2 are in the first block and alike to the last bit; the others by hand, from two sessions' caches. */
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "streaming:sinks=128 +position=keep +protect=none";
    o.budget_tokens = 1000;
    o.arith = KVS_ARITH_F32;
    o.kv_type = KVS_KV_F32;
    kvs_session *full = fx_session(model, &o), *cut = fx_session(model, &o);
    kvs_error err;
    assert_int_equal(kvs_session_extend(full, tokens, NULL, 1000, NULL, &err), KVS_OK);
    static float a[1000 * DH], b[1000 * DH], values[1000 * DH];
    double sum[LAYERS] = {0};
    for (uint32_t begin = 0; begin < 1000; begin += 300) {
        if (begin > 0)
            assert_int_equal(kvs_session_evict(cut, 128 + 150, &err), KVS_OK);
        const uint32_t n = kvs_min_u32(300, 1000 - begin);
        assert_int_equal(kvs_session_extend(cut, tokens + begin, NULL, n, NULL, &err), KVS_OK);
        for (uint32_t h = 0; h < HEADS; h++) {
            const uint32_t held = kvs_cache_n_live(cut->cache, h / KV, h % KV);
            kvs_cache_read_kv(full->cache, h / KV, h % KV, a, values);
            kvs_cache_read_kv(cut->cache, h / KV, h % KV, b, values);
            for (uint32_t w = begin; w < begin + n; w += 100)
                sum[h / KV] +=
                    kvs_profile_cosine(a + (size_t)w * DH, b + (size_t)(held - (begin + n - w)) * DH, 100 * DH);
        }
    }
    for (uint32_t l = 0; l < LAYERS; l++)
        assert_true(fabs(sum[l] / (10 * KV) - made.layers[l]) < 1e-5); /* rotated keys are rounded once more */
    assert_true(made.layers[LAYERS - 1] < 1 - 1e-6);
    kvs_session_free(&full);
    kvs_session_free(&cut);
    kvs_profile_made_free(&made);
}

/* ---- kvzip-head ------------------------------------------------------------------------------------------------- */

static void a_heads_worth_is_the_largest_score_that_kvzip_gives_its_tokens(void **state)
{
    (void)state;
    kvs_profile_made made = measure(model, "kvzip-head", 0, 0, 200, 1);
    for (uint32_t h = 0; h < HEADS; h++)
        assert_true(made.heads[h] > 0 && made.heads[h] <= 1);
    /* kvzip's own scores of the same rows: keep so many that only the best slot besides the sinks stays in its head. */
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "kvzip +protect=none";
    o.budget_tokens = 8000;
    o.arith = KVS_ARITH_F32;
    o.kv_type = KVS_KV_F32;
    kvs_session *s = fx_session(model, &o);
    kvs_error err;
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 200, NULL, &err), KVS_OK);
    assert_int_equal(kvs_session_evict(s, 100, &err), KVS_OK);
    for (uint32_t h = 0; h < HEADS; h++) {
        float most = 0;
        for (uint32_t i = 4; i < 200; i++)
            most = fmaxf(most, s->scratch.scores[(size_t)h * s->scratch.stride + i]);
        if (fabs((double)most - made.heads[h]) >= 1e-6)
            fail_msg("head %u: %g, kvzip's best slot has %g", h, made.heads[h], (double)most);
    }
    kvs_session_free(&s);
    kvs_profile_made_free(&made);
}

/* ---- baklava ---------------------------------------------------------------------------------------------------- */

static void classes_are_borders_of_worth_and_equal_worth_is_even(void **state)
{
    (void)state;
    double worth[20], weights[20];
    for (uint32_t h = 0; h < 20; h++)
        worth[h] = 0.4;
    kvs_profile_classes(worth, 20, 0.5, 0.25, 0.25, 2, weights);
    for (uint32_t h = 0; h < 20; h++)
        assert_true(weights[h] == 1);
    for (uint32_t h = 0; h < 20; h++)
        worth[h] = (h * 7 % 20) / 20.0;
    kvs_profile_classes(worth, 20, 0.5, 0.25, 0.25, 2, weights);
    for (uint32_t h = 0; h < 20; h++)
        assert_true(weights[h] == (h * 7 % 20 < 10 ? 0.25 : h * 7 % 20 >= 15 ? 2 : 1));
    kvs_profile_classes(worth, 20, 0, 0, 0.25, 2, weights);
    for (uint32_t h = 0; h < 20; h++)
        assert_true(weights[h] == 1);
}

typedef struct sums {
    double head[HEADS], layer[LAYERS];
} sums;

/* The definition with whole vectors in long double. */
static void watch(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows, kvs_forward_point point)
{
    sums *const s = ctx;
    const kvs_model_info *const i = &model->info;
    for (uint32_t r = 0; point == KVS_FORWARD_ATT && r < n_rows; r++)
        for (uint32_t h = 0; h < KV * GROUP; h++) {
            long double ab = 0, aa = 0, bb = 0;
            for (uint32_t d = 0; d < DH; d++) {
                const long double v = f->qkv[r * f->qkv_width + (KV * GROUP + KV + h / GROUP) * DH + d];
                const long double out = f->att[((size_t)r * KV * GROUP + h) * DH + d];
                ab += v * out;
                aa += v * v;
                bb += out * out;
            }
            s->head[layer * KV + h / GROUP] += (double)(ab / sqrtl(aa * bb)) / GROUP;
        }
    for (uint32_t r = 0; point == KVS_FORWARD_MIX && r < n_rows; r++)
        s->layer[layer] += kvs_cosine_after(f->x + (size_t)r * i->n_embd, f->norm + (size_t)r * i->n_embd, i->n_embd);
}

static void importance_is_how_far_output_turns_and_the_choice_is_no_worse_than_even(void **state)
{
    (void)state;
    kvs_profile_made made = measure(model, "baklava", 100, 0, 400, 2);
    sums s = {{0}, {0}};
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.arith = KVS_ARITH_F32;
    o.kv_type = KVS_KV_F32;
    kvs_session *plain = fx_session(model, &o);
    kvs_error err;
    model->forward->watch = (kvs_forward_watch){watch, &s};
    assert_int_equal(kvs_session_extend(plain, tokens, NULL, 400, NULL, &err), KVS_OK);
    model->forward->watch = (kvs_forward_watch){0};
    for (uint32_t h = 0; h < HEADS; h++)
        assert_true(fabs(made.head_importance[h] - (1 - s.head[h] / 400)) < 1e-12);
    for (uint32_t l = 0; l < LAYERS; l++)
        assert_true(fabs(made.layer_importance[l] - (1 - s.layer[l] / 400)) < 1e-12);
    assert_true(made.nll_chosen <= made.nll_even && made.n_tried == 10 && made.budget_tokens == 100);
    assert_true(isfinite(made.held_nll_even) && isfinite(made.held_nll_chosen));
    kvs_session_free(&plain);
    kvs_profile_made_free(&made);
}

/* ---- lukv ------------------------------------------------------------------------------------------------------- */

static void the_hull_is_the_least_concave_curve_above_the_sums(void **state)
{
    (void)state;
    kvs_rng rng = {6};
    for (int round = 0; round < 300; round++) {
        const uint32_t n = 1 + kvs_rng_below(&rng, 40);
        uint32_t blocks[40];
        double adds[40], hull[40], upto[41] = {0}, above = 0;
        for (uint32_t i = 0; i < n; i++)
            upto[i + 1] = upto[i] + (adds[i] = hull[i] = kvs_rng_below(&rng, 4) == 0 ? 0 : kvs_rng_double(&rng));
        kvs_profile_hull(hull, blocks, n);
        for (uint32_t i = 1; i <= n; i++) { /* the highest chord over i */
            above += hull[i - 1];
            double most = upto[i];
            for (uint32_t a = 0; a < i; a++)
                for (uint32_t b = i; b <= n; b++)
                    most = fmax(most, upto[a] + (upto[b] - upto[a]) * (i - a) / (b - a));
            assert_true(fabs(above - most) < 1e-12);
        }
    }
}

/* Every table's sum is its ratio, and no head gets more back when more is dropped. */
static void lukvs_tables_drop_their_ratio_and_fall_with_it(void **state)
{
    (void)state;
    kvs_profile_made made = measure(model, "lukv", 0, 0, 1200, 2);
    assert_int_equal(made.n_tables, 99);
    for (uint32_t t = 0; t < 99; t++) {
        double dropped = 0;
        for (uint32_t h = 0; h < HEADS; h++) {
            const double x = made.heads[t * HEADS + h];
            assert_true(x >= 0 && x <= 1 - 5.0 / 600 + 1e-12); /* the protected */
            assert_true(t == 0 || x >= made.heads[(t - 1) * HEADS + h] - 1e-12);
            dropped += x / HEADS;
        }
        assert_true(fabs(dropped - (t + 1) / 100.0) <= 0.5 / (600 * HEADS) + 1e-12);
    }
    kvs_profile_made_free(&made);
}

/* ---- all kinds -------------------------------------------------------------------------------------------------- */

static void threads_do_not_show_and_bad_wishes_are_refused(void **state)
{
    (void)state;
    kvs_model *other = open_model(1);
    assert_non_null(other);
    for (uint32_t k = 0; kvs_eval_profile_kind(k) != NULL; k++) {
        const char *const kind = kvs_eval_profile_kind(k);
        kvs_profile_made a = measure(model, kind, 100, 300, 1000, 1), b = measure(other, kind, 100, 300, 1000, 1);
        if (a.heads != NULL)
            assert_memory_equal(a.heads, b.heads, HEADS * sizeof *a.heads);
        else
            assert_memory_equal(a.layers, b.layers, LAYERS * sizeof *a.layers);
        kvs_profile_made_free(&a);
        kvs_profile_made_free(&b);
    }
    kvs_model_close(&other);
    volatile int stop = 1;
    kvs_profile_options opt = {.arith = KVS_ARITH_F32, .cancel = &stop};
    const kvs_profile_text text = {tokens, 700}, brief = {tokens, 40};
    kvs_profile_made made;
    kvs_error err;
    assert_int_equal(kvs_eval_profile(model, "duo", &opt, &text, 1, &made, &err), KVS_ECANCELLED);
    assert_null(made.heads);
    opt.cancel = NULL;
    assert_int_equal(kvs_eval_profile(model, "bakleva", &opt, &text, 1, &made, &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "did you mean 'baklava'"));
    assert_int_equal(kvs_eval_profile(model, "duo", &opt, &text, 0, &made, &err), KVS_EINVAL);
    assert_int_equal(kvs_eval_profile(model, "sensitivity", &opt, &brief, 1, &made, &err), KVS_EINVAL);
    assert_int_equal(kvs_eval_profile(model, "baklava", &opt, &brief, 1, &made, &err), KVS_EINVAL);
    assert_int_equal(kvs_eval_profile(model, "lukv", &opt, &brief, 1, &made, &err), KVS_EINVAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_reach_of_a_head_is_the_area_under_its_cumulated_attention),
        cmocka_unit_test(duo_takes_the_means_of_the_text),
        cmocka_unit_test(the_first_layer_is_never_sensitive_and_the_first_block_is_full),
        cmocka_unit_test(a_heads_worth_is_the_largest_score_that_kvzip_gives_its_tokens),
        cmocka_unit_test(classes_are_borders_of_worth_and_equal_worth_is_even),
        cmocka_unit_test(importance_is_how_far_output_turns_and_the_choice_is_no_worse_than_even),
        cmocka_unit_test(the_hull_is_the_least_concave_curve_above_the_sums),
        cmocka_unit_test(lukvs_tables_drop_their_ratio_and_fall_with_it),
        cmocka_unit_test(threads_do_not_show_and_bad_wishes_are_refused),
    };
    return cmocka_run_group_tests_name("profile", tests, setup, teardown);
}

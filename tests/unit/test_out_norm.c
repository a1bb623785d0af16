/* |W_o v|_1 of each slot: the kernel against double precision and over instruction sets, and what a policy's view gets
 * against the model's own weights. */
#include "model/forward.h"
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

enum { ROWS_MAX = 96, DIM_MAX = 128, N_MAX = 100 };

static float w[ROWS_MAX * DIM_MAX], v[N_MAX * DIM_MAX], norm[N_MAX + 1], other[N_MAX + 1];

static void fill(kvs_rng *rng, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(2 * kvs_rng_double(rng) - 1);
}

static void norm_is_wrong_or_differs_between_instruction_sets(void **state)
{
    (void)state;
    static const uint32_t levels[] = {KVS_CPU_AVX2, KVS_CPU_AVX2 | KVS_CPU_AVX512, KVS_CPU_NEON};
    kvs_rng rng = {1};
    for (int round = 0; round < 60; round++) {
        const uint32_t n_rows = KVS_NORM_ROWS * (1 + kvs_rng_below(&rng, ROWS_MAX / KVS_NORM_ROWS));
        const uint32_t dim = 1 + kvs_rng_below(&rng, DIM_MAX), n = 1 + kvs_rng_below(&rng, N_MAX);
        fill(&rng, w, (size_t)n_rows * dim);
        fill(&rng, v, (size_t)n * dim);
        memset(norm, 0x5a, sizeof norm);
        kvs_kernels_get(0)->product_norm(w, n_rows, dim, v, n, norm);
        for (uint32_t i = 0; i < n; i++) {
            double sum = 0, size = 0;
            for (uint32_t r = 0; r < n_rows; r++) {
                double y = 0;
                for (uint32_t d = 0; d < dim; d++) {
                    y += (double)w[(size_t)r * dim + d] * (double)v[(size_t)i * dim + d];
                    size += fabs((double)w[(size_t)r * dim + d] * (double)v[(size_t)i * dim + d]);
                }
                sum += fabs(y);
            }
            assert_true(fabs((double)norm[i] - sum) <= size * (dim + n_rows) * 0x1p-24); /* a rounding a step */
        }
        for (size_t l = 0; l < sizeof levels / sizeof *levels; l++) {
            if ((kvs_cpu_flags() & levels[l]) != levels[l])
                continue;
            memset(other, 0x5a, sizeof other);
            kvs_kernels_get(levels[l])->product_norm(w, n_rows, dim, v, n, other);
            assert_memory_equal(other, norm, sizeof norm); /* nor is anything written behind n */
        }
    }
}

static void view_is_not_what_the_weights_say(void **state)
{
    (void)state;
    tiny_options t;
    fx_shape(&t, GGML_TYPE_Q4_1);
    kvs_model *m = fx_open(&t, 2, 0);
    assert_non_null(m);
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "criticalkv";
    o.budget_tokens = 300;
    kvs_session *s = fx_session(m, &o);
    assert_non_null(s);
    int32_t tokens[400];
    kvs_error err;
    fx_tokens(5, tokens, 400);
    assert_int_equal(kvs_session_extend(s, tokens, NULL, 400, NULL, &err), KVS_OK); /* past an eviction */
    const uint32_t dh = m->info.head_dim, n_in = m->info.n_heads * dh;
    float *row = malloc(n_in * sizeof *row);
    assert_non_null(row);
    for (uint32_t layer = 0; layer < m->info.n_layers; layer++)
        for (uint32_t head = 0; head < m->info.n_kv_heads; head++) {
            const kvs_policy_view view = kvs_view_contents(s, layer, head, &s->scratch.threads[0]);
            assert_true(view.n_slots > 100);
            for (uint32_t g = 0; g < view.group; g++)
                for (uint32_t i = 0; i < view.n_slots; i += 17) {
                    double sum = 0, size = 0;
                    for (uint32_t r = 0; r < m->info.n_embd; r++) {
                        kvs_weight_row(&m->layers[layer].attn_out, r, row);
                        double y = 0;
                        for (uint32_t d = 0; d < dh; d++) {
                            const double x =
                                (double)row[(head * view.group + g) * dh + d] * (double)view.values[i * dh + d];
                            y += x;
                            size += fabs(x);
                        }
                        sum += fabs(y);
                    }
                    assert_true(fabs((double)view.out_norm[g * view.n_slots + i] - sum) <=
                                size * (dh + m->info.n_embd) * 0x1p-24);
                }
        }
    free(row);
    kvs_session_free(&s);
    kvs_model_close(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_is_wrong_or_differs_between_instruction_sets),
        cmocka_unit_test(view_is_not_what_the_weights_say),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

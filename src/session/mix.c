/* How much attention changes the hidden state: for each layer the cosine of the state before and after its attention
 * block, summed over the rows of the conversation in the order they were said, so that neither chunks nor threads nor
 * other sessions of a step can be seen. */
#include "session/session_internal.h"

#include <math.h>

enum { CHAINS = 8 };

/* Eight chains, folded in one fixed order: one would wait for each sum. */
static double fold(const double *part)
{
    return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

double kvs_cosine_after(const float *x, const float *d, uint32_t n)
{
    double xx[CHAINS] = {0}, xy[CHAINS] = {0}, yy[CHAINS] = {0};
    for (uint32_t i = 0; i < n; i++) {
        const double a = (double)x[i], b = a + (double)d[i];
        xx[i % CHAINS] += a * a;
        xy[i % CHAINS] += a * b;
        yy[i % CHAINS] += b * b;
    }
    const double square = fold(xx) * fold(yy);
    return square > 0 ? fold(xy) / sqrt(square) : 0;
}

typedef struct mix_task {
    const kvs_forward *f;
    double cosine[KVS_STEP_ROWS_MAX];
} mix_task;

static void mix_row(void *ctx, uint32_t row, uint32_t thread)
{
    (void)thread;
    mix_task *const t = ctx;
    const size_t n = t->f->model->info.n_embd;
    t->cosine[row] = kvs_cosine_after(t->f->x + row * n, t->f->norm + row * n, (uint32_t)n);
}

static bool is_asked(const kvs_attend_run *run)
{
    return run->use == KVS_ROWS_SAID && run->session->queries.mixes;
}

void kvs_attend_watch(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows, kvs_forward_point point)
{
    const kvs_attend_ctx *a = ctx;
    if (point != KVS_FORWARD_MIX)
        return;
    mix_task t = {.f = f};
    kvs_pool_run(f->model->pool, mix_row, &t, n_rows);
    for (uint32_t i = 0; i < a->n_runs; i++)
        for (uint32_t r = 0; is_asked(&a->runs[i]) && r < a->runs[i].n_rows; r++)
            kvs_query_log_mix(&a->runs[i].session->queries, layer, t.cosine[a->runs[i].row0 + r]);
}

/* The forward pass of a Llama-family model. Attention itself, and everything about caches, is the caller's hook. */
#include "model/forward.h"

#include <math.h>
#include <string.h>

/* Rows one elementwise task takes: enough to be worth handing out. */
enum { ROWS_PER_TASK = 16 };

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t scratch_for(const kvs_weight *w, uint32_t rows, uint32_t n_threads, size_t so_far)
{
    return w->n_out == 0 ? so_far : max_size(so_far, kvs_matmul_scratch_bytes(w, rows, n_threads));
}

static size_t matmul_scratch_bytes(const kvs_model *m, uint32_t rows)
{
    const uint32_t t = kvs_pool_n_threads(m->pool);
    size_t bytes = scratch_for(&m->head, KVS_LOGIT_ROWS_MAX, t, 0);
    for (uint32_t i = 0; i < m->info.n_layers; i++) {
        const kvs_layer *l = &m->layers[i];
        const kvs_layer_parts *p = &m->parts[i];
        const kvs_weight *all[] = {&l->qkv, &l->attn_out, &l->gate_up, &l->ffn_down, &p->q,
                                   &p->k,   &p->v,        &p->gate,    &p->up};
        for (size_t j = 0; j < sizeof all / sizeof *all; j++)
            bytes = scratch_for(all[j], rows, t, bytes);
    }
    return bytes;
}

kvs_status kvs_forward_create(kvs_model *m, kvs_forward **out, kvs_error *err)
{
    *out = NULL;
    const kvs_model_info *i = &m->info;
    kvs_forward *f = kvs_alloc(m->allocator, 1, sizeof *f);
    if (f == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the forward pass");
    f->model = m;
    f->max_rows = KVS_STEP_ROWS_MAX;
    pthread_mutex_init(&f->lock, NULL);
    const size_t rows = f->max_rows;
    const size_t qkv = (size_t)(i->n_heads + 2 * i->n_kv_heads) * i->head_dim;
    f->qkv_width = qkv;
    const size_t matmul = matmul_scratch_bytes(m, f->max_rows);
    struct {
        float **at;
        size_t n;
    } buffers[] = {
        {&f->x, rows * i->n_embd},
        {&f->norm, rows * i->n_embd},
        {&f->qkv, rows * qkv},
        {&f->att, rows * i->n_heads * i->head_dim},
        {&f->gate_up, rows * 2 * i->n_ff},
        {&f->act, rows * i->n_ff},
        {&f->logits, (size_t)KVS_LOGIT_ROWS_MAX * i->vocab_size},
    };
    bool ok = (f->matmul_scratch = kvs_alloc(m->allocator, 1, matmul)) != NULL;
    f->bytes = matmul;
    for (size_t b = 0; b < sizeof buffers / sizeof *buffers && ok; b++) {
        ok = (*buffers[b].at = kvs_alloc(m->allocator, buffers[b].n, sizeof(float))) != NULL;
        f->bytes += buffers[b].n * sizeof(float);
    }
    if (!ok) {
        kvs_forward_free(&f);
        return kvs_error_set(err, KVS_ENOMEM, "no memory for activations of %u rows", (unsigned)rows);
    }
    *out = f;
    return KVS_OK;
}

void kvs_forward_free(kvs_forward **forward)
{
    kvs_forward *f = *forward;
    if (f == NULL)
        return;
    *forward = NULL;
    const kvs_allocator *a = f->model->allocator;
    void *all[] = {f->x, f->norm, f->qkv, f->att, f->gate_up, f->act, f->logits, f->matmul_scratch, f->attn_scratch};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        kvs_free(a, all[i]);
    pthread_mutex_destroy(&f->lock);
    kvs_free(a, f);
}

kvs_status kvs_forward_need_scratch(kvs_forward *f, size_t bytes_per_thread, kvs_error *err)
{
    bytes_per_thread = kvs_round_up(bytes_per_thread, 4096);
    if (bytes_per_thread <= f->attn_scratch_bytes)
        return KVS_OK;
    const size_t n_threads = kvs_pool_n_threads(f->model->pool) + 1; /* the last one is shared by all */
    void *grown = kvs_alloc(f->model->allocator, n_threads, bytes_per_thread);
    if (grown == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %zu bytes of attention scratch", bytes_per_thread);
    kvs_free(f->model->allocator, f->attn_scratch);
    f->bytes += n_threads * (bytes_per_thread - f->attn_scratch_bytes);
    f->attn_scratch = grown;
    f->attn_scratch_bytes = bytes_per_thread;
    return KVS_OK;
}

/* ---- elementwise steps over rows ---- */

typedef enum row_op { ROW_NORM, ROW_ADD_NORM, ROW_SWIGLU, ROW_ADD } row_op;

typedef struct row_task {
    kvs_forward *f;
    row_op op;
    const float *norm_weight;
    const float *delta; /* [n_rows][n_embd] added to x */
    uint32_t n_rows;
    struct ffn_rows *ffn; /* NULL: delta is not of a block that rows may go without */
} row_task;

/* Which rows go without this layer's block, and what the block did to the others. */
typedef struct ffn_rows {
    const kvs_ffn_rule *const *rules; /* [n_rows], or NULL: no row has one */
    uint8_t skip[KVS_STEP_ROWS_MAX];
    double cosine[KVS_STEP_ROWS_MAX];
} ffn_rows;

/* Of x and x + delta; 0 where one of them is zero. Three chains in double, so that nothing but the row decides. */
static double cosine_of_step(const float *x, const float *delta, uint32_t n)
{
    double both = 0, before = 0, after = 0;
    for (uint32_t i = 0; i < n; i++) {
        const double a = (double)x[i], b = (double)(x[i] + delta[i]);
        both += a * b;
        before += a * a;
        after += b * b;
    }
    const double norm = sqrt(before) * sqrt(after);
    if (!(norm > 0))
        return 0;
    const double c = both / norm;
    return c > 1 ? 1 : c < -1 ? -1 : c;
}

/* Does row r get its delta? Measures what it does where a rule asks. */
static bool takes_delta(const row_task *t, uint32_t r, const float *x)
{
    if (t->ffn == NULL || t->ffn->rules == NULL || t->ffn->rules[r] == NULL)
        return true;
    if (t->ffn->skip[r])
        return false;
    const uint32_t n_embd = t->f->model->info.n_embd;
    t->ffn->cosine[r] = cosine_of_step(x, t->delta + (size_t)r * n_embd, n_embd);
    return true;
}

/* x += delta, then the next norm, while the row is in the first-level cache. */
static void run_rows(void *ctx, uint32_t task, uint32_t thread)
{
    (void)thread;
    const row_task *t = ctx;
    kvs_forward *f = t->f;
    const kvs_kernels *k = f->model->kernels;
    const kvs_model_info *i = &f->model->info;
    const uint32_t end = kvs_min_u32(t->n_rows, (task + 1) * ROWS_PER_TASK);
    for (uint32_t r = task * ROWS_PER_TASK; r < end; r++) {
        float *x = f->x + (size_t)r * i->n_embd;
        if ((t->op == ROW_ADD || t->op == ROW_ADD_NORM) && takes_delta(t, r, x))
            k->add(x, t->delta + (size_t)r * i->n_embd, i->n_embd);
        if (t->op == ROW_NORM || t->op == ROW_ADD_NORM)
            k->rmsnorm(f->norm + (size_t)r * i->n_embd, x, t->norm_weight, i->n_embd, f->model->norm_eps);
        if (t->op == ROW_SWIGLU) {
            const float *gate = f->gate_up + (size_t)r * 2 * i->n_ff;
            k->swiglu(f->act + (size_t)r * i->n_ff, gate, gate + i->n_ff, i->n_ff);
        }
    }
}

static void over_rows(kvs_forward *f, row_op op, const float *norm_weight, const float *delta, uint32_t n_rows,
                      ffn_rows *ffn)
{
    row_task t = {f, op, norm_weight, delta, n_rows, ffn};
    kvs_pool_run(f->model->pool, run_rows, &t, (n_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
}

/* ---- products ---- */

static void product(kvs_forward *f, kvs_arith arith, const kvs_weight *w, const float *x, size_t x_stride, float *y,
                    size_t y_stride, uint32_t n_rows)
{
    const kvs_model *m = f->model;
    if (arith == KVS_ARITH_F32)
        kvs_matmul_f32(m->kernels, m->pool, w, x, x_stride, y, y_stride, n_rows, f->matmul_scratch);
    else
        kvs_matmul_native(m->kernels, m->pool, w, x, x_stride, y, y_stride, n_rows, f->matmul_scratch);
}

/* One product where the parts could be joined, else one for each, side by side in the same rows. */
static void joined_product(kvs_forward *f, kvs_arith arith, const kvs_weight *joined, const kvs_weight *const *parts,
                           uint32_t n_parts, float *y, size_t y_stride, uint32_t n_rows)
{
    const size_t x_stride = f->model->info.n_embd;
    if (joined->n_out != 0) {
        product(f, arith, joined, f->norm, x_stride, y, y_stride, n_rows);
        return;
    }
    for (uint32_t i = 0; i < n_parts; i++) {
        product(f, arith, parts[i], f->norm, x_stride, y, y_stride, n_rows);
        y += parts[i]->n_out;
    }
}

/* ---- feed-forward blocks ---- */

/* Puts the rows that need this layer's block side by side; how many they are. list [n_rows] gets where they stood. */
static uint32_t gather(kvs_forward *f, const ffn_rows *ffn, uint32_t n_rows, uint32_t *list)
{
    const size_t n_embd = f->model->info.n_embd;
    uint32_t n = 0;
    for (uint32_t r = 0; r < n_rows; r++) {
        if (ffn->skip[r])
            continue;
        if (n < r)
            memcpy(f->norm + n * n_embd, f->norm + r * n_embd, n_embd * sizeof(float));
        list[n++] = r;
    }
    return n;
}

/* The way back, last row first: no row is overwritten before it has moved. */
static void scatter(kvs_forward *f, const uint32_t *list, uint32_t n)
{
    const size_t n_embd = f->model->info.n_embd;
    while (n-- > 0 && list[n] > n)
        memcpy(f->norm + list[n] * n_embd, f->norm + n * n_embd, n_embd * sizeof(float));
}

/* What f->norm holds [n_rows] through the block, into f->norm. */
static void feed_forward(kvs_forward *f, kvs_arith arith, uint32_t layer, uint32_t n_rows)
{
    const kvs_layer *l = &f->model->layers[layer];
    const kvs_layer_parts *p = &f->model->parts[layer];
    const kvs_model_info *i = &f->model->info;
    const kvs_weight *const gate_up[] = {&p->gate, &p->up};
    joined_product(f, arith, &l->gate_up, gate_up, 2, f->gate_up, (size_t)2 * i->n_ff, n_rows);
    over_rows(f, ROW_SWIGLU, NULL, NULL, n_rows, NULL);
    product(f, arith, &l->ffn_down, f->act, i->n_ff, f->norm, i->n_embd, n_rows);
}

static void feed_some_forward(kvs_forward *f, kvs_arith arith, uint32_t layer, ffn_rows *ffn, uint32_t n_rows)
{
    uint32_t list[KVS_STEP_ROWS_MAX];
    for (uint32_t r = 0; r < n_rows; r++)
        if (ffn->skip[r] && layer >= ffn->rules[r]->end)
            ffn->skip[r] = 0;
    const uint32_t n = gather(f, ffn, n_rows, list);
    if (n > 0)
        feed_forward(f, arith, layer, n);
    scatter(f, list, n);
}

/* Counts, and decides who goes without the next layers' blocks. */
static void judge_blocks(ffn_rows *ffn, uint32_t layer, uint32_t n_rows)
{
    for (uint32_t r = 0; r < n_rows; r++) {
        const kvs_ffn_rule *rule = ffn->rules[r];
        if (rule == NULL)
            continue;
        kvs_ffn_count *count = &rule->counts[layer];
        if (ffn->skip[r]) {
            count->n_skipped++;
            continue;
        }
        count->n_run++;
        count->cosine_sum += ffn->cosine[r];
        ffn->skip[r] = layer >= rule->first && layer < rule->end && ffn->cosine[r] >= rule->threshold;
    }
}

/* ---- the loop ---- */

static void copy_hidden(const kvs_forward *f, const kvs_forward_wishes *wishes, uint32_t layer)
{
    const size_t n_embd = f->model->info.n_embd;
    for (uint32_t i = 0; i < wishes->n_taps; i++)
        memcpy(wishes->taps[i].out + layer * n_embd, f->x + wishes->taps[i].row * n_embd, n_embd * sizeof(float));
}

static void look(kvs_forward *f, uint32_t layer, uint32_t n_rows, kvs_forward_point point)
{
    if (f->watch.fn != NULL)
        f->watch.fn(f->watch.ctx, f, layer, n_rows, point);
}

void kvs_forward_rows(kvs_forward *f, kvs_arith arith, const int32_t *tokens, uint32_t n_rows, kvs_attend_hook attend,
                      void *ctx, const kvs_forward_wishes *wishes)
{
    const kvs_model *m = f->model;
    const kvs_model_info *i = &m->info;
    const size_t qkv_width = (size_t)(i->n_heads + 2 * i->n_kv_heads) * i->head_dim;
    const size_t att_width = (size_t)i->n_heads * i->head_dim;
    ffn_rows ffn = {.rules = wishes != NULL ? wishes->ffn : NULL};

    for (uint32_t r = 0; r < n_rows; r++)
        kvs_weight_row(&m->embd, (uint32_t)tokens[r], f->x + (size_t)r * i->n_embd);
    over_rows(f, ROW_NORM, m->layers[0].attn_norm, NULL, n_rows, NULL);
    for (uint32_t layer = 0; layer < i->n_layers; layer++) {
        const kvs_layer *l = &m->layers[layer];
        const kvs_layer_parts *p = &m->parts[layer];

        const kvs_weight *const qkv[] = {&p->q, &p->k, &p->v};
        joined_product(f, arith, &l->qkv, qkv, 3, f->qkv, qkv_width, n_rows);
        look(f, layer, n_rows, KVS_FORWARD_QKV);
        attend(ctx, f, layer, n_rows);
        look(f, layer, n_rows, KVS_FORWARD_ATT);
        product(f, arith, &l->attn_out, f->att, att_width, f->norm, i->n_embd, n_rows);
        look(f, layer, n_rows, KVS_FORWARD_MIX);
        over_rows(f, ROW_ADD_NORM, l->ffn_norm, f->norm, n_rows, NULL);

        if (ffn.rules == NULL)
            feed_forward(f, arith, layer, n_rows);
        else
            feed_some_forward(f, arith, layer, &ffn, n_rows);
        if (f->shift != NULL)
            f->shift(ctx, f, layer, n_rows);
        if (layer + 1 < i->n_layers)
            over_rows(f, ROW_ADD_NORM, m->layers[layer + 1].attn_norm, f->norm, n_rows, &ffn);
        else
            over_rows(f, ROW_ADD, NULL, f->norm, n_rows, &ffn);
        if (ffn.rules != NULL)
            judge_blocks(&ffn, layer, n_rows);
        if (wishes != NULL)
            copy_hidden(f, wishes, layer);
    }
}

void kvs_forward_logits(kvs_forward *f, kvs_arith arith, const uint32_t *rows, uint32_t n)
{
    const kvs_model *m = f->model;
    const uint32_t n_embd = m->info.n_embd;
    for (uint32_t r = 0; r < n; r++)
        m->kernels->rmsnorm(f->norm + (size_t)r * n_embd, f->x + (size_t)rows[r] * n_embd, m->out_norm, n_embd,
                            m->norm_eps);
    product(f, arith, &m->head, f->norm, n_embd, f->logits, m->info.vocab_size, n);
}

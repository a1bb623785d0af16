/* BaKlaVa's profile (Gulhan et al., arXiv:2502.13176): how much attention changes what goes through it. The importance
 * of a head is 1 - the mean cosine of its input and its output, of a layer 1 - that of the hidden state before and after
 * attention; then a few parameters of the shares are searched for the least perplexity of StreamingLLM on the texts.
 * Reconstructed, as the paper's text leaves it open: a head's input is its token's own value vector, which is what comes
 * out if it looks at nothing else; a KV head has the mean of its query heads; a head's worth is the mean of its own and
 * its layer's importance, each scaled to [0, 1]; heads below the low and above the high border are two classes of fewer and
 * more slots. The grid is ours, and has even shares in it, so that the choice is never worse than they are on these
 * texts. Of several texts the last is not used to choose, but told. */
#include "eval/profile_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    double low, high, few, many;
} grid[] = {
    {0, 0, 1, 1},    {0.25, 0, 0.5, 1},    {0.5, 0, 0.5, 1},    {0.25, 0, 0.25, 1},    {0.5, 0, 0.25, 1},
    {0, 0.25, 1, 2}, {0.25, 0.25, 0.5, 2}, {0.5, 0.25, 0.5, 2}, {0.25, 0.25, 0.25, 2}, {0.5, 0.25, 0.25, 2},
};

enum { N_GRID = sizeof grid / sizeof *grid };

/* ---- importance ------------------------------------------------------------------------------------------------- */

static void add_cosines(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows, kvs_forward_point point)
{
    kvs_profile_made *const out = ctx;
    const kvs_model_info *const i = &f->model->info;
    const uint32_t dh = i->head_dim, group = i->n_heads / i->n_kv_heads;
    for (uint32_t r = 0; r < n_rows; r++) {
        const float *const v = f->qkv + r * f->qkv_width + (size_t)(i->n_heads + i->n_kv_heads) * dh;
        const float *const att = f->att + (size_t)r * i->n_heads * dh;
        for (uint32_t h = 0; point == KVS_FORWARD_ATT && h < i->n_heads; h++)
            out->head_importance[layer * i->n_kv_heads + h / group] +=
                kvs_profile_cosine(v + (size_t)(h / group) * dh, att + (size_t)h * dh, dh) / group;
        if (point == KVS_FORWARD_MIX)
            out->layer_importance[layer] +=
                kvs_cosine_after(f->x + (size_t)r * i->n_embd, f->norm + (size_t)r * i->n_embd, i->n_embd);
    }
}

static kvs_status measure_importance(kvs_profile_run *r, uint32_t n_texts)
{
    kvs_profile_made *const out = r->out;
    const uint32_t n_heads = out->n_layers * out->n_kv_heads;
    uint64_t n = 0;
    for (uint32_t t = 0; t < n_texts; t++) {
        kvs_session *s;
        KVS_TRY(kvs_profile_session(r, "baseline", r->texts[t].n_tokens, NULL, &s));
        const kvs_status status =
            kvs_profile_extend(r, s, r->texts[t].tokens, r->texts[t].n_tokens, (kvs_forward_watch){add_cosines, out});
        kvs_session_free(&s);
        KVS_TRY(status);
        n += r->texts[t].n_tokens;
    }
    for (uint32_t h = 0; h < n_heads; h++)
        out->head_importance[h] = 1 - out->head_importance[h] / (double)n;
    for (uint32_t l = 0; l < out->n_layers; l++)
        out->layer_importance[l] = 1 - out->layer_importance[l] / (double)n;
    return KVS_OK;
}

/* x scaled to [0, 1] over all n; 0 where all are equal. */
static double scaled(const double *x, uint32_t n, uint32_t i)
{
    double least = x[0], most = x[0];
    for (uint32_t k = 1; k < n; k++) {
        least = fmin(least, x[k]);
        most = fmax(most, x[k]);
    }
    return most > least ? (x[i] - least) / (most - least) : 0;
}

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void kvs_profile_classes(const double *worth, uint32_t n, double low, double high, double few, double many,
                         double *weights)
{
    memcpy(weights, worth, n * sizeof *weights);
    qsort(weights, n, sizeof *weights, by_size);
    const uint32_t n_low = (uint32_t)(low * n), n_high = (uint32_t)(high * n);
    const double below = weights[n_low < n ? n_low : n - 1], above = weights[n_high < n ? n - 1 - n_high : 0];
    for (uint32_t h = 0; h < n; h++)
        weights[h] = worth[h] < below ? few : worth[h] > above ? many : 1;
}

/* ---- search ----------------------------------------------------------------------------------------------------- */

typedef struct nll {
    const int32_t *next; /* of the first row of this step */
    uint32_t n_next;     /* rows that have a next token */
    const kvs_model *m;
    double sum;
} nll;

static bool add_nll(void *ctx, uint32_t row, const float *logits)
{
    nll *const x = ctx;
    if (row < x->n_next)
        x->sum += x->m->kernels->logsumexp(logits, x->m->info.vocab_size, NULL) - (double)logits[x->next[row]];
    return true;
}

static kvs_status sum_nll(kvs_profile_run *r, kvs_session *s, const kvs_profile_text *text, nll *x)
{
    uint8_t all[KVS_PROFILE_BLOCK];
    memset(all, 1, sizeof all);
    for (uint32_t at = 0; at < text->n_tokens; at += KVS_PROFILE_BLOCK) {
        const uint32_t n = kvs_min_u32(KVS_PROFILE_BLOCK, text->n_tokens - at);
        if (r->opt->cancel != NULL && *r->opt->cancel != 0)
            return kvs_error_set(r->err, KVS_ECANCELLED, "interrupted");
        x->next = text->tokens + at + 1;
        x->n_next = kvs_min_u32(n, text->n_tokens - at - 1);
        kvs_run run = {
            .session = s, .tokens = text->tokens + at, .n_tokens = n, .on_logits = add_nll, .want = all, .ctx = x};
        KVS_TRY(kvs_step(&run, 1, r->err));
        r->n_done += n;
        if (r->opt->on_progress != NULL)
            r->opt->on_progress(r->opt->ctx, r->n_done, r->n_total);
    }
    return KVS_OK;
}

/* Mean over texts [begin, end) together, a token each. */
static kvs_status measure_nll(kvs_profile_run *r, const double *weights, uint32_t begin, uint32_t end, double *out)
{
    const uint32_t n_layers = r->out->n_layers, n_kv_heads = r->out->n_kv_heads;
    const kvs_profile profile = {.n_layers = n_layers,
                                 .n_kv_heads = n_kv_heads,
                                 .n_tables = 1,
                                 .heads = weights,
                                 .block = (double *)(uintptr_t)weights};
    nll x = {.m = r->m};
    uint64_t n = 0;
    for (uint32_t t = begin; t < end; t++) {
        kvs_session *s;
        KVS_TRY(kvs_profile_session(r, "baklava", r->out->budget_tokens, &profile, &s));
        const kvs_status status = sum_nll(r, s, &r->texts[t], &x);
        kvs_session_free(&s);
        KVS_TRY(status);
        n += r->texts[t].n_tokens - 1;
    }
    *out = x.sum / (double)n;
    return KVS_OK;
}

static void set_weights(const double *worth, uint32_t n, uint32_t choice, double *weights)
{
    kvs_profile_classes(worth, n, grid[choice].low, grid[choice].high, grid[choice].few, grid[choice].many, weights);
}

static kvs_status search(kvs_profile_run *r, uint32_t n_used, const double *worth)
{
    kvs_profile_made *const out = r->out;
    const uint32_t n = out->n_layers * out->n_kv_heads;
    uint32_t best = 0;
    for (uint32_t c = 0; c < N_GRID; c++) {
        double x;
        set_weights(worth, n, c, out->heads);
        KVS_TRY(measure_nll(r, out->heads, 0, n_used, &x));
        if (c == 0)
            out->nll_even = out->nll_chosen = x;
        if (x < out->nll_chosen) {
            out->nll_chosen = x;
            best = c;
        }
    }
    if (n_used < r->n_texts) {
        set_weights(worth, n, 0, out->heads);
        KVS_TRY(measure_nll(r, out->heads, n_used, r->n_texts, &out->held_nll_even));
        set_weights(worth, n, best, out->heads);
        KVS_TRY(measure_nll(r, out->heads, n_used, r->n_texts, &out->held_nll_chosen));
    }
    set_weights(worth, n, best, out->heads);
    out->n_tried = N_GRID;
    out->low = grid[best].low;
    out->high = grid[best].high;
    out->few = grid[best].few;
    out->many = grid[best].many;
    return KVS_OK;
}

kvs_status kvs_profile_baklava(kvs_profile_run *r)
{
    kvs_profile_made *const out = r->out;
    const uint32_t n = out->n_layers * out->n_kv_heads, shortest = kvs_profile_shortest(r);
    const uint32_t n_used = r->n_texts > 1 ? r->n_texts - 1 : 1;
    out->budget_tokens = r->opt->budget_tokens != 0 ? r->opt->budget_tokens : shortest / 4;
    if (out->budget_tokens < 64 || shortest <= out->budget_tokens)
        return kvs_error_set(
            r->err, KVS_EINVAL,
            "shares are searched for a budget of %u tokens and the shortest text has %u: it must be at "
            "least 64 and shorter than every text",
            out->budget_tokens, shortest);
    for (uint32_t t = 0; t < r->n_texts; t++)
        r->n_total += (t < n_used ? 1 + (uint64_t)N_GRID : 2) * r->texts[t].n_tokens;
    out->head_importance = calloc(n, sizeof *out->head_importance);
    out->layer_importance = calloc(out->n_layers, sizeof *out->layer_importance);
    double *const worth = calloc(n, sizeof *worth);
    kvs_status status = KVS_OK;
    if (out->head_importance == NULL || out->layer_importance == NULL || worth == NULL)
        status = kvs_error_set(r->err, KVS_ENOMEM, "no memory for the importance of %u heads", n);
    if (status == KVS_OK)
        status = measure_importance(r, n_used);
    if (status == KVS_OK) {
        for (uint32_t h = 0; h < n; h++)
            worth[h] = (scaled(out->head_importance, n, h) +
                        scaled(out->layer_importance, out->n_layers, h / out->n_kv_heads)) /
                       2;
        status = search(r, n_used, worth);
    }
    free(worth);
    return status;
}

/* EpiCache's sensitivity of layers (arXiv:2509.17396, apple/ml-epicache): the mean cosine between a layer's keys when
 * attention is full and when it sees the first 128 tokens, its own block and the newer half of the block before only. Keys
 * are compared a window of 100 tokens at once, flattened, and means run over windows and heads. The confined run is a
 * session that is cut to that at the beginning of each block, with true positions; keys are compared before rotation, which
 * both runs share. Blocks are of 4096 tokens as theirs where texts are long enough. */
#include "eval/profile_internal.h"

#include <stdlib.h>
#include <string.h>

enum { SINKS = 128, WINDOW = 100, BLOCK = 4096 };

typedef struct window {
    float *keys; /* [n_layers][n_kv_heads][WINDOW][head_dim] of one run */
    uint32_t n;  /* rows there, counted at the last layer */
} window;

static void copy_keys(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows, kvs_forward_point point)
{
    window *const w = ctx;
    const kvs_model_info *const i = &f->model->info;
    if (point != KVS_FORWARD_QKV)
        return;
    for (uint32_t h = 0; h < i->n_kv_heads; h++) {
        float *const at = w->keys + ((size_t)layer * i->n_kv_heads + h) * WINDOW * i->head_dim;
        for (uint32_t r = 0; r < n_rows; r++)
            memcpy(at + (size_t)(w->n + r) * i->head_dim,
                   f->qkv + r * f->qkv_width + (size_t)(i->n_heads + h) * i->head_dim, i->head_dim * sizeof *at);
    }
    if (layer + 1 == i->n_layers)
        w->n += n_rows;
}

static void compare(kvs_profile_run *r, const window *a, const window *b)
{
    const kvs_model_info *const i = &r->m->info;
    for (uint32_t h = 0; h < i->n_layers * i->n_kv_heads; h++) {
        const size_t at = (size_t)h * WINDOW * i->head_dim;
        r->out->layers[h / i->n_kv_heads] += kvs_profile_cosine(a->keys + at, b->keys + at, a->n * i->head_dim);
    }
}

/* Appends the next n tokens to the confined run; at a block's beginning it forgets first. */
static kvs_status extend_confined(kvs_profile_run *r, kvs_session *s, const int32_t *tokens, uint32_t n,
                                  kvs_forward_watch watch)
{
    const uint32_t block = r->out->block_tokens;
    for (uint32_t at = 0; at < n;) {
        const uint32_t said = (uint32_t)kvs_session_n_tokens(s);
        if (said > 0 && said % block == 0)
            KVS_TRY(kvs_session_evict(s, SINKS + block / 2, r->err));
        const uint32_t step = kvs_min_u32(n - at, block - said % block);
        KVS_TRY(kvs_profile_extend(r, s, tokens + at, step, watch));
        at += step;
    }
    return KVS_OK;
}

static kvs_status compare_text(kvs_profile_run *r, const kvs_profile_text *text, kvs_session *full,
                               kvs_session *confined, window *a, window *b, uint32_t *n_windows)
{
    for (uint32_t at = 0; at < text->n_tokens; at += WINDOW) {
        const uint32_t n = kvs_min_u32(WINDOW, text->n_tokens - at);
        a->n = b->n = 0;
        KVS_TRY(kvs_profile_extend(r, full, text->tokens + at, n, (kvs_forward_watch){copy_keys, a}));
        KVS_TRY(extend_confined(r, confined, text->tokens + at, n, (kvs_forward_watch){copy_keys, b}));
        compare(r, a, b);
        ++*n_windows;
    }
    return KVS_OK;
}

static kvs_status measure_text(kvs_profile_run *r, const kvs_profile_text *text, window *a, window *b,
                               uint32_t *n_windows)
{
    kvs_session *full = NULL, *confined = NULL;
    kvs_status status = kvs_profile_session(r, "baseline", text->n_tokens, NULL, &full);
    if (status == KVS_OK)
        status =
            kvs_profile_session(r, "streaming:sinks=128 +position=keep +protect=none", text->n_tokens, NULL, &confined);
    if (status == KVS_OK)
        status = compare_text(r, text, full, confined, a, b, n_windows);
    kvs_session_free(&full);
    kvs_session_free(&confined);
    return status;
}

kvs_status kvs_profile_sensitivity(kvs_profile_run *r)
{
    const kvs_model_info *const i = &r->m->info;
    const uint32_t shortest = kvs_profile_shortest(r), wanted = r->opt->block_tokens;
    const uint32_t block = wanted != 0 ? wanted : kvs_min_u32(BLOCK, shortest / 4);
    if (block <= 2 * SINKS || shortest <= 2 * block)
        return kvs_error_set(
            r->err, KVS_EINVAL,
            "blocks of %u tokens with a shortest text of %u: a block must have more than %d, and every "
            "text more than two of them",
            block, shortest, 2 * SINKS);
    r->out->block_tokens = block;
    for (uint32_t t = 0; t < r->n_texts; t++)
        r->n_total += 2 * (uint64_t)r->texts[t].n_tokens;
    const size_t n = (size_t)i->n_layers * i->n_kv_heads * WINDOW * i->head_dim;
    window a = {.keys = calloc(n, sizeof(float))}, b = {.keys = calloc(n, sizeof(float))};
    kvs_status status = a.keys != NULL && b.keys != NULL
                            ? KVS_OK
                            : kvs_error_set(r->err, KVS_ENOMEM, "no memory for keys of %d tokens", WINDOW);
    uint32_t n_windows = 0;
    for (uint32_t t = 0; t < r->n_texts && status == KVS_OK; t++)
        status = measure_text(r, &r->texts[t], &a, &b, &n_windows);
    for (uint32_t l = 0; l < i->n_layers; l++)
        r->out->layers[l] /= (double)kvs_max_u32(n_windows, 1) * i->n_kv_heads;
    free(a.keys);
    free(b.keys);
    return status;
}

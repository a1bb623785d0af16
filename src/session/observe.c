/* The query log. */
#include "session/observe.h"

#include "cache/cache.h"

#include <string.h>

static size_t n_heads_of(const kvs_query_log *log)
{
    return (size_t)log->n_layers * log->n_kv_heads;
}

static size_t row_floats(const kvs_query_log *log)
{
    return (size_t)log->group * log->head_dim;
}

static size_t n_row_floats(const kvs_query_log *log)
{
    return n_heads_of(log) * log->n_rows * row_floats(log);
}

static size_t n_sums(const kvs_query_log *log)
{
    return log->sum == NULL ? 0 : n_heads_of(log) * row_floats(log);
}

kvs_status kvs_query_log_create(kvs_query_log *log, const kvs_allocator *a, uint32_t n_rows, bool stats, kvs_error *err)
{
    log->n_rows = n_rows;
    const size_t sums = n_heads_of(log) * row_floats(log);
    bool ok = true;
    if (n_rows != 0)
        ok = (log->rows = kvs_alloc(a, n_row_floats(log), sizeof *log->rows)) != NULL;
    if (ok && stats)
        ok = (log->sum = kvs_alloc(a, sums, sizeof *log->sum)) != NULL &&
             (log->square = kvs_alloc(a, sums * log->head_dim, sizeof *log->square)) != NULL;
    if (ok && log->mixes)
        ok = (log->mixed = kvs_alloc(a, 2 * (size_t)log->n_layers, sizeof *log->mixed)) != NULL;
    if (!ok) {
        kvs_query_log_free(log, a);
        return kvs_error_set(err, KVS_ENOMEM, "no memory to remember queries of %u rows", n_rows);
    }
    log->bytes = n_row_floats(log) * sizeof *log->rows + n_sums(log) * (1 + log->head_dim) * sizeof *log->sum +
                 (log->mixes ? 2 * (size_t)log->n_layers * sizeof *log->mixed : 0);
    return KVS_OK;
}

void kvs_query_log_free(kvs_query_log *log, const kvs_allocator *a)
{
    kvs_free(a, log->rows);
    kvs_free(a, log->sum);
    kvs_free(a, log->square);
    kvs_free(a, log->mixed);
    *log = (kvs_query_log){0};
}

static float *row_at(const kvs_query_log *log, uint32_t layer, uint32_t kv_head, uint64_t token_idx)
{
    const size_t head = (size_t)layer * log->n_kv_heads + kv_head;
    return log->rows + (head * log->n_rows + (size_t)(token_idx % log->n_rows)) * row_floats(log);
}

const float *kvs_query_log_row(const kvs_query_log *log, uint32_t layer, uint32_t kv_head, uint64_t token_idx)
{
    return row_at(log, layer, kv_head, token_idx);
}

/* Two columns at a time: the compiler finds no vectors here by itself. */
typedef double d2 __attribute__((vector_size(16), aligned(8), may_alias));

/* One chain an element, rows in the order they were said, so that chunks and threads cannot be seen. */
static void add_moments(double *restrict sum, double *restrict square, const float *restrict q, uint32_t n)
{
    double x[KVS_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < n; i++)
        x[i] = (double)q[i];
    for (uint32_t i = 0; i < n; i++) {
        double *const restrict row = square + (size_t)i * n;
        sum[i] += x[i];
        const d2 w = {x[i], x[i]};
        uint32_t j = 0;
        for (; j + 4 <= i + 1; j += 4) {
            d2 *const out = (d2 *)(void *)(row + j);
            const d2 *const by = (const d2 *)(const void *)(x + j);
            out[0] += w * by[0];
            out[1] += w * by[1];
        }
        for (; j <= i; j++)
            row[j] += x[i] * x[j];
    }
}

void kvs_query_log_write(kvs_query_log *log, uint32_t layer, uint32_t kv_head, uint64_t token_idx, const float *q)
{
    if (log->n_rows != 0)
        memcpy(row_at(log, layer, kv_head, token_idx), q, row_floats(log) * sizeof *q);
}

void kvs_query_log_count(kvs_query_log *log, uint32_t layer, uint32_t kv_head, uint64_t token_idx, const float *q)
{
    const uint32_t n = log->head_dim;
    if (log->sum == NULL || token_idx < KVS_QUERY_STATS_SKIP)
        return;
    const size_t head = (size_t)layer * log->n_kv_heads + kv_head;
    for (uint32_t g = 0; g < log->group; g++) {
        const size_t at = head * log->group + g;
        add_moments(log->sum + at * n, log->square + at * n * n, q + (size_t)g * n, n);
    }
}

void kvs_query_log_mix(kvs_query_log *log, uint32_t layer, double cosine)
{
    log->mixed[layer] += cosine;
}

const double *kvs_query_log_mixed(kvs_query_log *log)
{
    if (log->mixed == NULL || log->n_mixed == 0)
        return NULL;
    double *const mean = log->mixed + log->n_layers;
    for (uint32_t l = 0; l < log->n_layers; l++)
        mean[l] = log->mixed[l] / (double)log->n_mixed;
    return mean;
}

void kvs_query_log_advance(kvs_query_log *log, uint64_t n_tokens, uint32_t n)
{
    log->n_mixed += log->mixed != NULL ? n : 0;
    log->n_valid = kvs_min_u32(log->n_rows, log->n_valid + n);
    const uint64_t first = n_tokens - n < KVS_QUERY_STATS_SKIP ? KVS_QUERY_STATS_SKIP : n_tokens - n;
    log->n_stats += n_tokens > first ? n_tokens - first : 0;
}

void kvs_query_log_look_ahead(kvs_query_log *log, uint32_t n)
{
    log->n_ahead = n;
    log->n_valid = kvs_min_u32(log->n_rows, log->n_valid + n);
}

void kvs_query_log_drop(kvs_query_log *log, uint64_t n)
{
    log->n_valid = n < log->n_valid ? log->n_valid - (uint32_t)n : 0;
}

void kvs_query_log_copy(kvs_query_log *log, const kvs_query_log *from)
{
    if (log->n_rows != 0 && log->n_rows == from->n_rows) {
        memcpy(log->rows, from->rows, n_row_floats(log) * sizeof *log->rows);
        log->n_valid = from->n_valid;
    }
    if (log->sum != NULL && from->sum != NULL) {
        memcpy(log->sum, from->sum, n_sums(log) * sizeof *log->sum);
        memcpy(log->square, from->square, n_sums(log) * log->head_dim * sizeof *log->square);
        log->n_stats = from->n_stats;
    }
    if (log->mixed != NULL && from->mixed != NULL) {
        memcpy(log->mixed, from->mixed, log->n_layers * sizeof *log->mixed);
        log->n_mixed = from->n_mixed;
    }
}

/* ---- saves ---- */

static uint8_t *put(uint8_t *at, const void *x, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = 0;
        if (size == sizeof(uint32_t)) {
            uint32_t half;
            memcpy(&half, (const uint8_t *)x + i * size, size);
            bits = half;
        } else {
            memcpy(&bits, (const uint8_t *)x + i * size, size);
        }
        for (size_t b = 0; b < size; b++)
            *at++ = (uint8_t)(bits >> (8 * b));
    }
    return at;
}

static const uint8_t *get(const uint8_t *at, void *x, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = 0;
        for (size_t b = 0; b < size; b++)
            bits |= (uint64_t)*at++ << (8 * b);
        const uint32_t half = (uint32_t)bits;
        memcpy((uint8_t *)x + i * size, size == sizeof half ? (const void *)&half : (const void *)&bits, size);
    }
    return at;
}

size_t kvs_query_log_bytes(const kvs_query_log *log)
{
    return (size_t)log->bytes + sizeof(uint32_t) + sizeof(uint64_t) + (log->mixes ? sizeof(uint64_t) : 0);
}

void kvs_query_log_save(const kvs_query_log *log, uint8_t *buf)
{
    buf = put(buf, &log->n_valid, 1, sizeof log->n_valid);
    buf = put(buf, &log->n_stats, 1, sizeof log->n_stats);
    buf = put(buf, log->rows, n_row_floats(log), sizeof *log->rows);
    buf = put(buf, log->sum, n_sums(log), sizeof *log->sum);
    buf = put(buf, log->square, n_sums(log) * log->head_dim, sizeof *log->square);
    if (log->mixes) {
        buf = put(buf, &log->n_mixed, 1, sizeof log->n_mixed);
        put(buf, log->mixed, 2 * (size_t)log->n_layers, sizeof *log->mixed);
    }
}

void kvs_query_log_load(kvs_query_log *log, const uint8_t *buf)
{
    buf = get(buf, &log->n_valid, 1, sizeof log->n_valid);
    buf = get(buf, &log->n_stats, 1, sizeof log->n_stats);
    buf = get(buf, log->rows, n_row_floats(log), sizeof *log->rows);
    buf = get(buf, log->sum, n_sums(log), sizeof *log->sum);
    buf = get(buf, log->square, n_sums(log) * log->head_dim, sizeof *log->square);
    if (log->mixes) {
        buf = get(buf, &log->n_mixed, 1, sizeof log->n_mixed);
        get(buf, log->mixed, 2 * (size_t)log->n_layers, sizeof *log->mixed);
    }
    log->n_valid = kvs_min_u32(log->n_valid, log->n_rows);
}

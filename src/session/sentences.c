/* The log of sentences. */
#include "session/sentences.h"

#include <math.h>
#include <string.h>

/* ---- where sentences end ---- */

enum { ROLES = KVS_TOKEN_SYSTEM | KVS_TOKEN_USER | KVS_TOKEN_ASSISTANT };

bool kvs_segmenter_breaks(const kvs_segmenter *g, uint8_t flags)
{
    return g->n_open > 0 && ((flags & KVS_TOKEN_TEMPLATE) != 0 || (flags & ROLES) != g->role);
}

kvs_segment kvs_segmenter_take(kvs_segmenter *g, const uint64_t *ends, int32_t token, uint8_t flags)
{
    if (flags & KVS_TOKEN_TEMPLATE)
        return KVS_SEGMENT_OUTSIDE;
    g->role = flags & ROLES;
    g->n_open++;
    const bool marked = (ends[token / 64] >> (token % 64) & 1) != 0;
    return g->n_open >= g->longest || (marked && g->n_open >= g->shortest) ? KVS_SEGMENT_ENDS : KVS_SEGMENT_GOES_ON;
}

/* ---- create ---- */

static void *part(uint8_t *base, size_t *at, size_t n, size_t size)
{
    void *const here = base == NULL ? NULL : base + *at;
    *at += kvs_round_up(n * size, KVS_ALIGN);
    return here;
}

static size_t lay_out(kvs_sentence_log *log, uint8_t *base)
{
    size_t at = 0;
    log->sum = part(base, &at, log->n_embd, sizeof *log->sum);
    log->sentences = part(base, &at, log->capacity, sizeof *log->sentences);
    log->meanings = part(base, &at, (size_t)log->capacity * log->n_embd, sizeof *log->meanings);
    log->tokens = part(base, &at, log->n_ring, sizeof *log->tokens);
    log->flags = part(base, &at, log->n_ring, sizeof *log->flags);
    log->hidden = part(base, &at, (size_t)log->n_ring * log->n_embd, sizeof *log->hidden);
    return at;
}

kvs_status kvs_sentence_log_create(kvs_sentence_log *log, const kvs_allocator *a, uint32_t n_slots, kvs_error *err)
{
    const uint32_t between = n_slots / log->segmenter.shortest + 2;
    log->capacity = 2 * between;
    log->n_ring = n_slots + log->segmenter.longest;
    log->bytes = lay_out(log, NULL);
    log->block = kvs_alloc(a, 1, log->bytes);
    if (log->block == NULL) {
        *log = (kvs_sentence_log){0};
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the hidden states of sentences over %u slots", n_slots);
    }
    lay_out(log, log->block);
    return KVS_OK;
}

void kvs_sentence_log_free(kvs_sentence_log *log, const kvs_allocator *a)
{
    kvs_free(a, log->block);
    *log = (kvs_sentence_log){0};
}

/* ---- adding ---- */

static void forget_oldest(kvs_sentence_log *log, uint32_t n)
{
    log->n -= n;
    memmove(log->sentences, log->sentences + n, log->n * sizeof *log->sentences);
    memmove(log->meanings, log->meanings + (size_t)n * log->n_embd, (size_t)log->n * log->n_embd * sizeof(float));
}

static double product(const float *a, const float *b, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

static void mark_repeated(kvs_sentence_log *log, int32_t end)
{
    const float *const newest = log->meanings + (size_t)(log->n - 1) * log->n_embd;
    for (uint32_t i = 0; log->threshold <= 1 && i + 1 < log->n; i++)
        if (log->sentences[i].repeated_at == 0 &&
            product(log->meanings + (size_t)i * log->n_embd, newest, log->n_embd) >= (double)log->threshold)
            log->sentences[i].repeated_at = end;
}

/* The open sentence ends before pos `end`; one that is too short is none. */
static void close_sentence(kvs_sentence_log *log, int32_t end)
{
    const uint32_t n_open = log->segmenter.n_open;
    log->segmenter.n_open = 0;
    if (n_open < log->segmenter.shortest)
        return;
    if (log->n == log->capacity)
        forget_oldest(log, 1);
    float *const meaning = log->meanings + (size_t)log->n * log->n_embd;
    double square = 0;
    for (uint32_t i = 0; i < log->n_embd; i++)
        square += log->sum[i] * log->sum[i];
    const double scale = square > 0 ? 1 / sqrt(square) : 0;
    for (uint32_t i = 0; i < log->n_embd; i++)
        meaning[i] = (float)(log->sum[i] * scale);
    log->sentences[log->n++] = (kvs_sentence){.begin = end - (int32_t)n_open, .end = end};
    mark_repeated(log, end);
}

/* Token `at`, which the rings hold. */
static void take(kvs_sentence_log *log, uint64_t at)
{
    const size_t slot = (size_t)(at % log->n_ring);
    const float *const hidden = log->hidden + slot * log->n_embd;
    if (kvs_segmenter_breaks(&log->segmenter, log->flags[slot]))
        close_sentence(log, (int32_t)at);
    if (log->segmenter.n_open == 0)
        memset(log->sum, 0, log->n_embd * sizeof *log->sum);
    const kvs_segment what = kvs_segmenter_take(&log->segmenter, log->ends, log->tokens[slot], log->flags[slot]);
    if (what == KVS_SEGMENT_OUTSIDE)
        return;
    for (uint32_t i = 0; i < log->n_embd; i++)
        log->sum[i] += (double)hidden[i];
    if (what == KVS_SEGMENT_ENDS)
        close_sentence(log, (int32_t)at + 1);
}

void kvs_sentence_log_add(kvs_sentence_log *log, int32_t token, uint8_t flags, const float *hidden)
{
    const size_t slot = (size_t)(log->n_tokens % log->n_ring);
    log->tokens[slot] = token;
    log->flags[slot] = flags;
    memcpy(log->hidden + slot * log->n_embd, hidden, log->n_embd * sizeof *hidden);
    take(log, log->n_tokens++);
    log->n_valid = kvs_min_u32(log->n_ring, log->n_valid + 1);
}

/* ---- taking back ---- */

/* The open sentence from the tokens behind the last one that is known to have ended. */
static void reopen(kvs_sentence_log *log)
{
    const uint64_t oldest = log->n_tokens - log->n_valid;
    const uint64_t ended = log->n == 0 ? 0 : (uint64_t)log->sentences[log->n - 1].end;
    log->segmenter.n_open = 0;
    for (uint64_t at = ended > oldest ? ended : oldest; at < log->n_tokens; at++)
        take(log, at);
}

void kvs_sentence_log_truncate(kvs_sentence_log *log, uint64_t n_tokens)
{
    if (log->ends == NULL)
        return;
    const uint64_t dropped = log->n_tokens - n_tokens;
    /* One that ends here may have been ended by a token that is gone: reopen() says. */
    while (log->n > 0 && (uint64_t)log->sentences[log->n - 1].end >= n_tokens)
        log->n--;
    for (uint32_t i = 0; i < log->n; i++)
        if (log->sentences[i].repeated_at >= (int64_t)n_tokens)
            log->sentences[i].repeated_at = 0;
    log->n_valid = dropped < log->n_valid ? log->n_valid - (uint32_t)dropped : 0;
    log->n_tokens = n_tokens;
    reopen(log);
}

void kvs_sentence_log_evicted(kvs_sentence_log *log)
{
    if (log->n > log->capacity / 2)
        forget_oldest(log, log->n - log->capacity / 2);
}

void kvs_sentence_log_copy(kvs_sentence_log *log, const kvs_sentence_log *from, uint64_t n_tokens)
{
    if (log->ends == NULL)
        return;
    log->n = log->n_valid = 0;
    log->n_tokens = n_tokens;
    if (from->ends != NULL && from->n_embd == log->n_embd && from->threshold == log->threshold &&
        from->segmenter.shortest == log->segmenter.shortest && from->segmenter.longest == log->segmenter.longest) {
        log->n = kvs_min_u32(from->n, log->capacity);
        log->n_valid = kvs_min_u32(from->n_valid, log->n_ring);
        const uint32_t first = from->n - log->n;
        memcpy(log->sentences, from->sentences + first, log->n * sizeof *log->sentences);
        memcpy(log->meanings, from->meanings + (size_t)first * log->n_embd,
               (size_t)log->n * log->n_embd * sizeof(float));
        for (uint64_t at = n_tokens - log->n_valid; at < n_tokens; at++) {
            const size_t to = (size_t)(at % log->n_ring), of = (size_t)(at % from->n_ring);
            log->tokens[to] = from->tokens[of];
            log->flags[to] = from->flags[of];
            memcpy(log->hidden + to * log->n_embd, from->hidden + of * log->n_embd, log->n_embd * sizeof(float));
        }
    }
    reopen(log);
}

/* ---- choosing ---- */

uint32_t kvs_sentence_log_mark(const kvs_sentence_log *log, const kvs_policy_view *view, float *scores, uint32_t n_keep)
{
    uint32_t n_marked = 0, at = 0;
    for (uint32_t i = 0; i < log->n; i++) {
        const kvs_sentence *const x = &log->sentences[i];
        while (at < view->n_slots && view->pos[at] < x->begin)
            at++;
        uint32_t end = at;
        bool stays = x->repeated_at == 0;
        for (; end < view->n_slots && view->pos[end] < x->end; end++)
            stays |= isinf(scores[end]) && scores[end] > 0;
        if (!stays && n_marked + (end - at) < view->n_slots) {
            n_marked += end - at;
            for (uint32_t k = at; k < end; k++)
                scores[k] = NAN;
        }
        at = end;
    }
    return kvs_min_u32(n_keep, view->n_slots - n_marked);
}

/* ---- saves ---- */

enum { HEAD_BYTES = 16, SENTENCE_BYTES = 12, RING_BYTES = 5 };

static uint8_t *put(uint8_t *at, uint64_t x, int n_bytes)
{
    for (int b = 0; b < n_bytes; b++)
        *at++ = (uint8_t)(x >> (8 * b));
    return at;
}

static uint64_t get(const uint8_t **at, int n_bytes)
{
    uint64_t x = 0;
    for (int b = 0; b < n_bytes; b++)
        x |= (uint64_t) * (*at)++ << (8 * b);
    return x;
}

static uint8_t *put_floats(uint8_t *at, const float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        at = put(at, bits, 4);
    }
    return at;
}

static void get_floats(const uint8_t **at, float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)get(at, 4);
        memcpy(x + i, &bits, sizeof bits);
    }
}

static uint64_t bytes_of(const kvs_sentence_log *log, uint64_t n, uint64_t n_valid)
{
    const uint64_t row = (uint64_t)log->n_embd * 4;
    return HEAD_BYTES + n * (SENTENCE_BYTES + row) + n_valid * (RING_BYTES + row);
}

size_t kvs_sentence_log_bytes(const kvs_sentence_log *log)
{
    return log->ends == NULL ? 0 : (size_t)bytes_of(log, log->n, log->n_valid);
}

void kvs_sentence_log_save(const kvs_sentence_log *log, uint8_t *buf)
{
    if (log->ends == NULL)
        return;
    buf = put(buf, log->n, 4);
    buf = put(buf, log->n_valid, 4);
    buf = put(buf, log->n_tokens, 8);
    for (uint32_t i = 0; i < log->n; i++) {
        const kvs_sentence *const x = &log->sentences[i];
        buf = put(buf, (uint32_t)x->begin, 4);
        buf = put(buf, (uint32_t)x->end, 4);
        buf = put(buf, (uint32_t)x->repeated_at, 4);
        buf = put_floats(buf, log->meanings + (size_t)i * log->n_embd, log->n_embd);
    }
    for (uint64_t at = log->n_tokens - log->n_valid; at < log->n_tokens; at++) {
        const size_t slot = (size_t)(at % log->n_ring);
        buf = put(buf, (uint32_t)log->tokens[slot], 4);
        buf = put(buf, log->flags[slot], 1);
        buf = put_floats(buf, log->hidden + slot * log->n_embd, log->n_embd);
    }
}

kvs_status kvs_sentence_log_measure(const kvs_sentence_log *log, const uint8_t *buf, size_t avail, uint64_t n_tokens,
                                    size_t *n_bytes, kvs_error *err)
{
    *n_bytes = 0;
    if (log->ends == NULL)
        return KVS_OK;
    if (avail < HEAD_BYTES)
        return kvs_error_set(err, KVS_EFORMAT, "saved session is truncated: no sentences");
    const uint64_t n = get(&buf, 4), n_valid = get(&buf, 4), seen = get(&buf, 8), size = bytes_of(log, n, n_valid);
    if (size > avail || seen != n_tokens || n_valid > n_tokens)
        return kvs_error_set(err, KVS_EFORMAT, "saved session is damaged: %llu sentences, %llu of %llu tokens",
                             (unsigned long long)n, (unsigned long long)n_valid, (unsigned long long)n_tokens);
    *n_bytes = (size_t)size;
    int64_t last = 0;
    for (uint64_t i = 0; i < n; i++, buf += (size_t)log->n_embd * 4) {
        const int64_t begin = (int32_t)get(&buf, 4), end = (int32_t)get(&buf, 4), again = (int32_t)get(&buf, 4);
        if (begin < last || end <= begin || end > (int64_t)n_tokens || again < 0 || again > (int64_t)n_tokens)
            return kvs_error_set(err, KVS_EFORMAT, "saved session is damaged: sentence %llu stands at [%lld, %lld)",
                                 (unsigned long long)i, (long long)begin, (long long)end);
        last = end;
    }
    for (uint64_t i = 0; i < n_valid; i++, buf += 1 + (size_t)log->n_embd * 4) {
        const uint64_t token = get(&buf, 4);
        if (token >= log->vocab_size)
            return kvs_error_set(err, KVS_EFORMAT, "saved session is damaged: token %llu in a sentence",
                                 (unsigned long long)token);
    }
    return KVS_OK;
}

void kvs_sentence_log_load(kvs_sentence_log *log, const uint8_t *buf)
{
    if (log->ends == NULL)
        return;
    const size_t row = (size_t)log->n_embd * 4;
    const uint32_t n = (uint32_t)get(&buf, 4), n_valid = (uint32_t)get(&buf, 4);
    log->n_tokens = get(&buf, 8);
    log->n = kvs_min_u32(n, log->capacity); /* the newest */
    log->n_valid = kvs_min_u32(n_valid, log->n_ring);
    buf += (size_t)(n - log->n) * (SENTENCE_BYTES + row);
    for (uint32_t i = 0; i < log->n; i++) {
        kvs_sentence *const x = &log->sentences[i];
        x->begin = (int32_t)get(&buf, 4);
        x->end = (int32_t)get(&buf, 4);
        x->repeated_at = (int32_t)get(&buf, 4);
        get_floats(&buf, log->meanings + (size_t)i * log->n_embd, log->n_embd);
    }
    buf += (size_t)(n_valid - log->n_valid) * (RING_BYTES + row);
    for (uint64_t at = log->n_tokens - log->n_valid; at < log->n_tokens; at++) {
        const size_t slot = (size_t)(at % log->n_ring);
        log->tokens[slot] = (int32_t)get(&buf, 4);
        log->flags[slot] = (uint8_t)get(&buf, 1);
        get_floats(&buf, log->hidden + slot * log->n_embd, log->n_embd);
    }
    reopen(log);
}

/* LU-KV's tables (arXiv:2602.08585): how much each head should drop so that the kept slots are worth most to what comes
 * later. Each text is cut in two: the first half is scored by its policy (expected attention, epsilon 0.02, first 4 and last
 * slot first), and a slot's worth is the attention that the second half's rows give it with a full cache. A head's worth
 * by rank is made concave (its least concave majorant), and for each ratio from 1 % to 99 % slots are taken from all heads
 * in the order of what they add, which is then the best choice. Means over texts.
 * Reconstructed from the paper's abstract and kvpress's file format: the authors' horizon and texts are not known to us. */
#include "eval/profile_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TABLES = 99, SINKS = 4, SCORED_MIN = 500 };

typedef struct slot {
    double value; /* score, then what it adds */
    uint32_t head, at;
} slot;

static int by_value(const void *a, const void *b)
{
    const slot *const x = a, *const y = b;
    if (x->value != y->value)
        return x->value < y->value ? 1 : -1;
    return x->head != y->head ? (x->head > y->head) - (x->head < y->head) : (x->at > y->at) - (x->at < y->at);
}

/* size: of blocks that share a slope, in the order of blocks. */
void kvs_profile_hull(double *adds, uint32_t *size, uint32_t n)
{
    uint32_t n_blocks = 0;
    for (uint32_t i = 0; i < n; i++) {
        double value = adds[i];
        uint32_t count = 1;
        for (; n_blocks > 0 && adds[n_blocks - 1] < value; n_blocks--) { /* the block before falls short: one with it */
            value = (value * count + adds[n_blocks - 1] * size[n_blocks - 1]) / (count + size[n_blocks - 1]);
            count += size[n_blocks - 1];
        }
        adds[n_blocks] = value;
        size[n_blocks++] = count;
    }
    for (uint32_t at = n; n_blocks-- > 0;)
        for (uint32_t i = 0; i < size[n_blocks]; i++)
            adds[--at] = adds[n_blocks];
}

/* Scores of the first n tokens as the policy gives them, [heads][n]. */
static kvs_status read_scores(kvs_profile_run *r, const kvs_profile_text *text, uint32_t n, float *scores)
{
    kvs_session *s;
    KVS_TRY(kvs_profile_session(r, "expected_attention:epsilon=0.02 +protect=none", text->n_tokens, NULL, &s));
    kvs_status status = kvs_profile_extend(r, s, text->tokens, n, (kvs_forward_watch){0});
    if (status == KVS_OK)
        status = kvs_session_evict(s, n - 1, r->err); /* scores are what is wanted */
    for (uint32_t h = 0; status == KVS_OK && h < s->scratch.n_heads; h++)
        memcpy(scores + (size_t)h * n, s->scratch.scores + (size_t)h * s->scratch.stride, n * sizeof *scores);
    kvs_session_free(&s);
    return status;
}

/* Adds sign times the attention mass that the first n slots of each head have. */
static void add_mass(const kvs_session *s, uint32_t n, double sign, float *buf, double *worth)
{
    const uint32_t n_kv_heads = s->model->info.n_kv_heads;
    kvs_head_slots slots = {0};
    slots.side[KVS_SIDE_SUM] = buf;
    for (uint32_t h = 0; h < s->scratch.n_heads; h++) {
        kvs_cache_read_head(s->cache, h / n_kv_heads, h % n_kv_heads, &slots);
        for (uint32_t i = 0; i < n; i++)
            worth[(size_t)h * n + i] += sign * (double)buf[i];
    }
}

/* What rows [n, end) give the first n slots, [heads][n]. */
static kvs_status read_worth(kvs_profile_run *r, const kvs_profile_text *text, uint32_t n, double *worth)
{
    kvs_session *s;
    KVS_TRY(kvs_profile_session(r, "h2o +protect=none", text->n_tokens, NULL, &s));
    float *const buf = calloc(text->n_tokens, sizeof *buf);
    kvs_status status =
        buf != NULL ? KVS_OK : kvs_error_set(r->err, KVS_ENOMEM, "no memory for %u sums", text->n_tokens);
    if (status == KVS_OK)
        status = kvs_profile_extend(r, s, text->tokens, n, (kvs_forward_watch){0});
    if (status == KVS_OK) {
        add_mass(s, n, -1, buf, worth);
        status = kvs_profile_extend(r, s, text->tokens + n, text->n_tokens - n, (kvs_forward_watch){0});
    }
    if (status == KVS_OK)
        add_mass(s, n, 1, buf, worth);
    free(buf);
    kvs_session_free(&s);
    return status;
}

/* A head's slots in the order of their scores, each with what it adds to the hull; the protected first, at any price. */
static void rank_head(const float *scores, const double *worth, uint32_t n, uint32_t head, slot *out, double *adds,
                      uint32_t *size)
{
    for (uint32_t i = 0; i < n; i++)
        out[i] = (slot){i < SINKS || i + 1 == n ? INFINITY : (double)scores[i], head, i};
    qsort(out, n, sizeof *out, by_value);
    for (uint32_t i = 0; i < n; i++)
        adds[i] = worth[out[i].at];
    kvs_profile_hull(adds + SINKS + 1, size, n - SINKS - 1);
    for (uint32_t i = 0; i < n; i++) {
        out[i].value = i <= SINKS ? INFINITY : adds[i];
        out[i].at = i;
    }
}

/* Adds one text's tables: all slots in the order of what they add, cut at each ratio. */
static void add_tables(kvs_profile_run *r, slot *slots, uint32_t n, uint32_t *count)
{
    const uint32_t n_heads = r->out->n_layers * r->out->n_kv_heads;
    const size_t all = (size_t)n_heads * n;
    qsort(slots, all, sizeof *slots, by_value);
    size_t at = 0;
    for (uint32_t t = TABLES; t-- > 0;) { /* from 99 % dropped to 1 % */
        const size_t keep = (size_t)nearbyint((double)all * (99 - t) / 100);
        for (; at < keep; at++)
            count[slots[at].head]++;
        for (uint32_t h = 0; h < n_heads; h++)
            r->out->heads[(size_t)t * n_heads + h] += (1 - (double)count[h] / n) / r->n_texts;
    }
}

typedef struct arrays {
    float *scores;
    double *worth, *adds;
    slot *slots;
    uint32_t *count, *size;
} arrays;

static kvs_status measure_text(kvs_profile_run *r, const kvs_profile_text *text, arrays *a)
{
    const uint32_t n = text->n_tokens / 2, n_heads = r->out->n_layers * r->out->n_kv_heads;
    const size_t all = (size_t)n_heads * n;
    a->scores = calloc(all, sizeof *a->scores);
    a->worth = calloc(all, sizeof *a->worth);
    a->adds = calloc(n, sizeof *a->adds);
    a->slots = calloc(all, sizeof *a->slots);
    a->count = calloc(n_heads, sizeof *a->count);
    a->size = calloc(n, sizeof *a->size);
    if (a->scores == NULL || a->worth == NULL || a->adds == NULL || a->slots == NULL || a->count == NULL ||
        a->size == NULL)
        return kvs_error_set(r->err, KVS_ENOMEM, "no memory for the worth of %zu slots", all);
    KVS_TRY(read_scores(r, text, n, a->scores));
    KVS_TRY(read_worth(r, text, n, a->worth));
    for (uint32_t h = 0; h < n_heads; h++)
        rank_head(a->scores + (size_t)h * n, a->worth + (size_t)h * n, n, h, a->slots + (size_t)h * n, a->adds,
                  a->size);
    add_tables(r, a->slots, n, a->count);
    return KVS_OK;
}

kvs_status kvs_profile_lukv(kvs_profile_run *r)
{
    if (kvs_profile_shortest(r) / 2 < SCORED_MIN)
        return kvs_error_set(r->err, KVS_EINVAL,
                             "the shortest text has %u tokens, %d are needed: half of them are kept "
                             "down to 1 %%",
                             kvs_profile_shortest(r), 2 * SCORED_MIN);
    for (uint32_t t = 0; t < r->n_texts; t++)
        r->n_total += r->texts[t].n_tokens + r->texts[t].n_tokens / 2;
    for (uint32_t t = 0; t < r->n_texts; t++) {
        arrays a = {0};
        const kvs_status status = measure_text(r, &r->texts[t], &a);
        void *const all[] = {a.scores, a.worth, a.adds, a.slots, a.count, a.size};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            free(all[i]);
        KVS_TRY(status);
    }
    return KVS_OK;
}

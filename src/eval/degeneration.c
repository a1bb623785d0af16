/* Repetition measures from one suffix array: the text's suffixes are sorted by prefix doubling, and the lengths that
 * neighbours share (Kasai et al. 2001) give the unique k-grams of every k and the longest repeat alike. */
#include "eval/degeneration.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One suffix with the rank of its first half in the high word and of its second half in the low. */
typedef struct suffix {
    uint64_t key;
    uint32_t begin;
} suffix;

static int compare_suffixes(const void *a, const void *b)
{
    const suffix *x = a, *y = b;
    if (x->key != y->key)
        return x->key < y->key ? -1 : 1;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

/* Suffixes in order into s, their places into rank [n]. */
static void sort_suffixes(const int32_t *y, uint32_t n, suffix *s, uint32_t *rank)
{
    for (uint32_t i = 0; i < n; i++)
        s[i] = (suffix){(uint32_t)y[i] ^ 0x80000000u, i};
    for (uint32_t width = 0;; width = width == 0 ? 1 : width * 2) {
        for (uint32_t i = 0; i < n && width > 0; i++) {
            const uint64_t second = (uint64_t)i + width < n ? (uint64_t)rank[i + width] + 1 : 0;
            s[i] = (suffix){(uint64_t)rank[i] << 32 | second, i};
        }
        qsort(s, n, sizeof *s, compare_suffixes);
        uint32_t place = 0;
        for (uint32_t i = 0; i < n; i++) {
            place += i > 0 && s[i].key != s[i - 1].key;
            rank[s[i].begin] = place;
        }
        if (place == n - 1 || width >= n)
            return;
    }
}

/* shared[i]: tokens that the suffix at place i shares with the one before it. */
static void shared_lengths(const int32_t *y, uint32_t n, const suffix *s, const uint32_t *rank, uint32_t *shared)
{
    uint32_t length = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (rank[i] == 0) {
            shared[0] = length = 0;
            continue;
        }
        const uint32_t j = s[rank[i] - 1].begin;
        while (i + length < n && j + length < n && y[i + length] == y[j + length])
            length++;
        shared[rank[i]] = length;
        length -= length > 0;
    }
}

static void measure_repeats(uint32_t n, const suffix *s, const uint32_t *shared, kvs_degeneration *out)
{
    uint32_t longest = 0;
    for (uint32_t i = 0; i < n; i++)
        longest = kvs_max_u32(longest, shared[i]);
    out->longest_repeat = (double)longest / (double)n;
    for (uint32_t k = 1; k <= KVS_DEGEN_NGRAM_MAX; k++) {
        uint32_t unique = 0; /* suffixes that are long enough and begin another k-gram than the one before */
        for (uint32_t i = 0; i < n; i++)
            unique += n - s[i].begin >= k && shared[i] < k;
        out->distinct[k - 1] = (double)unique / (double)(n - k + 1);
        out->rep[k - 1] = 1.0 - out->distinct[k - 1];
    }
    out->looped = out->rep[3] >= 0.5;
}

static uint32_t longest_run(const int32_t *y, uint32_t n)
{
    uint32_t run = 1, longest = 1;
    for (uint32_t i = 1; i < n; i++) {
        run = y[i] == y[i - 1] ? run + 1 : 1;
        longest = kvs_max_u32(longest, run);
    }
    return longest;
}

/* A token that has nothing `period` before it counts as a miss, so a short text cannot pass on a handful. */
static uint32_t smallest_period(const int32_t *y, uint32_t n)
{
    const uint32_t window = kvs_min_u32(n, KVS_DEGEN_PERIOD_TOKENS);
    for (uint32_t period = 1; period <= KVS_DEGEN_PERIOD_MAX; period++) {
        uint32_t hits = 0;
        for (uint32_t i = n - window; i < n; i++)
            hits += i >= period && y[i] == y[i - period];
        if (10u * hits >= 9u * window)
            return period;
    }
    return 0;
}

typedef struct gram {
    int32_t token[KVS_DEGEN_NGRAM_MAX];
} gram;

static int compare_grams(const void *a, const void *b)
{
    const gram *x = a, *y = b;
    for (int i = 0; i < KVS_DEGEN_NGRAM_MAX; i++) {
        if (x->token[i] != y->token[i])
            return x->token[i] < y->token[i] ? -1 : 1;
    }
    return 0;
}

/* Unique 4-grams of y, sorted; returns how many. */
static size_t unique_grams(const int32_t *y, size_t n, gram *grams)
{
    if (n < KVS_DEGEN_NGRAM_MAX)
        return 0;
    const size_t n_grams = n - KVS_DEGEN_NGRAM_MAX + 1;
    for (size_t i = 0; i < n_grams; i++)
        memcpy(grams[i].token, y + i, sizeof grams[i].token);
    qsort(grams, n_grams, sizeof *grams, compare_grams);
    size_t n_unique = 1;
    for (size_t i = 1; i < n_grams; i++) {
        if (compare_grams(&grams[i], &grams[n_unique - 1]) != 0)
            grams[n_unique++] = grams[i];
    }
    return n_unique;
}

static double shared_gram_rate(const gram *a, size_t n_a, const gram *b, size_t n_b)
{
    size_t shared = 0, j = 0;
    for (size_t i = 0; i < n_a; i++) {
        while (j < n_b && compare_grams(&b[j], &a[i]) < 0)
            j++;
        shared += j < n_b && compare_grams(&b[j], &a[i]) == 0;
    }
    return (double)shared / (double)n_a;
}

static kvs_status measure_echo(const int32_t *y, size_t n, const int32_t *user, size_t n_user,
                               const kvs_allocator *allocator, kvs_degeneration *out, kvs_error *err)
{
    if (n_user == 0)
        return KVS_OK;
    gram *text = kvs_alloc(allocator, n, sizeof *text), *turn = kvs_alloc(allocator, n_user, sizeof *turn);
    const bool ok = text != NULL && turn != NULL;
    if (ok) {
        const size_t n_text = unique_grams(y, n, text), n_turn = unique_grams(user, n_user, turn);
        out->prompt_echo = shared_gram_rate(text, n_text, turn, n_turn);
    }
    kvs_free(allocator, text);
    kvs_free(allocator, turn);
    return ok ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for the 4-grams of %zu tokens", n + n_user);
}

static void undefined(kvs_degeneration *out)
{
    *out = (kvs_degeneration){.longest_repeat = NAN, .prompt_echo = NAN};
    for (int k = 0; k < KVS_DEGEN_NGRAM_MAX; k++)
        out->rep[k] = out->distinct[k] = NAN;
}

kvs_status kvs_degeneration_measure(const int32_t *y, size_t n, const int32_t *user, size_t n_user,
                                    const kvs_allocator *allocator, kvs_degeneration *out, kvs_error *err)
{
    undefined(out);
    if (n < KVS_DEGEN_TOKENS_MIN)
        return KVS_OK;
    if (n > INT32_MAX)
        return kvs_error_set(err, KVS_EINVAL, "%zu tokens: at most 2^31 - 1 can be compared", n);
    const uint32_t count = (uint32_t)n;
    suffix *s = kvs_alloc(allocator, n, sizeof *s);
    uint32_t *rank = kvs_alloc(allocator, n, sizeof *rank), *shared = kvs_alloc(allocator, n, sizeof *shared);
    kvs_status status = KVS_OK;
    if (s == NULL || rank == NULL || shared == NULL) {
        status = kvs_error_set(err, KVS_ENOMEM, "no memory to compare %zu tokens", n);
    } else {
        sort_suffixes(y, count, s, rank);
        shared_lengths(y, count, s, rank, shared);
        measure_repeats(count, s, shared, out);
        out->max_run = longest_run(y, count);
        out->period = smallest_period(y, count);
        status = measure_echo(y, n, user, n_user, allocator, out, err);
    }
    kvs_free(allocator, s);
    kvs_free(allocator, rank);
    kvs_free(allocator, shared);
    out->valid = status == KVS_OK;
    return status;
}

double kvs_trajectory_agreement(const int32_t *ref, size_t n_ref, const int32_t *candidate, size_t n_candidate)
{
    if (n_ref == 0)
        return n_candidate == 0 ? 1.0 : 0.0;
    size_t common = 0;
    while (common < n_ref && common < n_candidate && ref[common] == candidate[common])
        common++;
    return (double)common / (double)n_ref;
}

double kvs_invalid_utf8(const char *text, size_t n_bytes)
{
    return kvs_utf8_valid_prefix(text, n_bytes) == n_bytes ? 0.0 : 1.0;
}

double kvs_replacement_rate(const char *text, size_t n_bytes)
{
    size_t count = 0;
    for (size_t i = 0; i + 3 <= n_bytes; i++)
        count += memcmp(text + i, "\xEF\xBF\xBD", 3) == 0;
    return n_bytes > 0 ? (double)count / (double)n_bytes : 0.0;
}

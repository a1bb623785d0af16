/* Status texts, caller-owned errors, and the nearest-word suggestion that messages carry. */
#include "base/base.h"

#include <stdio.h>
#include <string.h>

#undef kvs_error_set
kvs_status kvs_error_set(kvs_error *err, kvs_status status, const char *fmt, ...)
{
    if (err != NULL) {
        err->status = status;
        va_list args;
        va_start(args, fmt);
        vsnprintf(err->message, sizeof err->message, fmt, args);
        va_end(args);
    }
    return status;
}

const char *kvs_status_text(kvs_status status)
{
    switch (status) {
#define KVS_STATUS_CASE(name, value, text)                                                                             \
    case KVS_##name:                                                                                                   \
        return text;
        KVS_STATUS_MAP(KVS_STATUS_CASE)
#undef KVS_STATUS_CASE
    }
    return "unknown status";
}

const char *kvs_version(void)
{
    return KVS_VERSION_STRING;
}

enum { WORD_MAX = 48 };

/* Levenshtein distance of words cut to WORD_MAX bytes: suggestions are for typing slips, not for long texts. */
static unsigned edit_distance(const char *a, const char *b)
{
    const size_t n_a = strnlen(a, WORD_MAX), n_b = strnlen(b, WORD_MAX);
    unsigned row[WORD_MAX + 1];
    for (size_t j = 0; j <= n_b; j++)
        row[j] = (unsigned)j;
    for (size_t i = 1; i <= n_a; i++) {
        unsigned diagonal = row[0];
        row[0] = (unsigned)i;
        for (size_t j = 1; j <= n_b; j++) {
            const unsigned substitute = diagonal + (a[i - 1] != b[j - 1]);
            const unsigned insert = row[j - 1] + 1, drop = row[j] + 1;
            diagonal = row[j];
            row[j] = substitute < insert ? substitute : insert;
            if (drop < row[j])
                row[j] = drop;
        }
    }
    return row[n_b];
}

const char *kvs_nearest(const char *word, const char *const *candidates, size_t n_candidates)
{
    const char *best = NULL;
    unsigned best_distance = (unsigned)(strnlen(word, WORD_MAX) / 2 + 1);
    for (size_t i = 0; i < n_candidates; i++) {
        const unsigned d = edit_distance(word, candidates[i]);
        if (d < best_distance) {
            best_distance = d;
            best = candidates[i];
        }
    }
    return best;
}

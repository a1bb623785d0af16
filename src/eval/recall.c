/* Recall of planted facts; see recall.h. */
#include "eval/recall.h"

#include <math.h>
#include <string.h>

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* What one byte becomes: 0 for nothing. */
static char normal_byte(const char *text, size_t n_bytes, size_t i)
{
    const char c = text[i];
    const bool between = i > 0 && i + 1 < n_bytes && is_digit(text[i - 1]) && is_digit(text[i + 1]);
    if (c >= 'A' && c <= 'Z')
        return (char)(c - 'A' + 'a');
    if (c == '\'' || (c == ',' && between))
        return 0;
    if (c == '.' && between)
        return c;
    if ((unsigned char)c >= 0x80 || is_digit(c) || (c >= 'a' && c <= 'z'))
        return c;
    return ' ';
}

static bool is_article(const char *word, size_t n)
{
    return (n == 1 && word[0] == 'a') || (n == 2 && memcmp(word, "an", 2) == 0) ||
           (n == 3 && memcmp(word, "the", 3) == 0);
}

size_t kvs_recall_normalise(const char *text, size_t n_bytes, char *out)
{
    size_t length = 0, word = 0; /* the current word is out[word, length) */
    for (size_t i = 0; i <= n_bytes; i++) {
        const char c = i < n_bytes ? normal_byte(text, n_bytes, i) : ' ';
        if (c == 0)
            continue;
        if (c != ' ') {
            out[length++] = c;
            continue;
        }
        if (is_article(out + word, length - word))
            length = word;
        if (length > word && i < n_bytes) {
            out[length++] = ' ';
            word = length;
        }
    }
    if (length > 0 && out[length - 1] == ' ')
        length--;
    out[length] = '\0';
    return length;
}

/* Both normalised: needle as whole words of text. */
static bool has_words(const char *text, const char *needle, size_t n_needle)
{
    for (const char *at = strstr(text, needle); at != NULL; at = strstr(at + 1, needle)) {
        const bool begins = at == text || at[-1] == ' ';
        const bool ends = at[n_needle] == ' ' || at[n_needle] == '\0';
        if (begins && ends)
            return true;
    }
    return false;
}

static kvs_status count_present(const char *text, const char *kind, const char *const *phrases, uint32_t n,
                                const kvs_allocator *allocator, uint32_t *n_present, kvs_error *err)
{
    *n_present = 0;
    for (uint32_t i = 0; i < n; i++) {
        const size_t n_bytes = strlen(phrases[i]);
        char *phrase = kvs_alloc(allocator, n_bytes + 1, 1);
        if (phrase == NULL)
            return kvs_error_set(err, KVS_ENOMEM, "no memory for a %s of %zu bytes", kind, n_bytes);
        const size_t length = kvs_recall_normalise(phrases[i], n_bytes, phrase);
        *n_present += length > 0 && has_words(text, phrase, length);
        kvs_free(allocator, phrase);
        if (length == 0)
            return kvs_error_set(err, KVS_EINVAL, "%s %u \"%.80s\" has no word but articles and punctuation", kind, i,
                                 phrases[i]);
    }
    return KVS_OK;
}

kvs_status kvs_recall_score(const char *answer, size_t n_bytes, const char *const *values, uint32_t n_values,
                            const char *const *confusers, uint32_t n_confusers, const kvs_allocator *allocator,
                            kvs_recall_result *out, kvs_error *err)
{
    *out = (kvs_recall_result){.n_values = n_values};
    if (n_values == 0)
        return kvs_error_set(err, KVS_EINVAL, "0 values: recall needs at least one to look for");
    char *text = kvs_alloc(allocator, n_bytes + 1, 1);
    if (text == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for an answer of %zu bytes", n_bytes);
    kvs_recall_normalise(answer, n_bytes, text);
    uint32_t n_present = 0, n_wrong = 0;
    kvs_status status = count_present(text, "value", values, n_values, allocator, &n_present, err);
    if (status == KVS_OK)
        status = count_present(text, "confuser", confusers, n_confusers, allocator, &n_wrong, err);
    kvs_free(allocator, text);
    if (status != KVS_OK)
        return status;
    out->fraction = (double)n_present / (double)n_values;
    out->wrong_binding = n_wrong > 0;
    out->hit = n_present == n_values && n_wrong == 0;
    return KVS_OK;
}

kvs_status kvs_recall_choice(const double *logprob, const uint32_t *n_tokens, uint32_t n, uint32_t gold,
                             kvs_choice *out, kvs_error *err)
{
    if (n < 2 || gold >= n)
        return kvs_error_set(err, KVS_EINVAL, "candidate %u of %u: a choice needs at least 2, gold among them", gold,
                             n);
    double best_other = -INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        if (n_tokens[i] == 0 || !isfinite(logprob[i]))
            return kvs_error_set(err, KVS_EINVAL, "candidate %u: %u tokens of log-probability %g", i, n_tokens[i],
                                 logprob[i]);
        const double mean = logprob[i] / (double)n_tokens[i];
        if (i == gold)
            out->gold_logprob = mean;
        else
            best_other = fmax(best_other, mean);
    }
    out->margin = out->gold_logprob - best_other;
    out->correct = out->margin > 0.0;
    return KVS_OK;
}

void kvs_recall_survival(const uint32_t *held_in, uint32_t n_tokens, uint32_t n_heads, double *survival, double *erased)
{
    double held = 0.0, gone = 0.0;
    for (uint32_t i = 0; i < n_tokens; i++) {
        held += (double)held_in[i];
        gone += held_in[i] == 0 ? 1.0 : 0.0;
    }
    const bool defined = n_tokens > 0 && n_heads > 0;
    *survival = defined ? held / ((double)n_tokens * (double)n_heads) : NAN;
    *erased = defined ? gone / (double)n_tokens : NAN;
}

double kvs_recall_retention(const uint8_t *hit_policy, const uint8_t *hit_full, size_t n)
{
    size_t n_full = 0, n_both = 0;
    for (size_t i = 0; i < n; i++) {
        n_full += hit_full[i] != 0;
        n_both += hit_full[i] != 0 && hit_policy[i] != 0;
    }
    return n_full > 0 ? (double)n_both / (double)n_full : NAN;
}

/* The option's text, the warm-up, counters. */
#include "session/ffn_skip.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Reconstructed: the paper's are not known. Four tokens are those that evictions keep as sinks. Cold are the layers before
 * and behind the rise of the cosine in docs/ffn-skip.md, as shares of the model's: the first third, the last fifteenth. */
enum { WARMUP_TOKENS = 4, COLD_FIRST_OF = 3, COLD_LAST_OF = 15 };

static bool read_uint(const char **text, uint32_t *out)
{
    if (**text < '0' || **text > '9')
        return false;
    char *end;
    const unsigned long long x = strtoull(*text, &end, 10);
    if (x > 1000000000)
        return false;
    *text = end;
    *out = (uint32_t)x;
    return true;
}

static bool read_threshold(const char **text, double *out)
{
    char *end;
    const double x = strtod(*text, &end);
    if (end == *text || !(x > 0 && x <= 2))
        return false;
    *text = end;
    *out = x;
    return true;
}

static bool starts(const char **text, const char *word)
{
    const size_t n = strlen(word);
    if (strncmp(*text, word, n) != 0)
        return false;
    *text += n;
    return true;
}

/* The shortest digits that mean the same number. */
static void write_text(kvs_ffn_skip *f, uint32_t first, uint32_t last)
{
    char threshold[32];
    int digits = 1;
    double read;
    do {
        snprintf(threshold, sizeof threshold, "%.*g", digits, f->rule.threshold);
        read = strtod(threshold, NULL);
    } while (digits++ < 17 && (read < f->rule.threshold || read > f->rule.threshold));
    snprintf(f->text, sizeof f->text, "threshold=%s,warmup=%u,cold=%u:%u", threshold, f->warmup_tokens, first, last);
}

kvs_status kvs_ffn_skip_parse(const char *spec, uint32_t n_layers, kvs_ffn_skip *out, kvs_error *err)
{
    *out = (kvs_ffn_skip){.n_layers = n_layers, .text = "off"};
    if (spec == NULL || strcmp(spec, "off") == 0)
        return KVS_OK;
    uint32_t first = n_layers / COLD_FIRST_OF, last = n_layers / COLD_LAST_OF;
    out->warmup_tokens = WARMUP_TOKENS;
    const char *at = spec;
    bool good = true;
    do {
        if (starts(&at, "threshold="))
            good = read_threshold(&at, &out->rule.threshold);
        else if (starts(&at, "warmup="))
            good = read_uint(&at, &out->warmup_tokens);
        else if (starts(&at, "cold="))
            good = read_uint(&at, &first) && starts(&at, ":") && read_uint(&at, &last);
        else
            good = false;
    } while (good && starts(&at, ","));
    if (!good || *at != '\0' || !(out->rule.threshold > 0))
        return kvs_error_set(err, KVS_EINVAL,
                             "ffn skip '%.80s', at '%.40s': it is off, or threshold=S with S over 0 and at most 2, and "
                             "where wanted ,warmup=TOKENS and ,cold=FIRST:LAST",
                             spec, at);
    if (first >= n_layers || last >= n_layers - first)
        return kvs_error_set(err, KVS_EINVAL, "ffn skip: cold=%u:%u leaves no middle layer of %u", first, last,
                             n_layers);
    out->rule.first = first;
    out->rule.end = n_layers - last;
    write_text(out, first, last);
    return KVS_OK;
}

static bool is_on(const kvs_ffn_skip *f)
{
    return f->rule.threshold > 0;
}

kvs_status kvs_ffn_skip_create(kvs_ffn_skip *f, const kvs_allocator *a, kvs_error *err)
{
    if (!is_on(f))
        return KVS_OK;
    f->rule.counts = kvs_alloc(a, f->n_layers, sizeof *f->rule.counts);
    return f->rule.counts != NULL
               ? KVS_OK
               : kvs_error_set(err, KVS_ENOMEM, "no memory to count blocks of %u layers", f->n_layers);
}

void kvs_ffn_skip_free(kvs_ffn_skip *f, const kvs_allocator *a)
{
    kvs_free(a, f->rule.counts);
    f->rule.counts = NULL;
}

bool kvs_ffn_skip_same(const kvs_ffn_skip *a, const kvs_ffn_skip *b)
{
    if (!is_on(a) || !is_on(b))
        return is_on(a) == is_on(b);
    return memcmp(&a->rule.threshold, &b->rule.threshold, sizeof a->rule.threshold) == 0 &&
           a->rule.first == b->rule.first && a->rule.end == b->rule.end && a->warmup_tokens == b->warmup_tokens;
}

void kvs_ffn_skip_copy(kvs_ffn_skip *f, const kvs_ffn_skip *from)
{
    f->n_said = from->n_said;
    f->n_said_evicted_at = from->n_said_evicted_at;
    if (is_on(f) && is_on(from))
        memcpy(f->rule.counts, from->rule.counts, f->n_layers * sizeof *f->rule.counts);
}

/* ---- rows ---- */

bool kvs_ffn_skip_counts(uint8_t flags)
{
    return (flags & (KVS_TOKEN_ASSISTANT | KVS_TOKEN_TEMPLATE)) == KVS_TOKEN_ASSISTANT;
}

const kvs_ffn_rule *kvs_ffn_skip_newest(const kvs_ffn_skip *f)
{
    return is_on(f) && f->n_said > f->warmup_tokens ? &f->rule : NULL;
}

const kvs_ffn_rule *kvs_ffn_skip_next(kvs_ffn_skip *f, uint8_t flags)
{
    f->n_said = kvs_ffn_skip_counts(flags) ? f->n_said + 1 : 0;
    return kvs_ffn_skip_newest(f);
}

/* ---- saves ---- */

enum { COUNT_WORDS = 3 };

size_t kvs_ffn_skip_bytes(const kvs_ffn_skip *f)
{
    return is_on(f) ? (size_t)f->n_layers * COUNT_WORDS * sizeof(uint64_t) : 0;
}

void kvs_ffn_skip_save(const kvs_ffn_skip *f, uint8_t *buf)
{
    for (uint32_t l = 0; is_on(f) && l < f->n_layers; l++) {
        const kvs_ffn_count *c = &f->rule.counts[l];
        uint64_t words[COUNT_WORDS] = {c->n_run, c->n_skipped, 0};
        memcpy(&words[2], &c->cosine_sum, sizeof words[2]);
        for (int w = 0; w < COUNT_WORDS; w++)
            for (int b = 0; b < 8; b++)
                *buf++ = (uint8_t)(words[w] >> (8 * b));
    }
}

void kvs_ffn_skip_load(kvs_ffn_skip *f, const uint8_t *buf)
{
    for (uint32_t l = 0; is_on(f) && l < f->n_layers; l++) {
        uint64_t words[COUNT_WORDS] = {0};
        for (int w = 0; w < COUNT_WORDS; w++)
            for (int b = 0; b < 8; b++)
                words[w] |= (uint64_t)*buf++ << (8 * b);
        kvs_ffn_count *c = &f->rule.counts[l];
        c->n_run = words[0];
        c->n_skipped = words[1];
        memcpy(&c->cosine_sum, &words[2], sizeof c->cosine_sum);
    }
}

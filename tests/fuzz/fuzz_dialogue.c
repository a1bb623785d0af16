/* Fuzzes the dialogue loaders: any bytes either load into a set that keeps its promises or are refused with a message.
 *
 * With libFuzzer (Debian libclang-rt-14-dev):
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -std=gnu17 -Iinclude -Isrc -o fuzz_dialogue \
 *         tests/fuzz/fuzz_dialogue.c src/bench/dialogue*.c src/base/{error,memory,system}.c -ljansson -lxxhash -lm
 * Without: the same with any compiler, -fsanitize=address,undefined and -DKVS_FUZZ_STANDALONE; then
 *     fuzz_dialogue FILE...            replays files
 *     fuzz_dialogue --runs=N --seed=S  mutates built-in samples N times */
#include "bench/dialogue.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

/* A broken promise is a bug of ours, so this driver may abort where the library may not. */
#define PROMISE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: broken promise: %s\n", __FILE__, __LINE__, #condition);                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static void check_dialogue(const kvs_dialogue *d)
{
    bool has_user = false;
    PROMISE(d->id && d->origin && d->n_messages > 0);
    for (uint32_t i = 0; i < d->n_messages; i++) {
        const kvs_dialogue_message *m = &d->messages[i];
        PROMISE(strcmp(m->role, "user") == 0 || strcmp(m->role, "assistant") == 0 || strcmp(m->role, "system") == 0);
        PROMISE(m->content[strspn(m->content, " \t\r\n\v\f")] != '\0');
        PROMISE(kvs_utf8_valid_prefix(m->content, strlen(m->content)) == strlen(m->content));
        PROMISE(has_user || strcmp(m->role, "assistant") != 0);
        PROMISE(i == 0 || !d->has_assistant || strcmp(m->role, d->messages[i - 1].role) != 0);
        has_user |= strcmp(m->role, "user") == 0;
    }
    PROMISE(has_user);
}

/* What was written as JSON reads back as the same words. */
static void check_round_trip(const kvs_dialogue *d)
{
    char *json = kvs_dialogue_json(d);
    PROMISE(json);
    kvs_dialogue_set again = {0};
    PROMISE(kvs_dialogue_set_parse("again", json, strlen(json), false, &again, NULL) == KVS_OK);
    PROMISE(again.n_items == 1);
    if (d->has_assistant) /* user turns without answers are joined when they come back as messages */
        PROMISE(kvs_dialogue_hash(&again.items[0]) == kvs_dialogue_hash(d));
    free(json);
    kvs_dialogue_set_free(&again);
}

static void check_chains(const kvs_dialogue_set *s, uint64_t seed)
{
    const kvs_extend_options opt = {
        .target_tokens = 1 + (uint32_t)(seed % 200), .seed = seed, .at_most = seed & 1, .connector = seed & 2};
    kvs_dialogue_set out;
    if (kvs_dialogue_extend(s, &opt, kvs_dialogue_count_words, NULL, 2, &out, NULL) == KVS_OK)
        for (uint32_t i = 0; i < out.n_items; i++)
            PROMISE(strcmp(out.items[i].messages[out.items[i].n_messages - 1].role, "assistant") == 0);
    kvs_dialogue_set_free(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    for (int may_skip = 0; may_skip < 2; may_skip++) {
        kvs_dialogue_set s = {0};
        kvs_error err = {0};
        const kvs_status status = kvs_dialogue_set_parse("input", (const char *)data, n_bytes, may_skip, &s, &err);
        PROMISE(status == KVS_OK || (err.status == status && err.message[0] && !strchr(err.message, '\n')));
        for (uint32_t i = 0; i < s.n_items; i++) {
            check_dialogue(&s.items[i]);
            check_round_trip(&s.items[i]);
        }
        PROMISE(kvs_dialogue_set_dedup(&s, NULL) == KVS_OK);
        if (s.n_items)
            check_chains(&s, kvs_dialogue_hash(&s.items[0]));
        kvs_dialogue_set_free(&s);
    }
    return 0;
}

#ifdef KVS_FUZZ_STANDALONE

static const char *const samples[] = {
    "[{\"id\": \"a_0\", \"conversations\": [{\"from\": \"human\", \"value\": \"Good morning\"}, {\"from\": \"gpt\", "
    "\"value\": \"Hello.\\nHow can I help?\"}, {\"from\": \"human\", \"value\": \"caf\xc3\xa9 \\u00e9\"}]},\n {\"id\": "
    "7, "
    "\"conversations\": [{\"from\": \"gpt\", \"value\": \"late\"}, {\"from\": \"user\", \"value\": \"early\"}]}]",
    "{\"id\": \"x\", \"messages\": [{\"role\": \"system\", \"content\": \"be kind\"}, {\"role\": \"user\", "
    "\"content\": "
    "\"one\"}, {\"role\": \"assistant\", \"content\": \"two\"}]}\n{\"messages\": [{\"role\": \"user\", \"content\": "
    "\"three\"}, {\"role\": \"user\", \"content\": \"four\"}]}\n",
    "{\"question_id\": 81, \"category\": \"writing\", \"turns\": [\"Write a poem.\", \"Now without an e.\"]}\n",
};
static const char *const tokens[] = {"\"",    "\\",       "{",         "}",      "[",        "]",
                                     ",",     ":",        "\n",        "null",   "\\u0000",  "\\ud83d",
                                     "\xff",  "\xe2\x82", "assistant", "system", "\"role\"", "\"messages\": ",
                                     "1e999", "  "};

/* A few deletions, copies, byte changes and inserted tokens: enough to reach past the JSON parser often. */
static size_t mutate(kvs_rng *rng, char *text, size_t n, size_t cap)
{
    for (uint32_t k = 1 + kvs_rng_below(rng, 4); k > 0 && n > 0; k--) {
        const size_t at = kvs_rng_below(rng, (uint32_t)n), left = n - at;
        const char *token = tokens[kvs_rng_below(rng, sizeof tokens / sizeof *tokens)];
        const size_t n_token = strlen(token);
        size_t n_cut = 1 + kvs_rng_below(rng, 12);
        switch (kvs_rng_below(rng, 4)) {
        case 0:
            text[at] = (char)kvs_rng_below(rng, 256);
            break;
        case 1:
            n_cut = n_cut < left ? n_cut : left;
            memmove(text + at, text + at + n_cut, left - n_cut);
            n -= n_cut;
            break;
        case 2:
            if (n + n_token <= cap) {
                memmove(text + at + n_token, text + at, left);
                memcpy(text + at, token, n_token);
                n += n_token;
            }
            break;
        default:
            n_cut = 40 < left ? 40 : left;
            if (n + n_cut <= cap) {
                memmove(text + at + n_cut, text + at, left);
                n += n_cut;
            }
        }
    }
    return n;
}

static int replay(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END) != 0) {
        fprintf(stderr, "cannot open %s\n", path);
        return 1;
    }
    const long n = ftell(f);
    rewind(f);
    /* Exactly n bytes, so that the address sanitizer sees a read past the end. */
    uint8_t *bytes = malloc(n > 0 ? (size_t)n : 1);
    const bool ok = bytes && n >= 0 && fread(bytes, 1, (size_t)n, f) == (size_t)n;
    if (ok)
        LLVMFuzzerTestOneInput(bytes, (size_t)n);
    else
        fprintf(stderr, "cannot read %s\n", path);
    free(bytes);
    fclose(f);
    return !ok;
}

int main(int argc, char **argv)
{
    unsigned long long n_runs = 0, seed = 1;
    int rc = 0;
    for (int i = 1; i < argc; i++)
        if (sscanf(argv[i], "--runs=%llu", &n_runs) != 1 && sscanf(argv[i], "--seed=%llu", &seed) != 1)
            rc |= replay(argv[i]);
    for (unsigned long long run = 0; run < n_runs; run++) {
        kvs_rng rng = {kvs_hash3(seed, run, 0)};
        char text[4096];
        const char *sample = samples[run % (sizeof samples / sizeof *samples)];
        size_t n = strlen(sample);
        memcpy(text, sample, n);
        n = mutate(&rng, text, n, sizeof text);
        uint8_t *exact = malloc(n ? n : 1);
        if (!exact)
            return 1;
        memcpy(exact, text, n);
        LLVMFuzzerTestOneInput(exact, n);
        free(exact);
    }
    return rc;
}

#endif

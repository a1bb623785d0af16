/* Fuzzes the policy spec grammar: any bytes either parse into a policy whose canonical text parses to itself, or are
 * refused with one line.
 *
 * With libFuzzer (Debian libclang-rt-14-dev):
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -std=gnu17 -Iinclude -Isrc -o fuzz_spec \
 *         tests/fuzz/fuzz_spec.c src/policy/[a-z]*.c src/base/{error,memory,system}.c -lm
 * Without: the same with any compiler, -fsanitize=address,undefined and -DKVS_FUZZ_STANDALONE; then
 *     fuzz_spec FILE...            replays files
 *     fuzz_spec --runs=N --seed=S  mutates built-in samples N times */
#include "policy/policy.h"

#include <ctype.h>
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

static void check_refusal(kvs_status status, const kvs_error *err)
{
    PROMISE(status == KVS_EINVAL && err->status == status && err->message[0] != '\0');
    for (const char *at = err->message; *at != '\0'; at++)
        PROMISE(!iscntrl((unsigned char)*at));
}

static void check_policy(const kvs_policy *p)
{
    kvs_policy again;
    PROMISE(kvs_policy_parse(p->text, NULL, false, &again, NULL) == KVS_OK);
    PROMISE(strcmp(p->text, again.text) == 0);
    PROMISE(memcmp(p->params, again.params, sizeof p->params) == 0);
    PROMISE(p->keep_ratio == again.keep_ratio && p->keep_tokens == again.keep_tokens &&
            p->keep_of_said == again.keep_of_said);
    PROMISE(p->schedule == again.schedule && p->schedule_value == again.schedule_value);
    PROMISE(p->position == again.position && p->gap_cap == again.gap_cap && p->gap_cap >= 1);
    PROMISE(p->keep_ratio >= 0 && p->keep_ratio <= 1 && (p->keep_ratio == 0 || p->keep_tokens == 0));
    for (uint32_t i = 0; i < p->ops->n_params; i++)
        PROMISE(p->params[i] >= p->ops->params[i].min && p->params[i] <= p->ops->params[i].max);
    /* No parameter may make a target of nothing or overflow it. */
    static const int32_t pos[5] = {0, 1, 2, 7, 9};
    const kvs_policy_view view = {.n_slots = 5, .n_tokens = 10, .pos = pos};
    PROMISE(kvs_policy_target(p, &view, 3) >= 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    char *text = malloc(n_bytes + 1); /* exactly, so that a sanitizer sees a read past the end */
    if (text == NULL)
        return 0;
    if (n_bytes > 0)
        memcpy(text, data, n_bytes);
    text[n_bytes] = '\0';
    for (int compat = 0; compat < 2; compat++) {
        kvs_policy p;
        kvs_error err = {0};
        const kvs_status status = kvs_policy_parse(text, NULL, compat, &p, &err);
        if (status == KVS_OK)
            check_policy(&p);
        else
            check_refusal(status, &err);
    }
    kvs_policy p;
    kvs_error err = {0};
    kvs_status status = kvs_policy_parse("random", text, false, &p, &err);
    if (status == KVS_OK)
        check_policy(&p);
    else
        check_refusal(status, &err);
    uint64_t bytes, tokens;
    status = kvs_size_parse(text, &bytes, &tokens, &err);
    if (status == KVS_OK)
        PROMISE((bytes == 0) != (tokens == 0));
    else
        check_refusal(status, &err);
    free(text);
    return 0;
}

#ifdef KVS_FUZZ_STANDALONE

static const char *const samples[] = {
    "streaming:sinks=4 +position=rerotate +protect=sinks:4,recent:256,system,template,pinned",
    "attention_top:acc=1,norm=1,scope=2,keep=0.99 +schedule=bytes:600MiB",
    "sliding_window_gist:gist=2000,recent=0 +schedule=once:at=3000tok +position=gapcap:16",
    "random:keep=766tok +schedule=every:128 +protect=none",
    "sliding_window_gist_attentive +keep=0.5 +schedule=tokens:4800 +position=recompute",
    "600MiB",
    "gapcap:7",
};
static const char *const tokens[] = {"+",
                                     ":",
                                     ",",
                                     "=",
                                     " ",
                                     "tok",
                                     "MiB",
                                     "1e9",
                                     "0x10",
                                     "nan",
                                     "-0",
                                     "1e-320",
                                     "none",
                                     "baseline",
                                     "evict_oldest",
                                     "+keep=",
                                     "+position=",
                                     "+protect=",
                                     "+schedule=",
                                     "\x7f",
                                     "\r",
                                     "9999999999",
                                     "0.30000000000000004",
                                     "after_prefill"};

static size_t mutate(kvs_rng *rng, char *text, size_t n, size_t cap)
{
    for (uint32_t k = 1 + kvs_rng_below(rng, 5); k > 0 && n > 0; k--) {
        const size_t at = kvs_rng_below(rng, (uint32_t)n), left = n - at;
        const char *token = tokens[kvs_rng_below(rng, sizeof tokens / sizeof *tokens)];
        const size_t n_token = strlen(token), n_cut = 1 + kvs_rng_below(rng, (uint32_t)(left < 12 ? left : 12));
        switch (kvs_rng_below(rng, 4)) {
        case 0:
            text[at] = (char)kvs_rng_below(rng, 256);
            break;
        case 1:
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
            if (n + left <= cap) { /* repeats its tail */
                memcpy(text + n, text + at, left);
                n += left;
            }
        }
    }
    return n;
}

static int replay(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL || fseek(f, 0, SEEK_END) != 0) {
        fprintf(stderr, "cannot open %s\n", path);
        return 1;
    }
    const long n = ftell(f);
    rewind(f);
    uint8_t *bytes = malloc(n > 0 ? (size_t)n : 1);
    const bool ok = bytes != NULL && n >= 0 && fread(bytes, 1, (size_t)n, f) == (size_t)n;
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
        char text[1024];
        const char *sample = samples[run % (sizeof samples / sizeof *samples)];
        size_t n = strlen(sample);
        memcpy(text, sample, n);
        n = mutate(&rng, text, n, sizeof text);
        LLVMFuzzerTestOneInput((const uint8_t *)text, n);
    }
    return rc;
}

#endif

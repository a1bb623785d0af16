/* A session as bytes: what was said about it, then its cache (src/cache/snapshot.c). Files are the caller's business. */
#include "session/session_internal.h"

#include <string.h>

#define SAVED_MAGIC 0x3153564bu /* "KVS1" */

enum { FIXED_WORDS = 20 };

/* Everything but the policy text, the flag log and the cache, as 64-bit words. */
static void pack(const kvs_session *s, uint64_t words[FIXED_WORDS], size_t cache_bytes)
{
    const kvs_model_info *i = &s->model->info;
    uint64_t mass_lost;
    memcpy(&mass_lost, &s->mass_lost, sizeof mass_lost);
    const uint64_t all[FIXED_WORDS] = {
        SAVED_MAGIC,
        i->weight_bytes,
        i->vocab_size,
        s->options.arith,
        s->options.seed,
        s->n_tokens,
        s->n_tokens_evicted_at,
        s->schedule_mark,
        (uint64_t)s->uniform | (uint64_t)s->layer_uniform << 1,
        s->forward_open,
        s->last_was_prompt,
        mass_lost,
        s->n_evictions,
        s->n_slots_evicted,
        s->evict_ns,
        s->score_ns,
        s->select_ns,
        s->move_ns,
        s->footprint_skip,
        cache_bytes,
    };
    memcpy(words, all, sizeof all);
}

kvs_status kvs_session_save(const kvs_session *s, void *buf, size_t cap_bytes, size_t *size_bytes, kvs_error *err)
{
    const size_t cache_bytes = kvs_cache_snapshot_bytes(s->cache);
    const size_t need = FIXED_WORDS * 8 + sizeof s->policy.text + (size_t)s->n_tokens + cache_bytes;
    *size_bytes = need;
    if (buf == NULL)
        return KVS_OK;
    if (cap_bytes < need)
        return kvs_error_set(err, KVS_EINVAL, "buffer of %zu bytes is too small for a session of %zu", cap_bytes, need);
    uint64_t words[FIXED_WORDS];
    pack(s, words, cache_bytes);
    uint8_t *at = buf;
    for (size_t i = 0; i < FIXED_WORDS; i++)
        for (int b = 0; b < 8; b++)
            *at++ = (uint8_t)(words[i] >> (8 * b));
    memset(at, 0, sizeof s->policy.text);
    memcpy(at, s->policy.text, strlen(s->policy.text));
    at += sizeof s->policy.text;
    if (s->n_tokens > 0)
        memcpy(at, s->flag_log, (size_t)s->n_tokens);
    kvs_cache_snapshot_write(s->cache, at + s->n_tokens);
    return KVS_OK;
}

static kvs_status check_words(const kvs_session *s, const uint64_t *words, size_t size_bytes, kvs_error *err)
{
    const kvs_model_info *i = &s->model->info;
    if (words[0] != SAVED_MAGIC)
        return kvs_error_set(err, KVS_EFORMAT, "not a saved session: it begins with %08llx, not %08x",
                             (unsigned long long)words[0], SAVED_MAGIC);
    if (words[1] != i->weight_bytes || words[2] != i->vocab_size)
        return kvs_error_set(err, KVS_EFORMAT,
                             "saved session is of another model (%llu bytes of weights, this one has "
                             "%llu)",
                             (unsigned long long)words[1], (unsigned long long)i->weight_bytes);
    if (words[3] != (uint64_t)s->options.arith)
        return kvs_error_set(err, KVS_EFORMAT, "saved session ran in --arith %s, this one runs in %s",
                             words[3] == KVS_ARITH_F32 ? "f32" : "native",
                             s->options.arith == KVS_ARITH_F32 ? "f32" : "native");
    const uint64_t rest = size_bytes - FIXED_WORDS * 8 - sizeof s->policy.text; /* log and cache: kvs_session_load */
    if (words[5] > INT32_MAX / 2 || words[6] > words[5] || words[5] > rest || words[FIXED_WORDS - 1] != rest - words[5])
        return kvs_error_set(err, KVS_EFORMAT, "saved session is truncated: %zu bytes", size_bytes);
    return KVS_OK;
}

kvs_status kvs_session_load(kvs_session *s, const void *buf, size_t size_bytes, kvs_error *err)
{
    uint64_t words[FIXED_WORDS] = {0};
    const uint8_t *at = buf;
    if (size_bytes < FIXED_WORDS * 8 + sizeof s->policy.text)
        return kvs_error_set(err, KVS_EFORMAT, "saved session is truncated: %zu bytes", size_bytes);
    for (size_t i = 0; i < FIXED_WORDS; i++)
        for (int b = 0; b < 8; b++)
            words[i] |= (uint64_t)*at++ << (8 * b);
    KVS_TRY(check_words(s, words, size_bytes, err));
    char policy[sizeof s->policy.text];
    memcpy(policy, at, sizeof policy);
    policy[sizeof policy - 1] = '\0';
    if (strcmp(policy, s->policy.text) != 0)
        return kvs_error_set(err, KVS_EFORMAT, "saved session has policy '%.150s', this one '%.150s'", policy,
                             s->policy.text);
    at += sizeof policy;
    const size_t n_tokens = (size_t)words[5];
    uint8_t *log = kvs_alloc(s->allocator, n_tokens == 0 ? 1 : n_tokens, 1);
    if (log == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the log of %zu tokens", n_tokens);
    const kvs_snapshot_limits limits = {(int32_t)n_tokens, s->model->info.vocab_size, s->scratch.n_slots};
    const kvs_status status =
        kvs_cache_snapshot_read(s->cache, at + n_tokens, (size_t)words[FIXED_WORDS - 1], &limits, err);
    if (status != KVS_OK) {
        kvs_free(s->allocator, log);
        return status;
    }
    memcpy(log, at, n_tokens);
    kvs_free(s->allocator, s->flag_log);
    s->flag_log = log;
    s->flag_log_capacity = n_tokens;
    s->options.seed = words[4];
    s->n_tokens = words[5];
    s->n_tokens_evicted_at = words[6];
    s->schedule_mark = words[7];
    s->uniform = (words[8] & 1) != 0;
    s->layer_uniform = (words[8] & 2) != 0;
    s->forward_open = words[9] != 0;
    s->last_was_prompt = words[10] != 0;
    memcpy(&s->mass_lost, &words[11], sizeof s->mass_lost);
    s->n_evictions = words[12];
    s->n_slots_evicted = words[13];
    s->evict_ns = words[14];
    s->score_ns = words[15];
    s->select_ns = words[16];
    s->move_ns = words[17];
    s->footprint_skip = words[18];
    return KVS_OK;
}

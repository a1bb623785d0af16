/* A session as bytes: what was said about it, then its cache (src/cache/snapshot.c). Files are the caller's business. */
#include "session/session_internal.h"

#include <string.h>

#define SAVED_MAGIC 0x3453564bu /* "KVS4" */

enum { FIXED_WORDS = 27, TURN_BYTES = 16 };

/* Everything but the policy text, the turns and the cache, as 64-bit words. */
static void pack(const kvs_session *s, uint64_t words[FIXED_WORDS], size_t cache_bytes)
{
    const kvs_model_info *i = &s->model->info;
    uint64_t mass_lost, ffn_threshold;
    memcpy(&mass_lost, &s->mass_lost, sizeof mass_lost);
    memcpy(&ffn_threshold, &s->ffn.rule.threshold, sizeof ffn_threshold);
    const uint64_t all[FIXED_WORDS] = {
        SAVED_MAGIC,
        i->weight_bytes,
        i->vocab_size,
        s->options.arith,
        s->options.seed,
        s->n_tokens,
        s->n_tokens_evicted_at,
        s->schedule_mark,
        (uint64_t)s->uniform | (uint64_t)s->layer_uniform << 1 | (uint64_t)s->steer.on << 2,
        s->forward_open,
        (uint64_t)s->last_was_prompt | (uint64_t)s->evicted_after_prompt << 1,
        mass_lost,
        s->n_evictions,
        s->n_slots_evicted,
        s->evict_ns,
        s->score_ns,
        s->select_ns,
        s->move_ns,
        s->footprint_skip,
        cache_bytes,
        s->turns.n,
        (uint64_t)(int64_t)s->turns.marker_from,
        ffn_threshold,
        s->ffn.warmup_tokens,
        (uint64_t)s->ffn.rule.first << 32 | s->ffn.rule.end,
        s->ffn.n_said,
        s->ffn.n_said_evicted_at,
    };
    memcpy(words, all, sizeof all);
}

/* Of what stands between the turns and the cache, the part whose size the options say. */
static size_t fixed_extras_bytes(const kvs_session *s)
{
    return kvs_query_log_bytes(&s->queries) + kvs_ffn_skip_bytes(&s->ffn);
}

static uint8_t *put(uint8_t *at, uint64_t x, int n_bytes)
{
    for (int b = 0; b < n_bytes; b++)
        *at++ = (uint8_t)(x >> (8 * b));
    return at;
}

static uint64_t get(const uint8_t *at, int n_bytes)
{
    uint64_t x = 0;
    for (int b = 0; b < n_bytes; b++)
        x |= (uint64_t)at[b] << (8 * b);
    return x;
}

/* One turn of a save. */
static kvs_turn turn_at(const uint8_t *at)
{
    return (kvs_turn){
        .head = (int32_t)get(at, 4),
        .begin = (int32_t)get(at + 4, 4),
        .end = (int32_t)get(at + 8, 4),
        .tail = (int32_t)get(at + 12, 4),
    };
}

kvs_status kvs_session_save(const kvs_session *s, void *buf, size_t cap_bytes, size_t *size_bytes, kvs_error *err)
{
    const size_t cache_bytes = kvs_cache_snapshot_bytes(s->cache);
    const size_t need = FIXED_WORDS * 8 + sizeof s->policy.text + (size_t)s->turns.n * TURN_BYTES + cache_bytes +
                        fixed_extras_bytes(s) + kvs_sentence_log_bytes(&s->sentences) + kvs_steer_bytes(s);
    *size_bytes = need;
    if (buf == NULL)
        return KVS_OK;
    if (cap_bytes < need)
        return kvs_error_set(err, KVS_EINVAL, "buffer of %zu bytes is too small for a session of %zu", cap_bytes, need);
    uint64_t words[FIXED_WORDS];
    pack(s, words, cache_bytes);
    uint8_t *at = buf;
    for (size_t i = 0; i < FIXED_WORDS; i++)
        at = put(at, words[i], 8);
    memset(at, 0, sizeof s->policy.text);
    memcpy(at, s->policy.text, strlen(s->policy.text));
    at += sizeof s->policy.text;
    for (uint32_t i = 0; i < s->turns.n; i++) {
        const kvs_turn *t = &s->turns.turns[i];
        const int32_t bounds[] = {t->head, t->begin, t->end, t->tail};
        for (int k = 0; k < 4; k++)
            at = put(at, (uint32_t)bounds[k], 4);
    }
    kvs_query_log_save(&s->queries, at);
    kvs_ffn_skip_save(&s->ffn, at + kvs_query_log_bytes(&s->queries));
    at += fixed_extras_bytes(s);
    kvs_sentence_log_save(&s->sentences, at);
    at += kvs_sentence_log_bytes(&s->sentences);
    kvs_steer_save(s, at);
    kvs_cache_snapshot_write(s->cache, at + kvs_steer_bytes(s));
    return KVS_OK;
}

static kvs_status check_words(const kvs_session *s, const uint64_t *words, kvs_error *err)
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
    kvs_ffn_skip theirs = {.warmup_tokens = (uint32_t)words[23],
                           .rule = {.first = (uint32_t)(words[24] >> 32), .end = (uint32_t)words[24]}};
    memcpy(&theirs.rule.threshold, &words[22], sizeof theirs.rule.threshold);
    if (!kvs_ffn_skip_same(&theirs, &s->ffn))
        return kvs_error_set(err, KVS_EFORMAT,
                             "saved session has ffn skip threshold %g (0: off), warmup %u, middle layers %u to %u; "
                             "this one: %s",
                             theirs.rule.threshold, theirs.warmup_tokens, theirs.rule.first, theirs.rule.end,
                             s->ffn.text);
    if (((words[8] & 4) != 0) != s->steer.on)
        return kvs_error_set(err, KVS_EFORMAT, "saved session was %s, this one is %s",
                             words[8] & 4 ? "steered" : "not steered",
                             s->steer.on ? "steered" : "not: kvs_session_steer comes before kvs_session_load");
    return KVS_OK;
}

/* Bytes of a save between its turns and its cache. */
typedef struct extras {
    size_t fixed, sentences, steer;
} extras;

/* at: behind the policy's text. */
static kvs_status check_size(const kvs_session *s, const uint64_t *words, const uint8_t *at, size_t size_bytes,
                             extras *x, kvs_error *err)
{
    uint64_t rest = size_bytes - FIXED_WORDS * 8 - sizeof s->policy.text;
    *x = (extras){.fixed = fixed_extras_bytes(s)};
    if (words[5] > INT32_MAX / 2 || words[6] > words[5] || words[20] > rest / TURN_BYTES ||
        rest - words[20] * TURN_BYTES < x->fixed || words[25] > words[5] || words[26] > words[6])
        return kvs_error_set(err, KVS_EFORMAT, "saved session is truncated: %zu bytes", size_bytes);
    at += words[20] * TURN_BYTES + x->fixed;
    rest -= words[20] * TURN_BYTES + x->fixed;
    KVS_TRY(kvs_sentence_log_measure(&s->sentences, at, (size_t)rest, words[5], &x->sentences, err));
    rest -= x->sentences;
    KVS_TRY(kvs_steer_measure(s, at + x->sentences, (size_t)rest, words[5], &x->steer, err));
    if (words[19] != rest - x->steer)
        return kvs_error_set(err, KVS_EFORMAT, "saved session is truncated: %zu bytes", size_bytes);
    return KVS_OK;
}

/* Turns stand one behind the other, the last one's markers up to the newest token. */
static kvs_status check_turns(const uint8_t *at, uint64_t n, int64_t marker_from, int32_t n_tokens, kvs_error *err)
{
    int32_t end = 0, tail = 0;
    for (uint64_t i = 0; i < n; i++, at += TURN_BYTES) {
        const kvs_turn t = turn_at(at);
        if (t.head < end || t.begin < t.head || t.end <= t.begin || t.tail < t.end || t.tail > n_tokens)
            return kvs_error_set(err, KVS_EFORMAT, "saved session is damaged: turn %llu of %llu stands at [%d, %d)",
                                 (unsigned long long)i, (unsigned long long)n, t.begin, t.end);
        end = t.end;
        tail = t.tail;
    }
    const int64_t from = tail > end || (n == 0 && n_tokens > 0) ? end : -1;
    if (marker_from != from || (n > 0 && tail != n_tokens))
        return kvs_error_set(err, KVS_EFORMAT, "saved session is damaged: its turns end at %d, %d tokens were said",
                             tail, n_tokens);
    return KVS_OK;
}

kvs_status kvs_session_load(kvs_session *s, const void *buf, size_t size_bytes, kvs_error *err)
{
    uint64_t words[FIXED_WORDS] = {0};
    const uint8_t *at = buf;
    if (size_bytes < FIXED_WORDS * 8 + sizeof s->policy.text)
        return kvs_error_set(err, KVS_EFORMAT, "saved session is truncated: %zu bytes", size_bytes);
    for (size_t i = 0; i < FIXED_WORDS; i++, at += 8)
        words[i] = get(at, 8);
    KVS_TRY(check_words(s, words, err));
    char policy[sizeof s->policy.text];
    memcpy(policy, at, sizeof policy);
    policy[sizeof policy - 1] = '\0';
    if (strcmp(policy, s->policy.text) != 0)
        return kvs_error_set(err, KVS_EFORMAT, "saved session has policy '%.150s', this one '%.150s'", policy,
                             s->policy.text);
    at += sizeof policy;
    extras x;
    KVS_TRY(check_size(s, words, at, size_bytes, &x, err));
    const uint64_t n_turns = words[20];
    KVS_TRY(check_turns(at, n_turns, (int64_t)words[21], (int32_t)words[5], err));
    const kvs_snapshot_limits limits = {(int32_t)words[5], s->model->info.vocab_size, s->scratch.n_slots};
    const uint8_t *const queries = at + n_turns * TURN_BYTES;
    const uint8_t *const sentences = queries + x.fixed, *const steer = sentences + x.sentences;
    KVS_TRY(kvs_cache_snapshot_read(s->cache, steer + x.steer, (size_t)words[19], &limits, err));
    kvs_query_log_load(&s->queries, queries);
    kvs_ffn_skip_load(&s->ffn, queries + kvs_query_log_bytes(&s->queries));
    s->ffn.n_said = words[25];
    s->ffn.n_said_evicted_at = words[26];
    kvs_sentence_log_load(&s->sentences, sentences);
    s->turns.n = n_turns < s->turns.capacity ? (uint32_t)n_turns : s->turns.capacity; /* the newest */
    s->turns.marker_from = (int32_t)(int64_t)words[21];
    at += (n_turns - s->turns.n) * TURN_BYTES;
    for (uint32_t i = 0; i < s->turns.n; i++, at += TURN_BYTES)
        s->turns.turns[i] = turn_at(at);
    s->options.seed = words[4];
    s->n_tokens = words[5];
    kvs_steer_load(s, steer);
    s->n_tokens_evicted_at = words[6];
    s->schedule_mark = words[7];
    s->uniform = (words[8] & 1) != 0;
    s->layer_uniform = (words[8] & 2) != 0;
    s->forward_open = words[9] != 0;
    s->last_was_prompt = (words[10] & 1) != 0;
    s->evicted_after_prompt = (words[10] & 2) != 0;
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

/* Steering. h <- h + alpha_t v behind one layer, for the rows of an answer, alpha_t = alpha + gamma N, N the sentences of the
 * answer so far that do not get on. Reconstructed: SkipKV publishes neither its numbers nor its layer, so there are no
 * defaults; which sentences count is SEAL's list of words (the repository of arXiv:2504.07986), that N begins anew with each
 * answer is ours, and so are the sentence's ends (sentences.h) and that alpha applies to every row of the answer. Rows of
 * probes and of position mode recompute are not moved. */
#include "session/steer.h"

#include "model/direction.h"
#include "session/session_internal.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SHORTEST = 4, LONGEST = 64, MARK_BYTES = 11, HEAD_BYTES = 4 };

/* ---- thoughts ---- */

static bool begins(const char *text, size_t n, const char *word)
{
    size_t i = 0;
    while (i < n && word[i] != '\0' && tolower((unsigned char)text[i]) == word[i])
        i++;
    return word[i] == '\0';
}

bool kvs_steer_is_other(const char *text, size_t n)
{
    static const char *const first[] = {"wait", "alternatively"};
    static const char *const anywhere[] = {
        "verify",           "make sure",      "hold on",          "think again",       "'s correct",
        "'s incorrect",     "let me check",   "seems right",      "think differently", "another way",
        "another approach", "another method", "another solution", "another strategy",  "another technique",
    };
    while (n > 0 && isspace((unsigned char)*text)) {
        text++;
        n--;
    }
    for (size_t k = 0; k < sizeof first / sizeof *first; k++)
        if (begins(text, n, first[k]))
            return true;
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < sizeof anywhere / sizeof *anywhere; k++)
            if (begins(text + i, n - i, anywhere[k]))
                return true;
    return false;
}

/* ---- tokens ---- */

static void add_text(kvs_session *s, int32_t token)
{
    kvs_steer *const x = &s->steer;
    char piece[64];
    const size_t n = kvs_token_text(s->model, token, false, piece, sizeof piece);
    const uint32_t take =
        kvs_min_u32((uint32_t)(n < sizeof piece ? n : sizeof piece), KVS_STEER_TEXT_BYTES - x->n_text);
    memcpy(x->text + x->n_text, piece, take);
    x->n_text += take;
}

static void close_sentence(kvs_steer *x)
{
    if (x->segmenter.n_open >= x->segmenter.shortest)
        x->n_other += kvs_steer_is_other(x->text, x->n_text);
    x->segmenter.n_open = x->n_text = 0;
}

static void take(kvs_session *s, int32_t token, uint8_t flags)
{
    kvs_steer *const x = &s->steer;
    if ((flags & KVS_TOKEN_ASSISTANT) == 0) {
        x->segmenter.n_open = x->n_text = x->n_other = 0;
    } else {
        if (kvs_segmenter_breaks(&x->segmenter, flags))
            close_sentence(x);
        const kvs_segment what = kvs_segmenter_take(&x->segmenter, s->sentence_ends, token, flags);
        if (what != KVS_SEGMENT_OUTSIDE)
            add_text(s, token);
        if (what == KVS_SEGMENT_ENDS)
            close_sentence(x);
    }
    x->ring[x->n_tokens++ % x->n_ring] = (kvs_steer_mark){
        .token = token, .n_other = x->n_other, .n_open = (uint16_t)x->segmenter.n_open, .role = x->segmenter.role};
    x->n_valid = kvs_min_u32(x->n_ring, x->n_valid + 1);
}

void kvs_steer_take(kvs_session *s, const int32_t *tokens, const uint8_t *flags, uint32_t n)
{
    kvs_steer *const x = &s->steer;
    for (uint32_t i = 0; x->on && i < n; i++) {
        const bool answer = flags != NULL && flags[i] & KVS_TOKEN_ASSISTANT;
        x->shift[i] = answer ? (float)(x->alpha + x->gamma * x->n_other) : 0;
        take(s, tokens[i], flags == NULL ? 0 : flags[i]);
    }
}

/* What the newest mark says, the open sentence's text from its tokens. */
static void reopen(kvs_session *s)
{
    kvs_steer *const x = &s->steer;
    const kvs_steer_mark none = {0};
    const kvs_steer_mark *const last = x->n_valid == 0 ? &none : &x->ring[(x->n_tokens - 1) % x->n_ring];
    x->n_other = last->n_other;
    x->segmenter.n_open = kvs_min_u32(last->n_open, x->n_valid);
    x->segmenter.role = last->role;
    x->n_text = 0;
    for (uint64_t at = x->n_tokens - x->segmenter.n_open; at < x->n_tokens; at++)
        add_text(s, x->ring[at % x->n_ring].token);
}

void kvs_steer_truncate(kvs_session *s, uint64_t n_tokens)
{
    kvs_steer *const x = &s->steer;
    if (!x->on)
        return;
    const uint64_t dropped = x->n_tokens - n_tokens;
    x->n_valid = dropped < x->n_valid ? x->n_valid - (uint32_t)dropped : 0;
    x->n_tokens = n_tokens;
    reopen(s);
}

/* ---- on and off ---- */

void kvs_steer_free(kvs_session *s)
{
    kvs_free(s->allocator, s->steer.block);
    s->steer = (kvs_steer){0};
}

static void *part(uint8_t *base, size_t *at, size_t n, size_t size)
{
    void *const here = base == NULL ? NULL : base + *at;
    *at += kvs_round_up(n * size, KVS_ALIGN);
    return here;
}

static size_t lay_out(kvs_steer *x, uint8_t *base, uint32_t n_embd)
{
    size_t at = 0;
    x->direction = part(base, &at, n_embd, sizeof(float));
    x->shift = part(base, &at, KVS_STEP_ROWS_MAX, sizeof(float));
    x->ring = part(base, &at, x->n_ring, sizeof *x->ring);
    return at;
}

static kvs_status reserve(kvs_session *s, kvs_steer *x, kvs_error *err)
{
    KVS_TRY(kvs_sentence_ends_create(s, err));
    x->segmenter = (kvs_segmenter){.shortest = SHORTEST, .longest = LONGEST};
    x->n_tokens = s->n_tokens;
    x->n_ring = s->scratch.n_slots + LONGEST;
    x->bytes = lay_out(x, NULL, s->model->info.n_embd);
    x->block = kvs_alloc(s->allocator, 1, x->bytes);
    if (x->block == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory to steer over %u slots", s->scratch.n_slots);
    lay_out(x, x->block, s->model->info.n_embd);
    x->on = true;
    return KVS_OK;
}

static kvs_status read_number(const char *spec, const char *name, double *out, kvs_error *err)
{
    const size_t n = strlen(name);
    for (const char *at = strrchr(spec, ':'); at != NULL; at = strchr(at + 1, ','))
        if (strncmp(at + 1, name, n) == 0 && at[1 + n] == '=') {
            char *end;
            *out = strtod(at + n + 2, &end);
            if (end != at + n + 2 && (*end == ',' || *end == '\0') && isfinite(*out))
                return KVS_OK;
        }
    return kvs_error_set(err, KVS_EINVAL,
                         "steering '%.200s' has no number %s; FILE:layer=12,alpha=0.5,gamma=0.1 is right", spec, name);
}

kvs_status kvs_session_steer(kvs_session *s, const char *spec, kvs_error *err)
{
    if (spec == NULL) {
        kvs_steer_free(s);
        return KVS_OK;
    }
    kvs_steer x = {0};
    double layer;
    KVS_TRY(read_number(spec, "layer", &layer, err));
    KVS_TRY(read_number(spec, "alpha", &x.alpha, err));
    KVS_TRY(read_number(spec, "gamma", &x.gamma, err));
    if (layer < 0 || layer >= s->model->info.n_layers || layer != floor(layer))
        return kvs_error_set(err, KVS_EINVAL, "steering at layer %g: the model has layers 0 to %u", layer,
                             s->model->info.n_layers - 1);
    char path[1024];
    const size_t n_path = (size_t)(strrchr(spec, ':') - spec);
    if (n_path == 0 || n_path >= sizeof path)
        return kvs_error_set(err, KVS_EINVAL, "steering: a file name of %zu bytes; 1 to %zu are right", n_path,
                             sizeof path - 1);
    memcpy(path, spec, n_path);
    path[n_path] = '\0';
    x.layer = (uint32_t)layer;
    KVS_TRY(reserve(s, &x, err));
    const kvs_status status = kvs_direction_read(s->model, path, x.layer, x.direction, err);
    if (status != KVS_OK) {
        kvs_free(s->allocator, x.block);
        return status;
    }
    kvs_steer_free(s);
    s->steer = x;
    return KVS_OK;
}

kvs_status kvs_steer_fork(kvs_session *s, const kvs_session *from, kvs_error *err)
{
    const kvs_steer *const theirs = &from->steer;
    if (!theirs->on)
        return KVS_OK;
    kvs_steer x = {.layer = theirs->layer, .alpha = theirs->alpha, .gamma = theirs->gamma};
    KVS_TRY(reserve(s, &x, err));
    memcpy(x.direction, theirs->direction, s->model->info.n_embd * sizeof(float));
    x.n_valid = kvs_min_u32(theirs->n_valid, x.n_ring);
    for (uint64_t at = x.n_tokens - x.n_valid; at < x.n_tokens; at++)
        x.ring[at % x.n_ring] = theirs->ring[at % theirs->n_ring];
    s->steer = x;
    reopen(s);
    return KVS_OK;
}

uint32_t kvs_session_steer_count(const kvs_session *s)
{
    return s->steer.n_other;
}

/* ---- saves ---- */

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

size_t kvs_steer_bytes(const kvs_session *s)
{
    return s->steer.on ? HEAD_BYTES + (size_t)s->steer.n_valid * MARK_BYTES : 0;
}

void kvs_steer_save(const kvs_session *s, uint8_t *buf)
{
    const kvs_steer *const x = &s->steer;
    if (!x->on)
        return;
    buf = put(buf, x->n_valid, 4);
    for (uint64_t at = x->n_tokens - x->n_valid; at < x->n_tokens; at++) {
        const kvs_steer_mark *const m = &x->ring[at % x->n_ring];
        buf = put(buf, (uint32_t)m->token, 4);
        buf = put(buf, m->n_other, 4);
        buf = put(buf, m->n_open, 2);
        buf = put(buf, m->role, 1);
    }
}

kvs_status kvs_steer_measure(const kvs_session *s, const uint8_t *buf, size_t avail, uint64_t n_tokens, size_t *n_bytes,
                             kvs_error *err)
{
    *n_bytes = 0;
    if (!s->steer.on)
        return KVS_OK;
    if (avail < HEAD_BYTES)
        return kvs_error_set(err, KVS_EFORMAT, "saved session is truncated: nothing of its steering");
    const uint64_t n = get(&buf, 4);
    if (n > n_tokens || HEAD_BYTES + n * MARK_BYTES > avail)
        return kvs_error_set(err, KVS_EFORMAT, "saved session is damaged: steering over %llu of %llu tokens",
                             (unsigned long long)n, (unsigned long long)n_tokens);
    for (uint64_t i = 0; i < n; i++, buf += MARK_BYTES - 4) {
        const uint64_t token = get(&buf, 4);
        if (token >= s->model->info.vocab_size)
            return kvs_error_set(err, KVS_EFORMAT, "saved session is damaged: steered token %llu",
                                 (unsigned long long)token);
    }
    *n_bytes = (size_t)(HEAD_BYTES + n * MARK_BYTES);
    return KVS_OK;
}

/* s->n_tokens is the saved session's. */
void kvs_steer_load(kvs_session *s, const uint8_t *buf)
{
    kvs_steer *const x = &s->steer;
    if (!x->on)
        return;
    const uint32_t n = (uint32_t)get(&buf, 4);
    x->n_tokens = s->n_tokens;
    x->n_valid = kvs_min_u32(n, x->n_ring);
    buf += (size_t)(n - x->n_valid) * MARK_BYTES;
    for (uint64_t at = x->n_tokens - x->n_valid; at < x->n_tokens; at++) {
        kvs_steer_mark *const m = &x->ring[at % x->n_ring];
        m->token = (int32_t)get(&buf, 4);
        m->n_other = (uint32_t)get(&buf, 4);
        m->n_open = (uint16_t)get(&buf, 2);
        m->role = (uint8_t)get(&buf, 1);
    }
    reopen(s);
}

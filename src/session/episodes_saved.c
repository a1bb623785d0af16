/* Episodes as bytes: the plan, layer shares and centroids, each episode's words, then each session as saved.c writes it.
 * All little-endian. What a session's bytes must satisfy is checked there; here, that the rest fits together. */
#include "session/episodes.h"

#include "model/model.h"
#include "session/session_internal.h"

#include <string.h>

#define EPISODES_MAGIC 0x3145564bu /* "KVE1" */

enum { PLAN_WORDS = 24, EPISODE_WORDS = 4 };

typedef struct plan_texts {
    char protect[96], position[32], encoder[32];
} plan_texts;

/* ---- writing ---- */

/* With `at` NULL only counts. */
typedef struct writer {
    uint8_t *at;
    size_t n_bytes;
} writer;

static void put_u64(writer *w, uint64_t x)
{
    for (int i = 0; i < 8 && w->at != NULL; i++)
        *w->at++ = (uint8_t)(x >> (8 * i));
    w->n_bytes += 8;
}

static void put_u32(writer *w, uint32_t x)
{
    for (int i = 0; i < 4 && w->at != NULL; i++)
        *w->at++ = (uint8_t)(x >> (8 * i));
    w->n_bytes += 4;
}

static void put_text(writer *w, const char *text, size_t n)
{
    if (w->at != NULL) {
        memset(w->at, 0, n);
        memcpy(w->at, text, strlen(text));
        w->at += n;
    }
    w->n_bytes += n;
}

static void put_plan(writer *w, const kvs_episodes *e)
{
    const kvs_episodes_plan *const p = &e->plan;
    const uint64_t words[PLAN_WORDS] = {
        EPISODES_MAGIC,
        e->model->info.weight_bytes,
        e->model->info.vocab_size,
        e->model->info.n_layers,
        p->n_episodes,
        p->window_utterances,
        p->n_medoids,
        p->block_tokens,
        p->words_tokens,
        p->share_tokens,
        p->share_pages,
        p->work_pages,
        p->dim,
        p->n_windows,
        p->chunk_tokens,
        p->budget_bytes,
        p->seed,
        (uint64_t)p->kv_type,
        (uint64_t)p->arith,
        p->uniform_heads,
        p->keep_turns,
        p->shared_layers,
        e->active,
        e->peak_bytes,
    };
    for (size_t i = 0; i < PLAN_WORDS; i++)
        put_u64(w, words[i]);
    put_text(w, p->protect, sizeof p->protect);
    put_text(w, p->position, sizeof p->position);
    put_text(w, p->encoder, sizeof p->encoder);
}

static void put_vectors(writer *w, const kvs_episodes *e)
{
    for (uint32_t l = 0; e->layer_share != NULL && l < e->model->info.n_layers; l++) {
        uint64_t bits;
        memcpy(&bits, &e->layer_share[l], 8);
        put_u64(w, bits);
    }
    for (size_t i = 0; i < (size_t)e->plan.n_episodes * e->plan.dim; i++) {
        uint32_t bits;
        memcpy(&bits, &e->centroid[i], 4);
        put_u32(w, bits);
    }
}

static kvs_status put_episode(writer *w, const kvs_episode *x, kvs_error *err)
{
    size_t body = 0;
    KVS_TRY(kvs_session_save(x->session, NULL, 0, &body, err));
    const uint64_t words[EPISODE_WORDS] = {x->n_windows, x->n_medoids, x->n_words, body};
    for (size_t i = 0; i < EPISODE_WORDS; i++)
        put_u64(w, words[i]);
    for (uint32_t i = 0; i < x->n_words; i++)
        put_u32(w, (uint32_t)x->words[i]);
    if (w->at != NULL) {
        KVS_TRY(kvs_session_save(x->session, w->at, body, &body, err));
        w->at += body;
    }
    w->n_bytes += body;
    return KVS_OK;
}

static kvs_status put_all(writer *w, const kvs_episodes *e, kvs_error *err)
{
    put_plan(w, e);
    put_vectors(w, e);
    for (uint32_t i = 0; i < e->plan.n_episodes; i++)
        KVS_TRY(put_episode(w, &e->episodes[i], err));
    return KVS_OK;
}

kvs_status kvs_episodes_save(const kvs_episodes *e, void *buf, size_t cap_bytes, size_t *size_bytes, kvs_error *err)
{
    writer w = {0};
    KVS_TRY(put_all(&w, e, err));
    *size_bytes = w.n_bytes;
    if (buf == NULL)
        return KVS_OK;
    if (cap_bytes < w.n_bytes)
        return kvs_error_set(err, KVS_EINVAL, "buffer of %zu bytes is too small for episodes of %zu", cap_bytes,
                             w.n_bytes);
    w = (writer){.at = buf};
    return put_all(&w, e, err);
}

/* ---- reading ---- */

typedef struct reader {
    const uint8_t *at;
    size_t left;
} reader;

static kvs_status need(const reader *r, uint64_t n, const char *what, kvs_error *err)
{
    return n <= r->left
               ? KVS_OK
               : kvs_error_set(err, KVS_EFORMAT, "saved episodes are truncated: %s take %llu bytes, %zu are left", what,
                               (unsigned long long)n, r->left);
}

static uint64_t get(reader *r, int n_bytes)
{
    uint64_t x = 0;
    for (int i = 0; i < n_bytes; i++)
        x |= (uint64_t)r->at[i] << (8 * i);
    r->at += n_bytes;
    r->left -= (size_t)n_bytes;
    return x;
}

static void get_text(reader *r, char *text, size_t n)
{
    memcpy(text, r->at, n);
    text[n - 1] = '\0';
    r->at += n;
    r->left -= n;
}

static kvs_status check_plan(const kvs_model *m, const uint64_t *words, kvs_error *err)
{
    if (words[0] != EPISODES_MAGIC)
        return kvs_error_set(err, KVS_EFORMAT, "not saved episodes: they begin with %08llx, not %08x",
                             (unsigned long long)words[0], EPISODES_MAGIC);
    if (words[1] != m->info.weight_bytes || words[2] != m->info.vocab_size || words[3] != m->info.n_layers)
        return kvs_error_set(err, KVS_EFORMAT,
                             "saved episodes are of another model (%llu bytes of weights, this one has %llu)",
                             (unsigned long long)words[1], (unsigned long long)m->info.weight_bytes);
    const struct {
        const char *name;
        uint64_t min, max;
    } limits[] = {{"episodes", 1, KVS_EPISODES_MAX}, {"window", 1, UINT32_MAX},     {"medoids", 1, UINT32_MAX},
                  {"block", 1, INT32_MAX / 8},       {"words", 0, 65536},           {"share", 1, INT32_MAX / 2},
                  {"share pages", 1, 1 << 24},       {"working pages", 1, 1 << 24}, {"dim", 1, 1 << 24},
                  {"windows", 1, UINT32_MAX},        {"chunk", 0, UINT32_MAX},      {"budget", 1, UINT64_MAX},
                  {"seed", 0, UINT64_MAX},           {"KV type", 0, KVS_KV_F32},    {"arith", 0, KVS_ARITH_F32},
                  {"uniform heads", 0, 1},           {"kept turns", 0, 1},          {"layer shares", 0, 1},
                  {"active", 0, words[4] - 1},       {"peak", 0, words[15]}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (words[4 + i] < limits[i].min || words[4 + i] > limits[i].max)
            return kvs_error_set(err, KVS_EFORMAT, "saved episodes are damaged: %s is %llu, not %llu to %llu",
                                 limits[i].name, (unsigned long long)words[4 + i], (unsigned long long)limits[i].min,
                                 (unsigned long long)limits[i].max);
    return KVS_OK;
}

static kvs_status take_plan(kvs_episodes *e, const uint64_t *words, const plan_texts *texts, kvs_error *err)
{
    kvs_episodes_plan *const p = &e->plan;
    if (strcmp(texts->encoder, p->encoder) != 0 || words[12] != p->dim)
        return kvs_error_set(err, KVS_EFORMAT,
                             "saved episodes were grouped by encoder '%s' of %llu numbers, this is '%s' of %u",
                             texts->encoder, (unsigned long long)words[12], p->encoder, p->dim);
    *p = (kvs_episodes_plan){.n_episodes = (uint32_t)words[4],
                             .window_utterances = (uint32_t)words[5],
                             .n_medoids = (uint32_t)words[6],
                             .block_tokens = (uint32_t)words[7],
                             .words_tokens = (uint32_t)words[8],
                             .share_tokens = (uint32_t)words[9],
                             .share_pages = (uint32_t)words[10],
                             .work_pages = (uint32_t)words[11],
                             .dim = (uint32_t)words[12],
                             .n_windows = (uint32_t)words[13],
                             .chunk_tokens = (uint32_t)words[14],
                             .budget_bytes = words[15],
                             .seed = words[16],
                             .kv_type = (kvs_kv_type)words[17],
                             .arith = (kvs_arith)words[18],
                             .uniform_heads = words[19] != 0,
                             .keep_turns = words[20] != 0,
                             .shared_layers = words[21] != 0};
    e->active = (uint32_t)words[22];
    e->peak_bytes = words[23];
    memcpy(p->protect, texts->protect, sizeof p->protect);
    memcpy(p->position, texts->position, sizeof p->position);
    memcpy(p->encoder, texts->encoder, sizeof p->encoder);
    return kvs_episodes_check_plan(e, err);
}

static kvs_status take_vectors(kvs_episodes *e, reader *r, kvs_error *err)
{
    const uint32_t n_layers = e->plan.shared_layers ? e->model->info.n_layers : 0;
    const uint64_t n = (uint64_t)e->plan.n_episodes * e->plan.dim;
    KVS_TRY(need(r, n_layers * UINT64_C(8) + n * 4, "centroids", err));
    e->episodes = kvs_alloc(e->allocator, e->plan.n_episodes, sizeof *e->episodes);
    e->centroid = kvs_alloc(e->allocator, (size_t)n, sizeof *e->centroid);
    if (n_layers > 0)
        e->layer_share = kvs_alloc(e->allocator, n_layers, sizeof *e->layer_share);
    if (e->episodes == NULL || e->centroid == NULL || (n_layers > 0 && e->layer_share == NULL))
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the centroids of %u episodes", e->plan.n_episodes);
    for (uint32_t l = 0; l < n_layers; l++) {
        const uint64_t bits = get(r, 8);
        memcpy(&e->layer_share[l], &bits, 8);
        if (!(e->layer_share[l] >= 0.25 && e->layer_share[l] <= n_layers))
            return kvs_error_set(err, KVS_EFORMAT, "saved episodes are damaged: layer %u keeps %g even shares", l,
                                 e->layer_share[l]);
    }
    for (uint64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)get(r, 4);
        memcpy(&e->centroid[i], &bits, 4);
    }
    return KVS_OK;
}

/* Words now; the session's bytes once all sessions are there. */
static kvs_status take_words(kvs_episodes *e, uint32_t i, reader *r, reader *body, kvs_error *err)
{
    kvs_episode *const x = &e->episodes[i];
    KVS_TRY(need(r, EPISODE_WORDS * 8, "an episode's numbers", err));
    x->n_windows = (uint32_t)get(r, 8);
    x->n_medoids = (uint32_t)get(r, 8);
    const uint64_t n_words = get(r, 8), n_body = get(r, 8);
    if (n_words > e->plan.words_tokens)
        return kvs_error_set(err, KVS_EFORMAT, "saved episodes are damaged: episode %u has %llu words of %u", i,
                             (unsigned long long)n_words, e->plan.words_tokens);
    KVS_TRY(need(r, n_words * 4, "an episode's words", err));
    x->n_words = (uint32_t)n_words;
    x->words = kvs_alloc(e->allocator, n_words + 1, sizeof *x->words);
    if (x->words == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the words of episode %u", i);
    for (uint32_t w = 0; w < x->n_words; w++) {
        x->words[w] = (int32_t)get(r, 4);
        if (x->words[w] < 0 || (uint32_t)x->words[w] >= e->model->info.vocab_size)
            return kvs_error_set(err, KVS_EFORMAT, "saved episodes are damaged: word %u of episode %u is token %d", w,
                                 i, x->words[w]);
    }
    KVS_TRY(need(r, n_body, "an episode's slots", err));
    *body = (reader){r->at, (size_t)n_body};
    r->at += n_body;
    r->left -= (size_t)n_body;
    return KVS_OK;
}

static kvs_status take_all(kvs_episodes *e, reader *r, kvs_error *err)
{
    reader body[KVS_EPISODES_MAX];
    KVS_TRY(take_vectors(e, r, err));
    for (uint32_t i = 0; i < e->plan.n_episodes; i++)
        KVS_TRY(take_words(e, i, r, &body[i], err));
    if (r->left != 0)
        return kvs_error_set(err, KVS_EFORMAT, "saved episodes: %zu bytes follow the last one", r->left);
    KVS_TRY(kvs_episodes_open(e, err));
    for (uint32_t i = 0; i < e->plan.n_episodes; i++) {
        KVS_TRY(kvs_session_load(e->episodes[i].session, body[i].at, body[i].left, err));
        if (i != e->active && kvs_episodes_over_share(e, i))
            return kvs_error_set(err, KVS_EFORMAT, "saved episodes are damaged: episode %u holds more than its share",
                                 i);
    }
    return KVS_OK;
}

kvs_status kvs_episodes_load(kvs_model *m, const kvs_episodes_options *opt, const void *buf, size_t size_bytes,
                             kvs_episodes **out, kvs_error *err)
{
    *out = NULL;
    reader r = {buf, size_bytes};
    uint64_t words[PLAN_WORDS];
    plan_texts texts;
    KVS_TRY(need(&r, sizeof words + sizeof texts, "their head", err));
    for (size_t i = 0; i < PLAN_WORDS; i++)
        words[i] = get(&r, 8);
    KVS_TRY(check_plan(m, words, err));
    get_text(&r, texts.protect, sizeof texts.protect);
    get_text(&r, texts.position, sizeof texts.position);
    get_text(&r, texts.encoder, sizeof texts.encoder);
    kvs_episodes_options defaults;
    kvs_episodes_options_default(&defaults);
    if (opt != NULL) {
        defaults.encode = opt->encode;
        defaults.encode_ctx = opt->encode_ctx;
        defaults.encode_dim = opt->encode_dim;
        defaults.encoder_name = opt->encoder_name;
        defaults.allocator = opt->allocator;
    }
    kvs_episodes *e;
    KVS_TRY(kvs_episodes_new(m, &defaults, &e, err));
    kvs_status status = take_plan(e, words, &texts, err);
    if (status == KVS_OK)
        status = take_all(e, &r, err);
    if (status != KVS_OK) {
        /* A damaged plan shows in what sessions refuse: to the caller it is the file that is wrong. */
        if (err != NULL && status != KVS_ENOMEM)
            err->status = KVS_EFORMAT;
        kvs_episodes_free(&e);
        return status == KVS_ENOMEM ? status : KVS_EFORMAT;
    }
    *out = e;
    return KVS_OK;
}

/* Episodes: EpiCache (Kim et al., arXiv:2509.17396) as a mode of its own. A history is cut into windows (episode_text.c)
 * and grouped (episode_cluster.c); each group's nearest windows are the words that score slots while the whole history
 * is prefilled into that group's cache, block by block (the probe extract, policy epicache). A question goes to the
 * nearest group. Sessions of all episodes live in one budget: they draw from one store of blocks, which has the kept
 * slots of each and one working room, for only one of them is in work.
 *
 * Not as in the repository (commit b742661): the history runs through the chat template instead of as one text; sinks,
 * system prompt and markers are protected; layer budgets that were raised to a quarter are paid for by the others;
 * nothing is evicted while all fits; scoring rows stand behind the last token instead of on it; medoids that do not fit
 * words_tokens are left out, farthest first. The encoder is the paper's "llm"; another can be given. */
#include "session/episodes.h"

#include "model/chat_template.h"
#include "model/model.h"
#include "session/session_internal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    SLICE_TOKENS = 256, /* of a block, between two looks at on_progress */
    BLOCK_MIN = 64,
    BLOCK_MAX = 2048, /* the paper's block */
};

void kvs_episodes_options_default(kvs_episodes_options *opt)
{
    *opt = (kvs_episodes_options){
        .n_episodes = 4, .window_utterances = 4, .n_medoids = 4, .alpha = 1.1, .kv_type = KVS_KV_F16, .seed = 1};
}

/* ---- the encoder ---- */

/* The mean of the tokens' embeddings. */
static kvs_status encode_by_model(void *ctx, const char *text, size_t n_bytes, float *out, kvs_error *err)
{
    const kvs_model *const m = ctx;
    const uint32_t dim = m->info.n_embd;
    size_t n = 0;
    int32_t *const tokens = kvs_alloc(m->allocator, n_bytes + 2, sizeof *tokens);
    float *const row = kvs_alloc(m->allocator, dim, sizeof *row);
    double *const sum = kvs_alloc(m->allocator, dim, sizeof *sum);
    kvs_status status = tokens == NULL || row == NULL || sum == NULL
                            ? kvs_error_set(err, KVS_ENOMEM, "no memory to embed a text of %zu bytes", n_bytes)
                            : kvs_tokenize(m, text, n_bytes, false, false, tokens, n_bytes + 2, &n, err);
    for (size_t t = 0; t < n && status == KVS_OK; t++) {
        kvs_weight_row(&m->embd, (uint32_t)tokens[t], row);
        for (uint32_t i = 0; i < dim; i++)
            sum[i] += (double)row[i];
    }
    if (status == KVS_OK && n == 0)
        status = kvs_error_set(err, KVS_EINVAL, "a text without a token belongs to no episode");
    for (uint32_t i = 0; i < dim && status == KVS_OK; i++)
        out[i] = (float)(sum[i] / (double)n);
    kvs_free(m->allocator, tokens);
    kvs_free(m->allocator, row);
    kvs_free(m->allocator, sum);
    return status;
}

static kvs_status embed(const kvs_episodes *e, const char *text, size_t n_bytes, float *out, kvs_error *err)
{
    KVS_TRY(e->encode(e->encode_ctx, text, n_bytes, out, err));
    if (!kvs_vector_normalise(out, e->plan.dim))
        return kvs_error_set(err, KVS_EINVAL, "encoder %s: the vector of a text of %zu bytes has no direction",
                             e->plan.encoder, n_bytes);
    return KVS_OK;
}

/* ---- options ---- */

static kvs_status copy_name(const char *what, const char *text, char *out, size_t cap_bytes, kvs_error *err)
{
    if (text != NULL && strlen(text) >= cap_bytes)
        return kvs_error_set(err, KVS_EINVAL, "%s '%.40s...' is longer than %zu bytes", what, text, cap_bytes - 1);
    snprintf(out, cap_bytes, "%s", text != NULL ? text : "");
    return KVS_OK;
}

static kvs_status check_options(const kvs_model *m, const kvs_episodes_options *o, kvs_error *err)
{
    if (o->n_episodes == 0 || o->n_episodes > KVS_EPISODES_MAX)
        return kvs_error_set(err, KVS_EINVAL, "%u episodes are asked for: 1 to %d are right", o->n_episodes,
                             KVS_EPISODES_MAX);
    if (o->window_utterances == 0 || o->n_medoids == 0)
        return kvs_error_set(err, KVS_EINVAL, "windows of %u utterances, %u medoids: both must be at least 1",
                             o->window_utterances, o->n_medoids);
    if (o->block_tokens > INT32_MAX / 8 || o->words_tokens > 65536)
        return kvs_error_set(err, KVS_EINVAL, "blocks of %u tokens, words of %u: at most %d and 65536", o->block_tokens,
                             o->words_tokens, INT32_MAX / 8);
    if (o->budget_bytes != 0 && o->budget_tokens != 0)
        return kvs_error_set(err, KVS_EINVAL, "budget is given in bytes (%llu) and in tokens (%u): give one",
                             (unsigned long long)o->budget_bytes, o->budget_tokens);
    if (!(o->alpha >= 0) || !isfinite(o->alpha))
        return kvs_error_set(err, KVS_EINVAL, "alpha %g must be 0 or more", o->alpha);
    for (uint32_t l = 0; o->sensitivity != NULL && l < m->info.n_layers; l++)
        if (!isfinite(o->sensitivity[l]))
            return kvs_error_set(err, KVS_EINVAL, "sensitivity of layer %u of %u is not a number", l, m->info.n_layers);
    if (o->encode != NULL && (o->encode_dim == 0 || o->encoder_name == NULL))
        return kvs_error_set(err, KVS_EINVAL, "an encoder of one's own needs encode_dim, which is %u, and encoder_name",
                             o->encode_dim);
    return KVS_OK;
}

kvs_status kvs_episodes_new(kvs_model *m, const kvs_episodes_options *o, kvs_episodes **out, kvs_error *err)
{
    *out = NULL;
    if (m->layers == NULL)
        return kvs_error_set(err, KVS_EINVAL, "model %s was opened with vocab_only: it has no weights", m->info.path);
    KVS_TRY(check_options(m, o, err));
    const kvs_allocator *const a = o->allocator != NULL ? o->allocator : m->allocator;
    kvs_episodes *const e = kvs_alloc(a, 1, sizeof *e);
    if (e == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for episodes");
    *e = (kvs_episodes){.model = m,
                        .allocator = a,
                        .encode = o->encode != NULL ? o->encode : encode_by_model,
                        .encode_ctx = o->encode != NULL ? o->encode_ctx : m};
    kvs_episodes_plan *const p = &e->plan;
    *p = (kvs_episodes_plan){.n_episodes = o->n_episodes,
                             .window_utterances = o->window_utterances,
                             .n_medoids = o->n_medoids,
                             .block_tokens = o->block_tokens,
                             .words_tokens = o->words_tokens,
                             .chunk_tokens = o->chunk_tokens,
                             .dim = o->encode != NULL ? o->encode_dim : m->info.n_embd,
                             .budget_bytes = o->budget_bytes,
                             .seed = o->seed,
                             .kv_type = o->kv_type,
                             .arith = o->arith,
                             .uniform_heads = o->uniform_heads,
                             .keep_turns = o->keep_turns,
                             .shared_layers = o->sensitivity != NULL && o->alpha > 0};
    kvs_status status = copy_name("protect", o->protect, p->protect, sizeof p->protect, err);
    if (status == KVS_OK)
        status = copy_name("position", o->position, p->position, sizeof p->position, err);
    if (status == KVS_OK)
        status =
            copy_name("encoder_name", o->encode != NULL ? o->encoder_name : "llm", p->encoder, sizeof p->encoder, err);
    if (status != KVS_OK) {
        kvs_free(a, e);
        return status;
    }
    *out = e;
    return KVS_OK;
}

void kvs_episodes_free(kvs_episodes **episodes)
{
    kvs_episodes *e = *episodes;
    if (e == NULL)
        return;
    *episodes = NULL;
    for (uint32_t i = e->episodes == NULL ? 0 : e->plan.n_episodes; i-- > 0;) { /* the first lends to the others */
        kvs_session_free(&e->episodes[i].session);
        kvs_free(e->allocator, e->episodes[i].words);
    }
    kvs_free(e->allocator, e->episodes);
    kvs_free(e->allocator, e->centroid);
    kvs_free(e->allocator, e->layer_share);
    kvs_free(e->allocator, e);
}

/* ---- layers ---- */

/* Shares with mean 1 from sensitivities: (1 - s)^alpha of s scaled to [0, 1], none under a quarter. The published code
 * raises the small ones and lets the sum grow; here the others give way. */
static kvs_status share_layers(kvs_episodes *e, const float *sensitivity, double alpha, kvs_error *err)
{
    const uint32_t n = e->model->info.n_layers;
    double *const share = e->layer_share = kvs_alloc(e->allocator, n, sizeof *share);
    if (share == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the shares of %u layers", n);
    float low = sensitivity[0], high = sensitivity[0];
    for (uint32_t l = 1; l < n; l++) {
        low = sensitivity[l] < low ? sensitivity[l] : low;
        high = sensitivity[l] > high ? sensitivity[l] : high;
    }
    double sum = 0;
    for (uint32_t l = 0; l < n; l++) {
        const double s = high > low ? ((double)sensitivity[l] - (double)low) / ((double)high - (double)low) : 0;
        sum += share[l] = pow(1 - s, alpha);
    }
    for (uint32_t l = 0; l < n; l++)
        share[l] *= n / sum;
    for (bool raised = true; raised;) { /* each round raises a layer for good: n at most */
        double fixed = 0, loose = 0;
        raised = false;
        for (uint32_t l = 0; l < n; l++) {
            raised |= share[l] < 0.25;
            share[l] = share[l] < 0.25 ? 0.25 : share[l];
            *(share[l] > 0.25 ? &loose : &fixed) += share[l];
        }
        for (uint32_t l = 0; l < n && raised; l++)
            share[l] = share[l] > 0.25 ? share[l] * (n - fixed) / loose : share[l];
    }
    return KVS_OK;
}

/* ---- sizes ---- */

/* Bytes of all caches: what is there whatever is held, of a head's block of 64 slots, and what its entry takes. */
typedef struct sizes {
    uint64_t fixed, block, side;
} sizes;

static sizes sizes_of(const kvs_episodes *e)
{
    const kvs_model_info *const i = &e->model->info;
    const uint64_t n_heads = (uint64_t)i->n_layers * i->n_kv_heads;
    const kvs_cache_config c = {.n_layers = i->n_layers,
                                .n_kv_heads = i->n_kv_heads,
                                .head_dim = i->head_dim,
                                .kv_f32 = e->plan.kv_type == KVS_KV_F32};
    sizes s = {.fixed = kvs_cache_bytes_for_tokens(&c, 0)};
    const uint64_t page = kvs_cache_bytes_for_tokens(&c, KVS_PAGE_SLOTS) - s.fixed;
    s.block = n_heads * 2 * KVS_PAGE_SLOTS * i->head_dim * (c.kv_f32 ? 4 : 2);
    s.side = page - s.block;
    return s;
}

/* Blocks for what every episode keeps and for one working room; but every cache has the entries for both. */
static uint64_t total_bytes(const kvs_episodes *e, uint64_t share_pages)
{
    const sizes s = sizes_of(e);
    const uint64_t k = e->plan.n_episodes, work = e->plan.work_pages;
    return k * s.fixed + (k * share_pages + work) * s.block + k * (share_pages + work) * s.side;
}

static bool is_ragged(const kvs_episodes_plan *p)
{
    return !p->uniform_heads || p->shared_layers;
}

/* The budget as bytes, and the block where none was given: nobody has measured how a small budget is best divided, so
 * an eighth is ours. */
static void read_budget(kvs_episodes *e, const kvs_episodes_options *o)
{
    const kvs_model_info *const i = &e->model->info;
    const kvs_cache_config c = {.n_layers = i->n_layers,
                                .n_kv_heads = i->n_kv_heads,
                                .head_dim = i->head_dim,
                                .kv_f32 = e->plan.kv_type == KVS_KV_F32};
    if (e->plan.budget_bytes == 0)
        e->plan.budget_bytes =
            kvs_cache_bytes_for_tokens(&c, o->budget_tokens != 0 ? o->budget_tokens : i->window_tokens);
    if (e->plan.block_tokens == 0) {
        const uint32_t eighth = kvs_cache_tokens_for_bytes(&c, e->plan.budget_bytes) / 8;
        e->plan.block_tokens = kvs_min_u32(kvs_max_u32(eighth / KVS_PAGE_SLOTS * KVS_PAGE_SLOTS, BLOCK_MIN), BLOCK_MAX);
    }
    if (e->plan.words_tokens == 0)
        e->plan.words_tokens = e->plan.block_tokens;
}

/* Sets the working room for blocks and words that are known; pages of a share that then fit. 0: none. */
static kvs_status share_pages(kvs_episodes *e, uint64_t *work_tokens, uint64_t *pages, kvs_error *err)
{
    kvs_episodes_plan *const p = &e->plan;
    uint32_t request;
    KVS_TRY(kvs_probe_extract_tokens(e->model, &request, err));
    *work_tokens = (uint64_t)p->block_tokens + request + p->words_tokens;
    p->work_pages = (uint32_t)((*work_tokens + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS);
    const sizes s = sizes_of(e);
    const uint64_t empty = total_bytes(e, 0);
    *pages = p->budget_bytes < empty ? 0 : (p->budget_bytes - empty) / (p->n_episodes * (s.block + s.side));
    return KVS_OK;
}

/* The last page of each head is half empty where heads differ: one is for that. */
static uint32_t slack_pages(const kvs_episodes_plan *p)
{
    return is_ragged(p) ? 1 : 0;
}

/* Once it is known how many words the longest episode has. */
static kvs_status divide_budget(kvs_episodes *e, kvs_error *err)
{
    kvs_episodes_plan *const p = &e->plan;
    const uint32_t slack = slack_pages(p);
    uint64_t work, pages;
    KVS_TRY(share_pages(e, &work, &pages, err));
    if (pages < 1 + slack)
        return kvs_error_set(err, KVS_EBUDGET,
                             "budget of %llu bytes cannot hold %u episodes of %d tokens and a working room of %llu "
                             "(a block of %u, rows that score it); it must be at least %llu bytes",
                             (unsigned long long)p->budget_bytes, p->n_episodes, KVS_PAGE_SLOTS,
                             (unsigned long long)work, p->block_tokens, (unsigned long long)total_bytes(e, 1 + slack));
    if (pages > INT32_MAX / (2 * KVS_PAGE_SLOTS) - p->work_pages)
        return kvs_error_set(err, KVS_EINVAL, "budget of %llu bytes is over what %u episodes can use",
                             (unsigned long long)p->budget_bytes, p->n_episodes);
    p->share_pages = (uint32_t)pages;
    p->share_tokens = (p->share_pages - slack) * KVS_PAGE_SLOTS;
    return KVS_OK;
}

kvs_status kvs_episodes_check_plan(kvs_episodes *e, kvs_error *err)
{
    kvs_episodes_plan *const p = &e->plan;
    const uint32_t work_pages = p->work_pages;
    uint64_t work, pages;
    KVS_TRY(share_pages(e, &work, &pages, err));
    if (p->work_pages != work_pages || p->share_pages != pages || pages < 1 + slack_pages(p) ||
        p->share_tokens != (pages - slack_pages(p)) * KVS_PAGE_SLOTS)
        return kvs_error_set(
            err, KVS_EFORMAT,
            "saved episodes are damaged: shares of %u tokens and a working room of %u pages do not come "
            "to a budget of %llu bytes",
            p->share_tokens, work_pages, (unsigned long long)p->budget_bytes);
    return KVS_OK;
}

/* ---- sessions ---- */

static kvs_status write_spec(const kvs_episodes_plan *p, char *spec, size_t cap_bytes, kvs_error *err)
{
    const int n =
        snprintf(spec, cap_bytes, "epicache:keep=%utok +probe=extract:text=%u%s%s%s", p->share_tokens, p->words_tokens,
                 p->uniform_heads ? " +budget=uniform" : "", p->protect[0] != '\0' ? " +protect=" : "", p->protect);
    return n > 0 && (size_t)n < cap_bytes ? KVS_OK : kvs_error_set(err, KVS_EINVAL, "protect is too long");
}

kvs_status kvs_episodes_open(kvs_episodes *e, kvs_error *err)
{
    const kvs_episodes_plan *const p = &e->plan;
    char spec[256];
    KVS_TRY(write_spec(p, spec, sizeof spec, err));
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = spec;
    o.position = p->position[0] != '\0' ? p->position : NULL;
    o.budget_tokens = (p->share_pages + p->work_pages) * KVS_PAGE_SLOTS;
    o.kv_type = p->kv_type;
    o.arith = p->arith;
    o.chunk_tokens = p->chunk_tokens;
    o.seed = p->seed;
    o.allocator = e->allocator;
    for (uint32_t i = 0; i < p->n_episodes; i++) {
        const kvs_kinship kinship = {.first = i == 0 ? NULL : e->episodes[0].session,
                                     .own_tokens = i == 0 ? 0 : p->share_pages * KVS_PAGE_SLOTS,
                                     .layer_share = e->layer_share};
        KVS_TRY(kvs_session_create_kin(e->model, &o, &kinship, &e->episodes[i].session, err));
        kvs_probe_set_words(e->episodes[i].session, e->episodes[i].words, e->episodes[i].n_words);
    }
    return KVS_OK;
}

static uint64_t kv_bytes_of(const kvs_session *s)
{
    const kvs_cache_meter *const m = kvs_cache_meter_now(s->cache);
    return m->reserved_bytes + m->side_bytes;
}

/* The most that all caches held together since `active` was entered: the others stood still. */
static uint64_t recent_peak(const kvs_episodes *e)
{
    uint64_t bytes = kvs_cache_meter_now(e->episodes[e->active].session->cache)->kv_bytes_peak;
    for (uint32_t i = 0; i < e->plan.n_episodes; i++)
        bytes += i == e->active ? 0 : kv_bytes_of(e->episodes[i].session);
    return bytes;
}

bool kvs_episodes_over_share(const kvs_episodes *e, uint32_t episode)
{
    const kvs_session *const s = e->episodes[episode].session;
    return kvs_cache_live_total(s->cache) > (uint64_t)e->plan.share_tokens * s->scratch.n_heads;
}

/* Down to the share, if it is over. */
static kvs_status settle(const kvs_episodes *e, uint32_t episode, kvs_error *err)
{
    kvs_session *const s = e->episodes[episode].session;
    if (!kvs_episodes_over_share(e, episode))
        return KVS_OK;
    KVS_TRY(kvs_session_evict(s, 0, err));
    if (kvs_episodes_over_share(e, episode))
        return kvs_error_set(err, KVS_EBUDGET,
                             "an episode's share is %u tokens a head, %.0f are protected (sinks, system prompt): raise "
                             "the budget or use protect none",
                             e->plan.share_tokens, (double)kvs_cache_live_total(s->cache) / s->scratch.n_heads);
    return KVS_OK;
}

/* The working room goes from one episode to another, which must have given it back. */
static kvs_status enter(kvs_episodes *e, uint32_t episode, kvs_error *err)
{
    if (episode == e->active)
        return KVS_OK;
    KVS_TRY(settle(e, e->active, err));
    const uint64_t peak = recent_peak(e);
    e->peak_bytes = peak > e->peak_bytes ? peak : e->peak_bytes;
    e->active = episode;
    kvs_cache_restart_peaks(e->episodes[episode].session->cache);
    return KVS_OK;
}

/* ---- grouping ---- */

typedef struct grouping {
    kvs_windows windows;
    float *vector;   /* [n][dim] */
    uint32_t *label; /* [n] */
    uint32_t *pick;  /* [n] windows that speak for an episode */
    char *text;      /* their text */
} grouping;

static void grouping_free(const kvs_episodes *e, grouping *g)
{
    kvs_windows_free(&g->windows, e->allocator);
    kvs_free(e->allocator, g->vector);
    kvs_free(e->allocator, g->label);
    kvs_free(e->allocator, g->pick);
    kvs_free(e->allocator, g->text);
}

static kvs_status group(kvs_episodes *e, grouping *g, kvs_error *err)
{
    const uint32_t n = g->windows.n, dim = e->plan.dim, k = e->plan.n_episodes;
    e->plan.n_windows = n;
    if (k > n)
        return kvs_error_set(err, KVS_EINVAL,
                             "%u episodes are asked for, the history has %u windows of %u utterances: at most %u", k, n,
                             e->plan.window_utterances, n);
    g->vector = kvs_alloc(e->allocator, (size_t)n * dim, sizeof *g->vector);
    g->label = kvs_alloc(e->allocator, n, sizeof *g->label);
    g->pick = kvs_alloc(e->allocator, n, sizeof *g->pick);
    g->text = kvs_alloc(e->allocator, g->windows.begin[n] + n + 1, 1);
    e->centroid = kvs_alloc(e->allocator, (size_t)k * dim, sizeof *e->centroid);
    e->episodes = kvs_alloc(e->allocator, k, sizeof *e->episodes);
    if (g->vector == NULL || g->label == NULL || g->pick == NULL || g->text == NULL || e->centroid == NULL ||
        e->episodes == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory to group %u windows", n);
    for (uint32_t i = 0; i < n; i++)
        KVS_TRY(embed(e, g->windows.text + g->windows.begin[i], g->windows.begin[i + 1] - g->windows.begin[i],
                      g->vector + (size_t)i * dim, err));
    return kvs_cluster(g->vector, n, dim, k, e->allocator, g->label, e->centroid, err);
}

/* The n nearest windows, in the order they were said, each with an empty line behind it. Returns the bytes. */
static size_t write_words(grouping *g, uint32_t n)
{
    size_t bytes = 0;
    uint32_t next = 0;
    for (uint32_t done = 0; done < n; done++) {
        uint32_t least = UINT32_MAX;
        for (uint32_t i = 0; i < n; i++)
            if (g->pick[i] >= next && g->pick[i] < least)
                least = g->pick[i];
        next = least + 1;
        const size_t begin = g->windows.begin[least], size = g->windows.begin[least + 1] - begin;
        memcpy(g->text + bytes, g->windows.text + begin, size);
        bytes += size;
        g->text[bytes++] = '\n';
    }
    return bytes;
}

/* Tokens of as many of the nearest windows as fit; of the nearest alone its beginning, if need be. */
static kvs_status choose_words(const kvs_episodes *e, grouping *g, uint32_t which, kvs_episode *out, kvs_error *err)
{
    const uint32_t cap = e->plan.words_tokens;
    uint32_t n =
        kvs_cluster_nearest(g->vector, g->windows.n, e->plan.dim, g->label, which,
                            e->centroid + (size_t)which * e->plan.dim, e->plan.n_medoids, g->pick, &out->n_windows);
    const size_t room = write_words(g, n) + 2;
    int32_t *const tokens = kvs_alloc(e->allocator, room, sizeof *tokens);
    if (tokens == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the words of episode %u", which);
    size_t count = 0;
    kvs_status status;
    do {
        status = kvs_tokenize(e->model, g->text, write_words(g, n), false, false, tokens, room, &count, err);
    } while (status == KVS_OK && count > cap && n-- > 1);
    out->n_medoids = kvs_max_u32(n, 1);
    out->n_words = (uint32_t)(count < cap ? count : cap);
    if (status == KVS_OK && (out->words = kvs_alloc(e->allocator, out->n_words, sizeof *out->words)) == NULL)
        status = kvs_error_set(err, KVS_ENOMEM, "no memory for the words of episode %u", which);
    if (status == KVS_OK)
        memcpy(out->words, tokens, out->n_words * sizeof *tokens);
    kvs_free(e->allocator, tokens);
    return status;
}

/* ---- prefill ---- */

typedef struct prefill {
    const kvs_episodes_options *o;
    const kvs_rendered *history;
    uint64_t n_done;
} prefill;

static kvs_status prefill_block(kvs_episodes *e, uint32_t episode, prefill *x, size_t begin, size_t end, kvs_error *err)
{
    kvs_session *const s = e->episodes[episode].session;
    for (size_t at = begin; at < end;) {
        const uint32_t n = (uint32_t)(end - at < SLICE_TOKENS ? end - at : SLICE_TOKENS);
        KVS_TRY(kvs_session_extend(s, x->history->tokens + at, x->history->flags + at, n, NULL, err));
        at += n;
        x->n_done += n;
        if (x->o->on_progress != NULL &&
            !x->o->on_progress(x->o->ctx, episode, x->n_done, e->plan.n_episodes * x->history->n_tokens))
            return kvs_error_set(err, KVS_ECANCELLED, "the caller's callback asked to stop");
    }
    return settle(e, episode, err);
}

static kvs_status prefill_all(kvs_episodes *e, prefill *x, kvs_error *err)
{
    const size_t n = x->history->n_tokens, block = e->plan.block_tokens;
    for (uint32_t i = 0; i < e->plan.n_episodes; i++) {
        KVS_TRY(enter(e, i, err));
        for (size_t at = 0; at < n; at += block)
            KVS_TRY(prefill_block(e, i, x, at, n - at < block ? n : at + block, err));
    }
    return KVS_OK;
}

static kvs_status build(kvs_episodes *e, const kvs_episodes_options *o, const kvs_message *messages, size_t n_messages,
                        grouping *g, kvs_error *err)
{
    KVS_TRY(kvs_windows_make(messages, n_messages, e->plan.window_utterances, e->allocator, &g->windows, err));
    KVS_TRY(group(e, g, err));
    read_budget(e, o);
    uint32_t longest = 0;
    for (uint32_t i = 0; i < e->plan.n_episodes; i++) {
        KVS_TRY(choose_words(e, g, i, &e->episodes[i], err));
        longest = kvs_max_u32(longest, e->episodes[i].n_words);
    }
    e->plan.words_tokens = longest;
    if (e->plan.shared_layers)
        KVS_TRY(share_layers(e, o->sensitivity, o->alpha, err));
    KVS_TRY(divide_budget(e, err));
    KVS_TRY(kvs_episodes_open(e, err));
    kvs_rendered history;
    KVS_TRY(kvs_chat_render(e->model, messages, n_messages, 0, false, &history, err));
    prefill x = {.o = o, .history = &history};
    const kvs_status status = prefill_all(e, &x, err);
    kvs_rendered_free(&history);
    return status;
}

kvs_status kvs_episodes_create(kvs_model *m, const kvs_episodes_options *opt, const kvs_message *messages,
                               size_t n_messages, kvs_episodes **out, kvs_error *err)
{
    kvs_episodes_options defaults;
    kvs_episodes_options_default(&defaults);
    const kvs_episodes_options *const o = opt != NULL ? opt : &defaults;
    *out = NULL;
    for (size_t i = 0; i < n_messages; i++)
        if (messages[i].role == NULL || messages[i].content == NULL)
            return kvs_error_set(err, KVS_EINVAL, "message %zu of the history has no role or no content", i);
    if (n_messages == 0 || strcmp(messages[n_messages - 1].role, "assistant") != 0)
        return kvs_error_set(err, KVS_EINVAL, "the history of %zu messages must end with the assistant's", n_messages);
    kvs_episodes *e;
    KVS_TRY(kvs_episodes_new(m, o, &e, err));
    grouping g = {0};
    const kvs_status status = build(e, o, messages, n_messages, &g, err);
    grouping_free(e, &g);
    if (status != KVS_OK) {
        kvs_episodes_free(&e);
        return status;
    }
    *out = e;
    return KVS_OK;
}

/* ---- asking ---- */

kvs_status kvs_episodes_route(kvs_episodes *e, const char *text, uint32_t *episode, float *similarity, kvs_error *err)
{
    float *const vector = kvs_alloc(e->allocator, e->plan.dim, sizeof *vector);
    if (vector == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a vector of %u numbers", e->plan.dim);
    const kvs_status status = embed(e, text, strlen(text), vector, err);
    double best = -(double)INFINITY;
    for (uint32_t i = 0; i < e->plan.n_episodes && status == KVS_OK; i++) {
        const double x = kvs_vector_dot(vector, e->centroid + (size_t)i * e->plan.dim, e->plan.dim);
        if (similarity != NULL)
            similarity[i] = (float)x;
        if (x > best) {
            best = x;
            *episode = i;
        }
    }
    kvs_free(e->allocator, vector);
    return status;
}

/* How many tokens an answer may have so that nothing has to be evicted for it. */
static kvs_status answer_room(const kvs_session *s, const char *user, uint32_t *n, kvs_error *err)
{
    const kvs_message later[] = {{"user", "x"}, {"assistant", "x"}, {"user", user}};
    kvs_rendered prompt = {0}, tail = {0};
    kvs_status status = kvs_chat_render(s->model, later, 3, 2, true, &prompt, err);
    if (status == KVS_OK)
        status = kvs_chat_turn_end(s->model, &tail, err);
    const uint64_t room = kvs_session_room(s), taken = prompt.n_tokens + tail.n_tokens;
    kvs_rendered_free(&prompt);
    kvs_rendered_free(&tail);
    if (status == KVS_OK && taken >= room)
        return kvs_error_set(err, KVS_EBUDGET,
                             "a question of %llu tokens leaves no room for an answer: an episode has %llu for both; "
                             "raise the budget or block_tokens, or keep turns",
                             (unsigned long long)taken, (unsigned long long)room);
    *n = (uint32_t)(room - taken);
    return status;
}

kvs_status kvs_episodes_turn(kvs_episodes *e, const char *user, const kvs_sampling *params, kvs_token_fn on_token,
                             void *ctx, kvs_generation *result, uint32_t *episode, kvs_error *err)
{
    kvs_sampling p;
    kvs_sampling_default(&p);
    if (params != NULL)
        p = *params;
    uint32_t which;
    KVS_TRY(kvs_episodes_route(e, user, &which, NULL, err));
    kvs_session *const s = e->episodes[which].session;
    if (!e->plan.keep_turns) {
        uint32_t room = 0;
        KVS_TRY(answer_room(s, user, &room, err));
        p.max_tokens = kvs_min_u32(p.max_tokens, room);
    }
    KVS_TRY(enter(e, which, err));
    if (episode != NULL)
        *episode = which;
    const uint64_t before = s->n_tokens;
    const kvs_status status = kvs_chat_turn(s, user, NULL, &p, on_token, ctx, result, err);
    if (!e->plan.keep_turns)
        KVS_TRY(kvs_session_truncate(s, before, status == KVS_OK ? err : NULL));
    return status;
}

/* ---- what it tells ---- */

void kvs_episodes_get_usage(const kvs_episodes *e, kvs_episodes_usage *u)
{
    const kvs_episodes_plan *const p = &e->plan;
    const uint64_t peak = recent_peak(e);
    *u = (kvs_episodes_usage){.n_episodes = p->n_episodes,
                              .n_resident = p->n_episodes,
                              .keep_turns = p->keep_turns,
                              .active = e->active,
                              .budget_bytes = p->budget_bytes,
                              .reserved_bytes = total_bytes(e, p->share_pages),
                              .kv_bytes_peak = peak > e->peak_bytes ? peak : e->peak_bytes,
                              .scratch_bytes = e->model->forward->bytes,
                              .share_tokens = p->share_tokens,
                              .work_tokens = p->work_pages * KVS_PAGE_SLOTS};
    for (uint32_t i = 0; i < p->n_episodes; i++) {
        const kvs_session *const s = e->episodes[i].session;
        u->kv_bytes += kv_bytes_of(s);
        u->scratch_bytes += s->scratch.bytes + s->queries.bytes + s->probe.bytes;
    }
}

bool kvs_episodes_get_info(const kvs_episodes *e, uint32_t episode, kvs_episode_info *info)
{
    if (episode >= e->plan.n_episodes)
        return false;
    const kvs_episode *const x = &e->episodes[episode];
    *info = (kvs_episode_info){.n_windows = x->n_windows,
                               .n_medoids = x->n_medoids,
                               .words = x->words,
                               .n_words = x->n_words,
                               .n_tokens = x->session->n_tokens};
    return true;
}

kvs_session *kvs_episodes_session(kvs_episodes *e, uint32_t episode)
{
    return episode < e->plan.n_episodes ? e->episodes[episode].session : NULL;
}

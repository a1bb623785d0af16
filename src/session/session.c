/* Create, fork, free, truncate, and everything a session tells about itself. The turn loop is in step.c and chat.c. */
#include "session/session_internal.h"

#include "cache/positions.h"
#include "session/health.h"

#include <math.h>
#include <string.h>

void kvs_session_options_default(kvs_session_options *opt)
{
    *opt = (kvs_session_options){.kv_type = KVS_KV_F16, .arith = KVS_ARITH_NATIVE, .seed = 1};
}

/* Even shares that one layer may keep, rounded up. */
static uint32_t layer_share_max(const kvs_session *s)
{
    double most = 1;
    for (uint32_t l = 0; s->layer_share != NULL && l < s->model->info.n_layers; l++)
        most = s->layer_share[l] > most ? s->layer_share[l] : most;
    return (uint32_t)__builtin_ceil(most);
}

/* n_held: slots of the fullest head that a fork takes over. */
static kvs_cache_config cache_config(const kvs_session *s, uint32_t n_held)
{
    const kvs_model_info *i = &s->model->info;
    kvs_cache_config c = {
        .n_layers = i->n_layers,
        .n_kv_heads = i->n_kv_heads,
        .head_dim = i->head_dim,
        .kv_f32 = s->options.kv_type == KVS_KV_F32,
        .side_mask = kvs_side_mask(&s->policy),
        .budget_bytes = s->options.budget_bytes,
        .budget_tokens = s->options.budget_tokens,
        .allocator = s->allocator,
    };
    /* A budget in bytes lets a ragged policy give one head most of it; uniform ones need the share of one. */
    const uint32_t share = c.budget_tokens != 0 ? c.budget_tokens : kvs_cache_tokens_for_bytes(&c, c.budget_bytes);
    uint64_t most = ((uint64_t)share + KVS_PAGE_SLOTS) * layer_share_max(s);
    if (kvs_policy_is_ragged(
            &s->policy)) /* one head may get several even shares; how many is the budget stage's to say */
        most *=
            s->policy.budget == NULL || s->policy.budget->share_max == 0 ? i->n_kv_heads : s->policy.budget->share_max;
    c.ragged = s->layer_share != NULL || kvs_policy_is_ragged(&s->policy);
    most = most > (uint64_t)n_held + KVS_PAGE_SLOTS ? most : (uint64_t)n_held + KVS_PAGE_SLOTS;
    c.slots_max = most < UINT32_MAX ? (uint32_t)most : UINT32_MAX;
    return c;
}

static kvs_status check_options(const kvs_model *m, const kvs_session_options *o, kvs_error *err)
{
    if (m->layers == NULL)
        return kvs_error_set(err, KVS_EINVAL, "model %s was opened with vocab_only: it has no weights", m->info.path);
    if (o->budget_bytes != 0 && o->budget_tokens != 0)
        return kvs_error_set(err, KVS_EINVAL, "budget is given in bytes (%llu) and in tokens (%u): give one",
                             (unsigned long long)o->budget_bytes, o->budget_tokens);
    if (o->kv_type != KVS_KV_F16 && o->kv_type != KVS_KV_F32)
        return kvs_error_set(err, KVS_EINVAL, "kv_type %d is not one: f16 or f32", (int)o->kv_type);
    if (o->arith != KVS_ARITH_NATIVE && o->arith != KVS_ARITH_F32)
        return kvs_error_set(err, KVS_EINVAL, "arith %d is not one: native or f32", (int)o->arith);
    return KVS_OK;
}

/* What must fit whatever happens: the sinks and recent tokens that are protected, and one more. */
static kvs_status check_budget(const kvs_session *s, kvs_error *err)
{
    const kvs_cache_meter m = *kvs_cache_meter_now(s->cache);
    const kvs_protect *p = &s->policy.protect;
    const uint32_t sinks = kvs_policy_sinks(&s->policy);
    const uint64_t least = s->policy.ops->never_evicts ? 1 : (uint64_t)sinks + p->recent + 1 + s->probe.reserve_tokens;
    if (m.budget_tokens < least)
        return kvs_error_set(
            err, KVS_EBUDGET,
            "budget of %llu tokens a head (%llu bytes) cannot hold what is protected (sinks %u, recent "
            "%u), %u rows of a probe and one token; it must be at least %llutok",
            (unsigned long long)m.budget_tokens, (unsigned long long)m.budget_bytes, sinks, p->recent,
            s->probe.reserve_tokens, (unsigned long long)least);
    if (s->policy.schedule == KVS_SCHEDULE_TOKENS && s->policy.schedule_value > m.budget_tokens &&
        !s->policy.ops->never_evicts)
        return kvs_error_set(err, KVS_EINVAL, "trigger tokens:%llu is over the budget of %llu tokens",
                             (unsigned long long)s->policy.schedule_value, (unsigned long long)m.budget_tokens);
    if (s->policy.schedule == KVS_SCHEDULE_BYTES && s->policy.schedule_value > m.budget_bytes &&
        !s->policy.ops->never_evicts)
        return kvs_error_set(err, KVS_EINVAL, "trigger bytes:%llu is over the budget of %llu bytes",
                             (unsigned long long)s->policy.schedule_value, (unsigned long long)m.budget_bytes);
    return KVS_OK;
}

/* A session without a cache yet. */
static kvs_status session_new(kvs_model *m, const kvs_session_options *opt, kvs_session **out, kvs_error *err)
{
    KVS_TRY(check_options(m, opt, err));
    const kvs_allocator *a = opt->allocator != NULL ? opt->allocator : m->allocator;
    kvs_session *s = kvs_alloc(a, 1, sizeof *s);
    if (s == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a session");
    s->model = m;
    s->allocator = a;
    s->options = *opt;
    s->options.policy = s->options.position = s->options.ffn_skip = NULL;
    s->uniform = s->layer_uniform = true;
    s->mass_lost = -1;
    if (opt->budget_bytes == 0 && opt->budget_tokens == 0)
        s->options.budget_tokens = m->info.window_tokens;
    kvs_status status = kvs_policy_parse(opt->policy != NULL ? opt->policy : "baseline", opt->position,
                                         opt->paper_compat, &s->policy, err);
    if (status == KVS_OK)
        status = kvs_ffn_skip_parse(opt->ffn_skip, m->info.n_layers, &s->ffn, err);
    if (status != KVS_OK) {
        kvs_free(a, s);
        return status;
    }
    *out = s;
    return KVS_OK;
}

/* What steps of this session will need of the model's shared workspace. */
static kvs_status reserve_forward(const kvs_session *s, kvs_forward *f, kvs_error *err)
{
    const size_t bytes = kvs_attend_scratch_bytes(s->model, kvs_cache_pages_bound(s->cache));
    pthread_mutex_lock(&f->lock); /* another session's step may be in it */
    const kvs_status status = kvs_forward_need_scratch(f, bytes, err);
    pthread_mutex_unlock(&f->lock);
    return status;
}

static kvs_status create_queries(kvs_session *s, kvs_error *err)
{
    const kvs_model_info *i = &s->model->info;
    s->queries = (kvs_query_log){.n_layers = i->n_layers,
                                 .n_kv_heads = i->n_kv_heads,
                                 .group = i->n_heads / i->n_kv_heads,
                                 .head_dim = i->head_dim,
                                 .mixes = s->policy.budget != NULL && s->policy.budget->similarity};
    return kvs_query_log_create(&s->queries, s->allocator, kvs_policy_window(&s->policy),
                                (kvs_policy_needs(&s->policy) & KVS_POLICY_NEEDS_QUERY_STATS) != 0, err);
}

/* Text that ends a sentence: a mark that closes one, whatever quotes and blanks follow it, or a line's end. */
static bool ends_sentence(const char *text, size_t n)
{
    static const char *const wide[] = {"\xe3\x80\x82", "\xef\xbc\x81", "\xef\xbc\x9f"}; /* U+3002, U+FF01, U+FF1F */
    if (memchr(text, '\n', n) != NULL)
        return true;
    while (n > 0 && strchr(" \t\r\"')]}", text[n - 1]) != NULL)
        n--;
    for (size_t i = 0; n >= 3 && i < sizeof wide / sizeof *wide; i++)
        if (memcmp(text + n - 3, wide[i], 3) == 0)
            return true;
    return n > 0 && strchr(".!?", text[n - 1]) != NULL;
}

kvs_status kvs_sentence_ends_create(kvs_session *s, kvs_error *err)
{
    const uint32_t n = s->model->info.vocab_size;
    if (s->sentence_ends != NULL)
        return KVS_OK;
    s->sentence_ends = kvs_alloc(s->allocator, n / 64 + 1, sizeof *s->sentence_ends);
    if (s->sentence_ends == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory to remember which of %u tokens end a sentence", n);
    for (uint32_t t = 0; t < n; t++) {
        char text[64]; /* of a longer one only what fits is looked at: those are runs of blanks and rules */
        size_t size = kvs_token_text(s->model, (int32_t)t, false, text, sizeof text);
        size = size < sizeof text ? size : sizeof text;
        if (ends_sentence(text, size))
            s->sentence_ends[t / 64] |= UINT64_C(1) << t % 64;
    }
    return KVS_OK;
}

/* n_slots: what a head may hold, so that as many tokens lie between two evictions at most. */
static kvs_status create_sentences(kvs_session *s, uint32_t n_slots, kvs_error *err)
{
    const kvs_select_ops *const ops = s->policy.select;
    if (ops == NULL || !ops->meanings)
        return KVS_OK;
    s->sentences = (kvs_sentence_log){
        .ends = s->sentence_ends,
        .n_embd = s->model->info.n_embd,
        .vocab_size = s->model->info.vocab_size,
        .threshold = (float)s->policy.select_params[0],
        .segmenter = {.shortest = (uint32_t)s->policy.select_params[1],
                      .longest = (uint32_t)kvs_max_u32((uint32_t)s->policy.select_params[1],
                                                       (uint32_t)s->policy.select_params[2])},
    };
    return kvs_sentence_log_create(&s->sentences, s->allocator, n_slots, err);
}

/* Reads the file that the budget stage needs, unless a fork has its parent's. */
static kvs_status create_profile(kvs_session *s, kvs_error *err)
{
    static pthread_mutex_t hashing = PTHREAD_MUTEX_INITIALIZER; /* kvs_model_sha256 keeps what it found */
    const kvs_profile_want *want = s->policy.budget == NULL ? NULL : s->policy.budget->file;
    if (want == NULL || s->profile.block != NULL)
        return KVS_OK;
    if (s->policy.budget_file[0] == '\0')
        return kvs_error_set(err, KVS_EINVAL, "%s: +budget=%s needs file=PATH (%s)", s->policy.ops->name,
                             s->policy.budget->info.name, want->doc);
    pthread_mutex_lock(&hashing);
    const kvs_profile_model model = {kvs_model_sha256(s->model), s->model->info.n_layers, s->model->info.n_kv_heads};
    pthread_mutex_unlock(&hashing);
    KVS_TRY(kvs_profile_read(s->policy.budget_file, want, &model, s->allocator, &s->profile, err));
    return kvs_policy_set_hash(&s->policy, s->profile.sha256, err);
}

static kvs_status finish_create(kvs_session *s, kvs_error *err)
{
    kvs_forward *f;
    KVS_TRY(create_profile(s, err));
    KVS_TRY(create_queries(s, err));
    KVS_TRY(kvs_ffn_skip_create(&s->ffn, s->allocator, err));
    if (s->policy.select != NULL && s->policy.select->sentences)
        KVS_TRY(kvs_sentence_ends_create(s, err));
    KVS_TRY(kvs_session_forward(s, &f, err));
    KVS_TRY(kvs_evict_scratch_create(s, err));
    KVS_TRY(create_sentences(s, s->scratch.n_slots, err));
    KVS_TRY(kvs_probe_create(s, err));
    KVS_TRY(check_budget(s, err));
    KVS_TRY(reserve_forward(s, f, err));
    const kvs_cache_meter m = *kvs_cache_meter_now(s->cache);
    const uint32_t chunk = s->options.chunk_tokens != 0 ? s->options.chunk_tokens : 256;
    const uint32_t quarter = (uint32_t)kvs_max_u32((uint32_t)(m.budget_tokens / 4), 1);
    s->chunk_tokens = kvs_min_u32(kvs_min_u32(chunk, quarter), f->max_rows);
    return KVS_OK;
}

kvs_status kvs_session_create(kvs_model *m, const kvs_session_options *opt, kvs_session **out, kvs_error *err)
{
    return kvs_session_create_profiled(m, opt, NULL, out, err);
}

kvs_status kvs_session_create_profiled(kvs_model *m, const kvs_session_options *opt, const kvs_profile *profile,
                                       kvs_session **out, kvs_error *err)
{
    kvs_session_options defaults;
    kvs_session_options_default(&defaults);
    return kvs_session_create_kin(m, opt != NULL ? opt : &defaults, &(kvs_kinship){.profile = profile}, out, err);
}

kvs_status kvs_session_create_kin(kvs_model *m, const kvs_session_options *opt, const kvs_kinship *kinship,
                                  kvs_session **out, kvs_error *err)
{
    *out = NULL;
    kvs_session *s;
    KVS_TRY(session_new(m, opt, &s, err));
    s->kin = kinship->first;
    s->layer_share = kinship->layer_share;
    kvs_cache_config config = cache_config(s, 0);
    config.own_tokens = kinship->own_tokens;
    kvs_status status = s->kin == NULL ? kvs_cache_create(&config, &s->cache, err)
                                       : kvs_cache_fork(s->kin->cache, &config, &s->cache, err);
    if (status == KVS_OK && kinship->profile != NULL)
        status = kvs_profile_copy(kinship->profile, s->allocator, &s->profile, err);
    if (status == KVS_OK)
        status = finish_create(s, err);
    if (status != KVS_OK) {
        kvs_session_free(&s);
        return status;
    }
    *out = s;
    return KVS_OK;
}

void kvs_session_free(kvs_session **session)
{
    kvs_session *s = *session;
    if (s == NULL)
        return;
    *session = NULL;
    kvs_cache_free(&s->cache);
    kvs_evict_scratch_free(s);
    kvs_probe_free(s);
    kvs_query_log_free(&s->queries, s->allocator);
    kvs_ffn_skip_free(&s->ffn, s->allocator);
    kvs_sentence_log_free(&s->sentences, s->allocator);
    kvs_steer_free(s);
    kvs_profile_free(&s->profile, s->allocator);
    kvs_free(s->allocator, s->sentence_ends);
    kvs_free(s->allocator, s);
}

/* ---- fork ---- */

static void fork_state(const kvs_session *from, kvs_session *s)
{
    s->n_tokens = from->n_tokens;
    s->n_tokens_evicted_at = from->n_tokens_evicted_at;
    s->uniform = from->uniform;
    s->layer_uniform = from->layer_uniform;
    s->forward_open = from->forward_open;
    s->last_was_prompt = from->last_was_prompt;
    s->evicted_after_prompt = from->evicted_after_prompt;
    s->mass_lost = from->mass_lost;
    s->footprint_skip = from->footprint_skip;
    s->n_evictions = from->n_evictions; /* a random policy draws by it */
    s->n_slots_evicted = from->n_slots_evicted;
    s->saw_nan = from->saw_nan;
    s->schedule_mark = s->policy.schedule == KVS_SCHEDULE_EVERY ? from->n_tokens : 0;
    if (strcmp(s->policy.text, from->policy.text) == 0)
        s->schedule_mark = from->schedule_mark;
    kvs_turn_log_copy(&s->turns, &from->turns);
    kvs_query_log_copy(&s->queries, &from->queries);
    kvs_ffn_skip_copy(&s->ffn, &from->ffn);
    kvs_sentence_log_copy(&s->sentences, &from->sentences, from->n_tokens);
}

static bool fits_budget(const kvs_session *s)
{
    const kvs_cache_meter *m = kvs_cache_meter_now(s->cache);
    /* Where heads differ a budget in tokens bounds their mean, as in kvs_cache_room; one in bytes bounds pages alone. */
    const uint64_t n_heads = (uint64_t)s->model->info.n_layers * s->model->info.n_kv_heads;
    const bool slots_fit = !kvs_policy_is_ragged(&s->policy) ? kvs_cache_live_max(s->cache) <= m->budget_tokens
                           : s->options.budget_tokens != 0
                               ? kvs_cache_live_total(s->cache) <= m->budget_tokens * n_heads
                               : true;
    return slots_fit && m->reserved_bytes + m->side_bytes <= m->budget_bytes;
}

/* A fork onto a smaller budget evicts at once. */
static kvs_status fit_budget(kvs_session *s, kvs_error *err)
{
    const kvs_cache_meter *m = kvs_cache_meter_now(s->cache);
    if (fits_budget(s))
        return KVS_OK;
    if (s->policy.ops->never_evicts)
        return kvs_error_set(err, KVS_EBUDGET, "%u slots a head are held, the new budget has %llu and %s never evicts",
                             kvs_cache_live_max(s->cache), (unsigned long long)m->budget_tokens, s->policy.ops->name);
    KVS_TRY(kvs_session_evict(s, kvs_keep_default(s), err));
    if (!fits_budget(s))
        return kvs_error_set(err, KVS_EBUDGET,
                             "%u slots a head are held or protected, the new budget has %llu; raise it or use "
                             "+protect=none",
                             kvs_cache_live_max(s->cache), (unsigned long long)m->budget_tokens);
    return KVS_OK;
}

kvs_status kvs_session_fork(kvs_session *from, const kvs_session_options *opt, kvs_session **out, kvs_error *err)
{
    *out = NULL;
    kvs_session_options o = opt != NULL ? *opt : from->options;
    const bool same_policy = opt == NULL || opt->policy == NULL;
    if (same_policy)
        o.policy = from->policy.text;
    if (o.kv_type != from->options.kv_type || o.arith != from->options.arith)
        return kvs_error_set(err, KVS_EINVAL, "a fork must have its parent's kv_type and arith");
    kvs_session *s;
    KVS_TRY(session_new(from->model, &o, &s, err));
    if (same_policy && o.position == NULL)
        s->policy = from->policy; /* paper_compat and the spec's own position may differ from the text's reading */
    if (o.ffn_skip == NULL) {
        s->ffn = from->ffn;
        s->ffn.rule.counts = NULL;
    }
    const kvs_cache_config config = cache_config(s, kvs_cache_live_max(from->cache));
    kvs_status status = kvs_cache_fork(from->cache, &config, &s->cache, err);
    if (status == KVS_OK && same_policy)
        status = kvs_profile_copy(&from->profile, s->allocator, &s->profile, err);
    if (status == KVS_OK)
        status = finish_create(s, err);
    if (status == KVS_OK) {
        fork_state(from, s);
        status = kvs_steer_fork(s, from, err);
    }
    if (status == KVS_OK) {
        status = fit_budget(s, err);
    }
    if (status != KVS_OK) {
        kvs_session_free(&s);
        return status;
    }
    *out = s;
    return KVS_OK;
}

/* ---- turns, eviction on demand, truncation ---- */

static kvs_status evict_locked(kvs_session *s, uint32_t keep, const char *path, const char *reason, kvs_error *err)
{
    kvs_forward *f;
    KVS_TRY(kvs_session_forward(s, &f, err));
    bool progress;
    pthread_mutex_lock(&f->lock);
    const kvs_status status = kvs_evict(s, f, keep, path, reason, &progress, err);
    pthread_mutex_unlock(&f->lock);
    return status;
}

kvs_status kvs_session_turn_begin(kvs_session *s, kvs_error *err)
{
    s->forward_open = false;
    if (!s->options.paper_compat || s->policy.ops->never_evicts)
        return KVS_OK;
    /* The script's check before the turn has no attention at hand: strategies that need it skip it. */
    if ((kvs_policy_needs(&s->policy) & KVS_POLICY_NEEDS_MASS) != 0)
        return KVS_OK;
    const kvs_cache_meter m = *kvs_cache_meter_now(s->cache);
    const bool due =
        (s->policy.schedule == KVS_SCHEDULE_TOKENS && kvs_cache_live_max(s->cache) >= s->policy.schedule_value) ||
        (s->policy.schedule == KVS_SCHEDULE_BYTES && m.live_bytes >= s->policy.schedule_value);
    return due ? evict_locked(s, 0, "pre_turn", s->policy.schedule == KVS_SCHEDULE_BYTES ? "bytes" : "tokens", err)
               : KVS_OK;
}

kvs_status kvs_session_turn_end(kvs_session *s, kvs_error *err)
{
    if (s->policy.schedule != KVS_SCHEDULE_TURN_END || s->policy.ops->never_evicts)
        return KVS_OK;
    return evict_locked(s, 0, "turn_end", "turn_end", err);
}

kvs_status kvs_session_evict(kvs_session *s, uint32_t keep_tokens, kvs_error *err)
{
    if (s->policy.ops->never_evicts)
        return kvs_error_set(err, KVS_EINVAL, "%s never evicts", s->policy.ops->name);
    return evict_locked(s, keep_tokens, "manual", "manual", err);
}

/* How many of the newest tokens the assistant said in a row. What was said since the last eviction is still held. */
static uint64_t count_said(const kvs_session *s)
{
    const kvs_evict_scratch *e = &s->scratch;
    const kvs_head_slots slots = {.pos = e->pos, .flags = e->flags};
    uint32_t n = kvs_cache_read_head(s->cache, 0, 0, &slots);
    uint64_t said = 0;
    while (n > 0 && (uint64_t)e->pos[n - 1] >= s->n_tokens_evicted_at) {
        if (!kvs_ffn_skip_counts(e->flags[--n]))
            return said;
        said++;
    }
    return said + s->ffn.n_said_evicted_at;
}

kvs_status kvs_session_truncate(kvs_session *s, uint64_t n_tokens, kvs_error *err)
{
    if (n_tokens > s->n_tokens)
        return kvs_error_set(err, KVS_EINVAL, "cannot truncate to %llu tokens: only %llu were said",
                             (unsigned long long)n_tokens, (unsigned long long)s->n_tokens);
    if (n_tokens < s->n_tokens_evicted_at)
        return kvs_error_set(err, KVS_EINVAL, "cannot truncate to %llu tokens: an eviction at %llu cannot be undone",
                             (unsigned long long)n_tokens, (unsigned long long)s->n_tokens_evicted_at);
    kvs_cache_truncate(s->cache, (int32_t)n_tokens);
    kvs_turn_log_truncate(&s->turns, (int32_t)n_tokens);
    kvs_query_log_drop(&s->queries, s->n_tokens - n_tokens);
    kvs_sentence_log_truncate(&s->sentences, n_tokens);
    kvs_steer_truncate(s, n_tokens);
    /* What the dropped rows met: nothing was evicted since, so the i-th of them met what is left, i more and itself. */
    const uint64_t n_heads = (uint64_t)s->model->info.n_layers * s->model->info.n_kv_heads;
    const uint64_t dropped = s->n_tokens - n_tokens;
    s->footprint_skip += dropped * kvs_cache_live_total(s->cache) + n_heads * dropped * (dropped + 1) / 2;
    s->n_tokens = n_tokens;
    s->forward_open = false;
    /* Everything said since the last eviction is still held. */
    s->last_was_prompt = n_tokens > s->n_tokens_evicted_at ? !(kvs_cache_newest_flags(s->cache) & KVS_TOKEN_ASSISTANT)
                                                           : s->evicted_after_prompt;
    s->ffn.n_said = count_said(s);
    return KVS_OK;
}

/* ---- what a session tells ---- */

uint64_t kvs_session_n_tokens(const kvs_session *s)
{
    return s->n_tokens;
}

const char *kvs_session_policy(const kvs_session *s)
{
    return s->policy.text;
}

kvs_position_mode kvs_session_position(const kvs_session *s)
{
    return s->policy.position;
}

void kvs_session_on_event(kvs_session *s, void (*on_event)(void *ctx, const kvs_event *event), void *ctx)
{
    s->on_event = on_event;
    s->event_ctx = ctx;
}

void kvs_session_get_usage(const kvs_session *s, kvs_usage *u)
{
    kvs_cache_meter m;
    kvs_cache_get_meter(s->cache, &m);
    const uint64_t n_heads = (uint64_t)s->model->info.n_layers * s->model->info.n_kv_heads;
    const double full = (double)n_heads * (double)s->n_tokens * ((double)s->n_tokens + 1) / 2;
    uint64_t n_ffn_run = 0, n_ffn_skipped = 0;
    for (uint32_t l = 0; s->ffn.rule.counts != NULL && l < s->ffn.n_layers; l++) {
        n_ffn_run += s->ffn.rule.counts[l].n_run;
        n_ffn_skipped += s->ffn.rule.counts[l].n_skipped;
    }
    const uint64_t own = s->scratch.bytes + s->queries.bytes + s->probe.bytes + s->sentences.bytes + s->steer.bytes;
    const uint64_t scratch = own + s->model->forward->bytes;
    *u = (kvs_usage){
        .budget_bytes = m.budget_bytes,
        .budget_tokens = m.budget_tokens,
        .live_bytes = m.live_bytes,
        .live_bytes_peak = m.live_bytes_peak,
        .reserved_bytes = m.reserved_bytes,
        .reserved_bytes_peak = m.reserved_bytes_peak,
        .side_bytes = m.side_bytes,
        .side_bytes_peak = m.side_bytes_peak,
        .scratch_bytes = scratch,
        .scratch_bytes_peak = scratch, /* it only grows */
        .kv_bytes = m.reserved_bytes + m.side_bytes,
        .kv_bytes_peak = m.kv_bytes_peak,
        .shared_bytes = m.shared_bytes,
        .n_slots_max = kvs_cache_live_max(s->cache),
        .n_slots_min = kvs_cache_live_min(s->cache),
        .n_slots_mean = (double)kvs_cache_live_total(s->cache) / (double)n_heads,
        .n_evictions = s->n_evictions,
        .n_slots_evicted = s->n_slots_evicted,
        .evict_ns = s->evict_ns,
        .score_ns = s->score_ns,
        .select_ns = s->select_ns,
        .move_ns = s->move_ns,
        .n_ffn_blocks = n_ffn_run + n_ffn_skipped,
        .n_ffn_skipped = n_ffn_skipped,
        .probe_ns = s->probe_ns,
        .own_bytes = own,
        .footprint = full > 0 ? (double)(m.footprint_slots - s->footprint_skip) / full : 1.0,
    };
}

const char *kvs_session_ffn_skip(const kvs_session *s)
{
    return s->ffn.text;
}

bool kvs_session_get_ffn(const kvs_session *s, uint32_t layer, kvs_ffn_layer *out)
{
    if (s->ffn.rule.counts == NULL || layer >= s->ffn.n_layers)
        return false;
    const kvs_ffn_count *c = &s->ffn.rule.counts[layer];
    *out = (kvs_ffn_layer){c->n_run, c->n_skipped, c->n_run > 0 ? c->cosine_sum / (double)c->n_run : (double)NAN};
    return true;
}

static void measure(const kvs_session *s, kvs_positions_fold *fold, kvs_positions *out)
{
    const kvs_evict_scratch *e = &s->scratch;
    const kvs_model *m = s->model;
    double integrity = 0;
    kvs_positions_fold_begin(fold);
    for (uint32_t layer = 0; layer < m->info.n_layers; layer++)
        for (uint32_t head = 0; head < m->info.n_kv_heads; head++) {
            const kvs_head_slots slots = {.pos = e->pos, .rope_pos = e->rope_pos};
            const uint32_t n = kvs_cache_read_head(s->cache, layer, head, &slots);
            const int32_t next = kvs_cache_next_rope(s->cache, layer, head);
            const kvs_positions_ring ring = {
                .backward = kvs_cache_backward_bits(s->cache, layer, head),
                .last = next - 1,
                .n = s->n_tokens > KVS_POSITIONS_RING ? KVS_POSITIONS_RING + 1 : (uint32_t)s->n_tokens,
            };
            const kvs_positions_view view = {
                .pos = e->pos,
                .rope_pos = e->rope_pos,
                .n = n,
                .true_next = (int32_t)s->n_tokens,
                .rope_next = next,
                .window_tokens = (int32_t)m->info.window_tokens,
                .theta = m->theta,
                .n_freq = m->n_freq,
                .ring = &ring,
            };
            kvs_positions_indices indices;
            kvs_positions_measure(&view, e->kept_pos, e->kept_rope, &indices);
            kvs_positions_fold_add(fold, &indices);
            integrity += kvs_turn_log_integrity(&s->turns, e->pos, n);
            if (s->uniform) { /* every head would say the same */
                kvs_positions_fold_end(fold, out);
                out->template_integrity = integrity;
                out->mass_lost = s->mass_lost;
                return;
            }
        }
    kvs_positions_fold_end(fold, out);
    out->template_integrity = integrity / ((double)m->info.n_layers * m->info.n_kv_heads);
    out->mass_lost = s->mass_lost;
}

void kvs_session_get_positions(const kvs_session *s, kvs_positions *p)
{
    kvs_positions_fold fold;
    measure(s, &fold, p);
}

void kvs_session_get_health(const kvs_session *s, kvs_health *h)
{
    kvs_positions_fold fold;
    kvs_positions p;
    measure(s, &fold, &p);
    kvs_health_inputs in;
    kvs_health_gather(&p, s->policy.position, fold.distance_max, fold.rope_max, s->model->info.window_tokens, &in);
    const kvs_cache_meter m = *kvs_cache_meter_now(s->cache);
    in.over_budget = m.reserved_bytes + m.side_bytes > m.budget_bytes;
    in.nan_seen = s->saw_nan;
    kvs_health_weights weights;
    kvs_health_priors(&weights);
    kvs_health_compute(&in, &weights, h);
}

uint32_t kvs_session_keep_set(const kvs_session *s, uint32_t layer, uint32_t kv_head, int32_t *pos, int32_t *rope_pos,
                              uint32_t cap)
{
    if (layer >= s->model->info.n_layers || kv_head >= s->model->info.n_kv_heads)
        return 0;
    const uint32_t n = kvs_cache_n_live(s->cache, layer, kv_head);
    if (n <= cap) {
        const kvs_head_slots slots = {.pos = pos, .rope_pos = rope_pos};
        kvs_cache_read_head(s->cache, layer, kv_head, &slots);
    }
    return n;
}

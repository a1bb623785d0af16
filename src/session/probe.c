/* The probes of policies: which rows they run (policy/probes.c has their numbers), and what is recorded of them. Rows
 * are appended like any others, so they count in the budget; room for them is kept free. */
#include "session/probe.h"

#include "session/session_internal.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { TEXT_FIRST = 0, TEXT_LATER = 1, TEXT_ANSWER = 2, POSTFIX_TOKENS = 8, TEXT_TOKENS_MAX = 512 };

/* KVzip's words, from its repository (arXiv:2505.23416). */
static const char *const repeat_request[2] = {
    "\n\nRepeat the previous context exactly.",
    "\n\nRepeat the part of the previous context exactly, starting with ",
};
/* EpiCache's, from its (arXiv:2509.17396). */
static const char *const extract_request[2] = {
    "\n\nExtract essential information from this conversation segment. Identify speaker names, personas, key events "
    "with dates/times, personal details, commitments, opinions, relationships, emotional moments, and unique "
    "experiences.",
    "",
};

/* ---- create ---- */

static kvs_status tokenise_requests(const kvs_model *m, const char *const request[2], int32_t *all[3], uint32_t n[3],
                                    kvs_error *err)
{
    for (int i = 0; i < 2; i++) {
        size_t count;
        KVS_TRY(kvs_tokenize(m, request[i], strlen(request[i]), false, false, all[i], TEXT_TOKENS_MAX, &count, err));
        n[i] = (uint32_t)count;
    }
    /* What stands between a message and its answer; a model without a known template has nothing there. */
    const kvs_message message = {"user", "x"};
    kvs_rendered r;
    n[TEXT_ANSWER] = 0;
    if (kvs_chat_render(m, &message, 1, 0, true, &r, NULL) != KVS_OK)
        return KVS_OK;
    size_t from = r.n_tokens;
    while (from > 0 && r.flags[from - 1] & KVS_TOKEN_TEMPLATE && !(r.flags[from - 1] & KVS_TOKEN_USER))
        from--;
    for (size_t i = from; i < r.n_tokens && n[TEXT_ANSWER] < TEXT_TOKENS_MAX; i++)
        all[TEXT_ANSWER][n[TEXT_ANSWER]++] = r.tokens[i];
    kvs_rendered_free(&r);
    return KVS_OK;
}

kvs_status kvs_probe_extract_tokens(const kvs_model *m, uint32_t *n_tokens, kvs_error *err)
{
    int32_t texts[3][TEXT_TOKENS_MAX], *all[3] = {texts[0], texts[1], texts[2]};
    uint32_t n[3] = {0};
    const kvs_status status = tokenise_requests(m, extract_request, all, n, err);
    *n_tokens = n[TEXT_FIRST] + n[TEXT_ANSWER];
    return status;
}

static bool says_again(const kvs_session *s)
{
    return s->policy.probe != NULL &&
           (s->policy.probe->kind == KVS_PROBE_REPEAT || s->policy.probe->kind == KVS_PROBE_CONTEXT);
}

/* Its rows judge slots. */
static bool judges(const kvs_session *s)
{
    return says_again(s) || (s->policy.probe != NULL && s->policy.probe->kind == KVS_PROBE_EXTRACT);
}

static uint32_t text_max(const kvs_probe *p)
{
    return kvs_max_u32(p->n_text[TEXT_FIRST], p->n_text[TEXT_LATER] + POSTFIX_TOKENS) + p->n_text[TEXT_ANSWER];
}

static void *part(uint8_t *base, size_t *at, size_t n, size_t size)
{
    void *const here = base == NULL || n == 0 ? NULL : base + *at;
    *at += kvs_round_up(n * size, KVS_ALIGN);
    return here;
}

static size_t lay_out(kvs_probe *p, uint8_t *base, uint32_t n_slots, size_t n_most, size_t n_own)
{
    size_t at = 0;
    for (int i = 0; i < 3; i++)
        p->text[i] = part(base, &at, TEXT_TOKENS_MAX, sizeof(int32_t));
    p->tokens = part(base, &at, p->reserve_tokens + TEXT_TOKENS_MAX, sizeof(int32_t));
    p->row_pos = part(base, &at, p->reserve_tokens + TEXT_TOKENS_MAX, sizeof(int32_t));
    p->held_pos = part(base, &at, n_slots, sizeof(int32_t));
    p->held_token = part(base, &at, n_slots, sizeof(int32_t));
    p->most = part(base, &at, n_most, sizeof(float));
    p->own = part(base, &at, n_own, sizeof(float));
    return at;
}

kvs_status kvs_probe_create(kvs_session *s, kvs_error *err)
{
    kvs_probe *p = &s->probe;
    *p = (kvs_probe){0};
    if (s->policy.probe == NULL)
        return KVS_OK;
    const kvs_model_info *info = &s->model->info;
    const uint64_t budget = kvs_cache_meter_now(s->cache)->budget_tokens;
    const uint32_t wanted = (uint32_t)s->policy.probe_params[0], quarter = (uint32_t)(budget / 4);
    int32_t texts[3][TEXT_TOKENS_MAX], *const all[3] = {texts[0], texts[1], texts[2]};
    p->chunk_tokens = p->reserve_tokens = wanted;
    if (says_again(s))
        p->chunk_tokens = p->reserve_tokens = kvs_max_u32(kvs_min_u32(wanted, quarter), 16);
    if (s->policy.probe->kind == KVS_PROBE_REPEAT) {
        KVS_TRY(tokenise_requests(s->model, repeat_request, (int32_t **)(uintptr_t)all, p->n_text, err));
        p->reserve_tokens += text_max(p);
    }
    if (s->policy.probe->kind == KVS_PROBE_EXTRACT) {
        KVS_TRY(tokenise_requests(s->model, extract_request, (int32_t **)(uintptr_t)all, p->n_text, err));
        p->reserve_tokens += p->n_text[TEXT_FIRST] + p->n_text[TEXT_ANSWER];
    }
    const bool lent = s->kin != NULL; /* its rows and ours never run at once */
    const size_t n_most = judges(s) && !lent ? (size_t)info->n_layers * info->n_heads * s->scratch.n_slots : 0;
    const bool looks = s->policy.probe->kind == KVS_PROBE_PROMPT && s->scratch.threads[0].prob != NULL;
    const size_t n_own = looks ? (size_t)info->n_layers * info->n_heads * wanted : 0;
    p->bytes = lay_out(p, NULL, s->scratch.n_slots, n_most, n_own);
    p->block = kvs_alloc(s->allocator, 1, p->bytes);
    if (p->block == NULL) {
        *p = (kvs_probe){0};
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the rows of probe %s", s->policy.probe->info.name);
    }
    lay_out(p, p->block, s->scratch.n_slots, n_most, n_own);
    if (lent)
        p->most = s->kin->probe.most;
    for (int i = 0; i < 3; i++)
        memcpy(p->text[i], texts[i], p->n_text[i] * sizeof(int32_t));
    return KVS_OK;
}

void kvs_probe_free(kvs_session *s)
{
    kvs_free(s->allocator, s->probe.block);
    s->probe = (kvs_probe){0};
}

/* ---- running rows ---- */

/* Runs probe.tokens [n] behind what was said; they stay until the caller truncates. */
static kvs_status run_rows(kvs_session *s, kvs_forward *f, uint32_t n, kvs_row_use use, kvs_error *err)
{
    kvs_probe *p = &s->probe;
    const uint64_t footprint = kvs_cache_meter_now(s->cache)->footprint_slots;
    kvs_status status = KVS_OK;
    for (uint32_t at = 0; at < n && status == KVS_OK;) {
        const uint32_t rows = kvs_min_u32(n - at, f->max_rows);
        for (uint32_t i = at; i < at + rows; i++)
            p->row_pos[i] = (int32_t)(s->n_tokens + i);
        status = kvs_step_raw(s, f, p->tokens + at, NULL, p->row_pos + at, rows, use, err);
        at += rows;
    }
    s->footprint_skip += kvs_cache_meter_now(s->cache)->footprint_slots - footprint;
    return status;
}

static uint32_t put_tokens(kvs_probe *p, uint32_t at, const int32_t *tokens, uint32_t n)
{
    if (n > 0) /* an episode may have no words */
        memcpy(p->tokens + at, tokens, n * sizeof *tokens);
    return at + n;
}

/* ---- saying again ---- */

/* What the fullest head holds: its pos and tokens. */
static uint32_t read_held(kvs_session *s)
{
    const uint32_t n_kv_heads = s->model->info.n_kv_heads;
    uint32_t most = 0;
    for (uint32_t h = 1; h < s->scratch.n_heads; h++)
        if (kvs_cache_n_live(s->cache, h / n_kv_heads, h % n_kv_heads) >
            kvs_cache_n_live(s->cache, most / n_kv_heads, most % n_kv_heads))
            most = h;
    const kvs_head_slots slots = {.pos = s->probe.held_pos, .token = s->probe.held_token};
    return kvs_cache_read_head(s->cache, most / n_kv_heads, most % n_kv_heads, &slots);
}

/* The rows for held slots [begin, end). */
static uint32_t write_chunk(kvs_session *s, uint32_t begin, uint32_t end)
{
    kvs_probe *p = &s->probe;
    uint32_t n = 0;
    if (s->policy.probe->kind == KVS_PROBE_REPEAT) {
        const int which = begin == 0 ? TEXT_FIRST : TEXT_LATER;
        n = put_tokens(p, n, p->text[which], p->n_text[which]);
        if (begin > 0) {
            const uint32_t postfix = kvs_min_u32(begin, POSTFIX_TOKENS);
            n = put_tokens(p, n, p->held_token + begin - postfix, postfix);
        }
        n = put_tokens(p, n, p->text[TEXT_ANSWER], p->n_text[TEXT_ANSWER]);
    }
    return put_tokens(p, n, p->held_token + begin, end - begin);
}

/* Rows were recorded [group][n_slots of the scratch]; a view has [group][n_slots of its head]. */
static void close_ranks(kvs_session *s)
{
    const uint32_t n_kv_heads = s->model->info.n_kv_heads, group = s->model->info.n_heads / n_kv_heads;
    for (uint32_t h = 0; h < s->scratch.n_heads; h++) {
        float *const most = s->probe.most + (size_t)h * group * s->scratch.n_slots;
        const uint32_t n = kvs_cache_n_live(s->cache, h / n_kv_heads, h % n_kv_heads);
        for (uint32_t g = 1; g < group; g++)
            memmove(most + (size_t)g * n, most + (size_t)g * s->scratch.n_slots, n * sizeof *most);
    }
}

/* n_most is returned: most, before any row. */
static size_t forget_most(kvs_session *s)
{
    const size_t n_most = (size_t)s->model->info.n_layers * s->model->info.n_heads * s->scratch.n_slots;
    for (size_t i = 0; i < n_most; i++)
        s->probe.most[i] = -INFINITY;
    return n_most;
}

static kvs_status say_again(kvs_session *s, kvs_forward *f, kvs_error *err)
{
    kvs_probe *p = &s->probe;
    const uint32_t n = read_held(s);
    const bool repeat = s->policy.probe->kind == KVS_PROBE_REPEAT;
    const size_t n_most = forget_most(s);
    p->apart = false;
    for (uint32_t begin = 0; begin < n; begin += p->chunk_tokens) {
        const uint32_t end = kvs_min_u32(n, begin + p->chunk_tokens);
        /* KVzip's rows share their attention over the first 4 tokens, the chunk and themselves; KVCompose's over all. */
        p->first_end = repeat ? 4 : 0;
        p->begin = repeat && begin > 0 ? p->held_pos[begin] : 0;
        p->end = repeat && end < n ? p->held_pos[end] : (int32_t)s->n_tokens;
        const kvs_status status = run_rows(s, f, write_chunk(s, begin, end), KVS_ROWS_JUDGE, err);
        kvs_cache_truncate(s->cache, (int32_t)s->n_tokens);
        KVS_TRY(status);
    }
    for (size_t i = 0; i < n_most; i++)
        p->most[i] = kvs_expf(p->most[i]);
    close_ranks(s);
    return KVS_OK;
}

/* The request and an episode's words, which judge all that is held. */
static kvs_status ask_to_extract(kvs_session *s, kvs_forward *f, kvs_error *err)
{
    kvs_probe *p = &s->probe;
    const size_t n_most = forget_most(s);
    p->first_end = p->begin = 0;
    p->end = (int32_t)s->n_tokens;
    p->apart = true;
    uint32_t n = put_tokens(p, 0, p->text[TEXT_FIRST], p->n_text[TEXT_FIRST]);
    n = put_tokens(p, n, p->text[TEXT_ANSWER], p->n_text[TEXT_ANSWER]);
    n = put_tokens(p, n, p->words, p->n_words);
    const kvs_status status = run_rows(s, f, n, KVS_ROWS_JUDGE, err);
    kvs_cache_truncate(s->cache, (int32_t)s->n_tokens);
    for (size_t i = 0; i < n_most; i++)
        p->most[i] = kvs_expf(p->most[i]);
    close_ranks(s);
    return status;
}

void kvs_probe_set_words(kvs_session *s, const int32_t *tokens, uint32_t n)
{
    s->probe.words = tokens;
    s->probe.n_words = n;
}

/* The slots of one head that rows share their attention over: where they stand. */
typedef struct shared_slots {
    uint32_t *physical; /* [n], ascending; rows of the probe stand at the end */
    uint32_t n;
    uint32_t judged, judged_live, n_judged; /* the first that is judged: here, and among the live ones */
} shared_slots;

static shared_slots list_slots(const kvs_probe *p, const kvs_view_scratch *t, const kvs_page_view *pages,
                               uint32_t n_pages, int32_t n_tokens)
{
    shared_slots out = {.physical = t->list};
    uint32_t i = 0;
    for (uint32_t page = 0; page < n_pages; page++)
        for (uint64_t bits = pages[page].live; bits != 0; bits &= bits - 1, i++) {
            const int32_t pos = t->pos[i];
            const bool judged = pos >= p->begin && pos < p->end;
            if (!judged && pos >= p->first_end && (p->apart || pos < n_tokens))
                continue;
            if (judged && out.n_judged++ == 0) {
                out.judged = out.n;
                out.judged_live = i;
            }
            out.physical[out.n++] = page * KVS_PAGE_SLOTS + (uint32_t)__builtin_ctzll(bits);
        }
    return out;
}

/* The logarithm of what a row's probabilities are divided by: KVzip+ asks how much a slot moves the row's own stream. */
static double log_length(const kvs_session *s, const kvs_forward *f, uint32_t row)
{
    const uint32_t needs = kvs_policy_needs(&s->policy), n = s->model->info.n_embd;
    if ((needs & (KVS_POLICY_NEEDS_PROBE_BY_STREAM | KVS_POLICY_NEEDS_PROBE_BY_INPUT)) == 0)
        return 0;
    const float *const x = (needs & KVS_POLICY_NEEDS_PROBE_BY_INPUT ? f->norm : f->x) + (size_t)row * n;
    double square = 0;
    for (uint32_t i = 0; i < n; i++)
        square += (double)x[i] * (double)x[i];
    return log(square > DBL_MIN ? square : DBL_MIN) / 2;
}

/* One row and query head: log-probabilities over its slots less `less`, the largest so far into most [live slots]. What is
 * judged is one run of neighbours among both. */
static void judge_row(const kvs_kernels *kernels, const shared_slots *slots, uint32_t n_seen, double less,
                      float *scores, float *most)
{
    for (uint32_t k = 0; k < n_seen; k++)
        scores[k] = scores[slots->physical[k]]; /* never overtakes what it reads */
    const float lse = (float)(kernels->logsumexp(scores, n_seen, NULL) + less);
    const float *const restrict from = scores + slots->judged;
    float *const restrict into = most + slots->judged_live;
    for (uint32_t k = 0; k < slots->n_judged; k++) {
        const float x = from[k] - lse;
        into[k] = x > into[k] ? x : into[k];
    }
}

void kvs_probe_record(const kvs_attend_run *run, const kvs_forward *f, uint32_t layer, uint32_t head, uint32_t thread)
{
    kvs_session *s = run->session;
    const kvs_model *m = s->model;
    const kvs_model_info *info = &m->info;
    kvs_view_scratch *t = &s->scratch.threads[thread];
    const uint32_t dh = info->head_dim, group = info->n_heads / info->n_kv_heads;
    const uint32_t n_pages = kvs_cache_n_pages(s->cache, layer, head);
    const uint32_t n_physical = kvs_cache_n_physical(s->cache, layer, head);
    const size_t stride = kvs_round_up(n_physical, KVS_TILE_SLOTS), width = f->qkv_width;
    kvs_cache_views(s->cache, layer, head, t->pages, NULL);
    const kvs_head_slots facts = {.pos = t->pos};
    kvs_cache_read_head(s->cache, layer, head, &facts);
    const shared_slots slots = list_slots(&s->probe, t, t->pages, n_pages, (int32_t)s->n_tokens);
    float *const most = s->probe.most + ((size_t)layer * info->n_heads + (size_t)head * group) * s->scratch.n_slots;
    for (uint32_t row = 0; row < run->n_rows; row += KVS_ATTN_ROWS_MAX) {
        const kvs_attn_job job = {
            .pages = t->pages,
            .limit0 = n_physical,
            .n_rows = kvs_min_u32(KVS_ATTN_ROWS_MAX, run->n_rows - row),
            .group = group,
            .head_dim = dh,
            .kv_f32 = s->options.kv_type == KVS_KV_F32,
            .scale = 1.0f / __builtin_sqrtf((float)dh),
            .q = f->qkv + (run->row0 + row) * width + (size_t)head * group * dh,
            .q_stride = width,
            .rope = &m->rope,
        };
        m->kernels->attend_scores(&job, 0, n_physical, t->physical, stride, t->most);
        for (uint32_t r = 0; r < job.n_rows; r++) {
            const double less = log_length(s, f, run->row0 + row + r);
            for (uint32_t g = 0; g < group; g++)
                judge_row(m->kernels, &slots, s->probe.apart ? slots.n : slots.n - (run->n_rows - row - r) + 1, less,
                          t->physical + (r * group + g) * stride, most + (size_t)g * s->scratch.n_slots);
        }
    }
}

/* ---- looking ahead ---- */

/* The newest token runs again in its own place, for its logits: same bits as before. */
static kvs_status rerun_newest(kvs_session *s, kvs_forward *f, kvs_error *err)
{
    const uint32_t n = read_held(s);
    const int32_t token = s->probe.held_token[n - 1], pos = s->probe.held_pos[n - 1];
    const uint8_t flags = kvs_cache_newest_flags(s->cache);
    const uint64_t footprint = kvs_cache_meter_now(s->cache)->footprint_slots;
    kvs_cache_truncate(s->cache, pos);
    const kvs_status status = kvs_step_raw(s, f, &token, &flags, &pos, 1, KVS_ROWS_AGAIN, err);
    s->footprint_skip += kvs_cache_meter_now(s->cache)->footprint_slots - footprint;
    return status;
}

static int32_t likeliest(kvs_session *s, kvs_forward *f)
{
    const uint32_t row = 0;
    uint32_t best;
    kvs_forward_logits(f, s->options.arith, &row, 1);
    s->model->kernels->logsumexp(f->logits, s->model->info.vocab_size, &best);
    return (int32_t)best;
}

bool kvs_probe_wants_kept(const kvs_session *s)
{
    return s->policy.probe != NULL && s->policy.probe->kind == KVS_PROBE_LOOKAHEAD;
}

kvs_status kvs_probe_on_kept(kvs_session *s, kvs_forward *f, const uint8_t *keep, size_t stride, kvs_error *err)
{
    kvs_probe *p = &s->probe;
    const uint32_t n_kv_heads = s->model->info.n_kv_heads;
    for (uint32_t h = 0; h < s->scratch.n_heads; h++)
        kvs_cache_hide(s->cache, h / n_kv_heads, h % n_kv_heads, keep + h * stride);
    uint32_t n = 0;
    kvs_status status = KVS_OK;
    for (int32_t token = s->probe_token; n < (uint32_t)s->policy.probe_params[0] && status == KVS_OK; n++) {
        if (kvs_token_is_eog(s->model, token))
            break;
        const int32_t pos = (int32_t)(s->n_tokens + n);
        const uint64_t footprint = kvs_cache_meter_now(s->cache)->footprint_slots;
        p->tokens[n] = token;
        status = kvs_step_raw(s, f, &token, NULL, &pos, 1, KVS_ROWS_LOG, err);
        s->footprint_skip += kvs_cache_meter_now(s->cache)->footprint_slots - footprint;
        if (status == KVS_OK)
            token = likeliest(s, f);
    }
    kvs_cache_unhide(s->cache);
    kvs_cache_truncate(s->cache, (int32_t)s->n_tokens);
    kvs_query_log_look_ahead(&s->queries, status == KVS_OK ? n : 0);
    return status;
}

/* ---- the doors ---- */

/* The rows go behind the chunk as if the prompt ended here. */
static kvs_status look_from_the_prompt(kvs_session *s, kvs_forward *f, kvs_error *err)
{
    const uint32_t n = kvs_min_u32(s->n_pending, kvs_min_u32((uint32_t)s->policy.probe_params[0], s->queries.n_rows));
    if (n == 0)
        return KVS_OK;
    put_tokens(&s->probe, 0, s->pending + s->n_pending - n, n);
    const kvs_status status = run_rows(s, f, n, KVS_ROWS_LOG, err);
    if (status == KVS_OK && s->probe.own != NULL)
        kvs_view_own_rows(s, n);
    kvs_cache_truncate(s->cache, (int32_t)s->n_tokens);
    kvs_query_log_look_ahead(&s->queries, status == KVS_OK ? n : 0);
    return status;
}

kvs_status kvs_probe_before(kvs_session *s, kvs_forward *f, kvs_error *err)
{
    if (s->policy.probe == NULL)
        return KVS_OK;
    const uint32_t n_kv_heads = s->model->info.n_kv_heads;
    for (uint32_t h = 0; h < s->scratch.n_heads; h++) /* kvs_cache_hide wants it, and the rows find room */
        kvs_cache_compact(s->cache, h / n_kv_heads, h % n_kv_heads);
    switch (s->policy.probe->kind) {
    case KVS_PROBE_REPEAT:
    case KVS_PROBE_CONTEXT:
        return say_again(s, f, err);
    case KVS_PROBE_EXTRACT:
        return ask_to_extract(s, f, err);
    case KVS_PROBE_PROMPT:
        return look_from_the_prompt(s, f, err);
    default:
        KVS_TRY(rerun_newest(s, f, err));
        s->probe_token = likeliest(s, f);
        return KVS_OK;
    }
}

void kvs_probe_end(kvs_session *s)
{
    kvs_query_log_drop(&s->queries, s->queries.n_ahead);
    s->queries.n_ahead = 0;
    s->probe.n_own = 0;
}

/* One eviction: look at every head, score, share the room out, select for all heads, then drop and reposition. Nothing
 * changes until every head has its keep set, so a refusal leaves the session as it was. */
#include "session/session_internal.h"

#include "cache/positions.h"

#include <math.h>
#include <string.h>

/* f32 a policy may have to work in, a thread: 4 GiB. More is a slip in its arithmetic, and would wrap ours. */
#define WORK_MAX (1u << 30)
/* How fast the record of lost attention mass forgets: half a weight an event. */
#define MASS_LOST_DECAY 0.5

/* ---- scratch ---- */

/* Hands out parts of one block; with base NULL it only counts. */
typedef struct carver {
    uint8_t *base;
    size_t at;
} carver;

static void *carve(carver *c, size_t n, size_t size)
{
    void *const p = c->base == NULL ? NULL : c->base + c->at;
    c->at += kvs_round_up(n * size, KVS_ALIGN);
    return p;
}

static void carve_thread(carver *c, const kvs_session *s, kvs_view_scratch *t)
{
    const kvs_model_info *info = &s->model->info;
    const kvs_evict_scratch *e = &s->scratch;
    const uint32_t needs = kvs_policy_needs(&s->policy), mask = kvs_side_mask(&s->policy);
    const size_t n = e->n_slots, dh = info->head_dim, group = info->n_heads / info->n_kv_heads;
    t->pos = carve(c, n, sizeof *t->pos);
    t->rope_pos = carve(c, n, sizeof *t->rope_pos);
    t->key_rot = carve(c, n, sizeof *t->key_rot);
    t->token = carve(c, n, sizeof *t->token);
    t->flags = carve(c, n, sizeof *t->flags);
    t->select = carve(c, 2 * n + 2, sizeof *t->select);
    for (int i = 0; i < KVS_SIDE_COUNT; i++)
        if (mask & 1u << i)
            t->side[i] = carve(c, n, sizeof(float));
    if (needs & KVS_POLICY_NEEDS_KEYS)
        t->keys = carve(c, n * dh, sizeof(float));
    if (needs & KVS_POLICY_NEEDS_KEYS_RAW)
        t->keys_raw = carve(c, n * dh, sizeof(float));
    if (needs & (KVS_POLICY_NEEDS_VALUES | KVS_POLICY_NEEDS_OUT_NORM | KVS_POLICY_NEEDS_OUT_LENGTH))
        t->values = carve(c, n * dh, sizeof(float));
    const size_t pages = kvs_cache_pages_bound(s->cache);
    if (needs & (KVS_POLICY_NEEDS_WINDOW | KVS_POLICY_NEEDS_PAIRS | KVS_POLICY_NEEDS_PROBE)) {
        t->pages = carve(c, pages, sizeof *t->pages);
        t->most = carve(c, KVS_ATTN_ROWS_MAX * group, sizeof *t->most);
        t->physical = carve(c, KVS_ATTN_ROWS_MAX * group * pages * KVS_PAGE_SLOTS, sizeof(float));
    }
    if (needs & KVS_POLICY_NEEDS_PROBE)
        t->list = carve(c, pages * KVS_PAGE_SLOTS, sizeof *t->list);
    if (needs & (KVS_POLICY_NEEDS_WINDOW | KVS_POLICY_NEEDS_PAIRS)) {
        const size_t rows = e->window * group;
        if (needs & KVS_POLICY_NEEDS_WINDOW)
            t->prob = carve(c, rows * n, sizeof(float));
        if (needs & KVS_POLICY_NEEDS_LOGITS)
            t->logit = carve(c, rows * n, sizeof(float));
        if (needs & KVS_POLICY_NEEDS_PAIRS)
            t->pair = carve(c, rows * e->window, sizeof(float));
        t->query = carve(c, rows * dh, sizeof(float));
        t->window_pos = carve(c, e->window, sizeof *t->window_pos);
    }
    if (needs & KVS_POLICY_NEEDS_OUT_NORM)
        t->out_norm = carve(c, group * n, sizeof(float));
    if (needs & KVS_POLICY_NEEDS_OUT_LENGTH) {
        t->out_length = carve(c, group * n, sizeof(float));
        t->out_gram = carve(c, dh * dh, sizeof(double));
    }
    if (needs & (KVS_POLICY_NEEDS_OUT_NORM | KVS_POLICY_NEEDS_OUT_LENGTH))
        t->out_rows = carve(c, kvs_view_out_rows(s->model), sizeof(float));
    t->work = carve(c, kvs_policy_work(&s->policy, e->n_slots, info->head_dim), sizeof(float));
    if (s->policy.ops->score_layer != NULL) {
        t->layer_views = carve(c, info->n_kv_heads, sizeof *t->layer_views);
        t->layer_scores = carve(c, info->n_kv_heads, sizeof *t->layer_scores);
    }
    if (s->policy.select != NULL)
        t->unit = carve(c, n, sizeof *t->unit);
    if (s->policy.ops->choose != NULL)
        t->chosen = carve(c, n + KVS_GUARD_WORDS, sizeof *t->chosen);
    if (s->policy.dispose != NULL)
        t->changed = carve(c, n, sizeof *t->changed);
}

static size_t carve_all(kvs_session *s, uint8_t *base)
{
    kvs_evict_scratch *e = &s->scratch;
    carver c = {.base = base};
    const size_t n = e->n_slots, heads = e->n_heads;
    kvs_view_scratch nowhere = {0};
    e->threads = carve(&c, e->n_threads, sizeof *e->threads);
    for (uint32_t i = 0; i < e->n_threads; i++)
        carve_thread(&c, s, base == NULL ? &nowhere : &e->threads[i]);
    /* One head speaks for all only while all hold the same: a fork may begin otherwise, a budget stage makes it so. */
    e->scores = carve(&c, (s->policy.ops->never_evicts ? 1 : heads) * e->stride, sizeof *e->scores);
    e->keep = carve(&c, heads * n, sizeof *e->keep);
    if (kvs_policy_needs(&s->policy) & KVS_POLICY_NEEDS_CARRY)
        e->carry = carve(&c, heads * n, sizeof *e->carry);
    if (s->policy.ops->has_part)
        e->part = carve(&c, heads * n, sizeof *e->part);
    e->n_live = carve(&c, heads, sizeof(uint32_t));
    e->n_hard = carve(&c, heads, sizeof(uint32_t));
    e->n_even = carve(&c, heads, sizeof(uint32_t));
    e->n_keep = carve(&c, heads, sizeof(uint32_t));
    if (s->policy.budget != NULL)
        e->keys = carve(&c, heads * e->stride, sizeof *e->keys);
    e->pos = carve(&c, n, sizeof *e->pos);
    e->rope_pos = carve(&c, n, sizeof *e->rope_pos);
    e->token = carve(&c, n, sizeof *e->token);
    e->flags = carve(&c, n, sizeof *e->flags);
    e->kept_pos = carve(&c, n, sizeof *e->kept_pos);
    e->kept_rope = carve(&c, n, sizeof *e->kept_rope);
    s->turns.turns = carve(&c, s->turns.capacity, sizeof *s->turns.turns);
    return c.at;
}

/* Kin evict one after another, in the same room; what was said belongs to each. */
static kvs_status borrow_scratch(kvs_session *s, kvs_error *err)
{
    kvs_evict_scratch *e = &s->scratch;
    *e = s->kin->scratch;
    e->bytes = s->turns.capacity * sizeof *s->turns.turns;
    e->block = s->turns.turns = kvs_alloc(s->allocator, s->turns.capacity, sizeof *s->turns.turns);
    if (e->block != NULL)
        return KVS_OK;
    *e = (kvs_evict_scratch){0};
    s->turns = (kvs_turn_log){0};
    return kvs_error_set(err, KVS_ENOMEM, "no memory for the turns of an episode");
}

kvs_status kvs_evict_scratch_create(kvs_session *s, kvs_error *err)
{
    kvs_evict_scratch *e = &s->scratch;
    const size_t work = kvs_policy_work(&s->policy, kvs_cache_slots_max(s->cache), s->model->info.head_dim);
    if (work > WORK_MAX)
        return kvs_error_set(err, KVS_EINVAL, "%s: work_of asks for %zu numbers, at most %u are given",
                             s->policy.ops->name, work, WORK_MAX);
    e->n_slots = kvs_cache_slots_max(s->cache);
    e->stride = e->n_slots + KVS_GUARD_WORDS;
    e->n_heads = s->model->info.n_layers * s->model->info.n_kv_heads;
    e->n_threads = kvs_pool_n_threads(s->model->pool);
    e->window = kvs_policy_window(&s->policy);
    s->turns.capacity = kvs_turn_log_capacity(e->n_slots);
    s->turns.marker_from = -1;
    if (s->kin != NULL)
        return borrow_scratch(s, err);
    e->bytes = carve_all(s, NULL);
    e->block = kvs_alloc(s->allocator, 1, e->bytes);
    if (e->block == NULL) {
        *e = (kvs_evict_scratch){0};
        s->turns = (kvs_turn_log){0};
        return kvs_error_set(err, KVS_ENOMEM, "no memory for an eviction over %u slots a head",
                             kvs_cache_slots_max(s->cache));
    }
    carve_all(s, e->block);
    return KVS_OK;
}

void kvs_evict_scratch_free(kvs_session *s)
{
    kvs_free(s->allocator, s->scratch.block);
    s->scratch = (kvs_evict_scratch){0};
    s->turns = (kvs_turn_log){0};
}

uint32_t kvs_side_mask(const kvs_policy *p)
{
    const uint32_t needs = kvs_policy_needs(p);
    uint32_t mask = 0;
    if (needs & (KVS_POLICY_NEEDS_MASS_LAST | KVS_POLICY_NEEDS_MASS_SUM))
        mask |= 1u << KVS_SIDE_SUM;
    if (needs & KVS_POLICY_NEEDS_MASS_EMA)
        mask |= 1u << KVS_SIDE_EMA;
    if (needs & KVS_POLICY_NEEDS_MASS_MAX)
        mask |= 1u << KVS_SIDE_MAX;
    if (needs & KVS_POLICY_NEEDS_CARRY)
        mask |= 1u << KVS_SIDE_CARRY;
    return mask;
}

/* ---- one eviction's state ---- */

typedef struct eviction {
    kvs_session *s;
    uint32_t n_kv_heads, n_heads;
    uint32_t step;          /* heads that share a keep set: 1, a layer's, or all */
    uint32_t n_scored;      /* heads that are scored: 1 where all see the same */
    uint32_t keep_override; /* slots a head, 0: the policy's own */
    bool any;               /* something is dropped */
    double mass_kept, mass_all;
    uint64_t score_ns, select_ns; /* of all passes: a probe that looks at what is kept has two */
    kvs_status status;            /* of the first set that was refused, in head order */
    uint32_t refused;
    kvs_error *err;
} eviction;

static float *scores_of(const eviction *x, uint32_t head)
{
    return x->s->scratch.scores + (x->n_scored == 1 ? 0 : (size_t)head * x->s->scratch.stride);
}

/* Of several heads that are refused at once the first is told, whatever the thread count. */
static void refuse(eviction *x, uint32_t head, const kvs_error *err)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    if (x->status == KVS_OK || head < x->refused) {
        x->status = err->status;
        x->refused = head;
        if (x->err != NULL)
            *x->err = *err;
    }
    pthread_mutex_unlock(&lock);
}

static float *part_of(const eviction *x, uint32_t head)
{
    float *const parts = x->s->scratch.part;
    return parts == NULL ? NULL : parts + (size_t)head * x->s->scratch.n_slots;
}

/* What an absent `keep` means: the budget less one chunk. */
uint32_t kvs_keep_default(const kvs_session *s)
{
    uint64_t cap = kvs_cache_meter_now(s->cache)->budget_tokens;
    if (s->policy.schedule == KVS_SCHEDULE_TOKENS || s->policy.schedule == KVS_SCHEDULE_ONCE)
        cap = s->policy.schedule_value < cap ? s->policy.schedule_value : cap;
    if (s->policy.schedule == KVS_SCHEDULE_BYTES) {
        const kvs_model_info *i = &s->model->info;
        const uint64_t token_bytes =
            (uint64_t)i->n_layers * i->n_kv_heads * 2 * i->head_dim * (s->options.kv_type == KVS_KV_F32 ? 4 : 2);
        const uint64_t trigger = s->policy.schedule_value / token_bytes;
        cap = trigger > 1 && trigger < cap ? trigger : cap;
    }
    const uint64_t chunk = s->chunk_tokens < cap ? s->chunk_tokens : cap - 1;
    const uint64_t keep = cap - chunk;
    /* The last page of each head is half empty on average where heads differ: room for the chunk is counted in pages. */
    const uint64_t slack = kvs_policy_is_ragged(&s->policy) || s->layer_share != NULL ? KVS_PAGE_SLOTS : 0;
    const uint64_t less = slack + s->probe.reserve_tokens;
    return (uint32_t)(less == 0 ? keep : keep > 2 * less ? keep - less : keep / 2 > 1 ? keep / 2 : 1);
}

/* How many slots of this head the even share keeps. An override that the budget asks for cannot go below what is
 * protected; where nothing else is left, kvs_select says so. */
static uint32_t even_share(const eviction *x, const kvs_policy_view *v, const float *scores)
{
    uint32_t n = x->keep_override;
    if (n == 0)
        n = kvs_policy_target_scored(&x->s->policy, v, scores, kvs_keep_default(x->s));
    if (x->s->layer_share != NULL)
        n = (uint32_t)(n * x->s->layer_share[v->layer]);
    else if (x->keep_override == 0)
        return n;
    const uint32_t least =
        kvs_min_u32(kvs_protected_count(&x->s->policy.protect, v), v->n_slots > 0 ? v->n_slots - 1 : 0);
    return kvs_max_u32(n, least);
}

/* ---- scoring ---- */

static bool rescores_late(const eviction *x)
{
    const kvs_policy *p = &x->s->policy;
    return p->rescore != NULL && p->rescore->after_budget && p->budget != NULL && x->step == 1;
}

static void score_task(void *ctx, uint32_t head, uint32_t thread)
{
    const eviction *x = ctx;
    const kvs_policy *p = &x->s->policy;
    kvs_view_scratch *t = &x->s->scratch.threads[thread];
    kvs_policy_view v = kvs_view_head(x->s, head / x->n_kv_heads, head % x->n_kv_heads, t);
    v.n_keep = x->s->scratch.n_even[head] = even_share(x, &v, NULL);
    v.part = part_of(x, head);
    float *const scores = scores_of(x, head);
    kvs_guard_set(scores + v.n_slots);
    p->ops->score(p->params, &v, scores);
    if (p->rescore != NULL && !rescores_late(x))
        p->rescore->rescore(p->rescore_params, &v, scores);
    if (v.carry != NULL) /* the cache gets it once the eviction is sure */
        memcpy(x->s->scratch.carry + (size_t)head * x->s->scratch.n_slots, v.carry, v.n_slots * sizeof *v.carry);
}

/* The mean over heads [begin, begin + step), which hold the same slots, in the first one's place. */
static void average(const eviction *x, uint32_t begin)
{
    float *const into = scores_of(x, begin);
    const uint32_t n = kvs_cache_n_live(x->s->cache, begin / x->n_kv_heads, begin % x->n_kv_heads);
    for (uint32_t i = 0; i < n; i++) {
        double sum = 0;
        for (uint32_t h = begin; h < begin + x->step; h++)
            sum += (double)scores_of(x, h)[i];
        into[i] = (float)(sum / (double)x->step);
    }
}

static void average_task(void *ctx, uint32_t set, uint32_t thread)
{
    (void)thread;
    const eviction *x = ctx;
    average(x, set * x->step);
}

/* Scores that compare the heads of a layer. */
static void score_layer_task(void *ctx, uint32_t layer, uint32_t thread)
{
    const eviction *x = ctx;
    kvs_policy_view *const views = x->s->scratch.threads[thread].layer_views;
    float **const scores = x->s->scratch.threads[thread].layer_scores;
    for (uint32_t h = 0; h < x->n_kv_heads; h++) {
        const kvs_model_info *info = &x->s->model->info;
        views[h] = (kvs_policy_view){.layer = layer,
                                     .kv_head = h,
                                     .n_layers = info->n_layers,
                                     .n_kv_heads = x->n_kv_heads,
                                     .group = info->n_heads / info->n_kv_heads,
                                     .head_dim = info->head_dim,
                                     .n_tokens = (int64_t)x->s->n_tokens,
                                     .n_slots = kvs_cache_n_live(x->s->cache, layer, h),
                                     .n_keep = x->s->scratch.n_even[layer * x->n_kv_heads + h],
                                     .part = part_of(x, layer * x->n_kv_heads + h)};
        scores[h] = scores_of(x, layer * x->n_kv_heads + h);
    }
    x->s->policy.ops->score_layer(x->s->policy.params, views, scores);
}

static kvs_status check_guards(const eviction *x)
{
    for (uint32_t h = 0; h < x->n_scored; h++) {
        const uint32_t layer = h / x->n_kv_heads, head = h % x->n_kv_heads;
        const uint32_t n = kvs_cache_n_live(x->s->cache, layer, head);
        if (!kvs_guard_holds(scores_of(x, h) + n))
            return kvs_error_set(x->err, KVS_EPOLICY,
                                 "%s, layer %u, KV head %u: a score was written past the end of the head's %u",
                                 x->s->policy.ops->name, layer, head, n);
    }
    return KVS_OK;
}

static kvs_status score_all(eviction *x)
{
    kvs_pool *pool = x->s->model->pool;
    const kvs_policy *p = &x->s->policy;
    kvs_pool_run(pool, score_task, x, x->n_scored);
    if (p->ops->score_layer != NULL && x->n_scored > 1)
        kvs_pool_run(pool, score_layer_task, x, x->n_heads / x->n_kv_heads);
    KVS_TRY(check_guards(x));
    if (x->step > 1 && x->n_scored > 1)
        kvs_pool_run(pool, average_task, x, x->n_heads / x->step);
    return KVS_OK;
}

/* ---- observing ---- */

static void observe_task(void *ctx, uint32_t head, uint32_t thread)
{
    kvs_session *s = ctx;
    const uint32_t n_kv_heads = s->model->info.n_kv_heads;
    const kvs_policy_view v = kvs_view_head(s, head / n_kv_heads, head % n_kv_heads, &s->scratch.threads[thread]);
    s->policy.ops->observe(s->policy.params, &v);
    memcpy(s->scratch.carry + (size_t)head * s->scratch.n_slots, v.carry, v.n_slots * sizeof *v.carry);
}

uint32_t kvs_observe(kvs_session *s)
{
    const kvs_policy_ops *ops = s->policy.ops;
    if (ops->observe == NULL)
        return UINT32_MAX;
    const kvs_evict_scratch *e = &s->scratch;
    const uint64_t n = s->n_tokens;
    if (n > s->n_tokens_evicted_at && ops->observe_at(s->policy.params, n) == n) {
        const uint64_t t0 = kvs_now_ns();
        kvs_pool_run(s->model->pool, observe_task, s, e->n_heads);
        for (uint32_t h = 0; h < e->n_heads; h++)
            kvs_cache_write_side(s->cache, h / s->model->info.n_kv_heads, h % s->model->info.n_kv_heads, KVS_SIDE_CARRY,
                                 e->carry + (size_t)h * e->n_slots);
        const uint64_t ns = kvs_now_ns() - t0;
        s->score_ns += ns;
        s->evict_ns += ns;
    }
    const uint64_t left = ops->observe_at(s->policy.params, n + 1) - n;
    return left > UINT32_MAX ? UINT32_MAX : (uint32_t)left;
}

/* ---- sharing out ---- */

static void count_task(void *ctx, uint32_t set, uint32_t thread)
{
    eviction *x = ctx;
    const uint32_t head = set * x->step;
    kvs_evict_scratch *e = &x->s->scratch;
    const kvs_policy_view v = kvs_view_facts(x->s, head / x->n_kv_heads, head % x->n_kv_heads, &e->threads[thread]);
    const uint32_t n_hard = kvs_protected_count(&x->s->policy.protect, &v),
                   n_even = even_share(x, &v, scores_of(x, head));
    if (x->s->policy.ops->target != NULL && x->keep_override == 0 && n_even > v.n_slots) {
        kvs_error err;
        kvs_error_set(&err, KVS_EPOLICY, "%s, layer %u, KV head %u: target keeps %u slots where %u are held",
                      x->s->policy.ops->name, v.layer, v.kv_head, n_even, v.n_slots);
        refuse(x, head, &err);
    }
    if (x->s->policy.budget != NULL)
        kvs_protected_mark(&x->s->policy.protect, &v, scores_of(x, head));
    for (uint32_t h = head; h < head + x->step; h++) {
        e->n_live[h] = v.n_slots;
        e->n_hard[h] = n_hard;
        e->n_even[h] = e->n_keep[h] = kvs_min_u32(n_even, v.n_slots);
    }
}

static uint32_t least_of(const kvs_evict_scratch *e, uint32_t head)
{
    return kvs_min_u32(kvs_max_u32(e->n_hard[head], 1), e->n_live[head]);
}

/* Slots that all heads keep when none keeps more than `most`, but what it must. */
static uint64_t kept_under(const eviction *x, uint32_t most)
{
    const kvs_evict_scratch *e = &x->s->scratch;
    uint64_t sum = 0;
    for (uint32_t h = 0; h < x->n_heads; h++)
        sum += kvs_min_u32(e->n_keep[h], kvs_max_u32(most, least_of(e, h)));
    return sum;
}

/* What is protected outranks any share. What that takes comes from the heads that got most, so that the sum stays that of
 * the even shares. */
static void bound_shares(const eviction *x)
{
    kvs_evict_scratch *e = &x->s->scratch;
    uint64_t room = 0;
    uint32_t most = 0, too_many = UINT32_MAX;
    for (uint32_t h = 0; h < x->n_heads; h++) {
        e->n_keep[h] = kvs_min_u32(kvs_max_u32(e->n_keep[h], least_of(e, h)), e->n_live[h]);
        room += kvs_max_u32(kvs_min_u32(e->n_even[h], e->n_live[h]), least_of(e, h));
    }
    if (kept_under(x, too_many) <= room)
        return;
    while (too_many - most > 1) {
        const uint32_t middle = most + (too_many - most) / 2;
        *(kept_under(x, middle) <= room ? &most : &too_many) = middle;
    }
    for (uint32_t h = 0; h < x->n_heads; h++)
        e->n_keep[h] = kvs_min_u32(e->n_keep[h], kvs_max_u32(most, least_of(e, h)));
}

static kvs_status share_out(eviction *x)
{
    const kvs_policy *p = &x->s->policy;
    kvs_evict_scratch *e = &x->s->scratch;
    kvs_pool_run(x->s->model->pool, count_task, x, x->n_heads / x->step);
    if (x->status != KVS_OK || p->budget == NULL)
        return x->status;
    const kvs_budget_view view = {
        .n_layers = x->n_heads / x->n_kv_heads,
        .n_kv_heads = x->n_kv_heads,
        .n_slots = e->n_live,
        .n_protected = e->n_hard,
        .n_even = e->n_even,
        .scores = e->scores,
        .stride = e->stride,
        .keys = e->keys,
        .similarity = kvs_query_log_mixed(&x->s->queries),
        .profile = x->s->profile.block == NULL ? NULL : &x->s->profile,
    };
    p->budget->allocate(p->budget_params, &view, e->n_keep);
    bound_shares(x);
    return KVS_OK;
}

/* ---- rescoring what the budget has shared out ---- */

static void rescore_task(void *ctx, uint32_t head, uint32_t thread)
{
    const eviction *x = ctx;
    const kvs_policy *p = &x->s->policy;
    kvs_policy_view v =
        kvs_view_contents(x->s, head / x->n_kv_heads, head % x->n_kv_heads, &x->s->scratch.threads[thread]);
    v.n_keep = x->s->scratch.n_keep[head];
    p->rescore->rescore(p->rescore_params, &v, scores_of(x, head));
}

/* ---- selecting ---- */

static uint8_t *keep_of(const eviction *x, uint32_t head)
{
    return x->s->scratch.keep + (size_t)head * x->s->scratch.n_slots;
}

/* Layers that take over the keep sets of the first of them. */
static uint32_t reuse_of(const eviction *x)
{
    const kvs_policy *p = &x->s->policy;
    return p->select == NULL || p->select->reuse_of == NULL || x->step > x->n_kv_heads
               ? 1
               : p->select->reuse_of(p->select_params);
}

/* Head whose set `head` takes over: itself, or the same head of the first layer of its run where they hold as many. */
static uint32_t leader_of(const eviction *x, uint32_t head)
{
    const uint32_t layer = head / x->n_kv_heads, first = layer - layer % reuse_of(x);
    const uint32_t leader = first * x->n_kv_heads + head % x->n_kv_heads;
    return x->s->scratch.n_live[leader] == x->s->scratch.n_live[head] ? leader : head;
}

static void select_task(void *ctx, uint32_t set, uint32_t thread)
{
    eviction *x = ctx;
    const uint32_t head = set * x->step;
    kvs_evict_scratch *e = &x->s->scratch;
    kvs_view_scratch *t = &e->threads[thread];
    const kvs_policy *p = &x->s->policy;
    if (leader_of(x, head) != head)
        return;
    kvs_policy_view v = kvs_view_facts(x->s, head / x->n_kv_heads, head % x->n_kv_heads, t);
    v.n_keep = e->n_keep[head];
    kvs_error err = {.message = ""};
    kvs_status status;
    if (p->ops->choose != NULL) {
        status = kvs_select_by_policy(p, &v, scores_of(x, head), v.n_keep, keep_of(x, head), t->chosen, &err);
    } else if (p->select == NULL || p->select->meanings) {
        uint32_t n_keep = e->n_keep[head];
        if (p->select != NULL) {
            kvs_protected_mark(&p->protect, &v, scores_of(x, head));
            n_keep = kvs_sentence_log_mark(&x->s->sentences, &v, scores_of(x, head), n_keep);
        }
        status = kvs_select(&p->protect, &v, scores_of(x, head), n_keep, keep_of(x, head), t->select, &err);
    } else {
        p->select->units(p->select_params, &v, t->unit);
        status = (p->select->choose != NULL ? p->select->choose : kvs_select_by_units)(
            &p->protect, &v, scores_of(x, head), t->unit, e->n_keep[head], keep_of(x, head), t->select, &err);
    }
    if (status != KVS_OK)
        refuse(x, head, &err);
}

/* What is lost of the recorded attention: f64, four chains (one would wait for each sum), head by head. */
static void add_mass(eviction *x, const float *mass, const uint8_t *keep, uint32_t n)
{
    double all[4] = {0}, kept[4] = {0};
    for (uint32_t i = 0; i < n; i++) {
        all[i % 4] += (double)mass[i];
        kept[i % 4] += keep[i] != 0 ? (double)mass[i] : 0.0;
    }
    x->mass_all += (all[0] + all[1]) + (all[2] + all[3]);
    x->mass_kept += (kept[0] + kept[1]) + (kept[2] + kept[3]);
}

/* One head of each set speaks for it, as its mass does for the keep set. */
static void measure_mass(eviction *x)
{
    const kvs_evict_scratch *e = &x->s->scratch;
    const kvs_view_scratch *t = &e->threads[0];
    const int which = t->side[KVS_SIDE_SUM] != NULL   ? KVS_SIDE_SUM
                      : t->side[KVS_SIDE_EMA] != NULL ? KVS_SIDE_EMA
                      : t->side[KVS_SIDE_MAX] != NULL ? KVS_SIDE_MAX
                                                      : -1;
    if (which < 0)
        return;
    kvs_head_slots slots = {0};
    slots.side[which] = t->side[which];
    for (uint32_t h = x->step - 1; h < x->n_heads; h += x->step) {
        const uint32_t n = kvs_cache_read_head(x->s->cache, h / x->n_kv_heads, h % x->n_kv_heads, &slots);
        add_mass(x, t->side[which], keep_of(x, h), n);
    }
}

static kvs_status select_all(eviction *x)
{
    kvs_evict_scratch *e = &x->s->scratch;
    kvs_pool_run(x->s->model->pool, select_task, x, x->n_heads / x->step);
    if (x->status != KVS_OK)
        return x->status;
    for (uint32_t h = 0; h < x->n_heads; h++) {
        const uint32_t from = leader_of(x, h - h % x->step);
        if (from != h)
            memcpy(keep_of(x, h), keep_of(x, from), e->n_live[h]);
        uint32_t n = 0;
        for (uint32_t i = 0; i < e->n_live[h]; i++)
            n += keep_of(x, h)[i];
        x->any |= n < e->n_live[h];
    }
    measure_mass(x);
    return KVS_OK;
}

/* Heads that no longer hold the same tokens (an earlier eviction chose so) cannot share a set. */
static uint32_t step_of(const kvs_session *s, uint32_t n_kv_heads, uint32_t n_heads)
{
    const kvs_policy_scope scope = kvs_policy_scope_of(&s->policy);
    uint32_t step = scope == KVS_SCOPE_HEAD ? 1 : scope == KVS_SCOPE_LAYER ? n_kv_heads : n_heads;
    if (step == n_heads && !s->uniform)
        step = n_kv_heads;
    if (step == n_kv_heads && !s->layer_uniform)
        step = 1;
    return step;
}

static kvs_status choose(eviction *x)
{
    x->any = false;
    x->mass_all = x->mass_kept = 0;
    const uint64_t t0 = kvs_now_ns();
    KVS_TRY(score_all(x));
    const uint64_t t1 = kvs_now_ns();
    KVS_TRY(share_out(x));
    if (rescores_late(x))
        kvs_pool_run(x->s->model->pool, rescore_task, x, x->n_heads);
    KVS_TRY(select_all(x));
    x->score_ns += t1 - t0;
    x->select_ns += kvs_now_ns() - t1;
    return KVS_OK;
}

/* ---- disposing ---- */

/* Values are written to pages of their own; what forks share is copied before anything changes, so that a lack of blocks is
 * a refusal like any other. */
static kvs_status own_pages(const eviction *x)
{
    if (x->s->policy.dispose == NULL)
        return KVS_OK;
    for (uint32_t h = 0; h < x->n_heads; h++)
        if (!kvs_cache_own_kept(x->s->cache, h / x->n_kv_heads, h % x->n_kv_heads, keep_of(x, h)))
            return kvs_error_set(x->err, KVS_EBUDGET,
                                 "+dispose=%s finds no pages for values that a fork shares: a fork onto a smaller "
                                 "budget has yet to evict",
                                 x->s->policy.dispose->info.name);
    return KVS_OK;
}

/* Head first + i, in the scratch of thread i: what its kept slots' values become, moved together in kept order. */
typedef struct disposal {
    const eviction *x;
    uint32_t first;
} disposal;

static bool writes_keys(const kvs_policy *p)
{
    return p->dispose->writes_keys != NULL && p->dispose->writes_keys(p->dispose_params);
}

static void dispose_task(void *ctx, uint32_t i, uint32_t thread)
{
    (void)thread;
    const eviction *x = ((const disposal *)ctx)->x;
    const uint32_t head = ((const disposal *)ctx)->first + i;
    const kvs_policy *p = &x->s->policy;
    kvs_view_scratch *t = &x->s->scratch.threads[i];
    const uint8_t *const keep = keep_of(x, head);
    kvs_policy_view v = kvs_view_kv(x->s, head / x->n_kv_heads, head % x->n_kv_heads, t);
    v.n_keep = x->s->scratch.n_keep[head];
    memset(t->changed, 0, v.n_slots);
    float *const keys = writes_keys(p) ? t->keys_raw : NULL;
    if (memchr(keep, 0, v.n_slots) != NULL)
        p->dispose->merge(p->dispose_params, &v, scores_of(x, leader_of(x, head - head % x->step)), keep, keys,
                          t->values, t->changed);
    uint32_t to = 0;
    for (uint32_t k = 0; k < v.n_slots; k++) {
        if (keep[k] == 0)
            continue;
        if (to != k)
            memcpy(t->values + (size_t)to * v.head_dim, t->values + (size_t)k * v.head_dim,
                   v.head_dim * sizeof *t->values);
        if (to != k && keys != NULL)
            memcpy(keys + (size_t)to * v.head_dim, keys + (size_t)k * v.head_dim, v.head_dim * sizeof *keys);
        t->key_rot[to] = t->key_rot[k];
        t->changed[to++] = t->changed[k] != 0;
    }
    t->n_kept = to;
    if (keys != NULL)
        kvs_view_rotate(x->s, keys, t->key_rot, to);
}

/* The next heads, one a thread. */
static void dispose(const eviction *x, uint32_t first)
{
    disposal d = {x, first};
    kvs_pool_run(x->s->model->pool, dispose_task, &d, kvs_min_u32(x->s->scratch.n_threads, x->n_heads - first));
}

/* ---- applying ---- */

/* Dead slots are read by every later token and hold room. Where the budget asked for the eviction, every slot will be
 * wanted before it asks again; else moving pays once enough are dead. */
static void compact(kvs_session *s, uint32_t layer, uint32_t head)
{
    if (s->policy.schedule == KVS_SCHEDULE_FULL || kvs_cache_is_sparse(s->cache, layer, head))
        kvs_cache_compact(s->cache, layer, head);
}

/* Reads what a head holds now and says where it stands: kept_pos, kept_rope, the next key's position. */
static int32_t place(kvs_session *s, uint32_t layer, uint32_t head)
{
    kvs_evict_scratch *e = &s->scratch;
    const kvs_head_slots slots = {.pos = e->kept_pos, .rope_pos = e->kept_rope};
    const uint32_t n = kvs_cache_read_head(s->cache, layer, head, &slots);
    int32_t next;
    kvs_positions_assign(s->policy.position, s->policy.gap_cap, e->kept_pos, e->kept_rope, n, (int32_t)s->n_tokens,
                         e->kept_rope, &next);
    kvs_turn_log_mark(&s->turns, e->kept_pos, n);
    return next;
}

static void apply(const eviction *x)
{
    kvs_session *const s = x->s;
    const uint32_t n_kv_heads = s->model->info.n_kv_heads, n_heads = s->model->info.n_layers * n_kv_heads;
    const kvs_policy_scope scope = kvs_policy_scope_of(&s->policy);
    s->uniform = s->uniform && scope == KVS_SCOPE_SHARED;
    s->layer_uniform = s->layer_uniform && scope != KVS_SCOPE_HEAD;
    int32_t next = 0;
    for (uint32_t h = 0; h < n_heads; h++) {
        const uint32_t layer = h / n_kv_heads, head = h % n_kv_heads, thread = h % s->scratch.n_threads;
        const kvs_view_scratch *const t = &s->scratch.threads[thread];
        if (s->policy.dispose != NULL && thread == 0)
            dispose(x, h);
        if (s->scratch.carry != NULL)
            kvs_cache_write_side(s->cache, layer, head, KVS_SIDE_CARRY,
                                 s->scratch.carry + (size_t)h * s->scratch.n_slots);
        kvs_cache_keep(s->cache, layer, head, s->scratch.keep + (size_t)h * s->scratch.n_slots);
        compact(s, layer, head);
        if (s->policy.dispose != NULL && memchr(t->changed, 1, t->n_kept) != NULL)
            kvs_cache_write_kv(s->cache, layer, head, writes_keys(&s->policy) ? t->keys_raw : NULL, t->values,
                               t->changed);
        if (h == 0 || !s->uniform) /* else as head 0 */
            next = place(s, layer, head);
        kvs_cache_set_rope(s->cache, layer, head, s->scratch.kept_rope, next);
    }
    kvs_turn_log_forget(&s->turns, (int32_t)s->n_tokens);
    kvs_sentence_log_evicted(&s->sentences);
}

/* Mode recompute: the kept tokens run through the model afresh, at positions 0..n-1, as if nothing else had been
 * said. They keep their true pos. */
static kvs_status recompute(kvs_session *s, kvs_forward *f, kvs_error *err)
{
    kvs_evict_scratch *e = &s->scratch;
    const kvs_head_slots slots = {.pos = e->kept_pos, .token = e->token, .flags = e->flags};
    const uint32_t n = kvs_cache_read_head(s->cache, 0, 0, &slots);
    const uint64_t footprint = kvs_cache_meter_now(s->cache)->footprint_slots;
    kvs_cache_clear(s->cache);
    for (uint32_t at = 0; at < n;) {
        const uint32_t rows = kvs_min_u32(n - at, kvs_min_u32(s->chunk_tokens, f->max_rows));
        KVS_TRY(kvs_step_raw(s, f, e->token + at, e->flags + at, e->kept_pos + at, rows, KVS_ROWS_ALONE, err));
        at += rows;
    }
    s->footprint_skip += kvs_cache_meter_now(s->cache)->footprint_slots - footprint;
    return KVS_OK;
}

kvs_status kvs_evict(kvs_session *s, kvs_forward *forward, uint32_t keep_override, const char *path, const char *reason,
                     bool *progress, kvs_error *err)
{
    *progress = false;
    const uint64_t t0 = kvs_now_ns(), live_before = kvs_cache_live_total(s->cache);
    const uint32_t n_before = kvs_cache_live_max(s->cache);
    if (n_before == 0)
        return KVS_OK;
    eviction x = {
        .s = s,
        .n_kv_heads = s->model->info.n_kv_heads,
        .n_heads = s->scratch.n_heads,
        .keep_override = keep_override,
        .err = err,
    };
    x.step = step_of(s, x.n_kv_heads, x.n_heads);
    /* A policy that looks at no attention, key or value sees the same in every head that holds the same. */
    x.n_scored = kvs_policy_needs(&s->policy) == 0 && x.step == x.n_heads ? 1 : x.n_heads;
    KVS_TRY(kvs_probe_before(s, forward, err));
    uint64_t probe_ns = kvs_now_ns() - t0;
    kvs_status status = choose(&x);
    if (status == KVS_OK && kvs_probe_wants_kept(s)) {
        const uint64_t from = kvs_now_ns();
        status = kvs_probe_on_kept(s, forward, s->scratch.keep, s->scratch.n_slots, err);
        probe_ns += kvs_now_ns() - from;
        if (status == KVS_OK)
            status = choose(&x);
    }
    kvs_probe_end(s);
    if (status == KVS_OK && x.any)
        status = own_pages(&x);
    if (status != KVS_OK || !x.any)
        return status;
    const uint64_t t1 = kvs_now_ns();
    apply(&x);
    if (s->policy.position == KVS_POSITION_RECOMPUTE)
        KVS_TRY(recompute(s, forward, err));
    const uint64_t t2 = kvs_now_ns();
    if (x.mass_all > 0) {
        const double lost = 1.0 - x.mass_kept / x.mass_all;
        s->mass_lost = s->mass_lost < 0 ? lost : MASS_LOST_DECAY * s->mass_lost + (1 - MASS_LOST_DECAY) * lost;
    }
    s->n_slots_evicted += live_before - kvs_cache_live_total(s->cache);
    s->n_tokens_evicted_at = s->n_tokens;
    s->evicted_after_prompt = s->last_was_prompt;
    s->ffn.n_said_evicted_at = s->ffn.n_said;
    s->score_ns += x.score_ns;
    s->select_ns += x.select_ns;
    s->move_ns += t2 - t1;
    s->probe_ns += probe_ns;
    s->evict_ns += t2 - t0;
    *progress = true;
    const kvs_event event = {
        .token_idx = s->n_tokens,
        .index = s->n_evictions,
        .path = path,
        .reason = reason,
        .n_before = n_before,
        .n_after = kvs_cache_live_max(s->cache),
        .evict_ns = t2 - t0,
        .score_ns = x.score_ns,
        .select_ns = x.select_ns,
        .move_ns = t2 - t1,
    };
    s->n_evictions++;
    if (s->on_event != NULL)
        s->on_event(s->event_ctx, &event);
    return KVS_OK;
}

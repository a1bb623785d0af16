/* One eviction: score, select for all heads, then drop and reposition. Nothing changes until every head has its keep
 * set, so a refusal leaves the session as it was. */
#include "session/session_internal.h"

#include "cache/positions.h"

#include <math.h>
#include <string.h>

/* How fast the record of lost attention mass forgets: half a weight an event. */
#define MASS_LOST_DECAY 0.5

kvs_status kvs_evict_scratch_create(kvs_session *s, kvs_error *err)
{
    kvs_evict_scratch *e = &s->scratch;
    e->n_slots = kvs_cache_slots_max(s->cache);
    s->turns.capacity = kvs_turn_log_capacity(e->n_slots);
    s->turns.marker_from = -1;
    const size_t n_heads = (size_t)s->model->info.n_layers * s->model->info.n_kv_heads;
    e->n_keep = n_heads * e->n_slots;
    struct {
        void **at;
        size_t n, size;
    } arrays[] = {
        {(void **)&e->pos, e->n_slots, 4},      {(void **)&e->rope_pos, e->n_slots, 4},
        {(void **)&e->token, e->n_slots, 4},    {(void **)&e->flags, e->n_slots, 1},
        {(void **)&e->scores, e->n_slots, 4},   {(void **)&e->score_sum, e->n_slots, 8},
        {(void **)&e->select, e->n_slots, 8},   {(void **)&e->keep, e->n_keep, 1},
        {(void **)&e->kept_pos, e->n_slots, 4}, {(void **)&e->kept_rope, e->n_slots, 4},
        {(void **)&e->side[0], e->n_slots, 4},  {(void **)&e->side[1], e->n_slots, 4},
        {(void **)&e->side[2], e->n_slots, 4},  {(void **)&s->turns.turns, s->turns.capacity, sizeof *s->turns.turns},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        *arrays[i].at = kvs_alloc(s->allocator, arrays[i].n, arrays[i].size);
        if (*arrays[i].at == NULL) {
            kvs_evict_scratch_free(s);
            return kvs_error_set(err, KVS_ENOMEM, "no memory for an eviction over %u slots a head", e->n_slots);
        }
        e->bytes += arrays[i].n * arrays[i].size;
    }
    return KVS_OK;
}

void kvs_evict_scratch_free(kvs_session *s)
{
    kvs_evict_scratch *e = &s->scratch;
    void *all[] = {e->pos,  e->rope_pos, e->token,     e->flags,   e->scores,  e->score_sum, e->select,
                   e->keep, e->kept_pos, e->kept_rope, e->side[0], e->side[1], e->side[2],   s->turns.turns};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        kvs_free(s->allocator, all[i]);
    memset(e, 0, sizeof *e);
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
    return mask;
}

/* ---- scoring ---- */

/* with_facts false: scratch holds pos, rope_pos, tokens and flags of a head that keeps the same. */
static kvs_policy_view read_view(const kvs_session *s, uint32_t layer, uint32_t head, bool with_facts)
{
    const kvs_evict_scratch *e = &s->scratch;
    const kvs_model_info *info = &s->model->info;
    const uint32_t mask = kvs_side_mask(&s->policy);
    kvs_head_slots slots = {0};
    if (with_facts)
        slots = (kvs_head_slots){.pos = e->pos, .rope_pos = e->rope_pos, .token = e->token, .flags = e->flags};
    for (int i = 0; i < KVS_SIDE_COUNT; i++)
        slots.side[i] = mask & 1u << i ? e->side[i] : NULL;
    const uint32_t n = kvs_cache_read_head(s->cache, layer, head, &slots);
    return (kvs_policy_view){
        .layer = layer,
        .kv_head = head,
        .n_layers = info->n_layers,
        .n_kv_heads = info->n_kv_heads,
        .group = info->n_heads / info->n_kv_heads,
        .n_slots = n,
        .n_tokens = (int64_t)s->n_tokens,
        .pos = e->pos,
        .rope_pos = e->rope_pos,
        .token = e->token,
        .flags = e->flags,
        .mass_sum = slots.side[KVS_SIDE_SUM],
        .mass_ema = slots.side[KVS_SIDE_EMA],
        .mass_max = slots.side[KVS_SIDE_MAX],
        .seed = s->options.seed,
        .event = s->n_evictions,
    };
}

/* Scores of the heads [begin, end) averaged into scratch.scores; the returned view is the last head's, whose pos all
 * of them share. Policies that look at no attention see the same in every head: one is enough. */
static kvs_policy_view score_heads(kvs_session *s, uint32_t begin, uint32_t end)
{
    const uint32_t n_kv_heads = s->model->info.n_kv_heads;
    kvs_evict_scratch *e = &s->scratch;
    if (kvs_policy_needs(&s->policy) == 0)
        end = begin + 1;
    kvs_policy_view v = {0};
    for (uint32_t h = begin; h < end; h++) {
        v = read_view(s, h / n_kv_heads, h % n_kv_heads, h == begin);
        s->policy.ops->score(s->policy.params, &v, e->scores);
        if (end == begin + 1)
            return v;
        for (uint32_t i = 0; i < v.n_slots; i++)
            e->score_sum[i] = (h == begin ? 0.0 : e->score_sum[i]) + (double)e->scores[i];
    }
    for (uint32_t i = 0; i < v.n_slots; i++)
        e->scores[i] = (float)(e->score_sum[i] / (double)(end - begin));
    return v;
}

/* ---- selecting ---- */

typedef struct selection {
    uint32_t n_drop_max;
    bool any;
    double mass_kept, mass_all;
    uint64_t score_ns, select_ns;
} selection;

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
    return (uint32_t)(cap - chunk);
}

static void add_mass(selection *sel, const kvs_policy_view *v, const uint8_t *keep)
{
    const float *mass = v->mass_sum != NULL ? v->mass_sum : v->mass_ema != NULL ? v->mass_ema : v->mass_max;
    if (mass == NULL)
        return;
    double all[4] = {0}, kept[4] = {0}; /* four chains: one would wait for each sum */
    for (uint32_t i = 0; i < v->n_slots; i++) {
        all[i % 4] += (double)mass[i];
        kept[i % 4] += keep[i] != 0 ? (double)mass[i] : 0.0;
    }
    sel->mass_all += (all[0] + all[1]) + (all[2] + all[3]);
    sel->mass_kept += (kept[0] + kept[1]) + (kept[2] + kept[3]);
}

/* Keep sets of heads [begin, end), which share one. */
static kvs_status select_heads(kvs_session *s, uint32_t begin, uint32_t end, uint32_t keep_override, selection *sel,
                               kvs_error *err)
{
    kvs_evict_scratch *e = &s->scratch;
    const uint64_t t0 = kvs_now_ns();
    const kvs_policy_view v = score_heads(s, begin, end);
    const uint64_t t1 = kvs_now_ns();
    /* An override that the budget asks for cannot go below what is protected; where nothing else is left, kvs_select
     * says so. */
    const uint32_t floor_tokens =
        kvs_min_u32(kvs_protected_count(&s->policy.protect, &v), v.n_slots > 0 ? v.n_slots - 1 : 0);
    const uint32_t target = keep_override != 0 ? kvs_max_u32(keep_override, floor_tokens)
                                               : kvs_policy_target(&s->policy, &v, kvs_keep_default(s));
    uint8_t *keep = e->keep + (size_t)begin * e->n_slots;
    KVS_TRY(kvs_select(&s->policy.protect, &v, e->scores, target, keep, e->select, err));
    for (uint32_t h = begin + 1; h < end; h++)
        memcpy(e->keep + (size_t)h * e->n_slots, keep, v.n_slots);
    add_mass(sel, &v, keep);
    if (target < v.n_slots) {
        sel->any = true;
        sel->n_drop_max = kvs_max_u32(sel->n_drop_max, v.n_slots - target);
    }
    sel->score_ns += t1 - t0;
    sel->select_ns += kvs_now_ns() - t1;
    return KVS_OK;
}

static kvs_status select_all(kvs_session *s, uint32_t keep_override, selection *sel, kvs_error *err)
{
    const uint32_t n_kv_heads = s->model->info.n_kv_heads, n_heads = s->model->info.n_layers * n_kv_heads;
    const kvs_policy_scope scope = kvs_policy_scope_of(&s->policy);
    /* Heads that no longer hold the same tokens (an earlier eviction chose so) cannot share a set. */
    uint32_t step = scope == KVS_SCOPE_HEAD ? 1 : scope == KVS_SCOPE_LAYER ? n_kv_heads : n_heads;
    if (step == n_heads && !s->uniform)
        step = n_kv_heads;
    if (step == n_kv_heads && !s->layer_uniform)
        step = 1;
    for (uint32_t h = 0; h < n_heads; h += step)
        KVS_TRY(select_heads(s, h, h + step, keep_override, sel, err));
    return KVS_OK;
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

static void apply(kvs_session *s)
{
    const uint32_t n_kv_heads = s->model->info.n_kv_heads, n_heads = s->model->info.n_layers * n_kv_heads;
    const kvs_policy_scope scope = kvs_policy_scope_of(&s->policy);
    s->uniform = s->uniform && scope == KVS_SCOPE_SHARED;
    s->layer_uniform = s->layer_uniform && scope != KVS_SCOPE_HEAD;
    int32_t next = 0;
    for (uint32_t h = 0; h < n_heads; h++) {
        const uint32_t layer = h / n_kv_heads, head = h % n_kv_heads;
        kvs_cache_keep(s->cache, layer, head, s->scratch.keep + (size_t)h * s->scratch.n_slots);
        compact(s, layer, head);
        if (h == 0 || !s->uniform) /* else as head 0 */
            next = place(s, layer, head);
        kvs_cache_set_rope(s->cache, layer, head, s->scratch.kept_rope, next);
    }
    kvs_turn_log_forget(&s->turns, (int32_t)s->n_tokens);
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
        KVS_TRY(kvs_step_raw(s, f, e->token + at, e->flags + at, e->kept_pos + at, rows, err));
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
    selection sel = {0};
    KVS_TRY(select_all(s, keep_override, &sel, err));
    if (!sel.any)
        return KVS_OK;
    const uint64_t t1 = kvs_now_ns();
    apply(s);
    if (s->policy.position == KVS_POSITION_RECOMPUTE)
        KVS_TRY(recompute(s, forward, err));
    const uint64_t t2 = kvs_now_ns();
    if (sel.mass_all > 0) {
        const double lost = 1.0 - sel.mass_kept / sel.mass_all;
        s->mass_lost = s->mass_lost < 0 ? lost : MASS_LOST_DECAY * s->mass_lost + (1 - MASS_LOST_DECAY) * lost;
    }
    s->n_slots_evicted += live_before - kvs_cache_live_total(s->cache);
    s->n_tokens_evicted_at = s->n_tokens;
    s->evicted_after_prompt = s->last_was_prompt;
    s->score_ns += sel.score_ns;
    s->select_ns += sel.select_ns;
    s->move_ns += t2 - t1;
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
        .score_ns = sel.score_ns,
        .select_ns = sel.select_ns,
        .move_ns = t2 - t1,
    };
    s->n_evictions++;
    if (s->on_event != NULL)
        s->on_event(s->event_ctx, &event);
    return KVS_OK;
}

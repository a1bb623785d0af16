/* Create, append, read, evict, truncate, measure. Pages and compaction are in pages.c. */
#include "cache/cache_internal.h"

#include <string.h>

/* ---- sizes ---- */

static size_t block_bytes_of(const kvs_cache_config *c)
{
    const size_t element = c->kv_f32 ? 4 : 2;
    return 2 * kvs_round_up((size_t)KVS_PAGE_SLOTS * c->head_dim * element, KVS_ALIGN);
}

static size_t side_bytes_of(const kvs_cache_config *c)
{
    size_t bytes = sizeof(kvs_page_meta) + sizeof(kvs_page) + 3 * sizeof(uint32_t); /* two free lists, one count */
    for (int s = 0; s < KVS_SIDE_COUNT; s++)
        if (c->side_mask & 1u << s)
            bytes += KVS_PAGE_SLOTS * sizeof(float);
    return bytes;
}

static uint64_t fixed_bytes_of(const kvs_cache_config *c)
{
    return (uint64_t)c->n_layers * c->n_kv_heads * sizeof(kvs_head);
}

uint64_t kvs_cache_bytes_for_tokens(const kvs_cache_config *c, uint32_t n_tokens)
{
    const uint64_t pages = ((uint64_t)n_tokens + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
    return fixed_bytes_of(c) + pages * c->n_layers * c->n_kv_heads * (block_bytes_of(c) + side_bytes_of(c));
}

static uint64_t pages_for_bytes(const kvs_cache_config *c, uint64_t bytes)
{
    const uint64_t fixed = fixed_bytes_of(c);
    return bytes < fixed ? 0 : (bytes - fixed) / (block_bytes_of(c) + side_bytes_of(c));
}

uint32_t kvs_cache_tokens_for_bytes(const kvs_cache_config *c, uint64_t budget_bytes)
{
    const uint64_t per_head = pages_for_bytes(c, budget_bytes) / ((uint64_t)c->n_layers * c->n_kv_heads);
    return per_head > UINT32_MAX / KVS_PAGE_SLOTS ? UINT32_MAX : (uint32_t)per_head * KVS_PAGE_SLOTS;
}

/* ---- create, fork, free ---- */

static uint32_t n_own_pages(const kvs_cache_config *config, uint32_t page_limit)
{
    const uint64_t pages =
        ((uint64_t)config->own_tokens + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS * config->n_layers * config->n_kv_heads;
    return config->own_tokens != 0 && pages < page_limit ? (uint32_t)pages : page_limit;
}

/* The cache without pages in it: n_entries page entries, the budget's own blocks. store NULL: a new family. */
static kvs_cache *cache_new(const kvs_cache_config *config, uint32_t page_limit, uint32_t n_entries,
                            kvs_block_store *store)
{
    const kvs_allocator *a = config->allocator;
    kvs_cache *c = kvs_alloc(a, 1, sizeof *c);
    if (c == NULL)
        return NULL;
    c->config = *config;
    c->allocator = a;
    c->gather = kvs_tile_gather_get(kvs_cpu_masked(0));
    c->n_heads = config->n_layers * config->n_kv_heads;
    c->block_bytes = block_bytes_of(config);
    c->half_bytes = c->block_bytes / 2;
    c->page_side_bytes = side_bytes_of(config);
    c->page_limit = page_limit;
    c->slot_cap = config->budget_tokens != 0 && !config->ragged ? config->budget_tokens : UINT32_MAX;
    c->slots_max = config->slots_max != 0 ? config->slots_max : UINT32_MAX;
    c->n_entries = n_entries;
    c->pages = kvs_alloc(a, n_entries, sizeof *c->pages);
    c->meta = kvs_alloc(a, n_entries, sizeof *c->meta);
    c->free_entries = kvs_alloc(a, n_entries, sizeof *c->free_entries);
    c->heads = kvs_alloc(a, c->n_heads, sizeof *c->heads);
    c->store = store != NULL ? store : kvs_block_store_create(a, c->block_bytes);
    c->pool = c->store == NULL ? NULL : kvs_block_store_join(c->store, a, n_own_pages(config, page_limit));
    bool ok = c->pages && c->meta && c->free_entries && c->heads && c->pool;
    for (int s = 0; s < KVS_SIDE_COUNT && ok; s++)
        if (config->side_mask & 1u << s)
            ok = (c->side[s] = kvs_alloc(a, n_entries, KVS_PAGE_SLOTS * sizeof(float))) != NULL;
    if (!ok) {
        kvs_cache_free(&c);
        return NULL;
    }
    for (uint32_t i = 0; i < n_entries; i++)
        c->free_entries[i] = n_entries - 1 - i;
    c->n_free_entries = n_entries;
    for (uint32_t i = 0; i < c->n_heads; i++)
        c->heads[i] = (kvs_head){.first = KVS_NO_PAGE, .last = KVS_NO_PAGE, .last_rope = -1};
    return c;
}

static kvs_status page_limit_of(const kvs_cache_config *config, uint32_t *out, kvs_error *err)
{
    if (config->head_dim > KVS_HEAD_DIM_MAX)
        return kvs_error_set(err, KVS_EUNSUPPORTED, "head size %u is over the largest, %d", config->head_dim,
                             KVS_HEAD_DIM_MAX);
    const uint64_t n_heads = (uint64_t)config->n_layers * config->n_kv_heads;
    uint64_t pages = config->budget_bytes != 0
                         ? pages_for_bytes(config, config->budget_bytes)
                         : n_heads * (((uint64_t)config->budget_tokens + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS);
    if (pages < n_heads)
        return kvs_error_set(err, KVS_EBUDGET,
                             "budget of %llu bytes holds no page of %d slots for each of %llu heads; it must be at "
                             "least %llu bytes",
                             (unsigned long long)config->budget_bytes, KVS_PAGE_SLOTS, (unsigned long long)n_heads,
                             (unsigned long long)kvs_cache_bytes_for_tokens(config, 1));
    if (pages >= KVS_NO_PAGE)
        return kvs_error_set(err, KVS_EINVAL, "budget of %llu pages is over the largest, %u", (unsigned long long)pages,
                             KVS_NO_PAGE - 1);
    *out = (uint32_t)pages;
    return KVS_OK;
}

kvs_status kvs_cache_create(const kvs_cache_config *config, kvs_cache **out, kvs_error *err)
{
    *out = NULL;
    uint32_t page_limit;
    KVS_TRY(page_limit_of(config, &page_limit, err));
    kvs_cache *c = cache_new(config, page_limit, page_limit, NULL);
    if (c == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a cache of %u pages of %zu bytes", page_limit,
                             block_bytes_of(config) + side_bytes_of(config));
    kvs_cache_meter_update(c);
    *out = c;
    return KVS_OK;
}

static void share_head(kvs_cache *c, const kvs_cache *parent, uint32_t index)
{
    kvs_head *h = &c->heads[index];
    const kvs_head *from = &parent->heads[index];
    *h = *from;
    h->first = h->last = KVS_NO_PAGE;
    h->n_pages = 0;
    for (uint32_t e = from->first; e != KVS_NO_PAGE; e = parent->pages[e].next) {
        const uint32_t mine = c->free_entries[--c->n_free_entries];
        c->pages[mine] = parent->pages[e];
        c->pages[mine].next = KVS_NO_PAGE;
        kvs_block_share(c->store, &c->pages[mine]);
        c->meta[mine] = parent->meta[e];
        for (int s = 0; s < KVS_SIDE_COUNT; s++)
            if (c->side[s] != NULL && parent->side[s] != NULL)
                memcpy(c->side[s] + (size_t)mine * KVS_PAGE_SLOTS, parent->side[s] + (size_t)e * KVS_PAGE_SLOTS,
                       KVS_PAGE_SLOTS * sizeof(float));
        kvs_cache_chain_push(c, h, mine);
        c->n_held++;
    }
}

kvs_status kvs_cache_fork(const kvs_cache *parent, const kvs_cache_config *config, kvs_cache **out, kvs_error *err)
{
    *out = NULL;
    uint32_t page_limit;
    KVS_TRY(page_limit_of(config, &page_limit, err));
    kvs_cache *c = cache_new(config, page_limit, kvs_max_u32(page_limit, parent->n_held), parent->store);
    if (c == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a fork of %u pages", page_limit);
    for (uint32_t i = 0; i < c->n_heads; i++)
        share_head(c, parent, i);
    c->n_live_total = parent->n_live_total;
    c->over_taken = c->n_held > page_limit;
    c->meter.footprint_slots = parent->meter.footprint_slots;
    kvs_cache_meter_update(c);
    *out = c;
    return KVS_OK;
}

void kvs_cache_free(kvs_cache **cache)
{
    kvs_cache *c = *cache;
    if (c == NULL)
        return;
    *cache = NULL;
    if (c->heads != NULL && c->pages != NULL && c->n_held > 0)
        kvs_cache_clear(c);
    if (c->store != NULL)
        kvs_block_store_leave(c->store, c->pool);
    kvs_free(c->allocator, c->pages);
    kvs_free(c->allocator, c->meta);
    kvs_free(c->allocator, c->free_entries);
    kvs_free(c->allocator, c->heads);
    for (int s = 0; s < KVS_SIDE_COUNT; s++)
        kvs_free(c->allocator, c->side[s]);
    kvs_free(c->allocator, c);
}

void kvs_cache_clear(kvs_cache *c)
{
    for (uint32_t i = 0; i < c->n_heads; i++) {
        kvs_head *h = &c->heads[i];
        for (uint32_t e = h->first; e != KVS_NO_PAGE;) {
            const uint32_t next = c->pages[e].next;
            kvs_cache_entry_drop(c, e);
            e = next;
        }
        *h = (kvs_head){.first = KVS_NO_PAGE, .last = KVS_NO_PAGE, .last_rope = -1};
    }
    c->n_live_total = 0;
    kvs_cache_meter_update(c);
}

/* ---- appending ---- */

/* Blocks and entries that may still be taken. */
static uint32_t pages_free(const kvs_cache *c)
{
    if (c->n_held >= c->page_limit)
        return 0;
    return kvs_min_u32(kvs_min_u32(c->page_limit - c->n_held, c->n_free_entries), kvs_block_n_free(c->store));
}

/* Pages head h must take to hold n more slots. */
static uint32_t pages_needed(const kvs_head *h, uint32_t n)
{
    const uint32_t end = h->n_physical + n;
    return (end + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS - h->n_pages;
}

static uint64_t pages_needed_total(const kvs_cache *c, uint32_t n)
{
    uint64_t total = 0;
    for (uint32_t i = 0; i < c->n_heads; i++)
        total += pages_needed(&c->heads[i], n);
    return total;
}

uint32_t kvs_cache_room(const kvs_cache *c)
{
    const uint32_t cap = kvs_min_u32(c->slot_cap, c->slots_max);
    const uint32_t live_max = kvs_cache_live_max(c);
    if (live_max >= cap)
        return 0;
    /* As many as fit if every head were dense: what append can reach by compacting. */
    const uint64_t slots = (uint64_t)c->page_limit * KVS_PAGE_SLOTS;
    uint32_t low = 0, high = slots < cap - live_max ? (uint32_t)slots : cap - live_max;
    if (c->config.ragged && c->config.budget_tokens != 0) {
        const uint64_t all = (uint64_t)c->config.budget_tokens * c->n_heads;
        const uint64_t left = all > c->n_live_total ? (all - c->n_live_total) / c->n_heads : 0;
        high = left < high ? (uint32_t)left : high;
    }
    while (low < high) {
        const uint32_t n = low + (high - low + 1) / 2;
        uint64_t pages = 0;
        for (uint32_t i = 0; i < c->n_heads; i++)
            pages += ((uint64_t)c->heads[i].n_live + n + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
        if (pages <= c->page_limit)
            low = n;
        else
            high = n - 1;
    }
    return low;
}

/* Frees pages by compacting the heads that hold holes, most holes per page first would be best; in order is enough,
 * since it stops as soon as the need is met. */
static bool make_room(kvs_cache *c, uint32_t n)
{
    for (uint32_t i = 0; i < c->n_heads && pages_needed_total(c, n) > pages_free(c); i++) {
        kvs_head *h = &c->heads[i];
        if (h->n_physical - h->n_live > 0)
            kvs_head_compact(c, h);
    }
    return pages_needed_total(c, n) <= pages_free(c);
}

static void append_head(kvs_cache *c, kvs_head *h, const int32_t *pos, const int32_t *tokens, const uint8_t *flags,
                        uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t slot = h->n_physical % KVS_PAGE_SLOTS;
        if (slot == 0)
            kvs_cache_chain_push(c, h, kvs_cache_entry_take(c));
        kvs_page_meta *m = &c->meta[h->last];
        m->pos[slot] = pos[i];
        m->rope_pos[slot] = m->key_rot[slot] = h->next_rope;
        m->token[slot] = ((uint32_t)tokens[i] & 0xffffffu) | (uint32_t)(flags == NULL ? 0 : flags[i]) << 24;
        for (int s = 0; s < KVS_SIDE_COUNT; s++)
            if (c->side[s] != NULL)
                c->side[s][(size_t)h->last * KVS_PAGE_SLOTS + slot] = 0.0f;
        c->pages[h->last].live |= (uint64_t)1 << slot;
        h->backward = h->backward << 1 | (h->next_rope <= h->last_rope);
        h->last_rope = h->next_rope++;
        h->n_physical++;
        h->n_live++;
    }
}

/* Makes every head's open tail page writable; false leaves content as it was. */
static bool own_tails(kvs_cache *c)
{
    for (uint32_t i = 0; i < c->n_heads; i++) {
        kvs_head *h = &c->heads[i];
        if (h->n_physical % KVS_PAGE_SLOTS != 0 && !kvs_cache_entry_own(c, h->last))
            return false;
    }
    return true;
}

/* A dead slot costs attention as much as a live one, about 30 ns a token and head of 64 dims in f16, and moving a slot
 * costs about 35 (tests/bench/bench_evict.c): past a sixteenth of dead slots moving the rest together pays for itself
 * within 20 tokens. */
enum { SPARSE_SHARE = 16 };

static bool is_sparse(const kvs_head *h)
{
    return h->n_physical - h->n_live > h->n_live / SPARSE_SHARE;
}

/* Afterwards no head holds more dead slots than kvs_cache_pages_bound counts with; false when one does, which takes a
 * fork onto a smaller budget that has not evicted yet. */
static bool compact_sparse(kvs_cache *c)
{
    bool ok = true;
    for (uint32_t i = 0; i < c->n_heads; i++)
        if (is_sparse(&c->heads[i])) {
            kvs_head_compact(c, &c->heads[i]);
            ok &= !is_sparse(&c->heads[i]);
        }
    return ok;
}

uint32_t kvs_cache_pages_bound(const kvs_cache *c)
{
    const uint64_t slots = kvs_cache_slots_max(c);
    const uint64_t pages = (slots + slots / SPARSE_SHARE + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
    return pages < c->n_entries ? (uint32_t)pages : c->n_entries;
}

uint32_t kvs_cache_slots_max(const kvs_cache *c)
{
    const uint64_t slots = (uint64_t)c->n_entries * KVS_PAGE_SLOTS; /* all of them in one head */
    return slots < c->slots_max ? (uint32_t)slots : c->slots_max;
}

kvs_status kvs_cache_append(kvs_cache *c, const int32_t *pos, const int32_t *tokens, const uint8_t *flags, uint32_t n,
                            kvs_error *err)
{
    if (n > kvs_cache_room(c))
        return kvs_error_set(err, KVS_EBUDGET, "%u tokens do not fit: room for %u of budget %llu bytes", n,
                             kvs_cache_room(c), (unsigned long long)c->meter.budget_bytes);
    if (!compact_sparse(c) || !own_tails(c) || !make_room(c, n) || !own_tails(c))
        return kvs_error_set(err, KVS_EBUDGET,
                             "%u tokens do not fit: a fork onto a smaller budget has yet to evict; %u blocks are free",
                             n, kvs_block_n_free(c->store));
    for (uint32_t i = 0; i < c->n_heads; i++)
        append_head(c, &c->heads[i], pos, tokens, flags, n);
    /* Each row meets the slots before it and itself. */
    c->meter.footprint_slots += n * c->n_live_total + (uint64_t)c->n_heads * n * (n + 1) / 2;
    c->n_live_total += (uint64_t)c->n_heads * n;
    kvs_cache_meter_update(c);
    return KVS_OK;
}

/* ---- reading ---- */

uint32_t kvs_cache_n_live(const kvs_cache *c, uint32_t layer, uint32_t head)
{
    return kvs_cache_head(c, layer, head)->n_live;
}

uint32_t kvs_cache_n_pages(const kvs_cache *c, uint32_t layer, uint32_t head)
{
    return kvs_cache_head(c, layer, head)->n_pages;
}

uint32_t kvs_cache_n_physical(const kvs_cache *c, uint32_t layer, uint32_t head)
{
    return kvs_cache_head(c, layer, head)->n_physical;
}

int32_t kvs_cache_next_rope(const kvs_cache *c, uint32_t layer, uint32_t head)
{
    return kvs_cache_head(c, layer, head)->next_rope;
}

uint64_t kvs_cache_backward_bits(const kvs_cache *c, uint32_t layer, uint32_t head)
{
    return kvs_cache_head(c, layer, head)->backward;
}

uint32_t kvs_cache_live_max(const kvs_cache *c)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < c->n_heads; i++)
        most = kvs_max_u32(most, c->heads[i].n_live);
    return most;
}

uint32_t kvs_cache_live_min(const kvs_cache *c)
{
    uint32_t least = UINT32_MAX;
    for (uint32_t i = 0; i < c->n_heads; i++)
        least = kvs_min_u32(least, c->heads[i].n_live);
    return least;
}

uint64_t kvs_cache_live_total(const kvs_cache *c)
{
    return c->n_live_total;
}

uint32_t kvs_cache_pages_max(const kvs_cache *c)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < c->n_heads; i++)
        most = kvs_max_u32(most, c->heads[i].n_pages);
    return most;
}

uint8_t kvs_cache_newest_flags(const kvs_cache *c)
{
    const uint32_t e = c->heads[0].last;
    if (e == KVS_NO_PAGE)
        return 0;
    return (uint8_t)(c->meta[e].token[KVS_PAGE_SLOTS - 1 - (uint32_t)__builtin_clzll(c->pages[e].live)] >> 24);
}

void kvs_cache_views(const kvs_cache *c, uint32_t layer, uint32_t head, kvs_page_view *views,
                     float **side[KVS_SIDE_COUNT])
{
    const kvs_head *h = kvs_cache_head(c, layer, head);
    uint32_t i = 0;
    for (uint32_t e = h->first; e != KVS_NO_PAGE; e = c->pages[e].next, i++) {
        const kvs_page *p = &c->pages[e];
        views[i] = (kvs_page_view){
            .k = kvs_page_keys(c, p),
            .v = kvs_page_values(c, p),
            .live = p->live,
            .rope_pos = c->meta[e].rope_pos,
            .key_rot = c->meta[e].key_rot,
            .rotated = p->rotated,
        };
        for (int s = 0; side != NULL && s < KVS_SIDE_COUNT; s++)
            if (side[s] != NULL)
                side[s][i] = c->side[s] == NULL ? NULL : c->side[s] + (size_t)e * KVS_PAGE_SLOTS;
    }
}

void kvs_cache_locate(kvs_cache *c, uint32_t layer, uint32_t head, uint32_t slot, void **k, void **v, uint32_t *in_page)
{
    const kvs_head *h = kvs_cache_head(c, layer, head);
    const uint32_t page = slot / KVS_PAGE_SLOTS;
    uint32_t e = h->first;
    if (page == h->n_pages - 1)
        e = h->last;
    else
        for (uint32_t i = 0; i < page; i++)
            e = c->pages[e].next;
    *k = kvs_page_keys(c, &c->pages[e]);
    *v = kvs_page_values(c, &c->pages[e]);
    *in_page = slot % KVS_PAGE_SLOTS;
}

/* Copies n neighbouring slots of page e to place `to` of the flat arrays. */
static void read_run(const kvs_cache *c, uint32_t e, uint32_t slot, uint32_t n, const kvs_head_slots *out, uint32_t to)
{
    const kvs_page_meta *m = &c->meta[e];
    const uint32_t *const token = m->token + slot;
    if (out->pos != NULL)
        memcpy(out->pos + to, m->pos + slot, n * sizeof *out->pos);
    if (out->rope_pos != NULL)
        memcpy(out->rope_pos + to, m->rope_pos + slot, n * sizeof *out->rope_pos);
    if (out->key_rot != NULL)
        memcpy(out->key_rot + to, m->key_rot + slot, n * sizeof *out->key_rot);
    int32_t *const restrict id = out->token;
    for (uint32_t i = 0; id != NULL && i < n; i++)
        id[to + i] = (int32_t)(token[i] & 0xffffffu);
    uint8_t *const restrict flags = out->flags;
    for (uint32_t i = 0; flags != NULL && i < n; i++)
        flags[to + i] = (uint8_t)(token[i] >> 24);
    for (int k = 0; k < KVS_SIDE_COUNT; k++)
        if (out->side[k] != NULL && c->side[k] != NULL)
            memcpy(out->side[k] + to, c->side[k] + (size_t)e * KVS_PAGE_SLOTS + slot, n * sizeof(float));
        else if (out->side[k] != NULL)
            memset(out->side[k] + to, 0, n * sizeof(float));
}

uint32_t kvs_cache_read_head(const kvs_cache *c, uint32_t layer, uint32_t head, const kvs_head_slots *out)
{
    const kvs_head *h = kvs_cache_head(c, layer, head);
    uint32_t to = 0;
    for (uint32_t e = h->first; e != KVS_NO_PAGE; e = c->pages[e].next) {
        uint64_t live = c->pages[e].live;
        while (live != 0) {
            const uint32_t slot = (uint32_t)__builtin_ctzll(live), n = kvs_run_of_ones(live >> slot);
            read_run(c, e, slot, n, out, to);
            live &= ~kvs_ones(slot, n);
            to += n;
        }
    }
    return to;
}

void kvs_cache_read_slot(const kvs_cache *c, uint32_t layer, uint32_t head, uint32_t i, float *key, float *value)
{
    const kvs_head *h = kvs_cache_head(c, layer, head);
    for (uint32_t e = h->first; e != KVS_NO_PAGE; e = c->pages[e].next) {
        uint64_t bits = c->pages[e].live;
        const uint32_t n = (uint32_t)__builtin_popcountll(bits);
        if (i >= n) {
            i -= n;
            continue;
        }
        while (i-- > 0)
            bits &= bits - 1;
        kvs_page_read(kvs_page_keys(c, &c->pages[e]), kvs_page_values(c, &c->pages[e]), (uint32_t)__builtin_ctzll(bits),
                      key, value, c->config.head_dim, c->config.kv_f32);
        return;
    }
}

/* Live slots of one page, from the to-th on: keys a tile of 16 slots at a time, transposed, values row by row. */
static uint32_t read_page_kv(const kvs_cache *c, const kvs_kernels *k, uint32_t e, uint32_t to, float *keys,
                             float *values)
{
    float tile[KVS_TILE_SLOTS * KVS_HEAD_DIM_MAX];
    const uint32_t dh = c->config.head_dim;
    const size_t n_tile = (size_t)KVS_TILE_SLOTS * dh, element = c->config.kv_f32 ? sizeof(float) : sizeof(uint16_t);
    const uint8_t *const kp = kvs_page_keys(c, &c->pages[e]), *const vp = kvs_page_values(c, &c->pages[e]);
    for (uint32_t t = 0; t < KVS_PAGE_SLOTS / KVS_TILE_SLOTS; t++) {
        uint64_t bits = c->pages[e].live >> (t * KVS_TILE_SLOTS) & 0xffffu;
        const float *src = (const float *)(const void *)(kp + t * n_tile * element);
        if (keys != NULL && bits != 0 && !c->config.kv_f32) {
            k->f16_to_f32(tile, (const uint16_t *)(const void *)(kp + t * n_tile * element), n_tile);
            src = tile;
        }
        for (; bits != 0; bits &= bits - 1, to++) {
            const uint32_t s = (uint32_t)__builtin_ctzll(bits);
            const uint8_t *const row = vp + ((size_t)t * KVS_TILE_SLOTS + s) * dh * element;
            for (uint32_t d = 0; keys != NULL && d < dh; d++)
                keys[(size_t)to * dh + d] = src[(size_t)d * KVS_TILE_SLOTS + s];
            if (values != NULL && c->config.kv_f32)
                memcpy(values + (size_t)to * dh, row, dh * element);
            else if (values != NULL)
                k->f16_to_f32(values + (size_t)to * dh, (const uint16_t *)(const void *)row, dh);
        }
    }
    return to;
}

void kvs_cache_read_kv(const kvs_cache *c, uint32_t layer, uint32_t head, float *keys, float *values)
{
    const kvs_kernels *const k = kvs_kernels_get(kvs_cpu_masked(0));
    uint32_t to = 0;
    for (uint32_t e = kvs_cache_head(c, layer, head)->first; e != KVS_NO_PAGE; e = c->pages[e].next)
        to = read_page_kv(c, k, e, to, keys, values);
}

/* ---- changing what is held ---- */

/* Gives back pages without live slots; the tail keeps its fill, since the next slot goes behind it. */
static void drop_dead_pages(kvs_cache *c, kvs_head *h)
{
    uint32_t prev = KVS_NO_PAGE;
    for (uint32_t e = h->first; e != KVS_NO_PAGE;) {
        const uint32_t next = c->pages[e].next;
        if (c->pages[e].live != 0) {
            prev = e;
            e = next;
            continue;
        }
        const uint32_t fill = e == h->last ? (h->n_physical - 1) % KVS_PAGE_SLOTS + 1 : KVS_PAGE_SLOTS;
        h->n_physical -= fill;
        h->n_pages--;
        if (prev == KVS_NO_PAGE)
            h->first = next;
        else
            c->pages[prev].next = next;
        if (e == h->last)
            h->last = prev; /* counts as full: the next slot opens a page */
        kvs_cache_entry_drop(c, e);
        e = next;
    }
}

/* The live slots of a page that stay, *i being the live index of its first. */
static uint64_t kept_of_page(uint64_t live, const uint8_t *keep, uint32_t *i)
{
    uint64_t kept = 0;
    if (live == UINT64_MAX) {
        for (uint32_t s = 0; s < KVS_PAGE_SLOTS; s++)
            kept |= (uint64_t)(keep[*i + s] != 0) << s;
        *i += KVS_PAGE_SLOTS;
        return kept;
    }
    for (; live != 0; live &= live - 1, ++*i)
        kept |= keep[*i] != 0 ? live & -live : 0;
    return kept;
}

void kvs_cache_keep(kvs_cache *c, uint32_t layer, uint32_t head, const uint8_t *keep)
{
    kvs_head *h = kvs_cache_head(c, layer, head);
    uint32_t i = 0, kept = 0;
    for (uint32_t e = h->first; e != KVS_NO_PAGE; e = c->pages[e].next) {
        c->pages[e].live = kept_of_page(c->pages[e].live, keep, &i);
        kept += (uint32_t)__builtin_popcountll(c->pages[e].live);
    }
    c->n_live_total -= h->n_live - kept;
    h->n_live = kept;
    drop_dead_pages(c, h);
    if (c->over_taken)
        kvs_head_compact(c, h); /* holes count too on the way down to the budget */
    kvs_cache_meter_update(c);
}

void kvs_cache_hide(kvs_cache *c, uint32_t layer, uint32_t head, const uint8_t *keep)
{
    uint32_t i = 0;
    for (uint32_t e = kvs_cache_head(c, layer, head)->first; e != KVS_NO_PAGE; e = c->pages[e].next) {
        kvs_page *p = &c->pages[e];
        const uint64_t kept = kept_of_page(p->live, keep, &i);
        p->hidden = p->live & ~kept;
        p->live = kept;
    }
}

void kvs_cache_unhide(kvs_cache *c)
{
    for (uint32_t h = 0; h < c->n_heads; h++)
        for (uint32_t e = c->heads[h].first; e != KVS_NO_PAGE; e = c->pages[e].next) {
            c->pages[e].live |= c->pages[e].hidden;
            c->pages[e].hidden = 0;
        }
}

bool kvs_cache_own_kept(kvs_cache *c, uint32_t layer, uint32_t head, const uint8_t *keep)
{
    const kvs_head *h = kvs_cache_head(c, layer, head);
    uint32_t n_kept = 0, i = 0;
    for (uint32_t k = 0; k < h->n_live; k++)
        n_kept += keep[k] != 0;
    uint32_t n_pages = (n_kept + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
    for (uint32_t e = h->first; e != KVS_NO_PAGE && n_pages > 0; e = c->pages[e].next) {
        if (kept_of_page(c->pages[e].live, keep, &i) == 0)
            continue;
        if (!kvs_cache_entry_own(c, e))
            return false;
        n_pages--;
    }
    return true;
}

/* The live slots of page e; keys (or NULL), values and changed are its first slot's. */
static void write_page_kv(const kvs_cache *c, uint32_t e, const float *keys, const float *values,
                          const uint8_t *changed)
{
    const kvs_kernels *const k = kvs_kernels_get(kvs_cpu_masked(0));
    const uint32_t dh = c->config.head_dim;
    const size_t row_bytes = c->config.kv_f32 ? dh * sizeof(float) : dh * sizeof(uint16_t);
    const kvs_page *const p = &c->pages[e];
    size_t at = 0;
    for (uint64_t bits = p->live; bits != 0; bits &= bits - 1, at += dh) {
        const uint32_t slot = (uint32_t)__builtin_ctzll(bits);
        uint8_t *const row = kvs_page_values(c, p) + slot * row_bytes;
        if (*changed++ == 0)
            continue;
        if (keys != NULL)
            kvs_page_write(kvs_page_keys(c, p), kvs_page_values(c, p), slot, keys + at, values + at, dh,
                           c->config.kv_f32);
        else if (c->config.kv_f32)
            memcpy(row, values + at, row_bytes);
        else
            k->f32_to_f16((uint16_t *)(void *)row, values + at, dh);
    }
}

/* Whether page entry e, whose first live slot is changed[0], may be written, or need not be. */
static bool own_changed(kvs_cache *c, uint32_t e, const uint8_t *changed, uint32_t n)
{
    return memchr(changed, 1, n) == NULL || kvs_cache_entry_own(c, e);
}

void kvs_cache_write_kv(kvs_cache *c, uint32_t layer, uint32_t head, const float *keys, const float *values,
                        const uint8_t *changed)
{
    kvs_head *h = kvs_cache_head(c, layer, head);
    uint32_t i = 0;
    bool owned = true;
    for (uint32_t e = h->first, at = 0; e != KVS_NO_PAGE && owned; e = c->pages[e].next) {
        const uint32_t n = (uint32_t)__builtin_popcountll(c->pages[e].live);
        owned = own_changed(c, e, changed + at, n);
        at += n;
    }
    if (!owned) /* moves all slots into the pages that kvs_cache_own_kept made this cache's own */
        kvs_head_compact(c, h);
    for (uint32_t e = h->first; e != KVS_NO_PAGE; e = c->pages[e].next) {
        const size_t at = (size_t)i * c->config.head_dim;
        write_page_kv(c, e, keys == NULL ? NULL : keys + at, values + at, changed + i);
        i += (uint32_t)__builtin_popcountll(c->pages[e].live);
    }
    kvs_cache_meter_update(c);
}

void kvs_cache_set_rope(kvs_cache *c, uint32_t layer, uint32_t head, const int32_t *rope_pos, int32_t next_rope)
{
    kvs_head *h = kvs_cache_head(c, layer, head);
    uint32_t i = 0;
    for (uint32_t e = h->first; e != KVS_NO_PAGE; e = c->pages[e].next) {
        kvs_page_meta *m = &c->meta[e];
        int32_t differ = 0;
        for (uint64_t live = c->pages[e].live; live != 0;) {
            const uint32_t slot = (uint32_t)__builtin_ctzll(live), n = kvs_run_of_ones(live >> slot);
            for (uint32_t s = slot; s < slot + n; s++, i++) {
                m->rope_pos[s] = rope_pos[i];
                differ |= rope_pos[i] ^ m->key_rot[s];
            }
            live &= ~kvs_ones(slot, n);
        }
        c->pages[e].rotated = differ != 0;
    }
    /* What the next token follows is the newest slot held, where it stands now: re-rotation moves both, and only a mode
     * that moves the counter alone steps backward. */
    h->last_rope = i > 0 ? rope_pos[i - 1] : -1;
    h->next_rope = next_rope;
}

/* Undoes n appends in what a head remembers of them. The oldest one undone, said again, must go backward again if it
 * did; beyond 64 that is no longer known, and nothing but an eviction makes it so. */
static void step_back(kvs_head *h, uint32_t n)
{
    if (n == 0)
        return;
    const bool was_backward = n <= 64 && (h->backward >> (n - 1) & 1) != 0;
    h->backward = n < 64 ? h->backward >> n : 0;
    h->next_rope -= (int32_t)n;
    h->last_rope = was_backward ? h->next_rope : h->next_rope - 1;
}

void kvs_cache_truncate(kvs_cache *c, int32_t pos_end)
{
    for (uint32_t i = 0; i < c->n_heads; i++) {
        kvs_head *h = &c->heads[i];
        uint32_t dropped = 0;
        for (uint32_t e = h->first; e != KVS_NO_PAGE; e = c->pages[e].next)
            for (uint64_t bits = c->pages[e].live; bits != 0; bits &= bits - 1) {
                const uint32_t s = (uint32_t)__builtin_ctzll(bits);
                if (c->meta[e].pos[s] >= pos_end) {
                    c->pages[e].live &= ~((uint64_t)1 << s);
                    dropped++;
                }
            }
        h->n_live -= dropped;
        step_back(h, dropped);
        c->n_live_total -= dropped;
        drop_dead_pages(c, h);
        /* Slots behind the last live one are free again. */
        if (h->last != KVS_NO_PAGE)
            h->n_physical = (h->n_pages - 1) * KVS_PAGE_SLOTS + 64 - (uint32_t)__builtin_clzll(c->pages[h->last].live);
    }
    kvs_cache_meter_update(c);
}

void kvs_cache_zero_side(kvs_cache *c, uint32_t which)
{
    if (c->side[which] == NULL)
        return;
    for (uint32_t i = 0; i < c->n_heads; i++)
        for (uint32_t e = c->heads[i].first; e != KVS_NO_PAGE; e = c->pages[e].next)
            memset(c->side[which] + (size_t)e * KVS_PAGE_SLOTS, 0, KVS_PAGE_SLOTS * sizeof(float));
}

void kvs_cache_write_side(kvs_cache *c, uint32_t layer, uint32_t head, uint32_t which, const float *values)
{
    for (uint32_t e = kvs_cache_head(c, layer, head)->first; e != KVS_NO_PAGE; e = c->pages[e].next)
        for (uint64_t bits = c->pages[e].live; bits != 0; bits &= bits - 1)
            c->side[which][(size_t)e * KVS_PAGE_SLOTS + (uint32_t)__builtin_ctzll(bits)] = *values++;
}

bool kvs_cache_is_sparse(const kvs_cache *c, uint32_t layer, uint32_t head)
{
    return is_sparse(kvs_cache_head(c, layer, head));
}

uint32_t kvs_cache_compact(kvs_cache *c, uint32_t layer, uint32_t head)
{
    const uint32_t n = kvs_head_compact(c, kvs_cache_head(c, layer, head));
    kvs_cache_meter_update(c);
    return n;
}

/* ---- the byte meter ---- */

static void raise_peak(uint64_t *peak, uint64_t value)
{
    if (value > *peak)
        *peak = value;
}

void kvs_cache_meter_update(kvs_cache *c)
{
    kvs_cache_meter *m = &c->meter;
    const uint64_t page_bytes = c->block_bytes + c->page_side_bytes;
    m->budget_bytes = c->config.budget_bytes != 0 ? c->config.budget_bytes
                                                  : fixed_bytes_of(&c->config) + (uint64_t)c->page_limit * page_bytes;
    m->budget_tokens = c->config.budget_tokens != 0 ? c->config.budget_tokens
                                                    : kvs_cache_tokens_for_bytes(&c->config, c->config.budget_bytes);
    m->live_bytes = c->n_live_total * 2 * c->config.head_dim * (c->config.kv_f32 ? 4 : 2);
    m->reserved_bytes = (uint64_t)c->n_held * c->block_bytes;
    m->side_bytes = fixed_bytes_of(&c->config) + (uint64_t)c->n_held * c->page_side_bytes;
    c->over_taken = c->over_taken && c->n_held > c->page_limit;
    if (c->over_taken)
        return; /* what is over the budget are still the parent's pages */
    raise_peak(&m->live_bytes_peak, m->live_bytes);
    raise_peak(&m->reserved_bytes_peak, m->reserved_bytes);
    raise_peak(&m->side_bytes_peak, m->side_bytes);
    raise_peak(&m->kv_bytes_peak, m->reserved_bytes + m->side_bytes);
}

void kvs_cache_restart_peaks(kvs_cache *c)
{
    kvs_cache_meter *m = &c->meter;
    m->live_bytes_peak = m->reserved_bytes_peak = m->side_bytes_peak = m->kv_bytes_peak = 0;
    kvs_cache_meter_update(c);
}

const kvs_cache_meter *kvs_cache_meter_now(const kvs_cache *c)
{
    return &c->meter;
}

void kvs_cache_get_meter(const kvs_cache *c, kvs_cache_meter *m)
{
    *m = c->meter;
    m->shared_bytes = 0;
    for (uint32_t i = 0; i < c->n_heads; i++)
        for (uint32_t e = c->heads[i].first; e != KVS_NO_PAGE; e = c->pages[e].next)
            if (kvs_block_is_shared(c->store, &c->pages[e]))
                m->shared_bytes += c->block_bytes;
}

double kvs_cache_backward_rate(const kvs_cache *c)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < c->n_heads; i++)
        n += (uint64_t)__builtin_popcountll(c->heads[i].backward);
    return (double)n / (64.0 * c->n_heads);
}

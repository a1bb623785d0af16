/* Block pools, page entries, copy-on-write and compaction. */
#include "cache/cache_internal.h"

#include <string.h>

/* ---- blocks ---- */

kvs_block_store *kvs_block_store_create(const kvs_allocator *a, size_t block_bytes)
{
    kvs_block_store *s = kvs_alloc(a, 1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->allocator = a;
    s->block_bytes = block_bytes;
    pthread_mutex_init(&s->lock, NULL);
    return s;
}

static void free_pool(kvs_block_pool *p)
{
    kvs_free(p->allocator, p->arena);
    kvs_free(p->allocator, p->refs);
    kvs_free(p->allocator, p->free_list);
    kvs_free(p->allocator, p);
}

/* Frees p if its cache is gone and nobody holds a block of it. Under the lock. */
static void free_if_done(kvs_block_store *s, kvs_block_pool *p)
{
    if (!p->orphan || p->n_free < p->n_blocks)
        return;
    kvs_block_pool **at = &s->pools;
    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
    free_pool(p);
}

kvs_block_pool *kvs_block_store_join(kvs_block_store *s, const kvs_allocator *a, uint32_t n_blocks)
{
    kvs_block_pool *p = kvs_alloc(a, 1, sizeof *p);
    if (p == NULL)
        return NULL;
    p->allocator = a;
    p->n_blocks = p->n_free = n_blocks;
    p->arena = kvs_alloc(a, n_blocks, s->block_bytes);
    p->refs = kvs_alloc(a, n_blocks, sizeof *p->refs);
    p->free_list = kvs_alloc(a, n_blocks, sizeof *p->free_list);
    if (p->arena == NULL || p->refs == NULL || p->free_list == NULL) {
        free_pool(p);
        return NULL;
    }
    for (uint32_t i = 0; i < n_blocks; i++)
        p->free_list[i] = n_blocks - 1 - i; /* low blocks first, so that untouched memory stays untouched */
    pthread_mutex_lock(&s->lock);
    p->next = s->pools;
    s->pools = p;
    s->n_users++;
    pthread_mutex_unlock(&s->lock);
    return p;
}

void kvs_block_store_leave(kvs_block_store *s, kvs_block_pool *pool)
{
    pthread_mutex_lock(&s->lock);
    if (pool != NULL) {
        s->n_users--;
        pool->orphan = true;
        free_if_done(s, pool);
    }
    const bool last = s->n_users == 0;
    pthread_mutex_unlock(&s->lock);
    if (!last)
        return;
    pthread_mutex_destroy(&s->lock);
    kvs_free(s->allocator, s);
}

uint32_t kvs_block_n_free(kvs_block_store *s)
{
    uint64_t n = 0;
    pthread_mutex_lock(&s->lock);
    for (const kvs_block_pool *p = s->pools; p != NULL; p = p->next)
        n += p->n_free;
    pthread_mutex_unlock(&s->lock);
    return n > UINT32_MAX ? UINT32_MAX : (uint32_t)n;
}

/* Under the lock. */
static bool take(kvs_block_store *s, kvs_block_pool *own, kvs_page *page)
{
    kvs_block_pool *p = own;
    if (p->n_free == 0)
        for (p = s->pools; p != NULL && p->n_free == 0;)
            p = p->next;
    if (p == NULL)
        return false;
    page->pool = p;
    page->block = p->free_list[--p->n_free];
    p->refs[page->block] = 1;
    return true;
}

/* Under the lock. */
static void drop(kvs_block_store *s, const kvs_page *p)
{
    if (--p->pool->refs[p->block] == 0) {
        p->pool->free_list[p->pool->n_free++] = p->block;
        free_if_done(s, p->pool);
    }
}

bool kvs_block_take(kvs_block_store *s, kvs_block_pool *own, kvs_page *page)
{
    pthread_mutex_lock(&s->lock);
    const bool ok = take(s, own, page);
    pthread_mutex_unlock(&s->lock);
    return ok;
}

/* Keys, or values. */
static uint8_t *block_half(const kvs_block_store *s, const kvs_page *p, uint32_t half)
{
    return p->pool->arena + ((size_t)half * p->pool->n_blocks + p->block) * (s->block_bytes / 2);
}

/* One step for all others: of two caches that copy a block at once, the second would find no free one where the first
 * has taken the last, and none needed once the first has let go. */
bool kvs_block_own(kvs_block_store *s, kvs_block_pool *own, kvs_page *page, bool *copied)
{
    *copied = false;
    pthread_mutex_lock(&s->lock);
    bool ok = true;
    if (page->pool->refs[page->block] > 1) {
        const kvs_page old = *page;
        *copied = ok = take(s, own, page);
        if (ok) {
            for (uint32_t half = 0; half < 2; half++)
                memcpy(block_half(s, page, half), block_half(s, &old, half), s->block_bytes / 2);
            drop(s, &old);
        }
    }
    pthread_mutex_unlock(&s->lock);
    return ok;
}

void kvs_block_share(kvs_block_store *s, const kvs_page *p)
{
    pthread_mutex_lock(&s->lock);
    p->pool->refs[p->block]++;
    pthread_mutex_unlock(&s->lock);
}

void kvs_block_drop(kvs_block_store *s, const kvs_page *p)
{
    pthread_mutex_lock(&s->lock);
    drop(s, p);
    pthread_mutex_unlock(&s->lock);
}

bool kvs_block_is_shared(kvs_block_store *s, const kvs_page *p)
{
    pthread_mutex_lock(&s->lock);
    const bool shared = p->pool->refs[p->block] > 1;
    pthread_mutex_unlock(&s->lock);
    return shared;
}

/* ---- page entries ---- */

uint32_t kvs_cache_entry_take(kvs_cache *c)
{
    if (c->n_free_entries == 0)
        return KVS_NO_PAGE;
    kvs_page page = {.next = KVS_NO_PAGE};
    if (!kvs_block_take(c->store, c->pool, &page))
        return KVS_NO_PAGE;
    const uint32_t entry = c->free_entries[--c->n_free_entries];
    c->pages[entry] = page;
    for (int s = 0; s < KVS_SIDE_COUNT; s++)
        if (c->side[s] != NULL)
            memset(c->side[s] + (size_t)entry * KVS_PAGE_SLOTS, 0, KVS_PAGE_SLOTS * sizeof(float));
    c->n_held++;
    return entry;
}

void kvs_cache_entry_drop(kvs_cache *c, uint32_t entry)
{
    kvs_block_drop(c->store, &c->pages[entry]);
    c->pages[entry].pool = NULL;
    c->free_entries[c->n_free_entries++] = entry;
    c->n_held--;
}

void kvs_cache_chain_push(kvs_cache *c, kvs_head *h, uint32_t entry)
{
    if (h->last == KVS_NO_PAGE)
        h->first = entry;
    else
        c->pages[h->last].next = entry;
    h->last = entry;
    h->n_pages++;
}

bool kvs_cache_entry_own(kvs_cache *c, uint32_t entry)
{
    bool copied;
    const bool ok = kvs_block_own(c->store, c->pool, &c->pages[entry], &copied);
    c->meter.n_pages_copied += copied;
    return ok;
}

/* ---- compaction ---- */

/* Puts live slots, in ascending order, from the beginning of a page on; the place they go to never overtakes the place
 * they come from. Keys wait until a tile's worth of them is known; the tiles they come from are whole until then, since
 * all before was written from slots before. */
typedef struct packer {
    kvs_cache *c;
    uint32_t page, slot; /* where the next slot goes */
    uint32_t last;       /* page of the latest slot */
    kvs_tile_source sources[KVS_TILE_SLOTS];
    uint32_t n_sources;
} packer;

static void *key_tile(const kvs_cache *c, uint32_t page, uint32_t slot)
{
    return kvs_page_keys(c, &c->pages[page]) + c->half_bytes / KVS_PAGE_SLOTS * (slot / 16 * 16);
}

/* Values and facts of n neighbouring slots. */
static void move_run(kvs_cache *c, uint32_t to, uint32_t to_slot, uint32_t from, uint32_t from_slot, uint32_t n)
{
    const size_t row = c->half_bytes / KVS_PAGE_SLOTS;
    memmove(kvs_page_values(c, &c->pages[to]) + to_slot * row, kvs_page_values(c, &c->pages[from]) + from_slot * row,
            n * row);
    kvs_page_meta *dst = &c->meta[to];
    const kvs_page_meta *src = &c->meta[from];
    for (uint32_t i = 0; i < n; i++) {
        dst->pos[to_slot + i] = src->pos[from_slot + i];
        dst->rope_pos[to_slot + i] = src->rope_pos[from_slot + i];
        dst->key_rot[to_slot + i] = src->key_rot[from_slot + i];
        dst->token[to_slot + i] = src->token[from_slot + i];
    }
    for (int k = 0; k < KVS_SIDE_COUNT; k++)
        if (c->side[k] != NULL)
            memmove(c->side[k] + (size_t)to * KVS_PAGE_SLOTS + to_slot,
                    c->side[k] + (size_t)from * KVS_PAGE_SLOTS + from_slot, n * sizeof(float));
    c->meter.n_slots_moved += n;
}

/* Writes the keys of the tile before `slot`, unless they stand there already. */
static void flush_keys(packer *p)
{
    void *const dst = key_tile(p->c, p->page, p->slot - 1);
    if (p->n_sources != 1 || p->sources[0].tile != dst || (p->sources[0].lanes & (p->sources[0].lanes + 1)) != 0)
        p->c->gather(dst, p->sources, p->n_sources, p->c->config.head_dim, p->c->config.kv_f32);
    p->n_sources = 0;
}

static bool any_rotated(const kvs_page_meta *m, uint32_t n)
{
    int32_t differ = 0;
    for (uint32_t s = 0; s < n; s++)
        differ |= m->rope_pos[s] ^ m->key_rot[s];
    return differ != 0;
}

static void close_page(packer *p)
{
    kvs_page *page = &p->c->pages[p->page];
    page->live = kvs_ones(0, p->slot);
    page->rotated = any_rotated(&p->c->meta[p->page], p->slot);
}

/* The lowest n set bits. */
static uint32_t lowest(uint32_t bits, uint32_t n)
{
    uint32_t rest = bits;
    while (n-- > 0)
        rest &= rest - 1;
    return bits & ~rest;
}

/* Appends lanes of one tile (its first slot is from_slot), at most as many as the tile being filled has room for. */
static void pack_lanes(packer *p, uint32_t from, uint32_t from_slot, uint32_t lanes)
{
    p->sources[p->n_sources++] = (kvs_tile_source){key_tile(p->c, from, from_slot), (uint16_t)lanes};
    while (lanes != 0) {
        const uint32_t first = (uint32_t)__builtin_ctz(lanes), n = kvs_run_of_ones(lanes >> first);
        if (p->page != from || p->slot != from_slot + first)
            move_run(p->c, p->page, p->slot, from, from_slot + first, n);
        lanes &= ~(uint32_t)kvs_ones(first, n);
        p->slot += n;
    }
    p->last = p->page;
    if (p->slot % KVS_TILE_SLOTS == 0)
        flush_keys(p);
    if (p->slot == KVS_PAGE_SLOTS) {
        close_page(p);
        p->page = p->c->pages[p->page].next;
        p->slot = 0;
    }
}

/* The first page that has a hole, or the last; pages before it need no move and stay shared. */
static uint32_t first_with_hole(const kvs_cache *c, const kvs_head *h, uint32_t *index)
{
    uint32_t e = h->first;
    for (*index = 0; e != h->last && c->pages[e].live == UINT64_MAX; ++*index)
        e = c->pages[e].next;
    return e;
}

/* Asks for one tile of a page that will be read soon: pages are too short for the hardware to guess what follows. */
static void ask_for_tile(const kvs_cache *c, uint32_t page, uint32_t slot)
{
    const uint32_t lanes = (uint32_t)(c->pages[page].live >> slot) & 0xffffu;
    if (lanes == 0)
        return;
    const size_t row = c->half_bytes / KVS_PAGE_SLOTS;
    const uint8_t *const keys = key_tile(c, page, slot);
    for (size_t line = 0; line < row * KVS_TILE_SLOTS; line += 64)
        __builtin_prefetch(keys + line);
    const uint8_t *const values = kvs_page_values(c, &c->pages[page]) + slot * row;
    for (uint32_t bits = lanes; bits != 0; bits &= bits - 1)
        for (size_t line = 0; line < row; line += 64)
            __builtin_prefetch(values + (size_t)__builtin_ctz(bits) * row + line);
}

/* Moves the live slots from page `first` on to its front. Returns the last page written. */
static uint32_t move_together(kvs_cache *c, uint32_t first)
{
    packer p = {.c = c, .page = first, .last = first};
    for (uint32_t from = first; from != KVS_NO_PAGE; from = c->pages[from].next) {
        const uint64_t live = c->pages[from].live; /* the page may be closed while it is read */
        const uint32_t next = c->pages[from].next;
        for (uint32_t slot = 0; slot < KVS_PAGE_SLOTS; slot += KVS_TILE_SLOTS) {
            if (next != KVS_NO_PAGE)
                ask_for_tile(c, next, slot);
            for (uint32_t lanes = (uint32_t)(live >> slot) & 0xffffu; lanes != 0;) {
                const uint32_t taken = lowest(lanes, KVS_TILE_SLOTS - p.slot % KVS_TILE_SLOTS);
                pack_lanes(&p, from, slot, taken);
                lanes &= ~taken;
            }
        }
    }
    if (p.slot % KVS_TILE_SLOTS != 0)
        flush_keys(&p);
    if (p.slot != 0)
        close_page(&p);
    return p.last;
}

uint32_t kvs_head_compact(kvs_cache *c, kvs_head *h)
{
    if (h->n_live == h->n_physical)
        return 0;
    uint32_t index;
    const uint32_t first = first_with_hole(c, h, &index);
    const uint32_t n_pages = (h->n_live + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
    for (uint32_t e = first, i = index; i < n_pages; i++, e = c->pages[e].next)
        if (!kvs_cache_entry_own(c, e))
            return 0; /* no block for a copy: stay scattered, which costs room, not correctness */
    h->last = move_together(c, first);
    uint32_t dropped = 0;
    for (uint32_t e = c->pages[h->last].next; e != KVS_NO_PAGE; dropped++) {
        const uint32_t next = c->pages[e].next;
        kvs_cache_entry_drop(c, e);
        e = next;
    }
    c->pages[h->last].next = KVS_NO_PAGE;
    h->n_pages = n_pages;
    h->n_physical = h->n_live;
    c->meter.n_compactions++;
    return dropped;
}

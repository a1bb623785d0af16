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

bool kvs_block_take(kvs_block_store *s, kvs_block_pool *own, kvs_page *page)
{
    pthread_mutex_lock(&s->lock);
    kvs_block_pool *p = own;
    if (p->n_free == 0)
        for (p = s->pools; p != NULL && p->n_free == 0;)
            p = p->next;
    if (p != NULL) {
        page->pool = p;
        page->block = p->free_list[--p->n_free];
        p->refs[page->block] = 1;
    }
    pthread_mutex_unlock(&s->lock);
    return p != NULL;
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
    if (--p->pool->refs[p->block] == 0) {
        p->pool->free_list[p->pool->n_free++] = p->block;
        free_if_done(s, p->pool);
    }
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
    kvs_page *p = &c->pages[entry];
    if (!kvs_block_is_shared(c->store, p))
        return true;
    const kvs_page old = *p;
    if (!kvs_block_take(c->store, c->pool, p))
        return false;
    memcpy(kvs_page_keys(c, p), kvs_page_keys(c, &old), c->block_bytes);
    kvs_block_drop(c->store, &old);
    c->meter.n_pages_copied++;
    return true;
}

/* ---- compaction ---- */

static void move_slot(kvs_cache *c, uint32_t to, uint32_t to_slot, uint32_t from, uint32_t from_slot)
{
    const kvs_page *d = &c->pages[to], *s = &c->pages[from];
    kvs_page_move(kvs_page_keys(c, d), kvs_page_values(c, d), to_slot, kvs_page_keys(c, s), kvs_page_values(c, s),
                  from_slot, c->config.head_dim, c->config.kv_f32);
    kvs_page_meta *dst = &c->meta[to];
    const kvs_page_meta *src = &c->meta[from];
    dst->pos[to_slot] = src->pos[from_slot];
    dst->rope_pos[to_slot] = src->rope_pos[from_slot];
    dst->key_rot[to_slot] = src->key_rot[from_slot];
    dst->token[to_slot] = src->token[from_slot];
    for (int k = 0; k < KVS_SIDE_COUNT; k++)
        if (c->side[k] != NULL)
            c->side[k][(size_t)to * KVS_PAGE_SLOTS + to_slot] = c->side[k][(size_t)from * KVS_PAGE_SLOTS + from_slot];
    c->meter.n_slots_moved++;
}

/* The first page that has a hole, or the last; pages before it need no move and stay shared. */
static uint32_t first_with_hole(const kvs_cache *c, const kvs_head *h, uint32_t *index)
{
    uint32_t e = h->first;
    for (*index = 0; e != h->last && c->pages[e].live == UINT64_MAX; ++*index)
        e = c->pages[e].next;
    return e;
}

/* Moves the live slots from page `first` on to its front; the destination never overtakes the source. Returns the last
 * page written. */
static uint32_t move_together(kvs_cache *c, uint32_t first)
{
    uint32_t to = first, to_slot = 0, last = first;
    bool rotated = false;
    for (uint32_t from = first; from != KVS_NO_PAGE; from = c->pages[from].next) {
        for (uint64_t bits = c->pages[from].live; bits != 0; bits &= bits - 1) {
            const uint32_t slot = (uint32_t)__builtin_ctzll(bits);
            if (to_slot == KVS_PAGE_SLOTS) {
                c->pages[to].live = UINT64_MAX;
                c->pages[to].rotated = rotated;
                to = c->pages[to].next;
                to_slot = 0;
                rotated = false;
            }
            if (to != from || to_slot != slot)
                move_slot(c, to, to_slot, from, slot);
            rotated |= c->meta[to].rope_pos[to_slot] != c->meta[to].key_rot[to_slot];
            to_slot++;
            last = to;
        }
    }
    c->pages[last].live = to_slot == 0 ? 0 : UINT64_MAX >> (KVS_PAGE_SLOTS - to_slot);
    c->pages[last].rotated = rotated;
    return last;
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

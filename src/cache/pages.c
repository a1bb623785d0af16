/* Block pools, page entries, copy-on-write and compaction. */
#include "cache/cache_internal.h"

#include <string.h>

kvs_block_pool *kvs_block_pool_create(const kvs_allocator *a, uint32_t n_blocks, size_t block_bytes)
{
    kvs_block_pool *p = kvs_alloc(a, 1, sizeof *p);
    if (p == NULL)
        return NULL;
    p->allocator = a;
    p->n_users = 1;
    p->n_blocks = p->n_free = n_blocks;
    p->block_bytes = block_bytes;
    p->arena = kvs_alloc(a, n_blocks, block_bytes);
    p->refs = kvs_alloc(a, n_blocks, sizeof *p->refs);
    p->free_list = kvs_alloc(a, n_blocks, sizeof *p->free_list);
    if (p->arena == NULL || p->refs == NULL || p->free_list == NULL) {
        kvs_free(a, p->arena);
        kvs_free(a, p->refs);
        kvs_free(a, p->free_list);
        kvs_free(a, p);
        return NULL;
    }
    pthread_mutex_init(&p->lock, NULL);
    for (uint32_t i = 0; i < n_blocks; i++)
        p->free_list[i] = n_blocks - 1 - i; /* low blocks first, so that untouched memory stays untouched */
    return p;
}

void kvs_block_pool_retain(kvs_block_pool *p)
{
    pthread_mutex_lock(&p->lock);
    p->n_users++;
    pthread_mutex_unlock(&p->lock);
}

void kvs_block_pool_release(kvs_block_pool *p)
{
    pthread_mutex_lock(&p->lock);
    const bool last = --p->n_users == 0;
    pthread_mutex_unlock(&p->lock);
    if (!last)
        return;
    pthread_mutex_destroy(&p->lock);
    kvs_free(p->allocator, p->arena);
    kvs_free(p->allocator, p->refs);
    kvs_free(p->allocator, p->free_list);
    kvs_free(p->allocator, p);
}

uint32_t kvs_block_take(kvs_block_pool *p)
{
    uint32_t block = KVS_NO_PAGE;
    pthread_mutex_lock(&p->lock);
    if (p->n_free > 0) {
        block = p->free_list[--p->n_free];
        p->refs[block] = 1;
    }
    pthread_mutex_unlock(&p->lock);
    return block;
}

void kvs_block_share(kvs_block_pool *p, uint32_t block)
{
    pthread_mutex_lock(&p->lock);
    p->refs[block]++;
    pthread_mutex_unlock(&p->lock);
}

void kvs_block_drop(kvs_block_pool *p, uint32_t block)
{
    pthread_mutex_lock(&p->lock);
    if (--p->refs[block] == 0)
        p->free_list[p->n_free++] = block;
    pthread_mutex_unlock(&p->lock);
}

bool kvs_block_is_shared(kvs_block_pool *p, uint32_t block)
{
    pthread_mutex_lock(&p->lock);
    const bool shared = p->refs[block] > 1;
    pthread_mutex_unlock(&p->lock);
    return shared;
}

uint32_t kvs_cache_entry_take(kvs_cache *c)
{
    if (c->n_free_entries == 0)
        return KVS_NO_PAGE;
    const uint32_t block = kvs_block_take(c->pool);
    if (block == KVS_NO_PAGE)
        return KVS_NO_PAGE;
    const uint32_t entry = c->free_entries[--c->n_free_entries];
    c->pages[entry] = (kvs_page){.pool = c->pool, .block = block, .next = KVS_NO_PAGE};
    for (int s = 0; s < KVS_SIDE_COUNT; s++)
        if (c->side[s] != NULL)
            memset(c->side[s] + (size_t)entry * KVS_PAGE_SLOTS, 0, KVS_PAGE_SLOTS * sizeof(float));
    c->n_held++;
    return entry;
}

void kvs_cache_entry_drop(kvs_cache *c, uint32_t entry)
{
    kvs_block_drop(c->pages[entry].pool, c->pages[entry].block);
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
    if (p->pool == c->pool && !kvs_block_is_shared(p->pool, p->block))
        return true;
    const uint32_t block = kvs_block_take(c->pool);
    if (block == KVS_NO_PAGE)
        return false;
    memcpy(c->pool->arena + (size_t)block * c->block_bytes, kvs_page_keys(c, p), c->block_bytes);
    kvs_block_drop(p->pool, p->block);
    p->pool = c->pool;
    p->block = block;
    c->meter.n_pages_copied++;
    return true;
}

/* Where compaction writes: entry `page` of the chain, filled up to `slot`. */
typedef struct compactor {
    uint32_t entry, slot;
    uint8_t *keys, *values; /* its writable block */
} compactor;

static void move_slot(kvs_cache *c, const compactor *to, const uint8_t *k_src, const uint8_t *v_src, uint32_t from,
                      uint32_t slot)
{
    kvs_page_move(to->keys, to->values, to->slot, k_src, v_src, slot, c->config.head_dim, c->config.kv_f32);
    kvs_page_meta *dst = &c->meta[to->entry];
    const kvs_page_meta *src = &c->meta[from];
    dst->pos[to->slot] = src->pos[slot];
    dst->rope_pos[to->slot] = src->rope_pos[slot];
    dst->key_rot[to->slot] = src->key_rot[slot];
    dst->token[to->slot] = src->token[slot];
    for (int s = 0; s < KVS_SIDE_COUNT; s++)
        if (c->side[s] != NULL)
            c->side[s][(size_t)to->entry * KVS_PAGE_SLOTS + to->slot] =
                c->side[s][(size_t)from * KVS_PAGE_SLOTS + slot];
    c->meter.n_slots_moved++;
}

/* The first page that has a hole before its own or the chain's end; pages before it need no move and stay shared. */
static uint32_t first_with_hole(const kvs_cache *c, const kvs_head *h)
{
    for (uint32_t e = h->first; e != KVS_NO_PAGE; e = c->pages[e].next)
        if (c->pages[e].live != UINT64_MAX && e != h->last)
            return e;
    return h->last;
}

static bool can_own_from(const kvs_cache *c, uint32_t entry)
{
    uint32_t n_shared = 0;
    for (uint32_t e = entry; e != KVS_NO_PAGE; e = c->pages[e].next)
        n_shared += c->pages[e].pool != c->pool || kvs_block_is_shared(c->pages[e].pool, c->pages[e].block);
    return n_shared <= c->pool->n_free;
}

uint32_t kvs_head_compact(kvs_cache *c, kvs_head *h)
{
    if (h->n_live == h->n_physical || h->n_pages == 0)
        return 0;
    uint32_t src = first_with_hole(c, h);
    if (!can_own_from(c, src))
        return 0; /* a fork holds the blocks this would need: stay scattered, which costs room, not correctness */
    compactor to = {.entry = src};
    const uint8_t *k_src = NULL, *v_src = NULL;
    uint64_t pending_live = 0; /* of the destination page: its mask is set once it is full */
    bool rotated = false;
    kvs_block_pool *old_pool = NULL;
    uint32_t old_block = KVS_NO_PAGE;
    uint32_t kept = 0;
    for (uint32_t e = h->first; e != src; e = c->pages[e].next)
        kept += KVS_PAGE_SLOTS;
    for (; src != KVS_NO_PAGE; src = c->pages[src].next) {
        const uint64_t live = c->pages[src].live;
        const bool src_rotated = c->pages[src].rotated;
        k_src = kvs_page_keys(c, &c->pages[src]);
        v_src = kvs_page_values(c, &c->pages[src]);
        for (uint64_t bits = live; bits != 0; bits &= bits - 1) {
            const uint32_t slot = (uint32_t)__builtin_ctzll(bits);
            if (to.slot == 0) { /* open the destination page */
                kvs_page *d = &c->pages[to.entry];
                if (d->pool != c->pool || kvs_block_is_shared(d->pool, d->block)) {
                    /* A shared block is left to its other holders; the source may still be this very page. */
                    old_pool = d->pool;
                    old_block = d->block;
                    d->block = kvs_block_take(c->pool);
                    d->pool = c->pool;
                }
                to.keys = kvs_page_keys(c, d);
                to.values = kvs_page_values(c, d);
                pending_live = 0;
                rotated = false;
            }
            if (to.entry != src || to.slot != slot || to.keys != k_src)
                move_slot(c, &to, k_src, v_src, src, slot);
            pending_live |= (uint64_t)1 << to.slot;
            rotated |= src_rotated;
            if (++to.slot == KVS_PAGE_SLOTS) {
                c->pages[to.entry].live = pending_live;
                c->pages[to.entry].rotated = rotated;
                if (old_pool != NULL && to.entry != src) {
                    kvs_block_drop(old_pool, old_block);
                    old_pool = NULL;
                }
                kept += KVS_PAGE_SLOTS;
                to.entry = c->pages[to.entry].next;
                to.slot = 0;
            }
        }
        if (old_pool != NULL) {
            kvs_block_drop(old_pool, old_block);
            old_pool = NULL;
        }
    }
    if (to.slot > 0) {
        c->pages[to.entry].live = pending_live;
        c->pages[to.entry].rotated = rotated;
        kept += to.slot;
    }
    /* Cut the chain behind the last page written. */
    uint32_t n_pages = (kept + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS, walk = h->first, prev = KVS_NO_PAGE;
    for (uint32_t i = 0; i < n_pages; i++) {
        prev = walk;
        walk = c->pages[walk].next;
    }
    uint32_t dropped = 0;
    while (walk != KVS_NO_PAGE) {
        const uint32_t next = c->pages[walk].next;
        kvs_cache_entry_drop(c, walk);
        dropped++;
        walk = next;
    }
    if (prev == KVS_NO_PAGE)
        h->first = KVS_NO_PAGE;
    else
        c->pages[prev].next = KVS_NO_PAGE;
    h->last = prev;
    h->n_pages = n_pages;
    h->n_physical = kept;
    c->meter.n_compactions++;
    return dropped;
}

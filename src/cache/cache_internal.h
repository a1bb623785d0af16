/* What cache.c, pages.c and snapshot.c share. */
#ifndef KVS_CACHE_INTERNAL_H
#define KVS_CACHE_INTERNAL_H

#include "cache/cache.h"
#include "kernels/page_gather.h"

#include <pthread.h>

#define KVS_NO_PAGE UINT32_MAX

/* The blocks one cache brought: as many as its budget allows. Guarded by the store's lock. */
typedef struct kvs_block_pool {
    struct kvs_block_pool *next;
    const kvs_allocator *allocator;
    bool orphan; /* its cache is gone: freed with its last block */
    uint32_t n_blocks, n_free;
    uint8_t *arena;      /* keys of all blocks, then values of all: neighbours of a head are read in a stream */
    uint32_t *refs;      /* [n_blocks] */
    uint32_t *free_list; /* [n_blocks] */
} kvs_block_pool;

/* Key/value blocks of a cache and all its forks. A cache draws from its own pool first, then from any other of the
 * family: each holds at most as many blocks as it brought, so none is ever short because a fork still reads blocks
 * that it evicted. (Only a fork onto a smaller budget that has not evicted yet holds more than it brought.) */
typedef struct kvs_block_store {
    const kvs_allocator *allocator;
    pthread_mutex_t lock; /* forks may run on other threads */
    uint32_t n_users;     /* caches */
    size_t block_bytes;
    kvs_block_pool *pools;
} kvs_block_store;

struct kvs_page;
kvs_block_store *kvs_block_store_create(const kvs_allocator *a, size_t block_bytes);
/* A new cache of the family with a pool of its own; NULL when there is no memory. */
kvs_block_pool *kvs_block_store_join(kvs_block_store *s, const kvs_allocator *a, uint32_t n_blocks);
/* The cache that owns `pool` (NULL: it never got one) is gone; the last one frees the store. */
void kvs_block_store_leave(kvs_block_store *s, kvs_block_pool *pool);
uint32_t kvs_block_n_free(kvs_block_store *s);
/* Sets pool and block of p; false when none is free. */
bool kvs_block_take(kvs_block_store *s, kvs_block_pool *own, struct kvs_page *p);
/* Gives p a block of its own, with the same content, where it shares one; false when none is free. */
bool kvs_block_own(kvs_block_store *s, kvs_block_pool *own, struct kvs_page *p, bool *copied);
void kvs_block_share(kvs_block_store *s, const struct kvs_page *p);
void kvs_block_drop(kvs_block_store *s, const struct kvs_page *p);
bool kvs_block_is_shared(kvs_block_store *s, const struct kvs_page *p);

/* Per-slot facts of one page, the session's own. */
typedef struct kvs_page_meta {
    int32_t pos[KVS_PAGE_SLOTS], rope_pos[KVS_PAGE_SLOTS], key_rot[KVS_PAGE_SLOTS];
    uint32_t token[KVS_PAGE_SLOTS]; /* id in the low 24 bits, KVS_TOKEN_* above */
} kvs_page_meta;

typedef struct kvs_page {
    kvs_block_pool *pool;
    uint64_t live, hidden; /* hidden: live ones that kvs_cache_hide took out for a while */
    uint32_t block, next;
    bool rotated;
} kvs_page;

typedef struct kvs_head {
    uint32_t first, last; /* page chain; KVS_NO_PAGE when empty */
    uint32_t n_pages, n_live;
    uint32_t n_physical; /* slots in use, dead ones included */
    int32_t next_rope, last_rope;
    uint64_t backward; /* bit i: the i-th newest append did not step forward */
} kvs_head;

struct kvs_cache {
    kvs_cache_config config;
    const kvs_allocator *allocator;
    kvs_tile_gather_fn gather;
    uint32_t n_heads; /* n_layers * n_kv_heads */
    size_t block_bytes, half_bytes, page_side_bytes;
    uint32_t page_limit; /* pages the budget allows */
    uint32_t slot_cap;   /* live slots per head when the budget was given in tokens, else UINT32_MAX */
    uint32_t slots_max;  /* likewise, from the config */
    uint32_t n_entries;  /* length of pages[]: page_limit, or what a fork took over */
    uint32_t n_held;
    kvs_page *pages;             /* [n_entries] */
    kvs_page_meta *meta;         /* [n_entries] */
    float *side[KVS_SIDE_COUNT]; /* [n_entries][64] each, or NULL */
    uint32_t *free_entries;
    uint32_t n_free_entries;
    kvs_head *heads;        /* [n_layers][n_kv_heads] */
    kvs_block_store *store; /* shared with forks */
    kvs_block_pool *pool;   /* own */
    bool over_taken;        /* a fork that took over more than its own budget and has yet to evict */
    uint64_t n_live_total;
    kvs_cache_meter meter;
};

static inline kvs_head *kvs_cache_head(const kvs_cache *c, uint32_t layer, uint32_t head)
{
    return &c->heads[(size_t)layer * c->config.n_kv_heads + head];
}
static inline uint8_t *kvs_page_keys(const kvs_cache *c, const kvs_page *p)
{
    return p->pool->arena + (size_t)p->block * c->half_bytes;
}
static inline uint8_t *kvs_page_values(const kvs_cache *c, const kvs_page *p)
{
    return p->pool->arena + ((size_t)p->pool->n_blocks + p->block) * c->half_bytes;
}

/* Live masks are walked by runs of neighbours. */
static inline uint32_t kvs_run_of_ones(uint64_t bits) /* from bit 0 on */
{
    return ~bits == 0 ? KVS_PAGE_SLOTS : (uint32_t)__builtin_ctzll(~bits);
}
static inline uint64_t kvs_ones(uint32_t first, uint32_t n) /* 1 <= n, first + n <= 64 */
{
    return UINT64_MAX >> (-n % KVS_PAGE_SLOTS) << first % KVS_PAGE_SLOTS;
}

/* pages.c */
uint32_t kvs_cache_entry_take(kvs_cache *c); /* entry with a fresh block, or KVS_NO_PAGE */
void kvs_cache_entry_drop(kvs_cache *c, uint32_t entry);
void kvs_cache_chain_push(kvs_cache *c, kvs_head *h, uint32_t entry);
bool kvs_cache_entry_own(kvs_cache *c, uint32_t entry); /* copies a shared block so that it may be written */
uint32_t kvs_head_compact(kvs_cache *c, kvs_head *h);
void kvs_cache_meter_update(kvs_cache *c);

#endif

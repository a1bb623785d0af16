/* A cache of plain arrays beside the real one: what is appended and kept is done in both, and they must hold the same slots
 * within the budget. Prints the seed on failure. Everything static. */
#ifndef KVS_NAIVE_CACHE_H
#define KVS_NAIVE_CACHE_H

#include "cache/cache.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { DIM_MAX = 8, HEADS_MAX = 8, LINES_MAX = 1024 };

typedef struct line {
    int32_t pos, rope_pos, key_rot, token;
    uint8_t flags;
    float side[KVS_SIDE_COUNT];
} line;

typedef struct naive_head {
    line lines[LINES_MAX];
    uint32_t n;
    int32_t next_rope;
} naive_head;

typedef struct naive {
    kvs_cache *cache;
    kvs_cache_config config;
    naive_head heads[HEADS_MAX];
    uint32_t n_heads;
    uint64_t page_bytes, page_limit, fixed_bytes, footprint;
    int32_t next_pos;
    bool over; /* took over more than its budget from its parent and has not evicted down to it yet */
    kvs_rng *rng;
    const char *op;
    uint64_t seed, n_ops;
} naive;

#define CHECK(n, condition)                                                                                            \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            fail_msg("%s:%d: %s; op %llu '%s' of seed %llu", __FILE__, __LINE__, #condition,                           \
                     (unsigned long long)(n)->n_ops, (n)->op, (unsigned long long)(n)->seed);                          \
    } while (0)

/* ---- content: exact in f16, different for every (token, pos, head, dim) ---- */

static float content(const line *l, uint32_t head, uint32_t d, bool value)
{
    const uint64_t h = kvs_hash3((uint64_t)(uint32_t)l->token, (uint64_t)l->pos << 8 | head, d * 2 + value);
    return (float)((int)(h % 2001) - 1000) / 8.0f;
}

static void write_rows(naive *n, uint32_t n_rows)
{
    const uint32_t dh = n->config.head_dim, per_layer = n->config.n_kv_heads;
    float key[DIM_MAX], value[DIM_MAX];
    for (uint32_t h = 0; h < n->n_heads; h++) {
        const uint32_t physical = kvs_cache_n_physical(n->cache, h / per_layer, h % per_layer);
        for (uint32_t r = 0; r < n_rows; r++) {
            const line *l = &n->heads[h].lines[n->heads[h].n - n_rows + r];
            for (uint32_t d = 0; d < dh; d++) {
                key[d] = content(l, h, d, false);
                value[d] = content(l, h, d, true);
            }
            void *k, *v;
            uint32_t slot;
            kvs_cache_locate(n->cache, h / per_layer, h % per_layer, physical - n_rows + r, &k, &v, &slot);
            kvs_page_write(k, v, slot, key, value, dh, n->config.kv_f32);
        }
    }
}

/* ---- comparing ---- */

static void compare_views(const naive *n, uint32_t h)
{
    const naive_head *want = &n->heads[h];
    const uint32_t layer = h / n->config.n_kv_heads, head = h % n->config.n_kv_heads, dh = n->config.head_dim;
    static _Thread_local kvs_page_view views[LINES_MAX];
    static _Thread_local float *sides[KVS_SIDE_COUNT][LINES_MAX];
    float **side[KVS_SIDE_COUNT] = {sides[0], sides[1], sides[2], sides[3]};
    const uint32_t n_pages = kvs_cache_n_pages(n->cache, layer, head);
    CHECK(n, n_pages <= LINES_MAX);
    kvs_cache_views(n->cache, layer, head, views, side);
    uint32_t i = 0;
    for (uint32_t p = 0; p < n_pages; p++) {
        bool rotated = false;
        CHECK(n, views[p].live != 0);
        for (uint64_t bits = views[p].live; bits != 0; bits &= bits - 1, i++) {
            const uint32_t s = (uint32_t)__builtin_ctzll(bits);
            float key[DIM_MAX], value[DIM_MAX];
            CHECK(n, i < want->n);
            const line *l = &want->lines[i];
            CHECK(n, views[p].rope_pos[s] == l->rope_pos && views[p].key_rot[s] == l->key_rot);
            rotated |= l->rope_pos != l->key_rot;
            kvs_page_read(views[p].k, views[p].v, s, key, value, dh, n->config.kv_f32);
            for (uint32_t d = 0; d < dh; d++)
                CHECK(n, key[d] == content(l, h, d, false) && value[d] == content(l, h, d, true));
            for (int k = 0; k < KVS_SIDE_COUNT; k++) {
                CHECK(n, (sides[k][p] != NULL) == ((n->config.side_mask >> k & 1) != 0));
                CHECK(n, sides[k][p] == NULL || sides[k][p][s] == l->side[k]);
            }
        }
        CHECK(n, views[p].rotated || !rotated);
    }
    CHECK(n, i == want->n);
}

static void compare_head(const naive *n, uint32_t h)
{
    const naive_head *want = &n->heads[h];
    const uint32_t layer = h / n->config.n_kv_heads, head = h % n->config.n_kv_heads, dh = n->config.head_dim;
    static _Thread_local int32_t pos[LINES_MAX], rope[LINES_MAX], rot[LINES_MAX], token[LINES_MAX];
    static _Thread_local uint8_t flags[LINES_MAX];
    const kvs_head_slots out = {.pos = pos, .rope_pos = rope, .key_rot = rot, .token = token, .flags = flags};
    CHECK(n, kvs_cache_n_live(n->cache, layer, head) == want->n);
    CHECK(n, kvs_cache_next_rope(n->cache, layer, head) == want->next_rope);
    CHECK(n, kvs_cache_read_head(n->cache, layer, head, &out) == want->n);
    for (uint32_t i = 0; i < want->n; i++) {
        const line *l = &want->lines[i];
        CHECK(n, pos[i] == l->pos && rope[i] == l->rope_pos && rot[i] == l->key_rot && token[i] == l->token);
        CHECK(n, flags[i] == l->flags);
    }
    compare_views(n, h);
    if (want->n > 0) {
        const uint32_t i = kvs_rng_below(n->rng, want->n);
        float key[DIM_MAX], value[DIM_MAX];
        kvs_cache_read_slot(n->cache, layer, head, i, key, value);
        for (uint32_t d = 0; d < dh; d++)
            CHECK(n,
                  key[d] == content(&want->lines[i], h, d, false) && value[d] == content(&want->lines[i], h, d, true));
    }
}

static void compare(const naive *n)
{
    for (uint32_t h = 0; h < n->n_heads; h++)
        compare_head(n, h);
}

static void check_budget(naive *n)
{
    kvs_cache_meter m;
    kvs_cache_get_meter(n->cache, &m);
    const uint64_t element = n->config.kv_f32 ? 4 : 2;
    uint64_t live = 0, dense = 0;
    uint32_t most = 0, least = UINT32_MAX;
    for (uint32_t h = 0; h < n->n_heads; h++) {
        live += n->heads[h].n;
        dense += (n->heads[h].n + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
        most = kvs_max_u32(most, n->heads[h].n);
        least = kvs_min_u32(least, n->heads[h].n);
    }
    const uint64_t held = m.reserved_bytes + m.side_bytes;
    n->over = n->over && held > m.budget_bytes;
    CHECK(n, n->over || held <= m.budget_bytes);
    CHECK(n, m.kv_bytes_peak <= m.budget_bytes && (n->over || m.kv_bytes_peak >= held));
    CHECK(n, n->config.budget_bytes == 0 || m.budget_bytes == n->config.budget_bytes);
    CHECK(n, held >= n->fixed_bytes + dense * n->page_bytes && (held - n->fixed_bytes) % n->page_bytes == 0);
    if (strcmp(n->op, "fork") != 0) /* onto a smaller budget: evicts next */
        CHECK(n, n->over || n->config.budget_tokens == 0 || most <= n->config.budget_tokens);
    CHECK(n, m.live_bytes == live * 2 * n->config.head_dim * element && kvs_cache_live_total(n->cache) == live);
    CHECK(n, m.shared_bytes <= m.reserved_bytes && m.live_bytes <= m.reserved_bytes);
    CHECK(n, kvs_cache_live_max(n->cache) == most && kvs_cache_live_min(n->cache) == least);
    CHECK(n, m.footprint_slots == n->footprint);
}

/* ---- both at once ---- */

static void do_append(naive *n, uint32_t n_rows)
{
    int32_t pos[LINES_MAX], tokens[LINES_MAX];
    uint8_t flags[LINES_MAX];
    const bool flagged = kvs_rng_below(n->rng, 4) != 0;
    n->next_pos += (int32_t)kvs_rng_below(n->rng, 3) / 2; /* positions may skip */
    for (uint32_t i = 0; i < n_rows; i++) {
        pos[i] = n->next_pos++;
        tokens[i] = (int32_t)(kvs_rng_next(n->rng) & 0xffffff);
        flags[i] = flagged ? (uint8_t)kvs_rng_next(n->rng) : 0;
    }
    CHECK(n, kvs_cache_append(n->cache, pos, tokens, flagged ? flags : NULL, n_rows, NULL) == KVS_OK);
    for (uint32_t h = 0; h < n->n_heads; h++) {
        naive_head *head = &n->heads[h];
        for (uint32_t i = 0; i < n_rows; i++) {
            CHECK(n, head->n < LINES_MAX);
            head->lines[head->n++] = (line){.pos = pos[i],
                                            .rope_pos = head->next_rope,
                                            .key_rot = head->next_rope,
                                            .token = tokens[i],
                                            .flags = flags[i]};
            head->next_rope++;
            n->footprint += head->n;
        }
        const uint32_t n_pages = kvs_cache_n_pages(n->cache, h / n->config.n_kv_heads, h % n->config.n_kv_heads);
        CHECK(n, n_pages <= kvs_cache_pages_bound(n->cache)); /* scratch is sized by it */
    }
    write_rows(n, n_rows);
}

static void op_keep(naive *n)
{
    n->op = "keep";
    uint8_t keep[LINES_MAX];
    for (uint32_t h = 0; h < n->n_heads; h++) {
        naive_head *head = &n->heads[h];
        const uint32_t kind = kvs_rng_below(n->rng, 10), at = kvs_rng_below(n->rng, head->n + 1);
        const uint32_t share = 1 + kvs_rng_below(n->rng, 16);
        uint32_t kept = 0;
        for (uint32_t i = 0; i < head->n; i++) {
            keep[i] = kind < 4   ? 1
                      : kind < 6 ? kvs_rng_below(n->rng, 16) < share
                      : kind < 7 ? i >= at
                      : kind < 8 ? i < at
                      : kind < 9 ? i == at
                                 : 0;
            if (keep[i])
                head->lines[kept++] = head->lines[i];
        }
        head->n = kept;
        kvs_cache_keep(n->cache, h / n->config.n_kv_heads, h % n->config.n_kv_heads, keep);
    }
}

static void describe(naive *n)
{
    n->n_heads = n->config.n_layers * n->config.n_kv_heads;
    n->page_bytes =
        (kvs_cache_bytes_for_tokens(&n->config, 128) - kvs_cache_bytes_for_tokens(&n->config, 64)) / n->n_heads;
    n->fixed_bytes = kvs_cache_bytes_for_tokens(&n->config, 64) - n->n_heads * n->page_bytes;
    n->page_limit = n->config.budget_bytes != 0
                        ? (n->config.budget_bytes - n->fixed_bytes) / n->page_bytes
                        : n->n_heads * ((n->config.budget_tokens + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS);
}

static naive *naive_create(const kvs_cache_config *config, kvs_rng *rng, uint64_t seed)
{
    naive *n = calloc(1, sizeof *n);
    assert_non_null(n);
    n->config = *config;
    n->rng = rng;
    n->seed = seed;
    n->op = "create";
    describe(n);
    CHECK(n, kvs_cache_create(config, &n->cache, NULL) == KVS_OK);
    check_budget(n);
    return n;
}

static void naive_free(naive *n)
{
    kvs_cache_free(&n->cache);
    assert_null(n->cache);
    free(n);
}

static const kvs_cache_config shapes[] = {
    {.n_layers = 2, .n_kv_heads = 3, .head_dim = 4, .side_mask = 7, .budget_tokens = 200},
    {.n_layers = 1, .n_kv_heads = 1, .head_dim = 8, .kv_f32 = true, .budget_tokens = 130},
    {.n_layers = 3, .n_kv_heads = 2, .head_dim = 6, .side_mask = 1, .budget_bytes = 40000},
    {.n_layers = 3, .n_kv_heads = 2, .head_dim = 6, .side_mask = 4, .budget_bytes = 90000, .slots_max = 150},
    {.n_layers = 1, .n_kv_heads = 2, .head_dim = 4, .kv_f32 = true, .side_mask = 5, .budget_bytes = 30001},
    {.n_layers = 4, .n_kv_heads = 1, .head_dim = 5, .side_mask = 2, .budget_tokens = 64},
    {.n_layers = 1, .n_kv_heads = 4, .head_dim = 4, .budget_tokens = 1},
};

#endif

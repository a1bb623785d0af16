/* The cache against a naive one: the same random operations on pages and on plain arrays must hold the same slots, and
 * no operation may pass the budget. Also forks, allocation failures and damaged snapshots. Prints the seed on failure. */
#include "cache/cache.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { DIM_MAX = 8, HEADS_MAX = 8, LINES_MAX = 1024, FAMILY_MAX = 4, N_OPS = 1000000, COMPARE_EVERY = 48 };

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

/* Does the budget hold n more slots in every head, holes aside? Straight from the definition. */
static bool fits(const naive *n, uint32_t n_more)
{
    uint64_t pages = 0;
    for (uint32_t h = 0; h < n->n_heads; h++) {
        if (n->config.budget_tokens != 0 && n->heads[h].n + n_more > n->config.budget_tokens)
            return false;
        if (n->config.slots_max != 0 && n->heads[h].n + n_more > n->config.slots_max)
            return false;
        pages += (n->heads[h].n + n_more + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
    }
    return pages <= n->page_limit;
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

/* ---- operations ---- */

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

static void check_room(naive *n)
{
    const uint32_t room = kvs_cache_room(n->cache);
    CHECK(n, room == 0 || fits(n, room));
    CHECK(n, !fits(n, room + 1));
}

static void op_append(naive *n)
{
    n->op = "append";
    const uint32_t room = kvs_cache_room(n->cache), kind = kvs_rng_below(n->rng, 16);
    if (kind == 0) {
        n->op = "append past room";
        static _Thread_local int32_t pos[LINES_MAX * 8], tokens[LINES_MAX * 8];
        const uint32_t n_rows = kvs_min_u32(room + 1 + kvs_rng_below(n->rng, 3), LINES_MAX * 8);
        for (uint32_t i = 0; i < n_rows; i++)
            pos[i] = n->next_pos + (int32_t)i;
        kvs_error err = {0};
        CHECK(n, kvs_cache_append(n->cache, pos, tokens, NULL, n_rows, &err) == KVS_EBUDGET);
        CHECK(n, err.status == KVS_EBUDGET && strstr(err.message, "tokens") != NULL);
        return;
    }
    check_room(n);
    if (room > 0)
        do_append(n, kind == 1 ? room : 1 + kvs_rng_below(n->rng, kvs_min_u32(room, kind < 6 ? 64 : 6)));
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

static void op_truncate(naive *n)
{
    n->op = "truncate";
    const int32_t end = n->next_pos - (int32_t)kvs_rng_below(n->rng, kvs_rng_below(n->rng, 8) == 0 ? 200 : 12);
    kvs_cache_truncate(n->cache, end);
    for (uint32_t h = 0; h < n->n_heads; h++)
        while (n->heads[h].n > 0 && n->heads[h].lines[n->heads[h].n - 1].pos >= end) {
            n->heads[h].n--;
            n->heads[h].next_rope--;
        }
}

static void op_set_rope(naive *n)
{
    n->op = "set_rope";
    const uint32_t h = kvs_rng_below(n->rng, n->n_heads);
    naive_head *head = &n->heads[h];
    int32_t rope[LINES_MAX];
    const bool same = kvs_rng_below(n->rng, 4) == 0;
    for (uint32_t i = 0; i < head->n; i++)
        head->lines[i].rope_pos = rope[i] = same ? head->lines[i].key_rot : (int32_t)kvs_rng_below(n->rng, 1000);
    head->next_rope = (int32_t)kvs_rng_below(n->rng, 1000);
    kvs_cache_set_rope(n->cache, h / n->config.n_kv_heads, h % n->config.n_kv_heads, rope, head->next_rope);
}

static void op_side(naive *n)
{
    n->op = "side";
    const uint32_t h = kvs_rng_below(n->rng, n->n_heads), which = kvs_rng_below(n->rng, KVS_SIDE_COUNT);
    if (kvs_rng_below(n->rng, 8) == 0) {
        kvs_cache_zero_side(n->cache, which);
        for (uint32_t i = 0; i < n->n_heads; i++)
            for (uint32_t k = 0; k < n->heads[i].n; k++)
                n->heads[i].lines[k].side[which] = 0;
        return;
    }
    if ((n->config.side_mask >> which & 1) == 0)
        return;
    kvs_page_view views[64];
    float *pages[64], **side[KVS_SIDE_COUNT] = {NULL};
    side[which] = pages;
    const uint32_t layer = h / n->config.n_kv_heads, head = h % n->config.n_kv_heads;
    const uint32_t n_pages = kvs_cache_n_pages(n->cache, layer, head);
    CHECK(n, n_pages <= 64);
    kvs_cache_views(n->cache, layer, head, views, side);
    uint32_t i = 0;
    for (uint32_t p = 0; p < n_pages; p++)
        for (uint64_t bits = views[p].live; bits != 0; bits &= bits - 1, i++)
            pages[p][__builtin_ctzll(bits)] = n->heads[h].lines[i].side[which] = (float)(kvs_rng_next(n->rng) & 0xffff);
}

static void op_compact(naive *n)
{
    n->op = "compact";
    kvs_cache_meter before, after;
    kvs_cache_get_meter(n->cache, &before);
    const uint32_t h = kvs_rng_below(n->rng, n->n_heads);
    const uint32_t layer = h / n->config.n_kv_heads, head = h % n->config.n_kv_heads;
    const uint32_t freed = kvs_cache_compact(n->cache, layer, head);
    kvs_cache_get_meter(n->cache, &after);
    CHECK(n, kvs_cache_n_physical(n->cache, layer, head) == n->heads[h].n);
    CHECK(n,
          before.reserved_bytes + before.side_bytes - after.reserved_bytes - after.side_bytes == freed * n->page_bytes);
}

/* Into itself, or into a fresh cache that takes its place. */
static void op_snapshot(naive *n)
{
    n->op = "snapshot";
    if (n->over)
        return;
    const size_t size = kvs_cache_snapshot_bytes(n->cache);
    uint8_t *bytes = malloc(size), *again = malloc(size);
    assert_non_null(bytes);
    assert_non_null(again);
    kvs_cache_snapshot_write(n->cache, bytes);
    if (kvs_rng_below(n->rng, 2) == 0) {
        kvs_cache *fresh;
        CHECK(n, kvs_cache_create(&n->config, &fresh, NULL) == KVS_OK);
        CHECK(n, kvs_cache_snapshot_read(fresh, bytes, size, NULL, NULL) == KVS_OK);
        kvs_cache_free(&n->cache);
        n->cache = fresh;
    } else {
        CHECK(n, kvs_cache_snapshot_read(n->cache, bytes, size, NULL, NULL) == KVS_OK);
    }
    CHECK(n, kvs_cache_snapshot_bytes(n->cache) == size);
    kvs_cache_snapshot_write(n->cache, again);
    CHECK(n, memcmp(bytes, again, size) == 0);
    free(bytes);
    free(again);
}

static void op_clear(naive *n)
{
    n->op = "clear";
    kvs_cache_clear(n->cache);
    for (uint32_t h = 0; h < n->n_heads; h++)
        n->heads[h].n = 0, n->heads[h].next_rope = 0;
}

static void step(naive *n)
{
    const uint32_t kind = kvs_rng_below(n->rng, 1000);
    if (kind < 500)
        op_append(n);
    else if (kind < 620)
        op_keep(n);
    else if (kind < 720)
        op_truncate(n);
    else if (kind < 840)
        op_set_rope(n);
    else if (kind < 930)
        op_side(n);
    else if (kind < 990)
        op_compact(n);
    else if (kind < 998)
        op_snapshot(n);
    else
        op_clear(n);
    n->n_ops++;
    check_budget(n);
}

/* ---- a family of caches ---- */

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

static naive *naive_fork(naive *from)
{
    naive *n = malloc(sizeof *n);
    assert_non_null(n);
    *n = *from;
    n->op = "fork";
    const uint32_t kind = kvs_rng_below(n->rng, 4);
    if (kind == 1)
        n->config.side_mask = kvs_rng_below(n->rng, 8);
    if (kind == 2) { /* another budget, smaller or larger, in tokens */
        n->config.budget_bytes = 0;
        n->config.budget_tokens = 64 + kvs_rng_below(n->rng, 300);
    }
    if (kind == 3) {
        n->config.budget_tokens = 0;
        n->config.budget_bytes =
            kvs_cache_bytes_for_tokens(&n->config, 64 + kvs_rng_below(n->rng, 256)) + kvs_rng_below(n->rng, 5000);
    }
    describe(n);
    CHECK(n, kvs_cache_fork(from->cache, &n->config, &n->cache, NULL) == KVS_OK);
    for (uint32_t h = 0; h < n->n_heads; h++)
        for (uint32_t i = 0; i < n->heads[h].n; i++)
            for (int k = 0; k < KVS_SIDE_COUNT; k++)
                if ((from->config.side_mask & n->config.side_mask & 1u << k) == 0)
                    n->heads[h].lines[i].side[k] = 0;
    n->over = true;   /* until check_budget sees otherwise */
    if (fits(n, 0)) { /* holes may still hold more pages than the budget has */
        for (uint32_t h = 0; h < n->n_heads; h++)
            kvs_cache_compact(n->cache, h / n->config.n_kv_heads, h % n->config.n_kv_heads);
    }
    check_budget(n);
    return n;
}

/* A child that holds more than its budget must evict before anything else, as a session does. */
static void evict_down(naive *n)
{
    n->op = "evict down";
    uint32_t cap = (uint32_t)(n->page_limit / n->n_heads) * KVS_PAGE_SLOTS;
    if (n->config.budget_tokens != 0)
        cap = kvs_min_u32(cap, n->config.budget_tokens);
    uint8_t keep[LINES_MAX];
    for (uint32_t h = 0; h < n->n_heads; h++) {
        naive_head *head = &n->heads[h];
        const uint32_t drop = head->n > cap ? head->n - cap : 0;
        for (uint32_t i = 0; i < head->n; i++)
            keep[i] = i >= drop;
        memmove(head->lines, head->lines + drop, (head->n - drop) * sizeof *head->lines);
        head->n -= drop;
        kvs_cache_keep(n->cache, h / n->config.n_kv_heads, h % n->config.n_kv_heads, keep);
        kvs_cache_compact(n->cache, h / n->config.n_kv_heads, h % n->config.n_kv_heads);
    }
    check_budget(n);
    CHECK(n, !n->over);
}

static void naive_free(naive *n)
{
    kvs_cache_free(&n->cache);
    assert_null(n->cache);
    free(n);
}

static void run_family(const kvs_cache_config *config, uint64_t seed, uint64_t n_ops)
{
    kvs_rng rng = {seed};
    naive *family[FAMILY_MAX] = {naive_create(config, &rng, seed)};
    uint32_t n = 1;
    for (uint64_t i = 0; i < n_ops; i++) {
        const uint32_t kind = kvs_rng_below(&rng, 400);
        naive *one = family[kvs_rng_below(&rng, n)];
        one->n_ops = i;
        if (kind == 0 && n < FAMILY_MAX) {
            naive *child = naive_fork(one);
            if (child->over || !fits(child, 0))
                evict_down(child);
            family[n++] = child;
            compare(child);
            compare(one);
        } else if (kind == 1 && n > 1) {
            const uint32_t at = kvs_rng_below(&rng, n);
            naive_free(family[at]);
            family[at] = family[--n];
        } else {
            step(one);
        }
        if (i % COMPARE_EVERY == 0)
            for (uint32_t k = 0; k < n; k++)
                compare(family[k]);
    }
    for (uint32_t k = 0; k < n; k++) {
        compare(family[k]);
        naive_free(family[k]);
    }
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
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static void pages_hold_what_plain_arrays_hold(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N_SHAPES; i++)
        run_family(&shapes[i], 1000 + i, N_OPS / N_SHAPES);
}

typedef struct thread_arg {
    naive *n;
    kvs_rng rng;
} thread_arg;

static void *run_thread(void *arg)
{
    thread_arg *a = arg;
    for (int i = 0; i < 20000; i++) {
        step(a->n);
        if (i % COMPARE_EVERY == 0)
            compare(a->n);
    }
    return NULL;
}

/* Forks may run on different threads: they share blocks and one another's pools. */
static void forks_on_two_threads_do_not_disturb_each_other(void **state)
{
    (void)state;
    kvs_rng rng = {77};
    naive *parent = naive_create(&shapes[0], &rng, 77);
    do_append(parent, 150);
    naive *child = malloc(sizeof *child);
    assert_non_null(child);
    *child = *parent;
    assert_int_equal(kvs_cache_fork(parent->cache, &child->config, &child->cache, NULL), KVS_OK);
    thread_arg args[2] = {{parent, {1}}, {child, {2}}};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        args[i].n->rng = &args[i].rng;
        assert_int_equal(pthread_create(&threads[i], NULL, run_thread, &args[i]), 0);
    }
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    naive_free(parent);
    compare(child);
    naive_free(child);
}

/* ---- forks by hand ---- */

static uint8_t *snapshot(const kvs_cache *c, size_t *size)
{
    *size = kvs_cache_snapshot_bytes(c);
    uint8_t *bytes = malloc(*size);
    assert_non_null(bytes);
    kvs_cache_snapshot_write(c, bytes);
    return bytes;
}

static bool same_as(const kvs_cache *c, const uint8_t *bytes, size_t size)
{
    size_t size_now;
    uint8_t *now = snapshot(c, &size_now);
    /* counters of peaks and moves stand in the header; slots follow */
    const size_t header = 4 * 7 + 8 * 8;
    const bool same = size == size_now && memcmp(bytes + header, now + header, size - header) == 0;
    free(now);
    return same;
}

static void shared_pages_are_charged_once(void **state)
{
    (void)state;
    kvs_rng rng = {5};
    naive *n = naive_create(&shapes[0], &rng, 5);
    do_append(n, 100);
    kvs_cache_meter before, p, c;
    kvs_cache_get_meter(n->cache, &before);
    assert_int_equal(before.shared_bytes, 0);
    kvs_cache *child;
    assert_int_equal(kvs_cache_fork(n->cache, &n->config, &child, NULL), KVS_OK);
    kvs_cache_get_meter(n->cache, &p);
    kvs_cache_get_meter(child, &c);
    assert_int_equal(p.reserved_bytes + c.reserved_bytes - c.shared_bytes, before.reserved_bytes);
    assert_int_equal(p.shared_bytes, before.reserved_bytes);
    /* Appending to the half-full tails copies one page a head and no more. */
    const int32_t pos = n->next_pos, token = 9;
    assert_int_equal(kvs_cache_append(child, &pos, &token, NULL, 1, NULL), KVS_OK);
    kvs_cache_get_meter(n->cache, &p);
    kvs_cache_get_meter(child, &c);
    const uint64_t block = before.reserved_bytes / (2 * n->n_heads);
    assert_int_equal(p.reserved_bytes + c.reserved_bytes - c.shared_bytes, before.reserved_bytes + n->n_heads * block);
    assert_int_equal(c.n_pages_copied, n->n_heads);
    compare(n);
    /* What only the child still holds is no longer shared. */
    naive_free(n);
    kvs_cache_get_meter(child, &c);
    assert_int_equal(c.shared_bytes, 0);
    kvs_cache_free(&child);
}

static void a_child_that_compacts_leaves_the_parent_alone(void **state)
{
    (void)state;
    kvs_rng rng = {6};
    naive *n = naive_create(&shapes[0], &rng, 6);
    do_append(n, 190);
    op_keep(n);
    size_t size;
    uint8_t *bytes = snapshot(n->cache, &size);
    naive *child = malloc(sizeof *child);
    assert_non_null(child);
    *child = *n;
    assert_int_equal(kvs_cache_fork(n->cache, &n->config, &child->cache, NULL), KVS_OK);
    for (int round = 0; round < 6; round++) {
        op_keep(child);
        for (uint32_t h = 0; h < n->n_heads; h++)
            kvs_cache_compact(child->cache, h / 3, h % 3);
        do_append(child, kvs_rng_below(&rng, kvs_cache_room(child->cache)) + 1);
        compare(child);
        assert_true(same_as(n->cache, bytes, size));
    }
    kvs_cache_free(&n->cache);
    compare(child);
    free(bytes);
    free(n);
    naive_free(child);
}

/* The child's references must not eat the parent's budget: each may fill its own whatever the other still holds. */
static void parent_and_child_fill_their_budgets_independently(void **state)
{
    (void)state;
    for (int order = 0; order < 2; order++) {
        kvs_rng rng = {7};
        naive *a = naive_create(&shapes[0], &rng, 7);
        do_append(a, kvs_cache_room(a->cache));
        naive *b = malloc(sizeof *b);
        assert_non_null(b);
        *b = *a;
        assert_int_equal(kvs_cache_fork(a->cache, &a->config, &b->cache, NULL), KVS_OK);
        naive *first = order ? a : b, *second = order ? b : a;
        const uint8_t none[LINES_MAX] = {0};
        for (int round = 0; round < 3; round++) {
            for (uint32_t h = 0; h < first->n_heads; h++) {
                kvs_cache_keep(first->cache, h / 3, h % 3, none);
                first->heads[h].n = 0;
            }
            assert_int_equal(kvs_cache_room(first->cache), 200);
            do_append(first, 200);
            check_budget(first);
            compare(first);
            compare(second);
            naive *swap = first;
            first = second;
            second = swap;
        }
        naive_free(a);
        compare(b);
        naive_free(b);
    }
}

static void truncating_and_saying_again_gives_the_same_backward_bits(void **state)
{
    (void)state;
    for (uint32_t n_again = 1; n_again <= 64; n_again++) {
        kvs_rng rng = {8};
        naive *n = naive_create(&shapes[1], &rng, 8);
        do_append(n, 40);
        uint8_t keep[LINES_MAX] = {0};
        int32_t rope[LINES_MAX];
        for (uint32_t i = 0; i < 20; i++) {
            keep[2 * i] = 1;
            rope[i] = (int32_t)(2 * i);
        }
        kvs_cache_keep(n->cache, 0, 0, keep);
        kvs_cache_set_rope(n->cache, 0, 0, rope, 20); /* rollback: the next stands behind what is held */
        kvs_cache_truncate(n->cache, 40);             /* drops nothing, changes nothing */
        for (uint32_t i = 0; i < 20; i++)
            n->heads[0].lines[i] = n->heads[0].lines[2 * i];
        n->heads[0].n = 20;
        n->heads[0].next_rope = 20;
        n->next_pos = 40;
        do_append(n, n_again);
        const uint64_t bits = kvs_cache_backward_bits(n->cache, 0, 0);
        assert_int_equal(bits, 1ull << (n_again - 1));
        kvs_cache_truncate(n->cache, n->next_pos - (int32_t)n_again);
        assert_int_equal(kvs_cache_backward_bits(n->cache, 0, 0), 0);
        n->heads[0].n -= n_again;
        n->heads[0].next_rope -= (int32_t)n_again;
        do_append(n, n_again);
        assert_int_equal(kvs_cache_backward_bits(n->cache, 0, 0), bits);
        compare(n);
        naive_free(n);
    }
}

/* ---- memory that fails ---- */

typedef struct failing {
    uint32_t n_allocs, n_live, fail_at; /* fail_at 0: never */
} failing;

static void *failing_alloc(void *ctx, size_t size_bytes)
{
    failing *f = ctx;
    if (++f->n_allocs == f->fail_at)
        return NULL;
    f->n_live++;
    return aligned_alloc(KVS_ALIGN, kvs_round_up(size_bytes, KVS_ALIGN));
}

static void failing_free(void *ctx, void *ptr)
{
    failing *f = ctx;
    f->n_live -= ptr != NULL;
    free(ptr);
}

static void failed_allocations_leak_nothing_and_spare_the_parent(void **state)
{
    (void)state;
    failing count = {0};
    const kvs_allocator a = {failing_alloc, failing_free, &count};
    kvs_cache_config config = shapes[0];
    config.allocator = &a;
    kvs_cache *c;
    assert_int_equal(kvs_cache_create(&config, &c, NULL), KVS_OK);
    const uint32_t n_create = count.n_allocs;
    kvs_cache_free(&c);
    assert_int_equal(count.n_live, 0);
    for (uint32_t i = 1; i <= n_create; i++) {
        kvs_error err;
        count = (failing){.fail_at = i};
        c = (kvs_cache *)&count;
        assert_int_equal(kvs_cache_create(&config, &c, &err), KVS_ENOMEM);
        assert_null(c);
        assert_int_equal(err.status, KVS_ENOMEM);
        assert_int_equal(count.n_live, 0);
    }
    count = (failing){0};
    kvs_rng rng = {9};
    naive *n = naive_create(&config, &rng, 9);
    do_append(n, 150);
    size_t size;
    uint8_t *bytes = snapshot(n->cache, &size);
    const uint32_t n_live = count.n_live;
    count.n_allocs = 0;
    assert_int_equal(kvs_cache_fork(n->cache, &config, &c, NULL), KVS_OK);
    const uint32_t n_fork = count.n_allocs;
    kvs_cache_free(&c);
    assert_int_equal(count.n_live, n_live);
    for (uint32_t i = 1; i <= n_fork; i++) {
        count.n_allocs = 0;
        count.fail_at = i;
        assert_int_equal(kvs_cache_fork(n->cache, &config, &c, NULL), KVS_ENOMEM);
        assert_null(c);
        assert_int_equal(count.n_live, n_live);
        assert_true(same_as(n->cache, bytes, size));
        kvs_cache_meter m;
        kvs_cache_get_meter(n->cache, &m);
        assert_int_equal(m.shared_bytes, 0);
    }
    free(bytes);
    naive_free(n);
    assert_int_equal(count.n_live, 0);
    assert_true(n_create > 5 && n_fork > 5);
}

static void a_budget_without_a_page_a_head_names_the_least(void **state)
{
    (void)state;
    kvs_cache_config config = shapes[2];
    config.budget_bytes = kvs_cache_bytes_for_tokens(&config, 1) - 1;
    kvs_cache *c;
    kvs_error err;
    assert_int_equal(kvs_cache_create(&config, &c, &err), KVS_EBUDGET);
    char least[32];
    snprintf(least, sizeof least, "%llu", (unsigned long long)config.budget_bytes + 1);
    assert_non_null(strstr(err.message, least));
    config.budget_bytes++;
    assert_int_equal(kvs_cache_create(&config, &c, &err), KVS_OK);
    assert_int_equal(kvs_cache_room(c), 64);
    assert_int_equal(kvs_cache_tokens_for_bytes(&config, config.budget_bytes), 64);
    kvs_cache_free(&c);
}

/* ---- snapshots ---- */

static void a_damaged_snapshot_changes_nothing(void **state)
{
    (void)state;
    kvs_rng rng = {10};
    naive *n = naive_create(&shapes[3], &rng, 10);
    do_append(n, 90);
    op_keep(n);
    size_t size;
    uint8_t *bytes = snapshot(n->cache, &size);
    naive *other = naive_create(&shapes[3], &rng, 10);
    do_append(other, 30);
    size_t other_size;
    uint8_t *other_bytes = snapshot(other->cache, &other_size);
    for (size_t cut = 0; cut < size; cut += cut < 200 || cut > size - 200 ? 1 : 17) {
        uint8_t *exact = malloc(cut ? cut : 1); /* so that a sanitizer sees a read past the end */
        assert_non_null(exact);
        memcpy(exact, bytes, cut);
        assert_int_equal(kvs_cache_snapshot_read(other->cache, exact, cut, NULL, NULL), KVS_EFORMAT);
        free(exact);
        assert_true(same_as(other->cache, other_bytes, other_size));
    }
    uint32_t n_refused = 0;
    for (int round = 0; round < 3000; round++) {
        uint8_t *bad = malloc(size + 1);
        assert_non_null(bad);
        memcpy(bad, bytes, size);
        bad[kvs_rng_below(&rng, (uint32_t)(round % 2 ? 120 : size))] ^= (uint8_t)(1u << kvs_rng_below(&rng, 8));
        kvs_error err = {0};
        const kvs_status status = kvs_cache_snapshot_read(other->cache, bad, size + (round % 16 == 0), NULL, &err);
        assert_true(status == KVS_OK || ((status == KVS_EFORMAT || status == KVS_EBUDGET) && err.message[0]));
        assert_true(status != KVS_OK || round % 16 != 0);
        if (status != KVS_OK) {
            n_refused++;
            assert_true(same_as(other->cache, other_bytes, other_size));
        } else {
            kvs_cache_meter m;
            kvs_cache_get_meter(other->cache, &m);
            assert_true(m.reserved_bytes + m.side_bytes <= m.budget_bytes && m.kv_bytes_peak <= m.budget_bytes);
            assert_int_equal(kvs_cache_snapshot_read(other->cache, other_bytes, other_size, NULL, NULL), KVS_OK);
        }
        free(bad);
    }
    assert_true(n_refused > 300);
    free(bytes);
    free(other_bytes);
    naive_free(n);
    naive_free(other);
}

static void a_snapshot_over_the_budget_is_refused(void **state)
{
    (void)state;
    kvs_rng rng = {11};
    naive *n = naive_create(&shapes[0], &rng, 11);
    do_append(n, 190);
    size_t size;
    uint8_t *bytes = snapshot(n->cache, &size);
    kvs_cache_config small = shapes[0];
    small.budget_tokens = 189;
    naive *other = naive_create(&small, &rng, 11);
    kvs_error err;
    assert_int_equal(kvs_cache_snapshot_read(other->cache, bytes, size, NULL, &err), KVS_EBUDGET);
    assert_non_null(strstr(err.message, "189"));
    naive_free(other);
    small.budget_tokens = 0;
    small.budget_bytes = kvs_cache_bytes_for_tokens(&small, 128);
    other = naive_create(&small, &rng, 11);
    assert_int_equal(kvs_cache_snapshot_read(other->cache, bytes, size, NULL, &err), KVS_EBUDGET);
    compare(other);
    naive_free(other);
    free(bytes);
    naive_free(n);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_hold_what_plain_arrays_hold),
        cmocka_unit_test(forks_on_two_threads_do_not_disturb_each_other),
        cmocka_unit_test(shared_pages_are_charged_once),
        cmocka_unit_test(a_child_that_compacts_leaves_the_parent_alone),
        cmocka_unit_test(parent_and_child_fill_their_budgets_independently),
        cmocka_unit_test(truncating_and_saying_again_gives_the_same_backward_bits),
        cmocka_unit_test(failed_allocations_leak_nothing_and_spare_the_parent),
        cmocka_unit_test(a_budget_without_a_page_a_head_names_the_least),
        cmocka_unit_test(a_damaged_snapshot_changes_nothing),
        cmocka_unit_test(a_snapshot_over_the_budget_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

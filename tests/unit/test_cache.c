/* The cache against a naive one: the same random operations, forks among them, on pages and on plain arrays must hold the same
 * slots, and no operation may pass the budget. */
#include "unit/naive_cache.h"

#include <pthread.h>

enum { FAMILY_MAX = 4, N_OPS = 1000000, COMPARE_EVERY = 48 };

/* ---- operations ---- */

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_hold_what_plain_arrays_hold),
        cmocka_unit_test(forks_on_two_threads_do_not_disturb_each_other),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Forks of a cache step by step, allocations that fail, budgets that hold nothing, and damaged snapshots. */
#include "unit/naive_cache.h"

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

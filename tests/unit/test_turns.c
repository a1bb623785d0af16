/* The record of turns against its definition on the flags of the whole conversation: said, evicted, truncated at
 * random, it must agree about every head, and never hold more than what is held needs. Prints the seed on failure. */
#include "cache/turns.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { SLOTS = 40, HEADS = 3, TOKENS_MAX = 1000, STEPS = 120, SEEDS = 3000 };

typedef struct conversation {
    uint8_t flags[TOKENS_MAX];
    int32_t pos[HEADS][SLOTS];
    uint32_t n_held[HEADS];
    int32_t n_tokens, n_evicted_at;
    bool ragged, marker;
    kvs_turn_log log;
    kvs_turn memory[HEADS * (SLOTS + 2)];
    kvs_rng rng;
    uint32_t seed;
} conversation;

static bool holds(const conversation *c, uint32_t head, int32_t pos)
{
    for (uint32_t i = 0; i < c->n_held[head]; i++)
        if (c->pos[head][i] == pos)
            return true;
    return false;
}

/* Straight from docs/metrics.md. */
static double by_definition(const conversation *c, uint32_t head)
{
    uint32_t n_held = 0, n_whole = 0;
    for (int32_t begin = 0, end; begin < c->n_tokens; begin = end) {
        end = begin + 1;
        if (c->flags[begin] & KVS_TOKEN_TEMPLATE)
            continue;
        while (end < c->n_tokens && !(c->flags[end] & KVS_TOKEN_TEMPLATE))
            end++;
        bool held = false, whole = true;
        for (int32_t p = begin; p < end; p++)
            held |= holds(c, head, p);
        for (int32_t p = begin - 1; p >= 0 && c->flags[p] & KVS_TOKEN_TEMPLATE; p--)
            whole &= holds(c, head, p);
        for (int32_t p = end; p < c->n_tokens && c->flags[p] & KVS_TOKEN_TEMPLATE; p++)
            whole &= holds(c, head, p);
        n_held += held;
        n_whole += held && whole;
    }
    return n_held > 0 ? (double)n_whole / (double)n_held : 1.0;
}

static void say(conversation *c)
{
    uint32_t most = 0;
    for (uint32_t h = 0; h < HEADS; h++)
        most = kvs_max_u32(most, c->n_held[h]);
    const uint32_t n = kvs_min_u32(1 + kvs_rng_below(&c->rng, 8), SLOTS - most);
    const uint32_t run = 1 + c->seed % 12;
    for (uint32_t i = 0; i < n; i++) {
        c->marker ^= kvs_rng_below(&c->rng, run) == 0;
        c->flags[c->n_tokens + (int32_t)i] = c->marker ? KVS_TOKEN_TEMPLATE : KVS_TOKEN_USER;
        for (uint32_t h = 0; h < HEADS; h++)
            c->pos[h][c->n_held[h]++] = c->n_tokens + (int32_t)i;
    }
    kvs_turn_log_append(&c->log, c->n_tokens, c->flags + c->n_tokens, n);
    c->n_tokens += (int32_t)n;
}

static void evict(conversation *c)
{
    bool keep[SLOTS] = {false};
    for (uint32_t h = 0; h < HEADS; h++) {
        const uint32_t kind = kvs_rng_below(&c->rng, 4), n = c->n_held[h];
        uint32_t kept = 0;
        for (uint32_t i = 0; i < n; i++) {
            if (h == 0 || c->ragged)
                keep[i] = kind == 0   ? i > n / 2
                          : kind == 1 ? i < n / 2
                                      : kvs_rng_below(&c->rng, kind == 2 ? 2 : 10) == 0;
            if (keep[i])
                c->pos[h][kept++] = c->pos[h][i];
        }
        c->n_held[h] = kept;
        kvs_turn_log_mark(&c->log, c->pos[h], kept);
    }
    kvs_turn_log_forget(&c->log, c->n_tokens);
    c->n_evicted_at = c->n_tokens;
    if (!c->ragged)
        assert_true(c->log.n <= c->n_held[0] + 1);
}

static void take_back(conversation *c)
{
    const int32_t to = c->n_evicted_at + (int32_t)kvs_rng_below(&c->rng, (uint32_t)(c->n_tokens - c->n_evicted_at) + 1);
    for (uint32_t h = 0; h < HEADS; h++)
        while (c->n_held[h] > 0 && c->pos[h][c->n_held[h] - 1] >= to)
            c->n_held[h]--;
    kvs_turn_log_truncate(&c->log, to);
    c->n_tokens = to;
}

static void the_record_departs_from_the_flags(void **state)
{
    (void)state;
    for (uint32_t seed = 0; seed < SEEDS; seed++) {
        conversation c = {.seed = seed, .rng = {seed}, .ragged = seed % 2 == 0};
        const uint32_t capacity = kvs_turn_log_capacity(SLOTS);
        c.log =
            (kvs_turn_log){.turns = c.memory, .capacity = c.ragged ? HEADS * capacity : capacity, .marker_from = -1};
        for (uint32_t i = 0; i < STEPS; i++) {
            const uint32_t kind = kvs_rng_below(&c.rng, 10);
            if (kind < 7)
                say(&c);
            else if (kind < 9)
                evict(&c);
            else
                take_back(&c);
            for (uint32_t h = 0; h < HEADS; h++)
                if (kvs_turn_log_integrity(&c.log, c.pos[h], c.n_held[h]) != by_definition(&c, h))
                    fail_msg("seed %u, step %u, head %u", seed, i, h);
        }
    }
}

/* More turns than fit: the newest are kept, and nothing is written outside. */
static void too_many_turns_overflow(void **state)
{
    (void)state;
    kvs_turn memory[5] = {0};
    kvs_turn_log log = {.turns = memory, .capacity = 4, .marker_from = -1};
    uint8_t flags[40];
    for (uint32_t i = 0; i < 40; i++)
        flags[i] = i % 2 == 0 ? KVS_TOKEN_TEMPLATE : KVS_TOKEN_USER;
    kvs_turn_log_append(&log, 0, flags, 40);
    assert_int_equal(log.n, 4);
    assert_int_equal(memory[4].tail, 0);
    const int32_t newest[] = {38, 39}, oldest[] = {0, 1};
    assert_true(kvs_turn_log_integrity(&log, newest, 2) == 1.0);
    assert_true(kvs_turn_log_integrity(&log, newest + 1, 1) == 0.0);
    assert_true(kvs_turn_log_integrity(&log, oldest + 1, 1) == 1.0); /* forgotten: not counted */
    kvs_turn fewer[2];
    kvs_turn_log copy = {.turns = fewer, .capacity = 2};
    kvs_turn_log_copy(&copy, &log);
    assert_int_equal(copy.n, 2);
    assert_int_equal(copy.turns[1].begin, 39);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_record_departs_from_the_flags),
        cmocka_unit_test(too_many_turns_overflow),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

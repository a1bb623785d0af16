/* The cascading cache against rings that are written out, and its limit cases. */
#include "unit/policy_fixture.h"

enum { RINGS_MAX = 16 };

/* Ring 0 takes every token; what a full one lets go enters the next by the paper's rule, or while there is room anywhere. */
typedef struct ring {
    uint32_t slot[SLOTS_MAX], n;
} ring;

static ring rings[RINGS_MAX];

static uint32_t take_oldest(ring *r)
{
    const uint32_t slot = r->slot[0];
    memmove(r->slot, r->slot + 1, --r->n * sizeof *r->slot);
    return slot;
}

/* Tokens n_sinks .. n - 1 come in one after the other; kept[] says which are there at the end. The last ring holds what
 * the division into windows leaves over. */
static void simulate(uint32_t n, uint32_t n_sinks, uint32_t n_rings, uint32_t room, uint8_t *kept)
{
    const uint32_t window = room / n_rings;
    memset(rings, 0, sizeof rings);
    memset(kept, 1, n);
    uint32_t n_held = 0;
    for (uint32_t i = n_sinks; i < n; n_held += n_held < room, i++) {
        uint32_t moving = i;
        for (uint32_t k = 0;; k++) {
            ring *const r = &rings[k];
            const uint32_t cap = k + 1 < n_rings ? window : room - window * (n_rings - 1);
            r->slot[r->n++] = moving;
            if (r->n <= cap)
                break;
            moving = take_oldest(r);
            if (k + 1 == n_rings) {
                kept[moving] = 0;
                break;
            }
            ring *const next = &rings[k + 1];
            if (n_held < room || b.pos[i] % (1 << (k + 1)) == 0)
                continue;
            uint32_t *const newest = &next->slot[next->n - 1];
            if (b.mass_ema[moving] < b.mass_ema[*newest]) {
                kept[moving] = 0;
            } else {
                kept[*newest] = 0;
                *newest = moving;
            }
            break;
        }
    }
}

static void cascading_is_a_chain_of_rings(void **state)
{
    (void)state;
    kvs_rng rng = {91};
    static uint8_t want[SLOTS_MAX];
    for (int round = 0; round < 300; round++) {
        const uint32_t n = 20 + kvs_rng_below(&rng, 400), n_rings = 1 + kvs_rng_below(&rng, 5);
        const uint32_t sinks = kvs_rng_below(&rng, 6), n_keep = sinks + n_rings * 2 + kvs_rng_below(&rng, n);
        char spec[96];
        snprintf(spec, sizeof spec, "cascading:cascades=%u,sinks=%u +protect=none", n_rings, sinks);
        const kvs_policy p = parse(spec);
        fill_view(&rng, n);
        if (n_keep >= n)
            continue;
        uint32_t n_sinks = 0;
        while (n_sinks < n && b.pos[n_sinks] < (int32_t)sinks)
            n_sinks++;
        assert_int_equal(evict(&p, n_keep), n_keep);
        simulate(n, n_sinks, n_rings, n_keep - n_sinks, want);
        if (memcmp(b.keep, want, n) != 0)
            fail_msg("%s: %u of %u slots, round %d", spec, n_keep, n, round);
    }
}

static void one_window_is_streaming(void **state)
{
    (void)state;
    kvs_rng rng = {92};
    static uint8_t want[SLOTS_MAX];
    const kvs_policy chain = parse("cascading:cascades=1,sinks=4 +protect=none");
    const kvs_policy streaming = parse("streaming:sinks=4 +protect=none");
    for (uint32_t n = 10; n < 300; n += 7) {
        fill_view(&rng, n);
        evict(&streaming, n / 2 + 3);
        memcpy(want, b.keep, n);
        evict(&chain, n / 2 + 3);
        assert_memory_equal(b.keep, want, n);
    }
}

/* With as much attention for every token a deeper window reaches further back than as many newest ones. */
static void a_chain_reaches_further_than_a_window(void **state)
{
    (void)state;
    kvs_rng rng = {93};
    const kvs_policy p = parse("cascading:cascades=4,sinks=0 +protect=none");
    fill_view(&rng, 4000);
    for (uint32_t i = 0; i < 4000; i++)
        b.mass_ema[i] = 0.5f;
    evict(&p, 256);
    uint32_t oldest = 0;
    while (!b.keep[oldest])
        oldest++;
    assert_true(4000 - oldest > 2 * 256);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cascading_is_a_chain_of_rings),
        cmocka_unit_test(one_window_is_streaming),
        cmocka_unit_test(a_chain_reaches_further_than_a_window),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

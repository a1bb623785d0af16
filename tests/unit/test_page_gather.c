/* Tiles gathered lane by lane: every variant against the definition, in place and from elsewhere. */
#include "kernels/kernels.h"
#include "kernels/page_gather.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { DIM_MAX = 80, TILE_BYTES = DIM_MAX * KVS_TILE_SLOTS * 4, ROUNDS = 20000 };

/* Bytes of lane `lane` of row d. */
static uint8_t *element_of(void *tile, uint32_t d, uint32_t lane, size_t size)
{
    return (uint8_t *)tile + (d * KVS_TILE_SLOTS + lane) * size;
}

static void a_lane_goes_astray(void **state)
{
    (void)state;
    static _Alignas(64) uint8_t tiles[KVS_TILE_SLOTS][TILE_BYTES], dst[TILE_BYTES + 64], want[TILE_BYTES + 64];
    const kvs_tile_gather_fn variants[] = {kvs_tile_gather_ref, kvs_tile_gather_get(0),
                                           kvs_tile_gather_get(kvs_cpu_masked(0))};
    kvs_rng rng = {1};
    for (uint32_t round = 0; round < ROUNDS; round++) {
        const uint32_t dims = 1 + kvs_rng_below(&rng, DIM_MAX);
        const bool f32 = kvs_rng_below(&rng, 2);
        const size_t size = f32 ? 4 : 2, tile_bytes = dims * KVS_TILE_SLOTS * size;
        kvs_tile_source sources[KVS_TILE_SLOTS];
        uint32_t n = 0, n_lanes = 0;
        const uint32_t share = 1 + kvs_rng_below(&rng, 16), sources_max = 1 + kvs_rng_below(&rng, KVS_TILE_SLOTS);
        memset(want, 0, tile_bytes);
        memset(want + tile_bytes, 0xee, 64);
        while (n < sources_max && n_lanes < KVS_TILE_SLOTS) {
            for (size_t i = 0; i < tile_bytes; i++)
                tiles[n][i] = (uint8_t)kvs_rng_next(&rng);
            uint32_t lanes = 0, left = KVS_TILE_SLOTS - n_lanes;
            for (uint32_t lane = 0; lane < KVS_TILE_SLOTS && left > 0; lane++)
                if (kvs_rng_below(&rng, 16) < share || (lane == 15 && lanes == 0)) {
                    for (uint32_t d = 0; d < dims; d++)
                        memcpy(element_of(want, d, n_lanes, size), element_of(tiles[n], d, lane, size), size);
                    lanes |= 1u << lane;
                    n_lanes++;
                    left--;
                }
            sources[n] = (kvs_tile_source){tiles[n], (uint16_t)lanes};
            n++;
        }
        const uint32_t in_place = kvs_rng_below(&rng, 2 * n); /* n or more: dst stands elsewhere */
        for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
            memset(dst, 0xdd, tile_bytes);
            memset(dst + tile_bytes, 0xee, 64);
            kvs_tile_source from[KVS_TILE_SLOTS];
            memcpy(from, sources, sizeof from);
            if (in_place < n) {
                memcpy(dst, tiles[in_place], tile_bytes);
                from[in_place].tile = dst;
            }
            variants[v](dst, from, n, dims, f32);
            if (memcmp(dst, want, tile_bytes + 64) != 0)
                fail_msg("round %u, variant %zu: %u sources, %u lanes of %u dims, %zu bytes each", round, v, n, n_lanes,
                         dims, size);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_lane_goes_astray)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

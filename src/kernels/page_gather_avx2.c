/* Gathering tiles by byte shuffles: a row of 16 halfs is two halves of 8, each can send any half to any lane. */
#include "kernels/page_gather.h"

#include "kernels/kernels.h"

#include <immintrin.h>
#include <string.h>

/* Where the lanes of one source's row go: byte indices into its low and its high half, 0x80 for "not from here". */
typedef struct route {
    const uint8_t *tile;
    __m256i low, high;
} route;

static uint32_t plan(route *r, const kvs_tile_source *source, uint32_t lane)
{
    uint8_t low[32], high[32];
    memset(low, 0x80, sizeof low);
    memset(high, 0x80, sizeof high);
    for (uint32_t lanes = source->lanes; lanes != 0; lanes &= lanes - 1, lane++) {
        const uint32_t from = (uint32_t)__builtin_ctz(lanes);
        uint8_t *const to = from < 8 ? low : high;
        to[2 * lane] = (uint8_t)(from % 8 * 2);
        to[2 * lane + 1] = (uint8_t)(from % 8 * 2 + 1);
    }
    *r = (route){source->tile, _mm256_loadu_si256((const __m256i *)(const void *)low),
                 _mm256_loadu_si256((const __m256i *)(const void *)high)};
    return lane;
}

static inline __attribute__((always_inline)) __m256i routed(const route *r, size_t row)
{
    const __m128i *const at = (const __m128i *)(const void *)(r->tile + row);
    const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128(at));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128(at + 1));
    return _mm256_or_si256(_mm256_shuffle_epi8(low, r->low), _mm256_shuffle_epi8(high, r->high));
}

/* n is a constant where it is called, so that the routes stay in registers. */
static inline __attribute__((always_inline)) void gather_rows(uint8_t *dst, const route *routes, uint32_t n,
                                                              size_t n_bytes)
{
    for (size_t row = 0; row < n_bytes; row += 32) {
        __m256i out = routed(&routes[0], row);
        for (uint32_t i = 1; i < n; i++)
            out = _mm256_or_si256(out, routed(&routes[i], row));
        _mm256_storeu_si256((__m256i *)(void *)(dst + row), out);
    }
}

void kvs_tile_gather_avx2(void *dst, const kvs_tile_source *sources, uint32_t n_sources, uint32_t head_dim, bool kv_f32)
{
    if (kv_f32 || n_sources == 0) {
        kvs_tile_gather_ref(dst, sources, n_sources, head_dim, kv_f32);
        return;
    }
    route routes[KVS_TILE_SLOTS];
    uint32_t lane = 0;
    for (uint32_t i = 0; i < n_sources; i++)
        lane = plan(&routes[i], &sources[i], lane);
    const size_t n_bytes = (size_t)head_dim * KVS_TILE_SLOTS * 2;
    switch (n_sources) {
    case 1:
        gather_rows(dst, routes, 1, n_bytes);
        break;
    case 2:
        gather_rows(dst, routes, 2, n_bytes);
        break;
    case 3:
        gather_rows(dst, routes, 3, n_bytes);
        break;
    default:
        gather_rows(dst, routes, n_sources, n_bytes);
    }
}

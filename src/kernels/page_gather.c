/* Tiles of keys put together from lanes of others, in plain C. */
#include "kernels/page_gather.h"

#include "kernels/kernels.h"

#include <string.h>

/* element is a constant where it is called: each copy is one load and one store. */
static inline __attribute__((always_inline)) void gather(uint8_t *dst, const kvs_tile_source *sources,
                                                         uint32_t n_sources, uint32_t head_dim, size_t element)
{
    const uint8_t *from[KVS_TILE_SLOTS]; /* of each lane, in the first row */
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_sources; i++)
        for (uint32_t lanes = sources[i].lanes; lanes != 0; lanes &= lanes - 1)
            from[n++] = (const uint8_t *)sources[i].tile + (size_t)__builtin_ctz(lanes) * element;
    const size_t row_bytes = KVS_TILE_SLOTS * element;
    for (size_t row = 0; row < head_dim * row_bytes; row += row_bytes) {
        uint8_t out[KVS_TILE_SLOTS * sizeof(float)] = {0}; /* a source may be dst: a row is read before it is written */
        for (uint32_t lane = 0; lane < n; lane++)
            memcpy(out + lane * element, from[lane] + row, element);
        memcpy(dst + row, out, row_bytes);
    }
}

void kvs_tile_gather_ref(void *dst, const kvs_tile_source *sources, uint32_t n_sources, uint32_t head_dim, bool kv_f32)
{
    if (kv_f32)
        gather(dst, sources, n_sources, head_dim, sizeof(float));
    else
        gather(dst, sources, n_sources, head_dim, sizeof(uint16_t));
}

kvs_tile_gather_fn kvs_tile_gather_get(uint32_t cpu)
{
#if defined(__x86_64__)
    if (cpu & KVS_CPU_AVX2)
        return kvs_tile_gather_avx2;
#endif
    (void)cpu;
    return kvs_tile_gather_ref;
}

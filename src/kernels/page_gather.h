/* Moving keys between tiles: what compaction spends its time on. Includes base only.
 * A slot's key lies across a whole tile, [head_dim][16], so moving slots one by one touches every line of a tile for each
 * of them. A gather writes a tile once, from all the tiles its slots come from. */
#ifndef KVS_PAGE_GATHER_H
#define KVS_PAGE_GATHER_H

#include "base/base.h"

typedef struct kvs_tile_source {
    const void *tile; /* [head_dim][16] f16 or f32 */
    uint16_t lanes;   /* bit i: lane i moves; not 0 */
} kvs_tile_source;

/* Writes the lanes of all sources, in order, to lanes 0, 1, ... of dst; at most 16 sources with 16 lanes together. The
 * lanes of dst behind them become 0. dst may be one of the sources; others do not overlap it. Copies bits: every
 * variant gives the same. */
typedef void (*kvs_tile_gather_fn)(void *dst, const kvs_tile_source *sources, uint32_t n_sources, uint32_t head_dim,
                                   bool kv_f32);
kvs_tile_gather_fn kvs_tile_gather_get(uint32_t cpu); /* cpu: KVS_CPU_* bits as from kvs_cpu_masked() */

/* Variants; the first runs anywhere. */
void kvs_tile_gather_ref(void *dst, const kvs_tile_source *sources, uint32_t n_sources, uint32_t head_dim, bool kv_f32);
void kvs_tile_gather_avx2(void *dst, const kvs_tile_source *sources, uint32_t n_sources, uint32_t head_dim,
                          bool kv_f32);

#endif

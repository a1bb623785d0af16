/* The cache of one session: ragged pages per (layer, KV head), positions, accumulators, the byte meter.
 * Includes base and kernels. It moves bytes and keeps the budget; what stays is decided by src/policy.
 *
 * One head's slots are a chain of pages in ascending pos. A page's keys and values live in a block of a reference
 * counted pool, so that forks share them; everything that an eviction changes (live mask, pos, rope_pos, key_rot,
 * token, accumulators) is the session's own. Evicting clears bits; a page without live slots is given back; pages are
 * compacted when room is needed or when it pays. Kernels give the same bits for scattered and dense slots, so neither
 * sharing nor compaction nor saving can be seen in a result.
 */
#ifndef KVS_CACHE_H
#define KVS_CACHE_H

#include "base/base.h"
#include "kernels/kernels.h"

/* Accumulators a policy may ask for, one f32 a slot each; carry is the policy's own, the others are attention's. */
enum { KVS_SIDE_SUM = 0, KVS_SIDE_EMA = 1, KVS_SIDE_MAX = 2, KVS_SIDE_CARRY = 3, KVS_SIDE_COUNT = 4 };

enum { KVS_HEAD_DIM_MAX = 512 }; /* rows on the stack: of a snapshot, of rotations */

typedef struct kvs_cache_config {
    uint32_t n_layers, n_kv_heads, head_dim;
    bool kv_f32;
    uint32_t side_mask;     /* bits 1 << KVS_SIDE_* */
    uint64_t budget_bytes;  /* 0: from budget_tokens */
    uint32_t budget_tokens; /* slots in every head; 0: from budget_bytes */
    uint32_t slots_max;     /* live slots of one head at most: sizes scratch; 0: as many as there are pages for */
    uint32_t own_tokens;    /* slots in every head whose blocks this cache brings to its family; 0: all its budget's */
    bool ragged;            /* budget_tokens bounds the mean over heads, not each head */
    const kvs_allocator *allocator;
} kvs_cache_config;

typedef struct kvs_cache kvs_cache;

/* Bytes a budget of n_tokens slots in every head needs, page rounding and side arrays included. */
uint64_t kvs_cache_bytes_for_tokens(const kvs_cache_config *c, uint32_t n_tokens);
/* Slots in every head that budget_bytes hold for certain. */
uint32_t kvs_cache_tokens_for_bytes(const kvs_cache_config *c, uint64_t budget_bytes);

kvs_status kvs_cache_create(const kvs_cache_config *config, kvs_cache **out, kvs_error *err);
/* A copy that shares every page; budget and side_mask of config may differ (new accumulators start at 0). A smaller
 * budget is allowed: the caller evicts before it appends. */
kvs_status kvs_cache_fork(const kvs_cache *parent, const kvs_cache_config *config, kvs_cache **out, kvs_error *err);
void kvs_cache_free(kvs_cache **c);
void kvs_cache_clear(kvs_cache *c); /* drops every slot; peaks and counters stay */

/* ---- appending ---- */

/* Slots that can still be appended to every head (after compaction if need be). */
uint32_t kvs_cache_room(const kvs_cache *c);
/* Opens n slots at the end of every head for tokens pos[i] (ascending, above all held) and makes their pages writable;
 * rope_pos = key_rot = the head's next_rope + i. Compacts and copies shared pages as needed. EBUDGET: no room,
 * unchanged. Keys and values are then written by kvs_cache_page. */
kvs_status kvs_cache_append(kvs_cache *c, const int32_t *pos, const int32_t *tokens, const uint8_t *flags, uint32_t n,
                            kvs_error *err);

/* ---- reading ---- */

uint32_t kvs_cache_n_live(const kvs_cache *c, uint32_t layer, uint32_t head);
uint32_t kvs_cache_n_pages(const kvs_cache *c, uint32_t layer, uint32_t head);
uint32_t kvs_cache_n_physical(const kvs_cache *c, uint32_t layer, uint32_t head); /* slots, dead ones included */
uint32_t kvs_cache_live_max(const kvs_cache *c);
uint32_t kvs_cache_live_min(const kvs_cache *c);
uint64_t kvs_cache_live_total(const kvs_cache *c);
uint32_t kvs_cache_pages_max(const kvs_cache *c); /* pages of the longest head now */
/* Pages that no head passes once something was appended, dead slots included: sizes scratch, once and for all. */
uint32_t kvs_cache_pages_bound(const kvs_cache *c);
uint32_t kvs_cache_slots_max(const kvs_cache *c);
/* KVS_TOKEN_* of the newest slot, which all heads share while nothing was evicted after it; 0 when there is none. */
uint8_t kvs_cache_newest_flags(const kvs_cache *c);
/* Fills views [n_pages] of one head; side [KVS_SIDE_COUNT] arrays of [n_pages] pointers, each may be NULL. */
void kvs_cache_views(const kvs_cache *c, uint32_t layer, uint32_t head, kvs_page_view *views,
                     float **side[KVS_SIDE_COUNT]);
/* Writable K and V of the page that holds physical slot `slot` of a head; *in_page gets the slot in it. */
void kvs_cache_locate(kvs_cache *c, uint32_t layer, uint32_t head, uint32_t slot, void **k, void **v,
                      uint32_t *in_page);
int32_t kvs_cache_next_rope(const kvs_cache *c, uint32_t layer, uint32_t head);

/* One head's live slots flattened, ascending pos; each array [n_live] or NULL; side as above but plain arrays. */
typedef struct kvs_head_slots {
    int32_t *pos, *rope_pos, *key_rot, *token;
    uint8_t *flags;
    float *side[KVS_SIDE_COUNT];
} kvs_head_slots;
uint32_t kvs_cache_read_head(const kvs_cache *c, uint32_t layer, uint32_t head, const kvs_head_slots *out);
/* Key as written (not rotated) and value of live slot i: f32 [head_dim]; each may be NULL. */
void kvs_cache_read_slot(const kvs_cache *c, uint32_t layer, uint32_t head, uint32_t i, float *key, float *value);
/* The same for all live slots: f32 [n_live][head_dim] each; either may be NULL. */
void kvs_cache_read_kv(const kvs_cache *c, uint32_t layer, uint32_t head, float *keys, float *values);

/* ---- changing what is held ---- */

/* Keeps the live slots whose keep[i] is nonzero (i in live order) and drops the rest. */
void kvs_cache_keep(kvs_cache *c, uint32_t layer, uint32_t head, const uint8_t *keep);
/* The same for a while: attention does not see the others until kvs_cache_unhide. In between slots may only be appended, into
 * room that needs no compaction (no dead slots are held), and are dropped after unhiding. */
void kvs_cache_hide(kvs_cache *c, uint32_t layer, uint32_t head, const uint8_t *keep);
void kvs_cache_unhide(kvs_cache *c);
/* Blocks of its own for what kvs_cache_keep(keep) and compaction will leave of a head, so that kvs_cache_write_kv cannot run
 * short of them; false when there are none, which takes a fork onto a smaller budget that has not evicted yet. Content is
 * as before either way. */
bool kvs_cache_own_kept(kvs_cache *c, uint32_t layer, uint32_t head, const uint8_t *keep);
/* Writes the values, and the keys unless NULL (as they are written: rotated to key_rot), of those live slots whose
 * changed[i] is 1: [n_live][head_dim] each, rounded once to the KV type. Behind kvs_cache_own_kept and kvs_cache_keep. Pages shared
 * with forks are copied. */
void kvs_cache_write_kv(kvs_cache *c, uint32_t layer, uint32_t head, const float *keys, const float *values,
                        const uint8_t *changed);
/* Gives the live slots of a head new rope positions and sets where its next key will stand. */
void kvs_cache_set_rope(kvs_cache *c, uint32_t layer, uint32_t head, const int32_t *rope_pos, int32_t next_rope);
/* Drops live slots with pos >= pos_end from every head and steps next_rope back by as many. */
void kvs_cache_truncate(kvs_cache *c, int32_t pos_end);
void kvs_cache_zero_side(kvs_cache *c, uint32_t which);
/* Sets accumulator `which` (one of side_mask) of the live slots of a head: values [n_live], in live order. */
void kvs_cache_write_side(kvs_cache *c, uint32_t layer, uint32_t head, uint32_t which, const float *values);
/* Moves the slots of a head together; returns the pages given back. */
uint32_t kvs_cache_compact(kvs_cache *c, uint32_t layer, uint32_t head);
/* So many dead slots that moving the rest together pays: attention reads them too. */
bool kvs_cache_is_sparse(const kvs_cache *c, uint32_t layer, uint32_t head);

/* ---- the byte meter ---- */

typedef struct kvs_cache_meter {
    uint64_t budget_bytes, budget_tokens;
    uint64_t live_bytes, reserved_bytes, side_bytes, shared_bytes;
    uint64_t live_bytes_peak, reserved_bytes_peak, side_bytes_peak, kv_bytes_peak;
    uint64_t footprint_slots; /* sum over appended tokens of the live slots they met, themselves included */
    uint64_t n_compactions, n_slots_moved, n_pages_copied;
} kvs_cache_meter;
void kvs_cache_get_meter(const kvs_cache *c, kvs_cache_meter *m); /* looks at every page */
const kvs_cache_meter *kvs_cache_meter_now(const kvs_cache *c);   /* all but shared_bytes, at once */

/* Peaks count anew from what is held now. */
void kvs_cache_restart_peaks(kvs_cache *c);

/* Share of the last 64 appended tokens whose rope position was not above their predecessor's (mean over heads). */
double kvs_cache_backward_rate(const kvs_cache *c);
uint64_t kvs_cache_backward_bits(const kvs_cache *c, uint32_t layer, uint32_t head);

/* ---- snapshots: dense, little-endian, without the budget ---- */

size_t kvs_cache_snapshot_bytes(const kvs_cache *c);
void kvs_cache_snapshot_write(const kvs_cache *c, uint8_t *buf);
/* EFORMAT: buf does not describe a cache of this shape; EBUDGET: it does not fit. Unchanged on error. */
typedef struct kvs_snapshot_limits { /* what the cache cannot know; NULL: not checked */
    int32_t pos_end;     /* every pos, rope_pos and key_rot is below it, the next key stands at it or before */
    uint32_t vocab_size; /* every token is below it */
    uint32_t slots_max;  /* of one head */
} kvs_snapshot_limits;
kvs_status kvs_cache_snapshot_read(kvs_cache *c, const uint8_t *buf, size_t n_bytes, const kvs_snapshot_limits *limits,
                                   kvs_error *err);

#endif

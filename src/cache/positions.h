/* Where kept keys stand, and how far that is from where they truly stood: the assignment of every position mode and
 * the indices of positional fidelity, as pure functions on arrays of one (layer, KV head). Owns no memory and knows no
 * page. Modes: arXiv 2511.04686 and its script (rollback); definitions and formulas: docs/metrics.md. */
#ifndef KVS_POSITIONS_H
#define KVS_POSITIONS_H

#include "base/base.h"

/* ---- assignment ---- */

/* Positions after an eviction: the single source of truth for what a mode means.
 *   pos      [n] true positions of what stays, strictly ascending
 *   rope_old [n] where they stand now (may be the same array as rope_new)
 *   true_next    true position of the next token, > pos[n - 1]
 *   rope_new [n] out;  next_rope  out: where the next token stands
 * rollback: rope_old, next = n.   keep: rope_old, next = true_next.   rerotate, recompute: 0..n-1, next = n.
 * gapcap: the first stands at min(pos[0], g), each later one min(pos[j] - pos[j-1], g) further, and the next token
 *   min(true_next - pos[n-1], g) after the last, with g = gap_cap, at least 1. So g = 1 is rerotate when pos[0] is 0,
 *   and g >= true_next is keep. It reads pos only, hence two evictions in a row give what one would have given. */
void kvs_positions_assign(kvs_position_mode mode, int32_t gap_cap, const int32_t *pos, const int32_t *rope_old,
                          uint32_t n, int32_t true_next, int32_t *rope_new, int32_t *next_rope);

/* ---- indices ---- */

enum {
    KVS_POSITIONS_RING = 64,   /* insertions that the backward-step rate looks at */
    KVS_POSITIONS_RECENT = 64, /* tokens that recent_lost looks at */
    KVS_POSITIONS_SINKS = 4,   /* tokens that sinks_lost looks at */
};

/* The last 64 insertions of a head, one bit each: did the token get a position not greater than the one before it?
 * All zero is an empty ring. */
typedef struct kvs_positions_ring {
    uint64_t backward; /* bit 0 is the newest insertion */
    int32_t last;      /* rope_pos of the newest insertion */
    uint32_t n;        /* insertions so far; only up to 64 matters */
} kvs_positions_ring;
/* Called once per token written, with the rope_pos it was given then. */
void kvs_positions_ring_push(kvs_positions_ring *ring, int32_t rope_pos);
/* Share of the last 64 insertions that went backward; 0 while empty. */
double kvs_positions_ring_rate(const kvs_positions_ring *ring);

/* One (layer, KV head) and the query it will meet next. */
typedef struct kvs_positions_view {
    const int32_t *pos;      /* [n] true positions, strictly ascending */
    const int32_t *rope_pos; /* [n] */
    uint32_t n;
    int32_t true_next, rope_next; /* the query's true position T (> every pos) and given position P */
    int32_t window_tokens;        /* L */
    const double *theta;          /* [n_freq] radians per position; n_freq 0 leaves rddi at 0 */
    uint32_t n_freq;
    const double *weight;           /* [n] >= 0, need not sum to 1; NULL: uniform (and if all are 0) */
    const kvs_positions_ring *ring; /* NULL: backward is 0 */
} kvs_positions_view;

/* Formulas in docs/metrics.md. Weighted: ldd, rddi, future, out_of_window. An empty head has prefix 1, sinks_lost and
 * recent_lost 1 (0 if nothing was ever said), all else 0. */
typedef struct kvs_positions_indices {
    double ldd, rddi, future, out_of_window, collision, order, backward, gap, seam, adjacency, prefix;
    double sinks_lost, recent_lost;
    int32_t distance_max; /* largest P - p_j, may be negative; 0 for an empty head */
    int32_t rope_max;     /* largest of all p_j and P */
} kvs_positions_indices;

/* scratch_a, scratch_b [n] i32 each, overwritten. O(n log n), plus n_freq cosines for each run of neighbours whose
 * distance is distorted by the same amount. */
void kvs_positions_measure(const kvs_positions_view *view, int32_t *scratch_a, int32_t *scratch_b,
                           kvs_positions_indices *out);

/* Means over heads and the worst head, in the public struct. Start from kvs_positions_fold_begin; add heads in (layer,
 * KV head) order; end divides by the number of heads and leaves template_integrity (1) and mass_lost (-1) to the
 * caller, who knows the tokens and the attention. */
typedef struct kvs_positions_fold {
    kvs_positions sum;
    int32_t distance_max, rope_max;
    uint32_t n;
} kvs_positions_fold;
void kvs_positions_fold_begin(kvs_positions_fold *fold);
void kvs_positions_fold_add(kvs_positions_fold *fold, const kvs_positions_indices *head);
void kvs_positions_fold_end(const kvs_positions_fold *fold, kvs_positions *out);

#endif

/* Position modes and position indices on plain arrays; see positions.h. The order index is counted while the positions
 * are merge-sorted and the collision index read off the sorted result, so one sort serves both. */
#include "cache/positions.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- assignment ---- */

static int32_t min_i32(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static void assign_gapcap(int32_t gap_cap, const int32_t *pos, uint32_t n, int32_t true_next, int32_t *rope_new,
                          int32_t *next_rope)
{
    const int32_t g = gap_cap < 1 ? 1 : gap_cap;
    if (n == 0) {
        *next_rope = min_i32(true_next, g);
        return;
    }
    int32_t at = min_i32(pos[0], g);
    rope_new[0] = at;
    for (uint32_t j = 1; j < n; j++) {
        at += min_i32(pos[j] - pos[j - 1], g);
        rope_new[j] = at;
    }
    *next_rope = at + min_i32(true_next - pos[n - 1], g);
}

void kvs_positions_assign(kvs_position_mode mode, int32_t gap_cap, const int32_t *pos, const int32_t *rope_old,
                          uint32_t n, int32_t true_next, int32_t *rope_new, int32_t *next_rope)
{
    switch (mode) {
    case KVS_POSITION_GAPCAP:
        assign_gapcap(gap_cap, pos, n, true_next, rope_new, next_rope);
        return;
    case KVS_POSITION_REROTATE:
    case KVS_POSITION_RECOMPUTE:
        for (uint32_t j = 0; j < n; j++)
            rope_new[j] = (int32_t)j;
        *next_rope = (int32_t)n;
        return;
    case KVS_POSITION_ROLLBACK:
    case KVS_POSITION_KEEP:
    case KVS_POSITION_COUNT:
        break;
    }
    if (rope_new != rope_old && n > 0)
        memmove(rope_new, rope_old, n * sizeof *rope_new);
    *next_rope = mode == KVS_POSITION_ROLLBACK ? (int32_t)n : true_next;
}

/* ---- insertion ring ---- */

void kvs_positions_ring_push(kvs_positions_ring *ring, int32_t rope_pos)
{
    const bool backward = ring->n > 0 && rope_pos <= ring->last;
    ring->backward = (ring->backward << 1) | (backward ? 1u : 0u);
    ring->last = rope_pos;
    if (ring->n < KVS_POSITIONS_RING)
        ring->n++;
}

double kvs_positions_ring_rate(const kvs_positions_ring *ring)
{
    if (ring->n == 0)
        return 0.0;
    return (double)__builtin_popcountll(ring->backward) / (double)kvs_min_u32(ring->n, KVS_POSITIONS_RING);
}

/* ---- indices ---- */

/* phi(delta) = 1 - mean of cos(theta_i delta): how much the rotation by delta changes a key, on average over planes. */
static double rope_distortion(const double *theta, uint32_t n_freq, int64_t delta)
{
    if (delta == 0 || n_freq == 0)
        return 0.0;
    double sum = 0.0;
    for (uint32_t i = 0; i < n_freq; i++)
        sum += cos(theta[i] * (double)delta);
    return 1.0 - sum / (double)n_freq;
}

/* Stable merge of a[lo, mid) and a[mid, hi) into b; returns the pairs in which an earlier entry is greater. */
static uint64_t merge_runs(const int32_t *a, int32_t *b, uint32_t lo, uint32_t mid, uint32_t hi)
{
    uint64_t inversions = 0;
    uint32_t i = lo, j = mid;
    for (uint32_t k = lo; k < hi; k++) {
        if (j >= hi || (i < mid && a[i] <= a[j])) {
            b[k] = a[i++];
        } else {
            b[k] = a[j++];
            inversions += mid - i;
        }
    }
    return inversions;
}

/* Sorts the copy of x that stands in a, using b; *sorted is a or b. */
static uint64_t sort_counting(int32_t *a, int32_t *b, uint32_t n, const int32_t **sorted)
{
    uint64_t inversions = 0;
    for (uint64_t width = 1; width < n; width *= 2) {
        for (uint64_t lo = 0; lo < n; lo += 2 * width) {
            const uint64_t mid = lo + width < n ? lo + width : n;
            const uint64_t hi = lo + 2 * width < n ? lo + 2 * width : n;
            inversions += merge_runs(a, b, (uint32_t)lo, (uint32_t)mid, (uint32_t)hi);
        }
        int32_t *swap = a;
        a = b;
        b = swap;
    }
    *sorted = a;
    return inversions;
}

static double weight_sum(const kvs_positions_view *v)
{
    double sum = 0.0;
    for (uint32_t j = 0; v->weight && j < v->n; j++)
        sum += v->weight[j];
    return sum;
}

/* ldd, rddi, future, out_of_window and the largest distance: what depends on the query. */
static void measure_distances(const kvs_positions_view *v, kvs_positions_indices *out)
{
    const double total = weight_sum(v);
    const bool weighted = total > 0.0;
    const double norm = weighted ? 1.0 / total : 1.0 / (double)v->n;
    int64_t run_delta = 0, distance_max = INT64_MIN;
    double run_weight = 0.0;
    for (uint32_t j = 0; j < v->n; j++) {
        const double w = weighted ? v->weight[j] : 1.0;
        const int64_t true_distance = (int64_t)v->true_next - v->pos[j];
        const int64_t distance = (int64_t)v->rope_next - v->rope_pos[j];
        const int64_t delta = distance - true_distance;
        if (delta != run_delta) {
            out->rddi += run_weight * rope_distortion(v->theta, v->n_freq, run_delta);
            run_delta = delta;
            run_weight = 0.0;
        }
        run_weight += w;
        if (delta != 0)
            out->ldd += w * fabs(log2((double)(1 + llabs(distance)) / (double)(1 + true_distance)));
        out->future += distance < 0 ? w : 0.0;
        out->out_of_window += distance >= v->window_tokens ? w : 0.0;
        distance_max = distance > distance_max ? distance : distance_max;
    }
    out->rddi += run_weight * rope_distortion(v->theta, v->n_freq, run_delta);
    out->ldd *= norm;
    out->rddi *= norm;
    out->future *= norm;
    out->out_of_window *= norm;
    out->distance_max = (int32_t)distance_max;
}

/* gap, seam, adjacency, prefix: what depends on the kept set and its neighbours only. */
static void measure_neighbours(const kvs_positions_view *v, kvs_positions_indices *out)
{
    const uint32_t n = v->n;
    uint32_t seams = 0, moved = 0, prefix = 0;
    for (uint32_t j = 1; j < n; j++) {
        const int64_t step = (int64_t)v->pos[j] - v->pos[j - 1];
        seams += step != 1;
        moved += (int64_t)v->rope_pos[j] - v->rope_pos[j - 1] != step;
    }
    while (prefix < n && v->rope_pos[prefix] == v->pos[prefix])
        prefix++;
    out->gap = 1.0 - (double)n / ((double)v->pos[n - 1] - (double)v->pos[0] + 1.0);
    out->seam = n > 1 ? (double)seams / (double)(n - 1) : 0.0;
    out->adjacency = n > 1 ? (double)moved / (double)(n - 1) : 0.0;
    out->prefix = (double)prefix / (double)n;
}

/* collision, order: what depends on the given positions only. */
static void measure_order(const kvs_positions_view *v, int32_t *scratch_a, int32_t *scratch_b,
                          kvs_positions_indices *out)
{
    const uint32_t n = v->n;
    const int32_t *sorted;
    memcpy(scratch_a, v->rope_pos, n * sizeof *scratch_a);
    const uint64_t inversions = sort_counting(scratch_a, scratch_b, n, &sorted);
    uint32_t unique = 1;
    for (uint32_t j = 1; j < n; j++)
        unique += sorted[j] != sorted[j - 1];
    out->collision = 1.0 - (double)unique / (double)n;
    out->order = n > 1 ? (double)inversions / (0.5 * (double)n * (double)(n - 1)) : 0.0;
    out->rope_max = sorted[n - 1] > v->rope_next ? sorted[n - 1] : v->rope_next;
}

static double recent_lost(const kvs_positions_view *v)
{
    const int32_t span = min_i32(v->true_next, KVS_POSITIONS_RECENT);
    if (span <= 0)
        return 0.0;
    uint32_t held = 0;
    while (held < v->n && v->pos[v->n - 1 - held] >= v->true_next - span)
        held++;
    return 1.0 - (double)held / (double)span;
}

void kvs_positions_measure(const kvs_positions_view *view, int32_t *scratch_a, int32_t *scratch_b,
                           kvs_positions_indices *out)
{
    memset(out, 0, sizeof *out);
    out->backward = view->ring ? kvs_positions_ring_rate(view->ring) : 0.0;
    out->recent_lost = recent_lost(view);
    out->rope_max = view->rope_next;
    if (view->n == 0) {
        out->prefix = 1.0;
        out->sinks_lost = view->true_next > 0 ? 1.0 : 0.0;
        return;
    }
    out->sinks_lost = view->pos[0] >= KVS_POSITIONS_SINKS ? 1.0 : 0.0;
    measure_distances(view, out);
    measure_neighbours(view, out);
    measure_order(view, scratch_a, scratch_b, out);
}

/* ---- over heads ---- */

void kvs_positions_fold_begin(kvs_positions_fold *fold)
{
    memset(fold, 0, sizeof *fold);
    fold->distance_max = INT32_MIN;
}

void kvs_positions_fold_add(kvs_positions_fold *fold, const kvs_positions_indices *head)
{
    kvs_positions *s = &fold->sum;
    s->ldd += head->ldd;
    s->rddi += head->rddi;
    s->future += head->future;
    s->out_of_window += head->out_of_window;
    s->collision += head->collision;
    s->order += head->order;
    s->backward += head->backward;
    s->gap += head->gap;
    s->seam += head->seam;
    s->adjacency += head->adjacency;
    s->prefix += head->prefix;
    s->sinks_lost += head->sinks_lost;
    s->recent_lost += head->recent_lost;
    s->future_max = fmax(s->future_max, head->future);
    s->collision_max = fmax(s->collision_max, head->collision);
    s->order_max = fmax(s->order_max, head->order);
    fold->distance_max = head->distance_max > fold->distance_max ? head->distance_max : fold->distance_max;
    fold->rope_max = head->rope_max > fold->rope_max ? head->rope_max : fold->rope_max;
    fold->n++;
}

void kvs_positions_fold_end(const kvs_positions_fold *fold, kvs_positions *out)
{
    const double n = fold->n > 0 ? (double)fold->n : 1.0;
    *out = fold->sum;
    double *const means[] = {&out->ldd,    &out->rddi,       &out->future,     &out->out_of_window, &out->collision,
                             &out->order,  &out->backward,   &out->gap,        &out->seam,          &out->adjacency,
                             &out->prefix, &out->sinks_lost, &out->recent_lost};
    for (size_t i = 0; i < sizeof means / sizeof means[0]; i++)
        *means[i] /= n;
    out->template_integrity = 1.0;
    out->mass_lost = -1.0;
}

/* The log of turns and their markers; see turns.h. */
#include "cache/turns.h"

#include <string.h>

static void push(kvs_turn_log *log, kvs_turn turn)
{
    if (log->n == log->capacity)
        memmove(log->turns, log->turns + 1, --log->n * sizeof *log->turns);
    log->turns[log->n++] = turn;
}

void kvs_turn_log_append(kvs_turn_log *log, int32_t pos, const uint8_t *flags, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++, pos++) {
        const bool marker = flags != NULL && (flags[i] & KVS_TOKEN_TEMPLATE) != 0;
        if (marker && log->marker_from < 0)
            log->marker_from = pos;
        if (!marker && (log->n == 0 || log->marker_from >= 0)) {
            const int32_t head = log->marker_from < 0 ? pos : log->marker_from;
            push(log, (kvs_turn){.head = head, .begin = pos, .end = pos});
            log->marker_from = -1;
        }
        if (log->n == 0)
            continue; /* markers before the first turn */
        kvs_turn *last = &log->turns[log->n - 1];
        last->end += !marker;
        last->tail = pos + 1;
    }
}

void kvs_turn_log_truncate(kvs_turn_log *log, int32_t pos_end)
{
    while (log->n > 0 && log->turns[log->n - 1].begin >= pos_end)
        log->n--;
    if (log->n == 0) { /* markers, if anything */
        log->marker_from = pos_end > 0 ? 0 : -1;
        return;
    }
    kvs_turn *last = &log->turns[log->n - 1];
    last->end = last->end < pos_end ? last->end : pos_end;
    last->tail = pos_end;
    log->marker_from = last->end < pos_end ? last->end : -1;
}

void kvs_turn_log_copy(kvs_turn_log *log, const kvs_turn_log *from)
{
    log->n = kvs_min_u32(from->n, log->capacity);
    if (log->n > 0)
        memcpy(log->turns, from->turns + from->n - log->n, log->n * sizeof *log->turns);
    log->marker_from = from->marker_from;
}

/* The first entry of ascending pos, from index `low` on, that is not below bound. */
static uint32_t first_from(const int32_t *pos, uint32_t low, uint32_t n, int32_t bound)
{
    uint32_t high = n;
    while (low < high) {
        const uint32_t mid = low + (high - low) / 2;
        if (pos[mid] < bound)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

void kvs_turn_log_mark(kvs_turn_log *log, const int32_t *pos, uint32_t n)
{
    uint32_t at = 0;
    for (uint32_t i = 0; i < log->n && at < n; i++) {
        kvs_turn *t = &log->turns[i];
        at = first_from(pos, at, n, t->begin);
        t->held |= at < n && pos[at] < t->end;
    }
}

void kvs_turn_log_forget(kvs_turn_log *log, int32_t n_tokens)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < log->n; i++) {
        kvs_turn t = log->turns[i];
        const bool latest = t.tail == n_tokens; /* may yet go on, or its markers */
        if (!t.held && !latest)
            continue;
        t.held = false;
        log->turns[kept++] = t;
    }
    log->n = kept;
}

double kvs_turn_log_integrity(const kvs_turn_log *log, const int32_t *pos, uint32_t n)
{
    uint32_t n_held = 0, n_whole = 0, at = 0;
    for (uint32_t i = 0; i < log->n; i++) {
        const kvs_turn *t = &log->turns[i];
        const uint32_t head = first_from(pos, at, n, t->head), begin = first_from(pos, head, n, t->begin);
        const uint32_t end = first_from(pos, begin, n, t->end), tail = first_from(pos, end, n, t->tail);
        at = end; /* the next turn's first marker may be this one's last */
        if (begin == end)
            continue;
        n_held++;
        n_whole += begin - head == (uint32_t)(t->begin - t->head) && tail - end == (uint32_t)(t->tail - t->end);
    }
    return n_held > 0 ? (double)n_whole / (double)n_held : 1.0;
}

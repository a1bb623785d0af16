/* Where the turns of a conversation stand and where the template's markers around them do, for as long as some head
 * holds a token of the turn: bounded by what is held, not by what was said. Includes base only. */
#ifndef KVS_TURNS_H
#define KVS_TURNS_H

#include "base/base.h"

/* A turn is a maximal run of tokens without KVS_TOKEN_TEMPLATE; its markers are the template runs on both sides (ChatML
 * leaves one run between two turns: end marker of one and header of the next). */
typedef struct kvs_turn {
    int32_t head, begin, end, tail; /* markers [head, begin) and [end, tail), the turn itself [begin, end) */
    bool held;
} kvs_turn;

typedef struct kvs_turn_log {
    kvs_turn *turns; /* [capacity] ascending */
    uint32_t n, capacity;
    int32_t marker_from; /* the markers being said began here; -1: the latest token is a turn's, or there is none */
} kvs_turn_log;

/* What a log needs where no head holds more than n_slots and all heads hold the same. Past it (heads that hold many
 * different turns) the oldest are forgotten first. */
static inline uint32_t kvs_turn_log_capacity(uint32_t n_slots)
{
    return n_slots + 2; /* one for the latest turn, held or not */
}

/* Tokens pos, pos + 1, ... were said. flags [n] KVS_TOKEN_*, or NULL for none. */
void kvs_turn_log_append(kvs_turn_log *log, int32_t pos, const uint8_t *flags, uint32_t n);
/* Tokens from pos_end on were not said after all. Nothing from pos_end on was ever forgotten. */
void kvs_turn_log_truncate(kvs_turn_log *log, int32_t pos_end);
/* Takes over the newest turns that fit; log keeps its own memory. */
void kvs_turn_log_copy(kvs_turn_log *log, const kvs_turn_log *from);

/* After an eviction: marks the turns that a head still holds something of (pos [n] ascending), head by head; then
 * forgets the others. n_tokens: said so far. */
void kvs_turn_log_mark(kvs_turn_log *log, const int32_t *pos, uint32_t n);
void kvs_turn_log_forget(kvs_turn_log *log, int32_t n_tokens);

/* Share of the turns this head still holds something of whose markers it holds whole; a turn still open at the end has
 * no end marker to lose. 1 when no turn is held. pos [n] ascending. */
double kvs_turn_log_integrity(const kvs_turn_log *log, const int32_t *pos, uint32_t n);

#endif

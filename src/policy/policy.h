/* A policy as chosen: a preset and one choice per stage, parsed from a spec. Includes base and cache. */
#ifndef KVS_POLICY_H
#define KVS_POLICY_H

#include "base/base.h"
#include "kvasir_policy.h"

typedef enum kvs_schedule_kind {
    KVS_SCHEDULE_FULL = 0,      /* the next token would not fit */
    KVS_SCHEDULE_BYTES,         /* live bytes reach a size */
    KVS_SCHEDULE_TOKENS,        /* slots of the fullest head reach a count */
    KVS_SCHEDULE_ONCE,          /* the first time they do */
    KVS_SCHEDULE_CHUNK,         /* before every prefill chunk */
    KVS_SCHEDULE_AFTER_PREFILL, /* when the prompt of a turn is in */
    KVS_SCHEDULE_STEP,          /* before every forward step */
    KVS_SCHEDULE_EVERY,         /* every n tokens */
    KVS_SCHEDULE_TURN_END,
    KVS_SCHEDULE_COUNT
} kvs_schedule_kind;

typedef struct kvs_protect {
    uint32_t sinks, recent; /* first and newest tokens */
    bool system, template_markers, pinned;
} kvs_protect;

typedef struct kvs_policy {
    const kvs_policy_ops *ops;
    double params[KVS_POLICY_PARAMS_MAX]; /* of the preset, then the keep share (0: none) */
    kvs_schedule_kind schedule;
    uint64_t schedule_value; /* bytes, tokens or n */
    double keep_ratio;       /* > 0: share of what is there */
    uint32_t keep_tokens;    /* > 0: a count; both 0: the budget less one chunk */
    kvs_position_mode position;
    int32_t gap_cap;
    kvs_protect protect;
    char text[512]; /* canonical spec: every parameter with its value */
} kvs_policy;

/* Parses `preset[:k=v,...] [+stage=choice[:args]]...`. position overrides the spec's own when not NULL. EINVAL names
 * the word that is wrong and suggests the nearest. */
kvs_status kvs_policy_parse(const char *spec, const char *position, bool paper_compat, kvs_policy *out, kvs_error *err);
kvs_status kvs_position_parse(const char *text, kvs_position_mode *mode, int32_t *gap_cap, kvs_error *err);
/* "600MiB", "1.5GiB", "4800tok", "4800": exactly one of *bytes and *tokens is set. */
kvs_status kvs_size_parse(const char *text, uint64_t *bytes, uint64_t *tokens, kvs_error *err);

uint32_t kvs_policy_needs(const kvs_policy *p);
kvs_policy_scope kvs_policy_scope_of(const kvs_policy *p);
/* Slots to keep of n_slots (a share rounds down, as the paper's script does); n_full is what an absent `keep` means.
 * At least 1 and at least what is hard-protected; n_slots or more means nothing to do. */
uint32_t kvs_policy_target(const kvs_policy *p, const kvs_policy_view *view, uint32_t n_full);

/* The registry: the only list of policies. */
const kvs_policy_ops *kvs_policy_find(const char *name);
const kvs_policy_ops *kvs_policy_at(uint32_t index); /* NULL past the end */

/* ---- selection ---- */

/* Marks keep[i] for the n_keep best of n slots: what is protected first, then by score; equal scores keep the newer.
 * Template markers are protected only up to an eighth of n_keep, newest first: in a long conversation they would
 * otherwise crowd out everything that was said.
 * scratch: [n] u64. EBUDGET: more is hard-protected (sinks, system, pinned, recent) than n_keep; the message says
 * what; keep is then unspecified. */
kvs_status kvs_select(const kvs_protect *protect, const kvs_policy_view *view, const float *scores, uint32_t n_keep,
                      uint8_t *keep, uint64_t *scratch, kvs_error *err);
/* How many of the view's slots are hard-protected. */
uint32_t kvs_protected_count(const kvs_protect *protect, const kvs_policy_view *view);

#endif

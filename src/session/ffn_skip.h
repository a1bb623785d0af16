/* The session's part of FFN-SkipLLM (arXiv:2404.03865): which rows the rule of model/forward.h covers, and its counters.
 *
 * No code is published and the abstract names no numbers, so these are reconstructed: the warm-up counts the tokens the
 * assistant has said in a row (the paper: the first few tokens of a generation); the cold regions are given as layers at
 * either end; all defaults are ours (docs/ffn-skip.md). Prompts, template markers, probes and the fresh prefill of mode
 * recompute always run every block. */
#ifndef KVS_FFN_SKIP_H
#define KVS_FFN_SKIP_H

#include "base/base.h"
#include "model/forward.h"

typedef struct kvs_ffn_skip {
    kvs_ffn_rule rule; /* threshold 0: off */
    uint32_t warmup_tokens;
    uint32_t n_layers;
    char text[96];              /* the option with every value, or "off" */
    uint64_t n_said;            /* newest tokens that the assistant said, in a row */
    uint64_t n_said_evicted_at; /* the same at the last eviction, where truncation may return to */
} kvs_ffn_skip;

/* "threshold=0.99,warmup=4,cold=8:4", NULL or "off", for a model of n_layers. EINVAL names what is wrong. */
kvs_status kvs_ffn_skip_parse(const char *spec, uint32_t n_layers, kvs_ffn_skip *out, kvs_error *err);
/* Counters for what was parsed. ENOMEM. */
kvs_status kvs_ffn_skip_create(kvs_ffn_skip *f, const kvs_allocator *a, kvs_error *err);
void kvs_ffn_skip_free(kvs_ffn_skip *f, const kvs_allocator *a);
bool kvs_ffn_skip_same(const kvs_ffn_skip *a, const kvs_ffn_skip *b);
/* What from has said and counted; the rule stays. */
void kvs_ffn_skip_copy(kvs_ffn_skip *f, const kvs_ffn_skip *from);

/* Tokens that count for the warm-up: the assistant's own, not the template's. */
bool kvs_ffn_skip_counts(uint8_t flags);
/* The next token was said: the rule it falls under, or NULL. */
const kvs_ffn_rule *kvs_ffn_skip_next(kvs_ffn_skip *f, uint8_t flags);
/* The rule of the newest token. */
const kvs_ffn_rule *kvs_ffn_skip_newest(const kvs_ffn_skip *f);

/* Little-endian bytes of the counters, for saves; 0 bytes while off. */
size_t kvs_ffn_skip_bytes(const kvs_ffn_skip *f);
void kvs_ffn_skip_save(const kvs_ffn_skip *f, uint8_t *buf);
void kvs_ffn_skip_load(kvs_ffn_skip *f, const uint8_t *buf);

#endif

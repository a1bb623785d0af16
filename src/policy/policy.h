/* A policy as chosen: a preset and one choice per stage, parsed from a spec. Includes base and cache. */
#ifndef KVS_POLICY_H
#define KVS_POLICY_H

#include "base/base.h"
#include "kvasir_policy.h"
#include "policy/profile.h"

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

/* Every need that is recorded while rows run, a slot at a time. */
enum {
    KVS_POLICY_NEEDS_MASS =
        KVS_POLICY_NEEDS_MASS_LAST | KVS_POLICY_NEEDS_MASS_SUM | KVS_POLICY_NEEDS_MASS_EMA | KVS_POLICY_NEEDS_MASS_MAX
};

/* ---- the other stages: each has a registry of choices, one file a choice ---- */

/* What every choice of a stage tells about itself. */
typedef struct kvs_choice_info {
    const char *name, *doc, *source, *exactness;
    const kvs_param_info *params; /* [n_params] */
    uint32_t n_params;
} kvs_choice_info;

/* Stage rescore: a second scorer that reads the first one's scores and replaces them, for one (layer, KV head). */
typedef struct kvs_rescore_ops {
    kvs_choice_info info;
    uint32_t needs;
    /* With a budget stage and a set for each head it runs once that has shared out, which then goes by the first scorer:
     * view->n_keep is the head's share, protected slots are +inf, the view has no window. */
    bool any_score; /* takes scores of any meaning and sign */
    bool after_budget;
    void (*rescore)(const double *params, const kvs_policy_view *view, float *scores);
    uint32_t (*window_of)(const double *params); /* as kvs_policy_ops */
    size_t (*work_of)(const double *params, uint32_t n_slots, uint32_t head_dim);
} kvs_rescore_ops;

/* Stage probe: rows that run on top of the cache when an eviction asks, and are thrown away. The session runs them
 * (src/session/probe.c): what differs is which rows, and what of their attention is recorded. */
typedef enum kvs_probe_kind {
    KVS_PROBE_REPEAT = 0, /* what is held is said again, chunk by chunk, behind a request to repeat it */
    KVS_PROBE_CONTEXT,    /* what is held is said again as it is */
    KVS_PROBE_LOOKAHEAD,  /* the answer goes on greedily for a few tokens, on the slots that the base policy keeps */
    KVS_PROBE_PROMPT,     /* the last tokens of the prompt that is coming in are the window of every chunk */
    KVS_PROBE_EXTRACT,    /* a request to extract what is essential, and an episode's own words if it has some */
} kvs_probe_kind;
typedef struct kvs_probe_ops {
    kvs_choice_info info;
    kvs_probe_kind kind; /* its parameters: tokens of a chunk (repeat), rows (lookahead, prompt), of text (extract) */
} kvs_probe_ops;

/* Stage budget: how many slots each head keeps, their sum being at most that of the even shares. All heads [n_layers *
 * n_kv_heads], layer by layer. */
typedef struct kvs_budget_view {
    uint32_t n_layers, n_kv_heads;
    const uint32_t *n_slots, *n_protected, *n_even; /* held, hard-protected, and kept if all heads were equal */
    float *scores; /* [head][stride]; hard-protected slots are +inf; a stage may raise what a head has to keep */
    size_t stride;
    uint32_t *keys; /* [heads * stride] scratch */
    /* [n_layers] mean cosine of the hidden state before and after attention, over the rows said; NULL unless asked, and
     * before the first row. */
    const double *similarity;
    const kvs_profile *profile; /* of the file that the spec names; NULL unless asked */
} kvs_budget_view;
typedef struct kvs_budget_ops {
    kvs_choice_info info;
    kvs_policy_scope scope;       /* the finest sets it can share out to: KVS_SCOPE_LAYER keeps a layer's heads equal */
    bool by_score;                /* shares out by scores: of no use where every head has the same */
    uint32_t share_max;           /* even shares that one head can get; 0: as many as a layer has KV heads */
    bool similarity;              /* view->similarity has to be there */
    const kvs_profile_want *file; /* takes file=PATH, and needs it; NULL: none */
    uint32_t (*recent_of)(const double *params); /* newest tokens that it protects; NULL: 0 */
    void (*allocate)(const double *params, const kvs_budget_view *view, uint32_t *n_keep);
} kvs_budget_ops;

/* Stage select: slots that stay or go together. unit [n_slots] u32: ascending numbers, equal for slots of one unit. */
typedef struct kvs_select_ops {
    kvs_choice_info info;
    bool sentences; /* view->sentence_ends has to be there */
    /* The session keeps what sentences mean and drops those said again first; parameters: the cosine, tokens of a
     * sentence at least and at most. Then units is NULL: the others are chosen one by one. */
    bool meanings;
    kvs_policy_scope (*scope_of)(const double *params); /* the finest sets it chooses; NULL: the scorer's */
    void (*units)(const double *params, const kvs_policy_view *view, uint32_t *unit);
    uint32_t (*reuse_of)(const double *params); /* layers in a row that share the first one's keep sets; NULL: 1 */
    /* What stays of the units; NULL: kvs_select_by_units. At most n_keep stay. scratch: [3 n] u64. */
    kvs_status (*choose)(const kvs_protect *protect, const kvs_policy_view *view, const float *scores,
                         const uint32_t *unit, uint32_t n_keep, uint8_t *keep, uint64_t *scratch, kvs_error *err);
} kvs_select_ops;

/* Stage dispose: what becomes of the slots that go, one (layer, KV head) at a time; without one they are dropped. Every keep
 * set is made, so nothing here can be refused. */
typedef struct kvs_dispose_ops {
    kvs_choice_info info;
    uint32_t needs;
    /* Folds slots that go (keep[i] 0) into slots that stay: writes values [n_slots][head_dim] of the latter, which hold
     * what view->values does and are the same memory, and sets changed[i] (0 before) of each that it wrote. scores: those
     * that the keep set was chosen by. */
    void (*merge)(const double *params, const kvs_policy_view *view, const float *scores, const uint8_t *keep,
                  float *keys_raw, float *values, uint8_t *changed);
    /* Whether keys change too: keys_raw is then view->keys_raw as values is view->values, else NULL. NULL: never. */
    bool (*writes_keys)(const double *params);
    size_t (*work_of)(const double *params, uint32_t n_slots, uint32_t head_dim);
} kvs_dispose_ops;

enum { KVS_POLICY_FILE_BYTES = 401, KVS_POLICY_HASH_BYTES = 17 };

typedef struct kvs_policy {
    const kvs_policy_ops *ops;
    double params[KVS_POLICY_PARAMS_MAX]; /* of the preset, then the keep share (0: none) */
    const kvs_probe_ops *probe;           /* NULL: none */
    const kvs_rescore_ops *rescore;       /* NULL: none */
    const kvs_budget_ops *budget;         /* NULL: even shares */
    const kvs_select_ops *select;         /* NULL: single tokens */
    const kvs_dispose_ops *dispose;       /* NULL: drop */
    double probe_params[KVS_POLICY_PARAMS_MAX], rescore_params[KVS_POLICY_PARAMS_MAX],
        budget_params[KVS_POLICY_PARAMS_MAX], select_params[KVS_POLICY_PARAMS_MAX],
        dispose_params[KVS_POLICY_PARAMS_MAX];
    char budget_file[KVS_POLICY_FILE_BYTES]; /* what file= says; empty: nothing */
    char budget_hash[KVS_POLICY_HASH_BYTES]; /* first digits of its sha256: what hash= says, or what was read */
    kvs_schedule_kind schedule;
    uint64_t schedule_value; /* bytes, tokens or n */
    double keep_ratio;       /* > 0: share of what is there, or of what was said */
    bool keep_of_said;
    uint32_t keep_tokens; /* > 0: a count; both 0: the budget less one chunk */
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

/* Whether its stages can stand together (rules.c), before anything else is asked of it. EINVAL names two and why not. */
kvs_status kvs_policy_check_rules(const kvs_policy *p, kvs_error *err);

uint32_t kvs_policy_needs(const kvs_policy *p);
kvs_policy_scope kvs_policy_own_scope(const kvs_policy *p);    /* what the preset asks for */
kvs_policy_scope kvs_policy_select_scope(const kvs_policy *p); /* the finest that the selection goes along with */
kvs_policy_scope kvs_policy_scope_of(const kvs_policy *p);     /* of the sets that are kept */
uint32_t kvs_policy_window(const kvs_policy *p);               /* rows; 0: none wanted */
size_t kvs_policy_work(const kvs_policy *p, uint32_t n_slots, uint32_t head_dim); /* f32 elements */
/* First tokens of the conversation that protection, or the preset's own parameter `sinks`, keeps whatever happens. */
uint32_t kvs_policy_sinks(const kvs_policy *p);
/* Whether heads may come to hold different numbers of slots. */
bool kvs_policy_is_ragged(const kvs_policy *p);
/* Slots to keep of n_slots (a share rounds down, as the paper's script does); n_full is what an absent `keep` means.
 * At least 1 and at least what is hard-protected; n_slots or more means nothing to do, but from the preset's own
 * target(), more than n_slots breaks its contract. */
uint32_t kvs_policy_target(const kvs_policy *p, const kvs_policy_view *view, uint32_t n_full);
/* The same once the set's scores are known. */
uint32_t kvs_policy_target_scored(const kvs_policy *p, const kvs_policy_view *view, const float *scores,
                                  uint32_t n_full);

/* Notes the sha256 of the budget stage's file, so that the text names it. EINVAL: the spec has another hash, or the text
 * gets too long. */
kvs_status kvs_policy_set_hash(kvs_policy *p, const char *sha256, kvs_error *err);

/* As kvs_policy_parse, of a preset that need not be in the registry; tail: what follows its name in a spec. */
kvs_status kvs_policy_parse_tail(const kvs_policy_ops *ops, const char *tail, const char *position, bool paper_compat,
                                 kvs_policy *out, kvs_error *err);

/* The registry: the only list of policies, those of plug-ins behind the built-in ones. Safe from any thread; what it
 * gives stays valid. */
const kvs_policy_ops *kvs_policy_find(const char *name);
const kvs_policy_ops *kvs_policy_at(uint32_t index); /* NULL past the end */
/* Those of plug-ins alone; NULL past the end. Presets are only ever added. */
const kvs_policy_ops *kvs_plugin_at(uint32_t index);
uint32_t kvs_plugin_count(void);
/* The choices of the other stages; NULL past the end. */
const kvs_probe_ops *kvs_probe_at(uint32_t index);
const kvs_rescore_ops *kvs_rescore_at(uint32_t index);
const kvs_budget_ops *kvs_budget_at(uint32_t index);
const kvs_select_ops *kvs_select_at(uint32_t index);
const kvs_dispose_ops *kvs_dispose_at(uint32_t index);

/* ---- selection ---- */

/* Marks keep[i] for the n_keep best of n slots: what is protected first, then by score; equal scores keep the newer.
 * Template markers are protected only up to an eighth of n_keep, newest first: in a long conversation they would
 * otherwise crowd out everything that was said.
 * scratch: [n] u64. EBUDGET: more is hard-protected (sinks, system, pinned, recent) than n_keep; the message says
 * what; keep is then unspecified. */
kvs_status kvs_select(const kvs_protect *protect, const kvs_policy_view *view, const float *scores, uint32_t n_keep,
                      uint8_t *keep, uint64_t *scratch, kvs_error *err);
/* The same by units (unit [n] u32 as kvs_select_ops makes them): whole units only, by the mean score of their unprotected slots,
 * as long as they fit; what is hard-protected stays by itself. At most n_keep stay. scratch: [3 n] u64. */
kvs_status kvs_select_by_units(const kvs_protect *protect, const kvs_policy_view *view, const float *scores,
                               const uint32_t *unit, uint32_t n_keep, uint8_t *keep, uint64_t *scratch, kvs_error *err);
/* The preset's own choose() in their place, its list checked: EPOLICY names the preset, the head and the value that is
 * wrong. Scores of hard-protected slots become +inf. slots: [n + KVS_GUARD_WORDS] u32. EBUDGET as kvs_select. */
kvs_status kvs_select_by_policy(const kvs_policy *p, const kvs_policy_view *view, float *scores, uint32_t n_keep,
                                uint8_t *keep, uint32_t *slots, kvs_error *err);
/* EBUDGET, as kvs_select says it, where more is hard-protected than n_keep. */
kvs_status kvs_protected_fit(const kvs_protect *protect, const kvs_policy_view *view, uint32_t n_keep, kvs_error *err);
/* The first hard-protected slot that keep lacks, or n. */
uint32_t kvs_protected_dropped(const kvs_protect *protect, const kvs_policy_view *view, const uint8_t *keep);
/* How many of the view's slots are hard-protected. */
uint32_t kvs_protected_count(const kvs_protect *protect, const kvs_policy_view *view);
/* Sets the scores of hard-protected slots to +inf. */
void kvs_protected_mark(const kvs_protect *protect, const kvs_policy_view *view, float *scores);

/* A float's bits in an order where larger unsigned means larger float; NaN below everything, -0 equal to 0. */
uint32_t kvs_score_key(float score);
/* The k-th largest of n keys, 1 <= k <= n; *n_ties becomes how many of those equal to it are among the k largest. */
uint32_t kvs_kth_largest(const uint32_t *keys, uint32_t n, uint32_t k, uint32_t *n_ties);

/* ---- guards ---- */

/* A few words behind an array that a policy writes: the only sign of one that wrote past its end. */
enum { KVS_GUARD_WORDS = 4 };
void kvs_guard_set(void *end);
bool kvs_guard_holds(const void *end);

/* ---- what scorers share ---- */

/* 1-D pooling over n scores, odd kernel, zero padding; average divides by kernel at the borders too (torch's default). */
void kvs_pool_average(const float *in, uint32_t n, uint32_t kernel, float *out);
void kvs_pool_max(const float *in, uint32_t n, uint32_t kernel, float *out);
/* out[i] = mean over the group and the window's rows of the probability slot i gets; 0 with an empty window. */
void kvs_window_mean(const kvs_policy_view *view, float *out);
/* The same with the maximum over the group instead of the mean. */
void kvs_window_max(const kvs_policy_view *view, float *out);
/* Slots newer than the oldest row of the window, which scorers by window keep: their number. */
uint32_t kvs_window_slots(const kvs_policy_view *view);
/* a b over n, in eight partial sums (i mod 8) folded 4+4, 2+2, 1+1. */
float kvs_dot(const float *a, const float *b, uint32_t n);
/* StreamingLLM's: slots of the first n_sinks tokens, then the newest (arXiv:2309.17453). */
void kvs_score_streaming(uint32_t n_sinks, const kvs_policy_view *view, float *scores);
/* R-KV's redundancy (arXiv:2505.24133): out [n_slots] sums to 1, larger for a key that many others are like. Softmax of each key's mean cosine to
 * all others, where every key leaves out the newest one that it is more alike to than threshold: of copies the last counts as no copy.
 * Needs keys; work: kvs_key_redundancy_work() f32. */
void kvs_key_redundancy(const kvs_policy_view *view, float threshold, float *out, float *work);
size_t kvs_key_redundancy_work(uint32_t n_slots, uint32_t head_dim);

#endif

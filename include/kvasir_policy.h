/* What the author of a cache policy sees. Unstable until 1.0: check KVS_POLICY_ABI.
 *
 * A policy answers two questions and moves no bytes: what is each held slot worth (score), and how many should stay
 * (target). The pipeline does the rest: it decides when to ask (schedule), says what attention showed (observe), lets a
 * second scorer rescale the first (rescore), shares the room out over heads (budget), protects what must stay, selects
 * the best, drops the others for all layers at once, and gives the kept keys their positions (docs/architecture.md).
 */
#ifndef KVASIR_POLICY_H
#define KVASIR_POLICY_H

#include "kvasir.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVS_POLICY_ABI 3

/* One of them is the keep share, so a preset has at most 15 of its own. */
enum { KVS_POLICY_PARAMS_MAX = 16 };

/* What a view must carry: costly inputs are recorded or read only when a policy needs them. */
enum {
    KVS_POLICY_NEEDS_MASS_LAST = 1u << 0, /* attention mass of the latest forward: a prompt, or one decoded token */
    KVS_POLICY_NEEDS_MASS_SUM = 1u << 1,  /* attention mass since the slot was written */
    KVS_POLICY_NEEDS_MASS_EMA = 1u << 2,
    KVS_POLICY_NEEDS_MASS_MAX = 1u << 3,
    KVS_POLICY_NEEDS_CARRY = 1u << 4,    /* one f32 a slot of the policy's own, from one eviction to the next */
    KVS_POLICY_NEEDS_KEYS = 1u << 5,     /* keys as they stand: rotated to rope_pos */
    KVS_POLICY_NEEDS_KEYS_RAW = 1u << 6, /* keys before rotation */
    KVS_POLICY_NEEDS_VALUES = 1u << 7,
    KVS_POLICY_NEEDS_WINDOW = 1u << 8,       /* attention of the newest rows: window_of says how many */
    KVS_POLICY_NEEDS_LOGITS = 1u << 9,       /* and its scores before the softmax */
    KVS_POLICY_NEEDS_QUERY_STATS = 1u << 10, /* mean and second moment of all queries so far, before rotation */
    KVS_POLICY_NEEDS_PROBE = 1u << 12,       /* what the rows of the probe stage attended to */
    KVS_POLICY_NEEDS_OUT_NORM = 1u << 11,    /* |W_o v|_1 of each slot and query head */
    KVS_POLICY_NEEDS_PAIRS = 1u << 13,       /* the newest rows against their own slots, both ways: window_of again */
    /* With PROBE: each row's probabilities over the length of the residual stream that its layer reads, or of that stream
     * normalised, as attention reads it. */
    KVS_POLICY_NEEDS_PROBE_BY_STREAM = 1u << 14,
    KVS_POLICY_NEEDS_PROBE_BY_INPUT = 1u << 15,
    KVS_POLICY_NEEDS_OUT_LENGTH = 1u << 16, /* |W_o v|_2 of each slot and query head */
    KVS_POLICY_NEEDS_END = 1u << 17,
};

/* Who shares one keep set. */
typedef enum kvs_policy_scope {
    KVS_SCOPE_SHARED = 0, /* one set for all layers and heads: scores are averaged over them */
    KVS_SCOPE_LAYER,      /* one set a layer */
    KVS_SCOPE_HEAD,       /* each (layer, KV head) its own */
} kvs_policy_scope;

/* One (layer, KV head), read-only. Arrays [n_slots], ascending pos; NULL unless needed. */
typedef struct kvs_policy_view {
    uint32_t layer, kv_head, n_layers, n_kv_heads;
    uint32_t group; /* query heads that share this KV head */
    uint32_t head_dim;
    uint32_t n_slots;
    uint32_t n_keep;       /* how many the even share of the budget keeps, protected ones included */
    int64_t n_tokens;      /* said so far; every pos is below it */
    int64_t n_tokens_last; /* said at the last eviction; 0: there was none */
    const int32_t *pos, *rope_pos;
    const int32_t *token;
    const uint8_t *flags; /* KVS_TOKEN_* */
    /* Attention mass: summed over the group's query heads and over rows (LAST, SUM). */
    const float *mass_sum, *mass_ema, *mass_max;
    float *carry;                          /* in and out: 0 for a slot that no eviction has seen; moves with the slot */
    const float *keys, *keys_raw, *values; /* [n_slots][head_dim] f32 */
    /* The newest n_window rows that ran, oldest first. window_prob[(r * group + g) * n_slots + i] is what query head g
     * of row r gives slot i: a softmax over the slots held now that are not newer than the row; 0 for those that are.
     * window_logit: the scores before it, q k / sqrt(head_dim), -inf there. window_query: rotated to where the row's
     * token stands now, [n_window][group][head_dim]. n_window may be less than asked for, and 0. */
    uint32_t n_window;
    const int32_t *window_pos; /* [n_window] pos of the rows */
    const float *window_prob, *window_logit, *window_query;
    /* q k / sqrt(head_dim) of every row of the window with each of the newest n_pair slots, those of the window's own
     * tokens, whichever is newer: [n_window][group][n_pair]. */
    const float *window_pair;
    uint32_t n_pair;
    /* Queries before rotation, of all rows so far but those of the first 4 tokens: sums of x and of x x^T. */
    uint64_t n_queries;
    const double *query_sum;    /* [group][head_dim] */
    const double *query_square; /* [group][head_dim][head_dim], lower triangle */
    const double *rope_theta;   /* [n_freq] radians a position; dims 2i, 2i + 1 turn together */
    uint32_t n_freq;
    int32_t rope_next;             /* where the next token will stand */
    const float *out_norm;         /* [group][n_slots] */
    const float *out_length;       /* [group][n_slots] */
    const uint64_t *sentence_ends; /* bit t % 64 of element t / 64: token t ends a sentence; NULL unless asked */
    const float *probe; /* [group][n_slots]: the largest probability that any probe row's query head gave the slot;
                         * with PROBE_BY_STREAM or _INPUT, of it over the row's length */
    float *part;        /* [n_slots] out: a second score, for score_layer; NULL unless ops->has_part */
    void (*exp_scale)(float *x, uint32_t n, float less, float scale); /* x[i] = exp(x[i] - less) * scale, fast */
    float *work;          /* [work_of()] f32, this call's own; contents undefined */
    uint64_t seed, event; /* for random policies: this session's seed, how many evictions came before */
} kvs_policy_view;

typedef struct kvs_policy_ops {
    uint32_t abi; /* KVS_POLICY_ABI */
    const char *name, *doc;
    const char *source;    /* arXiv:ID, or the program whose behaviour this is */
    const char *exactness; /* "exact", "exact, except ...", "reconstructed: ..." */
    const char *schedule;  /* default schedule, e.g. "full", "step" */
    const char *position;  /* default position mode */
    const char *budget;    /* default budget stage, e.g. "pyramid:beta=20"; NULL: uniform */
    const char *rescore;   /* default second scorer; NULL: none */
    const char *probe;     /* default probe, e.g. "repeat:chunk=2000"; NULL: none */
    const char *select;    /* default unit of selection, e.g. "chunk:length=10"; NULL: token */
    const char *dispose;   /* default disposal, e.g. "merge"; NULL: drop */
    kvs_policy_scope scope;
    uint32_t needs;
    bool never_evicts;            /* the baseline: what does not fit is an error */
    const char *keep;             /* default keep, "0.99" or "766tok"; NULL: the budget less one chunk */
    const kvs_param_info *params; /* [n_params]; values reach the functions in this order */
    uint32_t n_params;
    /* Higher stays. scores [n_slots] f32; NaN counts as lowest. The same view gives the same scores; only carry is
     * written besides. Heads are scored on several threads at once. */
    void (*score)(const double *params, const kvs_policy_view *view, float *scores);
    /* Once all heads of a layer are scored, with views [n_kv_heads] (counts, n_keep and part, nothing else of a slot) and
     * their scores: for scores that compare or mix heads. NULL: none. */
    void (*score_layer)(const double *params, const kvs_policy_view *views, float *const *scores);
    /* How many to keep of view->n_slots, at most all of them; n_default is what `keep` says. What is protected outranks
     * it, and so does a full budget. NULL: n_default. */
    uint32_t (*target)(const double *params, const kvs_policy_view *view, uint32_t n_default);
    /* The same once scores are known, those of the set (averaged over its heads); the view has facts only. NULL: none. */
    uint32_t (*target_by_score)(const double *params, const kvs_policy_view *view, const float *scores,
                                uint32_t n_default);
    /* Needs that depend on parameters, added to `needs`; NULL: none. */
    uint32_t (*needs_of)(const double *params);
    /* Scope by parameters; NULL: scope. */
    kvs_policy_scope (*scope_of)(const double *params);
    /* Looks at a head between evictions and writes carry only, whenever the tokens said reach what observe_at names: the
     * first such count that is n_tokens or more. Rows are cut there. An eviction at that very count may come first: then
     * score has to do the same. Both NULL: none; needs KVS_POLICY_NEEDS_CARRY. */
    void (*observe)(const double *params, const kvs_policy_view *view);
    uint64_t (*observe_at)(const double *params, uint64_t n_tokens);
    bool has_part;      /* view->part is there */
    bool signed_scores; /* scores may be below 0: no stage rescore can take them for attention */
    /* Rows of the window, 1 to KVS_POLICY_WINDOW_MAX; NULL without KVS_POLICY_NEEDS_WINDOW and _PAIRS. */
    uint32_t (*window_of)(const double *params);
    /* f32 elements of view->work for a head of n_slots; NULL: 0. */
    size_t (*work_of)(const double *params, uint32_t n_slots, uint32_t head_dim);
    /* Takes over selection: writes the slots that stay into slots [n_slots], ascending, and returns how many, 1 to
     * n_keep. Called once a keep set, where n_keep < n_slots, with the scores it shares; those of protected slots are
     * +inf, and all of these must stay. The view has no keys, values, window or query moments: what they tell belongs
     * into score. A list that breaks any of this ends the call that asked for it with EPOLICY and changes nothing.
     * NULL: the stage select chooses, the best n_keep by score. */
    uint32_t (*choose)(const double *params, const kvs_policy_view *view, const float *scores, uint32_t n_keep,
                       uint32_t *slots);
} kvs_policy_ops;

enum { KVS_POLICY_WINDOW_MAX = 512 };

/* What a shared object of policies exports (kvs_policy_load_plugin): its presets by index, NULL past the end. It needs
 * this header and nothing to link with. The presets, and all they point to, must not change while the process runs. */
#if defined(__GNUC__)
__attribute__((visibility("default")))
#endif
const kvs_policy_ops *
kvs_policy_plugin(uint32_t index);

#ifdef __cplusplus
}
#endif
#endif

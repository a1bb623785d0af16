/* What the author of a cache policy sees. Unstable until 1.0: check KVS_POLICY_ABI.
 *
 * A policy answers two questions and moves no bytes: what is each held slot worth (score), and how many should stay
 * (target). The pipeline does the rest: it decides when to ask (schedule), protects what must stay, selects the best,
 * drops the others for all layers at once, and gives the kept keys their positions (docs/architecture.md).
 */
#ifndef KVASIR_POLICY_H
#define KVASIR_POLICY_H

#include "kvasir.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVS_POLICY_ABI 1

enum { KVS_POLICY_PARAMS_MAX = 16 };

/* What a view must carry: costly inputs are recorded only when a policy needs them. */
enum {
    KVS_POLICY_NEEDS_MASS_LAST = 1u << 0, /* attention mass of the latest forward: a prompt, or one decoded token */
    KVS_POLICY_NEEDS_MASS_SUM = 1u << 1,  /* attention mass since the slot was written */
    KVS_POLICY_NEEDS_MASS_EMA = 1u << 2,
    KVS_POLICY_NEEDS_MASS_MAX = 1u << 3,
};

/* Who shares one keep set. */
typedef enum kvs_policy_scope {
    KVS_SCOPE_SHARED = 0, /* one set for all layers and heads: scores are averaged over them */
    KVS_SCOPE_LAYER,      /* one set a layer */
    KVS_SCOPE_HEAD,       /* each (layer, KV head) its own */
} kvs_policy_scope;

/* One (layer, KV head), read-only. Arrays [n_slots], ascending pos. */
typedef struct kvs_policy_view {
    uint32_t layer, kv_head, n_layers, n_kv_heads;
    uint32_t group; /* query heads that share this KV head */
    uint32_t n_slots;
    int64_t n_tokens; /* said so far; every pos is below it */
    const int32_t *pos, *rope_pos;
    const int32_t *token;
    const uint8_t *flags; /* KVS_TOKEN_* */
    /* Attention mass: summed over the group's query heads and over rows (LAST, SUM); NULL unless needed. */
    const float *mass_sum, *mass_ema, *mass_max;
    uint64_t seed, event; /* for random policies: this session's seed, how many evictions came before */
} kvs_policy_view;

typedef struct kvs_policy_ops {
    uint32_t abi; /* KVS_POLICY_ABI */
    const char *name, *doc;
    const char *source;    /* arXiv:ID, or the program whose behaviour this is */
    const char *exactness; /* "exact", "exact, except ...", "reconstructed: ..." */
    const char *schedule;  /* default schedule, e.g. "full", "step" */
    const char *position;  /* default position mode */
    kvs_policy_scope scope;
    uint32_t needs;
    bool never_evicts;            /* the baseline: what does not fit is an error */
    const char *keep;             /* default keep, "0.99" or "766tok"; NULL: the budget less one chunk */
    const kvs_param_info *params; /* [n_params]; values reach the functions in this order */
    uint32_t n_params;
    /* Higher stays. scores [n_slots] f32; NaN counts as lowest. Pure: the same view gives the same scores. */
    void (*score)(const double *params, const kvs_policy_view *view, float *scores);
    /* How many to keep of view->n_slots; n_default is what `keep` says. NULL: n_default. */
    uint32_t (*target)(const double *params, const kvs_policy_view *view, uint32_t n_default);
    /* Needs that depend on parameters, added to `needs`; NULL: none. */
    uint32_t (*needs_of)(const double *params);
    /* Scope by parameters; NULL: scope. */
    kvs_policy_scope (*scope_of)(const double *params);
} kvs_policy_ops;

#ifdef __cplusplus
}
#endif
#endif

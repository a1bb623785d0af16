/* Profiles: what `kvasir profile` measures of a model's heads and layers on calibration texts, once, for budget stages
 * (policy/profile.h). Every kind runs whole texts and looks at activations in the order of rows, so that threads and
 * chunks cannot be seen. */
#ifndef KVS_EVAL_PROFILE_H
#define KVS_EVAL_PROFILE_H

#include "base/base.h"

typedef struct kvs_profile_text {
    const int32_t *tokens; /* [n_tokens], 2 at least */
    uint32_t n_tokens;
} kvs_profile_text;

typedef struct kvs_profile_options {
    kvs_arith arith;
    uint32_t budget_tokens; /* baklava: what shares are searched for; 0: a quarter of the shortest text */
    uint32_t block_tokens;  /* sensitivity: 0: 4096, or a quarter of the shortest text where that is less */
    volatile int *cancel;   /* NULL, or nonzero asks to stop (ECANCELLED) */
    void (*on_progress)(void *ctx, uint64_t n_done, uint64_t n_total); /* NULL, or in tokens */
    void *ctx;
} kvs_profile_options;

typedef struct kvs_profile_made {
    uint32_t n_layers, n_kv_heads;
    /* [n_tables][n_layers][n_kv_heads], [n_layers]; the kind's numbers are in one of them, NULL else. */
    double *heads, *layers;
    uint32_t n_tables;
    /* What the search of baklava found; n_tried 0: no search. */
    uint32_t n_tried, budget_tokens;
    double *head_importance, *layer_importance;
    double low, high, few, many;                                 /* parts of the heads in the classes, their weights */
    double nll_even, nll_chosen, held_nll_even, held_nll_chosen; /* held: of the last of several texts, else NaN */
    uint32_t block_tokens;                                       /* of sensitivity */
} kvs_profile_made;

/* The kinds, NULL past the end. */
const char *kvs_eval_profile_kind(uint32_t index);
/* Measures a kind. Errors: EINVAL unknown kind, or a text too short for it; as kvs_session_create and kvs_step;
 * ECANCELLED. out is free'd with kvs_profile_made_free, and empty after an error. */
kvs_status kvs_eval_profile(kvs_model *m, const char *kind, const kvs_profile_options *opt,
                            const kvs_profile_text *texts, uint32_t n_texts, kvs_profile_made *out, kvs_error *err);
void kvs_profile_made_free(kvs_profile_made *made);

#endif

/* How keep sets of heads relate: who still holds a token at all, and how much heads agree (arXiv 2603.01426, formulas
 * reconstructed in reference/methods-a.md 21). Works on sets of true positions, as kvs_session_keep_set gives them. */
#ifndef KVS_EVAL_KEEP_SETS_H
#define KVS_EVAL_KEEP_SETS_H

#include "base/base.h"

typedef struct kvs_keep_set {
    const int32_t *pos; /* [n] ascending, borrowed */
    uint32_t n;
} kvs_keep_set;

/* Global eviction ratio: the share of tokens [n_tokens] (positions, ascending) that none of the sets holds. With all heads'
 * sets it is the paper's GER, with one layer's its GER_l. NaN without tokens; 1 without sets. */
double kvs_eviction_ratio(const kvs_keep_set *sets, uint32_t n_sets, const int32_t *tokens, uint32_t n_tokens);
/* Head consensus of one layer: the mean over pairs of sets of |A and B| / |A or B|; two empty sets agree (1). 1 with fewer
 * than two sets. */
double kvs_head_consensus(const kvs_keep_set *sets, uint32_t n_sets);

/* Both of a session as it stands. */
typedef struct kvs_keep_report {
    double head_consensus; /* mean over layers */
    double ger;            /* over the tokens asked about; NaN without any */
    double ger_layer_max;  /* the layer that lost most of them */
    uint32_t n_layers;
    double *consensus, *ger_l; /* [n_layers] each; one block, owned: kvs_keep_report_free */
} kvs_keep_report;
/* tokens [n_tokens]: positions asked about, ascending, may be NULL with 0. ENOMEM leaves out zero. */
kvs_status kvs_keep_report_make(const kvs_model *m, const kvs_session *s, const int32_t *tokens, uint32_t n_tokens,
                                kvs_keep_report *out, kvs_error *err);
void kvs_keep_report_free(kvs_keep_report *r);

#endif

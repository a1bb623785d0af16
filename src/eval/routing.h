/* What eviction does to the use of what was kept (arXiv:2603.01426, formulas reconstructed): attention mass from the answer to
 * a fact's tokens, how far hidden states move away from the full cache's, and how few key channels carry the queries'
 * scores (ThinK, arXiv:2407.21018). Beside keep_sets.h, which says what was kept. */
#ifndef KVS_EVAL_ROUTING_H
#define KVS_EVAL_ROUTING_H

#include "base/base.h"
#include "session/watch.h"

/* 1 - cos(a, b), [0, 2], as half the squared distance of the unit vectors, so that equal ones give exactly 0 and close ones
 * keep their digits. NaN where one is zero. */
double kvs_drift(const float *a, const float *b, uint32_t n);
/* The smallest share of the scores (>= 0) that together reach `share` of their sum. NaN where all are zero. */
double kvs_share_carrying(const double *score, uint32_t n, double share);

/* Half of the score is a picture of how peaked channels are, nine tenths of how many could go; neither is the paper's, which
 * drops a fixed 40 %. */
#define KVS_KEY_CHANNELS_LOW  0.5
#define KVS_KEY_CHANNELS_HIGH 0.9

typedef struct kvs_routing {
    double utilisation, ref_utilisation;       /* mean over layers, heads and answer rows; NaN without tokens or rows */
    double drift, drift_last;                  /* at the newest row: mean over layers; the last layer's */
    double key_channels_50, key_channels_90;   /* mean over (layer, KV head) */
    double key_channels_min, key_channels_max; /* of key_channels_90 */
    uint32_t n_layers, n_kv_heads;
    double *utilisation_l, *ref_utilisation_l, *drift_l; /* [n_layers]; one block, owned: kvs_routing_free */
    double *key_channels_lh;                             /* [n_layers][n_kv_heads], of key_channels_90 */
} kvs_routing;
/* From the watch of session s, and the reference's of the same rows (NULL: there is none; its numbers are NaN). ENOMEM leaves
 * out zero. */
kvs_status kvs_routing_make(const kvs_session *s, const kvs_watch *w, const kvs_watch *ref, kvs_routing *out,
                            kvs_error *err);
void kvs_routing_free(kvs_routing *r);

#endif

/* Cache health: a reference-free prediction of how far the next answer is from the full cache's, from position indices
 * and eviction history alone. Pure functions; the session gathers the inputs. Formula: docs/metrics.md, "Health". */
#ifndef KVS_HEALTH_H
#define KVS_HEALTH_H

#include "base/base.h"

/* Terms in the order of docs/metrics.md: id, name shown, weight before calibration (nats at full term). The weights are
 * priors set before any measurement, not fitted values. */
#define KVS_HEALTH_MAP(X)                                                                                              \
    X(OUT_OF_WINDOW, "out_of_window", 4.0)                                                                             \
    X(FUTURE, "future", 4.0)                                                                                           \
    X(COLLISION, "collision", 2.0)                                                                                     \
    X(ORDER, "order", 4.0)                                                                                             \
    X(BACKWARD, "backward", 2.0)                                                                                       \
    X(WINDOW, "window", 1.0)                                                                                           \
    X(MASS_LOST, "mass_lost", 2.0)                                                                                     \
    X(SINKS_LOST, "sinks_lost", 1.0)                                                                                   \
    X(RECENT_LOST, "recent_lost", 1.0)                                                                                 \
    X(SEAM, "seam", 0.5)                                                                                               \
    X(TEMPLATE, "template", 0.5)

typedef enum kvs_health_term {
#define KVS_HEALTH_ENUM(id, name, prior) KVS_HEALTH_##id,
    KVS_HEALTH_MAP(KVS_HEALTH_ENUM)
#undef KVS_HEALTH_ENUM
        KVS_HEALTH_TERM_COUNT
} kvs_health_term;

typedef struct kvs_health_weights {
    double lambda[KVS_HEALTH_TERM_COUNT]; /* >= 0 */
    bool calibrated;                      /* fitted on measured KL, on calibration dialogues only */
} kvs_health_weights;

typedef struct kvs_health_inputs {
    double term[KVS_HEALTH_TERM_COUNT]; /* each in [0, 1] */
    bool mass_unknown;                  /* the kernels recorded no attention mass: the term is 0 and says nothing */
    /* facts that raise an alarm whatever the score */
    bool position_past_window; /* some key or the query stands at or past the window in a mode that keeps gaps */
    bool over_budget;
    bool nan_seen; /* a logit was not finite */
} kvs_health_inputs;

const char *kvs_health_term_name(kvs_health_term term);
void kvs_health_priors(kvs_health_weights *weights);

/* Inputs from the indices of the state the next query meets.
 *   distance_max  largest distance to a kept key over all heads;  rope_max  largest position given to any key or the
 *   query (kvs_positions_fold has both); the caller sets over_budget and nan_seen afterwards. */
void kvs_health_gather(const kvs_positions *p, kvs_position_mode mode, int32_t distance_max, int32_t rope_max,
                       uint32_t window_tokens, kvs_health_inputs *out);

/* predicted = sum of lambda * term, score = 100 exp(-predicted). Terms are clipped to [0, 1]; one that is not finite
 * counts as 1 and raises KVS_ALARM_NAN. worst is "none" when every product is 0; the first of equals. */
void kvs_health_compute(const kvs_health_inputs *in, const kvs_health_weights *weights, kvs_health *out);

#endif

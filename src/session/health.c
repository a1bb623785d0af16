/* The health score; see health.h. Same scale as 100 exp(-KL), so a score reads as the fidelity it predicts. */
#include "session/health.h"

#include <math.h>
#include <string.h>

static const char *const term_names[] = {
#define HEALTH_NAME(id, name, prior) name,
    KVS_HEALTH_MAP(HEALTH_NAME)
#undef HEALTH_NAME
};

static const double priors[] = {
#define HEALTH_PRIOR(id, name, prior) prior,
    KVS_HEALTH_MAP(HEALTH_PRIOR)
#undef HEALTH_PRIOR
};

static double clip01(double x)
{
    return x < 0.0 ? 0.0 : x > 1.0 ? 1.0 : x;
}

const char *kvs_health_term_name(kvs_health_term term)
{
    return term < KVS_HEALTH_TERM_COUNT ? term_names[term] : "none";
}

void kvs_health_priors(kvs_health_weights *weights)
{
    memcpy(weights->lambda, priors, sizeof priors);
    weights->calibrated = false;
}

void kvs_health_gather(const kvs_positions *p, kvs_position_mode mode, int32_t distance_max, int32_t rope_max,
                       uint32_t window_tokens, kvs_health_inputs *out)
{
    memset(out, 0, sizeof *out);
    const double fill = window_tokens > 0 ? (double)distance_max / (double)window_tokens : 0.0;
    out->term[KVS_HEALTH_OUT_OF_WINDOW] = p->out_of_window;
    out->term[KVS_HEALTH_FUTURE] = p->future;
    out->term[KVS_HEALTH_COLLISION] = p->collision;
    out->term[KVS_HEALTH_ORDER] = p->order;
    out->term[KVS_HEALTH_BACKWARD] = p->backward;
    /* Quality starts to fall in the last tenth of the window, before any key is past it. */
    out->term[KVS_HEALTH_WINDOW] = clip01((fill - 0.9) / 0.1);
    out->mass_unknown = p->mass_lost < 0.0;
    out->term[KVS_HEALTH_MASS_LOST] = out->mass_unknown ? 0.0 : p->mass_lost;
    out->term[KVS_HEALTH_SINKS_LOST] = p->sinks_lost;
    out->term[KVS_HEALTH_RECENT_LOST] = p->recent_lost;
    out->term[KVS_HEALTH_SEAM] = p->seam;
    out->term[KVS_HEALTH_TEMPLATE] = 1.0 - p->template_integrity;
    /* gapcap keeps positions that grow with the conversation as keep does, only slower. */
    const bool grows = mode == KVS_POSITION_KEEP || mode == KVS_POSITION_GAPCAP;
    out->position_past_window = grows && window_tokens > 0 && (int64_t)rope_max >= (int64_t)window_tokens;
}

void kvs_health_compute(const kvs_health_inputs *in, const kvs_health_weights *weights, kvs_health *out)
{
    double predicted = 0.0, largest = 0.0;
    kvs_health_term worst = KVS_HEALTH_TERM_COUNT;
    bool nan_seen = in->nan_seen;
    for (int i = 0; i < KVS_HEALTH_TERM_COUNT; i++) {
        const bool finite = isfinite(in->term[i]);
        nan_seen = nan_seen || !finite;
        const double product = weights->lambda[i] * (finite ? clip01(in->term[i]) : 1.0);
        predicted += product;
        if (product > largest) {
            largest = product;
            worst = (kvs_health_term)i;
        }
    }
    out->predicted = predicted;
    out->score = 100.0 * exp(-predicted);
    out->worst = kvs_health_term_name(worst);
    out->calibrated = weights->calibrated;
    out->alarms = (in->term[KVS_HEALTH_FUTURE] > 0.0 ? KVS_ALARM_FUTURE : 0u) |
                  (in->position_past_window ? KVS_ALARM_WINDOW : 0u) |
                  (in->term[KVS_HEALTH_BACKWARD] > 0.0 ? KVS_ALARM_BACKWARD : 0u) |
                  (in->over_budget ? KVS_ALARM_BUDGET : 0u) | (nan_seen ? KVS_ALARM_NAN : 0u);
}

/* Q-Filters without their files: keys by their projection on the dominant direction of the head's queries. Source: Godey
 * et al., arXiv:2503.02812: the first right singular vector of the queries, its sign such that queries project on it
 * positively; mean of the group's unit vectors; score its product with the key. Reconstructed: theirs is computed once a
 * model from a corpus, ours from this conversation's own queries (second moment of all so far), before rotation, with
 * keys before rotation; the sign is that of the mean query (theirs: of most queries).
 * The direction is found by power iteration from the mean query: at most 256 steps, fewer once it moves by under 1e-9. */
#include "policy/policy.h"

#include <math.h>

enum { STEPS_MAX = 256 };

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    (void)n_slots;
    return 2 * (size_t)head_dim * 3;
}

/* False where x is zero or not finite. */
static bool normalise(double *x, uint32_t n)
{
    double square = 0;
    for (uint32_t i = 0; i < n; i++)
        square += x[i] * x[i];
    if (!(square > 0) || !isfinite(square))
        return false;
    for (uint32_t i = 0; i < n; i++)
        x[i] /= sqrt(square);
    return true;
}

/* The unit vector that the symmetric matrix (lower triangle m [n][n]) stretches most, in x, where it begins. */
static bool dominant(const double *m, uint32_t n, double *x, double *y)
{
    if (!normalise(x, n))
        return false;
    for (uint32_t step = 0; step < STEPS_MAX; step++) {
        for (uint32_t i = 0; i < n; i++) {
            y[i] = m[(size_t)i * n + i] * x[i];
            for (uint32_t j = 0; j < i; j++) {
                y[i] += m[(size_t)i * n + j] * x[j];
                y[j] += m[(size_t)i * n + j] * x[i];
            }
        }
        if (!normalise(y, n))
            return false;
        double moved = 0;
        for (uint32_t i = 0; i < n; i++) {
            moved += (x[i] - y[i]) * (x[i] - y[i]);
            x[i] = y[i];
        }
        if (moved < 1e-18)
            break;
    }
    return true;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    const uint32_t dh = view->head_dim;
    double *const filter = (double *)(void *)view->work, *const x = filter + dh, *const y = x + dh;
    for (uint32_t d = 0; d < dh; d++)
        filter[d] = 0;
    for (uint32_t g = 0; g < view->group; g++) {
        const double *const sum = view->query_sum + (size_t)g * dh;
        for (uint32_t d = 0; d < dh; d++)
            x[d] = sum[d];
        if (!dominant(view->query_square + (size_t)g * dh * dh, dh, x, y))
            continue; /* no queries yet */
        double dot = 0;
        for (uint32_t d = 0; d < dh; d++)
            dot += x[d] * sum[d];
        for (uint32_t d = 0; d < dh; d++)
            filter[d] += (dot < 0 ? -x[d] : x[d]) / view->group;
    }
    for (uint32_t i = 0; i < view->n_slots; i++) {
        double dot = 0;
        for (uint32_t d = 0; d < dh; d++)
            dot += (double)view->keys_raw[(size_t)i * dh + d] * filter[d];
        scores[i] = (float)dot;
    }
}

const kvs_policy_ops kvs_policy_qfilter = {
    .abi = KVS_POLICY_ABI,
    .name = "qfilter",
    .doc = "keys along the main direction of the queries",
    .source = "arXiv:2503.02812",
    .exactness = "reconstructed: filters from this conversation's queries before rotation, not from a corpus",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_KEYS_RAW | KVS_POLICY_NEEDS_QUERY_STATS,
    .signed_scores = true,
    .score = score,
    .work_of = work_of,
};

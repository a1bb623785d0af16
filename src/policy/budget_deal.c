/* Sharing out by weights: one factor for all units, found by halving, then whole slots. */
#include "policy/budget_deal.h"

#include <math.h>

/* Halvings of the factor's interval: more than a double has digits. */
enum { STEPS = 80 };
/* A unit of no weight comes last, after all others hold all they may. */
#define WEIGHT_MIN 1e-9
#define FACTOR_MAX 0x1p80

typedef struct deal {
    const kvs_budget_view *v;
    const kvs_budget_deal_plan *plan;
    uint32_t n_units, step; /* heads a unit */
} deal;

static bool is_in(const deal *d, uint32_t unit)
{
    return d->plan->left_out == NULL || !d->plan->left_out(d->plan->ctx, unit);
}

/* The heads of a unit hold equally many as a rule; where they do not, what all of them have counts. */
static uint32_t least_of(const deal *d, const uint32_t *x, uint32_t unit)
{
    uint32_t n = x[unit * d->step];
    for (uint32_t h = 1; h < d->step; h++)
        n = kvs_min_u32(n, x[unit * d->step + h]);
    return n;
}

static uint32_t even_of(const deal *d, uint32_t unit)
{
    return kvs_min_u32(least_of(d, d->v->n_even, unit), least_of(d, d->v->n_slots, unit));
}

static uint32_t low_of(const deal *d, uint32_t unit)
{
    uint32_t n = 1;
    for (uint32_t h = 0; h < d->step; h++)
        n = kvs_max_u32(n, d->v->n_protected[unit * d->step + h]);
    n = kvs_max_u32(n, (uint32_t)(d->plan->least * even_of(d, unit)));
    return kvs_min_u32(n, least_of(d, d->v->n_slots, unit));
}

static uint32_t high_of(const deal *d, uint32_t unit)
{
    const uint64_t cap = (uint64_t)d->plan->share_max * even_of(d, unit), held = least_of(d, d->v->n_slots, unit);
    return kvs_max_u32((uint32_t)(d->plan->share_max == 0 || held < cap ? held : cap), low_of(d, unit));
}

static double amount(const deal *d, uint32_t unit, double factor)
{
    const double weight = fmax(d->plan->weight(d->plan->ctx, unit), WEIGHT_MIN);
    return fmin(fmax(factor * weight * even_of(d, unit), low_of(d, unit)), high_of(d, unit));
}

static double sum_at(const deal *d, double factor)
{
    double sum = 0;
    for (uint32_t u = 0; u < d->n_units; u++)
        sum += is_in(d, u) ? amount(d, u, factor) : 0;
    return sum;
}

/* The largest factor tried whose sum is at most total. 1 is tried first: weights that are exact shares stay exact. */
static double find_factor(const deal *d, double total)
{
    if (sum_at(d, 1) == total)
        return 1;
    double low = 0, high = 1;
    while (sum_at(d, high) < total && high < FACTOR_MAX) {
        low = high;
        high *= 2;
    }
    for (int i = 0; i < STEPS; i++) {
        const double mid = low + (high - low) / 2;
        if (sum_at(d, mid) <= total)
            low = mid;
        else
            high = mid;
    }
    return low;
}

static void set(const deal *d, uint32_t unit, uint32_t n, uint32_t *n_keep)
{
    for (uint32_t h = 0; h < d->step; h++)
        n_keep[unit * d->step + h] = n;
}

void kvs_budget_deal(const kvs_budget_view *v, const kvs_budget_deal_plan *plan, uint32_t *n_keep)
{
    const uint32_t n_heads = v->n_layers * v->n_kv_heads, step = plan->by_layer ? v->n_kv_heads : 1;
    const deal d = {v, plan, n_heads / step, step};
    int64_t total = 0;
    for (uint32_t u = 0; u < d.n_units; u++)
        total += (int64_t)even_of(&d, u) - (is_in(&d, u) ? 0 : n_keep[u * step]);
    const double factor = find_factor(&d, (double)total);
    for (uint32_t u = 0; u < d.n_units; u++)
        if (is_in(&d, u)) {
            set(&d, u, (uint32_t)amount(&d, u, factor), n_keep);
            total -= n_keep[u * step];
        }
    while (total > 0) { /* fractions, a slot a unit, the largest first */
        uint32_t best = UINT32_MAX;
        double most = 0;
        for (uint32_t u = 0; u < d.n_units; u++) {
            if (!is_in(&d, u) || n_keep[u * step] >= high_of(&d, u))
                continue;
            const double part = amount(&d, u, factor) - n_keep[u * step];
            if (best == UINT32_MAX || part > most) {
                best = u;
                most = part;
            }
        }
        if (best == UINT32_MAX)
            return; /* all hold all they may */
        set(&d, best, n_keep[best * step] + 1, n_keep);
        total--;
    }
}

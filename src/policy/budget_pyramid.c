/* PyramidKV: the lowest layer keeps most, the room falls linearly to the highest; heads of a layer keep equal numbers.
 * Source: Cai et al., arXiv:2406.02069 and KVCache-Factory; beta 20 as there and in kvpress. With C slots on average and a
 * window of w that all keep: from 2 (C - w) - (C - w) / beta down to (C - w) / beta, plus w; where the first is over
 * what is held, it is cut there and the last raised. inside=1 is kvpress's PyramidKVPress: the window counts as part of a
 * layer's share, numbers are rounded to the nearest, and shares are even where the last would be below the window. What
 * fractions leave over is dealt out from the lowest layer on, so that the sum is
 * exactly that of the even shares (the repository rounds down and loses a few). */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"beta", "how steep: the highest layer keeps 1/beta of the average", 20, 1, 1000},
    {"window", "slots that every layer keeps besides (the scorer's window)", 64, 0, 4096},
    {"inside", "1: not besides, but as part of its share (kvpress)", 0, 0, 1},
};

static void allocate(const double *params, const kvs_budget_view *v, uint32_t *n_keep)
{
    const uint32_t n_layers = v->n_layers, n_heads = v->n_kv_heads;
    uint64_t sum_even = 0, n_least = UINT32_MAX;
    for (uint32_t l = 0; l < n_layers; l++) {
        sum_even += v->n_even[l * n_heads];
        n_least = v->n_slots[l * n_heads] < n_least ? v->n_slots[l * n_heads] : n_least;
    }
    const double average = (double)sum_even / n_layers;
    const bool inside = params[2] != 0;
    const double window = inside || params[1] >= average ? 0 : params[1];
    const double base = average - window, most = (double)n_least - (inside ? params[1] : window);
    double low = base / params[0], high = 2 * base - low;
    if (high > most) {
        high = most;
        low = 2 * base - high;
    }
    if (inside && !(high >= low && low >= params[1]))
        low = high = base;
    const double step = n_layers > 1 ? (high - low) / (n_layers - 1) : 0;
    uint64_t given = 0;
    for (uint32_t l = 0; l < n_layers; l++)
        given += n_keep[l * n_heads] =
            (uint32_t)(window + (n_layers > 1 ? high - l * step : base) + (inside ? 0.5 : 0));
    for (uint32_t l = n_layers; given > sum_even && l-- > 0;) { /* rounded up more often than down */
        const bool less = n_keep[l * n_heads] > 0;
        given -= less;
        n_keep[l * n_heads] -= less;
    }
    for (uint32_t l = 0; l < n_layers; l++) {
        const bool more = given < sum_even && n_keep[l * n_heads] < v->n_slots[l * n_heads];
        given += more;
        n_keep[l * n_heads] += more;
        for (uint32_t h = 1; h < n_heads; h++)
            n_keep[l * n_heads + h] = n_keep[l * n_heads];
    }
}

const kvs_budget_ops kvs_budget_pyramid = {
    .info = {.name = "pyramid",
             .doc = "room falls linearly from the lowest to the highest layer",
             .source = "arXiv:2406.02069",
             .exactness = "exact apart from rounding",
             .params = params_info,
             .n_params = 3},
    .scope = KVS_SCOPE_LAYER,
    .share_max = 2,
    .allocate = allocate,
};

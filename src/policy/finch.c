/* FINCH: what the question attends to. Source: Corallo and Papotti, arXiv:2408.00167 (TACL 2024): a document is read in
 * chunks, each with the question behind it; after each chunk the slots stay that the question's rows give most attention,
 * divided by the number of rows that could see the slot, and move together (rerotate). Here the question is the newest
 * rows that ran (window; as SnapKV's default, the paper's is as long as the question), chunks are those of the budget.
 * norm=2 is kvpress's FinchPress: each row times the number of slots it can see; norm=0 the plain mean. */
#include "policy/policy.h"

#include <math.h>

enum { NORM_NONE = 0, NORM_SEEN_BY = 1, NORM_SEES = 2 };

static const kvs_param_info params_info[] = {
    {"window", "rows of the question", 64, 1, KVS_POLICY_WINDOW_MAX},
    {"norm", "0 none, 1 by the rows that could see the slot, 2 by the slots a row can see (kvpress)", 1, 0, 2},
};

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[0];
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots, n_window = kvs_window_slots(view);
    const int norm = (int)params[1];
    for (uint32_t i = 0; i < n; i++)
        scores[i] = 0;
    for (uint32_t r = 0; r < view->n_window; r++) {
        uint32_t n_seen = 0;
        while (n_seen < n && view->pos[n_seen] <= view->window_pos[r])
            n_seen++;
        const float weight = norm == NORM_SEES ? (float)n_seen : 1.0f;
        for (uint32_t g = 0; g < view->group; g++) {
            const float *const p = view->window_prob + ((size_t)r * view->group + g) * n;
            for (uint32_t i = 0; i < n_seen; i++)
                scores[i] += p[i] * weight;
        }
    }
    /* Rows that could see slot i: all, but for the window's own slots. */
    for (uint32_t i = 0, first = 0; i < n && view->n_window > 0; i++) {
        while (first < view->n_window && view->window_pos[first] < view->pos[i])
            first++;
        const uint32_t n_rows = norm == NORM_SEEN_BY ? view->n_window - first : view->n_window;
        scores[i] = n_rows == 0 ? 0 : scores[i] / (float)(n_rows * view->group);
    }
    for (uint32_t i = n - n_window; i < n; i++)
        scores[i] = INFINITY;
}

const kvs_policy_ops kvs_policy_finch = {
    .abi = KVS_POLICY_ABI,
    .name = "finch",
    .doc = "what the question attends to, moved together",
    .source = "arXiv:2408.00167",
    .exactness = "reconstructed: the question is the newest rows that ran, chunks are the budget's",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_WINDOW,
    .params = params_info,
    .n_params = 2,
    .score = score,
    .window_of = window_of,
};

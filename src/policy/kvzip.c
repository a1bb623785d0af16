/* KVzip: a slot matters if the model attends to it while it is made to repeat the context. Source: Kim et al.,
 * arXiv:2505.23416 and its repository: the largest attention that any row of the repetition and any head of the group gives
 * the slot; one threshold over all layers and heads.
 * KVzip+ asks how far the slot moves the row's residual stream: the attention times |W_o v| over the stream's length, before the
 * largest is taken. Source: Jegou and Jeblick, arXiv:2601.07891, and kvpress's KVzipPress(kvzip_plus_normalization), which
 * divides by the length of the normalised stream that attention reads (normed=1). */
#include "policy/policy.h"

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    const uint32_t n = view->n_slots;
    for (uint32_t i = 0; i < n; i++) {
        scores[i] = view->probe[i];
        for (uint32_t g = 1; g < view->group; g++) {
            const float p = view->probe[(size_t)g * n + i];
            scores[i] = p > scores[i] ? p : scores[i];
        }
    }
}

const kvs_policy_ops kvs_policy_kvzip = {
    .abi = KVS_POLICY_ABI,
    .name = "kvzip",
    .doc = "what the model attends to while it repeats the context",
    .source = "arXiv:2505.23416",
    .exactness = "exact for one eviction of a whole context; later ones repeat what the fullest head still holds",
    .schedule = "full",
    .position = "keep",
    .probe = "repeat",
    .budget = "global",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_PROBE,
    .score = score,
};

static const kvs_param_info plus_params[] = {
    {"normed", "1: over the length of the normalised stream, as kvpress", 0, 0, 1},
};

static uint32_t plus_needs(const double *params)
{
    return params[0] != 0 ? KVS_POLICY_NEEDS_PROBE_BY_INPUT : KVS_POLICY_NEEDS_PROBE_BY_STREAM;
}

static void score_plus(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    const uint32_t n = view->n_slots;
    for (uint32_t i = 0; i < n; i++) {
        scores[i] = view->probe[i] * view->out_length[i];
        for (uint32_t g = 1; g < view->group; g++) {
            const float p = view->probe[(size_t)g * n + i] * view->out_length[(size_t)g * n + i];
            scores[i] = p > scores[i] ? p : scores[i];
        }
    }
}

const kvs_policy_ops kvs_policy_kvzip_plus = {
    .abi = KVS_POLICY_ABI,
    .name = "kvzip+",
    .doc = "how far each slot moves the model's state while it repeats the context",
    .source = "arXiv:2601.07891",
    .exactness = "exact for one eviction of a whole context; later ones repeat what the fullest head still holds",
    .schedule = "full",
    .position = "keep",
    .probe = "repeat",
    .budget = "global",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_PROBE | KVS_POLICY_NEEDS_OUT_LENGTH,
    .needs_of = plus_needs,
    .params = plus_params,
    .n_params = 1,
    .score = score_plus,
};

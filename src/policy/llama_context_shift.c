/* What llama.cpp's users have today: keep n_keep tokens, drop the older half of the rest, move the remainder down.
 * Source: llama.cpp's server and main example, "context shift" (n_discard = n_left / 2, llama_memory_seq_rm + seq_add). */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"n_keep", "tokens kept at the start; 0 keeps none, as llama.cpp's default", 0, 0, 1e9},
};

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = (double)view->pos[i] < params[0] ? 2e9f : (float)i;
}

static uint32_t target(const double *params, const kvs_policy_view *view, uint32_t n_default)
{
    (void)n_default;
    const uint32_t n_keep = params[0] < view->n_slots ? (uint32_t)params[0] : view->n_slots;
    const uint32_t n_left = view->n_slots - n_keep;
    return view->n_slots - n_left / 2;
}

const kvs_policy_ops kvs_policy_llama_context_shift = {
    .abi = KVS_POLICY_ABI,
    .name = "llama_context_shift",
    .doc = "llama.cpp's context shift: drop the older half, re-rotate the rest",
    .source = "llama.cpp server, context shift",
    .exactness = "exact with +protect=none; keys are not rotated in place, so they do not drift",
    .schedule = "full",
    .position = "rerotate",
    .scope = KVS_SCOPE_SHARED,
    .params = params_info,
    .n_params = 1,
    .score = score,
    .target = target,
};

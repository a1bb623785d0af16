/* A cache policy in one file: keep what was attended to, and forget slowly. docs/write-a-policy.md explains the parts.
 *   cc -shared -fPIC -Iinclude -o my_policy.so docs/examples/my_policy.c
 *   build/kvasir run -p - --policy my_policy:half=200 --policy-plugin my_policy.so --budget 512tok < long.txt */
#include <kvasir_policy.h>

/* Name, what it is, default, least, most: `my_policy:half=200` sets it. */
static const kvs_param_info params_info[] = {
    {"half", "age in tokens at which attention counts half", 500, 1, 1e9},
};

/* One number a slot, higher stays. Slots are in order of pos, the token's place in the conversation. mass_sum is the
 * attention that the slot has had so far; it is there because `needs` below asks for it. */
static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const double half = params[0];
    for (uint32_t i = 0; i < view->n_slots; i++) {
        const double age = (double)(view->n_tokens - 1 - view->pos[i]);
        scores[i] = (float)(view->mass_sum[i] * half / (half + age));
    }
}

static const kvs_policy_ops my_policy = {
    .abi = KVS_POLICY_ABI,
    .name = "my_policy",
    .doc = "the most attended, older attention counting less",
    .source = "docs/examples/my_policy.c",
    .exactness = "exact",
    .schedule = "full",        /* evict when the cache is full */
    .position = "rerotate",    /* what stays moves together */
    .scope = KVS_SCOPE_SHARED, /* one keep set for all heads */
    .needs = KVS_POLICY_NEEDS_MASS_SUM,
    .params = params_info,
    .n_params = 1,
    .score = score,
};

const kvs_policy_ops *kvs_policy_plugin(uint32_t index)
{
    return index == 0 ? &my_policy : NULL;
}

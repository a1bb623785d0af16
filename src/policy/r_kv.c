/* R-KV: what the newest rows attend to, less how much a key repeats others. Source: Cai et al., arXiv:2505.24133 and its
 * repository (rkv/utils.py, r1_kv.py): lambda I - (1 - lambda) R. I: scores before the softmax, the largest of the group,
 * softmax over the slots before the window, mean over its 8 rows, maximum over 7 neighbours. R: kvs_key_redundancy,
 * threshold 0.5. lambda 0.1 as the paper (0.07 in the repository). There every 128 tokens when decoding (+schedule=every:128);
 * the repository also spares slot 0 for each key without a likeness, which is an accident of its indexing and left out.
 * SkipKV (arXiv:2512.07993) is built on it: whole sentences that were said again go before (select_unrepeated.c). Its combination
 * of sentence and token scores is not published; here the token's score alone ranks what is left. */
#include "policy/policy.h"

#include "kernels/kernels.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"lambda", "weight of attention against redundancy", 0.1, 0, 1},
    {"window", "newest rows, which stay", 8, 1, KVS_POLICY_WINDOW_MAX},
    {"kernel", "slots of which the largest attention counts, odd", 7, 1, 1023},
    {"threshold", "cosine above which a key is a copy", 0.5, -1, 1},
};

static uint32_t window_of(const double *params)
{
    return (uint32_t)params[1];
}

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)params;
    return 3 * (size_t)n_slots + kvs_key_redundancy_work(n_slots, head_dim);
}

/* Mean over the window's rows of the softmax over the first n slots of the group's largest score. row [n] is scratch. */
static void attention(const kvs_policy_view *view, uint32_t n, float *row, float *mean)
{
    for (uint32_t i = 0; i < n; i++)
        mean[i] = 0;
    for (uint32_t r = 0; r < view->n_window; r++) {
        const float *const logit = view->window_logit + (size_t)r * view->group * view->n_slots;
        float most = -INFINITY, sum = 0;
        for (uint32_t i = 0; i < n; i++) {
            row[i] = logit[i];
            for (uint32_t g = 1; g < view->group; g++) {
                const float x = logit[(size_t)g * view->n_slots + i];
                row[i] = x > row[i] ? x : row[i];
            }
            most = row[i] > most ? row[i] : most;
        }
        for (uint32_t i = 0; i < n; i++)
            sum += row[i] = kvs_expf(row[i] - most);
        for (uint32_t i = 0; i < n; i++)
            mean[i] += row[i] / sum / (float)view->n_window;
    }
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots - kvs_window_slots(view);
    const float lambda = (float)params[0];
    float *const mean = view->work, *const other = mean + view->n_slots, *const work = other + 2 * view->n_slots;
    attention(view, n, other, mean);
    kvs_pool_max(mean, n, (uint32_t)params[2] | 1u, scores);
    if (lambda < 1)
        kvs_key_redundancy(view, (float)params[3], other, work);
    for (uint32_t i = 0; i < n; i++)
        scores[i] = lambda < 1 ? lambda * scores[i] - (1 - lambda) * other[i] : scores[i];
    for (uint32_t i = n; i < view->n_slots; i++)
        scores[i] = INFINITY;
}

#define R_KV                                                                                                           \
    .abi = KVS_POLICY_ABI, .schedule = "full", .position = "keep", .scope = KVS_SCOPE_HEAD,                            \
    .needs = KVS_POLICY_NEEDS_WINDOW | KVS_POLICY_NEEDS_LOGITS | KVS_POLICY_NEEDS_KEYS, .params = params_info,         \
    .n_params = 4, .signed_scores = true, .score = score, .window_of = window_of, .work_of = work_of

const kvs_policy_ops kvs_policy_r_kv = {
    R_KV,
    .name = "r-kv",
    .doc = "what the newest rows attend to, less how much a key repeats others",
    .source = "arXiv:2505.24133",
    .exactness = "exact with +schedule=every:128; its repository treats slot 0 as every unlike key's copy",
};

const kvs_policy_ops kvs_policy_skipkv = {
    R_KV,
    .name = "skipkv",
    .doc = "sentences that a later one repeats go first, then as r-kv",
    .source = "arXiv:2512.07993",
    .exactness =
        "reconstructed: r-kv's score stands for the unpublished one; sentence ends and hidden states by our reading",
    .select = "unrepeated",
};

/* LagKV: a chunk's keys and values are measured in the range of the chunk behind it; slots that vary most over channels
 * stay. Source: Liang et al., arXiv:2504.04704 and kvpress's LagKVPress: sinks 4, lag 128; per chunk
 * softmax over slots of the standard deviation over channels of (x - min) / (max - min), mean of keys' and values'; as ranks
 * within the chunk, so that each chunk keeps an equal share, unless cross_scoring=1. Sinks, the last whole chunk and what
 * follows it stay; below sinks + 2 lag slots the newest do.
 * Chunks are of slots held, so that later evictions cut them elsewhere than the first. A channel that is constant in the
 * chunk behind counts as 0 (a division by zero there). */
#include "policy/policy.h"

#include <math.h>

static const kvs_param_info params_info[] = {
    {"sinks", "first slots, which stay", 4, 0, 4096},
    {"lag", "slots of a chunk", 128, 2, 4096},
    {"cross_scoring", "1: chunks compete by score instead of keeping equal shares", 0, 0, 1},
};

static size_t work_of(const double *params, uint32_t n_slots, uint32_t head_dim)
{
    (void)n_slots;
    return 2 * (size_t)params[1] + 2 * (size_t)head_dim;
}

/* Softmax over the `lag` slots at x of how unevenly each fills the range of the `lag` after them; low: [2 dh] scratch. */
static void spread(const kvs_policy_view *view, const float *x, uint32_t lag, float *low, float *out)
{
    const uint32_t dh = view->head_dim;
    float *const scale = low + dh;
    const float *const behind = x + (size_t)lag * dh;
    for (uint32_t d = 0; d < dh; d++) {
        float least = behind[d], most = behind[d];
        for (uint32_t i = 1; i < lag; i++) {
            const float v = behind[(size_t)i * dh + d];
            least = v < least ? v : least;
            most = v > most ? v : most;
        }
        low[d] = least;
        scale[d] = most > least ? 1.0f / (most - least) : 0.0f;
    }
    float top = 0;
    for (uint32_t i = 0; i < lag; i++) {
        double sum = 0, square = 0;
        for (uint32_t d = 0; d < dh; d++)
            sum += (double)((x[(size_t)i * dh + d] - low[d]) * scale[d]);
        const double mean = sum / dh;
        for (uint32_t d = 0; d < dh; d++) {
            const double off = (double)((x[(size_t)i * dh + d] - low[d]) * scale[d]) - mean;
            square += off * off;
        }
        out[i] = dh > 1 ? (float)sqrt(square / (dh - 1)) : 0.0f; /* unbiased, as torch's std */
        top = out[i] > top ? out[i] : top;
    }
    float sum = 0;
    view->exp_scale(out, lag, top, 1);
    for (uint32_t i = 0; i < lag; i++)
        sum += out[i];
    for (uint32_t i = 0; i < lag; i++)
        out[i] /= sum;
}

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    const uint32_t n = view->n_slots, dh = view->head_dim;
    const uint32_t sinks = kvs_min_u32((uint32_t)params[0], n), lag = (uint32_t)params[1];
    const bool cross = params[2] != 0;
    if (n < sinks + 2 * lag) {
        for (uint32_t i = 0; i < n; i++)
            scores[i] = i < sinks ? 1.0f : (float)(i - sinks) / (float)(n - sinks);
        return;
    }
    float *const of_keys = view->work, *const of_values = of_keys + lag, *const low = of_values + lag;
    const uint32_t n_chunks = (n - sinks) / lag;
    for (uint32_t i = 0; i < n; i++)
        scores[i] = 1;
    for (uint32_t c = 0; c + 1 < n_chunks; c++) {
        const uint32_t begin = sinks + c * lag;
        float *const into = scores + begin;
        spread(view, view->keys + (size_t)begin * dh, lag, low, of_keys);
        spread(view, view->values + (size_t)begin * dh, lag, low, of_values);
        for (uint32_t i = 0; i < lag; i++)
            of_keys[i] = (of_keys[i] + of_values[i]) / 2;
        for (uint32_t i = 0; i < lag; i++) {
            uint32_t rank = 0; /* of equals the newer ranks higher */
            for (uint32_t j = 0; j < lag && !cross; j++)
                rank += of_keys[j] < of_keys[i] || (j < i && of_keys[j] == of_keys[i]);
            into[i] = cross ? of_keys[i] : (float)rank / (float)lag;
        }
    }
}

const kvs_policy_ops kvs_policy_lagkv = {
    .abi = KVS_POLICY_ABI,
    .name = "lagkv",
    .doc = "what stands out in the range of the chunk behind it",
    .source = "arXiv:2504.04704",
    .exactness = "exact at the first eviction with +protect=none; later chunks are of slots held",
    .schedule = "full",
    .position = "keep",
    .scope = KVS_SCOPE_HEAD,
    .needs = KVS_POLICY_NEEDS_KEYS | KVS_POLICY_NEEDS_VALUES,
    .params = params_info,
    .n_params = 3,
    .score = score,
    .work_of = work_of,
};

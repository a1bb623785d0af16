/* What several scorers share: pooling over neighbours, and the mean of the window's attention. */
#include "policy/policy.h"

void kvs_pool_average(const float *in, uint32_t n, uint32_t kernel, float *out)
{
    const uint32_t half = kernel / 2;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t begin = i > half ? i - half : 0, end = kvs_min_u32(n, i + half + 1);
        float sum = 0;
        for (uint32_t j = begin; j < end; j++)
            sum += in[j];
        out[i] = sum / (float)kernel;
    }
}

void kvs_pool_max(const float *in, uint32_t n, uint32_t kernel, float *out)
{
    const uint32_t half = kernel / 2;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t begin = i > half ? i - half : 0, end = kvs_min_u32(n, i + half + 1);
        float most = in[begin];
        for (uint32_t j = begin + 1; j < end; j++)
            most = in[j] > most ? in[j] : most;
        out[i] = most;
    }
}

void kvs_window_mean(const kvs_policy_view *view, float *out)
{
    const uint32_t n = view->n_slots, rows = view->n_window * view->group;
    for (uint32_t i = 0; i < n; i++)
        out[i] = 0;
    for (uint32_t r = 0; r < rows; r++) {
        const float *const p = view->window_prob + (size_t)r * n;
        for (uint32_t i = 0; i < n; i++)
            out[i] += p[i];
    }
    const float scale = rows == 0 ? 0.0f : 1.0f / (float)rows;
    for (uint32_t i = 0; i < n; i++)
        out[i] *= scale;
}

uint32_t kvs_window_slots(const kvs_policy_view *view)
{
    uint32_t n = 0;
    while (n < view->n_slots && view->n_window > 0 && view->pos[view->n_slots - 1 - n] >= view->window_pos[0])
        n++;
    return n;
}

/* What several scorers share: pooling over neighbours, what the window attends to, how alike keys are. */
#include "policy/policy.h"

#include "kernels/kernels.h"

#include <math.h>

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

void kvs_window_max(const kvs_policy_view *view, float *out)
{
    const uint32_t n = view->n_slots;
    for (uint32_t i = 0; i < n; i++)
        out[i] = 0;
    for (uint32_t r = 0; r < view->n_window; r++) {
        const float *const p = view->window_prob + (size_t)r * view->group * n;
        for (uint32_t i = 0; i < n; i++) {
            float most = p[i];
            for (uint32_t g = 1; g < view->group; g++)
                most = p[(size_t)g * n + i] > most ? p[(size_t)g * n + i] : most;
            out[i] += most;
        }
    }
    const float scale = view->n_window == 0 ? 0.0f : 1.0f / (float)view->n_window;
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

enum { DOT_PARTS = 8 };

float kvs_dot(const float *a, const float *b, uint32_t n)
{
    float part[DOT_PARTS] = {0};
    uint32_t i = 0;
    for (; i + DOT_PARTS <= n; i += DOT_PARTS)
        for (uint32_t k = 0; k < DOT_PARTS; k++)
            part[k] += a[i + k] * b[i + k];
    for (; i < n; i++)
        part[i % DOT_PARTS] += a[i] * b[i];
    for (uint32_t half = DOT_PARTS / 2; half > 0; half /= 2)
        for (uint32_t k = 0; k < half; k++)
            part[k] += part[k + half];
    return part[0];
}

size_t kvs_key_redundancy_work(uint32_t n_slots, uint32_t head_dim)
{
    return (size_t)n_slots + head_dim;
}

/* The sum of a column of cosines is a product with the sum of all unit keys; only where each row's newest likeness is
 * has to be looked for, from the newest on. */
void kvs_key_redundancy(const kvs_policy_view *view, float threshold, float *out, float *work)
{
    const uint32_t n = view->n_slots, dh = view->head_dim;
    float *const inverse = work, *const sum = work + n;
    for (uint32_t d = 0; d < dh; d++)
        sum[d] = 0;
    for (uint32_t i = 0; i < n; i++) {
        const float *const k = view->keys + (size_t)i * dh;
        inverse[i] = 1.0f / (sqrtf(kvs_dot(k, k, dh)) + 1e-8f);
        for (uint32_t d = 0; d < dh; d++)
            sum[d] += k[d] * inverse[i];
    }
    for (uint32_t j = 0; j < n; j++) {
        const float *const k = view->keys + (size_t)j * dh;
        out[j] = (kvs_dot(k, sum, dh) - kvs_dot(k, k, dh) * inverse[j]) * inverse[j];
    }
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = n; j-- > 0;) {
            if (j == i)
                continue;
            const float alike =
                kvs_dot(view->keys + (size_t)i * dh, view->keys + (size_t)j * dh, dh) * inverse[i] * inverse[j];
            if (alike > threshold) {
                out[j] -= alike;
                break;
            }
        }
    float most = -INFINITY, total = 0;
    for (uint32_t j = 0; j < n; j++) {
        out[j] /= (float)n;
        most = out[j] > most ? out[j] : most;
    }
    for (uint32_t j = 0; j < n; j++)
        total += out[j] = kvs_expf(out[j] - most);
    for (uint32_t j = 0; j < n; j++)
        out[j] /= total;
}

/* From watches to numbers. */
#include "eval/routing.h"

#include <math.h>
#include <stdlib.h>

double kvs_drift(const float *a, const float *b, uint32_t n)
{
    double aa = 0, bb = 0, sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
    }
    if (!(aa > 0) || !(bb > 0))
        return NAN;
    const double na = sqrt(aa), nb = sqrt(bb);
    for (uint32_t i = 0; i < n; i++) {
        const double d = (double)a[i] / na - (double)b[i] / nb;
        sum += d * d;
    }
    return sum / 2;
}

static int descending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

double kvs_share_carrying(const double *score, uint32_t n, double share)
{
    double *const sorted = malloc((n + 1) * sizeof *sorted);
    double all = 0, sum = 0;
    uint32_t k = 0;
    if (sorted == NULL)
        return NAN;
    for (uint32_t i = 0; i < n; i++)
        sorted[i] = score[i];
    qsort(sorted, n, sizeof *sorted, descending);
    for (uint32_t i = 0; i < n; i++) /* in the order below, so that a share of 1 is reached by all of them */
        all += sorted[i];
    while (k < n && sum < share * all)
        sum += sorted[k++];
    free(sorted);
    return all > 0 ? (double)k / n : NAN;
}

/* Mean mass of a query, by layer. */
static double by_layer(const kvs_watch *w, double *out)
{
    double mean = 0;
    for (uint32_t l = 0; l < w->n_layers; l++) {
        double sum = 0;
        for (uint32_t h = 0; h < w->n_heads; h++)
            sum += w->mass[(size_t)l * w->n_heads + h];
        const bool any = w->n_answers > 0 && w->options.n_tokens > 0;
        out[l] = any ? sum / ((double)w->n_answers * w->n_heads) : NAN;
        mean += out[l] / w->n_layers;
    }
    return mean;
}

static void compare_hidden(const kvs_watch *w, const kvs_watch *ref, kvs_routing *out)
{
    const bool any = ref != NULL && w->n_answers > 0 && ref->n_answers == w->n_answers;
    out->drift = 0;
    for (uint32_t l = 0; l < w->n_layers; l++) {
        const size_t at = (size_t)l * w->n_embd;
        out->drift_l[l] = any ? kvs_drift(w->hidden + at, ref->hidden + at, w->n_embd) : NAN;
        out->drift += out->drift_l[l] / w->n_layers;
    }
    out->drift_last = out->drift_l[w->n_layers - 1];
}

static kvs_status look_at_channels(const kvs_session *s, const kvs_watch *w, kvs_routing *out, kvs_error *err)
{
    const uint32_t n_heads = w->n_layers * w->n_kv_heads;
    double *const score = calloc(w->head_dim, sizeof *score);
    kvs_status status = score != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for channels");
    out->key_channels_50 = out->key_channels_90 = 0;
    out->key_channels_min = INFINITY;
    out->key_channels_max = -INFINITY;
    for (uint32_t h = 0; h < n_heads && status == KVS_OK; h++) {
        status = kvs_watch_key_channels(w, s, h / w->n_kv_heads, h % w->n_kv_heads, score, err);
        const double high = kvs_share_carrying(score, w->head_dim, KVS_KEY_CHANNELS_HIGH);
        out->key_channels_lh[h] = high;
        out->key_channels_50 += kvs_share_carrying(score, w->head_dim, KVS_KEY_CHANNELS_LOW) / n_heads;
        out->key_channels_90 += high / n_heads;
        out->key_channels_min = fmin(out->key_channels_min, high);
        out->key_channels_max = fmax(out->key_channels_max, high);
    }
    free(score);
    return status;
}

kvs_status kvs_routing_make(const kvs_session *s, const kvs_watch *w, const kvs_watch *ref, kvs_routing *out,
                            kvs_error *err)
{
    const size_t n = w->n_layers;
    double *const numbers = calloc(n * (3 + w->n_kv_heads), sizeof *numbers);
    *out = (kvs_routing){0};
    if (numbers == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for diagnostics of %zu layers", n);
    *out = (kvs_routing){.n_layers = w->n_layers,
                         .n_kv_heads = w->n_kv_heads,
                         .utilisation_l = numbers,
                         .ref_utilisation_l = numbers + n,
                         .drift_l = numbers + 2 * n,
                         .key_channels_lh = numbers + 3 * n};
    out->utilisation = by_layer(w, out->utilisation_l);
    out->ref_utilisation = NAN;
    for (size_t l = 0; l < n; l++)
        out->ref_utilisation_l[l] = NAN;
    if (ref != NULL)
        out->ref_utilisation = by_layer(ref, out->ref_utilisation_l);
    compare_hidden(w, ref, out);
    const kvs_status status = look_at_channels(s, w, out, err);
    if (status != KVS_OK)
        kvs_routing_free(out);
    return status;
}

void kvs_routing_free(kvs_routing *r)
{
    free(r->utilisation_l);
    *r = (kvs_routing){0};
}

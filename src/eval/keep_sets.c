/* Keep sets of heads compared: sorted lists walked side by side. */
#include "eval/keep_sets.h"

#include <math.h>
#include <stdlib.h>

double kvs_eviction_ratio(const kvs_keep_set *sets, uint32_t n_sets, const int32_t *tokens, uint32_t n_tokens)
{
    uint32_t n_lost = 0;
    for (uint32_t t = 0; t < n_tokens; t++) {
        bool held = false;
        for (uint32_t s = 0; s < n_sets && !held; s++) {
            uint32_t low = 0, high = sets[s].n;
            while (low < high) { /* first position not below the token's */
                const uint32_t middle = low + (high - low) / 2;
                if (sets[s].pos[middle] < tokens[t])
                    low = middle + 1;
                else
                    high = middle;
            }
            held = low < sets[s].n && sets[s].pos[low] == tokens[t];
        }
        n_lost += !held;
    }
    return n_tokens > 0 ? (double)n_lost / n_tokens : NAN;
}

static double jaccard(const kvs_keep_set *a, const kvs_keep_set *b)
{
    uint32_t i = 0, j = 0, n_both = 0;
    while (i < a->n && j < b->n) {
        n_both += a->pos[i] == b->pos[j];
        const int32_t least = a->pos[i] < b->pos[j] ? a->pos[i] : b->pos[j];
        i += a->pos[i] == least;
        j += b->pos[j] == least;
    }
    const uint64_t n_either = (uint64_t)a->n + b->n - n_both;
    return n_either > 0 ? (double)n_both / (double)n_either : 1;
}

double kvs_head_consensus(const kvs_keep_set *sets, uint32_t n_sets)
{
    double sum = 0;
    for (uint32_t i = 0; i < n_sets; i++)
        for (uint32_t j = i + 1; j < n_sets; j++)
            sum += jaccard(&sets[i], &sets[j]);
    return n_sets > 1 ? sum / (n_sets * (n_sets - 1.0) / 2) : 1;
}

kvs_status kvs_keep_report_make(const kvs_model *m, const kvs_session *s, const int32_t *tokens, uint32_t n_tokens,
                                kvs_keep_report *out, kvs_error *err)
{
    *out = (kvs_keep_report){0};
    kvs_model_info info;
    kvs_model_get_info(m, &info);
    const uint32_t n_heads = info.n_layers * info.n_kv_heads;
    size_t n_slots = 0;
    for (uint32_t h = 0; h < n_heads; h++)
        n_slots += kvs_session_keep_set(s, h / info.n_kv_heads, h % info.n_kv_heads, NULL, NULL, 0);
    kvs_keep_set *const sets = calloc(n_heads, sizeof *sets);
    int32_t *const pos = calloc(n_slots + 1, sizeof *pos);
    double *const numbers = calloc((size_t)2 * info.n_layers, sizeof *numbers);
    if (sets == NULL || pos == NULL || numbers == NULL) {
        free(sets);
        free(pos);
        free(numbers);
        return kvs_error_set(err, KVS_ENOMEM, "no memory to compare %zu slots of %u heads", n_slots, n_heads);
    }
    size_t at = 0;
    for (uint32_t h = 0; h < n_heads; h++) {
        sets[h].pos = pos + at;
        sets[h].n =
            kvs_session_keep_set(s, h / info.n_kv_heads, h % info.n_kv_heads, pos + at, NULL, (uint32_t)(n_slots - at));
        at += sets[h].n;
    }
    *out = (kvs_keep_report){.ger = kvs_eviction_ratio(sets, n_heads, tokens, n_tokens),
                             .ger_layer_max = n_tokens > 0 ? 0 : NAN,
                             .n_layers = info.n_layers,
                             .consensus = numbers,
                             .ger_l = numbers + info.n_layers};
    for (uint32_t l = 0; l < info.n_layers; l++) {
        const kvs_keep_set *const of_layer = sets + (size_t)l * info.n_kv_heads;
        out->consensus[l] = kvs_head_consensus(of_layer, info.n_kv_heads);
        out->head_consensus += out->consensus[l] / info.n_layers;
        out->ger_l[l] = kvs_eviction_ratio(of_layer, info.n_kv_heads, tokens, n_tokens);
        if (out->ger_l[l] > out->ger_layer_max)
            out->ger_layer_max = out->ger_l[l];
    }
    free(sets);
    free(pos);
    return KVS_OK;
}

void kvs_keep_report_free(kvs_keep_report *r)
{
    free(r->consensus);
    *r = (kvs_keep_report){0};
}

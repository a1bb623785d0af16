/* Shaping by a chain of libllama's samplers in llama.cpp's own order: penalties, top-k, top-p, min-p, temperature. The
 * survivors are laid out by token before the draw, so the order a sampler leaves them in cannot matter. */
#include "model/sampler.h"

#include <llama.h>
#include <math.h>
#include <string.h>

struct kvs_sampler {
    const kvs_allocator *allocator;
    uint32_t vocab_size;
    kvs_sampling params;
    bool penalised;
    struct llama_sampler *chain;
    llama_token_data *candidates; /* [vocab_size] */
    float *shaped;                /* [vocab_size], -inf for what was cut */
};

static kvs_status check_params(const kvs_sampling *p, kvs_error *err)
{
    if (!(p->temperature >= 0.0f) || isinf(p->temperature))
        return kvs_error_set(err, KVS_EINVAL, "temperature is %g; 0 (greedy) or above is right",
                             (double)p->temperature);
    if (!(p->top_p > 0.0f && p->top_p <= 1.0f))
        return kvs_error_set(err, KVS_EINVAL, "top_p is %g; above 0 to 1 (off) is right", (double)p->top_p);
    if (!(p->min_p >= 0.0f && p->min_p < 1.0f))
        return kvs_error_set(err, KVS_EINVAL, "min_p is %g; 0 (off) to below 1 is right", (double)p->min_p);
    if (!(p->repeat_penalty > 0.0f) || isinf(p->repeat_penalty))
        return kvs_error_set(err, KVS_EINVAL, "repeat_penalty is %g; above 0 is right, 1 is off",
                             (double)p->repeat_penalty);
    if (p->top_k > INT32_MAX || p->repeat_last_tokens > INT32_MAX)
        return kvs_error_set(err, KVS_EINVAL, "%s is %u; at most 2^31 - 1 is right",
                             p->top_k > INT32_MAX ? "top_k" : "repeat_last_tokens",
                             p->top_k > INT32_MAX ? p->top_k : p->repeat_last_tokens);
    return KVS_OK;
}

static bool build_chain(kvs_sampler *s)
{
    const kvs_sampling *p = &s->params;
    struct llama_sampler_chain_params chain = llama_sampler_chain_default_params();
    chain.no_perf = true;
    s->chain = llama_sampler_chain_init(chain);
    if (s->chain == NULL)
        return false;
    if (s->penalised)
        llama_sampler_chain_add(s->chain,
                                llama_sampler_init_penalties((int32_t)s->vocab_size, (int32_t)p->repeat_last_tokens,
                                                             p->repeat_penalty, 0.0f, 0.0f));
    if (p->temperature == 0.0f)
        return true;
    if (p->top_k != 0 && p->top_k < s->vocab_size)
        llama_sampler_chain_add(s->chain, llama_sampler_init_top_k((int32_t)p->top_k));
    if (p->top_p < 1.0f)
        llama_sampler_chain_add(s->chain, llama_sampler_init_top_p(p->top_p, 1));
    if (p->min_p > 0.0f)
        llama_sampler_chain_add(s->chain, llama_sampler_init_min_p(p->min_p, 1));
    llama_sampler_chain_add(s->chain, llama_sampler_init_temp(p->temperature));
    return true;
}

kvs_status kvs_sampler_create(const kvs_allocator *a, uint32_t vocab_size, const kvs_sampling *params,
                              kvs_sampler **out, kvs_error *err)
{
    *out = NULL;
    KVS_TRY(check_params(params, err));
    if (vocab_size == 0 || vocab_size > INT32_MAX)
        return kvs_error_set(err, KVS_EINVAL, "vocab_size is %u; 1 to 2^31 - 1 is right", vocab_size);
    kvs_sampler *s = kvs_alloc(a, 1, sizeof *s);
    if (s == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a sampler");
    s->allocator = a;
    s->vocab_size = vocab_size;
    s->params = *params;
    s->penalised = params->repeat_penalty != 1.0f && params->repeat_last_tokens > 0;
    s->candidates = kvs_alloc(a, vocab_size, sizeof *s->candidates);
    s->shaped = kvs_alloc(a, vocab_size, sizeof *s->shaped);
    if (s->candidates == NULL || s->shaped == NULL || !build_chain(s)) {
        kvs_sampler_free(s);
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a sampler over %u tokens", vocab_size);
    }
    *out = s;
    return KVS_OK;
}

void kvs_sampler_free(kvs_sampler *s)
{
    if (s == NULL)
        return;
    if (s->chain != NULL)
        llama_sampler_free(s->chain);
    kvs_free(s->allocator, s->candidates);
    kvs_free(s->allocator, s->shaped);
    kvs_free(s->allocator, s);
}

/* Lowest index of the largest; -1 if all are -inf or NaN. */
static int32_t argmax(const float *x, uint32_t n)
{
    int32_t best = -1;
    float top = -INFINITY;
    for (uint32_t i = 0; i < n; i++)
        if (x[i] > top) {
            top = x[i];
            best = (int32_t)i;
        }
    return best;
}

static void shape(kvs_sampler *s, const float *logits)
{
    for (uint32_t i = 0; i < s->vocab_size; i++) /* NaN would break the samplers' sorting */
        s->candidates[i] =
            (llama_token_data){.id = (llama_token)i, .logit = isnan(logits[i]) ? -INFINITY : logits[i], .p = 0.0f};
    llama_token_data_array array = {.data = s->candidates, .size = s->vocab_size, .selected = -1, .sorted = false};
    llama_sampler_apply(s->chain, &array);
    for (uint32_t i = 0; i < s->vocab_size; i++)
        s->shaped[i] = -INFINITY;
    for (size_t i = 0; i < array.size; i++)
        s->shaped[array.data[i].id] = array.data[i].logit;
}

int32_t kvs_sampler_pick(kvs_sampler *s, const float *logits, uint64_t token_idx)
{
    const bool greedy = s->params.temperature == 0.0f;
    if (argmax(logits, s->vocab_size) < 0)
        return -1;
    if (greedy && !s->penalised)
        return argmax(logits, s->vocab_size);
    shape(s, logits);
    const int32_t top = argmax(s->shaped, s->vocab_size);
    if (greedy || top < 0 || isinf(s->shaped[top])) /* +inf is no distribution: it is the answer */
        return top;
    const double max = (double)s->shaped[top];
    double total = 0.0;
    for (uint32_t i = 0; i < s->vocab_size; i++)
        if (s->shaped[i] > -INFINITY)
            total += exp((double)s->shaped[i] - max);
    const double u = (double)(kvs_hash3(s->params.seed, token_idx, 0) >> 11) * 0x1p-53 * total;
    double below = 0.0;
    int32_t last = top;
    for (uint32_t i = 0; i < s->vocab_size; i++) {
        if (!(s->shaped[i] > -INFINITY))
            continue;
        const double p = exp((double)s->shaped[i] - max);
        below += p;
        if (p > 0.0)
            last = (int32_t)i;
        if (below > u)
            return (int32_t)i;
    }
    return last; /* u rounded up to the total */
}

void kvs_sampler_accept(kvs_sampler *s, int32_t token)
{
    if (s->penalised && token >= 0 && (uint32_t)token < s->vocab_size)
        llama_sampler_accept(s->chain, token);
}

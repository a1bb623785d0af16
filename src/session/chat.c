/* Generation and turns: sample, feed, stop; the template's pieces around what was said. */
#include "session/session_internal.h"

#include "model/chat_template.h"
#include "model/sampler.h"

#include <string.h>

void kvs_sampling_default(kvs_sampling *p)
{
    *p = (kvs_sampling){
        .temperature = 0, .top_p = 1, .repeat_penalty = 1, .repeat_last_tokens = 64, .seed = 1, .max_tokens = 256};
}

/* One answer: the rows it feeds are flagged as the assistant's. */
typedef struct answer {
    kvs_session *s;
    const kvs_sampling *params;
    kvs_sampler *sampler;
    kvs_token_fn on_token;
    void *ctx;
    bool feed_eog;
    uint64_t t_submit, t_first, t_last;
    uint32_t n;
    const char *stop;
} answer;

static bool emit(answer *a, int32_t token)
{
    char text[256];
    const size_t n = kvs_token_text(a->s->model, token, false, text, sizeof text);
    return a->on_token == NULL || a->on_token(a->ctx, token, text, n < sizeof text ? n : sizeof text);
}

/* Samples until something stops it. logits hold the distribution of the next token, and do again afterwards. */
static kvs_status produce(answer *a, float *logits, kvs_error *err)
{
    static const uint8_t flag = KVS_TOKEN_ASSISTANT;
    a->stop = "length";
    while (a->n < a->params->max_tokens) {
        const int32_t token = kvs_sampler_pick(a->sampler, logits, a->s->n_tokens);
        if (token < 0)
            return kvs_error_set(err, KVS_EBACKEND, "no token can be drawn: the logits are not numbers");
        a->t_last = kvs_now_ns();
        if (a->n++ == 0)
            a->t_first = a->t_last;
        const bool eog = kvs_token_is_eog(a->s->model, token);
        if (eog && !a->feed_eog) {
            a->stop = "eog";
            return KVS_OK;
        }
        kvs_sampler_accept(a->sampler, token);
        const bool go_on = eog || emit(a, token);
        KVS_TRY(kvs_session_extend(a->s, &token, &flag, 1, logits, err));
        if (eog || !go_on) {
            a->stop = eog ? "eog" : "cancelled";
            return KVS_OK;
        }
    }
    return KVS_OK;
}

static void report(const answer *a, uint32_t n_prompt, uint64_t t_prefilled, kvs_generation *out)
{
    if (out == NULL)
        return;
    *out = (kvs_generation){
        .n_prompt_tokens = n_prompt,
        .n_tokens = a->n,
        .stop = a->stop,
        .ttft_ms = a->n > 0 ? (double)(a->t_first - a->t_submit) / 1e6 : 0,
        .tpot_ms = a->n > 1 ? (double)(a->t_last - a->t_first) / 1e6 / (a->n - 1) : 0,
        .prefill_ms = (double)(t_prefilled - a->t_submit) / 1e6,
        .total_ms = (double)(kvs_now_ns() - a->t_submit) / 1e6,
    };
}

kvs_status kvs_generate(kvs_session *s, float *logits, const kvs_sampling *params, kvs_token_fn on_token, void *ctx,
                        kvs_generation *result, kvs_error *err)
{
    kvs_sampling defaults;
    kvs_sampling_default(&defaults);
    answer a = {.s = s,
                .params = params != NULL ? params : &defaults,
                .on_token = on_token,
                .ctx = ctx,
                .feed_eog = true,
                .t_submit = kvs_now_ns()};
    KVS_TRY(kvs_sampler_create(s->allocator, s->model->info.vocab_size, a.params, &a.sampler, err));
    const kvs_status status = produce(&a, logits, err);
    kvs_sampler_free(a.sampler);
    report(&a, 0, a.t_submit, result);
    return status;
}

/* ---- turns ---- */

static kvs_status render_prompt(const kvs_session *s, const char *user, const char *system, kvs_rendered *out,
                                kvs_error *err)
{
    const kvs_message first[] = {{"system", system}, {"user", user}};
    const kvs_message later[] = {{"user", "x"}, {"assistant", "x"}, {"user", user}};
    if (s->n_tokens > 0)
        return kvs_chat_render(s->model, later, 3, 2, true, out, err);
    return system != NULL ? kvs_chat_render(s->model, first, 2, 0, true, out, err)
                          : kvs_chat_render(s->model, first + 1, 1, 0, true, out, err);
}

static kvs_status run_turn(answer *a, const kvs_rendered *prompt, const kvs_rendered *tail, float *logits,
                           uint64_t *t_prefilled, kvs_error *err)
{
    kvs_session *s = a->s;
    KVS_TRY(kvs_session_turn_begin(s, err));
    KVS_TRY(kvs_session_extend(s, prompt->tokens, prompt->flags, (uint32_t)prompt->n_tokens, logits, err));
    *t_prefilled = kvs_now_ns();
    for (size_t i = 0; i < prompt->n_tokens; i++)
        kvs_sampler_accept(a->sampler, prompt->tokens[i]);
    KVS_TRY(produce(a, logits, err));
    /* The script never feeds the end marker, which leaves every stored answer without one. */
    if (!s->options.paper_compat)
        KVS_TRY(kvs_session_extend(s, tail->tokens, tail->flags, (uint32_t)tail->n_tokens, NULL, err));
    return kvs_session_turn_end(s, err);
}

kvs_status kvs_chat_turn(kvs_session *s, const char *user, const char *system, const kvs_sampling *params,
                         kvs_token_fn on_token, void *ctx, kvs_generation *result, kvs_error *err)
{
    kvs_sampling defaults;
    kvs_sampling_default(&defaults);
    answer a = {.s = s,
                .params = params != NULL ? params : &defaults,
                .on_token = on_token,
                .ctx = ctx,
                .t_submit = kvs_now_ns(),
                .stop = "failed"};
    kvs_rendered prompt = {0}, tail = {0};
    uint64_t t_prefilled = a.t_submit;
    float *logits = NULL;
    kvs_status status = render_prompt(s, user, system, &prompt, err);
    if (status == KVS_OK)
        status = kvs_chat_turn_end(s->model, &tail, err);
    if (status == KVS_OK)
        status = kvs_sampler_create(s->allocator, s->model->info.vocab_size, a.params, &a.sampler, err);
    if (status == KVS_OK && (logits = kvs_alloc(s->allocator, s->model->info.vocab_size, sizeof *logits)) == NULL)
        status = kvs_error_set(err, KVS_ENOMEM, "no memory for a row of logits");
    if (status == KVS_OK)
        status = run_turn(&a, &prompt, &tail, logits, &t_prefilled, err);
    report(&a, (uint32_t)prompt.n_tokens, t_prefilled, result);
    kvs_free(s->allocator, logits);
    kvs_sampler_free(a.sampler);
    kvs_rendered_free(&prompt);
    kvs_rendered_free(&tail);
    return status;
}

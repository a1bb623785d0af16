/* Small pieces of records: numbers that may be null, ranges, position indices, the rendered script. */
#include "bench/play.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

json_t *kvs_json_real(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

json_t *kvs_json_ms(uint64_t ns)
{
    return json_real((double)ns / 1e6);
}

json_t *kvs_json_ranges(const int32_t *pos, uint32_t n, uint32_t max_ranges)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < n;) {
        uint32_t end = i + 1;
        while (end < n && pos[end] == pos[end - 1] + 1)
            end++;
        if (json_array_size(list) == max_ranges) {
            json_decref(list);
            return json_null();
        }
        json_array_append_new(list, json_pack("[i,i]", (int)pos[i], (int)pos[end - 1]));
        i = end;
    }
    return list;
}

void kvs_record_positions(json_t *row, const kvs_session *s)
{
    kvs_positions p;
    kvs_session_get_positions(s, &p);
    const struct {
        const char *name;
        double value;
    } all[] = {
        {"ldd", p.ldd},
        {"rddi", p.rddi},
        {"future", p.future},
        {"out_of_window", p.out_of_window},
        {"collision", p.collision},
        {"order", p.order},
        {"backward", p.backward},
        {"gap", p.gap},
        {"seam", p.seam},
        {"adjacency", p.adjacency},
        {"prefix", p.prefix},
        {"template_integrity", p.template_integrity},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        json_object_set_new(row, all[i].name, kvs_json_real(all[i].value));
}

uint64_t kvs_peak_rss_bytes(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (uint64_t)u.ru_maxrss * 1024;
}

bool kvs_play_cancelled(const kvs_play *p)
{
    return p->opt->cancel != NULL && *p->opt->cancel != 0;
}

/* What a fork of the full cache has: what stands in the slots, the queries of rows read since, and the mass of the latest
 * forward where the trunk records it. Whatever else a policy needs is a sum over all rows so far, or its own. */
enum {
    NEEDS_OF_A_FORK = KVS_POLICY_NEEDS_MASS_LAST | KVS_POLICY_NEEDS_KEYS | KVS_POLICY_NEEDS_KEYS_RAW |
                      KVS_POLICY_NEEDS_VALUES | KVS_POLICY_NEEDS_WINDOW | KVS_POLICY_NEEDS_LOGITS |
                      KVS_POLICY_NEEDS_PAIRS | KVS_POLICY_NEEDS_PROBE | KVS_POLICY_NEEDS_OUT_NORM
};

/* Stages that remember no rows. One that is not listed plays alone from the first token: slower, never wrong. */
static bool remembers_nothing(const kvs_choice_info *stage)
{
    static const char *const names[] = {"pyramid", "ada", "global", "composite", "skip", "chunk", "block", "sentence"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (stage == NULL || strcmp(stage->name, names[i]) == 0)
            return true;
    return false;
}

bool kvs_play_shares(const kvs_bench_run_spec *run, const kvs_policy *policy, uint32_t end)
{
    const uint32_t needs = kvs_policy_needs(policy), window = kvs_policy_window(policy);
    if ((needs & ~(uint32_t)NEEDS_OF_A_FORK) != 0 ||
        !remembers_nothing(policy->budget == NULL ? NULL : &policy->budget->info) ||
        !remembers_nothing(policy->select == NULL ? NULL : &policy->select->info))
        return false;
    return run->first_tokens >= end && run->first_tokens - end >= window;
}

void kvs_play_options(const kvs_play *p, const kvs_bench_run_spec *run, uint32_t n_tokens, kvs_session_options *o)
{
    kvs_session_options_default(o);
    o->policy = run->policy;
    o->position = run->position;
    o->arith = p->arith;
    o->kv_type = p->kv_type;
    o->seed = p->opt->seed;
    o->paper_compat = p->opt->paper_compat && !run->is_reference;
    o->budget_bytes = run->budget_bytes;
    o->budget_tokens = run->budget_bytes != 0 ? 0 : run->budget_tokens != 0 ? run->budget_tokens : n_tokens;
}

/* ---- the script ---- */

static kvs_status append(kvs_script *s, const kvs_rendered *r, kvs_error *err)
{
    const size_t n = s->n_tokens + r->n_tokens;
    int32_t *tokens = realloc(s->tokens, n * sizeof *tokens);
    if (tokens != NULL)
        s->tokens = tokens;
    uint8_t *flags = realloc(s->flags, n);
    if (flags != NULL)
        s->flags = flags;
    if (tokens == NULL || flags == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a dialogue of %zu tokens", n);
    memcpy(s->tokens + s->n_tokens, r->tokens, r->n_tokens * sizeof *tokens);
    memcpy(s->flags + s->n_tokens, r->flags, r->n_tokens);
    s->n_tokens = (uint32_t)n;
    return KVS_OK;
}

static kvs_status render_turn(const kvs_model *m, const kvs_message *messages, size_t from, size_t end, kvs_script *s,
                              kvs_error *err)
{
    kvs_rendered r;
    KVS_TRY(kvs_chat_render(m, messages, end, from, false, &r, err));
    kvs_script_turn *t = &s->turns[s->n_turns++];
    t->begin = s->n_tokens;
    t->message_end = (uint32_t)end;
    kvs_status status = append(s, &r, err);
    t->end = s->n_tokens;
    t->answer = t->end;
    for (uint32_t i = t->begin; i < t->end; i++)
        if (s->flags[i] & KVS_TOKEN_ASSISTANT && !(s->flags[i] & KVS_TOKEN_TEMPLATE)) {
            t->answer = i;
            break;
        }
    kvs_rendered_free(&r);
    return status;
}

kvs_message *kvs_script_messages(const kvs_dialogue *d)
{
    kvs_message *messages = calloc(d->n_messages, sizeof *messages);
    for (uint32_t i = 0; messages != NULL && i < d->n_messages; i++)
        messages[i] = (kvs_message){d->messages[i].role, d->messages[i].content};
    return messages;
}

kvs_status kvs_script_render(const kvs_model *m, const kvs_dialogue *d, kvs_script *out, kvs_error *err)
{
    *out = (kvs_script){.id = d->id, .dialogue = d};
    kvs_message *messages = kvs_script_messages(d);
    out->turns = calloc(d->n_messages, sizeof *out->turns);
    kvs_status status = messages != NULL && out->turns != NULL
                            ? KVS_OK
                            : kvs_error_set(err, KVS_ENOMEM, "no memory for %u messages", d->n_messages);
    size_t from = 0;
    for (uint32_t i = 0; i < d->n_messages && status == KVS_OK; i++)
        if (strcmp(d->messages[i].role, "assistant") == 0) {
            status = render_turn(m, messages, from, i + 1, out, err);
            from = i + 1;
        }
    free(messages);
    if (status == KVS_OK && out->n_turns == 0)
        status = kvs_error_set(err, KVS_EFORMAT, "dialogue %s has no assistant message", d->id);
    if (status != KVS_OK)
        kvs_script_free(out);
    return status;
}

void kvs_script_free(kvs_script *s)
{
    free(s->tokens);
    free(s->flags);
    free(s->turns);
    *s = (kvs_script){0};
}

void kvs_script_cut(kvs_script *s, uint32_t n_tokens)
{
    if (n_tokens >= s->n_tokens)
        return;
    s->n_tokens = n_tokens;
    while (s->turns[s->n_turns - 1].begin >= n_tokens)
        s->n_turns--;
    kvs_script_turn *last = &s->turns[s->n_turns - 1];
    last->end = n_tokens;
    last->answer = kvs_min_u32(last->answer, n_tokens);
}

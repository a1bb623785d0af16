/* The Extended Dialogue Generator: whole real dialogues one after another until a token count is reached, which is
 * how arXiv 2511.04686 gets ShareGPT conversations past a context window. Invents no text but the fixed connector. */
#include "bench/dialogue.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char connector_user[] = "Thank you, that answers it. I would like to talk about something else now.";
static const char connector_assistant[] = "You are welcome. What would you like to talk about?";

typedef struct chain {
    const kvs_dialogue_set *set;
    const kvs_extend_options *opt;
    kvs_dialogue_count_fn count;
    void *ctx;
    kvs_rng rng;
    uint32_t *order; /* [n_order] indices of usable sources, in the current shuffle */
    uint32_t n_order, at;
    uint32_t *last_use; /* [n_items] 1 + the output dialogue that last used the source */
    kvs_error *err;
} chain;

/* An exchange is a user message and the assistant message right after it. Returns its first index at or after from,
 * or n_messages. */
static uint32_t find_exchange(const kvs_dialogue *d, uint32_t from)
{
    for (uint32_t i = from; i + 1 < d->n_messages; i++)
        if (strcmp(d->messages[i].role, "user") == 0 && strcmp(d->messages[i + 1].role, "assistant") == 0)
            return i;
    return d->n_messages;
}

/* Fisher-Yates, then sources that the dialogue being built already has go last: a conversation that repeats itself
 * word for word is not what a long conversation looks like, so that happens only when the set is too small. */
static void shuffle(chain *c, uint32_t out_idx)
{
    for (uint32_t i = c->n_order; i > 1; i--) {
        const uint32_t j = kvs_rng_below(&c->rng, i), t = c->order[i - 1];
        c->order[i - 1] = c->order[j];
        c->order[j] = t;
    }
    uint32_t n_fresh = 0;
    for (uint32_t i = 0; i < c->n_order; i++) {
        const uint32_t source = c->order[i];
        if (c->last_use[source] == out_idx + 1)
            continue;
        memmove(&c->order[n_fresh + 1], &c->order[n_fresh], (i - n_fresh) * sizeof *c->order);
        c->order[n_fresh++] = source;
    }
    c->at = 0;
}

static uint64_t count_pair(const chain *c, const char *user, const char *assistant)
{
    return (uint64_t)c->count(c->ctx, "user", user) + c->count(c->ctx, "assistant", assistant);
}

static kvs_status append_pair(const chain *c, kvs_dialogue *d, const char *user, const char *assistant,
                              uint32_t source_idx, uint32_t part)
{
    const bool generated = source_idx == KVS_DIALOGUE_GENERATED;
    KVS_TRY(kvs_dialogue_append(d, "user", user, source_idx, false, c->err));
    d->messages[d->n_messages - 1].part = part;
    KVS_TRY(kvs_dialogue_append(d, "assistant", assistant, generated ? source_idx : source_idx + 1, false, c->err));
    d->messages[d->n_messages - 1].part = part;
    return KVS_OK;
}

/* Appends the exchanges of one source until the target. *done: the target is reached or the next exchange would pass
 * it. */
static kvs_status append_source(const chain *c, kvs_dialogue *d, const kvs_dialogue *source, uint32_t part,
                                uint64_t *total_tokens, bool *done)
{
    for (uint32_t i = find_exchange(source, 0); i < source->n_messages; i = find_exchange(source, i + 2)) {
        const kvs_dialogue_message *m = &source->messages[i];
        const bool connect = c->opt->connector && d->n_messages && d->messages[d->n_messages - 1].part != part;
        uint64_t n_tokens = count_pair(c, m[0].content, m[1].content);
        if (connect)
            n_tokens += count_pair(c, connector_user, connector_assistant);
        if (c->opt->at_most && *total_tokens + n_tokens > c->opt->target_tokens) {
            *done = d->n_messages > 0; /* nothing fitted yet: another source may start with a shorter exchange */
            return KVS_OK;
        }
        if (connect)
            KVS_TRY(append_pair(c, d, connector_user, connector_assistant, KVS_DIALOGUE_GENERATED, part));
        KVS_TRY(append_pair(c, d, m[0].content, m[1].content, m[0].source_idx, part));
        d->messages[d->n_messages - 1].source_idx = m[1].source_idx;
        *total_tokens += n_tokens;
        if (*total_tokens >= c->opt->target_tokens) {
            *done = true;
            return KVS_OK;
        }
    }
    return KVS_OK;
}

static kvs_status append_id(kvs_dialogue *d, const char *more, kvs_error *err)
{
    const size_t n_old = strlen(d->id), n_more = strlen(more);
    char *id = realloc(d->id, n_old + n_more + 2);
    if (!id)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %zu bytes of an id", n_old + n_more + 2);
    id[n_old] = '+';
    memcpy(id + n_old + 1, more, n_more + 1);
    d->id = id;
    return KVS_OK;
}

static kvs_status build(chain *c, uint32_t out_idx, kvs_dialogue *d)
{
    const char *name = c->set->name ? c->set->name : "a set";
    if (asprintf(&d->id, "chain-%" PRIu64 "-%u", c->opt->seed, out_idx) < 0)
        d->id = NULL;
    if (asprintf(&d->origin, "extended from %s to %s%u tokens", name, c->opt->at_most ? "at most " : "",
                 c->opt->target_tokens) < 0)
        d->origin = NULL;
    if (!d->id || !d->origin)
        return kvs_error_set(c->err, KVS_ENOMEM, "no memory for the id of a dialogue");
    d->has_assistant = true;
    uint64_t total_tokens = 0;
    uint32_t n_refused = 0, part = 0;
    for (bool done = false; !done;) {
        if (c->at == c->n_order)
            shuffle(c, out_idx);
        const uint32_t source = c->order[c->at++];
        const uint32_t n_before = d->n_messages;
        const uint64_t n_tokens_before = total_tokens;
        KVS_TRY(append_source(c, d, &c->set->items[source], part, &total_tokens, &done));
        if (d->n_messages > n_before) {
            KVS_TRY(append_id(d, c->set->items[source].id ? c->set->items[source].id : "?", c->err));
            c->last_use[source] = out_idx + 1;
            part++;
        }
        /* Two passes over the shuffle meet every source at least once. Without this end, a counter that answers 0
         * would let a dialogue grow for ever. */
        n_refused = total_tokens > n_tokens_before ? 0 : n_refused + 1;
        if (!done && n_refused == 2 * c->n_order)
            return kvs_error_set(c->err, KVS_EINVAL,
                                 "no dialogue of %s has an exchange of 1 to %u tokens to begin with", name,
                                 c->opt->target_tokens);
    }
    return KVS_OK;
}

static kvs_status prepare(chain *c)
{
    c->order = calloc((size_t)c->set->n_items + 1, sizeof *c->order);
    c->last_use = calloc((size_t)c->set->n_items + 1, sizeof *c->last_use);
    if (!c->order || !c->last_use)
        return kvs_error_set(c->err, KVS_ENOMEM, "no memory for the order of %u dialogues", c->set->n_items);
    for (uint32_t i = 0; i < c->set->n_items; i++)
        if (find_exchange(&c->set->items[i], 0) < c->set->items[i].n_messages)
            c->order[c->n_order++] = i;
    if (c->n_order == 0)
        return kvs_error_set(c->err, KVS_EINVAL, "none of the %u dialogues of %s has a user message with an answer",
                             c->set->n_items, c->set->name ? c->set->name : "the set");
    c->at = c->n_order;
    return KVS_OK;
}

static kvs_status build_all(chain *c, uint32_t n_out, kvs_dialogue_set *out)
{
    KVS_TRY(prepare(c));
    if (asprintf(&out->name, "%s-chained", c->set->name ? c->set->name : "set") < 0)
        out->name = NULL;
    out->licence = strdup(c->set->licence ? c->set->licence : "unknown");
    out->notes = strdup("");
    if (!out->name || !out->licence || !out->notes)
        return kvs_error_set(c->err, KVS_ENOMEM, "no memory for the description of a set");
    out->xxh64 = c->set->xxh64;
    out->n_bytes = c->set->n_bytes;
    for (uint32_t i = 0; i < n_out; i++) {
        kvs_dialogue d = {0};
        kvs_status status = build(c, i, &d);
        if (status == KVS_OK)
            status = kvs_dialogue_set_append(out, &d, c->err);
        kvs_dialogue_free(&d);
        KVS_TRY(status);
    }
    return KVS_OK;
}

kvs_status kvs_dialogue_extend(const kvs_dialogue_set *set, const kvs_extend_options *opt, kvs_dialogue_count_fn count,
                               void *ctx, uint32_t n_out, kvs_dialogue_set *out, kvs_error *err)
{
    memset(out, 0, sizeof *out);
    if (opt->target_tokens == 0)
        return kvs_error_set(err, KVS_EINVAL, "target_tokens is 0; a dialogue needs at least 1 token");
    chain c = {.set = set, .opt = opt, .count = count, .ctx = ctx, .err = err};
    c.rng.state = kvs_hash3(opt->seed, 0, 0);
    const kvs_status status = build_all(&c, n_out, out);
    free(c.order);
    free(c.last_use);
    if (status != KVS_OK)
        kvs_dialogue_set_free(out);
    return status;
}

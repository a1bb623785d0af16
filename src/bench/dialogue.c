/* Dialogues and dialogue sets: ownership, appending, de-duplication, JSON out. Does not read files (dialogue_load.c)
 * and invents no text (dialogue_extend.c, dialogue_facts.c). */
#include "bench/dialogue.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

void kvs_dialogue_free(kvs_dialogue *d)
{
    if (!d)
        return;
    for (uint32_t i = 0; i < d->n_messages; i++)
        free(d->messages[i].content);
    for (uint32_t i = 0; i < d->n_facts; i++) {
        kvs_dialogue_fact *f = &d->facts[i];
        for (uint32_t c = 0; c < f->n_candidates; c++)
            free(f->candidates[c]);
        free(f->candidates);
        free(f->question);
        free(f->gold);
    }
    free(d->messages);
    free(d->facts);
    free(d->id);
    free(d->origin);
    memset(d, 0, sizeof *d);
}

void kvs_dialogue_set_free(kvs_dialogue_set *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; i < s->n_items; i++)
        kvs_dialogue_free(&s->items[i]);
    free(s->items);
    free(s->name);
    free(s->path);
    free(s->licence);
    free(s->notes);
    memset(s, 0, sizeof *s);
}

const char *kvs_dialogue_role(const char *spelling)
{
    static const struct {
        const char *spelling, *role;
    } roles[] = {
        {"user", "user"},           {"human", "user"},     {"prompter", "user"},
        {"assistant", "assistant"}, {"gpt", "assistant"},  {"chatgpt", "assistant"},
        {"bing", "assistant"},      {"bard", "assistant"}, {"system", "system"},
    };
    for (size_t i = 0; i < sizeof roles / sizeof *roles; i++)
        if (strcmp(spelling, roles[i].spelling) == 0)
            return roles[i].role;
    return NULL;
}

static kvs_status out_of_memory(kvs_error *err, size_t n_bytes)
{
    return kvs_error_set(err, KVS_ENOMEM, "no memory for %zu bytes of a dialogue", n_bytes);
}

/* Room for one more element in a doubling array. */
static void *grow(void *items, uint32_t n, uint32_t *cap, size_t size_bytes)
{
    if (n < *cap)
        return items;
    const uint32_t cap_new = *cap ? *cap * 2 : 8;
    size_t n_bytes;
    if (cap_new < *cap || !kvs_mul_size(cap_new, size_bytes, &n_bytes))
        return NULL;
    void *grown = realloc(items, n_bytes);
    if (grown)
        *cap = cap_new;
    return grown;
}

kvs_status kvs_dialogue_append(kvs_dialogue *d, const char *role, const char *content, uint32_t source_idx, bool merge,
                               kvs_error *err)
{
    kvs_dialogue_message *last = d->n_messages ? &d->messages[d->n_messages - 1] : NULL;
    const size_t n_content = strlen(content);
    if (merge && last && strcmp(last->role, role) == 0) {
        const size_t n_last = strlen(last->content);
        char *joined = realloc(last->content, n_last + n_content + 3);
        if (!joined)
            return out_of_memory(err, n_last + n_content + 3);
        memcpy(joined + n_last, "\n\n", 2);
        memcpy(joined + n_last + 2, content, n_content + 1);
        last->content = joined;
        return KVS_OK;
    }
    kvs_dialogue_message *messages = grow(d->messages, d->n_messages, &d->cap_messages, sizeof *messages);
    if (!messages)
        return out_of_memory(err, sizeof *messages);
    d->messages = messages;
    char *copy = strdup(content);
    if (!copy)
        return out_of_memory(err, n_content + 1);
    messages[d->n_messages++] = (kvs_dialogue_message){.role = role, .content = copy, .source_idx = source_idx};
    return KVS_OK;
}

kvs_status kvs_dialogue_set_append(kvs_dialogue_set *s, kvs_dialogue *d, kvs_error *err)
{
    kvs_dialogue *items = grow(s->items, s->n_items, &s->cap_items, sizeof *items);
    if (!items)
        return out_of_memory(err, sizeof *items);
    s->items = items;
    items[s->n_items++] = *d;
    memset(d, 0, sizeof *d);
    return KVS_OK;
}

/* Roles and contents with their terminators: content holds no NUL, so two different dialogues never feed the same
 * bytes. */
static void hash_messages(XXH3_state_t *h128, XXH64_state_t *h64, const kvs_dialogue *d)
{
    for (uint32_t i = 0; i < d->n_messages; i++) {
        const char *parts[2] = {d->messages[i].role, d->messages[i].content};
        for (int p = 0; p < 2; p++) {
            if (h128)
                XXH3_128bits_update(h128, parts[p], strlen(parts[p]) + 1);
            if (h64)
                XXH64_update(h64, parts[p], strlen(parts[p]) + 1);
        }
    }
}

uint64_t kvs_dialogue_hash(const kvs_dialogue *d)
{
    XXH64_state_t *h = XXH64_createState();
    if (!h)
        return 0;
    XXH64_reset(h, 0);
    hash_messages(NULL, h, d);
    const uint64_t hash = XXH64_digest(h);
    XXH64_freeState(h);
    return hash;
}

kvs_status kvs_dialogue_set_dedup(kvs_dialogue_set *s, kvs_error *err)
{
    /* Open addressing, at most half full; 128 bits make an accidental collision a non-event, and a forged one only
     * loses the forger's dialogue. */
    size_t n_slots = 16;
    while (n_slots < (size_t)s->n_items * 2)
        n_slots *= 2;
    XXH128_hash_t *seen = calloc(n_slots, sizeof *seen);
    bool *used = calloc(n_slots, sizeof *used);
    XXH3_state_t *h = XXH3_createState();
    if (!seen || !used || !h) {
        free(seen);
        free(used);
        XXH3_freeState(h);
        return out_of_memory(err, n_slots * sizeof *seen);
    }
    uint32_t n_kept = 0;
    for (uint32_t i = 0; i < s->n_items; i++) {
        XXH3_128bits_reset(h);
        hash_messages(h, NULL, &s->items[i]);
        const XXH128_hash_t hash = XXH3_128bits_digest(h);
        size_t at = (size_t)hash.low64 & (n_slots - 1);
        while (used[at] && !XXH128_isEqual(seen[at], hash))
            at = (at + 1) & (n_slots - 1);
        if (used[at]) {
            kvs_dialogue_free(&s->items[i]);
            s->n_duplicates++;
            continue;
        }
        used[at] = true;
        seen[at] = hash;
        s->items[n_kept++] = s->items[i];
    }
    s->n_items = n_kept;
    free(seen);
    free(used);
    XXH3_freeState(h);
    return KVS_OK;
}

const char *kvs_fact_place_name(kvs_fact_place place)
{
    static const char *const names[KVS_FACT_PLACE_COUNT] = {"early", "middle", "late"};
    return place < KVS_FACT_PLACE_COUNT ? names[place] : "?";
}

static json_t *span_json(const kvs_dialogue_span *s)
{
    return json_pack("{s:I,s:I,s:I}", "message", (json_int_t)s->message_idx, "start_bytes", (json_int_t)s->start_bytes,
                     "end_bytes", (json_int_t)s->end_bytes);
}

static json_t *fact_json(const kvs_dialogue_fact *f)
{
    json_t *candidates = json_array();
    for (uint32_t i = 0; i < f->n_candidates; i++)
        json_array_append_new(candidates, json_string(f->candidates[i]));
    json_t *fact = json_pack("{s:I,s:I,s:s,s:I,s:I,s:s,s:s,s:o,s:b,s:o,s:o}", "fact", (json_int_t)f->fact_idx, "repeat",
                             (json_int_t)f->repeat_idx, "place", kvs_fact_place_name(f->place), "question_message",
                             (json_int_t)f->question_idx, "lag_messages", (json_int_t)f->lag_messages, "question",
                             f->question, "gold", f->gold, "candidates", candidates, "updated", (int)f->updated, "told",
                             span_json(&f->told), "answer", span_json(&f->answer));
    if (fact && f->updated)
        json_object_set_new(fact, "stale", span_json(&f->stale));
    return fact;
}

char *kvs_dialogue_json(const kvs_dialogue *d)
{
    json_t *messages = json_array();
    bool ok = messages != NULL;
    for (uint32_t i = 0; ok && i < d->n_messages; i++)
        ok = json_array_append_new(
                 messages, json_pack("{s:s,s:s}", "role", d->messages[i].role, "content", d->messages[i].content)) == 0;
    json_t *facts = json_array();
    ok = ok && facts;
    for (uint32_t i = 0; ok && i < d->n_facts; i++)
        ok = json_array_append_new(facts, fact_json(&d->facts[i])) == 0;
    json_t *root = json_pack("{s:s,s:s,s:o,s:o}", "id", d->id ? d->id : "", "origin", d->origin ? d->origin : "",
                             "messages", messages, "facts", facts);
    char *text = ok && root ? json_dumps(root, JSON_COMPACT | JSON_PRESERVE_ORDER) : NULL;
    json_decref(root);
    return text;
}

uint32_t kvs_dialogue_count_words(void *ctx, const char *role, const char *content)
{
    (void)ctx;
    (void)role;
    uint32_t n_words = 0;
    bool inside = false;
    for (const char *c = content; *c; c++) {
        const bool space = *c == ' ' || (*c >= '\t' && *c <= '\r');
        n_words += !space && !inside;
        inside = !space;
    }
    return n_words;
}

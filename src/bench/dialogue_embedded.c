/* The embedded dialogue set: what every suite falls back to when no data folder is given, and the default filler of
 * planted-fact dialogues. The text itself is in dialogue_embedded.inc. */
#include "bench/dialogue.h"

#include "bench/dialogue_embedded.inc"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static kvs_status add_embedded(size_t idx, kvs_dialogue *d, kvs_error *err)
{
    if (asprintf(&d->id, "embedded-%s", embedded[idx].id) < 0)
        d->id = NULL;
    d->origin = strdup("embedded");
    if (!d->id || !d->origin)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the id of a dialogue");
    d->has_assistant = true;
    for (size_t m = 0; m < embedded[idx].n_messages; m++)
        KVS_TRY(
            kvs_dialogue_append(d, m % 2 ? "assistant" : "user", embedded[idx].messages[m], (uint32_t)m, false, err));
    return KVS_OK;
}

static kvs_status add_all(kvs_dialogue_set *s, XXH64_state_t *hash, kvs_error *err)
{
    s->name = strdup("embedded");
    s->licence = strdup("written for Kvasir, same licence as its source");
    s->notes = strdup("");
    if (!s->name || !s->licence || !s->notes)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the description of a set");
    for (size_t i = 0; i < sizeof embedded / sizeof *embedded; i++) {
        kvs_dialogue d = {0};
        kvs_status status = add_embedded(i, &d, err);
        for (uint32_t m = 0; status == KVS_OK && m < d.n_messages; m++) {
            const size_t n_bytes = strlen(d.messages[m].content) + 1;
            XXH64_update(hash, d.messages[m].content, n_bytes);
            s->n_bytes += n_bytes;
        }
        if (status == KVS_OK)
            status = kvs_dialogue_set_append(s, &d, err);
        kvs_dialogue_free(&d);
        KVS_TRY(status);
    }
    s->xxh64 = XXH64_digest(hash);
    return KVS_OK;
}

kvs_status kvs_dialogue_set_embedded(kvs_dialogue_set *out, kvs_error *err)
{
    memset(out, 0, sizeof *out);
    XXH64_state_t *hash = XXH64_createState();
    if (!hash)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a hash state");
    XXH64_reset(hash, 0);
    const kvs_status status = add_all(out, hash, err);
    XXH64_freeState(hash);
    if (status != KVS_OK)
        kvs_dialogue_set_free(out);
    return status;
}

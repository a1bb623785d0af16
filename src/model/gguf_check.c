/* Reads the header of a GGUF file (ggml's docs/gguf.md, versions 2 and 3) without trusting any of it. Knows nothing of
 * architectures; arch.c does. */
#include "model/gguf_check.h"

#include <ggml.h>
#include <gguf.h>
#include <stdio.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF numbers are read as they stand in the file");

enum {
    MAX_KEYS = 1 << 16,    /* real files have some dozens */
    MAX_TENSORS = 1 << 18, /* a 1,000-layer mixture has some thousands */
    MAX_TOKENS = 1 << 24,
    MIN_ALIGNMENT = 8, /* rows are read as 32-bit floats and 16-bit halves in place */
    MAX_ALIGNMENT = 1 << 16,
};

const char *kvs_gguf_printable(const char *text, size_t n_bytes, char buf[64])
{
    size_t n = n_bytes < 63 ? n_bytes : 63;
    for (size_t i = 0; i < n; i++)
        buf[i] = text[i] >= 0x20 && text[i] < 0x7f ? text[i] : '?';
    buf[n] = '\0';
    return buf;
}

/* ---- a set of strings, by hash ---------------------------------------------------------------------------------- */

/* Only hashes are kept: two different strings with one 64-bit hash would be taken for a repeat and refused, which is
 * harmless; a true repeat is never missed. */
typedef struct string_set {
    uint64_t *hashes; /* [mask + 1], 0: free */
    size_t mask;
} string_set;

static bool set_init(string_set *s, const kvs_allocator *a, size_t n)
{
    size_t cap = 16;
    while (cap < n * 2)
        cap *= 2;
    s->hashes = kvs_alloc(a, cap, sizeof *s->hashes);
    s->mask = cap - 1;
    return s->hashes != NULL;
}

/* False if it was there already. */
static bool set_add(string_set *s, const char *text, size_t n_bytes)
{
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a */
    for (size_t i = 0; i < n_bytes; i++)
        h = (h ^ (unsigned char)text[i]) * 0x100000001b3u;
    h = kvs_hash3(h, n_bytes, 0);
    h += h == 0;
    for (size_t i = h & s->mask;; i = (i + 1) & s->mask) {
        if (s->hashes[i] == h)
            return false;
        if (s->hashes[i] == 0) {
            s->hashes[i] = h;
            return true;
        }
    }
}

/* ---- the cursor ------------------------------------------------------------------------------------------------- */

typedef struct cursor {
    const char *path;
    const uint8_t *map;
    size_t at, end;
} cursor;

static kvs_status truncated(const cursor *c, const char *what, kvs_error *err)
{
    return kvs_error_set(err, KVS_EFORMAT, "%s: the file ends inside %s: byte %zu of %zu; fetch it again", c->path,
                         what, c->at, c->end);
}

static kvs_status read_bytes(cursor *c, void *out, size_t n, const char *what, kvs_error *err)
{
    if (c->end - c->at < n)
        return truncated(c, what, err);
    memcpy(out, c->map + c->at, n);
    c->at += n;
    return KVS_OK;
}

static kvs_status read_string(cursor *c, const char **text, size_t *n_bytes, const char *what, kvs_error *err)
{
    uint64_t n = 0;
    KVS_TRY(read_bytes(c, &n, sizeof n, what, err));
    if (n > c->end - c->at)
        return kvs_error_set(err, KVS_EFORMAT, "%s: %s at byte %zu claims %llu bytes; the file has %zu left", c->path,
                             what, c->at, (unsigned long long)n, c->end - c->at);
    *text = (const char *)c->map + c->at;
    *n_bytes = (size_t)n;
    c->at += (size_t)n;
    return KVS_OK;
}

/* Bytes of one element; 0 for strings and for what is no element type. */
static size_t scalar_bytes(uint32_t type)
{
    switch (type) {
    case GGUF_TYPE_UINT8:
    case GGUF_TYPE_INT8:
    case GGUF_TYPE_BOOL:
        return 1;
    case GGUF_TYPE_UINT16:
    case GGUF_TYPE_INT16:
        return 2;
    case GGUF_TYPE_UINT32:
    case GGUF_TYPE_INT32:
    case GGUF_TYPE_FLOAT32:
        return 4;
    case GGUF_TYPE_UINT64:
    case GGUF_TYPE_INT64:
    case GGUF_TYPE_FLOAT64:
        return 8;
    default:
        return 0;
    }
}

static const char *type_name(uint32_t type)
{
    return type < GGUF_TYPE_COUNT ? gguf_type_name((enum gguf_type)type) : "unknown";
}

/* ---- keys ------------------------------------------------------------------------------------------------------- */

static kvs_status skip_strings(cursor *c, uint64_t n, const char *what, kvs_error *err)
{
    for (uint64_t i = 0; i < n; i++) { /* each takes at least 8 bytes, so a false count ends at the end of the file */
        const char *text;
        size_t n_bytes;
        KVS_TRY(read_string(c, &text, &n_bytes, what, err));
    }
    return KVS_OK;
}

static kvs_status read_value(cursor *c, kvs_gguf_value *v, kvs_error *err)
{
    char name[64];
    KVS_TRY(read_string(c, &v->key, &v->key_bytes, "a key", err));
    if (v->key_bytes == 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s: an empty key at byte %zu", c->path, c->at);
    kvs_gguf_printable(v->key, v->key_bytes, name);
    KVS_TRY(read_bytes(c, &v->type, sizeof v->type, name, err));
    v->n = 1;
    v->is_array = v->type == GGUF_TYPE_ARRAY;
    if (v->is_array) {
        KVS_TRY(read_bytes(c, &v->type, sizeof v->type, name, err));
        KVS_TRY(read_bytes(c, &v->n, sizeof v->n, name, err));
    }
    v->data = c->map + c->at;
    if (v->type == GGUF_TYPE_STRING)
        return skip_strings(c, v->n, name, err);
    const size_t each = scalar_bytes(v->type);
    if (each == 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s: key %s is of type %u; GGUF has 0 to %d, and no arrays of arrays",
                             c->path, name, v->type, GGUF_TYPE_COUNT - 1);
    if (v->n > (c->end - c->at) / each)
        return kvs_error_set(err, KVS_EFORMAT, "%s: key %s claims %llu elements; the file has %zu bytes left", c->path,
                             name, (unsigned long long)v->n, c->end - c->at);
    c->at += (size_t)v->n * each;
    return KVS_OK;
}

static kvs_status read_values(cursor *c, kvs_gguf *g, string_set *seen, kvs_error *err)
{
    for (size_t i = 0; i < g->n_values; i++) {
        kvs_gguf_value *v = &g->values[i];
        KVS_TRY(read_value(c, v, err));
        if (!set_add(seen, v->key, v->key_bytes)) {
            char name[64];
            return kvs_error_set(err, KVS_EFORMAT, "%s: key %s stands twice", c->path,
                                 kvs_gguf_printable(v->key, v->key_bytes, name));
        }
    }
    return KVS_OK;
}

/* ---- tensors ---------------------------------------------------------------------------------------------------- */

static kvs_status read_tensor(cursor *c, kvs_gguf_tensor *t, uint64_t *offset, kvs_error *err)
{
    char name[64];
    KVS_TRY(read_string(c, &t->name, &t->name_bytes, "a tensor's name", err));
    kvs_gguf_printable(t->name, t->name_bytes, name);
    if (t->name_bytes == 0 || t->name_bytes >= GGML_MAX_NAME || memchr(t->name, '\0', t->name_bytes) != NULL)
        return kvs_error_set(err, KVS_EFORMAT,
                             "%s: tensor name '%s' has %zu bytes; 1 to %d, none of them NUL, are right", c->path, name,
                             t->name_bytes, GGML_MAX_NAME - 1);
    KVS_TRY(read_bytes(c, &t->n_dims, sizeof t->n_dims, name, err));
    if (t->n_dims < 1 || t->n_dims > 4)
        return kvs_error_set(err, KVS_EFORMAT, "%s: tensor %s has %u dimensions; 1 to 4 are right", c->path, name,
                             t->n_dims);
    for (uint32_t d = 0; d < 4; d++) {
        t->ne[d] = 1;
        if (d < t->n_dims)
            KVS_TRY(read_bytes(c, &t->ne[d], sizeof t->ne[d], name, err));
        if (t->ne[d] == 0 || t->ne[d] > INT32_MAX)
            return kvs_error_set(err, KVS_EFORMAT,
                                 "%s: tensor %s has %llu elements along axis %u; 1 to 2^31 - 1 are right", c->path,
                                 name, (unsigned long long)t->ne[d], d);
    }
    uint32_t type;
    KVS_TRY(read_bytes(c, &type, sizeof type, name, err));
    KVS_TRY(read_bytes(c, offset, sizeof *offset, name, err));
    if (type >= GGML_TYPE_COUNT || ggml_blck_size((enum ggml_type)type) <= 0 ||
        ggml_type_size((enum ggml_type)type) == 0)
        return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: tensor %s is of ggml type %u, which this ggml does not know",
                             c->path, name, type);
    t->type = (int)type;
    const uint64_t block = (uint64_t)ggml_blck_size((enum ggml_type)type);
    if (t->ne[0] % block != 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s: tensor %s has rows of %llu, not a multiple of %s's block of %llu",
                             c->path, name, (unsigned long long)t->ne[0], ggml_type_name((enum ggml_type)type),
                             (unsigned long long)block);
    t->row_bytes = (size_t)(t->ne[0] / block) * ggml_type_size((enum ggml_type)type);
    return KVS_OK;
}

/* Places the tensor inside the file, whose data section is c->map[data_begin, c->end). */
static kvs_status place_tensor(const cursor *c, kvs_gguf_tensor *t, uint64_t offset, size_t data_begin,
                               size_t alignment, kvs_error *err)
{
    char name[64];
    kvs_gguf_printable(t->name, t->name_bytes, name);
    size_t rows = 1;
    bool fits = data_begin <= c->end;
    for (uint32_t d = 1; d < 4; d++)
        fits = fits && kvs_mul_size(rows, (size_t)t->ne[d], &rows);
    fits = fits && kvs_mul_size(rows, t->row_bytes, &t->data_bytes);
    const size_t room = fits ? c->end - data_begin : 0;
    if (!fits || offset > room || t->data_bytes > room - (size_t)offset)
        return kvs_error_set(err, KVS_EFORMAT,
                             "%s: tensor %s lies outside the file: offset %llu, %zu bytes of data; fetch it again",
                             c->path, name, (unsigned long long)offset, room);
    if (offset % alignment != 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s: tensor %s begins at %llu, not a multiple of the alignment %zu",
                             c->path, name, (unsigned long long)offset, alignment);
    t->data = c->map + data_begin + (size_t)offset;
    return KVS_OK;
}

static kvs_status read_tensors(cursor *c, kvs_gguf *g, string_set *seen, kvs_error *err)
{
    uint32_t alignment = GGUF_DEFAULT_ALIGNMENT;
    bool found;
    KVS_TRY(kvs_gguf_u32(g, GGUF_KEY_GENERAL_ALIGNMENT, &alignment, &found, err));
    if (alignment < MIN_ALIGNMENT || alignment > MAX_ALIGNMENT || (alignment & (alignment - 1)) != 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s: %s is %u; a power of two from %d to %d is right", c->path,
                             GGUF_KEY_GENERAL_ALIGNMENT, alignment, MIN_ALIGNMENT, MAX_ALIGNMENT);
    uint64_t *offsets = kvs_alloc(g->allocator, g->n_tensors, sizeof *offsets);
    if (offsets == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory for %zu tensor offsets", c->path, g->n_tensors);
    kvs_status status = KVS_OK;
    for (size_t i = 0; i < g->n_tensors && status == KVS_OK; i++) {
        kvs_gguf_tensor *t = &g->tensors[i];
        status = read_tensor(c, t, &offsets[i], err);
        char name[64];
        if (status == KVS_OK && !set_add(seen, t->name, t->name_bytes))
            status = kvs_error_set(err, KVS_EFORMAT, "%s: tensor %s stands twice", c->path,
                                   kvs_gguf_printable(t->name, t->name_bytes, name));
    }
    const size_t data_begin = kvs_round_up(c->at, alignment);
    for (size_t i = 0; i < g->n_tensors && status == KVS_OK; i++) {
        kvs_gguf_tensor *t = &g->tensors[i];
        status = place_tensor(c, t, offsets[i], data_begin, alignment, err);
        g->n_params += t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
        g->weight_bytes += t->data_bytes;
    }
    kvs_free(g->allocator, offsets);
    return status;
}

/* ---- the whole -------------------------------------------------------------------------------------------------- */

static kvs_status read_counts(cursor *c, kvs_gguf *g, kvs_error *err)
{
    char magic[4];
    uint32_t version;
    uint64_t n_tensors, n_values;
    KVS_TRY(read_bytes(c, magic, sizeof magic, "the magic", err));
    if (memcmp(magic, GGUF_MAGIC, sizeof magic) != 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s: not a GGUF file: it does not begin with 'GGUF'", c->path);
    KVS_TRY(read_bytes(c, &version, sizeof version, "the version", err));
    if (version < 2 || version > GGUF_VERSION)
        return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: GGUF version %u; 2 and %d are read", c->path, version,
                             GGUF_VERSION);
    KVS_TRY(read_bytes(c, &n_tensors, sizeof n_tensors, "the tensor count", err));
    KVS_TRY(read_bytes(c, &n_values, sizeof n_values, "the key count", err));
    /* A key takes 13 bytes at least, a tensor 33: counts beyond the file are refused before memory is asked for. */
    if (n_values > MAX_KEYS || n_values > c->end / 13)
        return kvs_error_set(err, KVS_EFORMAT, "%s: the header claims %llu keys; at most %d fit what is read", c->path,
                             (unsigned long long)n_values, MAX_KEYS);
    if (n_tensors > MAX_TENSORS || n_tensors > c->end / 33)
        return kvs_error_set(err, KVS_EFORMAT, "%s: the header claims %llu tensors; at most %d fit what is read",
                             c->path, (unsigned long long)n_tensors, MAX_TENSORS);
    g->n_values = (size_t)n_values;
    g->n_tensors = (size_t)n_tensors;
    return KVS_OK;
}

kvs_status kvs_gguf_parse(const char *path, const void *map, size_t map_bytes, const kvs_allocator *a, kvs_gguf *out,
                          kvs_error *err)
{
    memset(out, 0, sizeof *out);
    out->path = path;
    out->allocator = a;
    cursor c = {.path = path, .map = map, .at = 0, .end = map_bytes};
    KVS_TRY(read_counts(&c, out, err));
    string_set keys = {0}, names = {0};
    out->values = kvs_alloc(a, out->n_values, sizeof *out->values);
    out->tensors = kvs_alloc(a, out->n_tensors, sizeof *out->tensors);
    kvs_status status;
    if (out->values == NULL || out->tensors == NULL || !set_init(&keys, a, out->n_values) ||
        !set_init(&names, a, out->n_tensors))
        status = kvs_error_set(err, KVS_ENOMEM, "%s: no memory for an index of %zu keys and %zu tensors", path,
                               out->n_values, out->n_tensors);
    else
        status = read_values(&c, out, &keys, err);
    if (status == KVS_OK)
        status = read_tensors(&c, out, &names, err);
    kvs_free(a, keys.hashes);
    kvs_free(a, names.hashes);
    if (status != KVS_OK)
        kvs_gguf_free(out);
    return status;
}

void kvs_gguf_free(kvs_gguf *g)
{
    kvs_free(g->allocator, g->values);
    kvs_free(g->allocator, g->tensors);
    memset(g, 0, sizeof *g);
}

const kvs_gguf_value *kvs_gguf_find(const kvs_gguf *g, const char *key)
{
    const size_t n = strlen(key);
    for (size_t i = 0; i < g->n_values; i++)
        if (g->values[i].key_bytes == n && memcmp(g->values[i].key, key, n) == 0)
            return &g->values[i];
    return NULL;
}

const kvs_gguf_tensor *kvs_gguf_find_tensor(const kvs_gguf *g, const char *name)
{
    const size_t n = strlen(name);
    for (size_t i = 0; i < g->n_tensors; i++)
        if (g->tensors[i].name_bytes == n && memcmp(g->tensors[i].name, name, n) == 0)
            return &g->tensors[i];
    return NULL;
}

/* ---- typed reading ---------------------------------------------------------------------------------------------- */

/* Sets *v to NULL where the key is absent and may be. */
static kvs_status find_typed(const kvs_gguf *g, const char *key, uint32_t type, bool is_array, bool required,
                             const kvs_gguf_value **v, kvs_error *err)
{
    *v = kvs_gguf_find(g, key);
    if (*v == NULL)
        return required ? kvs_error_set(err, KVS_EFORMAT, "%s: the key %s is missing", g->path, key) : KVS_OK;
    if ((*v)->type != type || (*v)->is_array != is_array)
        return kvs_error_set(err, KVS_EFORMAT, "%s: key %s is of type %s%s; %s%s is right", g->path, key,
                             (*v)->is_array ? "array of " : "", type_name((*v)->type), is_array ? "array of " : "",
                             type_name(type));
    return KVS_OK;
}

kvs_status kvs_gguf_u32(const kvs_gguf *g, const char *key, uint32_t *out, bool *found, kvs_error *err)
{
    const kvs_gguf_value *v;
    KVS_TRY(find_typed(g, key, GGUF_TYPE_UINT32, false, found == NULL, &v, err));
    if (found != NULL)
        *found = v != NULL;
    if (v != NULL)
        memcpy(out, v->data, sizeof *out);
    return KVS_OK;
}

kvs_status kvs_gguf_f32(const kvs_gguf *g, const char *key, float *out, bool *found, kvs_error *err)
{
    const kvs_gguf_value *v;
    KVS_TRY(find_typed(g, key, GGUF_TYPE_FLOAT32, false, found == NULL, &v, err));
    if (found != NULL)
        *found = v != NULL;
    if (v != NULL)
        memcpy(out, v->data, sizeof *out);
    return KVS_OK;
}

/* The parser has held the length against the file. */
static const char *string_at(const uint8_t *data, size_t *n_bytes)
{
    uint64_t n;
    memcpy(&n, data, sizeof n);
    *n_bytes = (size_t)n;
    return (const char *)data + sizeof n;
}

kvs_status kvs_gguf_str(const kvs_gguf *g, const char *key, const char **out, size_t *n_bytes, bool *found,
                        kvs_error *err)
{
    const kvs_gguf_value *v;
    KVS_TRY(find_typed(g, key, GGUF_TYPE_STRING, false, found == NULL, &v, err));
    if (found != NULL)
        *found = v != NULL;
    if (v != NULL)
        *out = string_at(v->data, n_bytes);
    return KVS_OK;
}

/* ---- the tokenizer's keys --------------------------------------------------------------------------------------- */

/* libllama cuts a token at its first NUL, names empty ones [EMPTY_i], and asserts that no two are equal. */
static kvs_status check_tokens(const kvs_gguf *g, const kvs_gguf_value *tokens, bool bytes_required, kvs_error *err)
{
    string_set seen;
    if (!set_init(&seen, g->allocator, (size_t)tokens->n))
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory to check %llu tokens", g->path,
                             (unsigned long long)tokens->n);
    kvs_status status = KVS_OK;
    const uint8_t *at = tokens->data;
    for (uint64_t i = 0; i < tokens->n && status == KVS_OK; i++) {
        size_t n_bytes;
        const char *text = string_at(at, &n_bytes);
        at = (const uint8_t *)text + n_bytes;
        char empty[32], shown[64];
        size_t n = strnlen(text, n_bytes);
        if (n == 0) {
            n = (size_t)snprintf(empty, sizeof empty, "[EMPTY_%llu]", (unsigned long long)i);
            text = empty;
        }
        if (!set_add(&seen, text, n))
            status = kvs_error_set(err, KVS_EFORMAT, "%s: tokenizer.ggml.tokens has '%s' twice, again at %llu", g->path,
                                   kvs_gguf_printable(text, n, shown), (unsigned long long)i);
    }
    /* SentencePiece falls back to byte tokens and throws where one is missing. */
    for (unsigned b = 0; b < 256 && bytes_required && status == KVS_OK; b++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", b);
        if (set_add(&seen, name, 6))
            status =
                kvs_error_set(err, KVS_EFORMAT, "%s: tokenizer.ggml.tokens lacks the byte token %s", g->path, name);
    }
    kvs_free(g->allocator, seen.hashes);
    return status;
}

static kvs_status check_per_token(const kvs_gguf *g, const char *key, uint32_t type, uint64_t n_tokens, kvs_error *err)
{
    const kvs_gguf_value *v;
    KVS_TRY(find_typed(g, key, type, true, false, &v, err));
    if (v != NULL && v->n != n_tokens)
        return kvs_error_set(err, KVS_EFORMAT, "%s: key %s has %llu elements for %llu tokens", g->path, key,
                             (unsigned long long)v->n, (unsigned long long)n_tokens);
    return KVS_OK;
}

static kvs_status check_token_ids(const kvs_gguf *g, uint64_t n_tokens, kvs_error *err)
{
    static const char *const keys[] = {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                                       "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id",
                                       "tokenizer.ggml.unknown_token_id"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        uint32_t id = 0;
        bool found;
        KVS_TRY(kvs_gguf_u32(g, keys[i], &id, &found, err));
        if (found && id >= n_tokens)
            return kvs_error_set(err, KVS_EFORMAT, "%s: %s is %u; the vocabulary has %llu tokens", g->path, keys[i], id,
                                 (unsigned long long)n_tokens);
    }
    static const char *const flags[] = {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
                                        "tokenizer.ggml.add_space_prefix"};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        const kvs_gguf_value *v;
        KVS_TRY(find_typed(g, flags[i], GGUF_TYPE_BOOL, false, false, &v, err));
    }
    return KVS_OK;
}

kvs_status kvs_gguf_check_tokenizer(const kvs_gguf *g, uint32_t *n_tokens, kvs_error *err)
{
    const char *model = "";
    size_t n_bytes = 0;
    KVS_TRY(kvs_gguf_str(g, "tokenizer.ggml.model", &model, &n_bytes, NULL, err));
    const bool bpe = n_bytes == 4 && memcmp(model, "gpt2", 4) == 0;
    const bool spm = n_bytes == 5 && memcmp(model, "llama", 5) == 0;
    char shown[64];
    if (!bpe && !spm)
        return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: tokenizer.ggml.model is '%s'; gpt2 and llama are supported",
                             g->path, kvs_gguf_printable(model, n_bytes, shown));
    const kvs_gguf_value *tokens, *merges;
    KVS_TRY(find_typed(g, "tokenizer.ggml.tokens", GGUF_TYPE_STRING, true, true, &tokens, err));
    if (tokens->n == 0 || tokens->n > MAX_TOKENS)
        return kvs_error_set(err, KVS_EFORMAT, "%s: tokenizer.ggml.tokens has %llu elements; 1 to %d are right",
                             g->path, (unsigned long long)tokens->n, MAX_TOKENS);
    KVS_TRY(check_per_token(g, "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, tokens->n, err));
    KVS_TRY(check_per_token(g, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, tokens->n, err));
    KVS_TRY(find_typed(g, "tokenizer.ggml.merges", GGUF_TYPE_STRING, true, bpe, &merges, err));
    if (merges != NULL && merges->n > INT32_MAX)
        return kvs_error_set(err, KVS_EFORMAT,
                             "%s: tokenizer.ggml.merges has %llu elements; at most 2^31 - 1 are right", g->path,
                             (unsigned long long)merges->n);
    KVS_TRY(check_token_ids(g, tokens->n, err));
    KVS_TRY(check_tokens(g, tokens, spm, err));
    *n_tokens = (uint32_t)tokens->n;
    return KVS_OK;
}

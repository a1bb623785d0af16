/* Reading of profiles: every number is looked at before any is used. */
#include "policy/profile.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <sha256.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* 99 tables of 2,000 heads in full digits take 4 MiB. */
enum { FILE_BYTES_MAX = 64 << 20 };

typedef struct reader {
    const char *path;
    const kvs_profile_want *want;
    const kvs_profile_model *model;
    kvs_error *err;
} reader;

/* Nothing but plain files: a pipe would block, and what is read twice would differ. */
static kvs_status read_whole(const char *path, char **bytes, size_t *n_bytes, kvs_error *err)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0) {
        kvs_error_set(err, KVS_EIO, "profile %.200s cannot be read: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return KVS_EIO;
    }
    char *text = NULL;
    size_t have = 0;
    kvs_status status = KVS_OK;
    if (!S_ISREG(st.st_mode) || st.st_size > FILE_BYTES_MAX)
        status = kvs_error_set(err, KVS_EFORMAT, "profile %.200s is no plain file of at most %d bytes", path,
                               FILE_BYTES_MAX);
    if (status == KVS_OK && (text = malloc((size_t)st.st_size + 1)) == NULL)
        status = kvs_error_set(err, KVS_ENOMEM, "no memory for profile %.200s", path);
    for (ssize_t n; text != NULL && status == KVS_OK && have < (size_t)st.st_size; have += (size_t)n)
        if ((n = read(fd, text + have, (size_t)st.st_size - have)) <= 0) {
            status = kvs_error_set(err, KVS_EIO, "profile %.200s cannot be read: %s", path,
                                   n < 0 ? strerror(errno) : "it became shorter");
            break;
        }
    close(fd);
    if (status != KVS_OK) {
        free(text);
        return status;
    }
    *bytes = text;
    *n_bytes = have;
    return KVS_OK;
}

static kvs_status check_kind(const reader *r, const json_t *root)
{
    const char *const kind = json_string_value(json_object_get(root, "kind"));
    char list[128] = "";
    for (size_t i = 0, at = 0; r->want->kinds[i] != NULL; i++) {
        if (kind != NULL && strcmp(kind, r->want->kinds[i]) == 0)
            return KVS_OK;
        if (at < sizeof list)
            at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", i == 0 ? "" : " or ", r->want->kinds[i]);
    }
    return kvs_error_set(r->err, KVS_EFORMAT, "profile %.200s is of kind '%.40s', wanted is %s", r->path,
                         kind == NULL ? "none" : kind, list);
}

static kvs_status check_number(const reader *r, const json_t *root, const char *name, uint32_t is)
{
    const json_t *const x = json_object_get(root, name);
    if (!json_is_integer(x))
        return kvs_error_set(r->err, KVS_EFORMAT, "profile %.200s: %s must be there, a whole number", r->path, name);
    if (json_integer_value(x) != (json_int_t)is)
        return kvs_error_set(r->err, KVS_EFORMAT, "profile %.200s is of another model: %s is %lld, this model has %u",
                             r->path, name, (long long)json_integer_value(x), is);
    return KVS_OK;
}

static kvs_status check_model(const reader *r, const json_t *root)
{
    const json_t *const member = json_object_get(root, "model_sha256");
    const char *const sha = json_string_value(member);
    KVS_TRY(check_number(r, root, "n_layers", r->model->n_layers));
    KVS_TRY(check_number(r, root, "n_kv_heads", r->model->n_kv_heads));
    if (sha == NULL && !(r->want->any_model && member == NULL))
        return kvs_error_set(r->err, KVS_EFORMAT, "profile %.200s: model_sha256 must be there, the sha256 of the model",
                             r->path);
    if (sha != NULL && strcmp(sha, r->model->sha256) != 0)
        return kvs_error_set(r->err, KVS_EFORMAT,
                             "profile %.200s is of another model: its sha256 is %.12s..., this one's %.12s...", r->path,
                             sha, r->model->sha256);
    return KVS_OK;
}

/* A list of n numbers into out. where: of which layer, for the message. */
static kvs_status read_list(const reader *r, const json_t *list, uint32_t n, const char *where, double *out)
{
    if (!json_is_array(list) || json_array_size(list) != n)
        return kvs_error_set(r->err, KVS_EFORMAT, "profile %.200s: %s must be a list of %u, it %s", r->path, where, n,
                             json_is_array(list) ? "has another length" : "is none");
    for (uint32_t i = 0; i < n; i++) {
        const json_t *const x = json_array_get(list, i);
        const double value = json_is_number(x) ? json_number_value(x) : (double)NAN;
        if (!(value >= r->want->min && value <= r->want->max))
            return kvs_error_set(r->err, KVS_EFORMAT, "profile %.200s: number %u of %s must be from %g to %g", r->path,
                                 i, where, r->want->min, r->want->max);
        out[i] = value;
    }
    return KVS_OK;
}

static kvs_status read_table(const reader *r, const json_t *table, double *out)
{
    const uint32_t n = r->model->n_layers, n_heads = r->model->n_kv_heads;
    if (!json_is_array(table) || json_array_size(table) != n)
        return kvs_error_set(r->err, KVS_EFORMAT, "profile %.200s: heads must be a list of %u layers", r->path, n);
    for (uint32_t l = 0; l < n; l++) {
        char where[32];
        snprintf(where, sizeof where, "heads, layer %u", l);
        KVS_TRY(read_list(r, json_array_get(table, l), n_heads, where, out + (size_t)l * n_heads));
    }
    return KVS_OK;
}

static kvs_status read_numbers(const reader *r, const json_t *root, uint32_t n_tables, double *out)
{
    if (!r->want->heads)
        return read_list(r, json_object_get(root, "layers"), r->model->n_layers, "layers", out);
    const json_t *const heads = json_object_get(root, "heads");
    if (n_tables == 1)
        return read_table(r, heads, out);
    if (!json_is_array(heads) || json_array_size(heads) != n_tables)
        return kvs_error_set(r->err, KVS_EFORMAT, "profile %.200s: heads must be a list of %u tables", r->path,
                             n_tables);
    const size_t size = (size_t)r->model->n_layers * r->model->n_kv_heads;
    for (uint32_t t = 0; t < n_tables; t++)
        KVS_TRY(read_table(r, json_array_get(heads, t), out + t * size));
    return KVS_OK;
}

/* The numbers' memory. */
static kvs_status reserve(kvs_profile *p, bool heads, const kvs_allocator *a, kvs_error *err)
{
    const size_t n = heads ? (size_t)p->n_tables * p->n_layers * p->n_kv_heads : p->n_layers;
    p->block = kvs_alloc(a, n, sizeof *p->block);
    if (p->block == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a profile of %zu numbers", n);
    p->heads = heads ? p->block : NULL;
    p->layers = heads ? NULL : p->block;
    return KVS_OK;
}

static kvs_status take(const reader *r, const json_t *root, const kvs_allocator *a, kvs_profile *out)
{
    if (!json_is_object(root))
        return kvs_error_set(r->err, KVS_EFORMAT, "profile %.200s holds no JSON object", r->path);
    KVS_TRY(check_kind(r, root));
    KVS_TRY(check_model(r, root));
    out->n_layers = r->model->n_layers;
    out->n_kv_heads = r->model->n_kv_heads;
    out->n_tables = kvs_max_u32(r->want->n_tables, 1);
    if ((uint64_t)out->n_layers * out->n_kv_heads > KVS_PROFILE_HEADS_MAX)
        return kvs_error_set(r->err, KVS_EFORMAT, "a profile is for %d heads at most, this model has %u layers of %u",
                             KVS_PROFILE_HEADS_MAX, out->n_layers, out->n_kv_heads);
    KVS_TRY(reserve(out, r->want->heads, a, r->err));
    return read_numbers(r, root, out->n_tables, out->block);
}

kvs_status kvs_profile_read(const char *path, const kvs_profile_want *want, const kvs_profile_model *model,
                            const kvs_allocator *a, kvs_profile *out, kvs_error *err)
{
    char *bytes;
    size_t n_bytes;
    *out = (kvs_profile){0};
    KVS_TRY(read_whole(path, &bytes, &n_bytes, err));
    SHA256Data((const uint8_t *)bytes, n_bytes, out->sha256);
    json_error_t where;
    json_t *const root = json_loadb(bytes, n_bytes, JSON_REJECT_DUPLICATES, &where);
    free(bytes);
    const reader r = {path, want, model, err};
    kvs_status status = root == NULL ? kvs_error_set(err, KVS_EFORMAT, "profile %.200s is not JSON: line %d: %.80s",
                                                     path, where.line, where.text)
                                     : take(&r, root, a, out);
    json_decref(root);
    if (status != KVS_OK)
        kvs_profile_free(out, a);
    return status;
}

static int is_json(const struct dirent *e)
{
    const size_t n = strlen(e->d_name);
    return n > 5 && strcmp(e->d_name + n - 5, ".json") == 0;
}

kvs_status kvs_profile_find(const char *folder, const kvs_profile_want *want, const char *kind,
                            const kvs_profile_model *model, char *path, size_t cap_bytes,
                            char sha256[KVS_PROFILE_SHA_BYTES], kvs_error *err)
{
    const kvs_allocator *const heap = kvs_allocator_default();
    const char *const kinds[] = {kind, NULL};
    kvs_profile_want of = *want;
    of.kinds = kinds;
    struct dirent **names;
    const int n = scandir(folder, &names, is_json, alphasort);
    path[0] = sha256[0] = '\0';
    if (n < 0)
        return kvs_error_set(err, KVS_EIO, "folder %.200s cannot be read: %s", folder, strerror(errno));
    kvs_status status = KVS_OK;
    for (int i = 0; i < n && path[0] == '\0' && status == KVS_OK; i++) {
        kvs_profile p;
        const int length = snprintf(path, cap_bytes, "%s/%s", folder, names[i]->d_name);
        const bool fits = length > 0 && (size_t)length < cap_bytes;
        const kvs_status found = fits ? kvs_profile_read(path, &of, model, heap, &p, err) : KVS_EFORMAT;
        if (found == KVS_OK) {
            memcpy(sha256, p.sha256, sizeof p.sha256);
            kvs_profile_free(&p, heap);
            continue;
        }
        path[0] = '\0'; /* of something else */
        status = found == KVS_ENOMEM ? found : KVS_OK;
    }
    for (int i = 0; i < n; i++)
        free(names[i]);
    free(names);
    return status;
}

kvs_status kvs_profile_copy(const kvs_profile *from, const kvs_allocator *a, kvs_profile *out, kvs_error *err)
{
    *out = *from;
    if (from->block == NULL)
        return KVS_OK;
    const bool heads = from->heads != NULL;
    const kvs_status status = reserve(out, heads, a, err);
    if (status != KVS_OK) {
        *out = (kvs_profile){0};
        return status;
    }
    const size_t n = heads ? (size_t)from->n_tables * from->n_layers * from->n_kv_heads : from->n_layers;
    memcpy(out->block, from->block, n * sizeof *out->block);
    return KVS_OK;
}

void kvs_profile_free(kvs_profile *p, const kvs_allocator *a)
{
    kvs_free(a, p->block);
    *p = (kvs_profile){0};
}

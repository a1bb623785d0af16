/* Control-vector files. */
#include "model/direction.h"

#include "model/gguf_check.h"

#include <errno.h>
#include <fcntl.h>
#include <ggml.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static kvs_status check_model(const kvs_model *m, const kvs_gguf *g, kvs_error *err)
{
    const char *text;
    size_t n;
    bool found;
    char shown[64];
    KVS_TRY(kvs_gguf_str(g, "general.architecture", &text, &n, NULL, err));
    if (n != strlen("controlvector") || memcmp(text, "controlvector", n) != 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s: architecture '%s' is no direction; controlvector is", g->path,
                             kvs_gguf_printable(text, n, shown));
    KVS_TRY(kvs_gguf_str(g, "controlvector.model_hint", &text, &n, &found, err));
    if (found && (n != strlen(m->info.arch) || memcmp(text, m->info.arch, n) != 0))
        return kvs_error_set(err, KVS_EFORMAT, "%s: a direction of model '%s', this one is '%s'", g->path,
                             kvs_gguf_printable(text, n, shown), m->info.arch);
    return KVS_OK;
}

static kvs_status read_layer(const kvs_model *m, const kvs_gguf *g, uint32_t layer, float *out, kvs_error *err)
{
    char name[32];
    snprintf(name, sizeof name, "direction.%u", layer);
    const kvs_gguf_tensor *const t = kvs_gguf_find_tensor(g, name);
    if (t == NULL)
        return kvs_error_set(err, KVS_EFORMAT, "%s: no tensor %s", g->path, name);
    if (t->type != GGML_TYPE_F32 || t->n_dims != 1 || t->ne[0] != m->info.n_embd)
        return kvs_error_set(err, KVS_EFORMAT,
                             "%s: %s has type %d and %llu numbers in %u dims; f32 and the model's %u are right",
                             g->path, name, t->type, (unsigned long long)t->ne[0], t->n_dims, m->info.n_embd);
    memcpy(out, t->data, m->info.n_embd * sizeof *out);
    for (uint32_t i = 0; i < m->info.n_embd; i++)
        if (!isfinite(out[i]))
            return kvs_error_set(err, KVS_EFORMAT, "%s: %s, element %u is not a finite number", g->path, name, i);
    return KVS_OK;
}

kvs_status kvs_direction_read(const kvs_model *m, const char *path, uint32_t layer, float *out, kvs_error *err)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return kvs_error_set(err, KVS_EIO, "%s: cannot open: %s", path, strerror(errno));
    struct stat st;
    const bool good = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0;
    const size_t n_bytes = good ? (size_t)st.st_size : 0;
    void *const map = good ? mmap(NULL, n_bytes, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
    close(fd);
    if (map == MAP_FAILED)
        return kvs_error_set(err, KVS_EIO, "%s: not a regular file with anything in it; a GGUF file is right", path);
    kvs_gguf g;
    kvs_status status = kvs_gguf_parse(path, map, n_bytes, m->allocator, &g, err);
    if (status == KVS_OK) {
        status = check_model(m, &g, err);
        if (status == KVS_OK)
            status = read_layer(m, &g, layer, out, err);
        kvs_gguf_free(&g);
    }
    munmap(map, n_bytes);
    return status;
}

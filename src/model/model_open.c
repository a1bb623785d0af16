/* Opening and closing a model: the file is mapped, checked, its weights packed and its angles tabulated, while
 * libllama loads the vocabulary on a thread of its own (it takes longer than the rest). */
#include "model/arch.h"
#include "model/forward.h"
#include "model/model.h"
#include "model/vocab.h"
#include "model/weights.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <sha2.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    MAX_THREADS = 1024,
    ROPE_TASK_POSITIONS = 256,
};
/* Positions beyond the table are computed one by one, with equal results; a window of 1M tokens need not cost 1 GB. */
#define ROPE_TABLE_BYTES_MAX ((size_t)64 << 20)

/* What only this file needs of a model. */
typedef struct open_model {
    kvs_model m; /* first, so that a kvs_model * is one of these */
    kvs_hparams hp;
    const float *rope_divisors; /* [n_freq], in the file; NULL: ones */
} open_model;

void kvs_model_options_default(kvs_model_options *opt)
{
    memset(opt, 0, sizeof *opt);
}

/* ---- the file --------------------------------------------------------------------------------------------------- */

static kvs_status map_file(kvs_model *m, const char *path, kvs_error *err)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return kvs_error_set(err, KVS_EIO, "%s: cannot open: %s", path, strerror(errno));
    struct stat st;
    kvs_status status = KVS_OK;
    if (fstat(fd, &st) != 0)
        status = kvs_error_set(err, KVS_EIO, "%s: cannot stat: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        status = kvs_error_set(err, KVS_EIO, "%s: not a regular file; a GGUF file is right", path);
    else if (st.st_size == 0)
        status = kvs_error_set(err, KVS_EFORMAT, "%s: the file is empty; a GGUF file is right", path);
    if (status == KVS_OK) {
        m->map_bytes = (size_t)st.st_size;
        m->map = mmap(NULL, m->map_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (m->map == MAP_FAILED) {
            m->map = NULL;
            status = kvs_error_set(err, KVS_EIO, "%s: cannot map %zu bytes: %s", path, m->map_bytes, strerror(errno));
        }
    }
    close(fd);
    return status;
}

const char *kvs_model_sha256(kvs_model *m)
{
    if (m->sha256_hex[0] == '\0')
        SHA256Data(m->map, m->map_bytes, m->sha256_hex);
    return m->sha256_hex;
}

/* ---- metadata --------------------------------------------------------------------------------------------------- */

static kvs_status copy_strings(kvs_model *m, const kvs_gguf *g, const kvs_arch *arch, kvs_error *err)
{
    const char *name = "";
    size_t name_bytes = 0;
    bool found;
    KVS_TRY(kvs_gguf_str(g, "general.name", &name, &name_bytes, &found, err));
    char shown[64];
    kvs_gguf_printable(name, name_bytes, shown);
    const char *const texts[] = {g->path, kvs_arch_name(arch), shown};
    const char **const fields[] = {&m->info.path, &m->info.arch, &m->info.name};
    size_t total = 0;
    for (size_t i = 0; i < 3; i++)
        total += strlen(texts[i]) + 1;
    m->strings = kvs_alloc(m->allocator, total, 1);
    if (m->strings == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory for %zu bytes of names", g->path, total);
    char *at = m->strings;
    for (size_t i = 0; i < 3; i++) {
        *fields[i] = at;
        at = stpcpy(at, texts[i]) + 1;
    }
    return KVS_OK;
}

static void set_info(open_model *o, const kvs_gguf *g)
{
    kvs_model_info *info = &o->m.info;
    const kvs_hparams *hp = &o->hp;
    info->n_layers = hp->n_layers;
    info->n_heads = hp->n_heads;
    info->n_kv_heads = hp->n_kv_heads;
    info->head_dim = hp->head_dim;
    info->n_embd = hp->n_embd;
    info->n_ff = hp->n_ff;
    info->vocab_size = hp->vocab_size;
    info->window_tokens = hp->window_tokens;
    info->rope_base = (double)hp->rope_base;
    info->n_params = g->n_params;
    info->weight_bytes = g->weight_bytes;
    o->m.norm_eps = hp->norm_eps;
    o->m.n_freq = hp->n_rot / 2;
}

/* ---- angles ----------------------------------------------------------------------------------------------------- */

void kvs_rope_row_ggml(const kvs_model *m, int32_t pos, float *out)
{
    const open_model *o = (const open_model *)m;
    const float step = powf(o->hp.rope_base, -2.0f / (float)o->hp.n_rot);
    const float scale = 1.0f / o->hp.rope_factor;
    float theta = (float)pos;
    for (uint32_t i = 0; i < m->n_freq; i++) {
        const float divisor = o->rope_divisors != NULL ? o->rope_divisors[i] : 1.0f;
        const float angle = scale * (theta / divisor);
        out[i] = cosf(angle);
        out[m->n_freq + i] = sinf(angle);
        theta *= step;
    }
}

static void rope_task(void *ctx, uint32_t task, uint32_t thread)
{
    (void)thread;
    const kvs_model *m = ctx;
    /* An empty table computes: rows here and rows beyond the table come out of the same lines. */
    const kvs_rope_table empty = {.rows = NULL, .n_pos = 0, .n_freq = m->n_freq, .theta = m->theta};
    const uint32_t begin = task * ROPE_TASK_POSITIONS;
    const uint32_t end = kvs_min_u32(begin + ROPE_TASK_POSITIONS, m->rope.n_pos);
    for (uint32_t pos = begin; pos < end; pos++) {
        float *row = m->rope_rows + (size_t)pos * 2 * m->n_freq;
        if (m->rope_like_ggml)
            kvs_rope_row_ggml(m, (int32_t)pos, row);
        else
            kvs_rope_row(&empty, (int32_t)pos, row);
    }
}

static kvs_status build_rope(open_model *o, const kvs_gguf_tensor *divisors, kvs_error *err)
{
    kvs_model *m = &o->m;
    const size_t row_bytes = 2 * (size_t)m->n_freq * sizeof(float);
    const uint32_t n_pos = kvs_min_u32(m->info.window_tokens, (uint32_t)(ROPE_TABLE_BYTES_MAX / row_bytes));
    m->theta = kvs_alloc(m->allocator, m->n_freq, sizeof *m->theta);
    m->rope_rows = kvs_alloc(m->allocator, n_pos, row_bytes);
    if (m->theta == NULL || m->rope_rows == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory for angles of %u positions", m->info.path, n_pos);
    o->rope_divisors = divisors != NULL ? divisors->data : NULL;
    for (uint32_t i = 0; i < m->n_freq; i++) {
        const double divisor = o->rope_divisors != NULL ? (double)o->rope_divisors[i] : 1.0;
        if (!(divisor > 0.0) || isinf(divisor))
            return kvs_error_set(err, KVS_EFORMAT, "%s: rope_freqs.weight[%u] is %g; a positive number is right",
                                 m->info.path, i, divisor);
        m->theta[i] = pow(m->info.rope_base, -2.0 * i / (double)o->hp.n_rot) / divisor / (double)o->hp.rope_factor;
    }
    m->rope = (kvs_rope_table){.rows = m->rope_rows, .n_pos = n_pos, .n_freq = m->n_freq, .theta = m->theta};
    kvs_pool_run(m->pool, rope_task, m, (n_pos + ROPE_TASK_POSITIONS - 1) / ROPE_TASK_POSITIONS);
    return KVS_OK;
}

/* ---- the vocabulary's thread ------------------------------------------------------------------------------------ */

typedef struct vocab_loader {
    pthread_t thread;
    bool running;
    const char *path;
    uint32_t n_tokens;
    kvs_vocab *vocab;
    kvs_status status;
    kvs_error err;
} vocab_loader;

static void *load_vocab(void *arg)
{
    vocab_loader *l = arg;
    l->status = kvs_vocab_load(l->path, l->n_tokens, &l->vocab, &l->err);
    return NULL;
}

static void loader_start(vocab_loader *l)
{
    l->running = pthread_create(&l->thread, NULL, load_vocab, l) == 0;
    if (!l->running) /* no thread to be had: the same work, later finished */
        load_vocab(l);
}

/* The vocabulary's error counts only where the weights had none. */
static kvs_status loader_join(vocab_loader *l, kvs_model *m, kvs_status status, kvs_error *err)
{
    if (l->running)
        pthread_join(l->thread, NULL);
    m->vocab = l->vocab;
    if (status != KVS_OK || l->status == KVS_OK)
        return status;
    return kvs_error_set(err, l->status, "%s", l->err.message);
}

/* ---- opening ---------------------------------------------------------------------------------------------------- */

static kvs_status load_tensors(open_model *o, const kvs_gguf *g, const kvs_arch *arch, vocab_loader *loader,
                               kvs_error *err)
{
    kvs_model *m = &o->m;
    const kvs_gguf_tensor **bound = kvs_alloc(m->allocator, (size_t)m->info.n_layers * KVS_TENSOR_COUNT, sizeof *bound);
    if (bound == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory for %u layers", g->path, m->info.n_layers);
    kvs_status status = kvs_arch_bind(arch, g, &o->hp, bound, err);
    if (status == KVS_OK) {
        loader_start(loader);
        status = kvs_weights_load(m, g, bound, err);
        if (status == KVS_OK)
            status = build_rope(o, bound[KVS_TENSOR_ROPE_FREQS], err);
        status = loader_join(loader, m, status, err);
    }
    kvs_free(m->allocator, bound);
    return status;
}

static kvs_status open_checked(open_model *o, const kvs_gguf *g, const kvs_model_options *opt, kvs_error *err)
{
    kvs_model *m = &o->m;
    const kvs_arch *arch = NULL;
    KVS_TRY(kvs_arch_find(g, &arch, err));
    KVS_TRY(kvs_gguf_check_tokenizer(g, &o->hp.vocab_size, err));
    KVS_TRY(kvs_arch_read(arch, g, &o->hp, err));
    KVS_TRY(copy_strings(m, g, arch, err));
    set_info(o, g);
    vocab_loader loader = {.path = m->info.path, .n_tokens = o->hp.vocab_size};
    if (!opt->vocab_only)
        return load_tensors(o, g, arch, &loader, err);
    load_vocab(&loader);
    return loader_join(&loader, m, KVS_OK, err);
}

static kvs_status open_into(open_model *o, const char *path, const kvs_model_options *opt, kvs_error *err)
{
    kvs_model *m = &o->m;
    kvs_backend_init();
    m->kernels = kvs_kernels_get(kvs_cpu_masked(opt->cpu_mask));
    m->rope_like_ggml = opt->rope_like_ggml;
    m->info.isa = kvs_cpu_isa_name(m->kernels->cpu);
    KVS_TRY(map_file(m, path, err));
    const uint32_t n_threads = opt->vocab_only ? 1 : opt->n_threads != 0 ? opt->n_threads : kvs_cores_available();
    m->pool = kvs_pool_create(m->allocator, kvs_min_u32(n_threads, MAX_THREADS));
    if (m->pool == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory for a pool of %u threads", path, n_threads);
    m->info.n_threads = kvs_pool_n_threads(m->pool);
    kvs_gguf g;
    KVS_TRY(kvs_gguf_parse(path, m->map, m->map_bytes, m->allocator, &g, err));
    const kvs_status status = open_checked(o, &g, opt, err);
    kvs_gguf_free(&g);
    return status;
}

kvs_status kvs_model_open(const char *path, const kvs_model_options *opt, kvs_model **out, kvs_error *err)
{
    *out = NULL;
    kvs_model_options defaults;
    kvs_model_options_default(&defaults);
    if (opt == NULL)
        opt = &defaults;
    if (path == NULL || path[0] == '\0')
        return kvs_error_set(err, KVS_EINVAL, "no path given; the path of a GGUF file is right");
    if (opt->n_threads > MAX_THREADS)
        return kvs_error_set(err, KVS_EINVAL, "n_threads is %u; 0 (all cores) to %d are right", opt->n_threads,
                             MAX_THREADS);
    const kvs_allocator *a = opt->allocator != NULL ? opt->allocator : kvs_allocator_default();
    open_model *o = kvs_alloc(a, 1, sizeof *o);
    if (o == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory for a model", path);
    kvs_model *m = &o->m;
    m->allocator = a;
    const kvs_status status = open_into(o, path, opt, err);
    if (status == KVS_OK)
        *out = m;
    else
        kvs_model_close(&m);
    return status;
}

void kvs_model_close(kvs_model **m)
{
    if (m == NULL || *m == NULL)
        return;
    kvs_model *const model = *m;
    kvs_forward_free(&model->forward);
    kvs_weights_free(model);
    kvs_vocab_free(model->vocab);
    if (model->pool != NULL)
        kvs_pool_free(model->pool);
    kvs_free(model->allocator, model->theta);
    kvs_free(model->allocator, model->rope_rows);
    kvs_free(model->allocator, model->strings);
    if (model->map != NULL)
        munmap(model->map, model->map_bytes);
    kvs_free(model->allocator, model);
    *m = NULL;
}

void kvs_model_get_info(const kvs_model *m, kvs_model_info *info)
{
    *info = m->info;
}

/* Binds tensors to kvs_weight and rearranges them into panels. Matrices that read the same input (q, k, v; gate, up)
 * become one where their types allow it. The panel layout is src/kernels/matmul_pack.c's. */
#include "model/weights.h"

#include <ggml-cpu.h>
#include <ggml.h>
#include <string.h>
#include <sys/mman.h>

enum {
    MAX_SOURCES = 3,
    PANEL_ROWS = 16, /* a task packs whole panels, so no two tasks write one */
    TASK_PANELS = 32,
};

/* Source tensors stacked into one matrix. */
typedef struct pack_job {
    kvs_weight *w;
    const kvs_gguf_tensor *src[MAX_SOURCES];
    uint32_t n_src;
    uint32_t task_begin;
} pack_job;

typedef struct plan {
    kvs_model *m;
    const kvs_gguf *g;
    pack_job *jobs; /* [cap] */
    uint32_t n_jobs, cap, n_tasks;
} plan;

static kvs_weight_type weight_type(int ggml_type)
{
    switch (ggml_type) {
    case GGML_TYPE_F32:
        return KVS_WEIGHT_F32;
    case GGML_TYPE_Q4_0:
        return KVS_WEIGHT_Q4_0;
    case GGML_TYPE_Q4_1:
        return KVS_WEIGHT_Q4_1;
    case GGML_TYPE_Q8_0:
        return KVS_WEIGHT_Q8_0;
    case GGML_TYPE_F16:
        return KVS_WEIGHT_F16;
    case GGML_TYPE_BF16:
        return KVS_WEIGHT_BF16;
    case GGML_TYPE_Q5_0:
        return KVS_WEIGHT_Q5_0;
    case GGML_TYPE_Q5_1:
        return KVS_WEIGHT_Q5_1;
    case GGML_TYPE_Q4_K:
        return KVS_WEIGHT_Q4_K;
    case GGML_TYPE_Q5_K:
        return KVS_WEIGHT_Q5_K;
    case GGML_TYPE_Q6_K:
        return KVS_WEIGHT_Q6_K;
    default:
        return KVS_WEIGHT_OTHER;
    }
}

/* The rest of ggml's types run through its own functions. Activation-only types (q8_1, q8_K) have none for weights. */
static kvs_status set_traits(const plan *p, kvs_weight *w, const kvs_gguf_tensor *t, kvs_error *err)
{
    const enum ggml_type type = (enum ggml_type)t->type;
    const struct ggml_type_traits *traits = ggml_get_type_traits(type);
    const struct ggml_type_traits_cpu *cpu = ggml_get_type_traits_cpu(type);
    const struct ggml_type_traits_cpu *act = cpu->vec_dot != NULL ? ggml_get_type_traits_cpu(cpu->vec_dot_type) : NULL;
    char name[64];
    kvs_gguf_printable(t->name, t->name_bytes, name);
    if (traits->to_float == NULL || act == NULL || act->from_float == NULL)
        return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: tensor %s is of type %s, for which ggml has no products",
                             p->g->path, name, ggml_type_name(type));
    const int64_t block = ggml_blck_size(cpu->vec_dot_type);
    if (w->n_in % block != 0)
        return kvs_error_set(err, KVS_EUNSUPPORTED,
                             "%s: tensor %s has rows of %u; activations of type %s need a multiple of %lld", p->g->path,
                             name, w->n_in, ggml_type_name(cpu->vec_dot_type), (long long)block);
    w->to_float = traits->to_float;
    w->vec_dot = cpu->vec_dot;
    w->from_float = act->from_float;
    w->act_row_bytes = ggml_row_size(cpu->vec_dot_type, w->n_in);
    return KVS_OK;
}

static kvs_status add_weight(plan *p, kvs_weight *w, const kvs_gguf_tensor *const *src, uint32_t n_src, bool pack,
                             kvs_error *err)
{
    w->type = weight_type(src[0]->type);
    w->n_in = (uint32_t)src[0]->ne[0];
    w->raw_row_bytes = src[0]->row_bytes;
    w->raw = n_src == 1 ? src[0]->data : NULL;
    for (uint32_t i = 0; i < n_src; i++)
        w->n_out += (uint32_t)src[i]->ne[1];
    if (w->type == KVS_WEIGHT_OTHER)
        return set_traits(p, w, src[0], err);
    if (!pack)
        return KVS_OK;
    w->packed_bytes = kvs_weight_packed_bytes(w->type, w->n_out, w->n_in);
    p->m->info.packed_bytes += w->packed_bytes;
    pack_job *job = &p->jobs[p->n_jobs++];
    job->w = w;
    memcpy(job->src, src, n_src * sizeof *src);
    job->n_src = n_src;
    job->task_begin = p->n_tasks;
    p->n_tasks += (w->n_out + PANEL_ROWS * TASK_PANELS - 1) / (PANEL_ROWS * TASK_PANELS);
    return KVS_OK;
}

/* One matrix of all n where they are of one packed type, else each in its own part. */
static kvs_status add_joined(plan *p, kvs_weight *joined, kvs_weight *const *parts, const kvs_gguf_tensor *const *src,
                             uint32_t n, kvs_error *err)
{
    bool same = weight_type(src[0]->type) != KVS_WEIGHT_OTHER;
    for (uint32_t i = 1; i < n; i++)
        same = same && src[i]->type == src[0]->type;
    if (same)
        return add_weight(p, joined, src, n, true, err);
    for (uint32_t i = 0; i < n; i++)
        KVS_TRY(add_weight(p, parts[i], &src[i], 1, true, err));
    return KVS_OK;
}

static kvs_status add_layer(plan *p, uint32_t layer, const kvs_gguf_tensor *const *bound, kvs_error *err)
{
    kvs_layer *l = &p->m->layers[layer];
    kvs_layer_parts *s = &p->m->parts[layer];
    l->attn_norm = bound[KVS_TENSOR_ATTN_NORM]->data;
    l->ffn_norm = bound[KVS_TENSOR_FFN_NORM]->data;
    const kvs_gguf_tensor *const qkv[] = {bound[KVS_TENSOR_Q], bound[KVS_TENSOR_K], bound[KVS_TENSOR_V]};
    kvs_weight *const qkv_parts[] = {&s->q, &s->k, &s->v};
    KVS_TRY(add_joined(p, &l->qkv, qkv_parts, qkv, 3, err));
    KVS_TRY(add_weight(p, &l->attn_out, &bound[KVS_TENSOR_ATTN_OUT], 1, true, err));
    const kvs_gguf_tensor *const gate_up[] = {bound[KVS_TENSOR_GATE], bound[KVS_TENSOR_UP]};
    kvs_weight *const gate_up_parts[] = {&s->gate, &s->up};
    KVS_TRY(add_joined(p, &l->gate_up, gate_up_parts, gate_up, 2, err));
    return add_weight(p, &l->ffn_down, &bound[KVS_TENSOR_DOWN], 1, true, err);
}

/* Task `task` packs TASK_PANELS panels of one job: those rows of each source that fall inside. */
static void pack_task(void *ctx, uint32_t task, uint32_t thread)
{
    (void)thread;
    const plan *p = ctx;
    uint32_t lo = 0, hi = p->n_jobs;
    while (hi - lo > 1) {
        const uint32_t mid = (lo + hi) / 2;
        if (p->jobs[mid].task_begin <= task)
            lo = mid;
        else
            hi = mid;
    }
    const pack_job *job = &p->jobs[lo];
    const uint32_t begin = (task - job->task_begin) * TASK_PANELS * PANEL_ROWS;
    const uint32_t end = kvs_min_u32(begin + TASK_PANELS * PANEL_ROWS, job->w->n_out);
    for (uint32_t i = 0, src_begin = 0; i < job->n_src; i++) {
        const kvs_gguf_tensor *t = job->src[i];
        const uint32_t src_end = src_begin + (uint32_t)t->ne[1];
        const uint32_t from = kvs_max_u32(begin, src_begin), to = kvs_min_u32(end, src_end);
        if (from < to)
            kvs_weight_pack(job->w, (const uint8_t *)t->data + (size_t)(from - src_begin) * t->row_bytes, from,
                            to - from);
        src_begin = src_end;
    }
}

static kvs_status add_all(plan *p, const kvs_gguf_tensor *const *bound, kvs_error *err)
{
    kvs_model *m = p->m;
    const kvs_gguf_tensor *embd = bound[KVS_TENSOR_EMBD], *head = bound[KVS_TENSOR_HEAD];
    /* An embedding of its own is only ever read row by row: from the file, unpacked. */
    KVS_TRY(add_weight(p, &m->embd, &embd, 1, head == NULL, err));
    if (head != NULL)
        KVS_TRY(add_weight(p, &m->head, &head, 1, true, err));
    m->out_norm = bound[KVS_TENSOR_OUT_NORM]->data;
    for (uint32_t layer = 0; layer < m->info.n_layers; layer++)
        KVS_TRY(add_layer(p, layer, bound + (size_t)layer * KVS_TENSOR_COUNT, err));
    return KVS_OK;
}

/* All packed weights stand in one block, in the order a token reads them: large enough for huge pages, one stream for the
 * prefetchers. Measured on the Q4_1 layers of SmolLM2-135M, one row and thread: 40 to 43 GFLOP/s, and 34 to 35 with a
 * block for each matrix. */
static kvs_status place_all(plan *p, kvs_error *err)
{
    kvs_model *m = p->m;
    size_t total = 0;
    for (uint32_t i = 0; i < p->n_jobs; i++)
        total += kvs_round_up(p->jobs[i].w->packed_bytes, KVS_ALIGN);
    m->packed_weights = kvs_alloc(m->allocator, total, 1);
    if (m->packed_weights == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory for %zu bytes of packed weights", p->g->path, total);
    uint8_t *at = m->packed_weights;
    for (uint32_t i = 0; i < p->n_jobs; i++) {
        p->jobs[i].w->packed = at;
        at += kvs_round_up(p->jobs[i].w->packed_bytes, KVS_ALIGN);
    }
    if (m->head.n_out == 0) /* tied */
        m->head = m->embd;
    return KVS_OK;
}

kvs_status kvs_weights_load(kvs_model *m, const kvs_gguf *g, const kvs_gguf_tensor *const *bound, kvs_error *err)
{
    const uint32_t cap = m->info.n_layers * (KVS_TENSOR_COUNT - KVS_TENSOR_ATTN_NORM) + 2;
    plan p = {.m = m, .g = g, .cap = cap};
    m->layers = kvs_alloc(m->allocator, m->info.n_layers, sizeof *m->layers);
    m->parts = kvs_alloc(m->allocator, m->info.n_layers, sizeof *m->parts);
    p.jobs = kvs_alloc(m->allocator, cap, sizeof *p.jobs);
    if (m->layers == NULL || m->parts == NULL || p.jobs == NULL) {
        kvs_free(m->allocator, p.jobs);
        return kvs_error_set(err, KVS_ENOMEM, "%s: no memory for %u layers", g->path, m->info.n_layers);
    }
    kvs_status status = add_all(&p, bound, err);
    if (status == KVS_OK)
        status = place_all(&p, err);
    if (status == KVS_OK) {
        kvs_pool_run(m->pool, pack_task, &p, p.n_tasks);
        /* The originals of packed rows are not read again; norms and unpacked rows come back from the page cache. */
        madvise(m->map, m->map_bytes, MADV_DONTNEED);
    }
    kvs_free(m->allocator, p.jobs);
    return status;
}

void kvs_weights_free(kvs_model *m)
{
    kvs_free(m->allocator, m->packed_weights);
    kvs_free(m->allocator, m->layers);
    kvs_free(m->allocator, m->parts);
}

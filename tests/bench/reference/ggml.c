/* ggml's CPU backend, one graph a shape with a node a layer. Variants: TYPE (plain buffers), TYPE/repack, TYPE/amx (its
 * buffers that rearrange weights, where it has that type in them), flash and soft_max (attention). */
#include "reference.h"
#include "kernels/kernels.h"

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

enum { NODES_MAX = 512 };

static struct {
    ggml_backend_t backend;
    enum ggml_type type;
    ggml_backend_buffer_type_t buffer_type;
    bool flash, soft_max;
    struct ggml_context *weights_ctx, *ctx; /* what stays and what n_rows decides */
    struct ggml_tensor *weights[REFERENCE_SHAPES][REFERENCE_LAYERS];
    ggml_backend_buffer_t weights_buffer, x_buffer, y_buffer;
    ggml_gallocr_t between; /* memory of what lies between q and out */
    struct ggml_cgraph *graphs[REFERENCE_SHAPES];
} lib;

void *reference_quantise(int ggml_type, uint32_t shape, uint32_t layer)
{
    const reference_shape *s = &reference_shapes[shape];
    const size_t row_bytes = ggml_row_size((enum ggml_type)ggml_type, s->n_in);
    uint8_t *const out = reference_alloc(row_bytes * s->n_out);
    float row[2048];
    for (uint32_t r = 0; r < s->n_out; r++) {
        reference_weights(shape, layer, r, 1, row);
        ggml_quantize_chunk((enum ggml_type)ggml_type, row, out + r * row_bytes, 0, 1, s->n_in, NULL);
    }
    return out;
}

/* C has no cast from an object pointer to a function pointer; POSIX has both of one size. */
static void find_function(const char *name, void *function)
{
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(lib.backend));
    void *const address = ggml_backend_reg_get_proc_address(reg, name);
    memcpy(function, &address, sizeof address);
}

/* The extra buffer type whose name this is, or NULL. */
static ggml_backend_buffer_type_t extra_buffer_type(const char *name)
{
    ggml_backend_dev_get_extra_bufts_t get;
    find_function("ggml_backend_dev_get_extra_bufts", &get);
    for (ggml_backend_buffer_type_t *t = get ? get(ggml_backend_get_device(lib.backend)) : NULL;
         t != NULL && *t != NULL; t++)
        if (strcasecmp(ggml_backend_buft_name(*t), name) == 0)
            return *t;
    return NULL;
}

static enum ggml_type type_of(const char *name, size_t n_bytes)
{
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        const char *known = ggml_type_name((enum ggml_type)t);
        if (known != NULL && strlen(known) == n_bytes && strncasecmp(known, name, n_bytes) == 0)
            return (enum ggml_type)t;
    }
    return GGML_TYPE_COUNT;
}

static void stay_silent(enum ggml_log_level level, const char *text, void *ctx)
{
    (void)level, (void)text, (void)ctx;
}

static bool open(const char *variant, uint32_t n_threads, const char **why)
{
    ggml_log_set(stay_silent, NULL);
    ggml_cpu_init();
    lib.backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(lib.backend, (int)n_threads);
    lib.flash = strcmp(variant, "flash") == 0, lib.soft_max = strcmp(variant, "soft_max") == 0;
    const size_t n_bytes = strcspn(variant, "/");
    const bool repack = strcmp(variant + n_bytes, "/repack") == 0, amx = strcmp(variant + n_bytes, "/amx") == 0;
    lib.type = lib.flash || lib.soft_max ? GGML_TYPE_F16 : type_of(variant, n_bytes);
    lib.buffer_type = repack ? extra_buffer_type("CPU_REPACK")
                      : amx  ? extra_buffer_type("AMX")
                             : ggml_backend_cpu_buffer_type();
    *why = lib.buffer_type == NULL ? "ggml has no such buffers on this CPU" : "ggml has no such type";
    return lib.type != GGML_TYPE_COUNT && lib.buffer_type != NULL;
}

static struct ggml_context *new_context(void)
{
    return ggml_init((struct ggml_init_params){
        .mem_size =
            NODES_MAX * ggml_tensor_overhead() + REFERENCE_SHAPES * ggml_graph_overhead_custom(NODES_MAX, false),
        .no_alloc = true,
    });
}

/* Forgets what the last n_rows made. */
static void renew(const float *x, float *y)
{
    if (lib.ctx != NULL) {
        ggml_free(lib.ctx);
        ggml_backend_buffer_free(lib.x_buffer), ggml_backend_buffer_free(lib.y_buffer);
    }
    lib.ctx = new_context();
    lib.x_buffer = ggml_backend_cpu_buffer_from_ptr((void *)(uintptr_t)x, REFERENCE_ROWS_MAX * 1536 * sizeof *x);
    lib.y_buffer = ggml_backend_cpu_buffer_from_ptr(y, (size_t)REFERENCE_ROWS_MAX * 49152 * sizeof *y);
}

/* ---- products ---- */

/* Rearranging buffers accept any tensor and leave those alone that they have no code for: only the op tells. */
static bool is_supported(uint32_t n_rows)
{
    for (uint32_t s = 0; s < REFERENCE_SHAPES; s++) {
        struct ggml_tensor *x = ggml_new_tensor_2d(lib.ctx, GGML_TYPE_F32, reference_shapes[s].n_in, n_rows);
        ggml_backend_tensor_alloc(lib.x_buffer, x, ggml_backend_buffer_get_base(lib.x_buffer));
        const struct ggml_tensor *y = ggml_mul_mat(lib.ctx, lib.weights[s][0], x);
        if (!ggml_backend_dev_supports_op(ggml_backend_get_device(lib.backend), y))
            return false;
        if (lib.buffer_type != ggml_backend_cpu_buffer_type() && lib.weights[s][0]->extra == NULL)
            return false;
    }
    return true;
}

static bool make_weights(uint32_t n_rows)
{
    lib.weights_ctx = new_context();
    for (uint32_t s = 0; s < REFERENCE_SHAPES; s++)
        for (uint32_t l = 0; l < reference_shapes[s].n_layers; l++)
            lib.weights[s][l] =
                ggml_new_tensor_2d(lib.weights_ctx, lib.type, reference_shapes[s].n_in, reference_shapes[s].n_out);
    lib.weights_buffer = ggml_backend_alloc_ctx_tensors_from_buft(lib.weights_ctx, lib.buffer_type);
    if (lib.weights_buffer == NULL || !is_supported(n_rows))
        return false;
    for (uint32_t s = 0; s < REFERENCE_SHAPES; s++)
        for (uint32_t l = 0; l < reference_shapes[s].n_layers; l++) {
            void *const raw = reference_quantise((int)lib.type, s, l);
            ggml_backend_tensor_set(lib.weights[s][l], raw, 0, ggml_nbytes(lib.weights[s][l]));
            reference_free(raw);
        }
    return true;
}

static bool products(uint32_t n_rows, const float *x, float *y, const char **why)
{
    *why = "ggml does not rearrange this type on this CPU";
    renew(x, y);
    if (lib.weights_ctx == NULL && !make_weights(n_rows))
        return false;
    for (uint32_t s = 0; s < REFERENCE_SHAPES; s++) {
        struct ggml_tensor *in = ggml_new_tensor_2d(lib.ctx, GGML_TYPE_F32, reference_shapes[s].n_in, n_rows);
        ggml_backend_tensor_alloc(lib.x_buffer, in, ggml_backend_buffer_get_base(lib.x_buffer));
        lib.graphs[s] = ggml_new_graph_custom(lib.ctx, NODES_MAX, false);
        for (uint32_t l = 0; l < reference_shapes[s].n_layers; l++) {
            struct ggml_tensor *out = ggml_mul_mat(lib.ctx, lib.weights[s][l], in);
            ggml_backend_tensor_alloc(lib.y_buffer, out, ggml_backend_buffer_get_base(lib.y_buffer));
            ggml_build_forward_expand(lib.graphs[s], out);
        }
    }
    return true;
}

static void product_run(uint32_t shape)
{
    ggml_backend_graph_compute(lib.backend, lib.graphs[shape]);
}

/* ---- attention ---- */

/* Keys [slots][64] of each head; values so for flash attention, [64][slots] for the other path, as llama.cpp stores
 * them. */
static void fill_layer(uint32_t layer, uint32_t n_slots, struct ggml_tensor *k, struct ggml_tensor *v)
{
    uint16_t half[REFERENCE_HEAD_DIM];
    uint16_t *const keys = k->data, *const values = v->data;
    for (uint32_t h = 0; h < REFERENCE_KV_HEADS; h++)
        for (uint32_t s = 0; s < n_slots; s++) {
            float key[REFERENCE_HEAD_DIM], value[REFERENCE_HEAD_DIM];
            reference_key_value(layer, h, s, key, value);
            ggml_fp32_to_fp16_row(key, keys + ((size_t)h * n_slots + s) * REFERENCE_HEAD_DIM, REFERENCE_HEAD_DIM);
            ggml_fp32_to_fp16_row(value, half, REFERENCE_HEAD_DIM);
            for (uint32_t d = 0; d < REFERENCE_HEAD_DIM; d++)
                values[lib.flash ? ((size_t)h * n_slots + s) * REFERENCE_HEAD_DIM + d
                                 : ((size_t)h * REFERENCE_HEAD_DIM + d) * n_slots + s] = half[d];
        }
}

static void fill_mask(const reference_attention *a, struct ggml_tensor *mask)
{
    const uint16_t hidden = ggml_fp32_to_fp16(-__builtin_inff());
    uint16_t *const rows = mask->data;
    for (uint32_t r = 0; r < (uint32_t)mask->ne[1]; r++)
        for (uint32_t s = 0; s < a->n_slots; s++)
            rows[(size_t)r * a->n_slots + s] = r < a->n_rows && s <= a->n_slots - a->n_rows + r ? 0 : hidden;
}

/* out [n_rows][9][64] of one layer. */
static struct ggml_tensor *attend(struct ggml_tensor *q, struct ggml_tensor *k, struct ggml_tensor *v,
                                  struct ggml_tensor *mask)
{
    if (lib.flash)
        return ggml_flash_attn_ext(lib.ctx, q, k, v, mask, 0.125f, 0.0f, 0.0f);
    struct ggml_tensor *kq = ggml_mul_mat(lib.ctx, k, q);
    kq = ggml_soft_max_ext(lib.ctx, kq, mask, 0.125f, 0.0f);
    return ggml_cont(lib.ctx, ggml_permute(lib.ctx, ggml_mul_mat(lib.ctx, v, kq), 0, 2, 1, 3));
}

static bool attention(const reference_attention *a, const char **why)
{
    *why = "attention is flash or soft_max";
    if (!lib.flash && !lib.soft_max)
        return false;
    renew(a->q, a->out);
    if (lib.weights_ctx != NULL) {
        ggml_free(lib.weights_ctx);
        ggml_backend_buffer_free(lib.weights_buffer);
    }
    lib.weights_ctx = new_context();
    struct ggml_tensor *k[REFERENCE_KV_LAYERS], *v[REFERENCE_KV_LAYERS], *mask = NULL;
    const int64_t dim = REFERENCE_HEAD_DIM;
    for (uint32_t l = 0; l < a->n_layers; l++) {
        k[l] = ggml_new_tensor_3d(lib.weights_ctx, GGML_TYPE_F16, dim, a->n_slots, REFERENCE_KV_HEADS);
        v[l] = lib.flash ? ggml_new_tensor_3d(lib.weights_ctx, GGML_TYPE_F16, dim, a->n_slots, REFERENCE_KV_HEADS)
                         : ggml_new_tensor_3d(lib.weights_ctx, GGML_TYPE_F16, a->n_slots, dim, REFERENCE_KV_HEADS);
    }
    if (a->n_rows > 1)
        mask = ggml_new_tensor_2d(lib.weights_ctx, GGML_TYPE_F16, a->n_slots, (int64_t)kvs_round_up(a->n_rows, 64));
    lib.weights_buffer = ggml_backend_alloc_ctx_tensors_from_buft(lib.weights_ctx, lib.buffer_type);
    struct ggml_tensor *q = ggml_new_tensor_3d(lib.ctx, GGML_TYPE_F32, dim, REFERENCE_HEADS, a->n_rows);
    ggml_backend_tensor_alloc(lib.x_buffer, q, ggml_backend_buffer_get_base(lib.x_buffer));
    q = ggml_permute(lib.ctx, q, 0, 2, 1, 3);
    if (mask != NULL)
        fill_mask(a, mask);
    lib.graphs[0] = ggml_new_graph_custom(lib.ctx, NODES_MAX, false);
    for (uint32_t l = 0; l < a->n_layers; l++) {
        fill_layer(l, a->n_slots, k[l], v[l]);
        struct ggml_tensor *out = attend(q, k[l], v[l], mask);
        ggml_backend_tensor_alloc(lib.y_buffer, out, ggml_backend_buffer_get_base(lib.y_buffer));
        ggml_build_forward_expand(lib.graphs[0], out);
    }
    if (lib.between == NULL)
        lib.between = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    return ggml_gallocr_alloc_graph(lib.between, lib.graphs[0]);
}

static void attention_run(void)
{
    ggml_backend_graph_compute(lib.backend, lib.graphs[0]);
}

static void describe(char *text, uint32_t text_bytes)
{
    lib.backend = ggml_backend_cpu_init();
    ggml_backend_get_features_t get;
    find_function("ggml_backend_get_features", &get);
    size_t used = (size_t)snprintf(text, text_bytes, "ggml %s,", ggml_version());
    for (const struct ggml_backend_feature *f =
             get ? get(ggml_backend_dev_backend_reg(ggml_backend_get_device(lib.backend))) : NULL;
         f != NULL && f->name && used < text_bytes; f++)
        used += (size_t)snprintf(text + used, text_bytes - used, " %s", f->name);
    ggml_backend_free(lib.backend);
}

const reference_engine reference_ggml = {"ggml", open, products, product_run, attention, attention_run, describe};

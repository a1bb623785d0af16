/* The table of architectures. Key and tensor names are GGUF's (ggml's docs/gguf.md). */
#include "model/arch.h"

#include <ggml.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

typedef enum dim { DIM_NONE, DIM_EMBD, DIM_VOCAB, DIM_Q, DIM_KV, DIM_FF, DIM_FREQS } dim;

typedef struct tensor_row {
    const char *name; /* "%u" is the layer's number */
    kvs_tensor_role role;
    bool per_layer, required, f32; /* f32: used in place as floats */
    dim n_in, n_out;               /* ne[0], ne[1] */
} tensor_row;

/* A key whose presence with another value changes the arithmetic in a way the forward pass does not know. */
typedef struct refused_key {
    const char *suffix;
    uint32_t harmless;
} refused_key;

struct kvs_arch {
    const char *name;
    const tensor_row *tensors;
    size_t n_tensors;
    const refused_key *refused;
    size_t n_refused;
};

static const tensor_row llama_tensors[] = {
    {"token_embd.weight", KVS_TENSOR_EMBD, false, true, false, DIM_EMBD, DIM_VOCAB},
    {"output_norm.weight", KVS_TENSOR_OUT_NORM, false, true, true, DIM_EMBD, DIM_NONE},
    {"output.weight", KVS_TENSOR_HEAD, false, false, false, DIM_EMBD, DIM_VOCAB},
    {"rope_freqs.weight", KVS_TENSOR_ROPE_FREQS, false, false, true, DIM_FREQS, DIM_NONE},
    {"blk.%u.attn_norm.weight", KVS_TENSOR_ATTN_NORM, true, true, true, DIM_EMBD, DIM_NONE},
    {"blk.%u.attn_q.weight", KVS_TENSOR_Q, true, true, false, DIM_EMBD, DIM_Q},
    {"blk.%u.attn_k.weight", KVS_TENSOR_K, true, true, false, DIM_EMBD, DIM_KV},
    {"blk.%u.attn_v.weight", KVS_TENSOR_V, true, true, false, DIM_EMBD, DIM_KV},
    {"blk.%u.attn_output.weight", KVS_TENSOR_ATTN_OUT, true, true, false, DIM_Q, DIM_EMBD},
    {"blk.%u.ffn_norm.weight", KVS_TENSOR_FFN_NORM, true, true, true, DIM_EMBD, DIM_NONE},
    {"blk.%u.ffn_gate.weight", KVS_TENSOR_GATE, true, true, false, DIM_EMBD, DIM_FF},
    {"blk.%u.ffn_up.weight", KVS_TENSOR_UP, true, true, false, DIM_EMBD, DIM_FF},
    {"blk.%u.ffn_down.weight", KVS_TENSOR_DOWN, true, true, false, DIM_FF, DIM_EMBD},
};

static const refused_key llama_refused[] = {{"expert_count", 0}, {"attention.sliding_window", 0}};

static const kvs_arch archs[] = {
    {"llama", llama_tensors, sizeof llama_tensors / sizeof *llama_tensors, llama_refused,
     sizeof llama_refused / sizeof *llama_refused},
};
enum { N_ARCHS = sizeof archs / sizeof *archs };

kvs_status kvs_arch_find(const kvs_gguf *g, const kvs_arch **out, kvs_error *err)
{
    const char *name = "";
    size_t n_bytes = 0;
    KVS_TRY(kvs_gguf_str(g, "general.architecture", &name, &n_bytes, NULL, err));
    char known[64] = "", shown[64];
    for (size_t i = 0, at = 0; i < N_ARCHS; i++) {
        if (strlen(archs[i].name) == n_bytes && memcmp(archs[i].name, name, n_bytes) == 0) {
            *out = &archs[i];
            return KVS_OK;
        }
        at += (size_t)snprintf(known + at, sizeof known - at, "%s%s", i == 0 ? "" : ", ", archs[i].name);
    }
    return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: architecture '%s'; this build runs: %s", g->path,
                         kvs_gguf_printable(name, n_bytes, shown), known);
}

const char *kvs_arch_name(const kvs_arch *arch)
{
    return arch->name;
}

/* ---- hyper-parameters ------------------------------------------------------------------------------------------- */

static void key_of(const kvs_arch *arch, const char *suffix, char key[96])
{
    snprintf(key, 96, "%s.%s", arch->name, suffix);
}

/* Bounds keep every product of two sizes inside 64 bits and every size inside 32; no model comes near them. */
static kvs_status read_u32(const kvs_arch *arch, const kvs_gguf *g, const char *suffix, uint32_t max, bool *found,
                           uint32_t *out, kvs_error *err)
{
    char key[96];
    key_of(arch, suffix, key);
    KVS_TRY(kvs_gguf_u32(g, key, out, found, err));
    if (*out < 1 || *out > max)
        return kvs_error_set(err, KVS_EFORMAT, "%s: %s is %u; 1 to %u is right", g->path, key, *out, max);
    return KVS_OK;
}

static kvs_status read_f32(const kvs_arch *arch, const kvs_gguf *g, const char *suffix, float min, float max,
                           bool *found, float *out, kvs_error *err)
{
    char key[96];
    key_of(arch, suffix, key);
    KVS_TRY(kvs_gguf_f32(g, key, out, found, err));
    if (!(*out >= min && *out <= max)) /* a NaN is neither */
        return kvs_error_set(err, KVS_EFORMAT, "%s: %s is %g; %g to %g is right", g->path, key, (double)*out,
                             (double)min, (double)max);
    return KVS_OK;
}

static kvs_status read_rope(const kvs_arch *arch, const kvs_gguf *g, kvs_hparams *hp, kvs_error *err)
{
    bool found;
    hp->rope_base = 10000.0f; /* ggml's default where the key is absent */
    KVS_TRY(read_f32(arch, g, "rope.freq_base", 1.0f, 1e12f, &found, &hp->rope_base, err));
    hp->n_rot = hp->head_dim;
    KVS_TRY(read_u32(arch, g, "rope.dimension_count", 1 << 16, &found, &hp->n_rot, err));
    if (hp->n_rot > hp->head_dim || hp->n_rot % 2 != 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s: %s.rope.dimension_count is %u; an even number up to %u is right",
                             g->path, arch->name, hp->n_rot, hp->head_dim);
    const char *type = "none";
    size_t n_bytes = 4;
    char key[96], shown[64];
    key_of(arch, "rope.scaling.type", key);
    KVS_TRY(kvs_gguf_str(g, key, &type, &n_bytes, &found, err));
    float factor = 1.0f;
    bool has_factor, has_old = false;
    KVS_TRY(read_f32(arch, g, "rope.scaling.factor", 1e-3f, 1e6f, &has_factor, &factor, err));
    if (!has_factor) /* the name before GGUF's second version */
        KVS_TRY(read_f32(arch, g, "rope.scale_linear", 1e-3f, 1e6f, &has_old, &factor, err));
    const bool none = n_bytes == 4 && memcmp(type, "none", 4) == 0;
    const bool linear = (n_bytes == 6 && memcmp(type, "linear", 6) == 0) || (!found && (has_factor || has_old));
    if (!none && !linear && factor != 1.0f)
        return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: %s is '%s' with factor %g; none and linear are supported",
                             g->path, key, kvs_gguf_printable(type, n_bytes, shown), (double)factor);
    hp->rope_factor = linear ? factor : 1.0f;
    return KVS_OK;
}

static kvs_status read_heads(const kvs_arch *arch, const kvs_gguf *g, kvs_hparams *hp, kvs_error *err)
{
    bool found;
    KVS_TRY(read_u32(arch, g, "attention.head_count", 1 << 14, NULL, &hp->n_heads, err));
    hp->n_kv_heads = hp->n_heads;
    KVS_TRY(read_u32(arch, g, "attention.head_count_kv", 1 << 14, &found, &hp->n_kv_heads, err));
    if (hp->n_heads % hp->n_kv_heads != 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s: %u query heads cannot share %u KV heads evenly", g->path,
                             hp->n_heads, hp->n_kv_heads);
    hp->head_dim = hp->n_embd / hp->n_heads;
    const uint32_t from_embd = hp->head_dim;
    hp->head_dim += hp->head_dim == 0; /* so that an absent key passes the range and the check below speaks */
    KVS_TRY(read_u32(arch, g, "attention.key_length", 512, &found, &hp->head_dim, err));
    if (!found && (from_embd == 0 || hp->n_embd % hp->n_heads != 0))
        return kvs_error_set(
            err, KVS_EFORMAT,
            "%s: %s.embedding_length %u is no multiple of %u heads, and %s.attention.key_length is missing", g->path,
            arch->name, hp->n_embd, hp->n_heads, arch->name);
    uint32_t value_length = hp->head_dim;
    KVS_TRY(read_u32(arch, g, "attention.value_length", 1 << 14, &found, &value_length, err));
    if (value_length != hp->head_dim)
        return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: %s.attention.value_length is %u; %u, the key's, is supported",
                             g->path, arch->name, value_length, hp->head_dim);
    return KVS_OK;
}

kvs_status kvs_arch_read(const kvs_arch *arch, const kvs_gguf *g, kvs_hparams *hp, kvs_error *err)
{
    char key[96];
    for (size_t i = 0; i < arch->n_refused; i++) {
        uint32_t value = arch->refused[i].harmless;
        bool found;
        key_of(arch, arch->refused[i].suffix, key);
        KVS_TRY(kvs_gguf_u32(g, key, &value, &found, err));
        if (value != arch->refused[i].harmless)
            return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: %s is %u; only %u, or no such key, is supported", g->path,
                                 key, value, arch->refused[i].harmless);
    }
    KVS_TRY(read_u32(arch, g, "block_count", 1 << 12, NULL, &hp->n_layers, err));
    KVS_TRY(read_u32(arch, g, "context_length", 1 << 27, NULL, &hp->window_tokens, err));
    KVS_TRY(read_u32(arch, g, "embedding_length", 1 << 20, NULL, &hp->n_embd, err));
    KVS_TRY(read_u32(arch, g, "feed_forward_length", 1 << 22, NULL, &hp->n_ff, err));
    KVS_TRY(read_heads(arch, g, hp, err));
    KVS_TRY(read_f32(arch, g, "attention.layer_norm_rms_epsilon", 0.0f, 1.0f, NULL, &hp->norm_eps, err));
    return read_rope(arch, g, hp, err);
}

/* ---- tensors ---------------------------------------------------------------------------------------------------- */

static uint64_t dim_value(dim d, const kvs_hparams *hp)
{
    switch (d) {
    case DIM_NONE:
        return 1;
    case DIM_EMBD:
        return hp->n_embd;
    case DIM_VOCAB:
        return hp->vocab_size;
    case DIM_Q:
        return (uint64_t)hp->n_heads * hp->head_dim;
    case DIM_KV:
        return (uint64_t)hp->n_kv_heads * hp->head_dim;
    case DIM_FF:
        return hp->n_ff;
    case DIM_FREQS:
        return hp->n_rot / 2;
    }
    return 0;
}

static kvs_status check_tensor(const kvs_gguf *g, const kvs_gguf_tensor *t, const tensor_row *row, const char *name,
                               const kvs_hparams *hp, kvs_error *err)
{
    const uint64_t n_in = dim_value(row->n_in, hp), n_out = dim_value(row->n_out, hp);
    if (t->ne[0] != n_in || t->ne[1] != n_out || t->ne[2] != 1 || t->ne[3] != 1)
        return kvs_error_set(err, KVS_EFORMAT,
                             "%s: tensor %s is %llu x %llu x %llu x %llu; the keys ask for %llu x %llu", g->path, name,
                             (unsigned long long)t->ne[0], (unsigned long long)t->ne[1], (unsigned long long)t->ne[2],
                             (unsigned long long)t->ne[3], (unsigned long long)n_in, (unsigned long long)n_out);
    if (row->f32 && t->type != GGML_TYPE_F32)
        return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: tensor %s is of type %s; f32 is supported there", g->path,
                             name, ggml_type_name((enum ggml_type)t->type));
    return KVS_OK;
}

/* A tensor no row names, such as a bias, would be ignored and the answers quietly wrong. */
static kvs_status refuse_unknown(const kvs_arch *arch, const kvs_gguf *g, const kvs_hparams *hp, kvs_error *err)
{
    for (size_t i = 0; i < g->n_tensors; i++) {
        const kvs_gguf_tensor *t = &g->tensors[i];
        bool known = false;
        for (size_t r = 0; r < arch->n_tensors && !known; r++) {
            unsigned layer = 0;
            char copy[GGML_MAX_NAME], again[GGML_MAX_NAME];
            snprintf(copy, sizeof copy, "%.*s", (int)t->name_bytes, t->name);
            if (arch->tensors[r].per_layer && (sscanf(copy, "blk.%5u.", &layer) != 1 || layer >= hp->n_layers))
                continue;
            snprintf(again, sizeof again, arch->tensors[r].name, layer);
            known = strcmp(copy, again) == 0;
        }
        char shown[64];
        if (!known)
            return kvs_error_set(err, KVS_EUNSUPPORTED,
                                 "%s: tensor %s is none that architecture %s of %u layers has here", g->path,
                                 kvs_gguf_printable(t->name, t->name_bytes, shown), arch->name, hp->n_layers);
    }
    return KVS_OK;
}

kvs_status kvs_arch_bind(const kvs_arch *arch, const kvs_gguf *g, const kvs_hparams *hp, const kvs_gguf_tensor **out,
                         kvs_error *err)
{
    KVS_TRY(refuse_unknown(arch, g, hp, err)); /* first: it bounds the number of tensors searched below */
    for (size_t r = 0; r < arch->n_tensors; r++) {
        const tensor_row *row = &arch->tensors[r];
        for (uint32_t layer = 0; layer < (row->per_layer ? hp->n_layers : 1); layer++) {
            char name[GGML_MAX_NAME];
            snprintf(name, sizeof name, row->name, layer);
            const kvs_gguf_tensor *t = kvs_gguf_find_tensor(g, name);
            if (t == NULL && row->required)
                return kvs_error_set(err, KVS_EFORMAT, "%s: tensor %s is missing", g->path, name);
            if (t != NULL)
                KVS_TRY(check_tensor(g, t, row, name, hp, err));
            out[(size_t)layer * KVS_TENSOR_COUNT + row->role] = t;
        }
    }
    return KVS_OK;
}

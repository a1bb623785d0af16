/* What differs between architectures, as data: names of keys and tensors, and the shapes they must have. Adding one is
 * a row in arch.c. The forward pass reads struct kvs_model and never asks which architecture it is. */
#ifndef KVS_ARCH_H
#define KVS_ARCH_H

#include "model/gguf_check.h"

/* Hyper-parameters as the file states them, checked against each other. */
typedef struct kvs_hparams {
    uint32_t n_layers, n_heads, n_kv_heads, head_dim, n_embd, n_ff, vocab_size, window_tokens;
    uint32_t n_rot; /* rotated dims of a head */
    float norm_eps;
    float rope_base;
    float rope_factor; /* linear scaling: positions are divided by it; 1: none */
} kvs_hparams;

typedef enum kvs_tensor_role {
    KVS_TENSOR_EMBD, /* of the model: at [role] */
    KVS_TENSOR_OUT_NORM,
    KVS_TENSOR_HEAD,       /* absent: tied to EMBD */
    KVS_TENSOR_ROPE_FREQS, /* [n_rot / 2] divisors; absent: ones */
    KVS_TENSOR_ATTN_NORM,  /* of a layer: at [role] of that layer's row */
    KVS_TENSOR_Q,
    KVS_TENSOR_K,
    KVS_TENSOR_V,
    KVS_TENSOR_ATTN_OUT,
    KVS_TENSOR_FFN_NORM,
    KVS_TENSOR_GATE,
    KVS_TENSOR_UP,
    KVS_TENSOR_DOWN,
    KVS_TENSOR_COUNT
} kvs_tensor_role;

typedef struct kvs_arch kvs_arch;

/* By general.architecture. EUNSUPPORTED names the ones there are. */
kvs_status kvs_arch_find(const kvs_gguf *g, const kvs_arch **out, kvs_error *err);
const char *kvs_arch_name(const kvs_arch *arch);
/* hp->vocab_size is set by the caller (the tokenizer's). EFORMAT inconsistent; EUNSUPPORTED a variant we lack. */
kvs_status kvs_arch_read(const kvs_arch *arch, const kvs_gguf *g, kvs_hparams *hp, kvs_error *err);
/* Finds every tensor, checks its shape, and refuses files that hold one the forward pass would ignore.
 *   out [n_layers][KVS_TENSOR_COUNT], the model's own ones in row 0; NULL where an optional one is absent */
kvs_status kvs_arch_bind(const kvs_arch *arch, const kvs_gguf *g, const kvs_hparams *hp, const kvs_gguf_tensor **out,
                         kvs_error *err);

#endif

/* The model as the forward pass sees it. Includes base and kernels; libllama and ggml headers stay inside *.c here. */
#ifndef KVS_MODEL_H
#define KVS_MODEL_H

#include "base/base.h"
#include "kernels/kernels.h"

/* One transformer layer. Weights that read the same input stand in one matrix, so one product serves them. */
typedef struct kvs_layer {
    const float *attn_norm; /* [n_embd] f32 */
    kvs_weight qkv;         /* rows: n_heads * head_dim of q, n_kv_heads * head_dim of k, the same of v; in n_embd */
    kvs_weight attn_out;    /* [n_embd][n_heads * head_dim] */
    const float *ffn_norm;  /* [n_embd] f32 */
    kvs_weight gate_up;     /* rows: n_ff of gate, n_ff of up; in n_embd */
    kvs_weight ffn_down;    /* [n_embd][n_ff] */
} kvs_layer;

/* Where q, k, v (or gate, up) are of different types and cannot be packed as one, the matrices are kept apart:
 * part[i] holds them and the joined one has n_out 0. */
typedef struct kvs_layer_parts {
    kvs_weight q, k, v, gate, up;
} kvs_layer_parts;

struct kvs_forward; /* activations of one step, forward.h */

typedef struct kvs_vocab kvs_vocab; /* libllama's tokenizer, behind vocab.h */

struct kvs_model {
    kvs_model_info info; /* strings owned here */
    const kvs_allocator *allocator;
    kvs_pool *pool;
    const kvs_kernels *kernels;
    float norm_eps;
    uint32_t n_freq;  /* rotated dims / 2 */
    double *theta;    /* [n_freq] radians per position */
    float *rope_rows; /* [rope.n_pos][2][n_freq]; built for info.window_tokens at open */
    kvs_rope_table rope;
    bool rope_like_ggml;
    kvs_weight embd;      /* [vocab][n_embd], for kvs_weight_row */
    kvs_weight head;      /* [vocab][n_embd]; shares packed with embd when tied */
    void *packed_weights; /* the block that every packed form stands in */
    const float *out_norm;
    kvs_layer *layers;      /* [n_layers] */
    kvs_layer_parts *parts; /* [n_layers] */
    kvs_vocab *vocab;
    struct kvs_forward *forward; /* made with the first session; freed by kvs_model_close through kvs_forward_free */
    void *map;                   /* the mmapped file */
    size_t map_bytes;
    char *strings;       /* path, arch, name */
    char sha256_hex[65]; /* of the file, filled on first kvs_model_sha256() */
};

/* ggml's f32 recurrence for one position: out [2][n_freq]. Only under rope_like_ggml. */
void kvs_rope_row_ggml(const kvs_model *m, int32_t pos, float *out);
/* sha256 of the file in hex, computed once. Not thread-safe. */
const char *kvs_model_sha256(kvs_model *m);
/* The chat template's text from the GGUF, or NULL. */
const char *kvs_model_chat_template(const kvs_model *m);

#endif

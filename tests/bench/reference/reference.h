/* What is compared and by whom: products with a weight matrix on SmolLM2-135M's shapes, attention with its heads.
 * One engine a process: each library keeps its own threads, instruction set and memory, and a crash is one column's.
 * Engines make their own weights from the same numbers (reference_weights), read the caller's x and write its y.
 */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    REFERENCE_SHAPES = 5,
    REFERENCE_LAYERS = 30,    /* each with weights of its own, so that caches are as cold as in the model */
    REFERENCE_KV_LAYERS = 30, /* with keys and values of their own */
    REFERENCE_ROWS_MAX = 512,
    REFERENCE_HEADS = 9,
    REFERENCE_KV_HEADS = 3,
    REFERENCE_HEAD_DIM = 64,
};

typedef struct reference_shape {
    const char *name;
    uint32_t n_out, n_in, n_layers;
} reference_shape;
extern const reference_shape reference_shapes[REFERENCE_SHAPES];

/* Rows [row_begin, row_begin + n_rows) of one layer's W [n_out][n_in]: out [n_rows][n_in]. */
void reference_weights(uint32_t shape, uint32_t layer, uint32_t row_begin, uint32_t n_rows, float *out);
/* One slot of one layer's KV head: key and value [64], exact in f16. */
void reference_key_value(uint32_t layer, uint32_t kv_head, uint32_t slot, float *key, float *value);

/* The last row of n_rows sees all n_slots, the one before it one fewer, and so on. */
typedef struct reference_attention {
    uint32_t n_slots, n_rows, n_layers;
    const float *q; /* [n_rows][9][64] */
    float *out;     /* [n_rows][9][64] */
} reference_attention;

typedef struct reference_engine {
    const char *name;
    /* variant: which arithmetic or path of the library, as in reference_engine_variants(). False: not in this build or
     * not on this machine; `why` then says so. */
    bool (*open)(const char *variant, uint32_t n_threads, const char **why);
    /* Gets ready for x [n_rows][n_in] and y [n_rows][n_out] of every shape; nothing of this is timed. */
    bool (*products)(uint32_t n_rows, const float *x, float *y, const char **why);
    /* y = W x with the weights of every layer in turn: y ends as the last layer's. */
    void (*product_run)(uint32_t shape);
    /* The same for attention; NULL where the library has none. */
    bool (*attention)(const reference_attention *a, const char **why);
    void (*attention_run)(void);
    /* Name, version, what it found in the machine. */
    void (*describe)(char *text, uint32_t text_bytes);
} reference_engine;

extern const reference_engine reference_kvasir, reference_ggml, reference_openblas, reference_onednn;

/* Zeroed, 64-byte aligned; ends the process when there is none. */
void *reference_alloc(uint64_t n_bytes);
void reference_free(void *p);
/* W of one layer in ggml's type, row after row. */
void *reference_quantise(int ggml_type, uint32_t shape, uint32_t layer);

#ifdef __cplusplus
}
#endif

#endif

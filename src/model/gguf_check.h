/* A GGUF file as a checked index: every count, string, type, shape and offset is held against the file's size before
 * anything is read through it. ggml's own reader comes only after this one (inside libllama, for the vocabulary),
 * because it accepts tensors outside the file and its getters abort on a key of the wrong type. */
#ifndef KVS_GGUF_CHECK_H
#define KVS_GGUF_CHECK_H

#include "base/base.h"

/* One key. Pointers go into the mapped file. */
typedef struct kvs_gguf_value {
    const char *key;
    size_t key_bytes;
    uint32_t type; /* enum gguf_type; of the elements when is_array */
    bool is_array;
    uint64_t n;          /* elements; 1 for a scalar */
    const uint8_t *data; /* the first element; strings: a u64 length before each */
} kvs_gguf_value;

typedef struct kvs_gguf_tensor {
    const char *name;
    size_t name_bytes;
    uint32_t n_dims;
    uint64_t ne[4]; /* fastest axis first, as ggml lists them; 1 beyond n_dims */
    int type;       /* enum ggml_type, known to this ggml */
    const void *data;
    size_t row_bytes, data_bytes;
} kvs_gguf_tensor;

typedef struct kvs_gguf {
    const char *path; /* borrowed, for messages */
    const kvs_allocator *allocator;
    kvs_gguf_value *values;   /* [n_values] */
    kvs_gguf_tensor *tensors; /* [n_tensors] */
    size_t n_values, n_tensors;
    uint64_t n_params, weight_bytes; /* over all tensors */
} kvs_gguf;

/* Indexes map [map_bytes]; both path and map are borrowed for the life of *out. EFORMAT says what is wrong and where;
 * *out then holds nothing. */
kvs_status kvs_gguf_parse(const char *path, const void *map, size_t map_bytes, const kvs_allocator *a, kvs_gguf *out,
                          kvs_error *err);
void kvs_gguf_free(kvs_gguf *g);

const kvs_gguf_value *kvs_gguf_find(const kvs_gguf *g, const char *key);
const kvs_gguf_tensor *kvs_gguf_find_tensor(const kvs_gguf *g, const char *name);

/* Scalars by key. An absent key leaves *out as it was and sets *found (may be NULL) to false; with found NULL the key
 * is required. A key of another type is EFORMAT. */
kvs_status kvs_gguf_u32(const kvs_gguf *g, const char *key, uint32_t *out, bool *found, kvs_error *err);
kvs_status kvs_gguf_f32(const kvs_gguf *g, const char *key, float *out, bool *found, kvs_error *err);
/* Not NUL-terminated: [*n_bytes] inside the file. */
kvs_status kvs_gguf_str(const kvs_gguf *g, const char *key, const char **out, size_t *n_bytes, bool *found,
                        kvs_error *err);

/* What libllama's loader and tokenizer take for granted and would abort or throw on. *n_tokens: the vocabulary. */
kvs_status kvs_gguf_check_tokenizer(const kvs_gguf *g, uint32_t *n_tokens, kvs_error *err);

/* Text from a file made fit for a one-line message: at most 63 bytes, unprintable ones as '?'. Returns buf. */
const char *kvs_gguf_printable(const char *text, size_t n_bytes, char buf[64]);

#endif

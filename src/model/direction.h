/* A direction in a model's hidden states, from a control-vector file (llama.cpp's GGUF of architecture "controlvector":
 * tensors direction.N, f32 [n_embd], of what layer N, counted from 0, leaves). Includes base and model. */
#ifndef KVS_DIRECTION_H
#define KVS_DIRECTION_H

#include "model/model.h"

/* out [n_embd]. EIO: no file; EFORMAT: not such a file, of another model (controlvector.model_hint, width), without that
 * layer, or with a value that is no number. out is then undefined. */
kvs_status kvs_direction_read(const kvs_model *m, const char *path, uint32_t layer, float *out, kvs_error *err);

#endif

/* From checked tensors to the matrices the forward pass multiplies with. */
#ifndef KVS_WEIGHTS_H
#define KVS_WEIGHTS_H

#include "model/arch.h"
#include "model/model.h"

/* Fills m->layers, m->parts, m->embd, m->head, m->out_norm and info.packed_bytes; packs on m->pool. bound is what
 * kvs_arch_bind() gave. EUNSUPPORTED a type without arithmetic; ENOMEM. What was allocated is m's either way. */
kvs_status kvs_weights_load(kvs_model *m, const kvs_gguf *g, const kvs_gguf_tensor *const *bound, kvs_error *err);
void kvs_weights_free(kvs_model *m);

#endif

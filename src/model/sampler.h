/* From logits to a token. libllama's samplers shape the distribution; the draw is ours and depends on (seed,
 * token_idx) and the distribution only, so a resumed session goes on as it would have. */
#ifndef KVS_SAMPLER_H
#define KVS_SAMPLER_H

#include "base/base.h"

typedef struct kvs_sampler kvs_sampler;

/* Errors: EINVAL a parameter outside its range; ENOMEM. a may be NULL. */
kvs_status kvs_sampler_create(const kvs_allocator *a, uint32_t vocab_size, const kvs_sampling *params,
                              kvs_sampler **out, kvs_error *err);
void kvs_sampler_free(kvs_sampler *s); /* s may be NULL */

/* The token at token_idx after logits [vocab_size], which are left as they are. Temperature 0: the lowest index of the
 * largest logit, penalties applied. -1 if no logit is a number above -inf. Allocates only inside libllama. */
int32_t kvs_sampler_pick(kvs_sampler *s, const float *logits, uint64_t token_idx);
/* Tells the repetition penalty what was said: every token, prompt included, in order. */
void kvs_sampler_accept(kvs_sampler *s, int32_t token);

#endif

/* The paper's claims as statements with a threshold fixed before the run (docs/claims.md), an interval and a verdict. */
#ifndef KVS_BENCH_CLAIMS_H
#define KVS_BENCH_CLAIMS_H

#include "base/base.h"

#include <jansson.h>

enum { KVS_CLAIMS_DIALOGUES_MIN = 30 }; /* fewer: PRELIMINARY, never SUPPORTED or REFUTED */

typedef struct kvs_claims_input {
    json_t *parts; /* list of parts, in dialogue order */
    json_t *runs;  /* manifest's runs */
    uint32_t window_tokens, trigger_tokens;
    uint64_t seed;
    json_t *recall; /* list of parts of kvs_play_recall; NULL: none */
} kvs_claims_input;

/* The object of claims.json; a new reference, NULL when out of memory. *noise_floor: mean KL of the nudged full cache
 * against itself, NaN if no run had one. */
json_t *kvs_claims(const kvs_claims_input *in, double *noise_floor);

#endif

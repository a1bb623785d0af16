/* Numbers about the heads and layers of one model, measured once from texts (`kvasir profile`) and read from a file that
 * a spec names. Includes base. */
#ifndef KVS_PROFILE_H
#define KVS_PROFILE_H

#include "base/base.h"

/* The largest number of heads over all layers that a file may be for: far above any model, below what could exhaust
 * memory. */
enum { KVS_PROFILE_HEADS_MAX = 1 << 16, KVS_PROFILE_SHA_BYTES = 65 };

typedef struct kvs_profile {
    uint32_t n_layers, n_kv_heads, n_tables;
    const double *heads;                /* [n_tables][n_layers][n_kv_heads], or NULL */
    const double *layers;               /* [n_layers], or NULL */
    char sha256[KVS_PROFILE_SHA_BYTES]; /* of the file */
    double *block;                      /* both of the above */
} kvs_profile;

/* What a stage reads. A file has the members "kind", "model_sha256", "n_layers", "n_kv_heads" and, as asked for,
 * "heads" (a list for each layer of one number for each KV head; n_tables of these where that is over 1) or "layers"
 * (one number for each layer); whatever else it holds is for people. */
typedef struct kvs_profile_want {
    const char *const *kinds; /* that the stage can use, NULL-ended */
    const char *doc;          /* of the parameter */
    bool heads;               /* else layers */
    bool any_model;           /* a person may write it: model_sha256 may be absent */
    uint32_t n_tables;        /* 0: 1 */
    double min, max;          /* range of a number */
} kvs_profile_want;

/* Whom the file must be of. */
typedef struct kvs_profile_model {
    const char *sha256;
    uint32_t n_layers, n_kv_heads;
} kvs_profile_model;

/* out is free'd with kvs_profile_free, and empty after an error. Errors are one line with the path and what is wrong:
 * EIO it cannot be read; EFORMAT it is no profile, of another kind or model, or holds a number out of range; ENOMEM. */
kvs_status kvs_profile_read(const char *path, const kvs_profile_want *want, const kvs_profile_model *model,
                            const kvs_allocator *a, kvs_profile *out, kvs_error *err);
/* The first file by name in `folder` of this kind and model that a stage can read. path is empty where there is none; sha256
 * is the file's. EIO: the folder cannot be read; ENOMEM. */
kvs_status kvs_profile_find(const char *folder, const kvs_profile_want *want, const char *kind,
                            const kvs_profile_model *model, char *path, size_t cap_bytes,
                            char sha256[KVS_PROFILE_SHA_BYTES], kvs_error *err);
kvs_status kvs_profile_copy(const kvs_profile *from, const kvs_allocator *a, kvs_profile *out, kvs_error *err);
void kvs_profile_free(kvs_profile *p, const kvs_allocator *a);

#endif

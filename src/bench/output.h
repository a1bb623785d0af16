/* The files of an output folder, each written whole or not at all (docs/output.md). */
#ifndef KVS_BENCH_OUTPUT_H
#define KVS_BENCH_OUTPUT_H

#include "base/base.h"

#include <jansson.h>

/* EINVAL a path component is a file; EIO cannot be created or written to. Parents are made. */
kvs_status kvs_output_make_dir(const char *dir, kvs_error *err);
kvs_status kvs_output_json(const char *dir, const char *name, const json_t *value, kvs_error *err);
/* key of every part, concatenated, one JSON object a line. */
kvs_status kvs_output_lines(const char *dir, const char *name, const json_t *parts, const char *key, kvs_error *err);
/* summary.csv from the parts' "summary". */
kvs_status kvs_output_summary(const char *dir, const json_t *parts, kvs_error *err);

#endif

/* Writing: a temporary file beside the target, flushed, then renamed. */
#include "bench/output.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PATH_CAP = 2048 };

/* The same digits on every machine; 15 are enough for a double measured to fewer. */
#define JSON_FLAGS (JSON_COMPACT | JSON_REAL_PRECISION(15))

kvs_status kvs_output_make_dir(const char *dir, kvs_error *err)
{
    char path[PATH_CAP];
    if (strlen(dir) >= sizeof path - 64)
        return kvs_error_set(err, KVS_EINVAL, "output folder name of %zu characters is too long", strlen(dir));
    snprintf(path, sizeof path, "%s", dir);
    for (char *p = path + 1;; p++) {
        if (*p != '/' && *p != '\0')
            continue;
        const char end = *p;
        *p = '\0';
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            return kvs_error_set(err, KVS_EIO, "cannot create output folder %s: %s", path, strerror(errno));
        *p = end;
        if (end == '\0')
            break;
    }
    struct stat st;
    if (stat(dir, &st) != 0 || !S_ISDIR(st.st_mode))
        return kvs_error_set(err, KVS_EINVAL, "output %s is a file, it must be a folder", dir);
    if (access(dir, W_OK | X_OK) != 0)
        return kvs_error_set(err, KVS_EIO, "cannot write to output folder %s: %s", dir, strerror(errno));
    return KVS_OK;
}

typedef struct target {
    char path[PATH_CAP], tmp[PATH_CAP + 32];
    FILE *f;
} target;

static kvs_status begin(target *t, const char *dir, const char *name, kvs_error *err)
{
    snprintf(t->path, sizeof t->path, "%s/%s", dir, name);
    snprintf(t->tmp, sizeof t->tmp, "%s.tmp.%ld", t->path, (long)getpid());
    t->f = fopen(t->tmp, "wb");
    if (t->f == NULL)
        return kvs_error_set(err, KVS_EIO, "cannot write %s: %s", t->tmp, strerror(errno));
    return KVS_OK;
}

static kvs_status finish(target *t, bool ok, kvs_error *err)
{
    ok = ok && fflush(t->f) == 0 && fsync(fileno(t->f)) == 0;
    const int reason = errno;
    ok = fclose(t->f) == 0 && ok;
    if (ok && rename(t->tmp, t->path) == 0)
        return KVS_OK;
    unlink(t->tmp);
    return kvs_error_set(err, KVS_EIO, "cannot write %s: %s", t->path, strerror(reason != 0 ? reason : errno));
}

kvs_status kvs_output_json(const char *dir, const char *name, const json_t *value, kvs_error *err)
{
    target t = {0};
    KVS_TRY(begin(&t, dir, name, err));
    errno = 0;
    const size_t flags = strncmp(name, "parts/", 6) == 0 ? JSON_FLAGS : JSON_INDENT(1) | JSON_REAL_PRECISION(15);
    const bool ok = json_dumpf(value, t.f, flags) == 0 && fputc('\n', t.f) != EOF;
    return finish(&t, ok, err);
}

kvs_status kvs_output_lines(const char *dir, const char *name, const json_t *parts, const char *key, kvs_error *err)
{
    target t = {0};
    KVS_TRY(begin(&t, dir, name, err));
    errno = 0;
    bool ok = true;
    size_t i, k;
    json_t *part, *row;
    json_array_foreach (parts, i, part) {
        json_array_foreach (json_object_get(part, key), k, row) {
            ok = ok && json_dumpf(row, t.f, JSON_FLAGS) == 0 && fputc('\n', t.f) != EOF;
        }
    }
    return finish(&t, ok, err);
}

static bool write_cell(FILE *f, const json_t *value)
{
    if (value == NULL || json_is_null(value))
        return true;
    if (!json_is_string(value)) {
        char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_FLAGS);
        const bool ok = text != NULL && fputs(text, f) != EOF;
        free(text);
        return ok;
    }
    const char *text = json_string_value(value);
    if (strpbrk(text, ",\"\r\n") == NULL)
        return fputs(text, f) != EOF;
    bool ok = fputc('"', f) != EOF;
    for (; *text != '\0'; text++)
        ok = ok && (*text != '"' || fputc('"', f) != EOF) && fputc(*text, f) != EOF;
    return ok && fputc('"', f) != EOF;
}

kvs_status kvs_output_summary(const char *dir, const json_t *parts, kvs_error *err)
{
    static const char *const columns[] = {"run",
                                          "policy",
                                          "position",
                                          "dialogue",
                                          "protocol",
                                          "n_tokens",
                                          "n_scored",
                                          "kl_mean",
                                          "kl_p99",
                                          "kl_median",
                                          "nll",
                                          "nll_ref",
                                          "ppl",
                                          "ppl_ratio",
                                          "top1",
                                          "jsd",
                                          "footprint",
                                          "peak_kv_bytes",
                                          "live_bytes_mean",
                                          "budget_bytes",
                                          "evictions",
                                          "health_mean",
                                          "looped_rate",
                                          "ttft_ms_median",
                                          "tpot_ms_median",
                                          "prefill_tok_per_s",
                                          "decode_tok_per_s",
                                          "evict_ms_total",
                                          "peak_rss_bytes",
                                          "own_tokens",
                                          "score_ms_total",
                                          "select_ms_total",
                                          "move_ms_total",
                                          "probe_ms_total",
                                          "side_bytes",
                                          "own_bytes"};
    const size_t n = sizeof columns / sizeof *columns;
    target t = {0};
    KVS_TRY(begin(&t, dir, "summary.csv", err));
    errno = 0;
    bool ok = true;
    for (size_t c = 0; c < n; c++)
        ok = ok && fprintf(t.f, "%s%s", c > 0 ? "," : "", columns[c]) > 0;
    ok = ok && fputc('\n', t.f) != EOF;
    size_t i, k;
    json_t *part, *row;
    json_array_foreach (parts, i, part) {
        json_array_foreach (json_object_get(part, "summary"), k, row) {
            for (size_t c = 0; c < n; c++)
                ok = ok && (c == 0 || fputc(',', t.f) != EOF) && write_cell(t.f, json_object_get(row, columns[c]));
            ok = ok && fputc('\n', t.f) != EOF;
        }
    }
    return finish(&t, ok, err);
}

/* kvasir compare: the summary.csv of two bench output folders, run by run, over the dialogues both have. */
#include "cli/cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const metrics[] = {"kl_mean",   "nll",         "top1",          "peak_kv_bytes",
                                      "evictions", "health_mean", "tpot_ms_median"};
enum { N_METRICS = sizeof metrics / sizeof metrics[0], FIELDS_MAX = 128 };

typedef struct row {
    char *key; /* dialogue, protocol */
    uint32_t run;
    double value[N_METRICS]; /* NaN: null */
} row;

typedef struct folder {
    const char *dir;
    json_t *manifest;
    char **runs; /* [n_runs] what a run is, its own number left out: comparable between folders */
    row *rows;
    size_t n_runs, n_rows;
} folder;

static void folder_free(folder *f)
{
    for (size_t i = 0; f->runs != NULL && i < f->n_runs; i++)
        free(f->runs[i]);
    for (size_t i = 0; i < f->n_rows; i++)
        free(f->rows[i].key);
    free(f->runs);
    free(f->rows);
    json_decref(f->manifest);
    *f = (folder){0};
}

static const char *hash_of(const folder *f, const char *what)
{
    json_t *const part = json_object_get(f->manifest, what);
    const char *const names[] = {"sha256", "xxh64", "hash"};
    for (size_t i = 0; i < 3; i++)
        if (json_string_value(json_object_get(part, names[i])) != NULL)
            return json_string_value(json_object_get(part, names[i]));
    return NULL;
}

static kvs_status read_manifest(const char *dir, folder *f, kvs_error *err)
{
    char path[4200];
    json_error_t at;
    f->dir = dir;
    snprintf(path, sizeof path, "%s/manifest.json", dir);
    f->manifest = json_load_file(path, 0, &at);
    if (f->manifest == NULL)
        return kvs_error_set(err, at.line < 0 ? KVS_EIO : KVS_EFORMAT, "%s: %s", path, at.text);
    json_t *const list = json_object_get(f->manifest, "runs");
    if (hash_of(f, "model") == NULL || hash_of(f, "data") == NULL || !json_is_array(list))
        return kvs_error_set(err, KVS_EFORMAT, "%s lacks the runs or the hash of its model or data", path);
    f->n_runs = json_array_size(list);
    f->runs = calloc(f->n_runs + 1, sizeof *f->runs);
    for (size_t i = 0; f->runs != NULL && i < f->n_runs; i++) {
        json_t *const run = json_copy(json_array_get(list, i));
        json_object_del(run, "run");
        f->runs[i] = json_dumps(run, JSON_COMPACT | JSON_SORT_KEYS);
        json_decref(run);
        if (f->runs[i] == NULL)
            return kvs_error_set(err, KVS_EFORMAT, "%s: runs[%zu] is not an object", path, i);
    }
    return f->runs != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for %s", path);
}

/* RFC 4180, in place: quoted fields may hold commas, "" is a quote. 0: an open quote or too many fields. */
static size_t split_csv(char *line, char **fields)
{
    size_t n = 0;
    for (char *in = line, *out;; in++) {
        if (n == FIELDS_MAX)
            return 0;
        fields[n++] = out = in;
        bool quoted = *in == '"';
        for (in += quoted; *in != '\0' && (quoted || *in != ','); in++) {
            if (quoted && *in == '"') {
                if (in[1] != '"') {
                    quoted = false;
                    continue;
                }
                in++;
            }
            *out++ = *in;
        }
        const bool end = *in == '\0';
        *out = '\0';
        if (quoted)
            return 0;
        if (end)
            return n;
    }
}

static size_t column(char **fields, size_t n, const char *name)
{
    size_t i = 0;
    while (i < n && strcmp(fields[i], name) != 0)
        i++;
    return i;
}

static uint32_t find_run(const folder *f, const char *id)
{
    json_t *const list = json_object_get(f->manifest, "runs");
    for (uint32_t i = 0; i < f->n_runs; i++) {
        const char *const own = json_string_value(json_object_get(json_array_get(list, i), "run"));
        if (own != NULL && strcmp(own, id) == 0)
            return i;
    }
    return UINT32_MAX;
}

static kvs_status read_summary(folder *f, kvs_error *err)
{
    char path[4200], *text, *fields[FIELDS_MAX];
    size_t n_bytes, line = 0, n_header = 0, at_run = 0, at_dialogue = 0, at_protocol = 0, at[N_METRICS], cap = 0;
    snprintf(path, sizeof path, "%s/summary.csv", f->dir);
    KVS_TRY(kvs_cli_read_file(path, &text, &n_bytes, err));
    kvs_status status = KVS_OK;
    for (char *p = text, *next; status == KVS_OK && *p != '\0'; p = next) {
        next = p + strcspn(p, "\n");
        if (*next != '\0')
            *next++ = '\0';
        p[strcspn(p, "\r")] = '\0';
        line++;
        const size_t n = split_csv(p, fields);
        if (line == 1) {
            n_header = n;
            at_run = column(fields, n, "run");
            at_dialogue = column(fields, n, "dialogue");
            at_protocol = column(fields, n, "protocol");
            for (size_t i = 0; i < N_METRICS; i++)
                at[i] = column(fields, n, metrics[i]);
            if (at_run == n || at_dialogue == n || at_protocol == n)
                status = kvs_error_set(err, KVS_EFORMAT, "%s: columns run, dialogue and protocol are needed", path);
            continue;
        }
        if (f->n_rows == cap) {
            cap = cap * 2 + 64;
            row *const grown = realloc(f->rows, cap * sizeof *grown);
            if (grown == NULL) {
                status = kvs_error_set(err, KVS_ENOMEM, "no memory for %s", path);
                break;
            }
            f->rows = grown;
        }
        const uint32_t run = n == n_header ? find_run(f, fields[at_run]) : UINT32_MAX;
        if (run == UINT32_MAX) {
            status = kvs_error_set(err, KVS_EFORMAT, "%s, line %zu: broken, or of a run the manifest does not have",
                                   path, line);
            break;
        }
        row *const r = &f->rows[f->n_rows];
        *r = (row){.run = run};
        if (asprintf(&r->key, "%s %s", fields[at_protocol], fields[at_dialogue]) < 0) {
            status = kvs_error_set(err, KVS_ENOMEM, "no memory for %s", path);
            break;
        }
        f->n_rows++;
        for (size_t i = 0; i < N_METRICS; i++) {
            char *end = NULL;
            r->value[i] = at[i] < n && fields[at[i]][0] != '\0' ? strtod(fields[at[i]], &end) : NAN;
            if (end != NULL && *end != '\0')
                r->value[i] = NAN;
        }
    }
    free(text);
    return status;
}

/* Means over the (dialogue, protocol) pairs that both folders have of these runs. */
static uint32_t pair_means(const folder *a, uint32_t run_a, const folder *b, uint32_t run_b, double *mean_a,
                           double *mean_b)
{
    uint32_t n_pairs = 0, n[N_METRICS] = {0};
    for (size_t i = 0; i < N_METRICS; i++)
        mean_a[i] = mean_b[i] = 0;
    for (size_t x = 0; x < a->n_rows; x++) {
        if (a->rows[x].run != run_a)
            continue;
        for (size_t y = 0; y < b->n_rows; y++) {
            if (b->rows[y].run != run_b || strcmp(a->rows[x].key, b->rows[y].key) != 0)
                continue;
            n_pairs++;
            for (size_t i = 0; i < N_METRICS; i++)
                if (isfinite(a->rows[x].value[i]) && isfinite(b->rows[y].value[i])) {
                    n[i]++;
                    mean_a[i] += a->rows[x].value[i];
                    mean_b[i] += b->rows[y].value[i];
                }
        }
    }
    for (size_t i = 0; i < N_METRICS; i++) {
        mean_a[i] = n[i] > 0 ? mean_a[i] / n[i] : NAN;
        mean_b[i] = n[i] > 0 ? mean_b[i] / n[i] : NAN;
    }
    return n_pairs;
}

static const char *run_text(const folder *f, uint32_t run, const char *name)
{
    const char *const text =
        json_string_value(json_object_get(json_array_get(json_object_get(f->manifest, "runs"), run), name));
    return text != NULL ? text : "-";
}

static void print_run(const folder *a, uint32_t run, uint32_t n_pairs, const double *mean_a, const double *mean_b)
{
    printf("%s, position %s, budget %s (%u dialogues)\n", run_text(a, run, "policy"), run_text(a, run, "position"),
           run_text(a, run, "budget"), n_pairs);
    for (size_t i = 0; i < N_METRICS; i++)
        if (!isnan(mean_a[i]))
            printf("  %-16s %14.6g %14.6g  %+.6g\n", metrics[i], mean_a[i], mean_b[i], mean_b[i] - mean_a[i]);
}

static json_t *run_json(const folder *a, uint32_t run, uint32_t n_pairs, const double *mean_a, const double *mean_b)
{
    json_t *const o = json_object();
    kvs_cli_set_text(o, "policy", run_text(a, run, "policy"));
    kvs_cli_set_text(o, "position", run_text(a, run, "position"));
    kvs_cli_set_text(o, "budget", run_text(a, run, "budget"));
    kvs_cli_set_int(o, "n_dialogues", n_pairs);
    for (size_t i = 0; i < N_METRICS; i++) {
        json_t *const m = json_object();
        kvs_cli_set_real(m, "first", mean_a[i]);
        kvs_cli_set_real(m, "second", mean_b[i]);
        kvs_cli_set_real(m, "difference", mean_b[i] - mean_a[i]);
        json_object_set_new(o, metrics[i], m);
    }
    return o;
}

static kvs_status compare(const kvs_cli_args *args, const folder *a, const folder *b, kvs_error *err)
{
    json_t *const list = json_array();
    uint32_t n_common = 0;
    for (uint32_t i = 0; i < a->n_runs; i++)
        for (uint32_t k = 0; k < b->n_runs; k++) {
            double mean_a[N_METRICS], mean_b[N_METRICS];
            if (strcmp(a->runs[i], b->runs[k]) != 0)
                continue;
            const uint32_t n_pairs = pair_means(a, i, b, k, mean_a, mean_b);
            if (n_pairs == 0)
                continue;
            n_common++;
            if (args->json)
                json_array_append_new(list, run_json(a, i, n_pairs, mean_a, mean_b));
            else
                print_run(a, i, n_pairs, mean_a, mean_b);
        }
    if (n_common == 0) {
        json_decref(list);
        return kvs_error_set(err, KVS_EINVAL, "%s and %s have no run with a common dialogue", a->dir, b->dir);
    }
    json_t *const o = json_object();
    json_object_set_new(o, "runs", list);
    if (args->json)
        kvs_cli_print_json(o); /* main looks at stdout's errors again */
    else
        json_decref(o);
    return KVS_OK;
}

int kvs_cmd_compare(const kvs_cli_args *args)
{
    kvs_error err = {0};
    folder f[2] = {0};
    kvs_status status = KVS_OK;
    for (int i = 0; i < 2 && status == KVS_OK; i++)
        status = read_manifest(args->operands[i], &f[i], &err);
    static const char *const parts[] = {"model", "data"};
    for (int i = 0; i < 2 && status == KVS_OK; i++) {
        const char *const a = hash_of(&f[0], parts[i]), *const b = hash_of(&f[1], parts[i]);
        if (strcmp(a, b) != 0)
            status = kvs_error_set(&err, KVS_EINVAL,
                                   "the folders are of different %s (%.12s and %.12s): their numbers "
                                   "cannot be compared",
                                   parts[i], a, b);
    }
    for (int i = 0; i < 2 && status == KVS_OK; i++)
        status = read_summary(&f[i], &err);
    if (status == KVS_OK)
        status = compare(args, &f[0], &f[1], &err);
    folder_free(&f[0]);
    folder_free(&f[1]);
    return status == KVS_OK ? KVS_EXIT_OK : kvs_cli_report(args, &err);
}

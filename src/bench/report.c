/* Writes report.html: the page's parts around the data block, a summary for readers without scripts, and an atomic
 * rename. Everything that came from a file is escaped here: as HTML in the summary, as \u003c in the data block. */
#include "bench/report.h"

#include "base/base.h"
#include "bench/report_data.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DATA_BYTES_MAX = 3800000 }; /* a page of about 4 MB with its own code: opens at once everywhere */

/* ---- text that came from a file ---- */

static void put_html(FILE *f, const char *text)
{
    for (const char *c = text == NULL ? "" : text; *c != '\0'; c++) {
        switch (*c) {
        case '<':
            fputs("&lt;", f);
            break;
        case '>':
            fputs("&gt;", f);
            break;
        case '&':
            fputs("&amp;", f);
            break;
        case '"':
            fputs("&quot;", f);
            break;
        case '\'':
            fputs("&#39;", f);
            break;
        default:
            fputc(*c, f);
        }
    }
}

static void put_cell(FILE *f, const char *text)
{
    fputs("<td>", f);
    put_html(f, text);
    fputs("</td>", f);
}

static void put_number(FILE *f, double x)
{
    if (isfinite(x))
        fprintf(f, "<td>%.4g</td>", x);
    else
        fputs("<td>n/a</td>", f);
}

static const char *text_in(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text == NULL ? "n/a" : text;
}

/* ---- the page without scripts ---- */

static void put_claims(FILE *f, const kvs_report *r)
{
    const json_t *list = json_object_get(r->claims, "claims");
    fputs(
        "<h2>Claims</h2><table><tr><th>claim</th><th>verdict</th><th>statement</th><th>estimate</th><th>95 % from</th>"
        "<th>to</th><th>n</th></tr>\n",
        f);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *claim = json_array_get(list, i);
        static const char *const numbers[] = {"estimate", "ci_low", "ci_high", "n"};
        fputs("<tr>", f);
        put_cell(f, text_in(claim, "id"));
        put_cell(f, text_in(claim, "verdict"));
        put_cell(f, text_in(claim, "statement"));
        for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++) {
            const json_t *v = json_object_get(claim, numbers[k]);
            put_number(f, json_is_number(v) ? json_number_value(v) : NAN);
        }
        fputs("</tr>\n", f);
    }
    fputs("</table>\n", f);
}

static uint32_t column_of(const char *name)
{
    uint32_t c = 0;
    while (c + 1 < KVS_REPORT_SUMMARY_NUMBERS && strcmp(kvs_report_summary_names[c], name) != 0)
        c++;
    return c;
}

static kvs_status put_runs(FILE *f, const kvs_report *r, kvs_error *err)
{
    static const char *const columns[] = {"kl_mean", "ppl_ratio", "top1", "peak_kv_bytes", "evictions", "health_mean"};
    fputs("<h2>Runs</h2><p>Means over dialogues.</p><table><tr><th>run</th><th>policy</th><th>position</th>"
          "<th>protocol</th><th>dialogues</th>",
          f);
    for (size_t c = 0; c < sizeof columns / sizeof *columns; c++)
        fprintf(f, "<th>%s</th>", columns[c]);
    fputs("</tr>\n", f);
    for (uint32_t i = 0; i < r->n_runs; i++) {
        for (uint32_t p = 0; p < KVS_REPORT_PROTOCOLS; p++) {
            uint32_t n = 0;
            for (size_t s = 0; s < r->n_summary; s++)
                n += r->summary[s].run == i && r->summary[s].protocol == p;
            if (n == 0)
                continue;
            fputs("<tr>", f);
            put_cell(f, r->runs[i].id);
            put_cell(f, r->runs[i].policy);
            put_cell(f, r->runs[i].position);
            fprintf(f, "<td>%s</td><td>%u</td>", p == KVS_REPORT_TF ? "tf" : "fr", n);
            for (size_t c = 0; c < sizeof columns / sizeof *columns; c++) {
                kvs_report_mean m;
                if (!kvs_report_summary_mean(r, i, p, column_of(columns[c]), &m))
                    return kvs_error_set(err, KVS_ENOMEM, "report.html: out of memory");
                put_number(f, m.mean);
            }
            fputs("</tr>\n", f);
        }
    }
    fputs("</table>\n", f);
    return KVS_OK;
}

static kvs_status put_recall(FILE *f, const kvs_report *r, kvs_error *err)
{
    if (r->n_answers == 0)
        return KVS_OK;
    fprintf(f,
            "<h2>Recall of planted facts</h2><p>Questions answered right. Where the full cache itself stays under "
            "%.0f %%, no run's recall is a verdict.</p><table><tr><th>run</th><th>right</th><th>with a result</th>"
            "<th>asked</th><th>the full cache, same questions</th></tr>\n",
            100 * KVS_REPORT_RECALL_GUARD);
    for (uint32_t i = 0; i < r->n_runs; i++) {
        kvs_report_recall s;
        if (!kvs_report_recall_of(r, i, &s))
            return kvs_error_set(err, KVS_ENOMEM, "report.html: out of memory");
        if (s.n_asked == 0)
            continue;
        fputs("<tr>", f);
        put_cell(f, r->runs[i].id);
        fprintf(f, "<td>%u</td><td>%u</td><td>%u</td><td>%u of %u</td></tr>\n", s.n_right, s.n_answered, s.n_asked,
                s.n_full_right, s.n_paired);
    }
    fputs("</table>\n", f);
    return KVS_OK;
}

static kvs_status put_plain(FILE *f, const kvs_report *r, kvs_error *err)
{
    fputs("<noscript><div class=\"plain\"><h1>Kvasir: what a KV-cache budget costs</h1><p>Model ", f);
    put_html(f, text_in(json_object_get(r->manifest, "model"), "name"));
    fputs(", suite ", f);
    put_html(f, text_in(r->manifest, "suite"));
    fputs(", data ", f);
    put_html(f, text_in(json_object_get(r->manifest, "data"), "name"));
    fprintf(f, ", %u runs, %u dialogues, %zu failed turns.", r->n_runs, r->n_dialogues, r->n_failures_all);
    if (json_is_true(json_object_get(r->manifest, "preliminary")))
        fputs(" <strong>Preliminary: too few dialogues for a verdict.</strong>", f);
    fputs(" The plots need scripts; the numbers are here.</p>\n", f);
    put_claims(f, r);
    kvs_status status = put_runs(f, r, err);
    if (status == KVS_OK)
        status = put_recall(f, r, err);
    fputs("<p>Reproduce: <code>", f);
    put_html(f, text_in(r->manifest, "command"));
    fputs("</code></p></div></noscript>\n", f);
    return status;
}

/* ---- the data block ---- */

static kvs_status make_data(const kvs_report *r, char **out, kvs_error *err)
{
    kvs_report_limits limits = {
        .n_dialogues = 30, .n_bins = 192, .n_frames = 48, .n_segments = 600, .n_points = 1500, .summary_rows = true};
    json_t *evidence = kvs_report_evidence(r);
    if (evidence == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "report.html: out of memory");
    size_t n_rows = r->n_turns / (r->n_dialogues > 0 ? r->n_dialogues : 1);
    n_rows = n_rows > 0 ? n_rows : 1;
    /* about 100 bytes a turn: half of the page for single dialogues, the rest for what every reader sees */
    limits.n_dialogues = kvs_min_u32(limits.n_dialogues, (uint32_t)(DATA_BYTES_MAX / 2 / 100 / n_rows) + 1);
    for (;;) {
        json_t *data = kvs_report_data(r, evidence, &limits);
        char *text = data == NULL ? NULL : json_dumps(data, JSON_COMPACT | JSON_REAL_PRECISION(6));
        json_decref(data);
        if (text == NULL || strlen(text) <= DATA_BYTES_MAX || !limits.summary_rows) {
            json_decref(evidence);
            *out = text;
            return text != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "report.html: out of memory");
        }
        free(text);
        limits.summary_rows = limits.n_dialogues > 1 || limits.n_bins > 48;
        if (limits.n_bins <= 96) /* rasters first: a coarser map loses less than a dialogue */
            limits.n_dialogues = kvs_max_u32(1, limits.n_dialogues / 2);
        limits.n_bins = kvs_max_u32(48, limits.n_bins / 2);
        limits.n_frames = kvs_max_u32(8, limits.n_frames / 2);
        limits.n_segments = kvs_max_u32(100, limits.n_segments / 2);
        limits.n_points = kvs_max_u32(300, limits.n_points / 2);
    }
}

/* In JSON '<' stands only inside strings; escaped, no text can end the script element or open a comment in it. */
static void put_data(FILE *f, const char *data)
{
    for (const char *c = data; *c != '\0'; c++) {
        if (*c == '<')
            fputs("\\u003c", f);
        else
            fputc(*c, f);
    }
}

static kvs_status put_page(FILE *f, const kvs_report *r, const char *data, kvs_error *err)
{
    const char *at = kvs_report_page_html;
    for (const char *mark = strstr(at, "<!--kvs:"); mark != NULL; mark = strstr(at, "<!--kvs:")) {
        fwrite(at, 1, (size_t)(mark - at), f);
        const char *name = mark + strlen("<!--kvs:");
        if (strncmp(name, "style", 5) == 0)
            fprintf(f, "<style>\n%s</style>", kvs_report_page_css);
        else if (strncmp(name, "script", 6) == 0)
            fprintf(f, "<script>\n%s\n%s\n%s\n%s</script>", kvs_report_plot_js, kvs_report_page_js,
                    kvs_report_evidence_js, kvs_report_detail_js);
        else if (strncmp(name, "data", 4) == 0)
            put_data(f, data);
        else if (strncmp(name, "title", 5) == 0)
            put_html(f, text_in(json_object_get(r->manifest, "model"), "name"));
        else
            KVS_TRY(put_plain(f, r, err));
        at = strstr(mark, "-->") + strlen("-->");
    }
    fputs(at, f);
    return KVS_OK;
}

/* ---- the file ---- */

static kvs_status write_atomically(const kvs_report *r, const char *data, kvs_error *err)
{
    char temporary[4096], path[4096];
    const int n = snprintf(temporary, sizeof temporary, "%s/.report.html.XXXXXX", r->dir);
    snprintf(path, sizeof path, "%s/report.html", r->dir);
    if (n < 0 || (size_t)n >= sizeof temporary)
        return kvs_error_set(err, KVS_EINVAL, "the folder's path is longer than %zu bytes", sizeof temporary);
    const int fd = mkstemp(temporary);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "wb");
    if (f == NULL) {
        const int why = errno;
        if (fd >= 0) {
            close(fd);
            unlink(temporary);
        }
        return kvs_error_set(err, KVS_EIO, "report.html: cannot be written in '%.200s': %s", r->dir, strerror(why));
    }
    kvs_status status = put_page(f, r, data, err);
    const bool whole = fflush(f) == 0 && !ferror(f) && fchmod(fd, 0644) == 0 && fsync(fd) == 0;
    const bool closed = fclose(f) == 0;
    if (status == KVS_OK && (!whole || !closed || rename(temporary, path) != 0))
        status = kvs_error_set(err, KVS_EIO, "report.html: cannot be written in '%.200s': %s", r->dir, strerror(errno));
    if (status != KVS_OK)
        unlink(temporary);
    return status;
}

kvs_status kvs_report_write(const char *dir, kvs_error *err)
{
    kvs_report r;
    if (dir == NULL || dir[0] == '\0')
        return kvs_error_set(err, KVS_EINVAL, "the report needs a folder that `kvasir bench` wrote");
    KVS_TRY(kvs_report_read(dir, &r, err));
    char *data = NULL;
    kvs_status status = make_data(&r, &data, err);
    if (status == KVS_OK)
        status = write_atomically(&r, data, err);
    free(data);
    kvs_report_free(&r);
    return status;
}

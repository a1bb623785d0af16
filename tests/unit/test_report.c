/* report.html: every number that went in comes out, nothing from a file can become markup, a broken folder is one
 * clear error and leaves the old page alone, nulls stay nulls. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "bench/report.h"
#include "bench/report_data.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HOSTILE "</script><b>x\\\"'&<!--"

static const char *const MANIFEST =
    "{\"schema\":1,\"kvasir\":{\"version\":\"0.1.0\",\"commit\":\"abc\",\"dirty\":false},\"compiler\":\"gcc\","
    "\"cpu\":{\"model\":\"cpu\",\"isa\":\"avx2\",\"threads\":2},\"os\":\"Linux\",\"model\":{\"name\":\"tiny<model>\","
    "\"arch\":\"llama\",\"sha256\":\"00\",\"n_layers\":1,\"n_heads\":2,\"n_kv_heads\":1,\"head_dim\":8,"
    "\"window_tokens\":8192,\"kv_bytes_per_token\":64},\"suite\":\"smoke\",\"command\":\"kvasir bench --suite "
    "<smoke>\","
    "\"data\":{\"name\":\"d\",\"xxh64\":\"1\",\"n_dialogues\":2,\"licence\":\"CC0\"},\"seed\":7,\"arith\":\"f32\","
    "\"kv_type\":\"f16\",\"trigger\":{\"tokens\":48,\"bytes\":3072},\"runs\":["
    "{\"run\":\"a\",\"policy\":\"recent,x\",\"policy_full\":\"recent\",\"position\":\"rollback\",\"budget_tokens\":64,"
    "\"budget_bytes\":4096,\"paper_compat\":false},"
    "{\"run\":\"b\",\"policy\":\"baseline\",\"policy_full\":\"baseline\",\"position\":\"keep\",\"budget_tokens\":8192,"
    "\"budget_bytes\":524288,\"paper_compat\":false}],\"protocols\":[\"tf\"],\"dialogues\":["
    "{\"id\":\"" HOSTILE "\",\"n_turns\":2,\"n_tokens\":100},{\"id\":\"d2\",\"n_turns\":1,\"n_tokens\":50}],"
    "\"recall_dialogues\":[{\"id\":\"f1\",\"n_turns\":9,\"n_tokens\":900,\"n_questions\":3},"
    "{\"id\":\"f2\",\"n_turns\":9,\"n_tokens\":900,\"n_questions\":1}],"
    "\"noise_floor_kl\":7e-7,\"started\":\"2026-01-01T00:00:00Z\",\"ended\":\"2026-01-01T00:01:00Z\","
    "\"complete\":true,\"preliminary\":true}\n";

static const char *const CLAIMS =
    "{\"preliminary\":true,\"n_dialogues\":2,\"claims\":[{\"id\":\"C4\",\"statement\":\"it <is> rollback\","
    "\"verdict\":\"PRELIMINARY\",\"leaning\":\"supported\",\"estimate\":8.8125,\"ci_low\":6.4375,\"ci_high\":null,"
    "\"n\":2,\"threshold\":5.03125,\"unit\":\"ratio\",\"detail\":[{\"name\":\"k\",\"value\":0.28125,\"ci_low\":null,"
    "\"ci_high\":null}],\"meaning\":\"m\"}]}\n";

/* The dialogue's id in CSV: quoted, its own quote doubled. */
static const char *const SUMMARY =
    "run,policy,position,dialogue,protocol,n_tokens,n_scored,kl_mean,kl_p99,kl_median,nll,nll_ref,ppl,ppl_ratio,top1,"
    "jsd,"
    "footprint,peak_kv_bytes,live_bytes_mean,budget_bytes,evictions,health_mean,looped_rate,ttft_ms_median,"
    "tpot_ms_median,prefill_tok_per_s,decode_tok_per_s,evict_ms_total,peak_rss_bytes\n"
    "a,\"recent,x\",rollback,\"</script><b>x\"\"'&<!--\",tf,100,41,0.40625,0.90625,0.15625,2.40625,2.03125,11.0625,"
    "1.46875,0.71875,0.09375,0.53125,4032,3904,4096,3,71.625,,12.375,9.8125,331.25,104.75,7.28125,61123\n"
    "a,\"recent,x\",rollback,d2,tf,50,21,0.21875,,0.15625,2.40625,2.03125,11.0625,1.46875,0.71875,0.09375,0.53125,4032,"
    "3904,4096,3,71.625,nan,12.375,9.8125,331.25,104.75,7.28125,61123\n"
    "b,baseline,keep,d2,tf,50,21,,,,,,,,,,,,,,,,,,,,,,\n";

static const char *const TURNS =
    "{\"run\":\"a\",\"dialogue\":\"" HOSTILE "\",\"turn\":0,\"protocol\":\"tf\",\"token_begin\":0,\"token_end\":57,"
    "\"n_scored\":20,\"nll\":2.125,\"nll_ref\":2.0625,\"kl_mean\":0.3125,\"top1\":0.8125,\"live_bytes\":3648,"
    "\"evictions\":1,\"evict_ms\":1.625,\"score_ms\":0.625,\"select_ms\":0.375,\"move_ms\":0.875,\"health\":83.75,"
    "\"health_worst\":\"future\",\"prefill_ms\":41.125,\"failure\":null}\n"
    "{\"run\":\"a\",\"dialogue\":\"" HOSTILE "\",\"turn\":1,\"protocol\":\"tf\",\"token_begin\":57,\"token_end\":100,"
    "\"n_scored\":21,\"nll\":null,\"nll_ref\":null,\"kl_mean\":null,\"live_bytes\":4096,\"evictions\":2,"
    "\"health\":61.25,\"failure\":\"<i>no room</i>\"}\n"
    "{\"run\":\"b\",\"dialogue\":\"d2\",\"turn\":0,\"protocol\":\"tf\",\"token_begin\":0,\"token_end\":50,"
    "\"n_scored\":20,\"nll\":1.9375,\"nll_ref\":1.9375,\"kl_mean\":0,\"failure\":null}\n";

static const char *const EVENTS =
    "{\"run\":\"a\",\"dialogue\":\"" HOSTILE
    "\",\"turn\":1,\"token_idx\":93,\"path\":\"in_prefill\",\"reason\":\"budget\","
    "\"n_before\":64,\"n_after\":49,\"keep_token_ranges\":[[0,3],[48,92]],\"uniform\":true,\"rope_next\":49,"
    "\"evict_ms\":2.875,\"future\":0.34375,\"health\":66.125}\n";

static const char *const KEEPS =
    "{\"run\":\"a\",\"dialogue\":\"" HOSTILE "\",\"layer\":0,\"kv_head\":0,\"pos_ranges\":[[0,3],[48,92],[93,99]],"
    "\"rope_ranges\":[[0,3],[48,92],[49,55]]}\n";

/* One line of recall.jsonl; correct and survival as JSON. */
#define ANSWER(run, dialogue, question, place, lag, n_candidates, correct, survival, failure)                          \
    "{\"run\":\"" run "\",\"dialogue\":\"" dialogue "\",\"question\":" question ",\"place\":\"" place                  \
    "\",\"lag_tokens\":" lag ",\"n_candidates\":" n_candidates ",\"correct\":" correct ",\"survival\":" survival       \
    ",\"failure\":" failure "}\n"

/* b, the full cache, knows 3 of 4. a loses one of them, wins the one b misses, and fails at one that b knows. In no
 * order: rows belong together by what they name, not by where they stand. */
static const char *const RECALL = ANSWER("b", "f1", "2", "late", "256", "8", "true", "1", "null")
    ANSWER("a", "f1", "0", "early", "1500", "4", "false", "0.25", "null")
        ANSWER("a", "f2", "0", "early", "1024", "8", "true", "0.5", "null")
            ANSWER("b", "f1", "1", "late", "255", "4", "false", "1", "null")
                ANSWER("a", "f1", "2", "late", "256", "8", "null", "null", "\"" HOSTILE "\"")
                    ANSWER("b", "f1", "0", "early", "1500", "4", "true", "1", "null")
                        ANSWER("b", "f2", "0", "early", "1024", "8", "true", "1", "null")
                            ANSWER("a", "f1", "1", "late", "255", "4", "true", "0.75", "null");

static const char *const NAMES[] = {"manifest.json", "claims.json",  "summary.csv",
                                    "turns.jsonl",   "events.jsonl", "keepsets.jsonl"};
enum { N_FILES = 6 };

typedef struct folder {
    char dir[64];
    const char *text[N_FILES];
} folder;

static void write_file(const folder *f, const char *name, const char *text, size_t n_bytes)
{
    char path[160];
    snprintf(path, sizeof path, "%s/%s", f->dir, name);
    FILE *out = fopen(path, "wb");
    assert_non_null(out);
    assert_int_equal(fwrite(text, 1, n_bytes, out), n_bytes);
    assert_int_equal(fclose(out), 0);
}

static char *read_page(const folder *f)
{
    char path[160];
    snprintf(path, sizeof path, "%s/report.html", f->dir);
    FILE *in = fopen(path, "rb");
    if (in == NULL)
        return NULL;
    assert_int_equal(fseek(in, 0, SEEK_END), 0);
    const long n = ftell(in);
    assert_true(n >= 0);
    rewind(in);
    char *text = calloc((size_t)n + 1, 1);
    assert_non_null(text);
    assert_int_equal(fread(text, 1, (size_t)n, in), (size_t)n);
    fclose(in);
    return text;
}

static int setup(void **state)
{
    folder *f = calloc(1, sizeof *f);
    if (f == NULL)
        return -1;
    const char *texts[N_FILES] = {MANIFEST, CLAIMS, SUMMARY, TURNS, EVENTS, KEEPS};
    memcpy(f->text, texts, sizeof texts);
    strcpy(f->dir, "/tmp/kvs_report_XXXXXX");
    if (mkdtemp(f->dir) == NULL)
        return -1;
    for (size_t i = 0; i < N_FILES; i++)
        write_file(f, NAMES[i], f->text[i], strlen(f->text[i]));
    *state = f;
    return 0;
}

static uint32_t n_entries(const folder *f, bool remove_them)
{
    DIR *d = opendir(f->dir);
    assert_non_null(d);
    uint32_t n = 0;
    for (const struct dirent *e = readdir(d); e != NULL; e = readdir(d)) {
        char path[400];
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        n++;
        snprintf(path, sizeof path, "%s/%s", f->dir, e->d_name);
        if (remove_them)
            unlink(path);
    }
    closedir(d);
    return n;
}

static int teardown(void **state)
{
    folder *f = *state;
    n_entries(f, true);
    rmdir(f->dir);
    free(f);
    return 0;
}

/* The data block, parsed as the browser would. */
static json_t *data_of(const char *page)
{
    const char *mark = "<script type=\"application/json\" id=\"data\">";
    const char *from = strstr(page, mark);
    assert_non_null(from);
    from += strlen(mark);
    const char *to = strstr(from, "</script>");
    assert_non_null(to);
    json_t *v = json_loadb(from, (size_t)(to - from), 0, NULL);
    assert_non_null(v);
    return v;
}

static void number_lost_between_files_and_page(void **state)
{
    const folder *f = *state;
    kvs_error err = {0};
    assert_int_equal(kvs_report_write(f->dir, &err), KVS_OK);
    char *page = read_page(f);
    assert_non_null(page);
    json_t *data = data_of(page);
    char *text = json_dumps(data, JSON_COMPACT | JSON_REAL_PRECISION(6));
    static const char *const numbers[] = {
        "8.8125",  "6.4375",  "5.03125", "0.28125",                                          /* claims */
        "0.40625", "0.90625", "0.15625", "2.40625", "11.0625", "1.46875", "4032",            /* summary */
        "71.625",  "12.375",  "9.8125",  "331.25",  "104.75",  "7.28125", "61123",           /* summary, times */
        "0.3125",  "2.125",   "0.8125",  "1.625",   "0.625",   "0.375",   "0.875", "41.125", /* turns */
        "0.34375", "66.125",  "2.875",   "93",                                               /* events */
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (strstr(text, numbers[i]) == NULL)
            fail_msg("%s is in the files and not in the page", numbers[i]);
    /* means[run 0][tf][kl_mean] = (0.40625 + 0.21875) / 2 over two dialogues, exact in binary */
    const json_t *kl = json_array_get(json_array_get(json_array_get(json_object_get(data, "means"), 0), 0), 0 + 2);
    assert_true(json_number_value(json_array_get(kl, 0)) == 0.3125);
    assert_int_equal(json_integer_value(json_array_get(kl, 3)), 2);
    /* with two dialogues a draw is one of three means, so the interval ends at the values themselves */
    assert_true(json_number_value(json_array_get(kl, 1)) == 0.21875);
    assert_true(json_number_value(json_array_get(kl, 2)) == 0.40625);
    free(text);
    json_decref(data);
    free(page);
}

static void hostile_id_becomes_markup(void **state)
{
    const folder *f = *state;
    assert_int_equal(kvs_report_write(f->dir, NULL), KVS_OK);
    char *page = read_page(f);
    assert_non_null(page);
    assert_null(strstr(page, "</script><b>"));
    assert_null(strstr(page, "<i>no room"));
    assert_null(strstr(page, "tiny<model>"));
    assert_null(strstr(page, "it <is> rollback"));
    assert_non_null(strstr(page, "tiny&lt;model&gt;"));      /* title and noscript */
    assert_non_null(strstr(page, "it &lt;is&gt; rollback")); /* noscript */
    uint32_t n_closed = 0;                                   /* the data block's and the script's own end, no other */
    for (const char *c = strstr(page, "</script>"); c != NULL; c = strstr(c + 1, "</script>"))
        n_closed++;
    assert_int_equal(n_closed, 2);
    json_t *data = data_of(page);
    const json_t *id =
        json_object_get(json_array_get(json_object_get(json_object_get(data, "manifest"), "dialogues"), 0), "id");
    assert_string_equal(json_string_value(id), "</script><b>x\"'&<!--");
    const json_t *failure = json_array_get(json_object_get(json_object_get(data, "failures"), "rows"), 0);
    assert_string_equal(json_string_value(json_array_get(failure, 4)), "<i>no room</i>");
    json_decref(data);
    free(page);
}

static void null_read_as_zero(void **state)
{
    const folder *f = *state;
    assert_int_equal(kvs_report_write(f->dir, NULL), KVS_OK);
    char *page = read_page(f);
    json_t *data = data_of(page);
    const json_t *summary = json_object_get(data, "summary");
    assert_int_equal(json_array_size(summary), 3);
    /* columns from index 3 on: kl_mean is the third, kl_p99 the fourth, looped_rate the seventeenth */
    assert_true(json_is_null(json_array_get(json_array_get(summary, 0), 3 + 16))); /* empty field */
    assert_true(json_is_null(json_array_get(json_array_get(summary, 1), 3 + 16))); /* "nan" */
    assert_true(json_is_null(json_array_get(json_array_get(summary, 1), 3 + 3)));
    assert_true(json_is_null(json_array_get(json_array_get(summary, 2), 3 + 2)));
    const json_t *means = json_array_get(json_array_get(json_object_get(data, "means"), 1), 0);
    assert_true(json_is_null(json_array_get(json_array_get(means, 2), 0))); /* mean of no value */
    assert_int_equal(json_integer_value(json_array_get(json_array_get(means, 2), 3)), 0);
    assert_true(json_is_null(json_array_get(json_array_get(json_object_get(data, "means"), 0), 1))); /* no fr rows */
    /* n of a mean counts values, not rows */
    const json_t *p99 = json_array_get(json_array_get(json_array_get(json_object_get(data, "means"), 0), 0), 3);
    assert_int_equal(json_integer_value(json_array_get(p99, 3)), 1);
    assert_true(json_is_null(json_array_get(p99, 1))); /* one value has no interval */
    assert_true(json_is_null(
        json_object_get(json_array_get(json_object_get(json_object_get(data, "claims"), "claims"), 0), "ci_high")));
    json_decref(data);
    free(page);
}

static void rollback_shift_or_future_wrong(void **state)
{
    const folder *f = *state;
    assert_int_equal(kvs_report_write(f->dir, NULL), KVS_OK);
    char *page = read_page(f);
    json_t *data = data_of(page);
    const json_t *keep = json_array_get(json_object_get(data, "keeps"), 0);
    assert_true(json_is_null(json_array_get(json_object_get(data, "keeps"), 1)));
    /* 4 + 45 + 7 slots are held of 100 tokens: under rollback the next query stands at 56. A key that never moved is
     * off by 56 - 100 = -44; pos 57..92 stand at 57..92, ahead of it; pos 93..99 at 49..55 are off by 0. */
    const json_t *head = json_array_get(json_object_get(keep, "heads"), 0);
    assert_int_equal(json_integer_value(json_array_get(head, 3)), 56);
    assert_int_equal(json_integer_value(json_array_get(head, 4)), 56);
    const json_t *raster = json_array_get(json_object_get(keep, "rasters"), 0);
    const json_int_t n_bins = json_integer_value(json_object_get(keep, "n_bins"));
    static const struct {
        double token;
        json_int_t share, shift;
    } want[] = {{1.5, 9, -44}, {50.5, 9, -44}, {75.5, 19, -44}, {97.5, 9, 0}};
    for (size_t k = 0; k < sizeof want / sizeof *want; k++) {
        bool found = false;
        for (size_t i = 0; i + 3 < json_array_size(raster); i += 4) {
            const double bin = want[k].token * (double)n_bins / 100.0;
            const json_int_t first = json_integer_value(json_array_get(raster, i));
            if (bin < (double)first || bin >= (double)(first + json_integer_value(json_array_get(raster, i + 1))))
                continue;
            found = true;
            assert_int_equal(json_integer_value(json_array_get(raster, i + 2)), want[k].share);
            assert_int_equal(json_integer_value(json_array_get(raster, i + 3)), want[k].shift);
        }
        assert_true(found);
    }
    json_decref(data);
    free(page);
}

static int64_t integer_in(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    assert_true(json_is_integer(v));
    return json_integer_value(v);
}

static void folder_without_recall_refused(void **state)
{
    const folder *f = *state;
    for (int empty_file = 0; empty_file < 2; empty_file++) {
        if (empty_file)
            write_file(f, "recall.jsonl", "", 0);
        kvs_error err = {0};
        assert_int_equal(kvs_report_write(f->dir, &err), KVS_OK);
        char *page = read_page(f);
        assert_non_null(page);
        json_t *data = data_of(page);
        assert_true(json_is_null(json_object_get(data, "recall"))); /* the page then has no such section */
        assert_null(strstr(page, "<h2>Recall"));                    /* nor has the one without scripts */
        json_decref(data);
        free(page);
    }
}

static void recall_held_against_other_questions(void **state)
{
    const folder *f = *state;
    write_file(f, "recall.jsonl", RECALL, strlen(RECALL));
    kvs_error err = {0};
    if (kvs_report_write(f->dir, &err) != KVS_OK)
        fail_msg("%s", err.message);
    char *page = read_page(f);
    assert_null(strstr(page, "</script><b>"));
    assert_non_null(strstr(page, "<td>2</td><td>3</td><td>4</td><td>2 of 3</td>")); /* a, without scripts */
    json_t *data = data_of(page);
    const json_t *recall = json_object_get(data, "recall"), *runs = json_object_get(recall, "runs");
    assert_int_equal(integer_in(recall, "full"), 1);
    assert_int_equal(integer_in(recall, "n_dialogues"), 2);
    assert_int_equal(integer_in(recall, "n_questions"), 4);
    assert_true(json_number_value(json_object_get(recall, "chance")) == 0.1875); /* (1/4 + 1/4 + 1/8 + 1/8) / 4 */
    assert_true(json_number_value(json_object_get(recall, "guard")) == 0.7);
    static const struct {
        const char *key;
        int64_t of_a, of_full;
    } want[] = {{"asked", 4, 4},      {"answered", 3, 4}, {"right", 2, 3}, {"paired", 3, 4},
                {"full_right", 2, 3}, {"lost", 1, 0},     {"won", 1, 0}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        assert_int_equal(integer_in(json_array_get(runs, 0), want[i].key), want[i].of_a);
        assert_int_equal(integer_in(json_array_get(runs, 1), want[i].key), want[i].of_full);
    }
    /* dialogues 2 of 3 and 1 of 1 for the full cache: draws give 2/3, 3/4 or 1, so the interval ends there */
    const json_t *rate = json_object_get(json_array_get(runs, 1), "rate");
    assert_true(json_number_value(json_array_get(rate, 0)) == 0.75);
    assert_true(fabs(json_number_value(json_array_get(rate, 1)) - 2.0 / 3) < 1e-5);
    assert_true(json_number_value(json_array_get(rate, 2)) == 1);
    assert_int_equal(json_integer_value(json_array_get(rate, 3)), 2);
    /* a: 1 of the 2 with a result, and 1 of 1 */
    rate = json_object_get(json_array_get(runs, 0), "rate");
    assert_true(json_number_value(json_array_get(rate, 1)) == 0.5);
    assert_true(json_number_value(json_object_get(json_array_get(runs, 0), "survival")) == 0.5); /* null is not 0 */
    assert_string_equal(json_string_value(json_object_get(json_array_get(runs, 0), "failure")),
                        "</script><b>x\"'&<!--");
    /* columns early 1024 to 2048, late under 256, late 256 to 512; A_full 2/2, 0/1, 1/1; a 1/2, 1/1 and no result */
    static const int64_t columns[3][4] = {{1024, 2048, 2, 2}, {0, 256, 1, 0}, {256, 512, 1, 1}};
    static const int64_t cells[3][2] = {{2, 1}, {1, 1}, {0, 0}};
    assert_int_equal(json_array_size(json_object_get(recall, "columns")), 3);
    for (size_t i = 0; i < 3; i++) {
        const json_t *column = json_array_get(json_object_get(recall, "columns"), i);
        const json_t *cell = json_array_get(json_object_get(json_array_get(runs, 0), "cells"), i);
        assert_string_equal(json_string_value(json_array_get(column, 0)), i == 0 ? "early" : "late");
        for (size_t k = 0; k < 4; k++)
            assert_int_equal(json_integer_value(json_array_get(column, k + 1)), columns[i][k]);
        for (size_t k = 0; k < 2; k++)
            assert_int_equal(json_integer_value(json_array_get(cell, k)), cells[i][k]);
    }
    json_decref(data);
    free(page);
}

static void diagnostics_of_a_failed_question_counted(void **state)
{
    const folder *f = *state;
    static const char *const text =
        "{\"run\":\"a\",\"dialogue\":\"f1\",\"question\":0,\"place\":\"late\",\"lag_tokens\":9,"
        "\"n_candidates\":4,\"correct\":true,\"survival\":1,\"erased\":0.25,"
        "\"head_consensus\":0.5,\"utilisation\":0.125,\"drift\":0.0625,"
        "\"key_channels_90\":0.75,\"failure\":null}\n"
        "{\"run\":\"a\",\"dialogue\":\"f1\",\"question\":1,\"place\":\"late\",\"lag_tokens\":9,"
        "\"n_candidates\":4,\"correct\":null,\"survival\":null,\"erased\":null,"
        "\"head_consensus\":null,\"utilisation\":null,\"drift\":null,"
        "\"key_channels_90\":null,\"failure\":\"full\"}\n"
        "{\"run\":\"a\",\"dialogue\":\"f1\",\"question\":2,\"place\":\"late\",\"lag_tokens\":9,"
        "\"n_candidates\":4,\"correct\":true,\"survival\":1,\"erased\":0.75,"
        "\"head_consensus\":1,\"utilisation\":0.375,\"drift\":0.1875,"
        "\"key_channels_90\":0.25,\"failure\":null}\n" ANSWER("b", "f1", "0", "late", "9", "4", "true", "1", "null");
    static const struct {
        const char *name;
        double mean;
    } want[] = {
        {"erased", 0.5}, {"head_consensus", 0.75}, {"utilisation", 0.25}, {"drift", 0.125}, {"key_channels_90", 0.5}};
    write_file(f, "recall.jsonl", text, strlen(text));
    assert_int_equal(kvs_report_write(f->dir, NULL), KVS_OK);
    char *page = read_page(f);
    json_t *data = data_of(page);
    const json_t *runs = json_object_get(json_object_get(data, "recall"), "runs");
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        const json_t *of_a = json_object_get(json_array_get(runs, 0), "diagnostics");
        const json_t *of_b = json_object_get(json_array_get(runs, 1), "diagnostics");
        assert_true(json_number_value(json_object_get(of_a, want[i].name)) == want[i].mean);
        assert_true(json_is_null(json_object_get(of_b, want[i].name))); /* a folder of before */
    }
    json_decref(data);
    free(page);
}

static void one_dialogue_called_certain(void **state)
{
    const folder *f = *state;
    const char *const text = ANSWER("b", "f1", "0", "late", "9", "4", "true", "1", "null")
        ANSWER("b", "f1", "1", "late", "9", "4", "true", "1", "null");
    write_file(f, "recall.jsonl", text, strlen(text));
    assert_int_equal(kvs_report_write(f->dir, NULL), KVS_OK);
    char *page = read_page(f);
    json_t *data = data_of(page);
    const json_t *runs = json_object_get(json_object_get(data, "recall"), "runs");
    assert_true(json_is_null(json_array_get(runs, 0))); /* not asked */
    /* Wilson of 2 of 2: 1 / (1 + 1.96^2 / 2) */
    const json_t *rate = json_object_get(json_array_get(runs, 1), "rate");
    assert_true(fabs(json_number_value(json_array_get(rate, 1)) - 0.342372) < 1e-5);
    assert_true(json_number_value(json_array_get(rate, 2)) == 1);
    json_decref(data);
    free(page);
}

/* Turns 0 and 1 stand before the first eviction, at health 100 and KL 0: they would make a correlation of anything.
 * From turn 2 on KL rises by turn and health falls with it, so that rho is -1.
 * Turn 7 is missing, so that turn 6 has no next one. */
static void turns_before_an_eviction_counted(void **state)
{
    const folder *f = *state;
    char text[4096];
    size_t n = 0;
    for (int run = 0; run < 2; run++)
        for (int t = 8; t >= 0; t--) {
            const bool same_as_full = t < 2 || run == 1;
            if (t != 7)
                n += (size_t)snprintf(
                    text + n, sizeof text - n,
                    "{\"run\":\"%s\",\"dialogue\":\"d2\",\"turn\":%d,\"protocol\":\"tf\",\"kl_mean\":%d,"
                    "\"health\":%d,\"evictions\":%d}\n",
                    run == 0 ? "a" : "b", t, same_as_full ? 0 : t, same_as_full ? 100 : 60 - t, t == 2);
        }
    write_file(f, "turns.jsonl", text, n);
    assert_int_equal(kvs_report_write(f->dir, NULL), KVS_OK);
    char *page = read_page(f);
    json_t *data = data_of(page);
    const json_t *tracking = json_object_get(data, "tracking");
    assert_int_equal(integer_in(tracking, "n"), 6); /* of run a alone: the full cache's own KL is 0 by construction */
    assert_int_equal(json_array_size(json_object_get(data, "points")), 6);
    static const char *const pairs[] = {"same", "next"};
    for (int i = 0; i < 2; i++) {
        const json_t *pair = json_object_get(tracking, pairs[i]), *all = json_object_get(pair, "all");
        /* four turns have a next one: too few for a correlation */
        assert_int_equal(json_integer_value(json_array_get(all, 3)), i == 0 ? 6 : 4);
        assert_true(i == 0 ? json_number_value(json_array_get(all, 0)) == -1 : json_is_null(json_array_get(all, 0)));
        assert_true(json_is_null(json_array_get(all, 1))); /* one dialogue has no interval */
        assert_int_equal(integer_in(pair, "n_runs"), 1 - i);
        assert_true(json_is_null(json_array_get(json_object_get(pair, "runs"), 1)));
    }
    const json_t *last = json_array_get(json_object_get(data, "points"), 5);
    assert_int_equal(json_integer_value(json_array_get(last, 4)), 8);
    assert_true(json_is_null(json_array_get(last, 5))); /* no turn after it */
    json_decref(data);
    free(page);
}

static void missing_file_not_named(void **state)
{
    const folder *f = *state;
    for (size_t i = 0; i < N_FILES; i++) {
        char path[160];
        snprintf(path, sizeof path, "%s/%s", f->dir, NAMES[i]);
        assert_int_equal(unlink(path), 0);
        kvs_error err = {0};
        assert_int_equal(kvs_report_write(f->dir, &err), KVS_EIO);
        assert_non_null(strstr(err.message, NAMES[i]));
        assert_null(strchr(err.message, '\n'));
        write_file(f, NAMES[i], f->text[i], strlen(f->text[i]));
    }
    assert_int_equal(n_entries(f, false), N_FILES); /* no page, no temporary file */
}

static void truncated_file_accepted(void **state)
{
    const folder *f = *state;
    assert_int_equal(kvs_report_write(f->dir, NULL), KVS_OK);
    char *before = read_page(f);
    for (size_t i = 0; i < N_FILES; i++) {
        const size_t n = strlen(f->text[i]);
        const size_t cuts[] = {n - 3, n / 2};
        for (size_t c = 0; c < 2; c++) {
            write_file(f, NAMES[i], f->text[i], cuts[c]);
            kvs_error err = {0};
            assert_int_equal(kvs_report_write(f->dir, &err), KVS_EFORMAT);
            assert_non_null(strstr(err.message, NAMES[i]));
            assert_null(strchr(err.message, '\n'));
        }
        write_file(f, NAMES[i], f->text[i], n);
    }
    char *after = read_page(f);
    assert_string_equal(before, after); /* a failure leaves the page that was there */
    assert_int_equal(n_entries(f, false), N_FILES + 1);
    assert_int_equal(kvs_report_write(f->dir, NULL), KVS_OK); /* and two pages of one folder are the same */
    free(after);
    after = read_page(f);
    assert_string_equal(before, after);
    free(before);
    free(after);
}

static void expect_refusal(const folder *f, const char *name, const char *text, kvs_status status, const char *word)
{
    write_file(f, name, text, strlen(text));
    kvs_error err = {0};
    assert_int_equal(kvs_report_write(f->dir, &err), status);
    if (strstr(err.message, word) == NULL)
        fail_msg("'%s' does not name %s", err.message, word);
}

static void foreign_row_accepted(void **state)
{
    const folder *f = *state;
    expect_refusal(f, "turns.jsonl", "{\"run\":\"zzz\",\"dialogue\":\"d2\",\"turn\":0,\"protocol\":\"tf\"}\n",
                   KVS_EFORMAT, "'zzz'");
    expect_refusal(f, "turns.jsonl", "{\"run\":\"a\",\"dialogue\":\"d2\",\"turn\":0,\"protocol\":\"xx\"}\n",
                   KVS_EFORMAT, "'xx'");
    expect_refusal(f, "turns.jsonl", "{\"run\":\"a\",\"dialogue\":\"nobody\",\"turn\":0,\"protocol\":\"tf\"}\n",
                   KVS_EFORMAT, "'nobody'");
    write_file(f, "turns.jsonl", TURNS, strlen(TURNS));
    expect_refusal(f, "keepsets.jsonl",
                   "{\"run\":\"a\",\"dialogue\":\"d2\",\"layer\":0,\"kv_head\":0,\"pos_ranges\":[[4,9]],"
                   "\"rope_ranges\":[[0,3]]}\n",
                   KVS_EFORMAT, "keepsets.jsonl line 1");
    write_file(f, "keepsets.jsonl", KEEPS, strlen(KEEPS));
    static const struct {
        const char *text, *word;
    } rows[] = {
        {ANSWER("zzz", "f1", "0", "late", "9", "4", "true", "1", "null"), "'zzz'"},
        {ANSWER("a", "d2", "0", "late", "9", "4", "true", "1", "null"), "'d2'"}, /* a dialogue, but of no recall */
        {ANSWER("a", "f1", "0", "below", "9", "4", "true", "1", "null"), "'below'"},
        {ANSWER("a", "f1", "0", "late", "null", "4", "true", "1", "null"), "lag_tokens"},
        {ANSWER("a", "f1", "0", "late", "9", "1", "true", "1", "null"), "n_candidates"},
        {"{\"run\":\"a\",\"dialogue\":\"f1\",\"quest", "recall.jsonl line 1: truncated"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        expect_refusal(f, "recall.jsonl", rows[i].text, KVS_EFORMAT, rows[i].word);
    write_file(f, "recall.jsonl", "", 0);
    expect_refusal(f, "manifest.json", "{\"schema\":2,\"runs\":[]}\n", KVS_EUNSUPPORTED, "schema 2");
}

static void bootstrap_depends_on_more_than_its_seed(void **state)
{
    (void)state;
    const double x[] = {0.1, 0.4, 0.2, 0.9, 0.3, 0.7};
    kvs_report_mean a, b, constant;
    assert_true(kvs_report_bootstrap(x, 6, 2000, 7, &a));
    assert_true(kvs_report_bootstrap(x, 6, 2000, 7, &b));
    assert_memory_equal(&a, &b, sizeof a);
    assert_true(a.low < a.mean && a.mean < a.high);
    assert_true(a.low >= 0.1 && a.high <= 0.9);
    const double same[] = {0.5, 0.5, 0.5};
    assert_true(kvs_report_bootstrap(same, 3, 2000, 7, &constant));
    assert_true(constant.low == 0.5 && constant.high == 0.5 && constant.mean == 0.5);
    assert_true(kvs_report_bootstrap(x, 0, 2000, 7, &a));
    assert_true(isnan(a.mean) && isnan(a.low) && a.n == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(number_lost_between_files_and_page, setup, teardown),
        cmocka_unit_test_setup_teardown(hostile_id_becomes_markup, setup, teardown),
        cmocka_unit_test_setup_teardown(null_read_as_zero, setup, teardown),
        cmocka_unit_test_setup_teardown(rollback_shift_or_future_wrong, setup, teardown),
        cmocka_unit_test_setup_teardown(folder_without_recall_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(recall_held_against_other_questions, setup, teardown),
        cmocka_unit_test_setup_teardown(diagnostics_of_a_failed_question_counted, setup, teardown),
        cmocka_unit_test_setup_teardown(one_dialogue_called_certain, setup, teardown),
        cmocka_unit_test_setup_teardown(turns_before_an_eviction_counted, setup, teardown),
        cmocka_unit_test_setup_teardown(missing_file_not_named, setup, teardown),
        cmocka_unit_test_setup_teardown(truncated_file_accepted, setup, teardown),
        cmocka_unit_test_setup_teardown(foreign_row_accepted, setup, teardown),
        cmocka_unit_test(bootstrap_depends_on_more_than_its_seed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

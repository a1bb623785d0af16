/* Reads a benchmark's output folder (docs/output.md) line by line and folds it into the sums and rows the page needs.
 * Owns every message about a missing, truncated or foreign file. Draws nothing. */
#include "bench/report_data.h"

#include "base/base.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    FAILURES_LISTED = 200, /* the page says how many more there are */
    FIELDS_MAX = 64,       /* of a CSV line */
};

const char *const kvs_report_summary_names[KVS_REPORT_SUMMARY_NUMBERS] = {
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
    "evictions",
    "health_mean",
    "looped_rate",
    "ttft_ms_median",
    "tpot_ms_median",
    "prefill_tok_per_s",
    "decode_tok_per_s",
    "evict_ms_total",
    "peak_rss_bytes",
};

const char *const kvs_report_turn_names[KVS_REPORT_TURN_NUMBERS] = {
    "n_scored",
    "nll",
    "nll_ref",
    "kl_mean",
    "kl_p95",
    "kl_p99",
    "kl_first32",
    "jsd",
    "top1",
    "rms_dp",
    "live_bytes",
    "kv_bytes",
    "live_slots_max",
    "evictions",
    "evict_ms",
    "score_ms",
    "select_ms",
    "move_ms",
    "health",
    "ldd",
    "rddi",
    "future",
    "out_of_window",
    "collision",
    "order",
    "backward",
    "gap",
    "seam",
    "adjacency",
    "prefix",
    "template_integrity",
    "ttft_ms",
    "tpot_ms",
    "prefill_ms",
    "decode_ms",
    "tokenise_ms",
    "n_generated",
    "rep1",
    "rep2",
    "rep3",
    "rep4",
    "looped",
    "longest_repeat",
    "max_run",
    "period",
    "prompt_echo",
    "eos_missing",
};

const char *const kvs_report_event_names[KVS_REPORT_EVENT_NUMBERS] = {
    "n_before", "n_after",   "rope_next", "evict_ms",      "score_ms", "select_ms", "move_ms",
    "future",   "collision", "order",     "out_of_window", "backward", "seam",      "health",
};

const char *const kvs_report_place_names[KVS_REPORT_PLACES] = {"early", "middle", "late"};
const char *const kvs_report_diagnostic_names[KVS_REPORT_DIAGNOSTICS] = {"erased", "head_consensus", "utilisation",
                                                                         "drift", "key_channels_90"};

/* ---- small things ---- */

/* Room for one more element; false: no memory, and the array stays as it was. */
static bool grow(void **array, size_t n, size_t *cap, size_t element_bytes)
{
    if (n < *cap)
        return true;
    const size_t cap_new = *cap == 0 ? 256 : *cap * 2;
    size_t bytes;
    if (!kvs_mul_size(cap_new, element_bytes, &bytes))
        return false;
    void *moved = realloc(*array, bytes);
    if (moved == NULL)
        return false;
    *array = moved;
    *cap = cap_new;
    return true;
}

static kvs_status no_memory(const char *name, kvs_error *err)
{
    return kvs_error_set(err, KVS_ENOMEM, "%s: out of memory while reading it", name);
}

static double number_of(const json_t *v)
{
    if (json_is_boolean(v))
        return json_is_true(v) ? 1.0 : 0.0;
    return json_is_number(v) ? json_number_value(v) : NAN;
}

static double number_at(const json_t *object, const char *key)
{
    return number_of(json_object_get(object, key));
}

static void sum_add(kvs_report_sum *s, double x)
{
    if (isnan(x))
        return;
    s->min = s->n == 0 || x < s->min ? x : s->min;
    s->max = s->n == 0 || x > s->max ? x : s->max;
    s->sum += x;
    s->n++;
}

static bool count_word(json_t *counts, const json_t *word)
{
    const char *text = json_string_value(word);
    if (text == NULL || text[0] == '\0')
        return true;
    const json_int_t n = json_integer_value(json_object_get(counts, text));
    return json_object_set_new(counts, text, json_integer(n + 1)) == 0;
}

static FILE *open_in(const kvs_report *r, const char *name, kvs_error *err)
{
    char path[4096];
    const int n = snprintf(path, sizeof path, "%s/%s", r->dir, name);
    if (n < 0 || (size_t)n >= sizeof path) {
        kvs_error_set(err, KVS_EINVAL, "the folder's path is longer than %zu bytes", sizeof path);
        return NULL;
    }
    FILE *f = fopen(path, "rb");
    if (f == NULL)
        kvs_error_set(err, KVS_EIO, "%s: %s in '%.200s'; a folder that `kvasir bench` wrote is needed", name,
                      strerror(errno), r->dir);
    return f;
}

/* ---- manifest.json and claims.json ---- */

static kvs_status read_whole(const kvs_report *r, const char *name, json_t **out, kvs_error *err)
{
    FILE *f = open_in(r, name, err);
    if (f == NULL)
        return err->status;
    json_error_t why;
    json_t *v = json_loadf(f, JSON_REJECT_DUPLICATES, &why);
    fclose(f);
    if (v == NULL)
        return kvs_error_set(err, KVS_EFORMAT, "%s line %d: truncated or not JSON (%s)", name, why.line, why.text);
    if (!json_is_object(v)) {
        json_decref(v);
        return kvs_error_set(err, KVS_EFORMAT, "%s: holds no object at its top", name);
    }
    *out = v;
    return KVS_OK;
}

static const char *text_at(const json_t *object, const char *key)
{
    return json_string_value(json_object_get(object, key));
}

static kvs_status take_dialogues(const kvs_report *r, const char *key, const char ***out, uint32_t *n, kvs_error *err)
{
    const json_t *list = json_object_get(r->manifest, key);
    *n = (uint32_t)json_array_size(list);
    *out = calloc((size_t)*n + 1, sizeof **out);
    if (*out == NULL)
        return no_memory("manifest.json", err);
    for (uint32_t i = 0; i < *n; i++) {
        (*out)[i] = text_at(json_array_get(list, i), "id");
        if ((*out)[i] == NULL)
            return kvs_error_set(err, KVS_EFORMAT, "manifest.json: %s[%u] needs a text 'id'", key, i);
    }
    return KVS_OK;
}

static kvs_status take_runs(kvs_report *r, kvs_error *err)
{
    const json_t *runs = json_object_get(r->manifest, "runs");
    if (json_array_size(runs) == 0 || !json_is_array(json_object_get(r->manifest, "dialogues")))
        return kvs_error_set(err, KVS_EFORMAT, "manifest.json: 'runs' and 'dialogues' must be lists, 'runs' not empty");
    r->n_runs = (uint32_t)json_array_size(runs);
    r->runs = calloc(r->n_runs, sizeof *r->runs);
    if (r->runs == NULL)
        return no_memory("manifest.json", err);
    r->full_run = UINT32_MAX;
    for (uint32_t i = 0; i < r->n_runs; i++) {
        kvs_report_run *run = &r->runs[i];
        const json_t *v = json_array_get(runs, i);
        run->id = text_at(v, "run");
        run->policy = text_at(v, "policy");
        run->position = text_at(v, "position");
        if (run->id == NULL || run->policy == NULL || run->position == NULL)
            return kvs_error_set(err, KVS_EFORMAT, "manifest.json: runs[%u] needs texts 'run', 'policy', 'position'",
                                 i);
        if (r->full_run == UINT32_MAX && strncmp(run->policy, "baseline", strlen("baseline")) == 0)
            r->full_run = i;
        run->kept_stride = 1;
        run->paths = json_object();
        run->reasons = json_object();
        run->worst[KVS_REPORT_TF] = json_object();
        run->worst[KVS_REPORT_FR] = json_object();
        if (run->paths == NULL || run->reasons == NULL || run->worst[0] == NULL || run->worst[1] == NULL)
            return no_memory("manifest.json", err);
    }
    KVS_TRY(take_dialogues(r, "dialogues", &r->dialogues, &r->n_dialogues, err));
    return take_dialogues(r, "recall_dialogues", &r->recall_dialogues, &r->n_recall_dialogues, err);
}

static kvs_status read_manifest(kvs_report *r, kvs_error *err)
{
    KVS_TRY(read_whole(r, "manifest.json", &r->manifest, err));
    const json_t *schema = json_object_get(r->manifest, "schema");
    if (!json_is_integer(schema))
        return kvs_error_set(err, KVS_EFORMAT, "manifest.json: 'schema' must be a whole number, %d for this build",
                             KVS_REPORT_SCHEMA);
    if (json_integer_value(schema) != KVS_REPORT_SCHEMA)
        return kvs_error_set(err, KVS_EUNSUPPORTED, "manifest.json: schema %lld; this build reads schema %d",
                             (long long)json_integer_value(schema), KVS_REPORT_SCHEMA);
    return take_runs(r, err);
}

static kvs_status read_claims(kvs_report *r, kvs_error *err)
{
    KVS_TRY(read_whole(r, "claims.json", &r->claims, err));
    const json_t *list = json_object_get(r->claims, "claims");
    if (!json_is_array(list))
        return kvs_error_set(err, KVS_EFORMAT, "claims.json: 'claims' must be a list");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *claim = json_array_get(list, i);
        if (text_at(claim, "id") == NULL || text_at(claim, "verdict") == NULL)
            return kvs_error_set(err, KVS_EFORMAT, "claims.json: claims[%zu] needs texts 'id' and 'verdict'", i);
    }
    return KVS_OK;
}

/* ---- where a row belongs ---- */

typedef struct place {
    const char *file;
    size_t line;
} place;

static uint32_t index_of_run(const kvs_report *r, const char *id, uint32_t hint)
{
    for (uint32_t k = 0; k < r->n_runs; k++) {
        const uint32_t i = (hint + k) % r->n_runs; /* rows come grouped by run */
        if (strcmp(r->runs[i].id, id) == 0)
            return i;
    }
    return UINT32_MAX;
}

static uint32_t index_of_dialogue(const char *const *ids, uint32_t n, const char *id, uint32_t hint)
{
    for (uint32_t k = 0; k < n; k++) {
        const uint32_t i = (hint + k) % n;
        if (strcmp(ids[i], id) == 0)
            return i;
    }
    return UINT32_MAX;
}

/* run and dialogue hold the row before on entry; dialogue is an index in ids [n_ids]. */
static kvs_status locate_in(const kvs_report *r, const char *const *ids, uint32_t n_ids, place at, const char *run_id,
                            const char *dialogue_id, uint32_t *run, uint32_t *dialogue, kvs_error *err)
{
    if (run_id == NULL || dialogue_id == NULL)
        return kvs_error_set(err, KVS_EFORMAT, "%s line %zu: 'run' and 'dialogue' must be texts", at.file, at.line);
    *run = index_of_run(r, run_id, *run);
    if (*run == UINT32_MAX)
        return kvs_error_set(err, KVS_EFORMAT, "%s line %zu: run '%.100s' is not in manifest.json", at.file, at.line,
                             run_id);
    *dialogue = index_of_dialogue(ids, n_ids, dialogue_id, *dialogue);
    if (*dialogue == UINT32_MAX)
        return kvs_error_set(err, KVS_EFORMAT, "%s line %zu: dialogue '%.100s' is not in manifest.json", at.file,
                             at.line, dialogue_id);
    return KVS_OK;
}

/* protocol may be NULL where a file has none. */
static kvs_status locate(const kvs_report *r, place at, const char *run_id, const char *dialogue_id,
                         const char *protocol_id, uint32_t *run, uint32_t *dialogue, uint32_t *protocol, kvs_error *err)
{
    KVS_TRY(locate_in(r, r->dialogues, r->n_dialogues, at, run_id, dialogue_id, run, dialogue, err));
    if (protocol == NULL)
        return KVS_OK;
    if (protocol_id == NULL || (strcmp(protocol_id, "tf") != 0 && strcmp(protocol_id, "fr") != 0))
        return kvs_error_set(err, KVS_EFORMAT, "%s line %zu: protocol '%.40s' must be tf or fr", at.file, at.line,
                             protocol_id == NULL ? "" : protocol_id);
    *protocol = protocol_id[0] == 't' ? KVS_REPORT_TF : KVS_REPORT_FR;
    return KVS_OK;
}

/* ---- lists of ranges ---- */

static bool copy_pairs(const json_t *list, int32_t *out)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *pair = json_array_get(list, i);
        const json_int_t a = json_integer_value(json_array_get(pair, 0));
        const json_int_t b = json_integer_value(json_array_get(pair, 1));
        if (json_array_size(pair) != 2 || a < 0 || b < a || b > INT32_MAX)
            return false;
        out[2 * i] = (int32_t)a;
        out[2 * i + 1] = (int32_t)b;
    }
    return true;
}

static kvs_status take_ranges(place at, const json_t *pos, const json_t *rope, kvs_report_ranges *out, kvs_error *err)
{
    const size_t n = json_array_size(pos);
    if (!json_is_array(pos) || (rope != NULL && json_array_size(rope) != n) || n > UINT32_MAX / 4)
        return kvs_error_set(err, KVS_EFORMAT, "%s line %zu: ranges must be lists of equal length", at.file, at.line);
    *out = (kvs_report_ranges){.n = (uint32_t)n};
    out->pos = calloc(2 * n + 1, sizeof *out->pos);
    out->rope = rope == NULL ? NULL : calloc(2 * n + 1, sizeof *out->rope);
    if (out->pos == NULL || (rope != NULL && out->rope == NULL))
        return no_memory(at.file, err); /* freed with whatever holds it */
    bool good = copy_pairs(pos, out->pos) && (rope == NULL || copy_pairs(rope, out->rope));
    for (size_t i = 0; good && i < n; i++) {
        good = i == 0 || out->pos[2 * i] > out->pos[2 * i - 1];
        if (rope != NULL && out->pos[2 * i + 1] - out->pos[2 * i] != out->rope[2 * i + 1] - out->rope[2 * i])
            good = false;
    }
    if (!good)
        return kvs_error_set(err, KVS_EFORMAT,
                             "%s line %zu: a range must be [first, last] of whole numbers, ascending, as long in "
                             "pos_ranges as in rope_ranges",
                             at.file, at.line);
    return KVS_OK;
}

static void ranges_free(kvs_report_ranges *g)
{
    free(g->pos);
    free(g->rope);
    *g = (kvs_report_ranges){0};
}

/* ---- the .jsonl files ---- */

typedef kvs_status (*line_fn)(kvs_report *r, place at, const json_t *v, kvs_error *err);

static kvs_status read_lines(kvs_report *r, const char *name, line_fn take, kvs_error *err)
{
    FILE *f = open_in(r, name, err);
    if (f == NULL)
        return err->status;
    char *text = NULL;
    size_t cap = 0;
    kvs_status status = KVS_OK;
    place at = {.file = name};
    for (;;) {
        const ssize_t n = getline(&text, &cap, f);
        if (n < 0)
            break;
        at.line++;
        json_error_t why;
        json_t *v = json_loadb(text, (size_t)n, 0, &why);
        if (v == NULL) {
            status =
                kvs_error_set(err, KVS_EFORMAT, "%s line %zu: truncated or not JSON (%s)", name, at.line, why.text);
            break;
        }
        status = json_is_object(v) ? take(r, at, v, err)
                                   : kvs_error_set(err, KVS_EFORMAT, "%s line %zu: not an object", name, at.line);
        json_decref(v);
        if (status != KVS_OK)
            break;
    }
    if (status == KVS_OK && ferror(f))
        status = kvs_error_set(err, KVS_EIO, "%s: cannot be read after line %zu", name, at.line);
    free(text);
    fclose(f);
    return status;
}

static void note_failure(kvs_report *r, const kvs_report_turn *t, const char *text)
{
    r->n_failures_all++;
    r->runs[t->run].n_failures[t->protocol]++;
    if (r->n_failures == FAILURES_LISTED)
        return;
    kvs_report_failure *f = &r->failures[r->n_failures++];
    *f = (kvs_report_failure){.run = t->run, .dialogue = t->dialogue, .turn = t->turn, .protocol = t->protocol};
    snprintf(f->text, sizeof f->text, "%s", text);
    f->text[kvs_utf8_valid_prefix(f->text, strlen(f->text))] = '\0'; /* the cut may halve a character */
}

static kvs_status take_turn(kvs_report *r, place at, const json_t *v, kvs_error *err)
{
    if (!grow((void **)&r->turns, r->n_turns, &r->cap_turns, sizeof *r->turns) ||
        (r->failures == NULL && (r->failures = calloc(FAILURES_LISTED, sizeof *r->failures)) == NULL))
        return no_memory(at.file, err);
    kvs_report_turn *t = &r->turns[r->n_turns];
    *t = (kvs_report_turn){0};
    if (r->n_turns > 0) {
        t->run = t[-1].run;
        t->dialogue = t[-1].dialogue;
    }
    KVS_TRY(locate(r, at, text_at(v, "run"), text_at(v, "dialogue"), text_at(v, "protocol"), &t->run, &t->dialogue,
                   &t->protocol, err));
    const json_t *turn = json_object_get(v, "turn");
    if (!json_is_integer(turn) || json_integer_value(turn) < 0 || json_integer_value(turn) > 1000000)
        return kvs_error_set(err, KVS_EFORMAT, "%s line %zu: 'turn' must be a whole number from 0", at.file, at.line);
    t->turn = (uint32_t)json_integer_value(turn);
    t->token_begin = number_at(v, "token_begin");
    t->token_end = number_at(v, "token_end");
    t->n_scored = number_at(v, "n_scored");
    t->nll = number_at(v, "nll");
    t->nll_ref = number_at(v, "nll_ref");
    t->kl = number_at(v, "kl_mean");
    t->top1 = number_at(v, "top1");
    t->live_bytes = number_at(v, "live_bytes");
    t->health = number_at(v, "health");
    t->evictions = number_at(v, "evictions");
    kvs_report_run *run = &r->runs[t->run];
    run->n_turns[t->protocol]++;
    for (size_t i = 0; i < KVS_REPORT_TURN_NUMBERS; i++)
        sum_add(&run->turn[t->protocol][i], number_at(v, kvs_report_turn_names[i]));
    if (!count_word(run->worst[t->protocol], json_object_get(v, "health_worst")))
        return no_memory(at.file, err);
    const char *failure = text_at(v, "failure");
    if (failure != NULL)
        note_failure(r, t, failure);
    r->n_turns++;
    return KVS_OK;
}

/* Keeps every kept_stride-th event; a full list drops every second one, so that the kept ones stay evenly spaced. */
static void thin_events(kvs_report_run *run)
{
    for (uint32_t i = 0; i < run->n_kept; i++) {
        if (i % 2 == 1)
            ranges_free(&run->kept[i].held);
        else
            run->kept[i / 2] = run->kept[i];
    }
    run->n_kept = (run->n_kept + 1) / 2;
    run->kept_stride *= 2;
}

static kvs_status keep_event(kvs_report_run *run, place at, const json_t *v, uint32_t dialogue, kvs_error *err)
{
    if (run->kept_seen == 0)
        run->kept_dialogue = dialogue;
    if (dialogue != run->kept_dialogue || run->kept_seen++ % run->kept_stride != 0)
        return KVS_OK;
    if (run->n_kept == KVS_REPORT_EVENTS_KEPT) {
        thin_events(run);
        if ((run->kept_seen - 1) % run->kept_stride != 0)
            return KVS_OK;
    }
    const double turn = number_at(v, "turn");
    kvs_report_event *e = &run->kept[run->n_kept];
    *e = (kvs_report_event){.dialogue = dialogue,
                            .turn = turn >= 0 && turn < 1e6 ? (uint32_t)turn : 0,
                            .token_idx = number_at(v, "token_idx"),
                            .n_before = number_at(v, "n_before"),
                            .n_after = number_at(v, "n_after"),
                            .rope_next = number_at(v, "rope_next"),
                            .future = number_at(v, "future"),
                            .health = number_at(v, "health")};
    const char *path = text_at(v, "path");
    snprintf(e->path, sizeof e->path, "%s", path == NULL ? "" : path);
    e->path[kvs_utf8_valid_prefix(e->path, strlen(e->path))] = '\0';
    const json_t *held = json_object_get(v, "keep_token_ranges");
    run->n_kept++; /* before the ranges, so that an error frees them */
    return json_is_array(held) ? take_ranges(at, held, NULL, &e->held, err) : KVS_OK;
}

static kvs_status take_event(kvs_report *r, place at, const json_t *v, kvs_error *err)
{
    uint32_t run_idx = 0, dialogue = 0;
    KVS_TRY(locate(r, at, text_at(v, "run"), text_at(v, "dialogue"), NULL, &run_idx, &dialogue, NULL, err));
    kvs_report_run *run = &r->runs[run_idx];
    run->n_events++;
    for (size_t i = 0; i < KVS_REPORT_EVENT_NUMBERS; i++)
        sum_add(&run->event[i], number_at(v, kvs_report_event_names[i]));
    if (!count_word(run->paths, json_object_get(v, "path")) || !count_word(run->reasons, json_object_get(v, "reason")))
        return no_memory(at.file, err);
    return keep_event(run, at, v, dialogue, err);
}

static kvs_status take_keep(kvs_report *r, place at, const json_t *v, kvs_error *err)
{
    if (!grow((void **)&r->keeps, r->n_keeps, &r->cap_keeps, sizeof *r->keeps))
        return no_memory(at.file, err);
    kvs_report_keep *k = &r->keeps[r->n_keeps];
    *k = (kvs_report_keep){0};
    if (r->n_keeps > 0)
        k->run = k[-1].run;
    KVS_TRY(locate(r, at, text_at(v, "run"), text_at(v, "dialogue"), NULL, &k->run, &k->dialogue, NULL, err));
    const double layer = number_at(v, "layer"), kv_head = number_at(v, "kv_head");
    if (!(layer >= 0 && layer < 4096) || !(kv_head >= 0 && kv_head < 4096))
        return kvs_error_set(err, KVS_EFORMAT, "%s line %zu: 'layer' and 'kv_head' must be whole numbers under 4096",
                             at.file, at.line);
    k->layer = (uint32_t)layer;
    k->kv_head = (uint32_t)kv_head;
    const json_t *rope = json_object_get(v, "rope_ranges");
    r->n_keeps++;
    return take_ranges(at, json_object_get(v, "pos_ranges"), rope == NULL ? json_null() : rope, &k->held, err);
}

static kvs_status take_answer(kvs_report *r, place at, const json_t *v, kvs_error *err)
{
    if (!grow((void **)&r->answers, r->n_answers, &r->cap_answers, sizeof *r->answers))
        return no_memory(at.file, err);
    kvs_report_answer *a = &r->answers[r->n_answers];
    *a = (kvs_report_answer){.right = -1, .full_right = -1};
    if (r->n_answers > 0) {
        a->run = a[-1].run;
        a->dialogue = a[-1].dialogue;
    }
    KVS_TRY(locate_in(r, r->recall_dialogues, r->n_recall_dialogues, at, text_at(v, "run"), text_at(v, "dialogue"),
                      &a->run, &a->dialogue, err));
    const double question = number_at(v, "question"), n_candidates = number_at(v, "n_candidates");
    a->lag_tokens = number_at(v, "lag_tokens");
    if (!(question >= 0 && question < 1e6) || !(n_candidates >= 2 && n_candidates < 1e6) || !(a->lag_tokens >= 0))
        return kvs_error_set(err, KVS_EFORMAT,
                             "%s line %zu: 'question' and 'lag_tokens' must be numbers from 0, 'n_candidates' from 2",
                             at.file, at.line);
    a->question = (uint32_t)question;
    a->n_candidates = (uint32_t)n_candidates;
    const char *told = text_at(v, "place");
    while (a->place < KVS_REPORT_PLACES && (told == NULL || strcmp(told, kvs_report_place_names[a->place]) != 0))
        a->place++;
    if (a->place == KVS_REPORT_PLACES)
        return kvs_error_set(err, KVS_EFORMAT, "%s line %zu: place '%.40s' must be early, middle or late", at.file,
                             at.line, told == NULL ? "" : told);
    a->survival = number_at(v, "survival");
    for (uint32_t d = 0; d < KVS_REPORT_DIAGNOSTICS; d++)
        a->diagnostics[d] = number_at(v, kvs_report_diagnostic_names[d]);
    const json_t *correct = json_object_get(v, "correct");
    if (json_is_boolean(correct))
        a->right = json_is_true(correct) ? 1 : 0;
    char *said = r->runs[a->run].recall_failure;
    if (a->right < 0 && said[0] == '\0') {
        const char *failure = text_at(v, "failure");
        snprintf(said, sizeof r->runs->recall_failure, "%s", failure == NULL ? "no result" : failure);
        said[kvs_utf8_valid_prefix(said, strlen(said))] = '\0';
    }
    r->n_answers++;
    return KVS_OK;
}

static int compare_answer(const void *pa, const void *pb)
{
    const kvs_report_answer *a = pa, *b = pb;
    if (a->dialogue != b->dialogue)
        return a->dialogue < b->dialogue ? -1 : 1;
    if (a->question != b->question)
        return a->question < b->question ? -1 : 1;
    return (a->run > b->run) - (a->run < b->run);
}

/* Folders written before there was a recall workload have no such file. */
static kvs_status read_recall(kvs_report *r, kvs_error *err)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/recall.jsonl", r->dir);
    if (access(path, F_OK) != 0 && errno == ENOENT)
        return KVS_OK;
    KVS_TRY(read_lines(r, "recall.jsonl", take_answer, err));
    if (r->n_answers == 0)
        return KVS_OK;
    qsort(r->answers, r->n_answers, sizeof *r->answers, compare_answer);
    for (size_t i = 0, j; i < r->n_answers; i = j) {
        int8_t full = -1;
        for (j = i; j < r->n_answers && r->answers[j].dialogue == r->answers[i].dialogue &&
                    r->answers[j].question == r->answers[i].question;
             j++)
            full = r->answers[j].run == r->full_run ? r->answers[j].right : full;
        for (size_t k = i; k < j; k++)
            r->answers[k].full_right = full;
    }
    return KVS_OK;
}

/* ---- summary.csv ---- */

/* Splits one line in place as RFC 4180 does: fields in double quotes may hold commas, "" is a quote. Returns the
 * number of fields, 0 for an open quote or too many fields. */
static size_t split_csv(char *line, char **fields)
{
    size_t n = 0;
    char *in = line;
    for (;;) {
        if (n == FIELDS_MAX)
            return 0;
        char *out = in;
        fields[n++] = out;
        if (*in == '"') {
            for (in++; *in != '\0' && !(in[0] == '"' && in[1] != '"'); in++) {
                in += *in == '"';
                *out++ = *in;
            }
            if (*in++ != '"')
                return 0;
        }
        while (*in != '\0' && *in != ',' && *in != '\r' && *in != '\n')
            *out++ = *in++;
        const char end = *in++;
        *out = '\0';
        if (end != ',')
            return n;
    }
}

typedef struct csv_columns {
    size_t run, dialogue, protocol, number[KVS_REPORT_SUMMARY_NUMBERS], n;
} csv_columns;

static size_t find_column(char **fields, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(fields[i], name) == 0)
            return i;
    return SIZE_MAX;
}

static kvs_status read_header(char **fields, size_t n, csv_columns *c, kvs_error *err)
{
    c->n = n;
    c->run = find_column(fields, n, "run");
    c->dialogue = find_column(fields, n, "dialogue");
    c->protocol = find_column(fields, n, "protocol");
    const char *missing = c->run == SIZE_MAX        ? "run"
                          : c->dialogue == SIZE_MAX ? "dialogue"
                          : c->protocol == SIZE_MAX ? "protocol"
                                                    : NULL;
    for (size_t i = 0; i < KVS_REPORT_SUMMARY_NUMBERS && missing == NULL; i++) {
        c->number[i] = find_column(fields, n, kvs_report_summary_names[i]);
        if (c->number[i] == SIZE_MAX)
            missing = kvs_report_summary_names[i];
    }
    if (missing != NULL)
        return kvs_error_set(err, KVS_EFORMAT, "summary.csv line 1: column '%s' is missing", missing);
    return KVS_OK;
}

static kvs_status take_summary(kvs_report *r, const csv_columns *c, char **fields, size_t n, place at, kvs_error *err)
{
    if (n != c->n)
        return kvs_error_set(err, KVS_EFORMAT,
                             "summary.csv line %zu: truncated or broken, %zu fields where the header has %zu", at.line,
                             n, c->n);
    if (!grow((void **)&r->summary, r->n_summary, &r->cap_summary, sizeof *r->summary))
        return no_memory(at.file, err);
    kvs_report_summary *s = &r->summary[r->n_summary];
    *s = (kvs_report_summary){0};
    KVS_TRY(locate(r, at, fields[c->run], fields[c->dialogue], fields[c->protocol], &s->run, &s->dialogue, &s->protocol,
                   err));
    for (size_t i = 0; i < KVS_REPORT_SUMMARY_NUMBERS; i++) {
        const char *text = fields[c->number[i]];
        char *end;
        s->value[i] = strtod(text, &end);
        if (text[0] == '\0' || strcmp(text, "null") == 0 || (*end == '\0' && !isfinite(s->value[i])))
            s->value[i] = NAN;
        else if (*end != '\0')
            return kvs_error_set(err, KVS_EFORMAT, "summary.csv line %zu: %s '%.40s' is not a number", at.line,
                                 kvs_report_summary_names[i], text);
    }
    r->n_summary++;
    return KVS_OK;
}

static kvs_status read_summary(kvs_report *r, kvs_error *err)
{
    FILE *f = open_in(r, "summary.csv", err);
    if (f == NULL)
        return err->status;
    char *text = NULL, *fields[FIELDS_MAX];
    size_t cap = 0;
    csv_columns columns = {0};
    place at = {.file = "summary.csv"};
    kvs_status status = KVS_OK;
    while (status == KVS_OK && getline(&text, &cap, f) >= 0) {
        at.line++;
        const bool whole = strchr(text, '\n') != NULL;
        const size_t n = split_csv(text, fields);
        if (!whole) /* a number cut in half would read as another number */
            status = kvs_error_set(err, KVS_EFORMAT, "summary.csv line %zu: truncated, it has no line end", at.line);
        else if (at.line == 1)
            status = read_header(fields, n, &columns, err);
        else
            status = take_summary(r, &columns, fields, n, at, err);
    }
    if (status == KVS_OK && at.line == 0)
        status = kvs_error_set(err, KVS_EFORMAT, "summary.csv: empty; its first line must name the columns");
    free(text);
    fclose(f);
    return status;
}

/* ---- the folder ---- */

static int compare_turn(const void *pa, const void *pb)
{
    const kvs_report_turn *a = pa, *b = pb;
    if (a->run != b->run)
        return a->run < b->run ? -1 : 1;
    if (a->protocol != b->protocol)
        return a->protocol < b->protocol ? -1 : 1;
    if (a->dialogue != b->dialogue)
        return a->dialogue < b->dialogue ? -1 : 1;
    return (a->turn > b->turn) - (a->turn < b->turn);
}

kvs_status kvs_report_read(const char *dir, kvs_report *r, kvs_error *err)
{
    kvs_error local;
    if (err == NULL)
        err = &local; /* open_in reports through it */
    *r = (kvs_report){.dir = dir};
    kvs_status status = read_manifest(r, err);
    if (status == KVS_OK)
        status = read_claims(r, err);
    if (status == KVS_OK)
        status = read_summary(r, err);
    if (status == KVS_OK)
        status = read_lines(r, "turns.jsonl", take_turn, err);
    if (status == KVS_OK)
        status = read_lines(r, "events.jsonl", take_event, err);
    if (status == KVS_OK)
        status = read_lines(r, "keepsets.jsonl", take_keep, err);
    if (status == KVS_OK)
        status = read_recall(r, err);
    if (status == KVS_OK && r->n_turns > 0)
        qsort(r->turns, r->n_turns, sizeof *r->turns, compare_turn);
    if (status != KVS_OK)
        kvs_report_free(r);
    return status;
}

void kvs_report_free(kvs_report *r)
{
    for (uint32_t i = 0; r->runs != NULL && i < r->n_runs; i++) {
        kvs_report_run *run = &r->runs[i];
        for (uint32_t k = 0; k < run->n_kept; k++)
            ranges_free(&run->kept[k].held);
        json_decref(run->worst[0]);
        json_decref(run->worst[1]);
        json_decref(run->paths);
        json_decref(run->reasons);
    }
    for (size_t i = 0; i < r->n_keeps; i++)
        ranges_free(&r->keeps[i].held);
    free(r->runs);
    free(r->dialogues);
    free(r->recall_dialogues);
    free(r->answers);
    free(r->summary);
    free(r->turns);
    free(r->failures);
    free(r->keeps);
    json_decref(r->manifest);
    json_decref(r->claims);
    *r = (kvs_report){0};
}

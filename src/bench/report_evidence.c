/* What the page shows with statistics of its own: recall of planted facts beside the full cache's, and whether health
 * follows KL. The page gets counts, shares and rank correlations; what they mean is said there. */
#include "bench/report_data.h"

#include "base/base.h"
#include "bench/report_json.h"
#include "eval/stats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    LAG_BINS = 24,             /* doubling: under 256 tokens, under 512, ... */
    LAG_FIRST = 256,           /* tokens */
    TURNS_MIN = 5,             /* of a rank correlation: with fewer it is mostly +1 or -1 */
    ROWS_DRAWN_MAX = 10000000, /* rows times draws: a larger pool of turns takes fewer draws */
};

static kvs_stats_options options_of(const kvs_report *r, uint32_t n_draws)
{
    kvs_stats_options opt;
    kvs_stats_options_default(&opt);
    opt.seed = kvs_report_seed(r);
    opt.n_draws = n_draws;
    return opt;
}

/* ---- recall ---- */

/* Wilson's 95 % interval of a share of n independent items. */
static void wilson(uint32_t n_right, uint32_t n, kvs_report_mean *out)
{
    const double z = 1.959963984540054, p = (double)n_right / n, shrink = 1 + z * z / n;
    const double middle = (p + z * z / (2.0 * n)) / shrink;
    const double half = z * sqrt(p * (1 - p) / n + z * z / (4.0 * n * n)) / shrink;
    out->low = fmax(0, middle - half);
    out->high = fmin(1, middle + half);
}

/* right and answered [n] by dialogue, none of them 0 in answered. */
static bool rate_of(const kvs_report *r, const double *right, const double *answered, uint32_t n,
                    kvs_report_recall *out)
{
    out->rate = (kvs_report_mean){.mean = NAN, .low = NAN, .high = NAN, .n = n};
    if (n == 0)
        return true;
    out->rate.mean = (double)out->n_right / out->n_answered;
    if (n == 1) {
        wilson(out->n_right, out->n_answered, &out->rate);
        return true;
    }
    const kvs_stats_options opt = options_of(r, KVS_REPORT_DRAWS);
    kvs_interval interval;
    if (kvs_bootstrap_ratio(right, answered, n, &opt, &interval, NULL) != KVS_OK)
        return false;
    out->rate.low = interval.lo;
    out->rate.high = interval.hi;
    return true;
}

static void count_answer(const kvs_report_answer *a, kvs_report_recall *out)
{
    out->n_asked++;
    if (a->right < 0)
        return;
    out->n_answered++;
    out->n_right += a->right == 1;
    if (a->full_right < 0)
        return;
    out->n_paired++;
    out->n_full_right += a->full_right == 1;
    out->n_lost += a->full_right == 1 && a->right == 0;
    out->n_won += a->full_right == 0 && a->right == 1;
}

static void mean_diagnostics(const kvs_report *r, uint32_t run, double *out)
{
    for (uint32_t d = 0; d < KVS_REPORT_DIAGNOSTICS; d++) {
        double sum = 0;
        uint32_t n = 0;
        for (size_t i = 0; i < r->n_answers; i++) {
            const kvs_report_answer *a = &r->answers[i];
            if (a->run != run || isnan(a->diagnostics[d]))
                continue;
            sum += a->diagnostics[d];
            n++;
        }
        out[d] = n > 0 ? sum / n : NAN;
    }
}

bool kvs_report_recall_of(const kvs_report *r, uint32_t run, kvs_report_recall *out)
{
    memset(out, 0, sizeof *out);
    double *right = calloc(2 * (size_t)r->n_recall_dialogues + 2, sizeof *right);
    if (right == NULL)
        return false;
    double *answered = right + r->n_recall_dialogues + 1, survival = 0;
    uint32_t n = 0, n_survival = 0;
    for (size_t i = 0, j; i < r->n_answers; i = j) {
        for (j = i; j < r->n_answers && r->answers[j].dialogue == r->answers[i].dialogue; j++) {
            const kvs_report_answer *a = &r->answers[j];
            if (a->run != run)
                continue;
            count_answer(a, out);
            right[n] += a->right == 1;
            answered[n] += a->right >= 0;
            survival += isnan(a->survival) ? 0 : a->survival;
            n_survival += isnan(a->survival) ? 0u : 1u;
        }
        n += answered[n] > 0;
    }
    out->survival = n_survival > 0 ? survival / n_survival : NAN;
    mean_diagnostics(r, run, out->diagnostics);
    const bool good = rate_of(r, right, answered, n, out);
    free(right);
    return good;
}

/* A cell of the grid place x lag: questions, those with a result, those right, and the told tokens held. */
typedef struct recall_cell {
    uint32_t n_answered, n_right, n_survival;
    double survival;
} recall_cell;

static uint32_t cell_of(const kvs_report_answer *a)
{
    uint32_t bin = 0;
    while (bin + 1 < LAG_BINS && a->lag_tokens >= ldexp(LAG_FIRST, (int)bin))
        bin++;
    return a->place * LAG_BINS + bin;
}

/* Of one run, or of all questions once with run UINT32_MAX. */
static void fill_cells(const kvs_report *r, uint32_t run, recall_cell *cells)
{
    memset(cells, 0, KVS_REPORT_PLACES * LAG_BINS * sizeof *cells);
    for (size_t i = 0; i < r->n_answers; i++) {
        const kvs_report_answer *a = &r->answers[i];
        const bool again = i > 0 && a[-1].dialogue == a->dialogue && a[-1].question == a->question;
        recall_cell *c = &cells[cell_of(a)];
        if (run == UINT32_MAX ? again : a->run != run)
            continue;
        const int8_t right = run == UINT32_MAX ? a->full_right : a->right;
        c->n_answered += right >= 0;
        c->n_right += right == 1;
        if (!isnan(a->survival)) {
            c->survival += a->survival;
            c->n_survival++;
        }
    }
}

/* [place, from tokens, to tokens, questions with a result of the full cache, right by it] of every cell in use; used
 * gets their indices. */
static json_t *recall_columns(const kvs_report *r, uint32_t *used, uint32_t *n_used, bool *bad)
{
    uint32_t asked[KVS_REPORT_PLACES * LAG_BINS] = {0};
    recall_cell cells[KVS_REPORT_PLACES * LAG_BINS];
    for (size_t i = 0; i < r->n_answers; i++)
        asked[cell_of(&r->answers[i])]++;
    fill_cells(r, UINT32_MAX, cells);
    json_t *out = json_array();
    *n_used = 0;
    for (uint32_t c = 0; c < KVS_REPORT_PLACES * LAG_BINS; c++) {
        if (asked[c] == 0)
            continue;
        const uint32_t bin = c % LAG_BINS;
        used[(*n_used)++] = c;
        json_t *column = json_array();
        push(column, json_string(kvs_report_place_names[c / LAG_BINS]), bad);
        push(column, num(bin == 0 ? 0 : ldexp(LAG_FIRST, (int)bin - 1)), bad);
        push(column, bin + 1 == LAG_BINS ? json_null() : num(ldexp(LAG_FIRST, (int)bin)), bad);
        push(column, json_integer(cells[c].n_answered), bad);
        push(column, json_integer(cells[c].n_right), bad);
        push(out, column, bad);
    }
    return out;
}

static json_t *recall_of_run(const kvs_report *r, uint32_t run, const uint32_t *used, uint32_t n_used, bool *bad)
{
    kvs_report_recall s;
    if (!kvs_report_recall_of(r, run, &s)) {
        *bad = true;
        return json_null();
    }
    if (s.n_asked == 0)
        return json_null();
    recall_cell cells[KVS_REPORT_PLACES * LAG_BINS];
    fill_cells(r, run, cells);
    json_t *o = json_object(), *list = json_array();
    const double rate[] = {s.rate.mean, s.rate.low, s.rate.high, s.rate.n};
    json_t *row = json_array();
    for (size_t i = 0; i < sizeof rate / sizeof *rate; i++)
        push(row, num(rate[i]), bad);
    for (uint32_t i = 0; i < n_used; i++) {
        const recall_cell *c = &cells[used[i]];
        json_t *cell = json_array();
        push(cell, json_integer(c->n_answered), bad);
        push(cell, json_integer(c->n_right), bad);
        push(cell, num_short(c->n_survival > 0 ? c->survival / c->n_survival : NAN), bad);
        push(list, cell, bad);
    }
    put(o, "rate", row, bad);
    put(o, "asked", json_integer(s.n_asked), bad);
    put(o, "answered", json_integer(s.n_answered), bad);
    put(o, "right", json_integer(s.n_right), bad);
    put(o, "paired", json_integer(s.n_paired), bad);
    put(o, "full_right", json_integer(s.n_full_right), bad);
    put(o, "lost", json_integer(s.n_lost), bad);
    put(o, "won", json_integer(s.n_won), bad);
    put(o, "survival", num_short(s.survival), bad);
    json_t *diagnostics = json_object();
    for (uint32_t d = 0; d < KVS_REPORT_DIAGNOSTICS; d++)
        put(diagnostics, kvs_report_diagnostic_names[d], num_short(s.diagnostics[d]), bad);
    put(o, "diagnostics", diagnostics, bad);
    put(o, "failure", r->runs[run].recall_failure[0] != '\0' ? json_string(r->runs[run].recall_failure) : json_null(),
        bad);
    put(o, "cells", list, bad);
    return o;
}

static json_t *data_recall(const kvs_report *r, bool *bad)
{
    if (r->n_answers == 0)
        return json_null();
    uint32_t used[KVS_REPORT_PLACES * LAG_BINS], n_used, n_questions = 0, n_dialogues = 0;
    double chance = 0;
    for (size_t i = 0; i < r->n_answers; i++) {
        const kvs_report_answer *a = &r->answers[i];
        const bool same = i > 0 && a[-1].dialogue == a->dialogue;
        n_dialogues += !same;
        if (same && a[-1].question == a->question)
            continue;
        n_questions++;
        chance += 1.0 / a->n_candidates;
    }
    json_t *o = json_object(), *runs = json_array();
    put(o, "full", r->full_run == UINT32_MAX ? json_null() : json_integer(r->full_run), bad);
    put(o, "guard", num(KVS_REPORT_RECALL_GUARD), bad);
    put(o, "chance", num(chance / n_questions), bad);
    put(o, "n_dialogues", json_integer(n_dialogues), bad);
    put(o, "n_questions", json_integer(n_questions), bad);
    put(o, "columns", recall_columns(r, used, &n_used, bad), bad);
    for (uint32_t i = 0; i < r->n_runs; i++)
        push(runs, recall_of_run(r, i, used, n_used, bad), bad);
    put(o, "runs", runs, bad);
    return o;
}

/* ---- health against KL ---- */

/* A teacher-forced turn of a run that has evicted; kl or kl_next may be NaN. */
typedef struct point {
    uint32_t run, dialogue, turn;
    double health, kl, kl_next;
} point;

static int compare_point(const void *pa, const void *pb)
{
    const point *a = pa, *b = pb;
    if (a->dialogue != b->dialogue)
        return a->dialogue < b->dialogue ? -1 : 1;
    if (a->run != b->run)
        return a->run < b->run ? -1 : 1;
    return (a->turn > b->turn) - (a->turn < b->turn);
}

/* Sorted by dialogue, run, turn. Turns before a run's first eviction are the full cache's own: health 100 and KL 0 by
 * construction, and they would make any score look right. NULL: no memory. */
static point *collect_points(const kvs_report *r, size_t *n)
{
    point *out = malloc((r->n_turns + 1) * sizeof *out);
    bool evicted = false;
    *n = 0;
    for (size_t i = 0; out != NULL && i < r->n_turns; i++) {
        const kvs_report_turn *t = &r->turns[i];
        const bool same =
            i > 0 && t[-1].run == t->run && t[-1].dialogue == t->dialogue && t[-1].protocol == t->protocol;
        evicted = (same && evicted) || t->evictions > 0;
        if (t->protocol != KVS_REPORT_TF || t->run == r->full_run || !evicted || !isfinite(t->health))
            continue;
        const bool next = i + 1 < r->n_turns && t[1].run == t->run && t[1].dialogue == t->dialogue &&
                          t[1].protocol == t->protocol && t[1].turn == t->turn + 1;
        const point p = {t->run, t->dialogue, t->turn, t->health, t->kl, next ? t[1].kl : NAN};
        if (isfinite(p.kl) || isfinite(p.kl_next))
            out[(*n)++] = p;
    }
    if (out != NULL && *n > 0)
        qsort(out, *n, sizeof *out, compare_point);
    return out;
}

/* What one correlation is computed from. */
typedef struct rows {
    double *x, *y;
    uint32_t *begin; /* [n_dialogues + 1] */
    uint32_t n, n_dialogues;
} rows;

static bool rows_new(rows *w, size_t n_points)
{
    *w = (rows){malloc((n_points + 1) * sizeof *w->x), malloc((n_points + 1) * sizeof *w->y),
                malloc((n_points + 2) * sizeof *w->begin), 0, 0};
    return w->x != NULL && w->y != NULL && w->begin != NULL;
}

static void rows_free(rows *w)
{
    free(w->x);
    free(w->y);
    free(w->begin);
}

/* Points of one run, or of all with run UINT32_MAX. */
static void rows_fill(rows *w, const point *points, size_t n_points, uint32_t run, bool next)
{
    uint32_t dialogue = UINT32_MAX;
    w->n = w->n_dialogues = 0;
    for (size_t i = 0; i < n_points; i++) {
        const point *p = &points[i];
        const double kl = next ? p->kl_next : p->kl;
        if ((run != UINT32_MAX && p->run != run) || !isfinite(kl))
            continue;
        if (p->dialogue != dialogue)
            w->begin[w->n_dialogues++] = w->n;
        dialogue = p->dialogue;
        w->x[w->n] = p->health;
        w->y[w->n++] = kl;
    }
    w->begin[w->n_dialogues] = w->n;
}

/* [rho, low, high, turns, dialogues]: Spearman's, with a percentile interval over dialogues where there are two. */
static json_t *rho_row(const kvs_report *r, const rows *w, uint32_t n_draws, double *rho, bool *bad)
{
    kvs_interval interval = {.estimate = NAN, .lo = NAN, .hi = NAN};
    const kvs_stats_options opt = options_of(r, n_draws);
    if (w->n >= TURNS_MIN && w->n_dialogues > 1)
        *bad |= kvs_spearman_clustered(w->x, w->y, w->begin, w->n_dialogues, &opt, &interval, NULL) != KVS_OK;
    else if (w->n >= TURNS_MIN)
        *bad |= kvs_spearman(w->x, w->y, w->n, &opt, &interval.estimate, NULL) != KVS_OK;
    *rho = interval.estimate;
    json_t *row = json_array();
    push(row, num_short(interval.estimate), bad);
    push(row, num_short(interval.lo), bad);
    push(row, num_short(interval.hi), bad);
    push(row, json_integer(w->n), bad);
    push(row, json_integer(w->n_dialogues), bad);
    return row;
}

static json_t *tracking_of(const kvs_report *r, const point *points, size_t n_points, bool next, bool *bad)
{
    json_t *o = json_object(), *runs = json_array();
    double *rhos = malloc((2 * (size_t)r->n_runs + 2) * sizeof *rhos), rho;
    rows w;
    uint32_t n_rhos = 0;
    const bool good = rows_new(&w, n_points) && rhos != NULL;
    *bad |= !good;
    if (good) {
        rows_fill(&w, points, n_points, UINT32_MAX, next);
        const double draws = fmin(KVS_REPORT_DRAWS, fmax(KVS_REPORT_DRAWS_SERIES, ROWS_DRAWN_MAX / (w.n + 1.0)));
        put(o, "all", rho_row(r, &w, (uint32_t)draws, &rho, bad), bad);
        for (uint32_t i = 0; i < r->n_runs; i++) {
            rows_fill(&w, points, n_points, i, next);
            push(runs, w.n == 0 ? json_null() : rho_row(r, &w, KVS_REPORT_DRAWS_SERIES, &rho, bad), bad);
            if (w.n > 0 && isfinite(rho))
                rhos[n_rhos++] = rho;
        }
        put(o, "median", num_short(kvs_median(rhos, n_rhos, rhos + r->n_runs + 1)), bad);
        put(o, "n_runs", json_integer(n_rhos), bad);
    }
    put(o, "runs", runs, bad);
    rows_free(&w);
    free(rhos);
    return o;
}

static json_t *data_tracking(const kvs_report *r, bool *bad)
{
    size_t n;
    point *points = collect_points(r, &n);
    *bad |= points == NULL;
    json_t *o = json_null();
    if (points != NULL && n > 0) {
        o = json_object();
        put(o, "n", json_integer((json_int_t)n), bad);
        put(o, "turns_min", json_integer(TURNS_MIN), bad);
        put(o, "same", tracking_of(r, points, n, false, bad), bad);
        put(o, "next", tracking_of(r, points, n, true, bad), bad);
    }
    free(points);
    return o;
}

json_t *kvs_report_points(const kvs_report *r, uint32_t n_wanted, bool *bad)
{
    size_t n;
    point *points = collect_points(r, &n);
    *bad |= points == NULL;
    json_t *out = json_array();
    const size_t stride = n / (n_wanted > 0 ? n_wanted : 1) + 1;
    for (size_t i = 0; points != NULL && i < n; i += stride) {
        json_t *row = json_array();
        push(row, json_integer(points[i].run), bad);
        push(row, json_integer(points[i].dialogue), bad);
        push(row, json_integer(points[i].turn), bad);
        push(row, num_short(points[i].health), bad);
        push(row, num_short(points[i].kl), bad);
        push(row, num_short(points[i].kl_next), bad);
        push(out, row, bad);
    }
    free(points);
    return out;
}

json_t *kvs_report_evidence(const kvs_report *r)
{
    bool bad = false;
    json_t *o = json_object();
    put(o, "recall", data_recall(r, &bad), &bad);
    put(o, "tracking", data_tracking(r, &bad), &bad);
    if (bad) {
        json_decref(o);
        return NULL;
    }
    return o;
}

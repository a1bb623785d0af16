/* Turns an output folder in memory into the compact data block the page draws from: means with bootstrap intervals,
 * per-turn and per-position series, rasters of what was kept. Rows are arrays, named once by a "cols" list. */
#include "bench/report_data.h"

#include "base/base.h"
#include "bench/report_json.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    TURNS_MAX = 200,  /* points of a curve; beyond it every second turn is left out */
    BINS_MAX = 64,    /* position bins of a curve */
    BIN_TOKENS = 256, /* evaluation.md 3.11: curves are printed per 256 tokens */
};

/* ---- means over dialogues ---- */

static int compare_double(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

bool kvs_report_bootstrap(const double *x, uint32_t n, uint32_t n_draws, uint64_t seed, kvs_report_mean *out)
{
    memset(out, 0, sizeof *out); /* the padding too, so that equal results are equal bytes */
    out->mean = out->low = out->high = NAN;
    out->n = n;
    if (n == 0)
        return true;
    double sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += x[i];
    out->mean = sum / n;
    if (n < 2 || n_draws < 40)
        return true;
    double *draws = malloc(n_draws * sizeof *draws);
    if (draws == NULL)
        return false;
    kvs_rng rng = {.state = seed};
    for (uint32_t d = 0; d < n_draws; d++) {
        double s = 0;
        for (uint32_t i = 0; i < n; i++)
            s += x[kvs_rng_below(&rng, n)];
        draws[d] = s / n;
    }
    qsort(draws, n_draws, sizeof *draws, compare_double);
    out->low = draws[(size_t)(0.025 * n_draws)];
    out->high = draws[n_draws - 1 - (size_t)(0.025 * n_draws)];
    free(draws);
    return true;
}

uint64_t kvs_report_seed(const kvs_report *r)
{
    const json_t *seed = json_object_get(r->manifest, "seed");
    return json_is_integer(seed) ? (uint64_t)json_integer_value(seed) : 0;
}

bool kvs_report_summary_mean(const kvs_report *r, uint32_t run, uint32_t protocol, uint32_t column,
                             kvs_report_mean *out)
{
    double *x = malloc((r->n_summary + 1) * sizeof *x);
    if (x == NULL)
        return false;
    uint32_t n = 0;
    for (size_t i = 0; i < r->n_summary; i++) {
        const kvs_report_summary *s = &r->summary[i];
        if (s->run == run && s->protocol == protocol && !isnan(s->value[column]))
            x[n++] = s->value[column];
    }
    const bool good = kvs_report_bootstrap(x, n, KVS_REPORT_DRAWS, kvs_report_seed(r), out);
    free(x);
    return good;
}

static json_t *mean_row(const kvs_report_mean *m, bool *bad)
{
    json_t *row = json_array();
    push(row, num(m->mean), bad);
    push(row, num(m->low), bad);
    push(row, num(m->high), bad);
    push(row, json_integer(m->n), bad);
    return row;
}

/* agg[run][protocol][column] = [mean, low, high, n], null where a run has no row of that protocol. */
static json_t *data_means(const kvs_report *r, bool *bad)
{
    json_t *out = json_array();
    for (uint32_t run = 0; run < r->n_runs; run++) {
        json_t *by_protocol = json_array();
        for (uint32_t p = 0; p < KVS_REPORT_PROTOCOLS; p++) {
            bool any = false;
            for (size_t i = 0; i < r->n_summary && !any; i++)
                any = r->summary[i].run == run && r->summary[i].protocol == p;
            json_t *columns = any ? json_array() : json_null();
            for (uint32_t c = 0; any && c < KVS_REPORT_SUMMARY_NUMBERS; c++) {
                kvs_report_mean m;
                *bad |= !kvs_report_summary_mean(r, run, p, c, &m);
                push(columns, mean_row(&m, bad), bad);
            }
            push(by_protocol, columns, bad);
        }
        push(out, by_protocol, bad);
    }
    return out;
}

static json_t *data_summary(const kvs_report *r, bool *bad)
{
    json_t *rows = json_array();
    for (size_t i = 0; i < r->n_summary; i++) {
        const kvs_report_summary *s = &r->summary[i];
        json_t *row = json_array();
        push(row, json_integer(s->run), bad);
        push(row, json_integer(s->dialogue), bad);
        push(row, json_integer(s->protocol), bad);
        for (size_t c = 0; c < KVS_REPORT_SUMMARY_NUMBERS; c++)
            push(row, num(s->value[c]), bad);
        push(rows, row, bad);
    }
    return rows;
}

/* ---- means over turns and events ---- */

static json_t *sum_rows(const kvs_report_sum *sums, size_t n, bool *bad)
{
    json_t *rows = json_array();
    for (size_t i = 0; i < n; i++) {
        if (sums[i].n == 0) {
            push(rows, json_null(), bad);
            continue;
        }
        json_t *row = json_array();
        push(row, num(sums[i].sum / (double)sums[i].n), bad);
        push(row, num(sums[i].min), bad);
        push(row, num(sums[i].max), bad);
        push(row, json_integer((json_int_t)sums[i].n), bad);
        push(rows, row, bad);
    }
    return rows;
}

/* turn_means[run][protocol] = {n, failures, worst, cols: [[mean, min, max, n] or null]}. */
static json_t *data_turn_means(const kvs_report *r, bool *bad)
{
    json_t *out = json_array();
    for (uint32_t i = 0; i < r->n_runs; i++) {
        json_t *by_protocol = json_array();
        for (uint32_t p = 0; p < KVS_REPORT_PROTOCOLS; p++) {
            const kvs_report_run *run = &r->runs[i];
            if (run->n_turns[p] == 0) {
                push(by_protocol, json_null(), bad);
                continue;
            }
            json_t *o = json_object();
            put(o, "n", json_integer((json_int_t)run->n_turns[p]), bad);
            put(o, "failures", json_integer((json_int_t)run->n_failures[p]), bad);
            put(o, "worst", json_incref(run->worst[p]), bad);
            put(o, "values", sum_rows(run->turn[p], KVS_REPORT_TURN_NUMBERS, bad), bad);
            push(by_protocol, o, bad);
        }
        push(out, by_protocol, bad);
    }
    return out;
}

/* ---- curves over turns ---- */

static int compare_by_turn(const void *pa, const void *pb)
{
    const kvs_report_turn *a = pa, *b = pb;
    return a->turn != b->turn ? (a->turn > b->turn) - (a->turn < b->turn)
                              : (a->dialogue > b->dialogue) - (a->dialogue < b->dialogue);
}

static double mean_of(const kvs_report_turn *t, size_t n, size_t offset)
{
    double sum = 0;
    size_t n_seen = 0;
    for (size_t i = 0; i < n; i++) {
        double x;
        memcpy(&x, (const char *)&t[i] + offset, sizeof x);
        if (isnan(x))
            continue;
        sum += x;
        n_seen++;
    }
    return n_seen == 0 ? NAN : sum / (double)n_seen;
}

/* [turn, n, token_end, kl, kl_low, kl_high, nll, nll_ref, top1, live_bytes, health, evictions] */
static json_t *turn_row(const kvs_report_turn *t, size_t n, uint64_t seed, bool *bad)
{
    kvs_report_mean kl = {.mean = NAN, .low = NAN, .high = NAN};
    double *x = malloc((n + 1) * sizeof *x);
    uint32_t n_x = 0;
    for (size_t i = 0; x != NULL && i < n; i++)
        if (!isnan(t[i].kl))
            x[n_x++] = t[i].kl;
    *bad |= x == NULL || !kvs_report_bootstrap(x, n_x, KVS_REPORT_DRAWS_SERIES, seed, &kl);
    free(x);
    json_t *row = json_array();
    push(row, json_integer(t->turn), bad);
    push(row, json_integer((json_int_t)n), bad);
    push(row, num(mean_of(t, n, offsetof(kvs_report_turn, token_end))), bad);
    push(row, num_short(kl.mean), bad);
    push(row, num_short(kl.low), bad);
    push(row, num_short(kl.high), bad);
    push(row, num_short(mean_of(t, n, offsetof(kvs_report_turn, nll))), bad);
    push(row, num_short(mean_of(t, n, offsetof(kvs_report_turn, nll_ref))), bad);
    push(row, num_short(mean_of(t, n, offsetof(kvs_report_turn, top1))), bad);
    push(row, num_short(mean_of(t, n, offsetof(kvs_report_turn, live_bytes))), bad);
    push(row, num_short(mean_of(t, n, offsetof(kvs_report_turn, health))), bad);
    push(row, num_short(mean_of(t, n, offsetof(kvs_report_turn, evictions))), bad);
    return row;
}

/* One curve of rows that lie together and are sorted by turn. dialogue -1: the mean over dialogues. */
static json_t *curve(const kvs_report_turn *t, size_t n, int64_t dialogue, uint64_t seed, bool *bad)
{
    uint32_t turn_max = 0, stride = 1;
    for (size_t i = 0; i < n; i++)
        turn_max = kvs_max_u32(turn_max, t[i].turn);
    while (turn_max / stride >= TURNS_MAX)
        stride *= 2;
    json_t *rows = json_array();
    for (size_t i = 0, j; i < n; i = j) {
        for (j = i + 1; j < n && t[j].turn == t[i].turn;)
            j++;
        if (t[i].turn % stride == 0)
            push(rows, turn_row(t + i, j - i, seed, bad), bad);
    }
    json_t *o = json_object();
    put(o, "run", json_integer(t->run), bad);
    put(o, "protocol", json_integer(t->protocol), bad);
    put(o, "dialogue", dialogue < 0 ? json_null() : json_integer(dialogue), bad);
    put(o, "stride", json_integer(stride), bad);
    put(o, "rows", rows, bad);
    return o;
}

static json_t *data_curves(const kvs_report *r, uint32_t n_dialogues, bool *bad)
{
    const kvs_report_turn *sorted = r->turns;
    json_t *out = json_array();
    kvs_report_turn *by_turn = malloc((r->n_turns + 1) * sizeof *by_turn);
    if (by_turn == NULL) {
        *bad = true;
        return out;
    }
    for (size_t i = 0, j; i < r->n_turns; i = j) {
        for (j = i + 1; j < r->n_turns && sorted[j].run == sorted[i].run && sorted[j].protocol == sorted[i].protocol;)
            j++;
        memcpy(by_turn, sorted + i, (j - i) * sizeof *by_turn);
        qsort(by_turn, j - i, sizeof *by_turn, compare_by_turn);
        push(out, curve(by_turn, j - i, -1, kvs_report_seed(r), bad), bad);
        for (size_t a = i, b; a < j; a = b) {
            for (b = a + 1; b < j && sorted[b].dialogue == sorted[a].dialogue;)
                b++;
            if (sorted[a].dialogue < n_dialogues)
                push(out, curve(sorted + a, b - a, sorted[a].dialogue, kvs_report_seed(r), bad), bad);
        }
    }
    free(by_turn);
    return out;
}

/* ---- curves over true position ---- */

typedef struct bin_sums {
    double nll, nll_weight, ref, ref_weight;
} bin_sums;

/* A turn's mean is spread over the bins it covers, in proportion to the overlap. */
static void spread(bin_sums *bins, uint32_t n_bins, uint32_t width, const kvs_report_turn *t)
{
    const double length = t->token_end - t->token_begin;
    if (!(length > 0) || !(t->n_scored > 0) || t->token_begin < 0)
        return;
    for (uint32_t b = (uint32_t)(t->token_begin / width); b < n_bins && (double)b * width < t->token_end; b++) {
        const double from = fmax(t->token_begin, (double)b * width), to = fmin(t->token_end, (double)(b + 1) * width);
        const double weight = t->n_scored * (to - from) / length;
        if (!isnan(t->nll)) {
            bins[b].nll += weight * t->nll;
            bins[b].nll_weight += weight;
        }
        if (!isnan(t->nll_ref)) {
            bins[b].ref += weight * t->nll_ref;
            bins[b].ref_weight += weight;
        }
    }
}

/* [bin, nll, low, high, n, ref, ref_low, ref_high, ref_n]: means over dialogues of token-weighted means. */
static void push_bin(json_t *rows, const bin_sums *bins, uint32_t n_dialogues, uint32_t n_bins, uint32_t b,
                     uint64_t seed, bool *bad)
{
    double *x = malloc(2 * (size_t)(n_dialogues + 1) * sizeof *x);
    if (x == NULL) {
        *bad = true;
        return;
    }
    double *y = x + n_dialogues;
    uint32_t n_x = 0, n_y = 0;
    for (uint32_t d = 0; d < n_dialogues; d++) {
        const bin_sums *s = &bins[(size_t)d * n_bins + b];
        if (s->nll_weight > 0)
            x[n_x++] = s->nll / s->nll_weight;
        if (s->ref_weight > 0)
            y[n_y++] = s->ref / s->ref_weight;
    }
    kvs_report_mean m, ref;
    *bad |= !kvs_report_bootstrap(x, n_x, KVS_REPORT_DRAWS_SERIES, seed, &m);
    *bad |= !kvs_report_bootstrap(y, n_y, KVS_REPORT_DRAWS_SERIES, seed, &ref);
    free(x);
    if (n_x == 0 && n_y == 0)
        return;
    json_t *row = json_array();
    push(row, json_integer(b), bad);
    for (int i = 0; i < 2; i++) {
        const kvs_report_mean *v = i == 0 ? &m : &ref;
        push(row, num_short(v->mean), bad);
        push(row, num_short(v->low), bad);
        push(row, num_short(v->high), bad);
        push(row, json_integer(v->n), bad);
    }
    push(rows, row, bad);
}

static uint32_t bin_width(const kvs_report *r)
{
    double longest = 0;
    for (size_t i = 0; i < r->n_turns; i++)
        longest = fmax(longest, isnan(r->turns[i].token_end) ? 0 : r->turns[i].token_end);
    uint32_t width = BIN_TOKENS;
    while (longest > (double)width * BINS_MAX && width < (1u << 30))
        width *= 2;
    return width;
}

static json_t *data_bins(const kvs_report *r, bool *bad)
{
    const kvs_report_turn *sorted = r->turns;
    const uint32_t width = bin_width(r), n_bins = BINS_MAX;
    json_t *list = json_array();
    bin_sums *bins = malloc((size_t)(r->n_dialogues + 1) * n_bins * sizeof *bins);
    *bad |= bins == NULL;
    for (size_t i = 0, j; bins != NULL && i < r->n_turns; i = j) {
        memset(bins, 0, (size_t)(r->n_dialogues + 1) * n_bins * sizeof *bins);
        for (j = i; j < r->n_turns && sorted[j].run == sorted[i].run && sorted[j].protocol == sorted[i].protocol; j++)
            spread(bins + (size_t)sorted[j].dialogue * n_bins, n_bins, width, &sorted[j]);
        if (sorted[i].protocol != KVS_REPORT_TF)
            continue;
        json_t *o = json_object(), *rows = json_array();
        for (uint32_t b = 0; b < n_bins; b++)
            push_bin(rows, bins, r->n_dialogues, n_bins, b, kvs_report_seed(r), bad);
        put(o, "run", json_integer(sorted[i].run), bad);
        put(o, "rows", rows, bad);
        push(list, o, bad);
    }
    free(bins);
    json_t *out = json_object();
    put(out, "width_tokens", json_integer(width), bad);
    put(out, "runs", list, bad);
    return out;
}

/* ---- what was kept ---- */

/* Slots of the ranges that fall into [from, to). */
static uint32_t n_held(const kvs_report_ranges *g, double from, double to)
{
    double n = 0;
    for (uint32_t i = 0; i < g->n && g->pos[2 * i] < to; i++) {
        const double a = fmax(g->pos[2 * i], from), b = fmin((double)g->pos[2 * i + 1] + 1, to);
        n += b > a ? b - a : 0;
    }
    return (uint32_t)n;
}

static double n_slots(const kvs_report_ranges *g)
{
    double n = 0;
    for (uint32_t i = 0; i < g->n; i++)
        n += (double)g->pos[2 * i + 1] - g->pos[2 * i] + 1;
    return n;
}

static double rope_max(const kvs_report_ranges *g)
{
    double last = -1;
    for (uint32_t i = 0; i < g->n; i++)
        last = fmax(last, g->rope[2 * i + 1]);
    return last;
}

/* Where the next query of this head stands, by the rules of design.md section 4. */
static double next_position(const char *mode, const kvs_report_ranges *g, double n_tokens)
{
    if (strncmp(mode, "keep", 4) == 0)
        return n_tokens;
    if (strncmp(mode, "gapcap", 6) == 0)
        return rope_max(g) + 1;
    return n_slots(g); /* rollback, rerotate, recompute */
}

/* Runs of equal bins as a flat list: first bin, bins, share kept in ninths cut down to 1, 3, 6 or 9 (plus 10
 * where most stand ahead of the next query), mean shift d - D in tokens in steps of 1/128 of the conversation. */
static json_t *raster_row(const kvs_report_ranges *g, double n_tokens, double next, uint32_t n_bins, bool *bad)
{
    json_t *row = json_array();
    const double width = n_tokens / n_bins, step = fmax(1, floor(n_tokens / 128)); /* what a colour can show */
    uint32_t start = 0, n = 0, range = 0;
    double share_run = 0, shift_run = 0;
    for (uint32_t b = 0; b <= n_bins; b++) {
        const double from = b * width, to = (b + 1) * width;
        double held = 0, shift = 0, future = 0;
        while (range < g->n && (double)g->pos[2 * range + 1] + 1 <= from)
            range++;
        for (uint32_t i = range; b < n_bins && i < g->n && g->pos[2 * i] < to; i++) {
            const double lo = fmax(g->pos[2 * i], from), hi = fmin((double)g->pos[2 * i + 1] + 1, to);
            /* d - D = (next - rope_pos) - (n_tokens - pos), constant within a range */
            held += hi - lo;
            shift += (hi - lo) * ((next - g->rope[2 * i]) - (n_tokens - g->pos[2 * i]));
            future += g->rope[2 * i] + (lo - g->pos[2 * i]) > next ? hi - lo : 0;
        }
        const double ninths = floor(9 * held / width + 1e-9), shift_mean = held > 0 ? shift / held : 0;
        const double ahead = future > held / 2 ? 10 : 0;
        const double share = held <= 0 ? 0 : ahead + (ninths >= 9 ? 9 : ninths >= 6 ? 6 : ninths >= 3 ? 3 : 1);
        const double moved = fabs(shift_mean) <= step ? nearbyint(shift_mean) : step * nearbyint(shift_mean / step);
        if (b < n_bins && n > 0 && share == share_run && moved == shift_run) {
            n++;
            continue;
        }
        if (n > 0 && share_run > 0) {
            push(row, json_integer(start), bad);
            push(row, json_integer(n), bad);
            push(row, num(share_run), bad);
            push(row, num(shift_run), bad);
        }
        start = b;
        n = 1;
        share_run = share;
        shift_run = moved;
    }
    return row;
}

/* Flat list of pos_first, pos_last, rope_first; thinned evenly when there are more segments than wanted. */
static json_t *segments(const kvs_report_ranges *g, uint32_t n_wanted, bool *bad)
{
    json_t *out = json_array();
    const uint32_t stride = (g->n + n_wanted - 1) / (n_wanted > 0 ? n_wanted : 1);
    for (uint32_t i = 0; i<g->n; i += stride> 0 ? stride : 1) {
        push(out, json_integer(g->pos[2 * i]), bad);
        push(out, json_integer(g->pos[2 * i + 1]), bad);
        push(out, json_integer(g->rope[2 * i]), bad);
    }
    return out;
}

static json_t *keep_of_run(const kvs_report *r, uint32_t run, const kvs_report_limits *limits, bool *bad)
{
    const kvs_report_keep *first = NULL, *last = NULL;
    double n_tokens = 0;
    for (size_t i = 0; i < r->n_keeps; i++) {
        const kvs_report_keep *k = &r->keeps[i];
        if (k->run != run || (first != NULL && k->dialogue != first->dialogue))
            continue;
        first = first == NULL ? k : first;
        last = k;
        if (k->held.n > 0)
            n_tokens = fmax(n_tokens, (double)k->held.pos[2 * k->held.n - 1] + 1);
    }
    if (first == NULL || n_tokens == 0)
        return json_null();
    json_t *rasters = json_array(), *heads = json_array(), *o = json_object();
    for (size_t i = 0; i < r->n_keeps; i++) {
        const kvs_report_keep *k = &r->keeps[i];
        if (k->run != run || k->dialogue != first->dialogue)
            continue;
        const double next = next_position(r->runs[run].position, &k->held, n_tokens);
        json_t *raster = raster_row(&k->held, n_tokens, next, limits->n_bins, bad);
        size_t same = json_array_size(rasters); /* uniform policies share one raster */
        while (same > 0 && !json_equal(json_array_get(rasters, same - 1), raster))
            same--;
        same = same == 0 ? json_array_size(rasters) : same - 1;
        if (same == json_array_size(rasters))
            push(rasters, json_incref(raster), bad);
        json_decref(raster);
        json_t *head = json_array();
        push(head, json_integer(k->layer), bad);
        push(head, json_integer(k->kv_head), bad);
        push(head, json_integer((json_int_t)same), bad);
        push(head, num(n_slots(&k->held)), bad);
        push(head, num(next), bad);
        push(heads, head, bad);
    }
    put(o, "dialogue", json_integer(first->dialogue), bad);
    put(o, "n_tokens", num(n_tokens), bad);
    put(o, "n_bins", json_integer(limits->n_bins), bad);
    put(o, "heads", heads, bad);
    put(o, "rasters", rasters, bad);
    json_t *maps = json_array();
    for (const kvs_report_keep *k = first;; k = last) {
        json_t *map = json_object();
        put(map, "layer", json_integer(k->layer), bad);
        put(map, "kv_head", json_integer(k->kv_head), bad);
        put(map, "next", num(next_position(r->runs[run].position, &k->held, n_tokens)), bad);
        put(map, "n_ranges", json_integer(k->held.n), bad);
        put(map, "segments", segments(&k->held, limits->n_segments, bad), bad);
        push(maps, map, bad);
        if (k == last)
            break;
    }
    put(o, "maps", maps, bad);
    return o;
}

/* What layer 0, head 0 held after an event: one character a bin, '0' nothing to '9' all. */
static json_t *frame(const kvs_report_event *e, double n_tokens, uint32_t n_bins, bool *bad)
{
    char text[512];
    const double width = n_tokens / n_bins;
    uint32_t b = 0;
    for (; b < n_bins && b < sizeof text - 1; b++) {
        const double share = n_held(&e->held, b * width, (b + 1) * width) / width;
        text[b] = (char)('0' + (share > 0 ? (int)fmin(9, fmax(1, floor(9 * share + 1e-9))) : 0));
    }
    text[b] = '\0';
    json_t *o = json_string(text);
    *bad |= o == NULL;
    return o;
}

static json_t *events_of_run(const kvs_report_run *run, const kvs_report_limits *limits, bool *bad)
{
    json_t *o = json_object(), *list = json_array(), *frames = json_array();
    double n_tokens = 1;
    for (uint32_t i = 0; i < run->n_kept; i++)
        n_tokens = fmax(n_tokens, isnan(run->kept[i].token_idx) ? 1 : run->kept[i].token_idx);
    const uint32_t every = run->n_kept / (limits->n_frames > 0 ? limits->n_frames : 1) + 1;
    for (uint32_t i = 0; i < run->n_kept; i++) {
        const kvs_report_event *e = &run->kept[i];
        json_t *row = json_array();
        push(row, json_integer(e->turn), bad);
        push(row, num(e->token_idx), bad);
        push(row, json_string(e->path), bad);
        push(row, num(e->n_before), bad);
        push(row, num(e->n_after), bad);
        push(row, num(e->rope_next), bad);
        push(row, num(e->future), bad);
        push(row, num(e->health), bad);
        push(list, row, bad);
        if (i % every == 0 && e->held.n > 0) {
            json_t *pair = json_array();
            push(pair, json_integer(i), bad);
            push(pair, frame(e, n_tokens, limits->n_bins, bad), bad);
            push(frames, pair, bad);
        }
    }
    put(o, "n", json_integer((json_int_t)run->n_events), bad);
    put(o, "dialogue", run->n_kept > 0 ? json_integer(run->kept_dialogue) : json_null(), bad);
    put(o, "stride", json_integer(run->kept_stride), bad);
    put(o, "paths", json_incref(run->paths), bad);
    put(o, "reasons", json_incref(run->reasons), bad);
    put(o, "values", sum_rows(run->event, KVS_REPORT_EVENT_NUMBERS, bad), bad);
    put(o, "list", list, bad);
    put(o, "n_tokens", num(n_tokens), bad);
    put(o, "frames", frames, bad);
    return o;
}

static json_t *data_failures(const kvs_report *r, bool *bad)
{
    json_t *rows = json_array();
    for (size_t i = 0; i < r->n_failures; i++) {
        const kvs_report_failure *f = &r->failures[i];
        json_t *row = json_array();
        push(row, json_integer(f->run), bad);
        push(row, json_integer(f->dialogue), bad);
        push(row, json_integer(f->turn), bad);
        push(row, json_integer(f->protocol), bad);
        push(row, json_string(f->text), bad);
        push(rows, row, bad);
    }
    json_t *o = json_object();
    put(o, "n", json_integer((json_int_t)r->n_failures_all), bad);
    put(o, "rows", rows, bad);
    return o;
}

json_t *kvs_report_data(const kvs_report *r, const json_t *evidence, const kvs_report_limits *limits)
{
    bool bad = false;
    json_t *o = json_object(), *keeps = json_array(), *events = json_array();
    for (uint32_t i = 0; i < r->n_runs; i++) {
        push(keeps, keep_of_run(r, i, limits, &bad), &bad);
        push(events, events_of_run(&r->runs[i], limits, &bad), &bad);
    }
    put(o, "manifest", json_incref(r->manifest), &bad);
    put(o, "claims", json_incref(r->claims), &bad);
    put(o, "draws", json_integer(KVS_REPORT_DRAWS), &bad);
    put(o, "summary_cols", names(kvs_report_summary_names, KVS_REPORT_SUMMARY_NUMBERS, &bad), &bad);
    put(o, "turn_cols", names(kvs_report_turn_names, KVS_REPORT_TURN_NUMBERS, &bad), &bad);
    put(o, "event_cols", names(kvs_report_event_names, KVS_REPORT_EVENT_NUMBERS, &bad), &bad);
    put(o, "means", data_means(r, &bad), &bad);
    put(o, "summary", limits->summary_rows ? data_summary(r, &bad) : json_null(), &bad);
    put(o, "turn_means", data_turn_means(r, &bad), &bad);
    put(o, "curves", data_curves(r, limits->n_dialogues, &bad), &bad);
    put(o, "bins", data_bins(r, &bad), &bad);
    put(o, "keeps", keeps, &bad);
    put(o, "events", events, &bad);
    put(o, "recall", json_incref(json_object_get(evidence, "recall")), &bad);
    put(o, "tracking", json_incref(json_object_get(evidence, "tracking")), &bad);
    put(o, "points", kvs_report_points(r, limits->n_points, &bad), &bad);
    put(o, "failures", data_failures(r, &bad), &bad);
    if (bad) {
        json_decref(o);
        return NULL;
    }
    return o;
}

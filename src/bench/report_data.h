/* What report.c, report_read.c and report_data.c share: an output folder in memory, aggregated while it is read, so
 * that 30 runs x 30 dialogues x 40 turns need some megabytes and not the files' size. */
#ifndef KVS_BENCH_REPORT_DATA_H
#define KVS_BENCH_REPORT_DATA_H

#include "kvasir.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    KVS_REPORT_SCHEMA = 1,
    KVS_REPORT_TF = 0, /* teacher-forced */
    KVS_REPORT_FR = 1, /* free-running */
    KVS_REPORT_PROTOCOLS = 2,
    KVS_REPORT_SUMMARY_NUMBERS = 23, /* numeric columns of summary.csv */
    KVS_REPORT_TURN_NUMBERS = 47,    /* numeric columns of turns.jsonl that are averaged */
    KVS_REPORT_EVENT_NUMBERS = 14,   /* numeric columns of events.jsonl that are averaged */
    KVS_REPORT_EVENTS_KEPT = 128,    /* events of a run listed one by one; beyond it every second is dropped */
};

extern const char *const kvs_report_summary_names[KVS_REPORT_SUMMARY_NUMBERS];
extern const char *const kvs_report_turn_names[KVS_REPORT_TURN_NUMBERS];
extern const char *const kvs_report_event_names[KVS_REPORT_EVENT_NUMBERS];

/* Sum, count and extremes of the values that were not null. */
typedef struct kvs_report_sum {
    double sum, min, max;
    uint64_t n;
} kvs_report_sum;

typedef struct kvs_report_summary {
    uint32_t run, dialogue, protocol;
    double value[KVS_REPORT_SUMMARY_NUMBERS]; /* NaN: null */
} kvs_report_summary;

/* What the per-turn and per-position plots need of one line of turns.jsonl. NaN: null. */
typedef struct kvs_report_turn {
    uint32_t run, dialogue, turn, protocol;
    double token_begin, token_end, n_scored, nll, nll_ref, kl, top1, live_bytes, health, evictions;
} kvs_report_turn;

typedef struct kvs_report_failure {
    uint32_t run, dialogue, turn, protocol;
    char text[200];
} kvs_report_failure;

/* Sorted ranges [a, b] inclusive of true indices; rope[2 * i] is where the range's first slot stands. */
typedef struct kvs_report_ranges {
    int32_t *pos;  /* [2 * n] */
    int32_t *rope; /* [2 * n], NULL where the file has none */
    uint32_t n;
} kvs_report_ranges;

typedef struct kvs_report_event {
    uint32_t dialogue, turn;
    double token_idx, n_before, n_after, rope_next, future, health;
    char path[16];
    kvs_report_ranges held;
} kvs_report_event;

typedef struct kvs_report_keep {
    uint32_t run, dialogue, layer, kv_head;
    kvs_report_ranges held;
} kvs_report_keep;

typedef struct kvs_report_run {
    const char *id, *policy, *position; /* borrowed from the manifest */
    kvs_report_sum turn[KVS_REPORT_PROTOCOLS][KVS_REPORT_TURN_NUMBERS];
    uint64_t n_turns[KVS_REPORT_PROTOCOLS], n_failures[KVS_REPORT_PROTOCOLS];
    json_t *worst[KVS_REPORT_PROTOCOLS]; /* object: health term -> turns in which it was the worst */
    kvs_report_sum event[KVS_REPORT_EVENT_NUMBERS];
    uint64_t n_events;
    json_t *paths, *reasons;                       /* objects: name -> events */
    kvs_report_event kept[KVS_REPORT_EVENTS_KEPT]; /* of the first dialogue seen, every kept_stride-th */
    uint32_t n_kept, kept_stride, kept_seen, kept_dialogue;
} kvs_report_run;

typedef struct kvs_report {
    const char *dir;
    json_t *manifest, *claims;
    kvs_report_run *runs;
    const char **dialogues; /* ids, borrowed from the manifest */
    uint32_t n_runs, n_dialogues;
    kvs_report_summary *summary;
    kvs_report_turn *turns;
    kvs_report_failure *failures;
    kvs_report_keep *keeps;
    size_t n_summary, n_turns, n_failures, n_keeps, n_failures_all;
    size_t cap_summary, cap_turns, cap_failures, cap_keeps;
} kvs_report;

/* Reads the six files. On error everything is freed. */
kvs_status kvs_report_read(const char *dir, kvs_report *r, kvs_error *err);
void kvs_report_free(kvs_report *r);

/* Mean over dialogues with a 95 % percentile bootstrap interval; n is how many had a value. */
typedef struct kvs_report_mean {
    double mean, low, high;
    uint32_t n;
} kvs_report_mean;
/* Draws are a function of the seed, so that two reports of one folder are the same. x [n], no NaN. false: no memory. */
bool kvs_report_bootstrap(const double *x, uint32_t n, uint32_t n_draws, uint64_t seed, kvs_report_mean *out);
bool kvs_report_summary_mean(const kvs_report *r, uint32_t run, uint32_t protocol, uint32_t column,
                             kvs_report_mean *out);

/* How much detail the data block carries; halved until the page is small enough. */
typedef struct kvs_report_limits {
    uint32_t n_dialogues, n_bins, n_frames, n_segments;
    bool summary_rows;
} kvs_report_limits;
/* The data block of the page, a new reference; NULL: no memory. */
json_t *kvs_report_data(const kvs_report *r, const kvs_report_limits *limits);

/* The page's parts, made from the .html, .css and .js files of this folder by cmake/embed.cmake. */
extern const char kvs_report_page_html[], kvs_report_page_css[];
extern const char kvs_report_plot_js[], kvs_report_page_js[], kvs_report_detail_js[];

#endif

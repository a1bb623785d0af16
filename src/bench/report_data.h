/* What the report's C files share: an output folder in memory, aggregated while it is read, so
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
    KVS_REPORT_DIAGNOSTICS = 5,      /* numbers of recall.jsonl about what an answer can reach and uses */
    KVS_REPORT_PLACES = 3,           /* where a planted fact was told: early, middle, late */
    KVS_REPORT_DRAWS = 2000,         /* bootstrap draws behind every interval of the page; claims bring their own */
    KVS_REPORT_DRAWS_SERIES = 500,   /* per turn, bin or run: hundreds of intervals, drawn as bands */
};

extern const char *const kvs_report_summary_names[KVS_REPORT_SUMMARY_NUMBERS];
extern const char *const kvs_report_turn_names[KVS_REPORT_TURN_NUMBERS];
extern const char *const kvs_report_event_names[KVS_REPORT_EVENT_NUMBERS];
extern const char *const kvs_report_place_names[KVS_REPORT_PLACES];
extern const char *const kvs_report_diagnostic_names[KVS_REPORT_DIAGNOSTICS];

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

/* One line of recall.jsonl. right, full_right: 1 or 0, -1 where there is no result. */
typedef struct kvs_report_answer {
    uint32_t run, dialogue, question; /* dialogue: index in the manifest's recall_dialogues */
    uint32_t place, n_candidates;
    double lag_tokens, survival;                /* survival NaN: null */
    double diagnostics[KVS_REPORT_DIAGNOSTICS]; /* NaN: null, or of a folder written before there were any */
    int8_t right, full_right;                   /* of the run; of the full cache, same question */
} kvs_report_answer;

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
    char recall_failure[200];                      /* of the first question without a result; "": none */
    kvs_report_event kept[KVS_REPORT_EVENTS_KEPT]; /* of the first dialogue seen, every kept_stride-th */
    uint32_t n_kept, kept_stride, kept_seen, kept_dialogue;
} kvs_report_run;

typedef struct kvs_report {
    const char *dir;
    json_t *manifest, *claims;
    kvs_report_run *runs;
    const char **dialogues, **recall_dialogues; /* ids, borrowed from the manifest */
    uint32_t n_runs, n_dialogues, n_recall_dialogues;
    uint32_t full_run; /* the full cache, which the others are held against; UINT32_MAX: none */
    kvs_report_summary *summary;
    kvs_report_turn *turns;     /* sorted by run, protocol, dialogue, turn */
    kvs_report_answer *answers; /* sorted by dialogue, question, run */
    kvs_report_failure *failures;
    kvs_report_keep *keeps;
    size_t n_summary, n_turns, n_failures, n_keeps, n_answers, n_failures_all;
    size_t cap_summary, cap_turns, cap_failures, cap_keeps, cap_answers;
} kvs_report;

/* Reads the folder's files; recall.jsonl may be missing or empty. On error everything is freed. */
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

uint64_t kvs_report_seed(const kvs_report *r);

/* Recall of one run. Lost and won are questions that the full cache alone, or the run alone, answered right. */
typedef struct kvs_report_recall {
    kvs_report_mean rate; /* share right of the answered; n: dialogues. Of one dialogue: Wilson's over its questions */
    uint32_t n_asked, n_answered, n_right;
    uint32_t n_paired, n_full_right, n_lost, n_won; /* among questions that the full cache answered too */
    double survival;                                /* mean share of the told value's tokens still held; NaN: none */
    double diagnostics[KVS_REPORT_DIAGNOSTICS];     /* means over questions; NaN: none */
} kvs_report_recall;
/* false: no memory. n_asked is 0 for a run without rows. */
bool kvs_report_recall_of(const kvs_report *r, uint32_t run, kvs_report_recall *out);
/* Under it the full cache itself cannot do the task, and no policy's recall is a verdict (evaluation.md 3.1). */
#define KVS_REPORT_RECALL_GUARD 0.7

/* {"recall", "tracking"}: recall of every run, rank correlations of health and KL; null where the folder has neither.
 * A new reference; NULL: no memory. Costs seconds for a large folder, and does not depend on the limits below. */
json_t *kvs_report_evidence(const kvs_report *r);
/* Turns as [run, dialogue, turn, health, kl, kl of the turn after], evenly thinned to at most n_wanted. */
json_t *kvs_report_points(const kvs_report *r, uint32_t n_wanted, bool *bad);

/* How much detail the data block carries; halved until the page is small enough. */
typedef struct kvs_report_limits {
    uint32_t n_dialogues, n_bins, n_frames, n_segments, n_points;
    bool summary_rows;
} kvs_report_limits;
/* The data block of the page, a new reference; NULL: no memory. */
json_t *kvs_report_data(const kvs_report *r, const json_t *evidence, const kvs_report_limits *limits);

/* The page's parts, made from the .html, .css and .js files of this folder by cmake/embed.cmake. */
extern const char kvs_report_page_html[], kvs_report_page_css[];
extern const char kvs_report_plot_js[], kvs_report_page_js[], kvs_report_evidence_js[], kvs_report_detail_js[];

#endif

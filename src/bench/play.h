/* Plays one dialogue under every run: teacher-forced in lock-step with the full cache, or free-running. Produces
 * records (JSON), writes no file. */
#ifndef KVS_BENCH_PLAY_H
#define KVS_BENCH_PLAY_H

#include "bench/dialogue.h"
#include "bench/suite.h"
#include "policy/policy.h"

#include <jansson.h>

/* A dialogue as tokens. */
typedef struct kvs_script_turn {
    uint32_t begin, answer, end; /* [begin, answer) prompt, [answer, end) the recorded answer and its end marker */
    uint32_t message_end;        /* dialogue messages [.., message_end) end with this turn's answer */
} kvs_script_turn;
typedef struct kvs_script {
    const char *id;
    const kvs_dialogue *dialogue; /* borrowed */
    int32_t *tokens;
    uint8_t *flags;
    uint32_t n_tokens;
    kvs_script_turn *turns;
    uint32_t n_turns;
} kvs_script;
kvs_status kvs_script_render(const kvs_model *m, const kvs_dialogue *d, kvs_script *out, kvs_error *err);
void kvs_script_free(kvs_script *s);
/* Keeps the first n_tokens. */
void kvs_script_cut(kvs_script *s, uint32_t n_tokens);

typedef struct kvs_play {
    kvs_model *model;
    const kvs_suite *suite;
    const kvs_bench_options *opt;
    const kvs_bench_run_spec *runs;
    uint32_t n_runs;
    kvs_arith arith;
    kvs_kv_type kv_type;
    bool keep_sets; /* record the final keep sets: the first dialogue's only */
    bool window;    /* compute the windowed reference past half the window: long dialogues */
    void (*progress)(void *ctx, uint64_t done, uint64_t total);
    void *ctx;
} kvs_play;

/* The part of one dialogue: {"dialogue", "turns", "events", "keepsets", "summary", "claims"}; a new reference.
 * ECANCELLED when the caller's cancel flag was set: nothing of the dialogue is kept. */
kvs_status kvs_play_forced(const kvs_play *p, const kvs_script *script, json_t **part, kvs_error *err);
/* Free-running after the trigger; appends to part's "turns" and "summary" and to "claims". */
kvs_status kvs_play_free(const kvs_play *p, const kvs_script *script, json_t *part, kvs_error *err);
/* A dialogue with planted facts whose first question stands past the suite's trigger, and its rendered script; both
 * depend on (model's tokens, suite, seed, fillers, index) only and are the caller's to free. Fillers without short
 * answered questions are replaced by the embedded ones. */
kvs_status kvs_recall_dialogue(const kvs_play *p, const kvs_dialogue_set *fillers, uint64_t index, kvs_dialogue *d,
                               kvs_script *script, kvs_error *err);
/* The part of one recall dialogue: {"dialogue", "recall", "kv_bytes_peak"}: a row for every run and question; what each
 * run held at most. A new reference. */
kvs_status kvs_play_recall(const kvs_play *p, const kvs_script *script, json_t **part, kvs_error *err);
/* Messages as the template takes them; calloc'd [n_messages], the caller frees. NULL: no memory. */
kvs_message *kvs_script_messages(const kvs_dialogue *d);

/* record.c */
json_t *kvs_json_real(double x); /* null for NaN and infinities */
json_t *kvs_json_ms(uint64_t ns);
json_t *kvs_json_ranges(const int32_t *pos, uint32_t n, uint32_t max_ranges); /* null when there are more */
void kvs_record_positions(json_t *row, const kvs_session *s);
uint64_t kvs_peak_rss_bytes(void);
bool kvs_play_cancelled(const kvs_play *p);
/* Whether up to token `end` the full cache stands for the run: nothing can be evicted yet, and what its policy remembers of
 * rows (the newest ones' queries, the latest forward's attention) is there if it goes on alone from then. */
bool kvs_play_shares(const kvs_bench_run_spec *run, const kvs_policy *policy, uint32_t end);
/* Options of a run's session; budget_tokens 0 means n_tokens. */
void kvs_play_options(const kvs_play *p, const kvs_bench_run_spec *run, uint32_t n_tokens, kvs_session_options *o);

#endif

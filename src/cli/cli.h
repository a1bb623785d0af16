/* What the commands of the `kvasir` program share: the parsed command line, model and session opening, printing.
 *
 * One table in options.c describes every command and option; parsing, --help, the man page and shell completion read
 * it, so that none of them can disagree. A command is one function kvs_cmd_<name>() in cmd_<name>.c.
 */
#ifndef KVS_CLI_H
#define KVS_CLI_H

#include "base/base.h"

#include <jansson.h>
#include <stdio.h>

enum { KVS_EXIT_OK = 0, KVS_EXIT_FAILURE = 1, KVS_EXIT_USAGE = 2, KVS_EXIT_INTERRUPTED = 130 /* 128 + SIGINT */ };

/* ---- the command line ------------------------------------------------------------------------------------------- */

enum { KVS_CLI_LIST_MAX = 64, KVS_CLI_OPERANDS_MAX = 8 };

/* Values of a repeatable option; borrowed from argv. */
typedef struct kvs_cli_list {
    const char *items[KVS_CLI_LIST_MAX];
    uint32_t n;
} kvs_cli_list;

typedef struct kvs_cli_numbers {
    uint32_t items[KVS_CLI_LIST_MAX];
    uint32_t n;
} kvs_cli_numbers;

/* "600MiB" or "4800tok"; both 0: the default (the model's window, or what the command says). */
typedef struct kvs_cli_size {
    uint64_t bytes;
    uint32_t tokens;
} kvs_cli_size;

typedef struct kvs_cli_args {
    const struct kvs_cli_command *command;
    uint64_t given; /* bit i: option i of the table was on the command line */
    bool help, json;
    /* model and session */
    const char *model, *prefill, *ffn_skip, *kv_type, *arith, *cpu_mask, *template_name, *policy_plugin;
    kvs_cli_list policies, budgets, positions;
    uint64_t seed;
    uint32_t threads;
    bool paper_compat;
    /* run, chat */
    const char *prompt, *system, *session, *steer;
    uint32_t n_tokens, top_k;
    double temp, top_p, min_p, repeat_penalty;
    bool chat;
    /* eval */
    const char *text, *dialogue, *ref, *dump_logits, *dump_keep, *needle;
    uint32_t index, ref_window;
    /* profile */
    kvs_cli_list texts;
    uint32_t text_tokens, block_tokens;
    uint32_t n_recall, history_tokens;
    /* eval, chat */
    kvs_cli_numbers episodes;
    bool uniform_heads, keep_turns;
    const char *sensitivity;
    /* speed */
    kvs_cli_numbers depths;
    uint32_t prompt_tokens, gen_tokens, repeats, n_sessions;
    const char *plot;
    /* bench */
    const char *suite, *data, *out, *shard, *profiles;
    uint32_t n_dialogues;
    bool resume, free_running;
    const char *operands[KVS_CLI_OPERANDS_MAX];
    uint32_t n_operands;
} kvs_cli_args;

typedef enum kvs_cli_kind {
    KVS_CLI_FLAG,    /* bool */
    KVS_CLI_STRING,  /* const char * */
    KVS_CLI_FILE,    /* const char *, completed as a file name */
    KVS_CLI_DIR,     /* const char *, completed as a folder */
    KVS_CLI_CHOICE,  /* const char *, one of choices */
    KVS_CLI_LIST,    /* kvs_cli_list */
    KVS_CLI_U32,     /* uint32_t in [min, max] */
    KVS_CLI_U64,     /* uint64_t */
    KVS_CLI_REAL,    /* double in [min, max] */
    KVS_CLI_NUMBERS, /* kvs_cli_numbers, "512,2048" */
} kvs_cli_kind;

typedef struct kvs_cli_option {
    const char *name; /* without the dashes */
    char letter;      /* 0: none */
    kvs_cli_kind kind;
    size_t offset;     /* of the value in kvs_cli_args */
    uint32_t commands; /* bit per command of the table */
    const char *metavar, *doc;
    const char *const *choices; /* NULL-ended; for KVS_CLI_CHOICE, and for completion of lists */
    double min, max;            /* of numbers; both 0: any */
} kvs_cli_option;

typedef struct kvs_cli_command {
    const char *name, *operands, *summary, *text; /* text: what --help says below the usage line */
    const char *examples;                         /* lines "command<TAB>what it does" */
    uint32_t n_operands_min, n_operands_max;
    int (*run)(const kvs_cli_args *args);
} kvs_cli_command;

extern const kvs_cli_command kvs_cli_commands[];
extern const uint32_t kvs_cli_n_commands;
extern const kvs_cli_option kvs_cli_options[];
extern const uint32_t kvs_cli_n_options;

/* Does the command take the option? */
bool kvs_cli_takes(const kvs_cli_command *command, const kvs_cli_option *option);
/* Parses argv[2..] for the command. Returns 0, or KVS_EXIT_USAGE after one line on stderr. */
int kvs_cli_parse(const kvs_cli_command *command, int argc, char **argv, kvs_cli_args *args);
const kvs_cli_command *kvs_cli_find(const char *name);
bool kvs_cli_given(const kvs_cli_args *args, const char *option_name);
/* One line on stderr, "kvasir CMD: ... (try kvasir CMD --help)"; returns KVS_EXIT_USAGE. */
int kvs_cli_usage_error(const kvs_cli_command *command, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* manual.c: what is generated from the tables */
void kvs_cli_print_overview(FILE *out);
void kvs_cli_print_help(const kvs_cli_command *command, FILE *out);
void kvs_cli_print_man(FILE *out);
int kvs_cli_print_completion(const char *shell, FILE *out);

/* ---- common.c --------------------------------------------------------------------------------------------------- */

extern volatile int kvs_cli_interrupted; /* number of SIGINTs since it was last set to 0 */
void kvs_cli_catch_interrupts(void);

/* One line on stderr; returns KVS_EXIT_FAILURE. */
int kvs_cli_failure(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int kvs_cli_report(const kvs_cli_args *args, const kvs_error *err); /* the error's line, and its exit code */

/* "600MiB", "1.5GiB", "4800tok"; "window" is both 0. EINVAL says which forms are known. */
kvs_status kvs_cli_parse_size(const char *text, kvs_cli_size *out, kvs_error *err);
/* What the user wrote for the last --budget etc., or the fallback. */
const char *kvs_cli_last(const kvs_cli_list *list, const char *fallback);
/* Checks every policy, budget, position and cpu mask given. Returns 0 or KVS_EXIT_USAGE. */
int kvs_cli_check_common(const kvs_cli_args *args);
/* KVS_CPU_* bits of --cpu-mask; 0: all. Checked by kvs_cli_check_common. */
uint32_t kvs_cli_cpu_bits(const kvs_cli_args *args);

/* The model file by --model, KVASIR_MODEL, the build's default, the cache; into path. EIO says what to do. */
kvs_status kvs_cli_model_path(const kvs_cli_args *args, char *path, size_t cap_bytes, kvs_error *err);
kvs_status kvs_cli_open_model(const kvs_cli_args *args, kvs_model **out, kvs_error *err);
/* [n_layers] of the profile that --sensitivity names, to be freed; *out NULL without one. */
kvs_status kvs_cli_sensitivity(const kvs_cli_args *args, kvs_model *m, float **out, kvs_error *err);
/* Session options from the common ones; arith by the command's default unless given. */
void kvs_cli_session_options(const kvs_cli_args *args, kvs_arith default_arith, kvs_session_options *opt);
void kvs_cli_sampling(const kvs_cli_args *args, kvs_sampling *p);

/* $VARIABLE/kvasir/leaf, or ~/fallback/kvasir/leaf. */
bool kvs_cli_xdg_path(const char *variable, const char *fallback, const char *leaf, char *path, size_t cap_bytes);
kvs_status kvs_cli_make_parents(const char *path, kvs_error *err);
/* A whole file ("-": stdin) as NUL-ended bytes, freed by the caller with free(). */
kvs_status kvs_cli_read_file(const char *path, char **bytes, size_t *n_bytes, kvs_error *err);
/* Writes through a temporary file beside it, fsync and rename: the old file or the new one, never half. */
kvs_status kvs_cli_write_file(const char *path, const void *head, size_t head_bytes, const void *body,
                              size_t body_bytes, kvs_error *err);

/* JSON with members in the order they were set; NaN and infinities become null. */
void kvs_cli_set_real(json_t *object, const char *name, double value);
void kvs_cli_set_int(json_t *object, const char *name, uint64_t value);
void kvs_cli_set_text(json_t *object, const char *name, const char *value); /* NULL: null; bad UTF-8 is replaced */
/* Prints and releases it; returns KVS_EXIT_OK, or KVS_EXIT_FAILURE if stdout does not take it. */
int kvs_cli_print_json(json_t *object);

/* A progress line on stderr, only on a terminal, at most ten times a second. */
typedef struct kvs_cli_progress {
    const char *label;
    uint64_t begin_ns, last_ns;
    bool shown;
} kvs_cli_progress;
void kvs_cli_progress_begin(kvs_cli_progress *p, const char *label);
/* seconds_left under 0: estimated from the rate so far. */
void kvs_cli_progress_show(kvs_cli_progress *p, uint64_t done, uint64_t total, double seconds_left);
void kvs_cli_progress_end(kvs_cli_progress *p); /* clears the line */

uint64_t kvs_cli_peak_rss_bytes(void);
double kvs_cli_mib(uint64_t bytes);

/* ---- peaks.c: the machine's limits ------------------------------------------------------------------------------- */

/* What all threads of a pool reach together with the instruction sets of cpu (KVS_CPU_* bits), best of several sweeps.
 * 0: no memory for the probe, or no such instruction. A multiply-add is two operations. */
typedef struct kvs_cli_peaks {
    double read_bytes_per_s; /* sweeps over 256 MiB */
    double f32_flops;        /* fused multiply-adds in registers */
    double int8_ops;         /* products of 8-bit codes in registers */
} kvs_cli_peaks;
void kvs_cli_measure_peaks(uint32_t n_threads, uint32_t cpu, kvs_cli_peaks *out);
double kvs_cli_read_bandwidth(uint32_t n_threads); /* the first of them alone, 0: all cores */

/* ---- pictures -------------------------------------------------------------------------------------- */

/* view.c: how many (layer, KV head) pairs hold each token of a session. */
typedef struct kvs_cli_held {
    uint16_t *n_heads; /* [n_tokens] */
    uint64_t n_tokens;
    uint32_t n_pairs;
} kvs_cli_held;
kvs_status kvs_cli_held_read(const kvs_model *m, const kvs_session *s, kvs_cli_held *out, kvs_error *err);
void kvs_cli_held_free(kvs_cli_held *h);
/* "4-260, 301" for the tokens that some head held or heard and none holds now; at most cap_ranges of them. Returns
 * their number. */
uint64_t kvs_cli_held_lost(const kvs_cli_held *before, const kvs_cli_held *after, uint32_t cap_ranges, char *text,
                           size_t cap_bytes);
void kvs_cli_print_keep_map(const kvs_model *m, const kvs_session *s, FILE *out);
void kvs_cli_print_usage(const kvs_session *s, FILE *out);
void kvs_cli_print_health(const kvs_session *s, FILE *out);
/* The contract's JSON names for the state of a session: n_kept_mean to health, then the position indices. */
void kvs_cli_set_state(json_t *object, const kvs_usage *u, const kvs_positions *p, const kvs_health *h);

/* What --ffn-skip did, in all and by layer; nothing while it is off. */
void kvs_cli_set_ffn(json_t *object, const kvs_session *s);

/* saved_session.c: a session with what is needed to open it again. */
typedef struct kvs_cli_snapshot {
    char policy[512], position[32], model_sha256[65], ffn_skip[96]; /* the last empty in files before there was one */
    kvs_cli_size budget;
    bool kv_f32, arith_f32, prefill_full, paper_compat;
    uint64_t seed, n_tokens;
    uint64_t body_bytes;
} kvs_cli_snapshot;
kvs_status kvs_cli_snapshot_save(const char *path, kvs_model *m, const kvs_session *s, const kvs_session_options *opt,
                                 kvs_error *err);
kvs_status kvs_cli_snapshot_head(const char *path, kvs_cli_snapshot *out, kvs_error *err);
/* Creates a session with the file's own options and restores it; opt receives them, its strings point into head. */
kvs_status kvs_cli_snapshot_load(const char *path, kvs_model *m, kvs_cli_snapshot *head, kvs_session_options *opt,
                                 kvs_session **out, kvs_error *err);

/* ---- speed_plot.c ----------------------------------------------------------------------------------------------- */

/* What is measured at one depth, and what the machine allows there. */
typedef struct kvs_cli_speed_row {
    uint32_t depth, n_sessions;
    double prefill_tok_per_s, append_tok_per_s, decode_tok_per_s; /* of all sessions together */
    double bytes_per_token, share_of_bandwidth;                   /* of a decoded token */
    double flops_per_token, share_of_peak;                        /* of a prompt token, mean over the prompt */
    double prefill_bound_tok_per_s, decode_bound_tok_per_s;
    uint64_t peak_kv_bytes, peak_rss_bytes, n_evictions;
} kvs_cli_speed_row;
/* Both rates against depth with their bounds, as an SVG file that needs nothing else; limits in words. */
kvs_status kvs_cli_speed_plot(const char *path, const char *title, const char *limits, const kvs_cli_speed_row *rows,
                              uint32_t n_rows, kvs_error *err);

/* ---- parts of commands --- */

/* eval_recall.c: eval --recall */
int kvs_eval_recall(const kvs_cli_args *args);
/* chat_episodes.c: chat --episodes */
int kvs_chat_episodes(const kvs_cli_args *args, const kvs_sampling *sampling);

/* ---- commands --------------------------------------------------------------------------------------------------- */

int kvs_cmd_run(const kvs_cli_args *args);
int kvs_cmd_chat(const kvs_cli_args *args);
int kvs_cmd_eval(const kvs_cli_args *args);
int kvs_cmd_speed(const kvs_cli_args *args);
int kvs_cmd_bench(const kvs_cli_args *args);
int kvs_cmd_report(const kvs_cli_args *args);
int kvs_cmd_compare(const kvs_cli_args *args);
int kvs_cmd_policies(const kvs_cli_args *args);
int kvs_cmd_inspect(const kvs_cli_args *args);
int kvs_cmd_doctor(const kvs_cli_args *args);
int kvs_cmd_profile(const kvs_cli_args *args);

#endif

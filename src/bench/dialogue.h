/* Dialogues for the benchmark: what was said, by whom, where it came from, and which facts were planted in it.
 *
 * Owns: loading (ShareGPT, JSONL messages, MT-Bench questions), the embedded set, the Extended Dialogue Generator of
 * arXiv 2511.04686, and synthetic dialogues with planted facts (reference/evaluation.md 3.4). Knows nothing of models
 * and tokens: who needs token counts passes a callback. Strings live on the C heap, not in a kvs_allocator, since a
 * dialogue set is read once and never near the token loop. */
#ifndef KVS_BENCH_DIALOGUE_H
#define KVS_BENCH_DIALOGUE_H

#include "base/base.h"

/* ---- types ---- */

#define KVS_DIALOGUE_GENERATED UINT32_MAX /* source_idx of a message that no source said */

typedef struct kvs_dialogue_message {
    const char *role;    /* "system", "user" or "assistant": static strings, comparable by content */
    char *content;       /* owned, valid UTF-8, never empty */
    uint32_t source_idx; /* index of its first message in the source dialogue, or KVS_DIALOGUE_GENERATED */
    uint32_t part;       /* chained: which source it belongs to; with facts: 1 + filler's index, 0 if not a filler;
                            loaded: 0 */
} kvs_dialogue_message;

/* Half-open byte range in a message's content. */
typedef struct kvs_dialogue_span {
    uint32_t message_idx;
    uint32_t start_bytes, end_bytes;
} kvs_dialogue_span;

typedef enum kvs_fact_place { KVS_FACT_EARLY = 0, KVS_FACT_MIDDLE, KVS_FACT_LATE, KVS_FACT_PLACE_COUNT } kvs_fact_place;

/* One question about a planted fact. A fact that is asked about several times gives several entries with the same
 * fact_idx. An answer hits if it names candidates[0] and none of the others. */
typedef struct kvs_dialogue_fact {
    uint32_t fact_idx;        /* which fact of this dialogue */
    uint32_t repeat_idx;      /* 0 for the first question about it */
    kvs_fact_place place;     /* where in the dialogue the fact was first told */
    kvs_dialogue_span told;   /* the gold value where the user last told it (the update, if there was one) */
    kvs_dialogue_span stale;  /* the old value where it was first told; start == end if never updated */
    kvs_dialogue_span answer; /* the gold value in the assistant's answer */
    uint32_t question_idx;    /* message that asks */
    uint32_t lag_messages;    /* question_idx - told.message_idx */
    char *question;           /* text of that message */
    char *gold;               /* value that is right when the question is asked */
    char **candidates;        /* [n_candidates] gold, confusers' values, and last the stale value if updated */
    uint32_t n_candidates;
    bool updated;
} kvs_dialogue_fact;

typedef struct kvs_dialogue {
    char *id;
    char *origin; /* "file.jsonl:12", "embedded", or how it was generated */
    kvs_dialogue_message *messages;
    uint32_t n_messages, cap_messages;
    kvs_dialogue_fact *facts;
    uint32_t n_facts;
    bool has_assistant; /* false: user turns only (MT-Bench); the assistant's text has to be generated */
} kvs_dialogue;

typedef struct kvs_dialogue_set {
    kvs_dialogue *items;
    uint32_t n_items, cap_items;
    char *name, *path;       /* path: the file or folder really read; NULL for generated sets */
    char *licence;           /* from SOURCE.md beside the data, or "unknown" */
    char *notes;             /* one line for every file skipped and for what was dropped; "" if nothing */
    uint64_t xxh64, n_bytes; /* XXH64 (seed 0) and size of the bytes of all files read, in order */
    uint32_t n_files;
    uint32_t n_duplicates;        /* dialogues dropped because an earlier one has the same messages */
    uint32_t n_without_user;      /* dropped: nothing left after the leading assistant message */
    uint32_t n_leading_assistant; /* dialogues that lost a leading assistant message */
} kvs_dialogue_set;

/* ---- dialogue.c ---- */

void kvs_dialogue_free(kvs_dialogue *d);         /* frees what d holds and zeroes it; d itself is the caller's */
void kvs_dialogue_set_free(kvs_dialogue_set *s); /* likewise */

/* Static string for any spelling ShareGPT, OASST and the OpenAI shape use (human, gpt, prompter, ...), or NULL. */
const char *kvs_dialogue_role(const char *spelling);

/* Appends a copy of content. Same role as the last message and merge: joined by a blank line instead. */
kvs_status kvs_dialogue_append(kvs_dialogue *d, const char *role, const char *content, uint32_t source_idx, bool merge,
                               kvs_error *err);
/* Moves d into the set (d is zeroed), or leaves it on error. */
kvs_status kvs_dialogue_set_append(kvs_dialogue_set *s, kvs_dialogue *d, kvs_error *err);
/* Drops dialogues whose (role, content) sequence an earlier one has; counts them in n_duplicates. */
kvs_status kvs_dialogue_set_dedup(kvs_dialogue_set *s, kvs_error *err);
/* XXH64 (seed 0) of roles and contents: the same for the same words whatever file they came from. */
uint64_t kvs_dialogue_hash(const kvs_dialogue *d);

/* One JSON object on one line, {"id", "origin", "messages": [...], "facts": [...]}, which kvs_dialogue_set_load reads
 * back (facts aside). NULL if out of memory; free() it. */
char *kvs_dialogue_json(const kvs_dialogue *d);
const char *kvs_fact_place_name(kvs_fact_place place);

/* Tokens a message costs, template markers included. */
typedef uint32_t (*kvs_dialogue_count_fn)(void *ctx, const char *role, const char *content);
/* For who has no tokenizer: words between white space, markers not counted. ctx is ignored. */
uint32_t kvs_dialogue_count_words(void *ctx, const char *role, const char *content);

/* ---- dialogue_load.c ---- */

#define KVS_DIALOGUE_FILE_BYTES_MAX ((size_t)1 << 30)

/* Reads a file or every *.json and *.jsonl of a folder, in name order. A folder that has a sharegpt_subset inside is a
 * data root, and that is read. Shapes, told apart by content: {"id", "conversations": [{"from", "value"}]} (ShareGPT),
 * {"id", "messages": [{"role", "content"}]}, {"question_id", "turns": [text]} (MT-Bench: no assistant text); as one
 * array or one object after another. Messages with only white space are left out, neighbours of one role are joined by
 * a blank line, a leading assistant message is dropped, equal dialogues are kept once. In a folder, a file that
 * is JSON but starts with something else is skipped and named in notes.
 * Errors: EIO; EFORMAT with file, line and what was wrong; EINVAL for a folder with no dialogue set in it; ENOMEM.
 * *out is zeroed on error. */
kvs_status kvs_dialogue_set_load(const char *path, kvs_dialogue_set *out, kvs_error *err);
/* The same for bytes in memory, appended to *s without de-duplication; name is used in messages and origins. If
 * may_skip, a text that is no dialogue set is noted and skipped instead of refused. */
kvs_status kvs_dialogue_set_parse(const char *name, const char *bytes, size_t n_bytes, bool may_skip,
                                  kvs_dialogue_set *s, kvs_error *err);

/* ---- dialogue_embedded.c ---- */

/* Twelve dialogues written for Kvasir, so that every suite runs with no data folder. */
kvs_status kvs_dialogue_set_embedded(kvs_dialogue_set *out, kvs_error *err);

/* ---- dialogue_extend.c ---- */

typedef struct kvs_extend_options {
    uint32_t target_tokens;
    uint64_t seed;
    bool at_most;   /* stop before the exchange that would pass target_tokens, instead of after the one that does */
    bool connector; /* a fixed user/assistant exchange that changes the topic stands between two sources */
} kvs_extend_options;

/* Chains whole real dialogues to n_out long ones. Sources come in a seeded shuffle and each is used once before any is
 * used again; an exchange (user and assistant) is never split, so every dialogue ends with an assistant message.
 * System messages and unanswered user messages are left out. Dialogue i is the same for every n_out > i.
 *   count  borrowed callback, called once or twice a message
 * Errors: EINVAL if no dialogue has an answered user message, target_tokens is 0, or (at_most) no exchange fits. */
kvs_status kvs_dialogue_extend(const kvs_dialogue_set *set, const kvs_extend_options *opt, kvs_dialogue_count_fn count,
                               void *ctx, uint32_t n_out, kvs_dialogue_set *out, kvs_error *err);

/* ---- dialogue_facts.c ---- */

typedef struct kvs_facts_options {
    uint64_t seed;
    uint32_t n_facts;    /* 1 to kvs_facts_max(), each of another kind (paint of a room, mascot of a team, ...) */
    uint32_t n_messages; /* even; EINVAL names the least that holds the plan */
    uint32_t n_repeats;  /* questions about each fact, 1 to 3, two user turns apart (or n_facts, if that is more) */
    double update_share; /* chance that a fact's value is told anew later, [0, 1] */
    const kvs_dialogue_set *fillers; /* borrowed; NULL: the embedded set */
} kvs_facts_options;

void kvs_facts_options_default(kvs_facts_options *opt); /* seed 0, 1 fact, 40 messages, 1 repeat, 0.25, NULL */
uint32_t kvs_facts_max(void);
/* A dialogue that depends on (options, index) only: facts told early, middle or late (index and fact decide), four to
 * six confusers of the same kind, ordinary filler exchanges that hold none of the values, then the questions.
 * The assistant acknowledges without repeating a value, so that a value's only copy before the first answer is
 * the span in facts[i].told. Errors: EINVAL option out of range or fillers without usable exchanges; ENOMEM. */
kvs_status kvs_dialogue_facts(const kvs_facts_options *opt, uint64_t index, kvs_dialogue *out, kvs_error *err);

/* For tests: the words the generator draws from. Returns NULL past the end. */
const char *kvs_facts_value(uint32_t kind, uint32_t value_idx);
const char *kvs_facts_key(uint32_t kind, uint32_t key_idx);

#endif

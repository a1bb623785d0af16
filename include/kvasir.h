/* Kvasir: long, stateful conversations with a language model inside a hard KV-cache budget.
 *
 * A tour. A kvs_model is a GGUF file opened for reading: weights, vocabulary, chat template; it never changes and
 * any number of sessions may use it. A kvs_session is one conversation: tokens, KV cache, policy, health. You extend
 * it with tokens and get logits; the policy evicts before the cache would pass its budget. kvs_generate() and
 * kvs_chat_turn() are the loop most programs want; kvs_step() is the one that batches many sessions.
 *
 *     kvs_model *m;  kvs_session *s;  kvs_error err;
 *     if (kvs_model_open("model.gguf", NULL, &m, &err)) ...
 *     kvs_session_options o;  kvs_session_options_default(&o);
 *     o.policy = "streaming";  o.budget_tokens = 1024;
 *     if (kvs_session_create(m, &o, &s, &err)) ...
 *     if (kvs_chat_turn(s, "Hello!", NULL, NULL, on_text, ctx, NULL, &err)) ...
 *
 * Every fallible call returns a kvs_status (0 or negative) and fills the caller's kvs_error, which may be NULL. The
 * library never prints, exits, aborts on input or reads the environment. A session is used by one thread at a time;
 * sessions of one model may be used in parallel, but share that model's thread pool, one step after another.
 * docs/architecture.md follows one token through the code.
 */
#ifndef KVASIR_H
#define KVASIR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVS_VERSION_MAJOR  0
#define KVS_VERSION_MINOR  1
#define KVS_VERSION_PATCH  0
#define KVS_VERSION_STRING "0.1.0"

#if defined(__GNUC__)
#define KVS_API __attribute__((visibility("default")))
#else
#define KVS_API
#endif

/* ---- status and errors ------------------------------------------------------------------------------------------ */

#define KVS_STATUS_MAP(X)                                                                                              \
    X(OK, 0, "ok")                                                                                                     \
    X(EINVAL, -1, "argument outside its documented range")                                                             \
    X(ENOMEM, -2, "the allocator returned NULL")                                                                       \
    X(EBUDGET, -3, "does not fit in the budget, and the policy cannot help")                                           \
    X(EIO, -4, "a file could not be read or written")                                                                  \
    X(EFORMAT, -5, "a file or text is not what it should be")                                                          \
    X(EUNSUPPORTED, -6, "valid, but not something this build can do")                                                  \
    X(ECANCELLED, -7, "the caller's callback asked to stop")                                                           \
    X(EBACKEND, -8, "a library Kvasir stands on failed")                                                               \
    X(EPOLICY, -9, "a policy broke the contract of kvasir_policy.h")

typedef enum kvs_status {
#define KVS_STATUS_ENUM(name, value, text) KVS_##name = value,
    KVS_STATUS_MAP(KVS_STATUS_ENUM)
#undef KVS_STATUS_ENUM
} kvs_status;

/* Caller-owned; may be NULL in every call. */
typedef struct kvs_error {
    kvs_status status;
    char message[400]; /* NUL-terminated, one line, names the value that was wrong and what would be right */
} kvs_error;

KVS_API const char *kvs_status_text(kvs_status status);
KVS_API const char *kvs_version(void);

/* Caller-supplied memory. alloc returns NULL or a pointer aligned to 64 bytes; free accepts NULL. Weights are mmapped
 * and libllama's vocabulary uses malloc: neither goes through here. */
typedef struct kvs_allocator {
    void *(*alloc)(void *ctx, size_t size_bytes);
    void (*free)(void *ctx, void *ptr);
    void *ctx;
} kvs_allocator;

/* ---- model ------------------------------------------------------------------------------------------------------ */

typedef struct kvs_model kvs_model;

typedef enum kvs_arith {
    KVS_ARITH_NATIVE = 0, /* the weight type's own integer products with 8-bit activations: fast */
    KVS_ARITH_F32 = 1,    /* weights widened to f32, f32 activations: what every KL claim runs in */
} kvs_arith;

typedef struct kvs_model_options {
    uint32_t n_threads;  /* 0: one per core this process may use */
    uint32_t cpu_mask;   /* KVS_CPU_* bits that may be used; 0: all the machine has */
    bool rope_like_ggml; /* angles by ggml's f32 recurrence instead of double precision: only to compare logits */
    bool vocab_only;     /* tokenizer and metadata only; sessions cannot be created */
    const kvs_allocator *allocator; /* NULL: aligned malloc */
} kvs_model_options;

typedef struct kvs_model_info {
    const char *path, *arch, *name; /* owned by the model */
    uint32_t n_layers, n_heads, n_kv_heads, head_dim, n_embd, n_ff, vocab_size, window_tokens;
    double rope_base;
    uint64_t n_params, weight_bytes; /* bytes of the tensors in the file */
    uint64_t packed_bytes;           /* bytes of weights rearranged in memory at open */
    uint32_t n_threads;
    const char *isa; /* what the kernels run on: "scalar", "avx2", "avx512", "avx512vnni", "neon", "neondot" */
} kvs_model_info;

/* Defaults: all cores, all instruction sets, double-precision angles. */
KVS_API void kvs_model_options_default(kvs_model_options *opt);

/* Opens a GGUF file. Every offset, type and shape is checked before a tensor is read.
 *   path  borrowed; opt  NULL for defaults, borrowed;  out  set on success, owned by the caller (kvs_model_close)
 * Errors: EIO cannot open; EFORMAT truncated, foreign or inconsistent file; EUNSUPPORTED architecture or type;
 * ENOMEM. *out is NULL on any error. */
KVS_API kvs_status kvs_model_open(const char *path, const kvs_model_options *opt, kvs_model **out, kvs_error *err);
/* Frees and sets *m to NULL; *m may be NULL. No session of it may be left. */
KVS_API void kvs_model_close(kvs_model **m);
KVS_API void kvs_model_get_info(const kvs_model *m, kvs_model_info *info);

/* Text to tokens. special: markup like <|im_start|> in the text becomes its token (only for templates, never for what
 * a person typed). tokens [cap_tokens] i32; *n_tokens is the count needed even when it is over cap_tokens (then
 * EINVAL and nothing is written). add_bos follows the model's own rule when true. Invalid UTF-8 is EFORMAT with the
 * byte offset. */
KVS_API kvs_status kvs_tokenize(const kvs_model *m, const char *text, size_t text_bytes, bool add_bos, bool special,
                                int32_t *tokens, size_t cap_tokens, size_t *n_tokens, kvs_error *err);
/* The bytes of one token (not always whole UTF-8 characters). Returns the length, writes at most cap_bytes, no NUL.
 * Control tokens give 0 bytes unless special. Out-of-range tokens give 0. */
KVS_API size_t kvs_token_text(const kvs_model *m, int32_t token, bool special, char *buf, size_t cap_bytes);
KVS_API bool kvs_token_is_eog(const kvs_model *m, int32_t token); /* ends a generation (EOS, end of turn) */
KVS_API int32_t kvs_token_bos(const kvs_model *m);                /* -1 where the model has none */

/* ---- session ---------------------------------------------------------------------------------------------------- */

typedef struct kvs_session kvs_session;

typedef enum kvs_kv_type { KVS_KV_F16 = 0, KVS_KV_F32 = 1 } kvs_kv_type;

typedef enum kvs_position_mode {
    KVS_POSITION_ROLLBACK = 0, /* keys stay, the next query stands at the cache length (arXiv 2511.04686's script) */
    KVS_POSITION_KEEP,         /* true positions, with gaps */
    KVS_POSITION_REROTATE,     /* compacted to ranks */
    KVS_POSITION_GAPCAP,       /* gaps cut to at most gap_cap */
    KVS_POSITION_RECOMPUTE,    /* fresh prefill of the kept tokens: an oracle, not a way of saving time */
    KVS_POSITION_COUNT
} kvs_position_mode;

/* Bits of a token's flags. */
enum {
    KVS_TOKEN_TEMPLATE = 1u << 0,  /* role markers and other template text */
    KVS_TOKEN_SYSTEM = 1u << 1,    /* system prompt */
    KVS_TOKEN_PINNED = 1u << 2,    /* a person asked to keep it */
    KVS_TOKEN_USER = 1u << 3,      /* said by the user */
    KVS_TOKEN_ASSISTANT = 1u << 4, /* said by the model */
    KVS_TOKEN_NEEDLE = 1u << 5,    /* part of a planted fact (benchmark) */
};

typedef struct kvs_session_options {
    const char *policy;     /* spec as `kvasir policies` lists; NULL: "baseline" (evicts never) */
    const char *position;   /* "rollback", "keep", "rerotate", "gapcap:16", "recompute"; NULL: the spec's own */
    uint64_t budget_bytes;  /* hard cap on pages and side arrays; 0: use budget_tokens */
    uint32_t budget_tokens; /* slots in every head; 0 with budget_bytes 0: the model's window */
    kvs_kv_type kv_type;
    kvs_arith arith;
    uint32_t chunk_tokens; /* rows of one forward step at most; 0: 256 */
    bool prefill_full;     /* a prompt is prefilled whole before any eviction; refused if the budget is smaller */
    bool paper_compat;     /* the published script's traits, bugs included (docs/paper.md) */
    const char *ffn_skip;  /* "threshold=0.99,warmup=4,cold=10:2": feed-forward blocks that decoded tokens go without
                              (docs/ffn-skip.md); "off"; NULL: off, in a fork as its parent's */
    uint64_t seed;
    const kvs_allocator *allocator; /* NULL: the model's */
} kvs_session_options;

KVS_API void kvs_session_options_default(kvs_session_options *opt);

/* Creates a session. Everything it will ever hold or work in is reserved here, its share of the model's workspace
 * included: extending it, however long the conversation gets, evicting, truncating, saving, loading and asking about it
 * allocate nothing and cannot fail for want of memory. (kvs_session_fork reserves for the copy; kvs_generate and
 * kvs_chat_turn make a sampler and render text before they begin.) Waits for a step of the same model to end: not to be
 * called from inside a step's callback.
 * Errors: EINVAL unknown policy, parameter or mode (the message suggests the nearest); EBUDGET the budget cannot hold
 * what is protected plus one token; ENOMEM. */
KVS_API kvs_status kvs_session_create(kvs_model *m, const kvs_session_options *opt, kvs_session **out, kvs_error *err);
KVS_API void kvs_session_free(kvs_session **s);

/* One session's share of a step. */
typedef struct kvs_run {
    kvs_session *session;
    const int32_t *tokens; /* [n_tokens] vocabulary ids, oldest first; borrowed for the call */
    const uint8_t *flags;  /* [n_tokens] KVS_TOKEN_* bits, or NULL for none */
    uint32_t n_tokens;
    /* Called once per wanted row, in order, with logits [vocab_size] f32 valid during the call; NULL: none wanted.
     * row is the index into tokens. Return false to cancel the whole step (ECANCELLED). */
    bool (*on_logits)(void *ctx, uint32_t row, const float *logits);
    const uint8_t *want; /* [n_tokens] nonzero: this row's logits are wanted; NULL: only the last row's */
    void *ctx;
    kvs_status status; /* out: this run's own result */
} kvs_run;

/* Appends tokens to sessions and runs the model over all their rows together. Results are bit-identical whatever the
 * batch, the chunking and the thread count. All sessions must be of one model and of one arith; none twice.
 * Memory: no session passes its budget at any moment; its policy evicts between chunks.
 * Errors: per run in run->status, and the first of them returned: EINVAL token out of vocabulary (state unchanged);
 * EBUDGET the policy cannot make room (the tokens before the refusal stay; kvs_session_n_tokens tells how many);
 * ECANCELLED and EPOLICY likewise. */
KVS_API kvs_status kvs_step(kvs_run *runs, uint32_t n_runs, kvs_error *err);

/* kvs_step for one session: logits [vocab_size] f32 after the last token, may be NULL. */
KVS_API kvs_status kvs_session_extend(kvs_session *s, const int32_t *tokens, const uint8_t *flags, uint32_t n_tokens,
                                      float *logits, kvs_error *err);

/* Tells schedules that a turn begins or ends; user text begins, the end-of-turn token ends. A turn that begins may
 * evict (paper_compat); one that ends may evict (schedule turn_end). Errors as kvs_step. */
KVS_API kvs_status kvs_session_turn_begin(kvs_session *s, kvs_error *err);
KVS_API kvs_status kvs_session_turn_end(kvs_session *s, kvs_error *err);

/* Drops the newest slots so that tokens [0, n_tokens) remain said (those of them not evicted remain held). EINVAL if
 * n_tokens is over the session's count or older than its last eviction; the session is then unchanged. Attention mass
 * that the dropped rows gave to earlier slots stays counted: policies that sum it may choose otherwise afterwards. */
KVS_API kvs_status kvs_session_truncate(kvs_session *s, uint64_t n_tokens, kvs_error *err);
/* A copy that shares pages until either writes; opt may change policy, position, budget and seed (NULL: the same).
 * kv_type and arith must be equal. Errors leave s as it was: as kvs_session_create, and EBUDGET where a smaller budget
 * cannot be met by evicting. */
KVS_API kvs_status kvs_session_fork(kvs_session *s, const kvs_session_options *opt, kvs_session **out, kvs_error *err);
/* Steering, off by default (SkipKV, arXiv:2512.07993; its numbers are not published): behind one layer the hidden states of
 * answer tokens move by (alpha + gamma N) v, N the answer's sentences so far that check what was said or turn elsewhere ("Wait,
 * ..."). spec: "FILE:layer=12,alpha=0.5,gamma=0.1", FILE a control vector as llama.cpp's (GGUF, direction.12 for what layer
 * 12, from 0, leaves); NULL: off. With alpha and gamma 0 nothing changes, to the bit. A fork has its parent's; a save has N, not
 * the file: steer the session that is loaded into. Errors leave s as it was: EINVAL a spec that lacks a number, a layer the model
 * has not; EIO no such file; EFORMAT a file of another kind, model or width; ENOMEM. */
KVS_API kvs_status kvs_session_steer(kvs_session *s, const char *spec, kvs_error *err);
KVS_API uint32_t kvs_session_steer_count(const kvs_session *s); /* N */
/* Evicts now down to keep_tokens per head (0: what the policy's keep says). Same errors as kvs_step. */
KVS_API kvs_status kvs_session_evict(kvs_session *s, uint32_t keep_tokens, kvs_error *err);
/* Serialises into caller memory: with buf NULL only *size_bytes is set. load restores into a session created with the
 * same model and options: the next logits are bit-identical. EFORMAT names what differs; the session is unchanged. */
KVS_API kvs_status kvs_session_save(const kvs_session *s, void *buf, size_t cap_bytes, size_t *size_bytes,
                                    kvs_error *err);
KVS_API kvs_status kvs_session_load(kvs_session *s, const void *buf, size_t size_bytes, kvs_error *err);

KVS_API uint64_t kvs_session_n_tokens(const kvs_session *s); /* tokens said so far: the next token_idx */

typedef struct kvs_usage {
    uint64_t budget_bytes, budget_tokens;         /* the hard cap, in both units (tokens: per head) */
    uint64_t live_bytes, live_bytes_peak;         /* K and V of occupied slots */
    uint64_t reserved_bytes, reserved_bytes_peak; /* pages held, page tables and rounding included */
    uint64_t side_bytes, side_bytes_peak;         /* pos, rope_pos, accumulators: inside the budget too */
    uint64_t scratch_bytes, scratch_bytes_peak;   /* activations and score rows: outside the budget, stated */
    uint64_t kv_bytes, kv_bytes_peak;             /* reserved + side: what the budget bounds */
    uint64_t shared_bytes;                        /* part of reserved that a fork shares */
    uint32_t n_slots_max, n_slots_min;            /* live slots of the fullest and the emptiest head */
    double n_slots_mean;
    uint64_t n_evictions, n_slots_evicted;           /* events; slots over all heads */
    uint64_t evict_ns, score_ns, select_ns, move_ns; /* time of eviction in all and its parts */
    uint64_t n_ffn_blocks, n_ffn_skipped; /* of tokens under ffn_skip's rule: in all, and those left out; 0 while off */
    double footprint;   /* sum over tokens of live slots, as a share of the full cache's (arXiv 2506.17121) */
    uint64_t probe_ns;  /* part of evict_ns: rows that ran to judge slots and were thrown away */
    uint64_t own_bytes; /* part of scratch_bytes that is this session's alone: query log, probe, eviction's arrays */
} kvs_usage;
KVS_API void kvs_session_get_usage(const kvs_session *s, kvs_usage *usage);

/* What one layer's feed-forward block did with the tokens under ffn_skip's rule. */
typedef struct kvs_ffn_layer {
    uint64_t n_run, n_skipped;
    double cosine; /* mean over n_run of that between the residual stream before and after; NaN without any */
} kvs_ffn_layer;
/* The option as parsed, with every value; "off". Owned by the session. */
KVS_API const char *kvs_session_ffn_skip(const kvs_session *s);
/* false while ffn_skip is off, and for a layer the model has not. */
KVS_API bool kvs_session_get_ffn(const kvs_session *s, uint32_t layer, kvs_ffn_layer *out);

/* Position indices of the state the next query will meet (docs/metrics.md): means over (layer, KV head). */
typedef struct kvs_positions {
    double ldd, rddi, future, out_of_window, collision, order, backward, gap, seam, adjacency, prefix,
        template_integrity;
    double future_max, collision_max, order_max; /* worst head */
    double sinks_lost;                           /* 1 if none of the first four tokens is held */
    double recent_lost;                          /* 1 - share of the last 64 tokens held */
    double mass_lost; /* EMA of the attention mass evicted; -1 when the kernels recorded none */
} kvs_positions;
KVS_API void kvs_session_get_positions(const kvs_session *s, kvs_positions *p);

typedef struct kvs_health {
    double score;      /* 0 to 100 = 100 exp(-predicted KL); bands 90, 80, 60 */
    double predicted;  /* nats */
    const char *worst; /* name of the largest term */
    bool calibrated;   /* false: the weights are priors */
    uint32_t alarms;   /* KVS_ALARM_* */
} kvs_health;
enum {
    KVS_ALARM_FUTURE = 1u << 0,
    KVS_ALARM_WINDOW = 1u << 1,
    KVS_ALARM_BACKWARD = 1u << 2,
    KVS_ALARM_BUDGET = 1u << 3,
    KVS_ALARM_NAN = 1u << 4,
};
KVS_API void kvs_session_get_health(const kvs_session *s, kvs_health *h);

/* What one (layer, KV head) holds, ascending pos: pos, rope_pos [cap] i32, each may be NULL. Returns the number of
 * slots; nothing is written when it is over cap. */
KVS_API uint32_t kvs_session_keep_set(const kvs_session *s, uint32_t layer, uint32_t kv_head, int32_t *pos,
                                      int32_t *rope_pos, uint32_t cap);

/* One eviction, told while it happens. */
typedef struct kvs_event {
    uint64_t token_idx, index;  /* tokens said; how many events came before */
    const char *path;           /* "pre_turn", "in_prefill", "decode", "turn_end", "manual" */
    const char *reason;         /* the schedule's trigger, or "budget" */
    uint32_t n_before, n_after; /* slots of the fullest head */
    uint64_t evict_ns, score_ns, select_ns, move_ns;
} kvs_event;
KVS_API void kvs_session_on_event(kvs_session *s, void (*on_event)(void *ctx, const kvs_event *event), void *ctx);

/* The spec as parsed, with every parameter's value: for manifests. Owned by the session. */
KVS_API const char *kvs_session_policy(const kvs_session *s);
KVS_API kvs_position_mode kvs_session_position(const kvs_session *s);
KVS_API const char *kvs_position_name(kvs_position_mode mode);

/* ---- generation and chat ---------------------------------------------------------------------------------------- */

typedef struct kvs_sampling {
    float temperature;    /* 0: greedy */
    uint32_t top_k;       /* 0: off */
    float top_p, min_p;   /* 1 and 0: off */
    float repeat_penalty; /* 1: off */
    uint32_t repeat_last_tokens;
    uint64_t seed; /* the draw for a token depends on (seed, token_idx) only */
    uint32_t max_tokens;
} kvs_sampling;
KVS_API void kvs_sampling_default(kvs_sampling *p);

typedef struct kvs_generation {
    uint32_t n_prompt_tokens, n_tokens;
    const char *stop; /* "eog", "length", "cancelled" */
    double ttft_ms, tpot_ms, prefill_ms, total_ms;
} kvs_generation;

/* Samples after `logits` (as kvs_session_extend left them), feeding each token, the last one included. on_token gets
 * each token's id and bytes; return false to stop. result may be NULL. */
typedef bool (*kvs_token_fn)(void *ctx, int32_t token, const char *bytes, size_t n_bytes);
KVS_API kvs_status kvs_generate(kvs_session *s, float *logits, const kvs_sampling *params, kvs_token_fn on_token,
                                void *ctx, kvs_generation *result, kvs_error *err);

/* One turn of a conversation through the model's chat template: tokenises, prefills, samples until the end of turn,
 * feeds the end-of-turn marker. system is used in the first turn only; NULL: the template's own default. */
KVS_API kvs_status kvs_chat_turn(kvs_session *s, const char *user, const char *system, const kvs_sampling *params,
                                 kvs_token_fn on_token, void *ctx, kvs_generation *result, kvs_error *err);

typedef struct kvs_message {
    const char *role, *content; /* "system", "user", "assistant" */
} kvs_message;
/* A rendered stretch of conversation: tokens and their flags. Owned by the caller; kvs_rendered_free. */
typedef struct kvs_rendered {
    int32_t *tokens; /* [n_tokens] */
    uint8_t *flags;  /* [n_tokens] KVS_TOKEN_* */
    size_t n_tokens;
} kvs_rendered;
/* Renders messages [n_from, n_messages) as they follow messages [0, n_from), template markers flagged. Content is
 * tokenised as plain text, so nothing in it can forge a marker. add_generation opens the assistant's turn. A default
 * system message that the template adds stands before message 0. EUNSUPPORTED: the template is not known. */
KVS_API kvs_status kvs_chat_render(const kvs_model *m, const kvs_message *messages, size_t n_messages, size_t n_from,
                                   bool add_generation, kvs_rendered *out, kvs_error *err);
KVS_API void kvs_rendered_free(kvs_rendered *r);

/* ---- episodes --------------------------------------------------------------------------------------------------- */

/* A history as several episodes, each with a cache of its own that was evicted with that episode in mind; a question is
 * answered on the cache of the nearest (EpiCache, arXiv 2509.17396; docs/epicache.md). The caches of all episodes are in
 * memory, and together with the room for the block being prefilled, or for a question and its answer, stay inside one
 * budget in bytes. Used by one thread at a time, like a session. */
typedef struct kvs_episodes kvs_episodes;

enum { KVS_EPISODES_MAX = 64 };

/* What a text is about: writes a vector of any length but 0 to out [dim] f32, the same for the same text. text is
 * UTF-8, n_bytes of it, not NUL-terminated. What it returns besides KVS_OK ends the call that asked. */
typedef kvs_status (*kvs_encode_fn)(void *ctx, const char *text, size_t n_bytes, float *out, kvs_error *err);

typedef struct kvs_episodes_options {
    uint32_t n_episodes;        /* 1 to KVS_EPISODES_MAX, at most as many as the history has windows */
    uint32_t window_utterances; /* utterances that are grouped together; at least 1 */
    uint32_t n_medoids;         /* windows that speak for their episode when slots are scored; at least 1 */
    uint64_t budget_bytes;      /* hard cap on pages and side arrays of all episodes; 0: use budget_tokens */
    uint32_t budget_tokens;   /* the bytes that one cache of so many slots in every head takes; 0 with 0: the window */
    uint32_t block_tokens;    /* prefilled between evictions; 0: an eighth of the budget, 64 to 2,048 */
    uint32_t words_tokens;    /* tokens of an episode's medoids at most; 0: as block_tokens */
    bool uniform_heads;       /* every head of a layer keeps as many; false: the heads of a layer share its room */
    bool keep_turns;          /* what is asked and answered stays in that episode; false: it is dropped afterwards */
    const float *sensitivity; /* [n_layers], higher: the layer needs less (docs/epicache.md); NULL: all the same */
    double alpha;             /* how far sensitivity moves room between layers; 0: not at all */
    const char *protect;      /* as +protect= of a spec; NULL: the spec's default */
    const char *position;     /* as kvs_session_options; NULL: "keep" */
    kvs_kv_type kv_type;
    kvs_arith arith;
    uint32_t chunk_tokens; /* as kvs_session_options */
    uint64_t seed;
    kvs_encode_fn encode; /* NULL: the mean of the model's own token embeddings, dim n_embd */
    void *encode_ctx;
    uint32_t encode_dim;
    const char *encoder_name; /* of encode, under 32 bytes: a save may only be opened with the same */
    /* Told while blocks are prefilled: tokens done of all that will be, over all episodes. Return false to stop. */
    bool (*on_progress)(void *ctx, uint32_t episode, uint64_t n_done, uint64_t n_total);
    void *ctx;
    const kvs_allocator *allocator; /* NULL: the model's */
} kvs_episodes_options;

/* The paper's values: 4 episodes, windows of 4 utterances, 4 medoids, heads share, turns dropped, alpha 1.1. */
KVS_API void kvs_episodes_options_default(kvs_episodes_options *opt);

/* Cuts the history into windows, groups them, and prefills one cache for each group, block by block: all of the history
 * runs once an episode. Everything is borrowed for the call only, encode and its ctx until the object is freed.
 *   messages [n_messages]  as kvs_chat_render takes them, the last one the assistant's
 *   out  set on success, owned by the caller (kvs_episodes_free)
 * Errors, *out NULL and nothing left behind: EINVAL an option out of range, more episodes than windows or than different
 * windows, a history that does not end with an answer; EBUDGET the message has the least budget; EUNSUPPORTED no chat
 * template; ECANCELLED on_progress asked to stop; ENOMEM. */
KVS_API kvs_status kvs_episodes_create(kvs_model *m, const kvs_episodes_options *opt, const kvs_message *messages,
                                       size_t n_messages, kvs_episodes **out, kvs_error *err);
KVS_API void kvs_episodes_free(kvs_episodes **e); /* before the model; *e may be NULL */

/* The episode whose centroid has the largest product with the text's vector. similarity [n_episodes] f32 may be NULL.
 * Changes nothing. EINVAL: a text without tokens. */
KVS_API kvs_status kvs_episodes_route(kvs_episodes *e, const char *text, uint32_t *episode, float *similarity,
                                      kvs_error *err);
/* One turn: routes, answers as kvs_chat_turn, then drops question and answer, or keeps both (keep_turns). The episode
 * goes to *episode (may be NULL). Dropped turns fit in the working room: an answer that would not stops as "length".
 * Errors: EBUDGET the question does not fit there (nothing changed); as kvs_chat_turn, and without keep_turns the
 * episode is as before. */
KVS_API kvs_status kvs_episodes_turn(kvs_episodes *e, const char *user, const kvs_sampling *params,
                                     kvs_token_fn on_token, void *ctx, kvs_generation *result, uint32_t *episode,
                                     kvs_error *err);

typedef struct kvs_episodes_usage {
    uint32_t n_episodes, n_resident; /* caches there are, and in memory: all of them */
    bool keep_turns;                 /* as the options, or the save, said */
    uint32_t active;                 /* answered last, or was built last */
    uint64_t budget_bytes;           /* the cap */
    uint64_t reserved_bytes;         /* what the caches can ever come to: at most the budget */
    uint64_t kv_bytes;               /* pages and side arrays of all episodes now */
    uint64_t kv_bytes_peak;          /* at most so far, the block being prefilled and the scoring rows included */
    uint64_t scratch_bytes;          /* outside the budget, stated */
    uint32_t share_tokens;           /* slots a head of an episode keeps (the mean, where heads or layers differ) */
    uint32_t work_tokens;            /* slots a head for a block and what scores it, or a question and its answer */
} kvs_episodes_usage;
KVS_API void kvs_episodes_get_usage(const kvs_episodes *e, kvs_episodes_usage *usage);

typedef struct kvs_episode_info {
    uint32_t n_windows, n_medoids; /* in its group; that speak for it */
    const int32_t *words;          /* [n_words] the medoids' tokens, in the order they were said; owned by e */
    uint32_t n_words;
    uint64_t n_tokens; /* said in its session, which is also where the next token stands */
} kvs_episode_info;
KVS_API bool kvs_episodes_get_info(const kvs_episodes *e, uint32_t episode, kvs_episode_info *info);
/* An episode's session, to look at and to fork; only kvs_episodes_turn may extend it. Owned by e. NULL: no such. */
KVS_API kvs_session *kvs_episodes_session(kvs_episodes *e, uint32_t episode);

/* All episodes as one piece of memory, as kvs_session_save: with buf NULL only *size_bytes is set. */
KVS_API kvs_status kvs_episodes_save(const kvs_episodes *e, void *buf, size_t cap_bytes, size_t *size_bytes,
                                     kvs_error *err);
/* Makes the object anew from a save of the same model: answers go on bit-identically. Of opt (NULL: defaults) only the
 * encoder, its name and the allocator count, the rest comes from the save. EFORMAT names what differs or is damaged,
 * *out is NULL; ENOMEM. */
KVS_API kvs_status kvs_episodes_load(kvs_model *m, const kvs_episodes_options *opt, const void *buf, size_t size_bytes,
                                     kvs_episodes **out, kvs_error *err);

/* ---- the registry ----------------------------------------------------------------------------------------------- */

typedef struct kvs_param_info {
    const char *name, *doc;
    double value, min, max; /* default and range */
} kvs_param_info;
typedef struct kvs_policy_info {
    const char *name, *doc, *source, *exactness, *stages, *needs;
    const kvs_param_info *params; /* [n_params] */
    uint32_t n_params;
} kvs_policy_info;
KVS_API uint32_t kvs_policy_count(void);
KVS_API bool kvs_policy_get_info(uint32_t index, kvs_policy_info *info);
/* Adds the presets of a shared object (kvasir_policy.h, docs/write-a-policy.md) to the registry of this process, all of
 * them or, on any error, none. They stay until the process ends; a file that is loaded already is left as it is. May be
 * called from any thread at any time. Runs the file's code: load only what you trust.
 *   path  borrowed; without a slash it is a file of the current folder, never one of the library search path
 * Errors: EINVAL path is NULL or empty; EIO it cannot be loaded (the loader's own words); EUNSUPPORTED it was built for
 * another KVS_POLICY_ABI (the message has both numbers); EFORMAT it exports no kvs_policy_plugin, or a preset has a
 * taken name, a wrong parameter or a missing function (the message names preset and member). */
KVS_API kvs_status kvs_policy_load_plugin(const char *path, kvs_error *err);
/* Checks a spec without a session. EINVAL as kvs_session_create. */
KVS_API kvs_status kvs_policy_check(const char *spec, kvs_error *err);

#ifdef __cplusplus
}
#endif
#endif

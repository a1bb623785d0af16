/* What every policy must do, asked of every preset of the registry and of every choice of a stage on a scorer in common, so
 * that a new one is checked without a line here: a budget that holds all changes no bit; no budget is passed, at any
 * step; keep sets are sorted, unique, in range, hold what is protected and bring nothing back; the same again for other
 * threads, slices, neighbours and after a save; mode keep is the masked full cache; what goes is given back; nothing is
 * held that grows with the square of the slots; odd inputs; and what cannot stand together is refused by both names.
 *
 * KVS_ONLY=TEXT runs the specs that hold TEXT. */
#define MASKED_TOKENS_MAX 288
#include "unit/masked_reference.h"
#include "unit/policy_fixture.h"

enum {
    N = MASKED_TOKENS_MAX,
    VOCAB = TINY_VOCAB_MIN,
    BUDGET = 144,
    CHUNK = 24,
    SAVE_AT = 185, /* five slices of 37 */
    THREADS = 3,
    HEADS_MAX = 8,
    SUBJECTS_MAX = 256
};
static const double MASKED_TOLERANCE = 1e-5;

typedef struct subject {
    char spec[160];
    kvs_policy policy;
    const char *position;
    uint32_t budget; /* tokens a head: BUDGET and what a probe keeps free */
    kvs_arith arith;
    kvs_kv_type kv;
} subject;

static subject subjects[SUBJECTS_MAX];
static uint32_t n_subjects;
static kvs_model *model[THREADS + 1]; /* of 1, 2 and 3 threads */
static int32_t tokens[N], other[N];
static uint8_t flags[N];

/* ---- who is asked ---- */

static void options_of(const subject *c, kvs_session_options *o)
{
    kvs_session_options_default(o);
    o->policy = c->spec;
    o->position = c->position;
    o->budget_tokens = c->budget;
    o->chunk_tokens = CHUNK;
    o->arith = c->arith;
    o->kv_type = c->kv;
}

static kvs_session *open_session(kvs_model *m, const subject *c)
{
    kvs_session_options o;
    options_of(c, &o);
    kvs_session *s = fx_session(m, &o);
    if (s == NULL)
        fail_msg("%s is refused", c->spec);
    return s;
}

/* The budget in which `room` tokens are not kept free for a probe's rows: these grow with it, a quarter of it at most. */
static uint32_t with_probe(const subject *c, uint32_t room)
{
    subject at = *c;
    at.budget = room;
    for (uint32_t i = 0, least = 2 * room; c->policy.probe != NULL && i < 24; i++) {
        at.budget = least;
        kvs_session *s = open_session(model[1], &at);
        least = room + s->probe.reserve_tokens;
        if (s->probe.reserve_tokens > room && kvs_policy_is_ragged(&s->policy))
            least += 2 * KVS_PAGE_SLOTS; /* heads round up to pages, and so little is kept that this tells */
        kvs_session_free(&s);
    }
    return at.budget;
}

/* Windows as small as the sequences here; every other parameter as it comes. */
static const char *small_window(const kvs_param_info *params, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(params[i].name, "window") == 0 && params[i].min <= 8 && params[i].max >= 8)
            return ":window=8";
    return "";
}

static char folder[] = "/tmp/kvs-test-properties-XXXXXX";

/* Of a budget stage whose shares stand in a file: writes one and names it behind the preset, or behind the choice. */
static void give_file(const kvs_policy *p, char *spec, size_t cap_bytes)
{
    if (p->budget == NULL || p->budget->file == NULL)
        return;
    char path[64];
    const char *const kind = p->budget->file->kinds[0], *own = strstr(spec, "+budget=");
    own = own == NULL ? spec : own + 1;
    snprintf(path, sizeof path, "%s/%s.json", folder, kind);
    if (!fx_profile(path, model[1], kind, 77))
        fail_msg("%s cannot be written", path);
    const size_t at = (size_t)(own - spec) + strcspn(own, " ");
    char rest[160];
    snprintf(rest, sizeof rest, "%s", spec + at);
    snprintf(spec + at, cap_bytes - at, "%cfile=%s%s", memchr(own, ':', (size_t)(spec + at - own)) == NULL ? ':' : ',',
             path, rest);
}

static void remove_files(void)
{
    const kvs_budget_ops *ops;
    for (uint32_t i = 0; (ops = kvs_budget_at(i)) != NULL; i++) {
        char path[64];
        if (ops->file == NULL)
            continue;
        snprintf(path, sizeof path, "%s/%s.json", folder, ops->file->kinds[0]);
        unlink(path);
    }
    rmdir(folder);
}

static bool add_subject(const char *spec)
{
    static const char *const modes[] = {"rerotate", "keep", "gapcap:3", "rollback", "recompute"};
    const char *const only = getenv("KVS_ONLY");
    subject *c = &subjects[n_subjects];
    if (kvs_policy_parse(spec, NULL, false, &c->policy, NULL) != KVS_OK)
        return false;
    if (only != NULL && strstr(spec, only) == NULL)
        return true;
    assert_true(n_subjects + 1 < SUBJECTS_MAX);
    snprintf(c->spec, sizeof c->spec, "%s", spec);
    give_file(&c->policy, c->spec, sizeof c->spec - 32);
    assert_int_equal(kvs_policy_parse(c->spec, NULL, false, &c->policy, NULL), KVS_OK);
    c->position = modes[n_subjects % 5];
    if (n_subjects % 5 == 4 && kvs_policy_scope_of(&c->policy) != KVS_SCOPE_SHARED)
        c->position = NULL; /* its own */
    c->arith = n_subjects / 2 % 2 ? KVS_ARITH_F32 : KVS_ARITH_NATIVE;
    c->kv = n_subjects / 4 % 2 ? KVS_KV_F32 : KVS_KV_F16;
    c->budget = with_probe(c, BUDGET);
    n_subjects++;
    return true;
}

/* A choice on snapkv and on h2o; where neither takes it, on the first preset that does. */
static void add_choice(const char *stage, const kvs_choice_info *info)
{
    static const char *const hosts[] = {"snapkv:window=8", "h2o"};
    char spec[160];
    bool taken = false;
    for (int i = 0; i < 2; i++) {
        snprintf(spec, sizeof spec, "%s +%s=%s%s", hosts[i], stage, info->name,
                 small_window(info->params, info->n_params));
        taken |= add_subject(spec);
    }
    for (uint32_t i = 0; !taken && kvs_policy_at(i) != NULL; i++) {
        snprintf(spec, sizeof spec, "%s +%s=%s", kvs_policy_at(i)->name, stage, info->name);
        taken = add_subject(spec);
    }
    if (!taken)
        fail_msg("no preset takes +%s=%s", stage, info->name);
}

/* A stage's choices by name: whatever has a registry. */
static const kvs_choice_info *choice_at(uint32_t stage, uint32_t i, const char **name)
{
    static const char *const names[] = {"probe", "rescore", "budget", "select", "dispose"};
    *name = stage < 5 ? names[stage] : NULL;
    switch (stage) {
    case 0:
        return kvs_probe_at(i) == NULL ? NULL : &kvs_probe_at(i)->info;
    case 1:
        return kvs_rescore_at(i) == NULL ? NULL : &kvs_rescore_at(i)->info;
    case 2:
        return kvs_budget_at(i) == NULL ? NULL : &kvs_budget_at(i)->info;
    case 3:
        return kvs_select_at(i) == NULL ? NULL : &kvs_select_at(i)->info;
    case 4:
        return kvs_dispose_at(i) == NULL ? NULL : &kvs_dispose_at(i)->info;
    default:
        return NULL;
    }
}

static void add_all(void)
{
    const kvs_policy_ops *ops;
    for (uint32_t i = 0; (ops = kvs_policy_at(i)) != NULL; i++) {
        char spec[160];
        snprintf(spec, sizeof spec, "%s%s", ops->name, small_window(ops->params, ops->n_params));
        if (!ops->never_evicts && !add_subject(spec))
            fail_msg("%s cannot be chosen by its name", spec);
    }
    const char *stage;
    for (uint32_t k = 0; choice_at(k, 0, &stage) != NULL; k++)
        for (uint32_t i = 0; choice_at(k, i, &stage) != NULL; i++)
            add_choice(stage, choice_at(k, i, &stage));
    /* Schedules, and policies that look at heads between evictions: rows are cut there, which must not show. */
    static const char *const more[] = {
        "h2o +schedule=step",
        "snapkv:window=8 +schedule=every:37",
        "tova +schedule=chunk",
        "h2o:keep=0.5 +schedule=after_prefill",
        "attention_top:acc=1,norm=1,scope=2,keep=0.6 +schedule=tokens:100",
        "knorm +schedule=once:at=100tok",
        "dbudgetkv:threshold=0.2 +schedule=every:61",
        "compactor:chunk=48",
        "non_causal_attention:chunk=40,keep=0.7 +schedule=every:40",
        "expected_attention:epsilon=0.01 +budget=ada",
        "cap +rescore=caote",
        "chunkkv:window=8 +select=chunk:length=6,reuse=2",
    };
    for (uint32_t i = 0; i < sizeof more / sizeof *more; i++)
        if (!add_subject(more[i]))
            fail_msg("%s is refused", more[i]);
}

static int set_up(void **state)
{
    (void)state;
    tiny_options o;
    fx_shape(&o, GGML_TYPE_Q4_1);
    o.head_dim = 16;
    o.n_ff = 64;
    for (uint32_t t = 1; t <= THREADS; t++)
        if ((model[t] = fx_open(&o, t, 0)) == NULL)
            return 1;
    fx_tokens(1, tokens, N);
    fx_tokens(2, other, N);
    fx_flags(3, flags, N);
    for (uint32_t i = 0; i < 9; i++)
        flags[i] = KVS_TOKEN_SYSTEM;
    for (uint32_t i = 12; i < N; i += 31)
        flags[i] |= KVS_TOKEN_TEMPLATE;
    flags[40] |= KVS_TOKEN_PINNED;
    flags[133] |= KVS_TOKEN_PINNED;
    if (mkdtemp(folder) == NULL)
        return 1;
    add_all();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (uint32_t t = 1; t <= THREADS; t++)
        kvs_model_close(&model[t]);
    remove_files();
    return 0;
}

/* ---- a run that is watched ---- */

/* What a session did: every row's logits, and a fingerprint of all keep sets after each eviction. */
typedef struct trace {
    float logits[N * VOCAB];
    uint32_t n_rows, n_events;
    uint32_t at[N];
    uint64_t sets[N];
} trace;
static trace want, got;

typedef struct watch {
    const kvs_session *s;
    const subject *c;
    const uint8_t *flags;       /* of the tokens that are fed; NULL: none */
    trace *out;                 /* NULL: logits are not wanted */
    uint32_t at;                /* tokens said at the last eviction */
    uint8_t held[HEADS_MAX][N]; /* what it left */
} watch;

static void check_usage(const watch *w)
{
    kvs_usage u;
    kvs_session_get_usage(w->s, &u);
    const double n_heads = (double)w->s->model->info.n_layers * w->s->model->info.n_kv_heads;
    /* Heads that share a budget out may hold more than its even share, not more bytes. */
    const bool too_many = !kvs_policy_is_ragged(&w->c->policy) && u.n_slots_max > u.budget_tokens;
    if (u.kv_bytes_peak > u.budget_bytes || u.kv_bytes > u.kv_bytes_peak || too_many)
        fail_msg("%s: %llu bytes, peak %llu, of %llu; %u slots of %llu", w->c->spec, (unsigned long long)u.kv_bytes,
                 (unsigned long long)u.kv_bytes_peak, (unsigned long long)u.budget_bytes, u.n_slots_max,
                 (unsigned long long)u.budget_tokens);
    assert_true(u.live_bytes <= u.reserved_bytes && u.kv_bytes == u.reserved_bytes + u.side_bytes);
    if (fabs(u.n_slots_mean * n_heads + (double)u.n_slots_evicted - n_heads * (double)w->s->n_tokens) > 1e-6 * n_heads)
        fail_msg("%s: %.2f slots a head are held and %llu evicted in all, of %llu tokens", w->c->spec, u.n_slots_mean,
                 (unsigned long long)u.n_slots_evicted, (unsigned long long)w->s->n_tokens);
    kvs_health h;
    if (w->s->n_tokens % 16 == 0) { /* it reads every head */
        kvs_session_get_health(w->s, &h);
        assert_false(h.alarms & (KVS_ALARM_BUDGET | KVS_ALARM_NAN));
    }
}

static bool is_protected(const watch *w, uint32_t pos, uint32_t n_tokens)
{
    const kvs_protect *p = &w->c->policy.protect;
    const uint8_t f = w->flags == NULL ? 0 : w->flags[pos];
    return pos < p->sinks || pos + p->recent >= n_tokens || (p->system && f & KVS_TOKEN_SYSTEM) ||
           (p->pinned && f & KVS_TOKEN_PINNED);
}

static uint64_t mix(uint64_t hash, uint64_t x)
{
    return (hash ^ x) * UINT64_C(0x9e3779b97f4a7c15) + (hash >> 29);
}

static uint64_t check_head(watch *w, uint32_t h, uint32_t n_tokens, uint64_t hash)
{
    const uint32_t n_kv_heads = w->s->model->info.n_kv_heads;
    int32_t pos[N], rope[N];
    uint8_t now[N] = {0};
    const uint32_t n = kvs_session_keep_set(w->s, h / n_kv_heads, h % n_kv_heads, pos, rope, N);
    if (n == 0 || n > n_tokens)
        fail_msg("%s: head %u holds %u slots of %u tokens", w->c->spec, h, n, n_tokens);
    for (uint32_t i = 0; i < n; i++) {
        if (pos[i] < 0 || (uint32_t)pos[i] >= n_tokens || (i > 0 && pos[i] <= pos[i - 1]))
            fail_msg("%s: head %u, slot %u stands at %d, of %u tokens, behind %d", w->c->spec, h, i, pos[i], n_tokens,
                     i > 0 ? pos[i - 1] : -1);
        const uint32_t j = (uint32_t)pos[i];
        if (j < w->at && !w->held[h][j])
            fail_msg("%s: head %u, token %u was evicted and is back", w->c->spec, h, j);
        now[j] = 1;
        hash = mix(hash, ((uint64_t)j << 32) | (uint32_t)rope[i]);
    }
    for (uint32_t j = 0; j < n_tokens; j++)
        if (!now[j] && (j >= w->at || w->held[h][j]) && is_protected(w, j, n_tokens))
            fail_msg("%s: head %u lost token %u, which is protected", w->c->spec, h, j);
    memcpy(w->held[h], now, sizeof now);
    return mix(hash, n);
}

static void on_evicted(void *ctx, const kvs_event *event)
{
    watch *w = ctx;
    const uint32_t n_tokens = (uint32_t)event->token_idx;
    uint64_t hash = n_tokens;
    for (uint32_t h = 0; h < w->s->scratch.n_heads; h++)
        hash = check_head(w, h, n_tokens, hash);
    w->at = n_tokens;
    if (w->out == NULL)
        return;
    assert_true(w->out->n_events < N);
    w->out->at[w->out->n_events] = n_tokens;
    w->out->sets[w->out->n_events++] = hash;
}

static bool on_row(void *ctx, uint32_t row, const float *logits)
{
    (void)row;
    watch *w = ctx;
    memcpy(w->out->logits + (size_t)w->out->n_rows++ * VOCAB, logits, VOCAB * sizeof *logits);
    check_usage(w);
    return true;
}

static void watch_begin(watch *w, kvs_session *s, const subject *c, trace *out)
{
    memset(w, 0, sizeof *w);
    assert_true(s->scratch.n_heads <= HEADS_MAX);
    w->s = s;
    w->c = c;
    w->flags = flags;
    w->out = out;
    kvs_session_on_event(s, on_evicted, w);
}

static kvs_run run_of(watch *w, kvs_session *s, uint32_t from, uint32_t n)
{
    static uint8_t all[N];
    memset(all, 1, sizeof all);
    return (kvs_run){.session = s,
                     .tokens = tokens + from,
                     .flags = flags + from,
                     .n_tokens = n,
                     .on_logits = on_row,
                     .want = all,
                     .ctx = w};
}

/* Rows [from, to) of the text, in calls of `slice`. */
static void say(watch *w, kvs_session *s, uint32_t from, uint32_t to, uint32_t slice)
{
    w->out->n_rows = from;
    for (uint32_t at = from; at < to; at += slice) {
        kvs_run run = run_of(w, s, at, kvs_min_u32(slice, to - at));
        kvs_error err = {.message = ""};
        if (kvs_step(&run, 1, &err) != KVS_OK)
            fail_msg("%s, token %u: %s", w->c->spec, at, err.message);
    }
    check_usage(w);
}

static void check_same(const subject *c, const char *what, uint32_t from)
{
    uint32_t row = from, e = 0, k = 0;
    row += fx_differs(want.logits + (size_t)from * VOCAB, got.logits + (size_t)from * VOCAB, N - from, VOCAB);
    while (e < want.n_events && want.at[e] < from)
        e++;
    while (k < got.n_events && got.at[k] < from)
        k++;
    if (want.n_events - e != got.n_events - k)
        fail_msg("%s, %s: %u evictions, not %u", c->spec, what, got.n_events - k, want.n_events - e);
    for (; e < want.n_events; e++, k++)
        if (want.at[e] != got.at[k] || want.sets[e] != got.sets[k])
            fail_msg("%s +position=%s, %s: eviction %u at token %u is at %u or keeps other slots", c->spec,
                     c->position == NULL ? "own" : c->position, what, e, want.at[e], got.at[k]);
    if (row < N)
        fail_msg("%s +position=%s, %s: token %u differs", c->spec, c->position == NULL ? "own" : c->position, what,
                 row);
}

/* ---- the same again, whatever runs beside it ---- */

static void alone_on(const subject *c, uint32_t n_threads, uint32_t slice, trace *out)
{
    static watch w;
    kvs_session *s = open_session(model[n_threads], c);
    watch_begin(&w, s, c, out);
    out->n_events = 0;
    say(&w, s, 0, N, slice);
    kvs_session_free(&s);
}

/* Between a session of the same policy and one of another, with rows of their own. */
static void beside_others(const subject *c, const subject *neighbour)
{
    static watch w;
    subject beside = *neighbour;
    beside.arith = c->arith;
    kvs_session *s = open_session(model[3], c),
                *others[2] = {open_session(model[3], c), open_session(model[3], &beside)};
    watch_begin(&w, s, c, &got);
    got.n_rows = got.n_events = 0;
    uint32_t depth[2] = {0, 0};
    for (uint32_t at = 0, step = 0; at < N; at += 37, step++) {
        kvs_run runs[3];
        for (uint32_t i = 0; i < 2; i++) {
            const uint32_t more = kvs_min_u32((step + 1) * (i + 2) % 50, N - depth[i]);
            runs[2 * i] = (kvs_run){.session = others[i], .tokens = other + depth[i], .n_tokens = more};
            depth[i] += more;
        }
        runs[1] = run_of(&w, s, at, kvs_min_u32(37, N - at));
        kvs_error err = {.message = ""};
        if (kvs_step(runs, 3, &err) != KVS_OK)
            fail_msg("%s beside %s: %s", c->spec, beside.spec, err.message);
    }
    kvs_session_free(&s);
    kvs_session_free(&others[0]);
    kvs_session_free(&others[1]);
}

/* From a save, or as a fork whose parent goes on with something else. */
static void resumed(const subject *c, bool by_fork)
{
    static watch w, later;
    kvs_error err = {.message = ""};
    kvs_session *s = open_session(model[1], c), *next = NULL;
    watch_begin(&w, s, c, &got);
    got.n_events = 0;
    say(&w, s, 0, SAVE_AT, 37);
    if (!by_fork)
        next = open_session(model[2], c);
    if ((by_fork ? kvs_session_fork(s, NULL, &next, &err) : fx_copy_by_save(s, next, &err)) != KVS_OK)
        fail_msg("%s: %s", c->spec, err.message);
    kvs_session_on_event(s, NULL, NULL);
    assert_int_equal(kvs_session_extend(s, other, NULL, 70, NULL, &err), KVS_OK);
    watch_begin(&later, next, c, &got);
    memcpy(later.held, w.held, sizeof w.held);
    later.at = w.at;
    say(&later, next, SAVE_AT, N, 37);
    kvs_session_free(&s);
    kvs_session_free(&next);
}

/* What a call brings is one prompt to its probe, and ends a chunk: such results depend on where calls end, by definition. */
static uint32_t slice_of(const subject *c, uint32_t slice)
{
    const bool by_calls = (c->policy.probe != NULL && c->policy.probe->kind == KVS_PROBE_PROMPT) ||
                          c->policy.schedule == KVS_SCHEDULE_CHUNK || c->policy.schedule == KVS_SCHEDULE_STEP;
    return by_calls ? N : slice;
}

static void what_a_policy_does_depends_on_threads_slices_neighbours_or_a_save(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < n_subjects; i++) {
        const subject *c = &subjects[i];
        alone_on(c, 1, N, &want);
        if (want.n_events == 0)
            fail_msg("%s evicts nothing: the run shows less than it says", c->spec);
        alone_on(c, 2, slice_of(c, 23), &got);
        check_same(c, "2 threads, slices of 23", 0);
        if (slice_of(c, 1) == N)
            alone_on(c, 1, 37, &want);
        beside_others(c, &subjects[(i + n_subjects - 1) % n_subjects]);
        check_same(c, "3 threads, beside others", 0);
        resumed(c, i % 3 == 0);
        check_same(c, i % 3 == 0 ? "as a fork" : "saved and resumed", SAVE_AT);
    }
}

/* ---- nothing to do ---- */

static void a_budget_that_holds_all_changes_a_bit(void **state)
{
    (void)state;
    static const kvs_arith ariths[] = {KVS_ARITH_NATIVE, KVS_ARITH_F32};
    for (int a = 0; a < 2; a++) {
        subject none = {.spec = "baseline", .budget = N, .arith = ariths[a]};
        assert_int_equal(kvs_policy_parse(none.spec, NULL, false, &none.policy, NULL), KVS_OK);
        alone_on(&none, 1, N, &want);
        for (uint32_t i = (uint32_t)a; i < n_subjects; i += 2) {
            subject c = subjects[i];
            /* The tightest budget that holds all is enough, and a wide one no different. */
            c.budget = with_probe(&c, i / 2 % 2 ? 4 * N : N);
            c.arith = ariths[a];
            c.kv = KVS_KV_F16;
            /* A schedule that evicts before the budget asks is another policy. */
            strcat(c.spec, " +schedule=full");
            alone_on(&c, 2, 100, &got);
            check_same(&c, "the budget holds all", 0);
        }
    }
}

/* ---- the masked full cache ---- */

static void mode_keep_is_not_the_masked_full_cache(void **state)
{
    (void)state;
    reference r;
    reference_open(&r, model[1]);
    event_log *log = need(calloc(1, sizeof *log));
    for (uint32_t i = 0; i < n_subjects; i++) {
        subject c = subjects[i];
        c.position = "keep";
        c.arith = KVS_ARITH_F32;
        c.kv = KVS_KV_F32;
        if (strstr(c.policy.text, "+dispose=") != NULL)
            continue; /* slots that go leave something behind in those that stay */
        kvs_session *s = open_session(model[2], &c);
        kvs_error err = {.message = ""};
        log->s = s;
        kvs_session_on_event(s, on_event, log);
        if (fx_run(s, tokens, flags, N, N, got.logits, VOCAB, &err) != KVS_OK)
            fail_msg("%s: %s", c.spec, err.message);
        const double worst = masked_error(&r, tokens, N, got.logits, log, KVS_POSITION_KEEP, 0);
        if (worst > MASKED_TOLERANCE || log->n == 0)
            fail_msg("%s: relative error %.2e after %u evictions", c.spec, worst, log->n);
        forget_events(log);
        kvs_session_free(&s);
    }
    free(log);
    reference_close(&r);
}

/* ---- memory ---- */

static uint64_t pages_bytes(const kvs_session *s, uint64_t *slots_bytes)
{
    const kvs_model_info *i = &s->model->info;
    const uint64_t slot = 2 * i->head_dim * (s->options.kv_type == KVS_KV_F32 ? 4u : 2u);
    uint64_t n_pages = 0, n_slots = 0;
    for (uint32_t h = 0; h < s->scratch.n_heads; h++) {
        const uint32_t n = kvs_cache_n_live(s->cache, h / i->n_kv_heads, h % i->n_kv_heads);
        n_slots += n;
        n_pages += (n + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
    }
    *slots_bytes = n_slots * slot;
    return n_pages * KVS_PAGE_SLOTS * slot;
}

/* What an eviction drops is given back by pages, in ragged caches too: a mask over slots that stay would not do. */
static void evicted_bytes_stay_with_the_allocator(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < n_subjects; i++) {
        subject c = subjects[i];
        char spec[sizeof c.spec + 32];
        snprintf(spec, sizeof spec, "%s +schedule=full +protect=none", c.spec);
        kvs_session_options o;
        options_of(&c, &o);
        o.policy = spec;
        o.budget_tokens = 2 * N + c.budget;
        kvs_session *s = fx_session(model[2], &o);
        assert_non_null(s);
        kvs_error err = {.message = ""};
        kvs_usage before, after;
        uint64_t live, pages;
        assert_int_equal(kvs_session_extend(s, tokens, NULL, N, NULL, &err), KVS_OK);
        kvs_session_get_usage(s, &before);
        pages = pages_bytes(s, &live);
        assert_true(before.live_bytes == live && before.reserved_bytes >= pages);
        const uint64_t overhead = before.reserved_bytes - pages; /* page tables and rounding */
        if (kvs_session_evict(s, N / 4, &err) != KVS_OK)
            fail_msg("%s: %s", c.spec, err.message);
        kvs_session_get_usage(s, &after);
        pages = pages_bytes(s, &live);
        if (after.live_bytes != live || after.live_bytes * 3 > before.live_bytes ||
            after.reserved_bytes > pages + overhead || after.reserved_bytes >= before.reserved_bytes ||
            after.side_bytes > before.side_bytes)
            fail_msg("%s: live %llu of %llu bytes, reserved %llu of %llu where pages for what is held are %llu", c.spec,
                     (unsigned long long)after.live_bytes, (unsigned long long)before.live_bytes,
                     (unsigned long long)after.reserved_bytes, (unsigned long long)before.reserved_bytes,
                     (unsigned long long)pages);
        kvs_session_free(&s);
    }
}

static uint64_t scratch_at(const subject *c, uint32_t budget)
{
    kvs_session_options o;
    options_of(c, &o);
    o.budget_tokens = budget;
    o.chunk_tokens = 0;
    kvs_session *s = fx_session(model[1], &o);
    assert_non_null(s);
    const uint64_t bytes = s->scratch.bytes + s->queries.bytes + s->probe.bytes; /* the model's own is shared */
    kvs_session_free(&s);
    return bytes;
}

/* A matrix of slots by slots would grow fourfold where the slots double. */
static void something_grows_with_the_square_of_the_slots(void **state)
{
    (void)state;
    enum { SLOTS = 4096 };
    for (uint32_t i = 0; i < n_subjects; i++) {
        subject c = subjects[i];
        c.position = NULL;
        const uint64_t once = scratch_at(&c, SLOTS), twice = scratch_at(&c, 2 * SLOTS),
                       four = scratch_at(&c, 4 * SLOTS);
        assert_true(once < twice && twice < four);
        if ((double)(four - twice) > 2.05 * (double)(twice - once))
            fail_msg("%s: scratch of %llu, %llu and %llu bytes for %d, %d and %d slots", c.spec,
                     (unsigned long long)once, (unsigned long long)twice, (unsigned long long)four, SLOTS, 2 * SLOTS,
                     4 * SLOTS);
    }
}

/* ---- odd inputs ---- */

/* Feeds n tokens that carry no flags. */
static void feed(watch *w, kvs_session *s, const int32_t *from, uint32_t n)
{
    kvs_error err = {.message = ""};
    if (kvs_session_extend(s, from, NULL, n, NULL, &err) != KVS_OK)
        fail_msg("%s: %s", w->c->spec, err.message);
    check_usage(w);
}

static void the_same_token_over_and_over_breaks_a_policy(void **state)
{
    (void)state;
    static int32_t same[N];
    static watch w;
    for (uint32_t i = 0; i < N; i++)
        same[i] = tokens[7];
    for (uint32_t i = 0; i < n_subjects; i++) {
        kvs_session *s = open_session(model[2], &subjects[i]);
        watch_begin(&w, s, &subjects[i], NULL);
        w.flags = NULL;
        for (uint32_t at = 0; at < N; at += 96)
            feed(&w, s, same + at, kvs_min_u32(96, N - at));
        assert_false(s->saw_nan);
        kvs_session_free(&s);
    }
}

static void evict_to(watch *w, kvs_session *s, uint32_t n_keep)
{
    kvs_error err = {.message = ""};
    const uint32_t before = kvs_cache_live_max(s->cache);
    if (kvs_session_evict(s, n_keep, &err) != KVS_OK)
        fail_msg("%s, %u of %u: %s", w->c->spec, n_keep, before, err.message);
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    const uint32_t most = kvs_max_u32(n_keep, 4 + s->policy.protect.recent); /* what is protected stays */
    if (s->n_tokens > 0 && (u.n_slots_min == 0 || u.n_slots_mean > most + 1e-9))
        fail_msg("%s, %u of %u: %u to %u slots stay, %.2f a head", w->c->spec, n_keep, before, u.n_slots_min,
                 u.n_slots_max, u.n_slots_mean);
    check_usage(w);
}

/* Nothing said, one token, fewer than the window of 8, as many, and two turns with an eviction between. */
static void short_turns_and_empty_ones_break_a_policy(void **state)
{
    (void)state;
    static watch w;
    for (uint32_t i = 0; i < n_subjects; i++) {
        kvs_session *s = open_session(model[1], &subjects[i]);
        kvs_error err = {.message = ""};
        watch_begin(&w, s, &subjects[i], NULL);
        w.flags = NULL;
        for (int turn = 0; turn < 2; turn++) {
            assert_int_equal(kvs_session_turn_begin(s, &err), KVS_OK);
            assert_int_equal(kvs_session_extend(s, NULL, NULL, 0, NULL, &err), KVS_OK);
            assert_int_equal(kvs_session_turn_end(s, &err), KVS_OK);
            evict_to(&w, s, 1);
            feed(&w, s, tokens + turn, 1);
            evict_to(&w, s, 5);
        }
        feed(&w, s, tokens + 2, 3); /* 5 */
        evict_to(&w, s, 4);
        feed(&w, s, tokens + 5, 4); /* 8: the window */
        evict_to(&w, s, 5);
        feed(&w, s, tokens + 9, 60);
        assert_int_equal(kvs_session_turn_end(s, &err), KVS_OK);
        evict_to(&w, s, 30);
        assert_int_equal(kvs_session_turn_begin(s, &err), KVS_OK);
        feed(&w, s, tokens + 69, 40);
        evict_to(&w, s, 20);
        feed(&w, s, tokens + 109, 1);
        assert_int_equal(s->n_tokens, 110);
        kvs_session_free(&s);
    }
}

/* Less than sinks and window together: refused with both numbers, or clamped and inside the budget. */
static void a_budget_below_sinks_and_window_is_passed(void **state)
{
    (void)state;
    static const uint32_t budgets[] = {1, 4, 5, 7, 11, 20};
    static watch w;
    for (uint32_t i = 0; i < n_subjects; i++)
        for (uint32_t k = i % 2; k < sizeof budgets / sizeof *budgets; k += 2) {
            const subject *c = &subjects[i];
            kvs_session_options o;
            options_of(c, &o);
            o.budget_tokens = budgets[k];
            kvs_session *s;
            kvs_error err = {.message = ""};
            const kvs_status status = kvs_session_create(model[1], &o, &s, &err);
            if (status != KVS_OK) {
                char number[32];
                snprintf(number, sizeof number, "budget of %u tokens", budgets[k]);
                /* A trigger in the spec is refused as such. */
                const bool trigger = status == KVS_EINVAL && strstr(err.message, "trigger") != NULL;
                if ((!trigger && (status != KVS_EBUDGET || strstr(err.message, "must be at least") == NULL)) ||
                    s != NULL || strstr(err.message, number + (trigger ? 7 : 0)) == NULL ||
                    strchr(err.message, '\n') != NULL)
                    fail_msg("%s: %s", c->spec, err.message);
                continue;
            }
            watch_begin(&w, s, c, NULL);
            w.flags = NULL;
            feed(&w, s, tokens, 60);
            assert_false(s->saw_nan);
            kvs_session_free(&s);
        }
}

/* ---- one head by itself ---- */

typedef enum odd_kind {
    ODD_RANDOM,
    ODD_EQUAL,   /* nothing tells slots apart */
    ODD_COPIES,  /* every slot is there twice */
    ODD_OUTLIER, /* one key and value beyond all others */
    ODD_COUNT
} odd_kind;

static void make_odd(odd_kind kind, uint32_t n)
{
    for (uint32_t i = 0; kind != ODD_RANDOM && i < n; i++) {
        const uint32_t from = kind == ODD_EQUAL ? 0 : i & ~1u;
        if (kind == ODD_OUTLIER && i != n / 2)
            continue;
        for (uint32_t d = 0; d < HEAD_DIM; d++) {
            const float scale = kind == ODD_OUTLIER ? 1e15f : 1;
            b.keys[i * HEAD_DIM + d] = b.keys[from * HEAD_DIM + d] * scale;
            b.keys_raw[i * HEAD_DIM + d] = b.keys_raw[from * HEAD_DIM + d] * scale;
            b.values[i * HEAD_DIM + d] = b.values[from * HEAD_DIM + d] * scale;
        }
        if (kind == ODD_OUTLIER)
            continue;
        b.mass_sum[i] = b.mass_sum[from];
        b.mass_ema[i] = b.mass_ema[from];
        b.mass_max[i] = b.mass_max[from];
        b.carry[i] = b.carry[from];
        b.token[i] = b.token[from];
        for (uint32_t g = 0; g < GROUP; g++) {
            b.out_norm[g * n + i] = b.out_norm[g * n + from];
            b.probe[g * n + i] = b.probe[g * n + from];
        }
        for (uint32_t r = 0; r < b.view.n_window * GROUP; r++) {
            b.prob[(size_t)r * n + i] = kind == ODD_EQUAL ? 1.0f / (float)n : b.prob[(size_t)r * n + from];
            b.logit[(size_t)r * n + i] = kind == ODD_EQUAL ? 0.0f : b.logit[(size_t)r * n + from];
        }
    }
}

static bool is_hard(const kvs_protect *p, uint32_t i)
{
    return b.pos[i] < (int64_t)p->sinks || b.pos[i] + (int64_t)p->recent >= b.view.n_tokens ||
           (p->system && b.flags[i] & KVS_TOKEN_SYSTEM) || (p->pinned && b.flags[i] & KVS_TOKEN_PINNED);
}

static void evict_odd(const kvs_policy *p, odd_kind kind, uint32_t n)
{
    static float carry[SLOTS_MAX];
    static uint8_t first[SLOTS_MAX];
    memcpy(carry, b.carry, n * sizeof *carry);
    const uint32_t n_hard = kvs_protected_count(&p->protect, &b.view), n_kept = evict(p, (n + 1) / 2);
    if (b.target < 1 || n_kept > b.target || n_kept < kvs_min_u32(n_hard, n) ||
        (p->select == NULL && p->ops->choose == NULL && n_kept != kvs_min_u32(b.target, n)))
        fail_msg("%s, kind %d: %u of %u slots stay, aimed at %u, protected %u", p->text, kind, n_kept, n, b.target,
                 n_hard);
    for (uint32_t i = 0; i < n; i++)
        if (!b.keep[i] && is_hard(&p->protect, i))
            fail_msg("%s, kind %d: slot %u of %u is protected and gone", p->text, kind, i, n);
    for (uint32_t i = 0, j; p->select == NULL && p->ops->choose == NULL && i < n; i = j) { /* ties keep the newer */
        for (j = i + 1; j < n && b.scores[i] == b.scores[j]; j++)
            if (p->protect.sinks == 0 && b.keep[j - 1] && !b.keep[j])
                fail_msg("%s, kind %d: of slots %u and %u with one score the older stays", p->text, kind, j - 1, j);
    }
    memcpy(first, b.keep, n);
    memcpy(b.carry, carry, n * sizeof *carry); /* what the first time wrote */
    if (kvs_policy_scope_of(p) == KVS_SCOPE_SHARED)
        b.view.layer = b.view.kv_head = 1; /* no matter which head asks */
    evict(p, (n + 1) / 2);
    assert_memory_equal(first, b.keep, n);
}

static void a_head_of_odd_slots_breaks_a_policy(void **state)
{
    (void)state;
    static const uint32_t sizes[] = {1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 40, 333, 2500};
    kvs_rng rng = {7};
    for (uint32_t i = 0; i < n_subjects; i++)
        for (uint32_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
            for (int kind = 0; kind < ODD_COUNT; kind++) {
                kvs_policy p = subjects[i].policy;
                if (k % 2)
                    p.protect = (kvs_protect){0};
                else
                    p.protect.recent = 5;
                if (sizes[k] > 1000 && kind != (int)(i % ODD_COUNT))
                    continue;
                fill_view(&rng, sizes[k]);
                make_odd((odd_kind)kind, sizes[k]);
                evict_odd(&p, (odd_kind)kind, sizes[k]);
            }
}

/* A second scorer takes the first one's numbers for attention: those that may be negative have to say so. */
static void a_negative_score_is_not_owned_up_to(void **state)
{
    (void)state;
    static watch w;
    for (uint32_t i = 0; i < n_subjects; i++) {
        const subject *c = &subjects[i];
        if (c->policy.ops->signed_scores || c->policy.rescore != NULL || kvs_policy_needs(&c->policy) == 0)
            continue;
        kvs_session *s = open_session(model[2], c);
        watch_begin(&w, s, c, NULL);
        w.flags = NULL;
        feed(&w, s, tokens, 70);
        const uint32_t n = kvs_cache_live_min(s->cache);
        evict_to(&w, s, 30);
        for (uint32_t h = 0; h < s->scratch.n_heads; h++)
            for (uint32_t k = 0; k < n; k++)
                if (s->scratch.scores[(size_t)h * s->scratch.stride + k] < 0)
                    fail_msg("%s: head %u scores slot %u %g", c->spec, h, k,
                             (double)s->scratch.scores[(size_t)h * s->scratch.stride + k]);
        kvs_session_free(&s);
    }
}

/* ---- what cannot stand together ---- */

static void a_refusal_changes_a_session(void **state)
{
    (void)state;
    static const char *const wrong[] = {"streaming +budget=ada",        "snapkv +bugdet=ada",  "knorm +rescore=caote",
                                        "streaming +protect=sinks:400", "compactor:sinks=300", "h2o +probe=repeat"};
    for (uint32_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        const subject c = {.spec = "h2o", .budget = BUDGET};
        kvs_session *s = open_session(model[1], &c), *same = open_session(model[1], &c), *fork = s;
        kvs_error err = {.message = ""};
        float expected[VOCAB], after[VOCAB];
        assert_int_equal(kvs_session_extend(s, tokens, NULL, 200, NULL, &err), KVS_OK);
        assert_int_equal(kvs_session_extend(same, tokens, NULL, 200, NULL, &err), KVS_OK);
        kvs_session_options o;
        options_of(&c, &o);
        o.policy = wrong[i];
        assert_int_not_equal(kvs_session_fork(s, &o, &fork, &err), KVS_OK);
        assert_null(fork);
        assert_true(err.message[0] != '\0' && strchr(err.message, '\n') == NULL);
        assert_int_equal(kvs_session_extend(s, tokens, NULL, 50, after, &err), KVS_OK);
        assert_int_equal(kvs_session_extend(same, tokens, NULL, 50, expected, &err), KVS_OK);
        assert_memory_equal(expected, after, sizeof expected);
        kvs_session_free(&s);
        kvs_session_free(&same);
    }
}

/* The preset, or a stage that it brings along. */
static bool names_preset(const kvs_policy_ops *ops, const char *message)
{
    const char *const brought[] = {ops->name, ops->probe, ops->rescore, ops->budget, ops->select, ops->dispose};
    for (uint32_t i = 0; i < sizeof brought / sizeof *brought; i++) {
        char word[64];
        snprintf(word, sizeof word, "%s", brought[i] == NULL ? "" : brought[i]);
        word[strcspn(word, ":")] = '\0';
        if (word[0] != '\0' && strstr(message, word) != NULL)
            return true;
    }
    return false;
}

/* Either a pair works, or the refusal names both sides in one line and says why. */
static void check_pair(const kvs_policy_ops *ops, const char *stage, const char *choice, uint32_t *n_refused)
{
    static watch w;
    char spec[160];
    kvs_policy p;
    kvs_error err = {.message = ""};
    snprintf(spec, sizeof spec, "%s +%s=%s", ops->name, stage, choice);
    if (kvs_policy_parse(spec, NULL, false, &p, &err) != KVS_OK) {
        if (err.status != KVS_EINVAL || !names_preset(ops, err.message) || strstr(err.message, choice) == NULL ||
            strchr(err.message, '\n') != NULL)
            fail_msg("%s: %s", spec, err.message);
        ++*n_refused;
        return;
    }
    kvs_policy again;
    assert_int_equal(kvs_policy_parse(p.text, NULL, false, &again, &err), KVS_OK);
    assert_string_equal(again.text, p.text);
    if (ops->never_evicts)
        return;
    subject c = {.policy = p, .budget = BUDGET + 192};
    snprintf(c.spec, sizeof c.spec, "%s", spec);
    give_file(&p, c.spec, sizeof c.spec);
    kvs_session *s = open_session(model[2], &c);
    watch_begin(&w, s, &c, NULL);
    w.flags = NULL;
    feed(&w, s, tokens, 70);
    evict_to(&w, s, 20);
    feed(&w, s, tokens + 70, 3);
    assert_false(s->saw_nan);
    kvs_session_free(&s);
}

static void a_pair_of_stages_fails_or_is_refused_without_its_names(void **state)
{
    (void)state;
    const kvs_policy_ops *ops;
    const char *stage;
    uint32_t n_refused = 0;
    for (uint32_t i = 0; (ops = kvs_policy_at(i)) != NULL; i++) {
        for (uint32_t k = 0; choice_at(k, 0, &stage) != NULL; k++)
            for (uint32_t j = 0; choice_at(k, j, &stage) != NULL; j++)
                check_pair(ops, stage, choice_at(k, j, &stage)->name, &n_refused);
        check_pair(ops, "position", "recompute", &n_refused);
    }
    assert_true(n_refused > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_budget_that_holds_all_changes_a_bit),
        cmocka_unit_test(what_a_policy_does_depends_on_threads_slices_neighbours_or_a_save),
        cmocka_unit_test(mode_keep_is_not_the_masked_full_cache),
        cmocka_unit_test(evicted_bytes_stay_with_the_allocator),
        cmocka_unit_test(something_grows_with_the_square_of_the_slots),
        cmocka_unit_test(the_same_token_over_and_over_breaks_a_policy),
        cmocka_unit_test(short_turns_and_empty_ones_break_a_policy),
        cmocka_unit_test(a_budget_below_sinks_and_window_is_passed),
        cmocka_unit_test(a_head_of_odd_slots_breaks_a_policy),
        cmocka_unit_test(a_negative_score_is_not_owned_up_to),
        cmocka_unit_test(a_refusal_changes_a_session),
        cmocka_unit_test(a_pair_of_stages_fails_or_is_refused_without_its_names),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

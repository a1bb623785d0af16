/* What tests of the whole registry share: every preset and every choice of a stage on a scorer in common, as subjects, so that
 * a new one is asked without a line here; and a session that is watched at every step: no budget is passed, and keep sets
 * are sorted, unique, in range, hold what is protected and bring nothing back. Everything static.
 *
 * KVS_ONLY=TEXT leaves the specs that hold TEXT. */
#ifndef KVS_REGISTRY_FIXTURE_H
#define KVS_REGISTRY_FIXTURE_H

#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include "unit/policy_fixture.h" /* last: its bench is called b */

enum { N = 288, VOCAB = TINY_VOCAB_MIN, BUDGET = 144, CHUNK = 24, THREADS = 3, HEADS_MAX = 8, SUBJECTS_MAX = 256 };
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

#endif

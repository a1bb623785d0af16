/* Odd inputs to every subject of registry_fixture.h: one token over and over, nothing, less than a window, budgets below
 * sinks and window, heads whose slots are equal, double or far apart; and stages that cannot stand together, which are
 * refused by both names and leave a session as it was. */
#include "unit/registry_fixture.h"

/* ---- sessions ---- */

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

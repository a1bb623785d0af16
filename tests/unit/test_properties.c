/* What every policy must do, asked of every subject of registry_fixture.h: a budget that holds all changes no bit; the same
 * again for other threads, slices, neighbours and after a save; mode keep is the masked full cache; what goes is given
 * back; nothing is held that grows with the square of the slots. test_odd_inputs.c asks what else may come. */
#define MASKED_TOKENS_MAX 288
#include "unit/masked_reference.h"
#include "unit/registry_fixture.h"

enum { SAVE_AT = 185 /* five slices of 37 */ };
static const double MASKED_TOLERANCE = 1e-5;
static trace want, got;

static bool on_row(void *ctx, uint32_t row, const float *logits)
{
    (void)row;
    watch *w = ctx;
    memcpy(w->out->logits + (size_t)w->out->n_rows++ * VOCAB, logits, VOCAB * sizeof *logits);
    check_usage(w);
    return true;
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_budget_that_holds_all_changes_a_bit),
        cmocka_unit_test(what_a_policy_does_depends_on_threads_slices_neighbours_or_a_save),
        cmocka_unit_test(mode_keep_is_not_the_masked_full_cache),
        cmocka_unit_test(evicted_bytes_stay_with_the_allocator),
        cmocka_unit_test(something_grows_with_the_square_of_the_slots),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

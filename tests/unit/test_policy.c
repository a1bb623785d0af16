/* Policies: presets against their paper's definition in plain code, selection against a full sort, and the spec grammar word by word. No model and no cache. */
#include "unit/policy_fixture.h"

/* ---- selection against a full sort ---- */

static int sort_class[SLOTS_MAX];

static int by_worth(const void *x, const void *y)
{
    const uint32_t i = *(const uint32_t *)x, j = *(const uint32_t *)y;
    if (sort_class[i] != sort_class[j])
        return sort_class[j] - sort_class[i];
    const float a = b.scores[i], c = b.scores[j];
    if (isnan(a) != isnan(c))
        return isnan(a) ? 1 : -1;
    if (!isnan(a) && a != c)
        return a > c ? -1 : 1;
    return i > j ? -1 : 1; /* the newer first */
}

static bool hard(const kvs_protect *p, uint32_t i)
{
    return b.pos[i] < (int64_t)p->sinks || b.pos[i] + (int64_t)p->recent >= b.view.n_tokens ||
           (p->system && b.flags[i] & KVS_TOKEN_SYSTEM) || (p->pinned && b.flags[i] & KVS_TOKEN_PINNED);
}

static void select_by_sorting(const kvs_protect *p, uint32_t n_keep)
{
    static uint32_t order[SLOTS_MAX];
    const uint32_t n = b.view.n_slots;
    uint32_t markers = p->template_markers ? n_keep / 8 : 0;
    for (uint32_t i = n; i-- > 0;) {
        order[i] = i;
        b.want[i] = 0;
        sort_class[i] = hard(p, i) ? 2 : 0;
        if (sort_class[i] == 0 && markers > 0 && b.flags[i] & KVS_TOKEN_TEMPLATE) {
            sort_class[i] = 1;
            markers--;
        }
    }
    qsort(order, n, sizeof *order, by_worth);
    for (uint32_t i = 0; i < n_keep && i < n; i++)
        b.want[order[i]] = 1;
}

static float odd_score(kvs_rng *rng)
{
    static const float odd[] = {NAN, -NAN, -INFINITY, INFINITY, 0.0f, -0.0f, 1e-45f, -1e-45f, 3e38f, -3e38f, 1.0f};
    switch (kvs_rng_below(rng, 4)) {
    case 0:
        return odd[kvs_rng_below(rng, sizeof odd / sizeof *odd)];
    case 1:
        return (float)kvs_rng_below(rng, 4);
    case 2: { /* any bits at all */
        const uint32_t u = (uint32_t)kvs_rng_next(rng);
        float x;
        memcpy(&x, &u, sizeof x);
        return x;
    }
    default:
        return (float)kvs_rng_double(rng) - 0.5f;
    }
}

static void selection_equals_a_full_sort(void **state)
{
    (void)state;
    kvs_rng rng = {42};
    for (int round = 0; round < 1500; round++) {
        const uint32_t n = 1 + kvs_rng_below(&rng, round % 50 == 0 ? SLOTS_MAX : round % 5 == 0 ? 600 : 40);
        fill_view(&rng, n);
        const uint32_t kind = kvs_rng_below(&rng, 6);
        for (uint32_t i = 0; i < n; i++)
            b.scores[i] = kind == 0 ? 7.0f : kind == 1 ? NAN : odd_score(&rng);
        const kvs_protect p = {.sinks = kvs_rng_below(&rng, 6),
                               .recent = kvs_rng_below(&rng, 8),
                               .system = kvs_rng_below(&rng, 2),
                               .template_markers = kvs_rng_below(&rng, 2),
                               .pinned = kvs_rng_below(&rng, 2)};
        const uint32_t n_keep = kvs_rng_below(&rng, n + 2);
        uint32_t n_hard = 0;
        for (uint32_t i = 0; i < n; i++)
            n_hard += hard(&p, i);
        assert_int_equal(kvs_protected_count(&p, &b.view), n_hard);
        kvs_error err = {0};
        const kvs_status status = kvs_select(&p, &b.view, b.scores, n_keep, b.keep, b.scratch, &err);
        if (n_hard > n_keep && n_keep < n) {
            char numbers[2][16];
            snprintf(numbers[0], sizeof numbers[0], "%u", n_hard);
            snprintf(numbers[1], sizeof numbers[1], "%u", n_keep);
            assert_int_equal(status, KVS_EBUDGET);
            assert_non_null(strstr(err.message, numbers[0]));
            assert_non_null(strstr(err.message, numbers[1]));
            continue;
        }
        assert_int_equal(status, KVS_OK);
        select_by_sorting(&p, n_keep);
        if (memcmp(b.keep, b.want, n) != 0)
            fail_msg("round %d: %u of %u slots", round, n_keep, n);
    }
}

static void a_view_without_flags_protects_by_position_only(void **state)
{
    (void)state;
    kvs_rng rng = {3};
    fill_view(&rng, 100);
    b.view.flags = NULL;
    const kvs_protect all = {.sinks = 4, .recent = 3, .system = true, .template_markers = true, .pinned = true};
    memset(b.flags, 0, sizeof b.flags);
    for (uint32_t i = 0; i < 100; i++)
        b.scores[i] = (float)kvs_rng_double(&rng);
    assert_int_equal(kvs_select(&all, &b.view, b.scores, 40, b.keep, b.scratch, NULL), KVS_OK);
    select_by_sorting(&all, 40);
    assert_memory_equal(b.keep, b.want, 100);
}

/* ---- the registry ---- */

static void the_registry_says_what_a_preset_needs(void **state)
{
    (void)state;
    kvs_policy_info info;
    for (uint32_t k = 0; kvs_policy_get_info(k, &info); k++) {
        const kvs_policy p = parse(info.name);
        assert_int_equal(p.ops->abi, KVS_POLICY_ABI);
        assert_ptr_equal(kvs_policy_find(info.name), p.ops);
        assert_ptr_equal(kvs_policy_at(k), p.ops);
        assert_true(info.n_params < KVS_POLICY_PARAMS_MAX); /* the keep share stands behind them */
        assert_true(info.doc[0] && info.source[0] && info.exactness[0] && info.stages[0]);
        assert_int_equal(kvs_policy_needs(&p) == 0, strcmp(info.needs, "nothing") == 0);
        for (uint32_t i = 0; i < info.n_params; i++)
            assert_true(info.params[i].min <= info.params[i].value && info.params[i].value <= info.params[i].max);
    }
    assert_false(kvs_policy_get_info(kvs_policy_count(), &info));
    assert_null(kvs_policy_at(kvs_policy_count()));
    assert_null(kvs_policy_find("no_such_policy"));
}

/* ---- each preset's definition, without protection (evaluation.md 1.3: n slots, index 0 the oldest) ---- */

static void assert_range(uint32_t begin, uint32_t end)
{
    for (uint32_t i = 0; i < b.view.n_slots; i++)
        if (b.keep[i] != (i >= begin && i < end))
            fail_msg("slot %u of %u: kept %u, expected [%u, %u)", i, b.view.n_slots, b.keep[i], begin, end);
}

static void presets_of_position_keep_the_slots_their_papers_name(void **state)
{
    (void)state;
    kvs_rng rng = {9};
    const kvs_policy oldest = parse("evict_oldest +protect=none"), oldest_tenth = parse("evict_oldest:keep=0.9 "
                                                                                        "+protect=none");
    const kvs_policy oldest_tokens = parse("evict_oldest:keep=33tok +protect=none");
    const kvs_policy window = parse("sliding_window +protect=none");
    const kvs_policy streaming = parse("streaming:sinks=4 +protect=none");
    for (uint32_t n = 1; n < 400; n++) {
        fill_view(&rng, n);
        assert_int_equal(evict(&oldest, 0), n - n / 4); /* floor(n * 0.25) go */
        assert_range(n / 4, n);
        evict(&oldest_tenth, 0);
        assert_range(n / 10, n);
        evict(&oldest_tokens, 0);
        assert_range(n > 33 ? n - 33 : 0, n);
        evict(&window, 0);
        assert_range(n - kvs_max_u32((uint32_t)(n * 0.7), 1), n);
        const uint32_t target = 1 + kvs_rng_below(&rng, n);
        uint32_t n_sinks = 0;
        while (n_sinks < n && b.pos[n_sinks] < 4)
            n_sinks++;
        evict(&streaming, target);
        for (uint32_t i = 0; target >= n_sinks && i < n; i++)
            assert_int_equal(b.keep[i], i < n_sinks || i >= n - (target - n_sinks));
    }
}

static void gist_keeps_the_first_and_the_newest(void **state)
{
    (void)state;
    kvs_rng rng = {10};
    for (int round = 0; round < 400; round++) {
        const uint32_t gist = kvs_rng_below(&rng, 120), recent = kvs_rng_below(&rng, 3) ? kvs_rng_below(&rng, 90) : 0;
        const uint32_t n = 1 + kvs_rng_below(&rng, 300);
        char spec[96];
        snprintf(spec, sizeof spec, "sliding_window_gist:gist=%u,recent=%u +protect=none", gist, recent);
        const kvs_policy p = parse(spec);
        fill_view(&rng, n);
        evict(&p, 5);
        for (uint32_t i = 0; i < n; i++)
            assert_int_equal(b.keep[i],
                             gist + recent >= n || i < gist || i >= n - recent || (gist + recent == 0 && i == n - 1));
    }
    const kvs_policy paper = parse("sliding_window_gist:gist=2000,recent=0 +protect=none");
    fill_view(&rng, 4800);
    assert_int_equal(evict(&paper, 1), 2000);
    assert_range(0, 2000);
}

static void a_share_of_what_was_said_is_one_of_what_is_held(void **state)
{
    (void)state;
    kvs_rng rng = {12};
    fill_view(&rng, 300);
    kvs_policy p = parse("streaming +protect=none +keep=0.25said");
    b.view.n_tokens = 1000;
    assert_int_equal(kvs_policy_target(&p, &b.view, 7), 250);
    b.view.n_tokens = 1300;
    assert_true(kvs_policy_target(&p, &b.view, 7) >= 300); /* nothing to do */
    p = parse("streaming +protect=none +keep=0.25");
    assert_int_equal(kvs_policy_target(&p, &b.view, 7), 75);
    kvs_error err;
    assert_int_equal(kvs_policy_check("streaming +keep=1.5said", &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "1.5said"));
    assert_int_equal(kvs_policy_check("streaming +keep=said", &err), KVS_EINVAL);
    static char digits[600]; /* a plug-in's preset may say anything */
    memset(digits, '1', sizeof digits - 5);
    strcpy(digits + sizeof digits - 5, "said");
    kvs_policy_ops odd = *kvs_policy_find("streaming");
    odd.keep = digits;
    assert_int_equal(kvs_policy_parse_tail(&odd, "", NULL, false, &p, &err), KVS_EINVAL);
}

static void gist_attentive_fills_the_middle_by_attention(void **state)
{
    (void)state;
    kvs_rng rng = {11};
    for (int round = 0; round < 400; round++) {
        const uint32_t gist = kvs_rng_below(&rng, 60), recent = kvs_rng_below(&rng, 60);
        const uint32_t n = 1 + kvs_rng_below(&rng, 500), share = 1 + kvs_rng_below(&rng, 99);
        char spec[96];
        snprintf(spec, sizeof spec, "sliding_window_gist_attentive:gist=%u,recent=%u,keep=0.%02u +protect=none", gist,
                 recent, share);
        const kvs_policy p = parse(spec);
        fill_view(&rng, n);
        const uint32_t target = kvs_max_u32((uint32_t)(n * p.keep_ratio), 1);
        assert_int_equal(evict(&p, 5), target);
        /* Recency first, then the gist's prefix, then attention: a full sort of the middle. */
        const uint32_t n_recent = kvs_min_u32(recent, kvs_min_u32(target, n));
        const uint32_t n_gist = kvs_min_u32(kvs_min_u32(gist, n - n_recent), target - n_recent);
        const uint32_t begin = kvs_min_u32(gist, n), end = n - kvs_min_u32(recent, n);
        for (uint32_t i = 0; i < n; i++) {
            if (i >= n - n_recent || i < n_gist) {
                assert_int_equal(b.keep[i], 1);
                continue;
            }
            if (i < begin || i >= end) {
                assert_int_equal(b.keep[i], 0);
                continue;
            }
            uint32_t better = 0;
            for (uint32_t j = begin; j < end; j++)
                better += b.mass_sum[j] > b.mass_sum[i] || (b.mass_sum[j] == b.mass_sum[i] && j > i);
            assert_int_equal(b.keep[i], better < target - n_recent - n_gist);
        }
    }
}

static void context_shift_discards_half_of_what_follows_n_keep(void **state)
{
    (void)state;
    kvs_rng rng = {12};
    for (int round = 0; round < 300; round++) {
        const uint32_t n_keep = kvs_rng_below(&rng, 40), n = n_keep + 2 + kvs_rng_below(&rng, 300);
        char spec[96];
        snprintf(spec, sizeof spec, "llama_context_shift:n_keep=%u +protect=none", n_keep);
        const kvs_policy p = parse(spec);
        fill_view(&rng, n);
        for (uint32_t i = 0; i < n; i++) /* the first n_keep were always kept, so index and position agree there */
            b.pos[i] = (int32_t)(i < n_keep ? i : i + 1000);
        b.view.n_tokens = n + 1000;
        const uint32_t n_discard = (n - n_keep) / 2;
        assert_int_equal(evict(&p, 7), n - n_discard);
        for (uint32_t i = 0; i < n; i++)
            assert_int_equal(b.keep[i], i < n_keep || i >= n_keep + n_discard);
    }
}

static void attention_presets_rank_by_the_mass_they_name(void **state)
{
    (void)state;
    kvs_rng rng = {13};
    static const char *const names[] = {"attention_top", "attention_bottom"};
    for (int round = 0; round < 200; round++) {
        const bool bottom = round & 1, norm = round & 2;
        const uint32_t acc = (uint32_t)(round / 4) % 4, n = 2 + kvs_rng_below(&rng, 400);
        char spec[96];
        snprintf(spec, sizeof spec, "%s:acc=%u,norm=%d,keep=0.5 +protect=none", names[bottom], acc, norm);
        const kvs_policy p = parse(spec);
        fill_view(&rng, n);
        const float *mass = acc == 2 ? b.mass_ema : acc == 3 ? b.mass_max : b.mass_sum;
        assert_int_equal(evict(&p, 0), n / 2);
        static const uint32_t needs[] = {KVS_POLICY_NEEDS_MASS_LAST, KVS_POLICY_NEEDS_MASS_SUM,
                                         KVS_POLICY_NEEDS_MASS_EMA, KVS_POLICY_NEEDS_MASS_MAX};
        assert_int_equal(kvs_policy_needs(&p), needs[acc]);
        for (uint32_t i = 0; i < n; i++)
            b.scores[i] = (bottom ? -1.0f : 1.0f) * (norm ? mass[i] / (float)(b.view.n_tokens - b.pos[i]) : mass[i]);
        select_by_sorting(&p.protect, n / 2);
        assert_memory_equal(b.keep, b.want, n);
    }
}

/* Each slot must stay about as often as any other, another event must draw another set, other heads the same. */
static void random_draws_uniformly_by_seed_and_event(void **state)
{
    (void)state;
    kvs_rng rng = {14};
    const kvs_policy p = parse("random +protect=none");
    enum { N = 200, ROUNDS = 4000 };
    uint32_t n_kept[N] = {0};
    uint8_t last[N] = {0};
    fill_view(&rng, N);
    for (uint32_t event = 0; event < ROUNDS; event++) {
        b.view.event = event;
        assert_int_equal(evict(&p, 0), 140); /* floor(200 * 0.7) */
        assert_true(event == 0 || memcmp(last, b.keep, N) != 0);
        memcpy(last, b.keep, N);
        for (uint32_t i = 0; i < N; i++)
            n_kept[i] += b.keep[i];
    }
    /* Binomial(4000, 0.7) has a deviation of 29; six of them over 200 slots are passed once in 2.5 million runs. */
    for (uint32_t i = 0; i < N; i++)
        assert_true(n_kept[i] > 2800 - 174 && n_kept[i] < 2800 + 174);
    const kvs_policy_view view = b.view;
    b.view.seed++;
    evict(&p, 0);
    assert_memory_not_equal(last, b.keep, N);
    b.view = view;
    evict(&p, 0);
    assert_memory_equal(last, b.keep, N);
}

static void a_target_is_never_zero_and_tokens_outrank_shares(void **state)
{
    (void)state;
    kvs_rng rng = {15};
    fill_view(&rng, 10);
    const kvs_policy tiny = parse("random:keep=0.01 +protect=none"),
                     count = parse("random +keep=0.5 +keep=3tok +protect=none"),
                     share = parse("random:keep=3tok +keep=0.5 +protect=none"), none = parse("streaming +protect=none");
    assert_int_equal(kvs_policy_target(&tiny, &b.view, 9), 1);
    assert_int_equal(kvs_policy_target(&count, &b.view, 9), 3);
    assert_int_equal(kvs_policy_target(&share, &b.view, 9), 5);
    assert_int_equal(kvs_policy_target(&none, &b.view, 9), 9);
    assert_int_equal(kvs_policy_target(&none, &b.view, 0), 1);
    /* A share of few slots, or a budget less its chunk, may be below what is protected: that stays. */
    const kvs_policy guarded = parse("random:keep=0.01 +protect=recent:6");
    const uint32_t n_hard = kvs_protected_count(&guarded.protect, &b.view);
    assert_true(n_hard > 1 && n_hard < 10);
    assert_int_equal(kvs_policy_target(&guarded, &b.view, 9), n_hard);
    assert_int_equal(evict(&guarded, 9), n_hard);
}

/* ---- the grammar ---- */

static void specs_of_the_design_are_understood(void **state)
{
    (void)state;
    static const struct {
        const char *spec, *text;
    } specs[] = {
        {"streaming", "streaming:sinks=4 +schedule=full +position=rerotate +protect=sinks:4,recent:0,system,template,"
                      "pinned"},
        {"streaming:sinks=4 +position=rerotate +protect=sinks:4,recent:256",
         "streaming:sinks=4 +schedule=full +position=rerotate +protect=sinks:4,recent:256"},
        {"random:keep=0.99", "random:keep=0.99 +schedule=full +position=rerotate +protect=sinks:4,recent:0,system,"
                             "template,pinned"},
        {"attention_top:keep=0.99 +protect=none",
         "attention_top:acc=0,norm=0,scope=0,keep=0.99 +schedule=full +position=rerotate +protect=none"},
        {"sliding_window_gist:gist=2000,recent=0 +position=rollback +protect=none",
         "sliding_window_gist:gist=2000,recent=0 +schedule=full +position=rollback +protect=none"},
        {"baseline +schedule=full +protect=none", "baseline +schedule=full +position=keep +protect=none"},
        {"streaming +schedule=bytes:600MiB +protect=none",
         "streaming:sinks=4 +schedule=bytes:629145600B +position=rerotate +protect=none"},
        {"streaming +schedule=tokens:4800 +protect=none",
         "streaming:sinks=4 +schedule=tokens:4800tok +position=rerotate +protect=none"},
        {"streaming +schedule=once:at=3000tok +protect=none",
         "streaming:sinks=4 +schedule=once:at=3000tok +position=rerotate +protect=none"},
        {"streaming +schedule=chunk +protect=none",
         "streaming:sinks=4 +schedule=chunk +position=rerotate +protect=none"},
        {"streaming +schedule=after_prefill +protect=none",
         "streaming:sinks=4 +schedule=after_prefill +position=rerotate +protect=none"},
        {"streaming +schedule=step +protect=none", "streaming:sinks=4 +schedule=step +position=rerotate +protect=none"},
        {"streaming +schedule=every:128 +protect=none",
         "streaming:sinks=4 +schedule=every:128tok +position=rerotate +protect=none"},
        {"streaming +schedule=turn_end +protect=none",
         "streaming:sinks=4 +schedule=turn_end +position=rerotate +protect=none"},
        {"  streaming\n+position=gapcap:7\t+keep=766tok+protect=none ",
         "streaming:sinks=4,keep=766tok +schedule=full +position=gapcap:7 +protect=none"},
        {"streaming +position=gapcap +protect=pinned,template",
         "streaming:sinks=4 +schedule=full +position=gapcap:16 +protect=sinks:0,recent:0,template,pinned"},
        {"random:keep=0.123456789012345678 +protect=none",
         "random:keep=0.12345678901234568 +schedule=full +position=rerotate +protect=none"},
        {"streaming:sinks=1e6 +protect=none",
         "streaming:sinks=1000000 +schedule=full +position=rerotate +protect=none"},
    };
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++)
        assert_string_equal(parse(specs[i].spec).text, specs[i].text);
}

static void canonical_text_parses_to_itself(void **state)
{
    (void)state;
    static const char *const tails[] = {"",
                                        "+protect=none",
                                        "+schedule=bytes:1B",
                                        "+schedule=bytes:7.5GiB +keep=0.1",
                                        "+schedule=once:3000tok +keep=1",
                                        "+schedule=every:1 +position=keep",
                                        "+position=recompute",
                                        "+position=gapcap:1000000000 +keep=4294967295tok",
                                        "+budget=ada:floor=0.3 +rescore=caote +select=chunk:length=7,heads=1",
                                        "+keep=0.25said",
                                        "+budget=uniform +rescore=none +select=token",
                                        "+protect=recent:1000000000,sinks:1000000000,template,system,pinned"};
    for (uint32_t k = 0; k < kvs_policy_count(); k++)
        for (size_t i = 0; i < sizeof tails / sizeof *tails; i++) {
            char spec[256];
            snprintf(spec, sizeof spec, "%s %s", kvs_policy_at(k)->name, tails[i]);
            const bool stages = strstr(tails[i], "ada") != NULL || strstr(tails[i], "recompute") != NULL;
            if (stages && kvs_policy_check(spec, NULL) != KVS_OK)
                continue; /* refused by name: test_odd_inputs.c */
            const kvs_policy p = parse(spec), q = parse(p.text);
            assert_string_equal(p.text, q.text);
            assert_memory_equal(p.params, q.params, sizeof p.params);
            assert_memory_equal(&p.protect, &q.protect, sizeof p.protect);
            assert_true(p.ops == q.ops && p.schedule == q.schedule && p.schedule_value == q.schedule_value);
            assert_true(p.keep_ratio == q.keep_ratio && p.keep_tokens == q.keep_tokens &&
                        p.keep_of_said == q.keep_of_said);
            assert_true(p.position == q.position && p.gap_cap == q.gap_cap);
        }
}

static void chunks_are_a_layers_unless_each_head_chooses(void **state)
{
    (void)state;
    static const struct {
        const char *spec;
        kvs_policy_scope scope;
    } cases[] = {
        {"snapkv", KVS_SCOPE_HEAD},
        {"snapkv +select=chunk", KVS_SCOPE_LAYER},
        {"snapkv +select=chunk:heads=1", KVS_SCOPE_HEAD},
        {"snapkv +select=chunk +budget=pyramid", KVS_SCOPE_LAYER},
        {"snapkv +select=chunk:heads=1 +budget=ada", KVS_SCOPE_HEAD},
        {"streaming +select=chunk", KVS_SCOPE_SHARED},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const kvs_policy p = parse(cases[i].spec);
        assert_int_equal(kvs_policy_scope_of(&p), cases[i].scope);
    }
    kvs_policy p;
    kvs_error err = {.message = ""};
    assert_int_equal(kvs_policy_parse("snapkv +select=chunk +budget=ada", NULL, false, &p, &err), KVS_EINVAL);
    assert_non_null(strstr(err.message, "heads=1"));
}

/* kvpress's PyramidKVPress, written down from its own formulas: capacity window + n keep, window within the share. */
static void a_pyramid_with_the_window_inside_is_kvpresss(void **state)
{
    (void)state;
    enum { LAYERS = 30, HEADS = 3, N = 1200, SPARE = 64 };
    const kvs_policy p = parse("snapkv +budget=pyramid:inside=1");
    for (uint32_t even = 1; even <= N; even += 13) {
        uint32_t n_slots[LAYERS * HEADS], n_protected[LAYERS * HEADS] = {0}, n_even[LAYERS * HEADS];
        uint32_t n_keep[LAYERS * HEADS];
        for (uint32_t h = 0; h < LAYERS * HEADS; h++) {
            n_slots[h] = N;
            n_even[h] = n_keep[h] = even;
        }
        const kvs_budget_view v = {
            .n_layers = LAYERS, .n_kv_heads = HEADS, .n_slots = n_slots, .n_protected = n_protected, .n_even = n_even};
        p.budget->allocate(p.budget_params, &v, n_keep);
        double least = even / 20.0, most = 2.0 * even - least;
        if (most >= N - SPARE) {
            most = N - SPARE;
            least = 2.0 * even - most;
        }
        if (!(most >= least && least >= SPARE))
            least = most = even;
        uint64_t sum = 0;
        for (uint32_t l = 0; l < LAYERS; l++) {
            const double want = most - l * (most - least) / (LAYERS - 1);
            for (uint32_t h = 0; h < HEADS; h++) {
                assert_true(fabs(n_keep[l * HEADS + h] - want) <= 0.5 + 1e-9);
                sum += n_keep[l * HEADS + h];
            }
        }
        assert_int_equal(sum, (uint64_t)even * LAYERS * HEADS);
    }
}

static void what_is_wrong_is_named_and_the_right_word_suggested(void **state)
{
    (void)state;
    static const struct {
        const char *spec, *named, *suggested;
    } wrong[] = {
        {"streeming", "'streeming'", "'streaming'"},
        {"", "policy ''", "baseline"},
        {"+position=keep", "policy ''", "baseline"},
        {"Streaming", "'Streaming'", "'streaming'"},
        {"streaming:sink=4", "'sink'", "'sinks'"},
        {"streaming:zzzzzz=4", "'zzzzzz'", "keep, sinks"},
        {"streaming:sinks", "'sinks'", "name=value"},
        {"streaming:sinks=", "sinks ''", "from 0 to 1e+06"},
        {"streaming:sinks=-1", "'-1'", "from 0 to 1e+06"},
        {"streaming:sinks=4x", "'4x'", "number"},
        {"streaming:sinks=nan", "'nan'", "number"},
        {"streaming:sinks=inf", "'inf'", "number"},
        {"streaming:sinks=4,", "comma", "streaming"},
        {"streaming:", "colon", "sinks=4"},
        {"streaming:sinks=4:keep=1", "'4:keep=1'", "number"},
        {"random:keep=0", "'0'", "(0, 1]"},
        {"random:keep=1.01", "'1.01'", "766tok"},
        {"random:keep=tok", "'tok'", "766tok"},
        {"random:keep=1.5tok", "'1.5tok'", "4800tok"},
        {"random:keep=0tok", "'0tok'", "4800tok"},
        {"random +kep=0.5", "'kep'", "'keep'"},
        {"random +positon=keep", "'positon'", "'position'"},
        {"random +position", "'+position'", "+position=keep"},
        {"random +", "'+'", "+position=keep"},
        {"random +position +keep=0.5", "'+position'", "+position=keep"},
        {"random position=keep", "'position=keep'", "+position=keep"},
        {"random +position=kepe", "'kepe'", "'keep'"},
        {"random +position=", "mode ''", "rollback, keep"},
        {"random +position=keep:3", "'3'", "gapcap:16"},
        {"random +position=gapcap:0", "'0'", "gapcap:16"},
        {"random +position=gapcap:1.5", "'1.5'", "gapcap:16"},
        {"random +position=gapcap:", "''", "gapcap:16"},
        {"random +schedule=ful", "'ful'", "'full'"},
        {"random +schedule=full:3", "'full'", "no argument"},
        {"random +schedule=full:", "'full'", "no argument"},
        {"random +schedule=bytes", "'bytes'", "bytes:600MiB"},
        {"random +schedule=bytes:", "'bytes'", "bytes:600MiB"},
        {"random +schedule=bytes:10tok", "bytes:10tok", "600MiB"},
        {"random +schedule=tokens:10MiB", "tokens:10MiB", "4800tok"},
        {"random +schedule=tokens:10furlongs", "'10furlongs'", "4800tok"},
        {"random +schedule=every:0", "'0'", "4800tok"},
        {"random +schedule=every:-5", "'-5'", "4800tok"},
        {"random +schedule=once:at=", "'once'", "at=3000tok"},
        {"random +protect=", "protect", "none"},
        {"random +protect=sink:4", "'sink'", "'sinks'"},
        {"random +protect=sinks", "sinks", "sinks:4"},
        {"random +protect=sinks:x", "sinks", "sinks:4"},
        {"random +protect=sinks:-1", "sinks", "sinks:4"},
        {"random +protect=recent:1.5", "recent", "recent:4"},
        {"random +protect=system:3", "system", "no number"},
        {"random +protect=sinks:4,", "comma", "protect"},
        {"random +protect=none,system", "none", "alone"},
        {"random +protect=,system", "''", "known are none"},
        {"attention_top:scope=2 +position=recompute", "attention_top", "head"},
        {"streaming +budget=pyramid +position=recompute", "recompute",
         "+budget=pyramid keeps another set in each layer"},
        {"streaming +budget=ada", "+budget=ada", "streaming looks at no attention"},
        {"random +budget=composite", "+budget=composite", "random looks at no attention"},
        {"streaming +rescore=caote", "+rescore=caote", "streaming looks at no attention"},
        {"knorm +rescore=obcache-v", "+rescore=obcache-v", "knorm may be below 0"},
        {"dbudgetkv +rescore=critical", "dbudgetkv counts by its own scores", "+rescore=critical"},
        {"dbudgetkv +budget=ada", "dbudgetkv says itself", "+budget=ada"},
        {"caote +rescore=caote", "caote scores by the formula of +rescore=caote", "2504.14051"},
        {"snapkv +select=chunk:reuse=2,heads=1 +budget=ada", "+select=chunk:reuse=2", "+budget=ada gives each head"},
        {"snapkv +select=chunk:reuse=2 +budget=pyramid", "+select=chunk:reuse=2", "+budget=pyramid gives each layer"},
        {"streaming +select=chunk:reuse=2", "+select=chunk:reuse=2", "streaming has one for all layers"},
        {"snapkv +select=chunk +budget=global", "+select=chunk keeps one set", "+budget=global"},
        {"knorm +probe=lookahead", "+probe=lookahead", "knorm does not look at"},
        {"h2o +probe=repeat", "+probe=repeat", "h2o does not look at"},
        {"kvzip +probe=none", "kvzip scores by what probe rows attend to", "context or extract"},
        {"baseline +budget=ada", "baseline never evicts", "ada"},
        {"snapkv:window=513", "window '513'", "from 1 to 512"},
        {"snapkv +budget=ada:floor=1.5", "ada: floor '1.5'", "from 0 to 1"},
        {"snapkv +budget=adda", "budget 'adda'", "'ada'"},
        {"snapkv +select=chunky", "select 'chunky'", "'chunk'"},
        {"h2o +rescore=caotic", "rescore 'caotic'", "caote"},
        {"laq +probe=backwards", "probe 'backwards'", "known are none"},
        {"snapkv +budgets=ada", "'budgets'", "'budget'"},
        {"attention_top:scope=1 +position=recompute", "attention_top", "layer"},
        {"random\x01", "character 1", "byte 6"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        kvs_error err = {0};
        kvs_policy p;
        memset(&p, 0x5a, sizeof p);
        const kvs_policy before = p;
        assert_int_equal(kvs_policy_parse(wrong[i].spec, NULL, false, &p, &err), KVS_EINVAL);
        assert_memory_equal(&p, &before, sizeof p);
        if (!strstr(err.message, wrong[i].named) || !strstr(err.message, wrong[i].suggested))
            fail_msg("'%s': %s", wrong[i].spec, err.message);
        assert_int_equal(kvs_policy_check(wrong[i].spec, NULL), KVS_EINVAL);
    }
    assert_int_equal(kvs_policy_check(NULL, NULL), KVS_EINVAL);
}

/* A word is never cut to what fits a buffer, or half of it would be read as the whole. */
static void long_words_are_refused_whole(void **state)
{
    (void)state;
    char spec[600];
    for (size_t n = 60; n < 300; n += 7) {                            /* 1e-323 is the least above 0 */
        snprintf(spec, sizeof spec, "random:keep=0.%0*d", (int)n, 5); /* 0.000...5, then one x behind it */
        assert_int_equal(kvs_policy_check(spec, NULL), KVS_OK);
        strcat(spec, "x");
        assert_int_equal(kvs_policy_check(spec, NULL), KVS_EINVAL);
        snprintf(spec, sizeof spec, "random +position=gapcap:%0*dx", (int)n, 5);
        assert_int_equal(kvs_policy_check(spec, NULL), KVS_EINVAL);
        snprintf(spec, sizeof spec, "random +schedule=every:%0*dy", (int)n, 5);
        kvs_error err;
        assert_int_equal(kvs_policy_check(spec, &err), KVS_EINVAL);
        assert_null(strchr(err.message, '\n'));
    }
}

static void options_outrank_the_spec_and_paper_compat_the_preset(void **state)
{
    (void)state;
    kvs_policy p;
    assert_int_equal(kvs_policy_parse("streaming +position=keep", "gapcap:9", false, &p, NULL), KVS_OK);
    assert_true(p.position == KVS_POSITION_GAPCAP && p.gap_cap == 9);
    assert_int_equal(kvs_policy_parse("streaming", "gapcup", false, &p, NULL), KVS_EINVAL);
    assert_int_equal(kvs_policy_parse("streaming", NULL, true, &p, NULL), KVS_OK);
    assert_true(p.position == KVS_POSITION_ROLLBACK && p.protect.sinks == 0 && !p.protect.system);
    assert_int_equal(kvs_policy_parse("streaming +position=keep +protect=sinks:2", NULL, true, &p, NULL), KVS_OK);
    assert_true(p.position == KVS_POSITION_KEEP && p.protect.sinks == 2);
}

static void sizes_are_bytes_or_tokens_and_never_both(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bytes, tokens;
    } good[] = {
        {"600MiB", 629145600, 0}, {"1.5GiB", 1610612736, 0}, {"4800tok", 0, 4800}, {"4800", 0, 4800}, {"1B", 1, 0},
        {"2KB", 2000, 0},         {"3k", 3072, 0},           {"1e3tok", 0, 1000}};
    uint64_t bytes, tokens;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(kvs_size_parse(good[i].text, &bytes, &tokens, NULL), KVS_OK);
        assert_true(bytes == good[i].bytes && tokens == good[i].tokens);
    }
    static const char *const bad[] = {"",    "tok",  "0",          "-1",    "1.5",  "1.5tok",   "0.5B",  "nan",
                                      "inf", "1e30", "5000000000", "1 MiB", "1mib", "12tokens", "1MiB\n"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvs_error err;
        assert_int_equal(kvs_size_parse(bad[i], &bytes, &tokens, &err), KVS_EINVAL);
        assert_true(bytes == 0 && tokens == 0 && strchr(err.message, '\n') == NULL);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(selection_equals_a_full_sort),
        cmocka_unit_test(a_view_without_flags_protects_by_position_only),
        cmocka_unit_test(the_registry_says_what_a_preset_needs),
        cmocka_unit_test(presets_of_position_keep_the_slots_their_papers_name),
        cmocka_unit_test(gist_keeps_the_first_and_the_newest),
        cmocka_unit_test(a_share_of_what_was_said_is_one_of_what_is_held),
        cmocka_unit_test(gist_attentive_fills_the_middle_by_attention),
        cmocka_unit_test(context_shift_discards_half_of_what_follows_n_keep),
        cmocka_unit_test(attention_presets_rank_by_the_mass_they_name),
        cmocka_unit_test(random_draws_uniformly_by_seed_and_event),
        cmocka_unit_test(a_target_is_never_zero_and_tokens_outrank_shares),
        cmocka_unit_test(specs_of_the_design_are_understood),
        cmocka_unit_test(canonical_text_parses_to_itself),
        cmocka_unit_test(chunks_are_a_layers_unless_each_head_chooses),
        cmocka_unit_test(a_pyramid_with_the_window_inside_is_kvpresss),
        cmocka_unit_test(what_is_wrong_is_named_and_the_right_word_suggested),
        cmocka_unit_test(long_words_are_refused_whole),
        cmocka_unit_test(options_outrank_the_spec_and_paper_compat_the_preset),
        cmocka_unit_test(sizes_are_bytes_or_tokens_and_never_both),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Shares by weights, by similarity and by role are what their definitions say in double precision, sum to the even shares,
 * and really free memory; a profile that is none, or of another model, is refused in one line and changes nothing. */
#include "policy/budget_deal.h"
#include "session/session_internal.h"
#include "unit/session_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum { LAYERS = 5, KV = 3, HEADS = LAYERS * KV, HELD = 700, SAID = 900 };

/* ---- one view, filled at random --------------------------------------------------------------------------------- */

static float scores[HEADS * HELD];
static uint32_t keys[HEADS * HELD], n_slots[HEADS], n_protected[HEADS], n_even[HEADS], n_keep[HEADS];
static double similarity[LAYERS], numbers[HEADS];
static kvs_profile profile;
static kvs_budget_view view;

static void fill(kvs_rng *rng, bool alike)
{
    view = (kvs_budget_view){LAYERS, KV, n_slots, n_protected, n_even, scores, HELD, keys, similarity, &profile};
    const uint32_t held = 100 + kvs_rng_below(rng, HELD - 100), even = 20 + kvs_rng_below(rng, held - 20);
    for (uint32_t h = 0; h < HEADS; h++) {
        n_slots[h] = alike ? held : 40 + kvs_rng_below(rng, HELD - 40);
        n_even[h] = n_keep[h] = kvs_min_u32(alike ? even : 10 + kvs_rng_below(rng, HELD), n_slots[h]);
        n_protected[h] = alike ? 4 : kvs_rng_below(rng, 12);
        numbers[h] = kvs_rng_below(rng, 6) == 0 ? 0 : kvs_rng_double(rng);
        for (uint32_t i = 0; i < HELD; i++)
            scores[h * HELD + i] = (float)kvs_rng_double(rng);
    }
    for (uint32_t l = 0; l < LAYERS; l++)
        similarity[l] = 0.5 + kvs_rng_double(rng) / 2;
    profile = (kvs_profile){.n_layers = LAYERS, .n_kv_heads = KV, .n_tables = 1, .heads = numbers, .layers = numbers};
}

static uint64_t sum(const uint32_t *x)
{
    uint64_t n = 0;
    for (uint32_t h = 0; h < HEADS; h++)
        n += x[h];
    return n;
}

static void allocate(const char *spec)
{
    kvs_policy p;
    kvs_error err = {0};
    if (kvs_policy_parse(spec, NULL, false, &p, &err) != KVS_OK)
        fail_msg("'%s' is refused: %s", spec, err.message);
    p.budget->allocate(p.budget_params, &view, n_keep);
}

/* ---- by weights ------------------------------------------------------------------------------------------------- */

static double weight_of(const void *ctx, uint32_t unit)
{
    return ((const double *)ctx)[unit];
}

/* Units between their bounds stand in proportion: one factor fits all of them to within a slot. */
static void shares_by_weight_are_in_proportion_and_sum_to_the_even_ones(void **state)
{
    (void)state;
    kvs_rng rng = {11};
    for (int round = 0; round < 400; round++) {
        fill(&rng, round % 2 == 0);
        const double least = round % 3 == 0 ? 0.25 : 0;
        const uint32_t cap = round % 5 == 0 ? 0 : 2 + kvs_rng_below(&rng, 8);
        const kvs_budget_deal_plan plan = {.weight = weight_of, .ctx = numbers, .least = least, .share_max = cap};
        kvs_budget_deal(&view, &plan, n_keep);
        uint64_t low_sum = 0, high_sum = 0;
        double above = 0, below = INFINITY; /* factors that each interior unit allows */
        for (uint32_t h = 0; h < HEADS; h++) {
            const uint32_t low =
                kvs_min_u32(kvs_max_u32(kvs_max_u32(1, n_protected[h]), (uint32_t)(least * n_even[h])), n_slots[h]);
            const uint32_t most = cap == 0 ? n_slots[h] : kvs_min_u32(n_slots[h], cap * n_even[h]);
            const uint32_t high = kvs_max_u32(most, low);
            low_sum += low;
            high_sum += high;
            assert_in_range(n_keep[h], low, high);
            const double unit = fmax(numbers[h], 1e-9) * n_even[h];
            if (n_keep[h] > low)
                above = fmax(above, (n_keep[h] - 1.0) / unit);
            if (n_keep[h] < high)
                below = fmin(below, (n_keep[h] + 1.0) / unit);
        }
        assert_true(above <= below * (1 + 1e-9));
        const uint64_t even = sum(n_even);
        assert_int_equal(sum(n_keep), even < low_sum ? low_sum : even > high_sum ? high_sum : even);
    }
}

static void equal_weights_give_the_even_shares(void **state)
{
    (void)state;
    kvs_rng rng = {12};
    static const char *const specs[] = {"snapkv +budget=baklava",     "snapkv +budget=layers",
                                        "snapkv +budget=sensitivity", "snapkv +budget=roles:share=0",
                                        "snapkv +budget=squeeze",     "snapkv +budget=squeeze:p=1"};
    for (size_t s = 0; s < sizeof specs / sizeof *specs; s++) {
        fill(&rng, true);
        for (uint32_t h = 0; h < HEADS; h++)
            numbers[h] = 0.37;
        for (uint32_t l = 0; l < LAYERS && s != 5; l++)
            similarity[l] = 0.9;
        allocate(specs[s]);
        assert_memory_equal(n_keep, n_even, sizeof n_even);
    }
    fill(&rng, true); /* alpha 0: whatever the file says */
    allocate("snapkv +budget=sensitivity:alpha=0");
    assert_memory_equal(n_keep, n_even, sizeof n_even);
}

static void sensitivity_is_its_formula_where_no_bound_bites(void **state)
{
    (void)state;
    kvs_rng rng = {13};
    for (int round = 0; round < 50; round++) {
        fill(&rng, true);
        double w[LAYERS], all = 0;
        for (uint32_t h = 0; h < HEADS; h++) {
            n_slots[h] = 100000;
            n_even[h] = 10000;
        }
        double least = 1, most = -1;
        for (uint32_t l = 0; l < LAYERS; l++) {
            least = fmin(least, numbers[l]);
            most = fmax(most, numbers[l]);
        }
        for (uint32_t l = 0; l < LAYERS; l++)
            all += w[l] = most == least ? 1 : pow(1 - (numbers[l] - least) / (most - least), 1.1);
        allocate("snapkv +budget=sensitivity:floor=0");
        uint32_t n_free = 0;
        for (uint32_t l = 0; l < LAYERS; l++)
            n_free += w[l] * LAYERS / all < 8 && w[l] > 0.01;
        for (uint32_t l = 0; l < LAYERS && n_free + 1 >= LAYERS; l++)
            if (w[l] > 0.01)
                assert_true(fabs(n_keep[l * KV] - 10000.0 * LAYERS * w[l] / all) <= 6);
        assert_int_equal(sum(n_keep), sum(n_even));
    }
}

/* The row that is nearest to what is dropped, of tables that say their own number. */
static void lukv_takes_the_table_of_its_ratio(void **state)
{
    (void)state;
    kvs_rng rng = {16};
    static double tables[99 * HEADS];
    for (uint32_t t = 0; t < 99; t++)
        for (uint32_t h = 0; h < HEADS; h++)
            tables[t * HEADS + h] = h == t % HEADS ? 0 : 0.5;
    for (int round = 0; round < 200; round++) {
        fill(&rng, true);
        profile.heads = tables;
        profile.n_tables = 99;
        const double dropped = 1 - (double)n_even[0] / n_slots[0];
        const uint32_t row = (uint32_t)fmax(fmin(nearbyint(100 * dropped) - 1, 98), 0);
        allocate("lukv");
        const double most = (double)n_even[0] * HEADS / (0.5 * (HEADS - 1) + 1);
        for (uint32_t h = 0; h < HEADS && most < n_slots[0]; h++)
            assert_true(fabs(n_keep[h] - (h == row % HEADS ? most : most / 2)) <= 1);
        assert_int_equal(sum(n_keep), sum(n_even));
    }
}

/* ---- by similarity ---------------------------------------------------------------------------------------------- */

/* The best three groups of all 3^L assignments; in the third is the layer with the highest similarity. */
static void best_groups(uint32_t *third)
{
    double least = INFINITY;
    for (uint32_t code = 0; code < 243; code++) {
        double mean[3] = {0}, cost = 0;
        uint32_t n[3] = {0}, group[LAYERS];
        for (uint32_t l = 0, c = code; l < LAYERS; l++, c /= 3) {
            group[l] = c % 3;
            n[group[l]]++;
            mean[group[l]] += similarity[l];
        }
        for (uint32_t l = 0; l < LAYERS; l++)
            cost += pow(similarity[l] - mean[group[l]] / n[group[l]], 2);
        if (n[0] == 0 || n[1] == 0 || n[2] == 0 || cost >= least)
            continue;
        least = cost;
        uint32_t top = 0;
        for (uint32_t l = 1; l < LAYERS; l++)
            top = similarity[l] > similarity[top] ? l : top;
        for (uint32_t l = 0; l < LAYERS; l++)
            third[l] = group[l] == group[top];
    }
}

static void squeeze_takes_from_the_least_important_of_the_best_three_groups(void **state)
{
    (void)state;
    kvs_rng rng = {14};
    for (int round = 0; round < 200; round++) {
        fill(&rng, true);
        for (uint32_t h = 0; h < HEADS; h++) {
            n_slots[h] = 100000;
            n_even[h] = 1000;
        }
        uint32_t third[LAYERS], n_third = 0;
        best_groups(third);
        for (uint32_t l = 0; l < LAYERS; l++)
            n_third += third[l];
        allocate("h2o +budget=squeeze:p=0.38");
        const double rest = (LAYERS * 1000.0 - n_third * 380.0) / (LAYERS - n_third);
        for (uint32_t h = 0; h < HEADS; h++)
            assert_true(fabs(n_keep[h] - (third[h / KV] ? 380.0 : rest)) <= 1);
        assert_int_equal(sum(n_keep), sum(n_even));
    }
}

/* ---- by role ---------------------------------------------------------------------------------------------------- */

static void streaming_heads_keep_sinks_and_recent_and_the_others_what_that_leaves(void **state)
{
    (void)state;
    kvs_rng rng = {15};
    for (int round = 0; round < 200; round++) {
        fill(&rng, true);
        const uint32_t held = n_slots[0], even = n_even[0], want = kvs_min_u32(16 + 40, even);
        allocate("snapkv +budget=roles:share=0.4,sinks=16,recent=40");
        uint32_t n_streaming = 0;
        for (uint32_t h = 0; h < HEADS; h++) {
            uint32_t before = 0;
            for (uint32_t k = 0; k < HEADS; k++)
                before += numbers[k] < numbers[h] || (numbers[k] == numbers[h] && k < h);
            if (before >= 6) {
                assert_true(n_keep[h] >= even);
                continue;
            }
            n_streaming++;
            assert_int_equal(n_keep[h], kvs_max_u32(want, 4));
            for (uint32_t i = 0; i < held; i++) { /* nothing outranks a sink, and nothing else the newest */
                const float x = scores[h * HELD + i];
                assert_true(i < 16 ? x > 3.25e38f : i + 40 >= held ? x > 3e38f && x < 3.25e38f : x <= 1);
            }
        }
        assert_int_equal(n_streaming, 6);
        const uint64_t room = (uint64_t)even * HEADS - (uint64_t)want * 6;
        assert_int_equal(sum(n_keep), (room > 9ull * held ? 9ull * held : room) + (uint64_t)want * 6);
    }
}

/* ---- files ------------------------------------------------------------------------------------------------------ */

static kvs_model *model;
static char folder[] = "/tmp/kvs-shares-XXXXXX", path[128];
static int32_t tokens[SAID];

static void write_text(const char *text)
{
    FILE *const f = fopen(path, "w");
    if (f == NULL || fputs(text, f) < 0 || fclose(f) != 0)
        fail_msg("%s cannot be written", path);
}

/* A profile of the model, drawn from the seed. */
static void write_profile(const char *kind, uint64_t seed)
{
    if (!fx_profile(path, model, kind, seed))
        fail_msg("%s cannot be written", path);
}

static int setup(void **state)
{
    (void)state;
    tiny_options o;
    fx_shape(&o, GGML_TYPE_F32);
    o.n_layers = LAYERS;
    model = fx_open(&o, 2, 0);
    fx_tokens(21, tokens, SAID);
    if (model == NULL || mkdtemp(folder) == NULL)
        return 1;
    snprintf(path, sizeof path, "%s/profile.json", folder);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    kvs_model_close(&model);
    unlink(path);
    return rmdir(folder);
}

static kvs_session *open_session(kvs_model *m, const char *policy, uint32_t budget, uint32_t chunk)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = policy;
    o.budget_tokens = budget;
    o.chunk_tokens = chunk;
    o.arith = KVS_ARITH_F32;
    kvs_session *const s = fx_session(m, &o);
    assert_non_null(s);
    return s;
}

static const char *spec(const char *format)
{
    static char text[400];
    char *at = text;
    for (const char *p = format; *p != '\0'; p++)
        at += *p == '@' ? snprintf(at, (size_t)(text + sizeof text - at), "%s", path) : (*at = *p, 1);
    *at = '\0';
    return text;
}

static void say(kvs_session *s, uint32_t from, uint32_t n, float *logits)
{
    kvs_error err = {0};
    if (kvs_session_extend(s, tokens + from, NULL, n, logits, &err) != KVS_OK)
        fail_msg("%s: %s", kvs_session_policy(s), err.message);
}

static void refused(const char *policy, kvs_status want, const char *word)
{
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = policy;
    o.budget_tokens = 200;
    kvs_session *s = (kvs_session *)&o;
    kvs_error err = {0};
    const kvs_status status = kvs_session_create(model, &o, &s, &err);
    if (status != want || s != NULL || strstr(err.message, word) == NULL || strchr(err.message, '\n') != NULL)
        fail_msg("%s: status %d, '%s' lacks '%s'", policy, (int)status, err.message, word);
}

static void a_bad_profile_is_refused_with_what_is_wrong(void **state)
{
    (void)state;
    char sha[128], text[1024];
    snprintf(sha, sizeof sha, "\"model_sha256\":\"%s\"", kvs_model_sha256(model));
    refused("duo", KVS_EINVAL, "needs file=PATH");
    refused("snapkv +budget=baklava", KVS_EINVAL, "needs file=PATH");
    refused("duo:file=", KVS_EINVAL, "file= needs a path");
    refused("duo:file=a,hash=12", KVS_EINVAL, "hex digits");
    refused("snapkv:file=x", KVS_EINVAL, "unknown parameter");
    refused("snapkv +budget=ada:file=x", KVS_EINVAL, "unknown parameter");
    refused("duo:file=/no/such/file", KVS_EIO, "/no/such/file");
    refused("duo:file=/tmp", KVS_EFORMAT, "no plain file");
    static const struct {
        const char *text, *word;
    } cases[] = {
        {"", "not JSON"},
        {"{\"kind\":", "not JSON"},
        {"[1]", "no JSON object"},
        {"{}", "kind 'none', wanted is duo or prulong or kvzip-head"},
        {"{\"kind\":\"baklava\"}", "kind 'baklava'"},
        {"{\"kind\":\"duo\"}", "n_layers must be there"},
        {"{\"kind\":\"duo\",\"n_layers\":6,\"n_kv_heads\":3}", "another model: n_layers is 6, this model has 5"},
        {"{\"kind\":\"duo\",\"n_layers\":5,\"n_kv_heads\":3.5}", "n_kv_heads must be there"},
        {"{\"kind\":\"duo\",\"n_layers\":5,\"n_kv_heads\":3}", "model_sha256 must be there"},
        {"{\"kind\":\"duo\",\"n_layers\":5,\"n_kv_heads\":3,\"model_sha256\":\"abcd\"}", "another model: its sha256"},
        {"{\"kind\":\"duo\",\"n_layers\":5,\"n_kv_heads\":3,#}", "heads must be a list of 5 layers"},
        {"{\"kind\":\"duo\",\"n_layers\":5,\"n_kv_heads\":3,#,\"heads\":[[1,1],0,0,0,0]}",
         "heads, layer 0 must be a list of 3"},
        {"{\"kind\":\"duo\",\"n_layers\":5,\"n_kv_heads\":3,#,\"heads\":[[1,1,1],[1,1,1],[1,1,1],[1,1.5,1],[1,1,1]]}",
         "number 1 of heads, layer 3 must be from 0 to 1"},
        {"{\"kind\":\"duo\",\"n_layers\":5,\"n_kv_heads\":3,#,\"heads\":[[1,1,1],[1,1,\"a\"],[1,1,1],[1,1,1],[1,1,1]]}",
         "number 2 of heads, layer 1"},
        {"{\"kind\":\"duo\",\"kind\":\"duo\"}", "not JSON"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *const hole = strchr(cases[i].text, '#');
        if (hole == NULL)
            snprintf(text, sizeof text, "%s", cases[i].text);
        else
            snprintf(text, sizeof text, "%.*s%s%s", (int)(hole - cases[i].text), cases[i].text, sha, hole + 1);
        write_text(text);
        refused(spec("duo:file=@"), KVS_EFORMAT, cases[i].word);
    }
    char deep[300];
    memset(deep, 'x', sizeof deep);
    memcpy(deep, "duo:file=/", 10);
    deep[sizeof deep - 1] = '\0';
    refused(deep, KVS_EINVAL, "use a shorter path");
}

/* The spec that a session tells names the file's content, and refuses another one. */
static void the_echo_goes_round_and_holds_the_file_to_its_content(void **state)
{
    (void)state;
    write_profile("duo", 31);
    kvs_session *s = open_session(model, spec("duo:file=@ +protect=none"), 300, 64), *fork, *again;
    kvs_policy p;
    assert_int_equal(kvs_policy_parse(kvs_session_policy(s), NULL, false, &p, NULL), KVS_OK);
    assert_string_equal(p.text, kvs_session_policy(s));
    assert_non_null(strstr(p.text, ",hash="));
    again = open_session(model, kvs_session_policy(s), 300, 64);
    assert_string_equal(kvs_session_policy(again), kvs_session_policy(s));
    kvs_session_free(&again);
    say(s, 0, 250, NULL);
    write_profile("duo", 32);
    refused(p.text, KVS_EINVAL, "is not the one that was meant");
    unlink(path); /* a fork has the numbers already */
    assert_int_equal(kvs_session_fork(s, NULL, &fork, NULL), KVS_OK);
    float a[TINY_VOCAB_MIN], b[TINY_VOCAB_MIN];
    say(s, 250, 400, a);
    say(fork, 250, 400, b);
    assert_memory_equal(a, b, sizeof a);
    kvs_session_free(&fork);
    kvs_session_free(&s);
}

/* ---- whole sessions --------------------------------------------------------------------------------------------- */

static void check_same(const char *a, const char *b, uint32_t budget)
{
    static float rows[2][SAID * TINY_VOCAB_MIN];
    for (int i = 0; i < 2; i++) {
        kvs_session *s = open_session(model, i == 0 ? a : b, budget, 50);
        kvs_error err = {0};
        assert_int_equal(fx_run(s, tokens, NULL, SAID, 100, rows[i], TINY_VOCAB_MIN, &err), KVS_OK);
        kvs_usage u;
        kvs_session_get_usage(s, &u);
        assert_true(u.n_evictions > 0);
        kvs_session_free(&s);
    }
    assert_int_equal(fx_differs(rows[0], rows[1], SAID, TINY_VOCAB_MIN), SAID);
}

/* All heads stream: StreamingLLM with true positions. None does: what the scorer says, as if there were no roles. */
static void roles_of_one_kind_are_streaming_and_full(void **state)
{
    (void)state;
    write_profile("prulong", 41);
    char roles[400];
    snprintf(roles, sizeof roles, "%s",
             spec("prulong +budget=roles:file=@,share=1,sinks=4,recent=60 +schedule=every:50 +protect=none"));
    check_same(roles, "streaming:sinks=4,keep=64tok +schedule=every:50 +position=keep +protect=none", 1000);
    snprintf(roles, sizeof roles, "%s",
             spec("h2o:keep=100tok +budget=roles:file=@,share=0 +schedule=every:50 +protect=none"));
    check_same(roles, "h2o:keep=100tok +schedule=every:50 +protect=none", 1000);
    kvs_session *s = open_session(model, spec("duo:file=@,keep=1 +budget=roles:file=@,share=0"), SAID, 64);
    say(s, 0, SAID - 1, NULL);
    assert_int_equal(kvs_session_evict(s, 0, NULL), KVS_OK); /* room for all: nothing goes */
    assert_int_equal(kvs_cache_live_min(s->cache), SAID - 1);
    kvs_session_free(&s);
}

static void every_allocator_holds_its_budget_and_frees_what_it_drops(void **state)
{
    (void)state;
    static const struct {
        const char *kind, *spec;
    } cases[] = {
        {"duo", "duo:file=@ +budget=roles:file=@,sinks=4,recent=20 +protect=none"},
        {"kvzip-head", "kvzip-head:file=@"},
        {"baklava", "baklava:file=@"},
        {"baklava", "tova +budget=baklava:file=@"},
        {"sensitivity", "snapkv +budget=sensitivity:file=@"},
        {"layers", "h2o +budget=layers:file=@"},
        {"layers", "squeezeattention"},
        {"layers", "knorm +budget=squeeze:p=0.1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_profile(cases[i].kind, 50 + i);
        kvs_session *s = open_session(model, spec(cases[i].spec), 260, 64);
        for (uint32_t at = 0; at < SAID; at += 90) {
            say(s, at, 90, NULL);
            kvs_usage u;
            kvs_session_get_usage(s, &u);
            assert_true(u.kv_bytes_peak <= u.budget_bytes);
        }
        kvs_usage before, after;
        kvs_session_get_usage(s, &before);
        assert_true(before.n_evictions > 0 && before.n_slots_max > before.n_slots_min);
        uint64_t held = 0;
        assert_int_equal(kvs_session_evict(s, 80, NULL), KVS_OK);
        kvs_session_get_usage(s, &after);
        for (uint32_t h = 0; h < HEADS; h++)
            held += kvs_cache_n_live(s->cache, h / KV, h % KV);
        assert_true(held <= 80 * HEADS && held + HEADS >= 80 * HEADS - (i < 2 ? 80 * HEADS : 0));
        assert_int_equal(after.live_bytes, held * 2 * 32 * 2);
        assert_true(after.reserved_bytes < before.reserved_bytes);
        kvs_session_free(&s);
    }
}

/* ---- what the session records ----------------------------------------------------------------------------------- */

typedef struct seen {
    double sum[LAYERS];
} seen;

/* The definition: both states whole, then one cosine. */
static void watch(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows, kvs_forward_point point)
{
    seen *const x = ctx;
    const uint32_t n = model->info.n_embd;
    for (uint32_t r = 0; point == KVS_FORWARD_MIX && r < n_rows; r++) {
        const float *const before = f->x + (size_t)r * n, *const change = f->norm + (size_t)r * n;
        long double dot = 0, a = 0, b = 0;
        for (uint32_t i = 0; i < n; i++) {
            const long double y = (long double)before[i] + (long double)change[i];
            dot += before[i] * y;
            a += (long double)before[i] * before[i];
            b += y * y;
        }
        x->sum[layer] += (double)(dot / sqrtl(a * b));
    }
}

static void the_recorded_similarity_is_the_mean_cosine_and_no_chunking_shows(void **state)
{
    (void)state;
    static const char *const policy = "squeezeattention:keep=100tok +schedule=tokens:200";
    seen want = {0};
    kvs_session *plain = open_session(model, "baseline", SAID, 64), *s[4], *fork;
    model->forward->watch = (kvs_forward_watch){watch, &want};
    say(plain, 0, 150, NULL);
    model->forward->watch = (kvs_forward_watch){0};
    kvs_session_free(&plain);
    tiny_options o;
    fx_shape(&o, GGML_TYPE_F32);
    o.n_layers = LAYERS;
    kvs_model *const other = fx_open(&o, 1, 0);
    assert_non_null(other);
    static const uint32_t chunks[] = {1, 7, 64, 33};
    for (int i = 0; i < 4; i++) {
        s[i] = open_session(i == 3 ? other : model, policy, 600, chunks[i]);
        assert_null(kvs_query_log_mixed(&s[i]->queries));
        say(s[i], 0, 150, NULL);
        const double *const mean = kvs_query_log_mixed(&s[i]->queries);
        for (uint32_t l = 0; l < LAYERS; l++) {
            assert_true(fabs(mean[l] - want.sum[l] / 150) < 1e-13);
            assert_true(mean[l] == kvs_query_log_mixed(&s[0]->queries)[l]);
        }
    }
    /* together with others, then alone */
    kvs_run runs[2] = {{.session = s[0], .tokens = tokens + 150, .n_tokens = 400},
                       {.session = s[1], .tokens = tokens + 150, .n_tokens = 200}};
    assert_int_equal(kvs_step(runs, 2, NULL), KVS_OK);
    say(s[1], 350, 200, NULL);
    say(s[2], 150, 400, NULL);
    say(s[3], 150, 400, NULL);
    for (int i = 1; i < 4; i++)
        assert_memory_equal(s[i]->queries.mixed, s[0]->queries.mixed, LAYERS * sizeof(double));
    /* a fork and a save have it too */
    assert_int_equal(kvs_session_fork(s[2], NULL, &fork, NULL), KVS_OK);
    kvs_session *loaded = open_session(model, policy, 600, 64);
    kvs_error err = {0};
    assert_int_equal(fx_copy_by_save(s[2], loaded, &err), KVS_OK);
    float a[TINY_VOCAB_MIN], b[TINY_VOCAB_MIN], c[TINY_VOCAB_MIN];
    say(s[2], 550, 300, a);
    say(fork, 550, 300, b);
    say(loaded, 550, 300, c);
    assert_memory_equal(a, b, sizeof a);
    assert_memory_equal(a, c, sizeof a);
    assert_memory_equal(s[2]->queries.mixed, loaded->queries.mixed, LAYERS * sizeof(double));
    assert_int_equal(loaded->queries.n_mixed, 850);
    kvs_session_free(&fork);
    kvs_session_free(&loaded);
    for (int i = 0; i < 4; i++)
        kvs_session_free(&s[i]);
    kvs_model *m = other;
    kvs_model_close(&m);
}

/* A policy that looks at nothing, in a session whose heads hold different tokens: every head has its own scores. */
static void a_fork_of_uneven_heads_may_go_on_with_a_policy_that_looks_at_nothing(void **state)
{
    (void)state;
    kvs_session *s = open_session(model, "snapkv:window=8 +budget=ada", 200, 50), *fork;
    say(s, 0, 600, NULL);
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.policy = "streaming";
    o.budget_tokens = 400;
    o.arith = KVS_ARITH_F32;
    kvs_error err = {0};
    if (kvs_session_fork(s, &o, &fork, &err) != KVS_OK)
        fail_msg("%s", err.message);
    say(fork, 600, 300, NULL);
    assert_int_equal(kvs_session_evict(fork, 60, &err), KVS_OK);
    int32_t pos[400];
    for (uint32_t h = 0; h < HEADS; h++) {
        const uint32_t n = kvs_session_keep_set(fork, h / KV, h % KV, pos, NULL, 400);
        assert_int_equal(n, 60);
        for (uint32_t i = 0; i < 4; i++)
            assert_int_equal(pos[i], (int32_t)i);
        assert_int_equal(pos[n - 1], SAID - 1);
    }
    kvs_session_free(&fork);
    kvs_session_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shares_by_weight_are_in_proportion_and_sum_to_the_even_ones),
        cmocka_unit_test(equal_weights_give_the_even_shares),
        cmocka_unit_test(sensitivity_is_its_formula_where_no_bound_bites),
        cmocka_unit_test(lukv_takes_the_table_of_its_ratio),
        cmocka_unit_test(squeeze_takes_from_the_least_important_of_the_best_three_groups),
        cmocka_unit_test(streaming_heads_keep_sinks_and_recent_and_the_others_what_that_leaves),
        cmocka_unit_test(a_bad_profile_is_refused_with_what_is_wrong),
        cmocka_unit_test(the_echo_goes_round_and_holds_the_file_to_its_content),
        cmocka_unit_test(roles_of_one_kind_are_streaming_and_full),
        cmocka_unit_test(every_allocator_holds_its_budget_and_frees_what_it_drops),
        cmocka_unit_test(the_recorded_similarity_is_the_mean_cosine_and_no_chunking_shows),
        cmocka_unit_test(a_fork_of_uneven_heads_may_go_on_with_a_policy_that_looks_at_nothing),
    };
    return cmocka_run_group_tests_name("shares", tests, setup, teardown);
}

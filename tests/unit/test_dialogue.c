/* Dialogues of the benchmark: loaders against well-formed, malformed and hostile text, the chained dialogues' promises
 * (borders, determinism, independence of n_out) and the planted facts' promises (spans, one copy, no leaks). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "bench/dialogue.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef KVS_SOURCE_DIR
#define KVS_SOURCE_DIR "."
#endif

static kvs_dialogue_set parse_ok(const char *text)
{
    kvs_dialogue_set s = {0};
    kvs_error err = {0};
    const kvs_status status = kvs_dialogue_set_parse("t.json", text, strlen(text), false, &s, &err);
    if (status != KVS_OK)
        fail_msg("%s\n%s", text, err.message);
    return s;
}

static void assert_message(const kvs_dialogue *d, uint32_t i, const char *role, const char *content)
{
    assert_true(i < d->n_messages);
    assert_string_equal(d->messages[i].role, role);
    assert_string_equal(d->messages[i].content, content);
}

/* ---- loading ---- */

static void the_three_shapes_load_alike(void **state)
{
    (void)state;
    static const char *const texts[] = {
        "{\"id\": \"x\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, "
        "{\"role\": \"assistant\", \"content\": \"h\\u00e9\"}]}\n",
        "[{\"id\": \"x\", \"conversations\": [{\"from\": \"human\", \"value\": \"hi\"}, "
        "{\"from\": \"gpt\", \"value\": \"h\xc3\xa9\"}]}]",
        "\xef\xbb\xbf [\n{\"id\": \"x\",\n\"conversations\": [{\"from\": \"user\", \"value\": \"hi\"},\n"
        "{\"from\": \"assistant\", \"value\": \"h\xc3\xa9\"}]}\n]\n"};
    for (size_t i = 0; i < 3; i++) {
        kvs_dialogue_set s = parse_ok(texts[i]);
        assert_int_equal(s.n_items, 1);
        assert_string_equal(s.items[0].id, "x");
        assert_int_equal(s.items[0].n_messages, 2);
        assert_message(&s.items[0], 0, "user", "hi");
        assert_message(&s.items[0], 1, "assistant", "h\xc3\xa9");
        assert_true(s.items[0].has_assistant);
        kvs_dialogue_set_free(&s);
    }
    kvs_dialogue_set s = parse_ok("{\"question_id\": 81, \"turns\": [\"one\", \"two\"]}");
    assert_string_equal(s.items[0].id, "81");
    assert_int_equal(s.items[0].n_messages, 2); /* two turns with the model's answer between, not one message */
    assert_message(&s.items[0], 1, "user", "two");
    assert_false(s.items[0].has_assistant);
    kvs_dialogue_set_free(&s);
}

static void messages_are_normalised(void **state)
{
    (void)state;
    kvs_dialogue_set s = parse_ok(
        "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"assistant\", \"content\": \"lead\"}, "
        "{\"role\": \"assistant\", \"content\": \"still lead\"}, {\"role\": \"user\", \"content\": \"a\"}, "
        "{\"role\": \"assistant\", \"content\": \" \\n\"}, {\"role\": \"user\", \"content\": \"b\"}, "
        "{\"role\": \"assistant\", \"content\": \"c\"}]}\n"
        "{\"id\": \"all\", \"messages\": [{\"role\": \"assistant\", \"content\": \"nobody asked\"}]}\n");
    assert_int_equal(s.n_items, 1);
    assert_int_equal(s.n_leading_assistant, 2);
    assert_int_equal(s.n_without_user, 1);
    const kvs_dialogue *d = &s.items[0];
    assert_string_equal(d->id, "t.json:1");
    assert_int_equal(d->n_messages, 3);
    assert_message(d, 0, "system", "s");
    assert_message(d, 1, "user", "a\n\nb"); /* the blank answer between them is no answer */
    assert_message(d, 2, "assistant", "c");
    assert_int_equal(d->messages[1].source_idx, 3);
    assert_int_equal(d->messages[2].source_idx, 6);
    kvs_dialogue_set_free(&s);
    s = parse_ok("{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, "
                 "{\"role\": \"assistant\", \"content\": \"a\"}, {\"role\": \"system\", \"content\": \"t\"}, "
                 "{\"role\": \"assistant\", \"content\": \"b\"}, {\"role\": \"user\", \"content\": \"u\"}]}");
    assert_int_equal(s.items[0].n_messages, 2); /* a dropped message must not leave two system messages in a row */
    assert_message(&s.items[0], 0, "system", "s\n\nt");
    kvs_dialogue_set_free(&s);
}

#define GOOD "{\"id\": \"g\", \"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}"
static void malformed_text_names_line_and_cause(void **state)
{
    (void)state;
    static const struct {
        const char *text, *line, *cause;
    } bad[] = {
        {"", "line 1", "no dialogue"},
        {" \n [\n] ", "line 3", "no dialogue"},
        {"hello", "line 1", "has to be an object"},
        {GOOD "\n[1]\n", "line 2", "has to be an object"},
        {"[" GOOD ",\n 3]", "line 2", "has to be an object"},
        {"[" GOOD "\n", "line 2", "ends inside the array"},
        {"[" GOOD ",\n", "line 2", "ends after"},
        {"[" GOOD "\n" GOOD "]", "line 2", "expected between"},
        {"[" GOOD "]\n\nx", "line 3", "follows the closing"},
        {GOOD "\n{\"id\": \"x\"}", "line 2", "no \"messages\""},
        {GOOD "\n{\"messages\": 3}", "line 2", "is a number, not an array"},
        {"{\"messages\": []}", "line 1", "is empty"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \" \\n\"}]}", "line 1", "is empty"},
        {"{\"turns\": []}", "line 1", "is empty"},
        {"{\"turns\": [null]}", "line 1", "turn 0 is null"},
        {"{\"messages\": [\"x\"]}", "line 1", "message 0 is a string, not an object"},
        {"{\"messages\": [{\"content\": \"x\"}]}", "line 1", "has no \"role\""},
        {"{\"messages\": [{\"role\": \"user\"}]}", "line 1", "has no \"content\""},
        {"{\"conversations\": [{\"from\": \"gpt\"}]}", "line 1", "has no \"value\""},
        {"{\"messages\": [{\"role\": \"user\", \"content\": null}]}", "line 1", "\"content\" is null"},
        {"{\"messages\": [{\"role\": 7, \"content\": \"x\"}]}", "line 1", "\"role\" is a number"},
        {GOOD "\n" GOOD "\n{\"messages\": [{\"role\": \"tool\", \"content\": \"x\"}]}", "line 3", "role \"tool\""},
        {"{\"id\": [], \"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}", "line 1", "id is an array"},
        {GOOD "\n{\"messages\": [{\"role\": \"user\", \"content\": \"x\"", "line 2", "not JSON"},
        {GOOD "\n\n{\n\"messages\": [{\"role\": }]}", "line 4", "not JSON"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\\u0000b\"}]}", "line 1", "not JSON"},
        {"{\"messages\": [], \"messages\": []}", "line 1", "duplicate"},
        {GOOD "\n{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\"}]}", "line 2", "invalid UTF-8"},
        {GOOD "\n{\"messages\": [{\"role\": \"user\", \"content\": \"\\ud800\"}]}", "line 2", "not JSON"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvs_dialogue_set s = {0};
        kvs_error err = {0};
        const kvs_status status = kvs_dialogue_set_parse("bad.json", bad[i].text, strlen(bad[i].text), false, &s, &err);
        if (status != KVS_EFORMAT || !strstr(err.message, "bad.json") || !strstr(err.message, bad[i].line) ||
            !strstr(err.message, bad[i].cause) || strchr(err.message, '\n'))
            fail_msg("%s\n -> %d, \"%s\", wanted %s, %s", bad[i].text, status, err.message, bad[i].line, bad[i].cause);
        kvs_dialogue_set_free(&s);
    }
}

static void a_raw_nul_and_deep_nesting_are_refused(void **state)
{
    (void)state;
    static const char nul[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\0b\"}]}";
    kvs_dialogue_set s = {0};
    assert_int_equal(kvs_dialogue_set_parse("n", nul, sizeof nul - 1, false, &s, NULL), KVS_EFORMAT);
    static const char nul_first[] = "\0";
    assert_int_equal(kvs_dialogue_set_parse("n", nul_first, 1, false, &s, NULL), KVS_EFORMAT);
    const size_t depth = 100000;
    char *deep = malloc(2 * depth + 20);
    assert_non_null(deep);
    size_t n = (size_t)sprintf(deep, "{\"messages\": ");
    memset(deep + n, '[', depth);
    memset(deep + n + depth, ']', depth);
    deep[n + 2 * depth] = '}';
    assert_int_equal(kvs_dialogue_set_parse("n", deep, n + 2 * depth + 1, false, &s, NULL), KVS_EFORMAT);
    free(deep);
    kvs_dialogue_set_free(&s);
}

static void write_file(const char *folder, const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

static void folders_load_in_name_order_without_duplicates(void **state)
{
    (void)state;
    char root[] = "/tmp/kvs_dialogue_XXXXXX", inner[64], path[128];
    assert_non_null(mkdtemp(root));
    snprintf(inner, sizeof inner, "%s/sharegpt_subset", root);
    assert_int_equal(mkdir(inner, 0700), 0);
    kvs_dialogue_set s;
    kvs_error err;
    assert_int_equal(kvs_dialogue_set_load(inner, &s, &err), KVS_EINVAL); /* an empty folder is no set */

    write_file(inner, "b.jsonl",
               "{\"id\": \"b\", \"messages\": [{\"role\": \"user\", \"content\": \"two\"}]}\n" GOOD "\n");
    write_file(inner, "a.json",
               "[{\"id\": \"same words\", \"conversations\": [{\"from\": \"human\", \"value\": \"x\"}]}]");
    write_file(inner, "c.json", "{\"choices\": [], \"question_id\": 1}");
    write_file(inner, "d.json", "[]");
    write_file(inner, "e.txt", "not read at all");
    write_file(inner, "SOURCE.md", "# x\n- licence: MIT, really\n");
    if (kvs_dialogue_set_load(root, &s, &err) != KVS_OK)
        fail_msg("%s", err.message);
    assert_int_equal(s.n_items, 2);
    assert_string_equal(s.items[0].id, "same words");
    assert_string_equal(s.items[1].id, "b");
    assert_int_equal(s.n_duplicates, 1);
    assert_int_equal(s.n_files, 2);
    assert_string_equal(s.name, "sharegpt_subset");
    assert_string_equal(s.licence, "MIT, really");
    assert_non_null(strstr(s.notes, "c.json: skipped"));
    assert_non_null(strstr(s.notes, "d.json: skipped"));
    assert_null(strstr(s.notes, "e.txt"));
    const uint64_t hash = s.xxh64;
    kvs_dialogue_set_free(&s);

    write_file(inner, "c.json", "{\"choices\": [2]}"); /* skipped files are not part of the set's identity */
    assert_int_equal(kvs_dialogue_set_load(inner, &s, &err), KVS_OK);
    assert_true(s.xxh64 == hash);
    kvs_dialogue_set_free(&s);

    write_file(inner, "c.json", GOOD "\n{\"messages\": 1}"); /* a broken set is an error, not a skipped file */
    assert_int_equal(kvs_dialogue_set_load(inner, &s, &err), KVS_EFORMAT);
    assert_non_null(strstr(err.message, "c.json, line 2"));
    assert_null(s.items);
    snprintf(path, sizeof path, "%s/missing.jsonl", inner);
    assert_int_equal(kvs_dialogue_set_load(path, &s, &err), KVS_EIO);
    static const char *const names[] = {"a.json", "b.jsonl", "c.json", "d.json", "e.txt", "SOURCE.md"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", inner, names[i]);
        unlink(path);
    }
    rmdir(inner);
    rmdir(root);
}

static void json_out_reads_back(void **state)
{
    (void)state;
    kvs_facts_options opt;
    kvs_facts_options_default(&opt);
    kvs_dialogue d;
    assert_int_equal(kvs_dialogue_facts(&opt, 3, &d, NULL), KVS_OK);
    char *json = kvs_dialogue_json(&d);
    assert_non_null(json);
    assert_null(strchr(json, '\n'));
    assert_non_null(strstr(json, "\"gold\""));
    kvs_dialogue_set s = parse_ok(json);
    assert_string_equal(s.items[0].id, d.id);
    assert_int_equal(s.items[0].n_messages, d.n_messages);
    assert_true(kvs_dialogue_hash(&s.items[0]) == kvs_dialogue_hash(&d));
    free(json);
    kvs_dialogue_free(&d);
    kvs_dialogue_set_free(&s);
}

/* ---- embedded ---- */

static kvs_dialogue_set embedded_set(void)
{
    kvs_dialogue_set s;
    assert_int_equal(kvs_dialogue_set_embedded(&s, NULL), KVS_OK);
    return s;
}

static void embedded_dialogues_are_long_enough_and_alternate(void **state)
{
    (void)state;
    kvs_dialogue_set s = embedded_set();
    uint32_t n_words = 0;
    assert_int_equal(s.n_items, 12);
    for (uint32_t i = 0; i < s.n_items; i++) {
        const kvs_dialogue *d = &s.items[i];
        assert_in_range(d->n_messages, 8, 14);
        assert_int_equal(d->n_messages % 2, 0);
        for (uint32_t m = 0; m < d->n_messages; m++) {
            const char *text = d->messages[m].content;
            assert_string_equal(d->messages[m].role, m % 2 ? "assistant" : "user");
            const uint32_t n = kvs_dialogue_count_words(NULL, "user", text);
            assert_in_range(n, 30, 180);
            assert_int_equal(kvs_utf8_valid_prefix(text, strlen(text)), strlen(text));
            n_words += n;
        }
    }
    assert_true(n_words >= 9000);
    kvs_dialogue_set_free(&s);
}

/* ---- chained ---- */

static kvs_dialogue_set extend_ok(const kvs_dialogue_set *set, const kvs_extend_options *opt, uint32_t n_out)
{
    kvs_dialogue_set out;
    kvs_error err = {0};
    if (kvs_dialogue_extend(set, opt, kvs_dialogue_count_words, NULL, n_out, &out, &err) != KVS_OK)
        fail_msg("%s", err.message);
    assert_int_equal(out.n_items, n_out);
    return out;
}

static uint32_t count_all(const kvs_dialogue *d, uint32_t n_messages)
{
    uint32_t n = 0;
    for (uint32_t m = 0; m < n_messages; m++)
        n += kvs_dialogue_count_words(NULL, d->messages[m].role, d->messages[m].content);
    return n;
}

static void chains_reach_the_target_at_a_border_and_end_with_the_assistant(void **state)
{
    (void)state;
    kvs_dialogue_set s = embedded_set();
    uint32_t n_least = UINT32_MAX; /* words of the shortest exchange that a source begins with */
    for (uint32_t i = 0; i < s.n_items; i++)
        n_least = kvs_min_u32(n_least, count_all(&s.items[i], 2));
    for (uint32_t at_most = 0; at_most < 2; at_most++) {
        for (uint32_t target = 40; target < 14000; target = target * 3 / 2) {
            const kvs_extend_options opt = {
                .target_tokens = target, .seed = target, .at_most = at_most, .connector = true};
            kvs_dialogue_set out;
            kvs_error err;
            const kvs_status status = kvs_dialogue_extend(&s, &opt, kvs_dialogue_count_words, NULL, 3, &out, &err);
            assert_int_equal(status, at_most && target < n_least ? KVS_EINVAL : KVS_OK);
            for (uint32_t i = 0; i < out.n_items; i++) {
                const kvs_dialogue *d = &out.items[i];
                const uint32_t n = count_all(d, d->n_messages);
                assert_int_equal(d->n_messages % 2, 0);
                assert_string_equal(d->messages[d->n_messages - 1].role, "assistant");
                assert_true(d->messages[d->n_messages - 1].source_idx != KVS_DIALOGUE_GENERATED);
                assert_true(at_most ? n <= target : n >= target);
                if (!at_most) /* without the last exchange (and a connector before it) it was still short */
                    assert_true(count_all(d, d->n_messages - 2) < target);
            }
            kvs_dialogue_set_free(&out);
        }
    }
    kvs_dialogue_set_free(&s);
}

static void chained_messages_are_verbatim_and_no_source_repeats_early(void **state)
{
    (void)state;
    kvs_dialogue_set s = embedded_set();
    const kvs_extend_options opt = {.target_tokens = 2500, .seed = 5, .connector = true};
    kvs_dialogue_set out = extend_ok(&s, &opt, 4); /* 10,000 of the set's 12,058 words, whole sources: a bit more */
    uint32_t n_seen = 0, seen[64] = {0};
    for (uint32_t i = 0; i < out.n_items; i++) {
        const kvs_dialogue *d = &out.items[i];
        uint32_t last_part = UINT32_MAX;
        for (uint32_t m = 0; m < d->n_messages; m++) {
            const kvs_dialogue_message *got = &d->messages[m];
            if (got->source_idx == KVS_DIALOGUE_GENERATED) {
                assert_true(got->part > 0); /* a connector opens a part, never the dialogue */
                continue;
            }
            uint32_t source = 0;
            while (source < s.n_items && (got->source_idx >= s.items[source].n_messages ||
                                          strcmp(s.items[source].messages[got->source_idx].content, got->content) != 0))
                source++;
            assert_true(source < s.n_items);
            assert_non_null(strstr(d->id, s.items[source].id));
            if (got->part != last_part) {
                assert_int_equal(got->source_idx, 0); /* parts begin at the beginning */
                last_part = got->part;
                if (n_seen < s.n_items)
                    for (uint32_t k = 0; k < n_seen; k++)
                        assert_int_not_equal(seen[k], source);
                seen[n_seen++] = source;
            }
        }
    }
    assert_true(n_seen >= 10);
    kvs_dialogue_set_free(&out);
    kvs_dialogue_set_free(&s);
}

static void chain_i_depends_on_seed_and_i_only(void **state)
{
    (void)state;
    kvs_dialogue_set s = embedded_set();
    kvs_extend_options opt = {.target_tokens = 1500, .seed = 9};
    kvs_dialogue_set few = extend_ok(&s, &opt, 3), many = extend_ok(&s, &opt, 30);
    for (uint32_t i = 0; i < 3; i++) {
        assert_true(kvs_dialogue_hash(&few.items[i]) == kvs_dialogue_hash(&many.items[i]));
        assert_string_equal(few.items[i].id, many.items[i].id);
    }
    opt.seed = 10;
    kvs_dialogue_set other = extend_ok(&s, &opt, 3);
    uint32_t n_same = 0;
    for (uint32_t i = 0; i < 3; i++)
        n_same += kvs_dialogue_hash(&few.items[i]) == kvs_dialogue_hash(&other.items[i]);
    assert_true(n_same < 3);
    kvs_dialogue_set_free(&few);
    kvs_dialogue_set_free(&many);
    kvs_dialogue_set_free(&other);
    kvs_dialogue_set_free(&s);
}

static uint32_t count_nothing(void *ctx, const char *role, const char *content)
{
    (void)ctx, (void)role, (void)content;
    return 0;
}

static void chaining_refuses_what_would_never_end(void **state)
{
    (void)state;
    kvs_dialogue_set s = embedded_set(), out;
    kvs_error err;
    kvs_extend_options opt = {.target_tokens = 0};
    assert_int_equal(kvs_dialogue_extend(&s, &opt, kvs_dialogue_count_words, NULL, 1, &out, &err), KVS_EINVAL);
    opt.target_tokens = 100;
    assert_int_equal(kvs_dialogue_extend(&s, &opt, count_nothing, NULL, 1, &out, &err), KVS_EINVAL);
    opt = (kvs_extend_options){.target_tokens = 5, .at_most = true};
    assert_int_equal(kvs_dialogue_extend(&s, &opt, kvs_dialogue_count_words, NULL, 1, &out, &err), KVS_EINVAL);
    assert_null(out.items);
    kvs_dialogue_set_free(&s);
    s = parse_ok("{\"question_id\": 1, \"turns\": [\"a\", \"b\"]}");
    opt = (kvs_extend_options){.target_tokens = 5};
    assert_int_equal(kvs_dialogue_extend(&s, &opt, kvs_dialogue_count_words, NULL, 1, &out, &err), KVS_EINVAL);
    kvs_dialogue_set_free(&s);
}

/* ---- planted facts ---- */

static void no_planted_word_hides_in_another(void **state)
{
    (void)state;
    for (uint32_t k = 0; k < kvs_facts_max(); k++)
        for (uint32_t v = 0; kvs_facts_value(k, v); v++)
            for (uint32_t k2 = 0; k2 < kvs_facts_max(); k2++)
                for (uint32_t w = 0; kvs_facts_value(k2, w); w++) {
                    const char *value = kvs_facts_value(k, v);
                    if ((k != k2 || v != w) && strcasestr(kvs_facts_value(k2, w), value))
                        fail_msg("%s in %s", value, kvs_facts_value(k2, w));
                    if (strcasestr(kvs_facts_key(k2, w), value))
                        fail_msg("%s in key %s", value, kvs_facts_key(k2, w));
                    if (k == k2 && v != w && strcasestr(kvs_facts_key(k, v), kvs_facts_key(k, w)))
                        fail_msg("key %s twice", kvs_facts_key(k, w));
                }
}

static void assert_span(const kvs_dialogue *d, const kvs_dialogue_span *s, const char *value)
{
    assert_true(s->message_idx < d->n_messages);
    const char *text = d->messages[s->message_idx].content;
    assert_true(s->end_bytes <= strlen(text));
    assert_int_equal(s->end_bytes - s->start_bytes, strlen(value));
    assert_memory_equal(text + s->start_bytes, value, strlen(value));
}

static void check_fact(const kvs_dialogue *d, const kvs_dialogue_fact *f)
{
    assert_span(d, &f->told, f->gold);
    assert_span(d, &f->answer, f->gold);
    assert_string_equal(f->candidates[0], f->gold);
    assert_in_range(f->n_candidates, 5 + f->updated, 7 + f->updated);
    assert_string_equal(d->messages[f->question_idx].content, f->question);
    assert_string_equal(d->messages[f->question_idx].role, "user");
    assert_int_equal(f->answer.message_idx, f->question_idx + 1);
    assert_true(f->told.message_idx < f->question_idx);
    assert_int_equal(f->lag_messages, f->question_idx - f->told.message_idx);
    assert_int_equal(f->stale.end_bytes > f->stale.start_bytes, f->updated);
    if (f->updated) {
        assert_span(d, &f->stale, f->candidates[f->n_candidates - 1]);
        assert_true(f->stale.message_idx < f->told.message_idx);
    }
    for (uint32_t c = 0; c < f->n_candidates; c++) {
        uint32_t n_copies = 0; /* before the first question; each value is said once, by the user */
        for (uint32_t m = 0; m < f->question_idx; m++) {
            const char *role = d->messages[m].role, *text = d->messages[m].content;
            if (strcmp(role, "assistant") == 0 && f->repeat_idx > 0)
                continue; /* earlier answers hold the gold value by design */
            for (const char *at = text; (at = strcasestr(at, f->candidates[c])); at++, n_copies++)
                assert_string_equal(role, "user");
        }
        assert_int_equal(n_copies, 1);
        assert_null(strcasestr(f->question, f->candidates[c]));
        const char *answer = d->messages[f->answer.message_idx].content;
        assert_int_equal(strcasestr(answer, f->candidates[c]) != NULL, c == 0);
    }
}

static void planted_facts_keep_their_promises(void **state)
{
    (void)state;
    uint32_t n_updated = 0, n_place[KVS_FACT_PLACE_COUNT] = {0};
    for (uint32_t index = 0; index < 200; index++) {
        kvs_facts_options opt;
        kvs_facts_options_default(&opt);
        opt.seed = index / 7;
        opt.n_facts = 1 + index % kvs_facts_max();
        opt.n_repeats = 1 + index % 3;
        /* 8 facts told, 8 updates, 16 messages of confusers, 24 questions: 56 turns at the very most */
        opt.n_messages = 112 + 2 * (index % 11);
        opt.update_share = 0.5;
        kvs_dialogue d;
        kvs_error err = {0};
        if (kvs_dialogue_facts(&opt, index, &d, &err) != KVS_OK)
            fail_msg("%u: %s", index, err.message);
        assert_int_equal(d.n_messages, opt.n_messages);
        assert_int_equal(d.n_facts, opt.n_facts * opt.n_repeats);
        for (uint32_t m = 0; m < d.n_messages; m++)
            assert_string_equal(d.messages[m].role, m % 2 ? "assistant" : "user");
        for (uint32_t i = 0; i < d.n_facts; i++) {
            check_fact(&d, &d.facts[i]);
            n_updated += d.facts[i].updated;
            n_place[d.facts[i].place]++;
            const kvs_dialogue_span *first = d.facts[i].updated ? &d.facts[i].stale : &d.facts[i].told;
            if (opt.n_facts == 1 && d.facts[i].place == KVS_FACT_EARLY)
                assert_true(first->message_idx < opt.n_messages / 4);
            if (opt.n_facts == 1 && d.facts[i].place == KVS_FACT_LATE)
                assert_true(first->message_idx > opt.n_messages / 2);
        }
        kvs_dialogue_free(&d);
    }
    for (int i = 0; i < KVS_FACT_PLACE_COUNT; i++)
        assert_true(n_place[i] > 0);
    assert_true(n_updated > 0);
}

static void repeated_questions_come_two_turns_apart(void **state)
{
    (void)state;
    kvs_facts_options opt;
    kvs_facts_options_default(&opt);
    opt.n_repeats = 3;
    kvs_dialogue d;
    assert_int_equal(kvs_dialogue_facts(&opt, 0, &d, NULL), KVS_OK);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(d.facts[i].repeat_idx, i);
        assert_int_equal(d.facts[i].question_idx, d.facts[0].question_idx + 4 * i); /* turns k, k+2, k+4 */
    }
    kvs_dialogue_free(&d);
}

static void facts_depend_on_seed_and_index_only(void **state)
{
    (void)state;
    kvs_facts_options opt;
    kvs_facts_options_default(&opt);
    kvs_dialogue a, b, c;
    assert_int_equal(kvs_dialogue_facts(&opt, 7, &a, NULL), KVS_OK);
    assert_int_equal(kvs_dialogue_facts(&opt, 8, &c, NULL), KVS_OK);
    assert_int_equal(kvs_dialogue_facts(&opt, 7, &b, NULL), KVS_OK);
    assert_true(kvs_dialogue_hash(&a) == kvs_dialogue_hash(&b));
    assert_true(kvs_dialogue_hash(&a) != kvs_dialogue_hash(&c));
    kvs_dialogue_free(&c);
    opt.seed = 1;
    assert_int_equal(kvs_dialogue_facts(&opt, 7, &c, NULL), KVS_OK);
    assert_true(kvs_dialogue_hash(&a) != kvs_dialogue_hash(&c));
    kvs_dialogue_free(&a);
    kvs_dialogue_free(&b);
    kvs_dialogue_free(&c);
}

static void the_least_length_named_in_the_error_works(void **state)
{
    (void)state;
    for (uint64_t index = 0; index < 60; index++) {
        kvs_facts_options opt;
        kvs_facts_options_default(&opt);
        opt.n_facts = 1 + (uint32_t)index % kvs_facts_max();
        opt.n_messages = 2;
        opt.update_share = 0.7;
        kvs_dialogue d;
        kvs_error err;
        assert_int_equal(kvs_dialogue_facts(&opt, index, &d, &err), KVS_EINVAL);
        const char *least = strstr(err.message, "at least ");
        assert_non_null(least);
        opt.n_messages = (uint32_t)strtoul(least + 9, NULL, 10);
        assert_int_equal(kvs_dialogue_facts(&opt, index, &d, &err), KVS_OK);
        for (uint32_t i = 0; i < d.n_facts; i++)
            check_fact(&d, &d.facts[i]);
        kvs_dialogue_free(&d);
        opt.n_messages -= 2;
        assert_int_equal(kvs_dialogue_facts(&opt, index, &d, &err), KVS_EINVAL);
    }
}

static void bad_fact_options_are_refused(void **state)
{
    (void)state;
    kvs_facts_options good;
    kvs_facts_options_default(&good);
    kvs_dialogue_set users = parse_ok("{\"question_id\": 1, \"turns\": [\"a\", \"b\"]}");
    kvs_facts_options bad[] = {good, good, good, good, good, good, good, good};
    bad[0].n_facts = 0;
    bad[1].n_facts = kvs_facts_max() + 1;
    bad[2].n_repeats = 0;
    bad[3].n_repeats = 4;
    bad[4].update_share = -0.1;
    bad[5].update_share = 0.0 / 0.0;
    bad[6].n_messages = 41;
    bad[7].fillers = &users; /* nobody answers in it */
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvs_dialogue d;
        kvs_error err = {0};
        assert_int_equal(kvs_dialogue_facts(&bad[i], 0, &d, &err), KVS_EINVAL);
        assert_true(strlen(err.message) > 10);
        assert_null(d.messages);
    }
    kvs_dialogue_set_free(&users);
}

/* ---- real data ---- */

static bool load_data(const char *relative, kvs_dialogue_set *s)
{
    const char *root = getenv("KVASIR_DATA");
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", root ? root : KVS_SOURCE_DIR "/../shared/data", relative);
    if (access(path, R_OK) != 0) {
        print_message("%s is not there; set KVASIR_DATA to the data folder to run this test\n", path);
        return false;
    }
    kvs_error err = {0};
    if (kvs_dialogue_set_load(path, s, &err) != KVS_OK)
        fail_msg("%s", err.message);
    print_message(
        "%s: %u dialogues of %u files, %u duplicates, %u without user, %u lost a leading assistant message\n%s",
        relative, s->n_items, s->n_files, s->n_duplicates, s->n_without_user, s->n_leading_assistant, s->notes);
    return true;
}

/* Numbers of dialogues as the data folder's SOURCE.md files state them. */
static void real_sets_load_whole(void **state)
{
    (void)state;
    static const struct {
        const char *path;
        uint32_t n_dialogues, n_duplicates_min;
    } sets[] = {{"sharegpt_subset", 60 + 5 + 29 + 368 + 541 + 20, 60}, /* classic_60 is a part of long */
                {"oasst1_en_val/threads.jsonl", 188, 0},
                {"mt_bench", 80 + 80, 0}};
    uint32_t n_run = 0;
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        kvs_dialogue_set s;
        if (!load_data(sets[i].path, &s))
            continue;
        n_run++;
        assert_int_equal(s.n_items + s.n_duplicates + s.n_without_user, sets[i].n_dialogues);
        assert_true(s.n_duplicates >= sets[i].n_duplicates_min);
        for (uint32_t d = 0; d < s.n_items; d++)
            assert_string_equal(s.items[d].messages[0].role, "user");
        if (s.items[0].has_assistant) {
            const kvs_extend_options opt = {.target_tokens = 6000, .seed = 1, .at_most = true};
            kvs_dialogue_set out = extend_ok(&s, &opt, 5);
            for (uint32_t d = 0; d < out.n_items; d++)
                assert_true(count_all(&out.items[d], out.items[d].n_messages) <= 6000);
            kvs_dialogue_set_free(&out);
        }
        kvs_dialogue_set_free(&s);
    }
    if (!n_run)
        skip();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_three_shapes_load_alike),
        cmocka_unit_test(messages_are_normalised),
        cmocka_unit_test(malformed_text_names_line_and_cause),
        cmocka_unit_test(a_raw_nul_and_deep_nesting_are_refused),
        cmocka_unit_test(folders_load_in_name_order_without_duplicates),
        cmocka_unit_test(json_out_reads_back),
        cmocka_unit_test(embedded_dialogues_are_long_enough_and_alternate),
        cmocka_unit_test(chains_reach_the_target_at_a_border_and_end_with_the_assistant),
        cmocka_unit_test(chained_messages_are_verbatim_and_no_source_repeats_early),
        cmocka_unit_test(chain_i_depends_on_seed_and_i_only),
        cmocka_unit_test(chaining_refuses_what_would_never_end),
        cmocka_unit_test(no_planted_word_hides_in_another),
        cmocka_unit_test(planted_facts_keep_their_promises),
        cmocka_unit_test(repeated_questions_come_two_turns_apart),
        cmocka_unit_test(facts_depend_on_seed_and_index_only),
        cmocka_unit_test(the_least_length_named_in_the_error_works),
        cmocka_unit_test(bad_fact_options_are_refused),
        cmocka_unit_test(real_sets_load_whole),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

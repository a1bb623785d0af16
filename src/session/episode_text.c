/* A history as windows of utterances, as EpiCache's repository writes them (utils/cluster.py, arXiv:2509.17396). */
#include "session/episodes.h"

#include <string.h>

enum { LONG_CHARS = 500, SHORT_CHARS = 10 };

/* Writes, or with text NULL only counts. */
typedef struct sink {
    char *text;
    size_t *begin;
    size_t n_bytes;
    uint32_t per_window, n_utterances, n_windows;
} sink;

static void put(sink *s, const char *text, size_t n)
{
    if (s->text != NULL)
        memcpy(s->text + s->n_bytes, text, n);
    s->n_bytes += n;
}

static void put_utterance(sink *s, const char *speaker, const char *text, size_t n)
{
    if (s->n_utterances++ % s->per_window == 0) {
        if (s->begin != NULL)
            s->begin[s->n_windows] = s->n_bytes;
        s->n_windows++;
    }
    put(s, speaker, strlen(speaker));
    put(s, " said, \"", 8);
    put(s, text, n);
    put(s, "\"\n", 2);
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static size_t count_chars(const char *text, size_t n)
{
    size_t chars = 0;
    for (size_t i = 0; i < n; i++)
        chars += ((unsigned char)text[i] & 0xc0) != 0x80;
    return chars;
}

/* Bytes up to marks that end a sentence, which are followed by a blank or nothing; *skip: the marks. */
static size_t sentence_bytes(const char *text, size_t n, size_t *skip)
{
    for (size_t i = 0; i < n; i++) {
        size_t marks = 0;
        while (i + marks < n && strchr(".!?", text[i + marks]) != NULL)
            marks++;
        if (marks > 0 && (i + marks == n || is_space(text[i + marks]))) {
            *skip = marks;
            return i;
        }
        i += marks > 0 ? marks - 1 : 0;
    }
    *skip = 0;
    return n;
}

static void put_sentences(sink *s, const char *speaker, const char *text, size_t n)
{
    for (size_t at = 0; at < n;) {
        size_t skip, begin = at;
        size_t end = at + sentence_bytes(text + at, n - at, &skip);
        at = end + skip;
        while (begin < end && is_space(text[begin]))
            begin++;
        while (end > begin && is_space(text[end - 1]))
            end--;
        if (count_chars(text + begin, end - begin) > SHORT_CHARS)
            put_utterance(s, speaker, text + begin, end - begin);
    }
}

static void put_messages(sink *s, const kvs_message *messages, size_t n_messages)
{
    for (size_t i = 0; i < n_messages; i++) {
        const char *const text = messages[i].content;
        const size_t n = strlen(text);
        if (strcmp(messages[i].role, "user") == 0)
            put_utterance(s, "User", text, n);
        else if (strcmp(messages[i].role, "assistant") == 0 && count_chars(text, n) <= LONG_CHARS)
            put_utterance(s, "Assistant", text, n);
        else if (strcmp(messages[i].role, "assistant") == 0)
            put_sentences(s, "Assistant", text, n);
    }
    if (s->begin != NULL)
        s->begin[s->n_windows] = s->n_bytes;
}

kvs_status kvs_windows_make(const kvs_message *messages, size_t n_messages, uint32_t per_window,
                            const kvs_allocator *allocator, kvs_windows *out, kvs_error *err)
{
    sink count = {.per_window = per_window};
    *out = (kvs_windows){0};
    put_messages(&count, messages, n_messages);
    if (count.n_windows == 0)
        return kvs_error_set(err, KVS_EINVAL, "the history has no utterance of user or assistant to make episodes of");
    *out = (kvs_windows){.text = kvs_alloc(allocator, count.n_bytes + 1, 1),
                         .begin = kvs_alloc(allocator, (size_t)count.n_windows + 1, sizeof *out->begin),
                         .n = count.n_windows};
    if (out->text == NULL || out->begin == NULL) {
        kvs_windows_free(out, allocator);
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %u windows of the history", count.n_windows);
    }
    sink write = {.text = out->text, .begin = out->begin, .per_window = per_window};
    put_messages(&write, messages, n_messages);
    return KVS_OK;
}

void kvs_windows_free(kvs_windows *w, const kvs_allocator *allocator)
{
    kvs_free(allocator, w->text);
    kvs_free(allocator, w->begin);
    *w = (kvs_windows){0};
}

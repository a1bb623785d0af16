/* Conversations to tokens. A template is rendered to stretches of markup and of content; markup alone may become
 * control tokens, so nothing a person types forges a role. Text between two control tokens is tokenised as one piece,
 * which is what tokenising the whole rendered text does: the tokens are the same, and each knows whose it is.
 *
 * libllama has no jinja. Known templates are rows of a table, recognised by what their text contains; the rest go
 * through llama_chat_apply_template() with placeholders for the contents, where that keeps them apart. */
#include "model/chat_template.h"
#include "model/model.h"
#include "model/vocab.h"

#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- known templates -------------------------------------------------------------------------------------------- */

enum { MAX_MARKS = 8 };

typedef struct chat_style {
    const char *has[MAX_MARKS], *has_not[MAX_MARKS]; /* of the template's text */
    const char *default_system; /* content of a system message before a conversation that has none; NULL: none */
    bool bos, trim;             /* begins with BOS; strips ASCII white space around contents */
    const char *before_role, *after_role, *after_content;
} chat_style;

static const chat_style styles[] = {
    /* SmolLM2 Instruct, all sizes */
    {.has = {"<|im_start|>", "<|im_end|>", "messages[0]['role'] != 'system'",
             "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
     .has_not = {"tools", "trim", "strip"},
     .default_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
     .before_role = "<|im_start|>",
     .after_role = "\n",
     .after_content = "<|im_end|>\n"},
    /* Qwen2 Instruct and what was made from it */
    {.has = {"<|im_start|>", "<|im_end|>", "messages[0]['role'] != 'system'", "You are a helpful assistant"},
     .has_not = {"tools", "trim", "strip", "You are a helpful assistant named"},
     .default_system = "You are a helpful assistant.",
     .before_role = "<|im_start|>",
     .after_role = "\n",
     .after_content = "<|im_end|>\n"},
    /* chatml as OpenAI published it */
    {.has = {"<|im_start|>", "<|im_end|>", "message"},
     .has_not = {"tools", "trim", "strip", "You are", "think", "bos_token", "loop.first", "'system'"},
     .before_role = "<|im_start|>",
     .after_role = "\n",
     .after_content = "<|im_end|>\n"},
    /* Llama 3 Instruct; 3.1 and later add dates and tools */
    {.has = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "bos_token", "trim"},
     .has_not = {"tools", "Cutting Knowledge", "date_string"},
     .bos = true,
     .trim = true,
     .before_role = "<|start_header_id|>",
     .after_role = "<|end_header_id|>\n\n",
     .after_content = "<|eot_id|>"},
};

static const chat_style *find_style(const char *text)
{
    for (size_t i = 0; i < sizeof styles / sizeof *styles; i++) {
        bool fits = true;
        for (size_t k = 0; k < MAX_MARKS && styles[i].has[k] != NULL; k++)
            fits = fits && strstr(text, styles[i].has[k]) != NULL;
        for (size_t k = 0; k < MAX_MARKS && styles[i].has_not[k] != NULL; k++)
            fits = fits && strstr(text, styles[i].has_not[k]) == NULL;
        if (fits)
            return &styles[i];
    }
    return NULL;
}

/* ---- collecting tokens ------------------------------------------------------------------------------------------ */

typedef struct span {
    size_t end; /* bytes of plain up to here carry these flags */
    uint8_t flags;
} span;

typedef struct builder {
    const kvs_model *m;
    kvs_rendered *out;
    size_t cap_tokens;
    char *plain; /* text since the last control token */
    size_t n_plain, cap_plain;
    span *spans;
    size_t n_spans, cap_spans;
    size_t n_control; /* control tokens so far */
    kvs_error *err;
} builder;

static kvs_status no_memory(kvs_error *err)
{
    return kvs_error_set(err, KVS_ENOMEM, "no memory to render the conversation");
}

/* Room for n elements in *array; doubles. */
static bool grow(void **array, size_t *cap, size_t n, size_t each)
{
    if (n <= *cap)
        return true;
    size_t want = *cap < 64 ? 64 : *cap, bytes;
    while (want < n)
        want *= 2;
    if (!kvs_mul_size(want, each, &bytes))
        return false;
    void *p = realloc(*array, bytes);
    if (p == NULL)
        return false;
    *array = p;
    *cap = want;
    return true;
}

static kvs_status put_tokens(builder *b, const int32_t *tokens, size_t n)
{
    const size_t total = b->out->n_tokens + n;
    if (total > b->cap_tokens) {
        size_t cap_flags = b->cap_tokens;
        void *t = b->out->tokens, *f = b->out->flags;
        const bool ok = grow(&t, &b->cap_tokens, total, sizeof *tokens);
        b->out->tokens = t;
        const bool also = grow(&f, &cap_flags, total, 1);
        b->out->flags = f;
        if (!ok || !also)
            return no_memory(b->err);
    }
    memcpy(b->out->tokens + b->out->n_tokens, tokens, n * sizeof *tokens);
    memset(b->out->flags + b->out->n_tokens, KVS_TOKEN_TEMPLATE, n);
    b->out->n_tokens = total;
    return KVS_OK;
}

static kvs_status put_plain(builder *b, const char *text, size_t n_bytes, uint8_t flags)
{
    if (n_bytes == 0)
        return KVS_OK;
    void *p = b->plain, *s = b->spans;
    const bool ok = grow(&p, &b->cap_plain, b->n_plain + n_bytes, 1);
    b->plain = p;
    const bool also = grow(&s, &b->cap_spans, b->n_spans + 1, sizeof *b->spans);
    b->spans = s;
    if (!ok || !also)
        return no_memory(b->err);
    memcpy(b->plain + b->n_plain, text, n_bytes);
    b->n_plain += n_bytes;
    b->spans[b->n_spans++] = (span){.end = b->n_plain, .flags = flags};
    return KVS_OK;
}

/* A token that reaches over a border belongs to both sides. A tokenizer that puts a space before its text makes the
 * pieces longer than the text: the surplus is in front. */
static void flag_tokens(builder *b, size_t first)
{
    size_t total = 0;
    for (size_t i = first; i < b->out->n_tokens; i++)
        total += kvs_token_text(b->m, b->out->tokens[i], true, NULL, 0);
    size_t surplus = total > b->n_plain ? total - b->n_plain : 0;
    size_t begin = 0, s = 0;
    for (size_t i = first; i < b->out->n_tokens; i++) {
        size_t n = kvs_token_text(b->m, b->out->tokens[i], true, NULL, 0);
        const size_t cut = surplus < n ? surplus : n;
        surplus -= cut;
        n -= cut;
        while (s + 1 < b->n_spans && b->spans[s].end <= begin)
            s++;
        uint8_t flags = b->spans[s].flags;
        for (size_t k = s; k + 1 < b->n_spans && b->spans[k].end < begin + n; k++)
            flags |= b->spans[k + 1].flags;
        b->out->flags[i] = flags;
        begin += n;
    }
}

/* Tokenises text [n_bytes] into a fresh array. */
static kvs_status tokenize(const kvs_model *m, const char *text, size_t n_bytes, bool special, int32_t **tokens,
                           size_t *n_tokens, kvs_error *err)
{
    *tokens = malloc((n_bytes + 2) * sizeof **tokens); /* a token has at least a byte, and one may stand in front */
    if (*tokens == NULL)
        return no_memory(err);
    const kvs_status status = kvs_tokenize(m, text, n_bytes, false, special, *tokens, n_bytes + 2, n_tokens, err);
    if (status != KVS_OK) {
        free(*tokens);
        *tokens = NULL;
    }
    return status;
}

static kvs_status flush_plain(builder *b)
{
    if (b->n_plain == 0)
        return KVS_OK;
    int32_t *tokens;
    size_t n;
    KVS_TRY(tokenize(b->m, b->plain, b->n_plain, false, &tokens, &n, b->err));
    const size_t first = b->out->n_tokens;
    const kvs_status status = put_tokens(b, tokens, n);
    free(tokens);
    if (status == KVS_OK)
        flag_tokens(b, first);
    b->n_plain = 0;
    b->n_spans = 0;
    return status;
}

/* libllama finds user-defined tokens in plain text too, so a marker of that kind could be typed by anyone. */
static kvs_status refuse_forgeable(const builder *b, int32_t token)
{
    char text[64] = "";
    const size_t n = kvs_token_text(b->m, token, true, text, sizeof text - 1);
    if (!kvs_vocab_is_user_defined(b->m->vocab, token) || strspn(text, " \n\t\r") >= n)
        return KVS_OK;
    char shown[64];
    return kvs_error_set(
        b->err, KVS_EUNSUPPORTED,
        "template marker '%s' is a user-defined token, which plain text could forge; a control token is right",
        kvs_gguf_printable(text, strlen(text), shown));
}

/* Control tokens found in markup are put as such; the text around them is plain text of the template. */
static kvs_status put_markup(builder *b, const char *text)
{
    int32_t *tokens;
    size_t n;
    KVS_TRY(tokenize(b->m, text, strlen(text), true, &tokens, &n, b->err));
    kvs_status status = KVS_OK;
    const char *at = text;
    for (size_t i = 0; i < n && status == KVS_OK; i++) {
        if (!kvs_vocab_is_control(b->m->vocab, tokens[i])) {
            status = refuse_forgeable(b, tokens[i]);
            continue;
        }
        char name[128];
        const size_t n_name = kvs_token_text(b->m, tokens[i], true, name, sizeof name - 1);
        name[n_name < sizeof name ? n_name : sizeof name - 1] = '\0';
        const char *found = strstr(at, name);
        if (found == NULL)
            continue; /* not reached: the tokenizer found it there */
        status = put_plain(b, at, (size_t)(found - at), KVS_TOKEN_TEMPLATE);
        if (status == KVS_OK)
            status = flush_plain(b);
        if (status == KVS_OK)
            status = put_tokens(b, &tokens[i], 1);
        b->n_control++;
        at = found + n_name;
    }
    free(tokens);
    return status == KVS_OK ? put_plain(b, at, strlen(at), KVS_TOKEN_TEMPLATE) : status;
}

static kvs_status finish(builder *b, kvs_status status)
{
    if (status == KVS_OK)
        status = flush_plain(b);
    free(b->plain);
    free(b->spans);
    if (status != KVS_OK)
        kvs_rendered_free(b->out);
    return status;
}

/* ---- messages --------------------------------------------------------------------------------------------------- */

static uint8_t role_flags(const char *role)
{
    return strcmp(role, "user") == 0        ? KVS_TOKEN_USER
           : strcmp(role, "assistant") == 0 ? KVS_TOKEN_ASSISTANT
                                            : KVS_TOKEN_SYSTEM;
}

static kvs_status check_messages(const kvs_message *messages, size_t n, size_t n_from, kvs_error *err)
{
    if (n_from > n)
        return kvs_error_set(err, KVS_EINVAL, "n_from is %zu of %zu messages", n_from, n);
    for (size_t i = 0; i < n; i++) {
        const char *role = messages[i].role;
        if (role == NULL || messages[i].content == NULL)
            return kvs_error_set(err, KVS_EINVAL, "message %zu has no %s", i, role == NULL ? "role" : "content");
        /* The role stands between markers: only known words are let in there. */
        char shown[64];
        if (strcmp(role, "system") != 0 && strcmp(role, "user") != 0 && strcmp(role, "assistant") != 0)
            return kvs_error_set(err, KVS_EINVAL, "message %zu has role '%s'; system, user and assistant are right", i,
                                 kvs_gguf_printable(role, strlen(role), shown));
        const size_t n_bytes = strlen(messages[i].content);
        const size_t valid = kvs_utf8_valid_prefix(messages[i].content, n_bytes);
        if (valid != n_bytes)
            return kvs_error_set(err, KVS_EFORMAT, "message %zu: invalid UTF-8 at byte %zu of %zu (0x%02x)", i, valid,
                                 n_bytes, (unsigned)(unsigned char)messages[i].content[valid]);
    }
    return KVS_OK;
}

static kvs_status style_message(builder *b, const chat_style *s, const char *role, const char *content)
{
    size_t n = strlen(content);
    if (s->trim) {
        static const char space[] = " \t\n\r\v\f\x1c\x1d\x1e\x1f";
        const size_t skip = strspn(content, space);
        content += skip;
        n -= skip;
        while (n > 0 && strchr(space, content[n - 1]) != NULL)
            n--;
    }
    KVS_TRY(put_markup(b, s->before_role));
    KVS_TRY(put_plain(b, role, strlen(role), KVS_TOKEN_TEMPLATE));
    KVS_TRY(put_markup(b, s->after_role));
    KVS_TRY(put_plain(b, content, n, role_flags(role)));
    return put_markup(b, s->after_content);
}

static kvs_status style_opening(builder *b, const chat_style *s, const kvs_message *messages)
{
    const int32_t bos = kvs_token_bos(b->m);
    if (s->bos && bos >= 0)
        KVS_TRY(put_tokens(b, &bos, 1));
    if (s->default_system != NULL && strcmp(messages[0].role, "system") != 0)
        return style_message(b, s, "system", s->default_system);
    return KVS_OK;
}

static kvs_status render_style(builder *b, const chat_style *s, const kvs_message *messages, size_t n, size_t n_from,
                               bool add_generation)
{
    if (n_from == 0 && n > 0)
        KVS_TRY(style_opening(b, s, messages));
    for (size_t i = n_from; i < n; i++)
        KVS_TRY(style_message(b, s, messages[i].role, messages[i].content));
    if (!add_generation)
        return KVS_OK;
    KVS_TRY(put_markup(b, s->before_role));
    KVS_TRY(put_plain(b, "assistant", strlen("assistant"), KVS_TOKEN_TEMPLATE));
    return put_markup(b, s->after_role);
}

/* ---- templates libllama knows ------------------------------------------------------------------------------------ */

/* Stands for message i's content. Letters only, so no template trims or splits it. */
static void placeholder(size_t i, char text[40])
{
    snprintf(text, 40, "KvsContent%zuEnd", i);
}

static kvs_status unsupported(const kvs_model *m, const char *why, kvs_error *err)
{
    return kvs_error_set(err, KVS_EUNSUPPORTED, "%s: chat template: %s", m->info.path, why);
}

/* The rendering of messages [0, n) with placeholders, NUL-terminated; to be freed. */
static kvs_status apply(const kvs_model *m, const kvs_message *messages, size_t n, bool add_generation, char **text,
                        kvs_error *err)
{
    struct llama_chat_message *chat = calloc(n + 1, sizeof *chat);
    char(*contents)[40] = calloc(n + 1, sizeof *contents);
    const size_t cap = 4096 + n * 512; /* no template of libllama's adds more to a message */
    *text = calloc(cap, 1);
    kvs_status status = chat == NULL || contents == NULL || *text == NULL ? no_memory(err) : KVS_OK;
    if (status == KVS_OK) {
        for (size_t i = 0; i < n; i++) {
            placeholder(i, contents[i]);
            chat[i] = (struct llama_chat_message){.role = messages[i].role, .content = contents[i]};
        }
        const int32_t got =
            llama_chat_apply_template(kvs_model_chat_template(m), chat, n, add_generation, *text, (int32_t)cap - 1);
        if (got < 0 || (size_t)got >= cap)
            status = unsupported(m, "known neither to Kvasir nor to libllama", err);
        else
            (*text)[got] = '\0';
    }
    free(chat);
    free(contents);
    if (status != KVS_OK) {
        free(*text);
        *text = NULL;
    }
    return status;
}

/* Markup and contents in turn; at: where message n_from begins in the rendered text. */
static kvs_status put_applied(builder *b, char *at, const kvs_message *messages, size_t n, size_t n_from)
{
    for (size_t i = n_from; i < n; i++) {
        char name[40];
        placeholder(i, name);
        char *found = strstr(at, name);
        if (found == NULL || strstr(found + 1, name) != NULL)
            return unsupported(b->m, "it does not show each message once and in order", b->err);
        const size_t n_control = b->n_control;
        *found = '\0';
        KVS_TRY(put_markup(b, at));
        if (b->n_control == n_control)
            return unsupported(b->m, "no control token stands before each message, so plain text could forge one",
                               b->err);
        KVS_TRY(put_plain(b, messages[i].content, strlen(messages[i].content), role_flags(messages[i].role)));
        at = found + strlen(name);
    }
    return put_markup(b, at);
}

static kvs_status render_applied(builder *b, const kvs_message *messages, size_t n, size_t n_from, bool add_generation)
{
    char *whole = NULL, *before = NULL;
    KVS_TRY(apply(b->m, messages, n, add_generation, &whole, b->err));
    kvs_status status = KVS_OK;
    size_t skip = 0;
    if (n_from > 0) {
        status = apply(b->m, messages, n_from, false, &before, b->err);
        skip = status == KVS_OK ? strlen(before) : 0;
        if (status == KVS_OK && strncmp(whole, before, skip) != 0)
            status = unsupported(b->m, "a later message changes how earlier ones are shown", b->err);
    }
    if (status == KVS_OK)
        status = put_applied(b, whole + skip, messages, n, n_from);
    free(whole);
    free(before);
    return status;
}

/* ---- the two doors ---------------------------------------------------------------------------------------------- */

const char *kvs_model_chat_template(const kvs_model *m)
{
    return kvs_vocab_chat_template(m->vocab);
}

kvs_status kvs_chat_render(const kvs_model *m, const kvs_message *messages, size_t n_messages, size_t n_from,
                           bool add_generation, kvs_rendered *out, kvs_error *err)
{
    memset(out, 0, sizeof *out);
    KVS_TRY(check_messages(messages, n_messages, n_from, err));
    const char *text = kvs_model_chat_template(m);
    if (text == NULL)
        return unsupported(m, "the file has none (key tokenizer.chat_template)", err);
    builder b = {.m = m, .out = out, .err = err};
    const chat_style *s = find_style(text);
    return finish(&b, s != NULL ? render_style(&b, s, messages, n_messages, n_from, add_generation)
                                : render_applied(&b, messages, n_messages, n_from, add_generation));
}

kvs_status kvs_chat_turn_end(const kvs_model *m, kvs_rendered *out, kvs_error *err)
{
    memset(out, 0, sizeof *out);
    const char *text = kvs_model_chat_template(m);
    if (text == NULL)
        return unsupported(m, "the file has none (key tokenizer.chat_template)", err);
    builder b = {.m = m, .out = out, .err = err};
    const chat_style *s = find_style(text);
    if (s != NULL)
        return finish(&b, put_markup(&b, s->after_content));
    const kvs_message turn[] = {{"user", ""}, {"assistant", ""}};
    char *whole, name[40];
    KVS_TRY(apply(m, turn, 2, false, &whole, err));
    placeholder(1, name);
    const char *found = strstr(whole, name);
    const kvs_status status = found != NULL ? put_markup(&b, found + strlen(name))
                                            : unsupported(m, "it does not show the assistant's words", err);
    free(whole);
    return finish(&b, status);
}

void kvs_rendered_free(kvs_rendered *r)
{
    if (r == NULL)
        return;
    free(r->tokens);
    free(r->flags);
    memset(r, 0, sizeof *r);
}

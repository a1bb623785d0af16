/* Reads dialogue sets: ShareGPT arrays, JSONL messages, MT-Bench questions, files and folders. The files come from
 * anywhere, so every shape is checked and every refusal names file, line and cause. Objects are parsed one at a time,
 * which gives each its line number and keeps memory at the size of the largest. */
#include "bench/dialogue.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

typedef struct loader {
    const char *name; /* of the file, for messages */
    const char *bytes;
    size_t n_bytes, at;
    uint32_t line;              /* 1-based line of bytes[at] */
    uint32_t start;             /* line the current object starts on */
    bool has_user, has_leading; /* of the current dialogue: a user message was met; an assistant message before it */
    kvs_dialogue_set *set;
    kvs_error *err;
} loader;

/* jansson and file names may carry control bytes; a message is one line. */
static void one_line(char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == 0x7f)
            *text = '?';
}

__attribute__((format(printf, 3, 4))) static kvs_status refuse(const loader *l, uint32_t line, const char *fmt, ...)
{
    char what[256], name[128];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    snprintf(name, sizeof name, "%s", l->name);
    one_line(what);
    one_line(name);
    return kvs_error_set(l->err, KVS_EFORMAT, "%s, line %u: %s", name, line, what);
}

static kvs_status note(kvs_dialogue_set *s, kvs_error *err, const char *name, const char *what)
{
    const size_t n_old = s->notes ? strlen(s->notes) : 0, n_add = strlen(name) + strlen(what) + 4;
    char *notes = realloc(s->notes, n_old + n_add);
    if (!notes)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %zu bytes of notes", n_old + n_add);
    snprintf(notes + n_old, n_add, "%s: %s\n", name, what);
    s->notes = notes;
    return KVS_OK;
}

/* ---- one object ---- */

static const char *type_name(const json_t *v)
{
    static const char *const names[] = {"an object", "an array", "a string", "a number",
                                        "a number",  "true",     "false",    "null"};
    const size_t type = v ? (size_t)json_typeof(v) : sizeof names;
    return type < sizeof names / sizeof *names ? names[type] : "nothing";
}

static bool is_blank(const char *text)
{
    return text[strspn(text, " \t\r\n\v\f")] == '\0';
}

/* One element of "messages" or "conversations". */
static kvs_status add_message(loader *l, kvs_dialogue *d, const json_t *m, size_t idx, const char *role_key,
                              const char *text_key)
{
    if (!json_is_object(m))
        return refuse(l, l->start, "message %zu is %s, not an object with \"%s\" and \"%s\"", idx, type_name(m),
                      role_key, text_key);
    const json_t *role = json_object_get(m, role_key), *text = json_object_get(m, text_key);
    if (!role || !text)
        return refuse(l, l->start, "message %zu has no \"%s\"", idx, role ? text_key : role_key);
    if (!json_is_string(role) || !json_is_string(text)) {
        const bool role_bad = !json_is_string(role);
        return refuse(l, l->start, "message %zu: \"%s\" is %s, not a string", idx, role_bad ? role_key : text_key,
                      type_name(role_bad ? role : text));
    }
    const char *normal = kvs_dialogue_role(json_string_value(role));
    if (!normal)
        return refuse(l, l->start, "message %zu: unknown role \"%.40s\"; known are user, human, assistant, gpt, system",
                      idx, json_string_value(role));
    if (is_blank(json_string_value(text)))
        return KVS_OK;
    l->has_user |= strcmp(normal, "user") == 0;
    /* ShareGPT logs were split in chunks, so some begin in the middle with an answer whose question is missing. */
    if (!l->has_user && strcmp(normal, "assistant") == 0) {
        l->has_leading = true;
        return KVS_OK;
    }
    return kvs_dialogue_append(d, normal, json_string_value(text), (uint32_t)idx, true, l->err);
}

static kvs_status add_turns(loader *l, kvs_dialogue *d, const json_t *turns)
{
    size_t idx;
    json_t *turn;
    json_array_foreach (turns, idx, turn) {
        if (!json_is_string(turn))
            return refuse(l, l->start, "turn %zu is %s, not a string", idx, type_name(turn));
        if (is_blank(json_string_value(turn)))
            continue;
        l->has_user = true;
        KVS_TRY(kvs_dialogue_append(d, "user", json_string_value(turn), (uint32_t)idx, false, l->err));
    }
    return KVS_OK;
}

static kvs_status add_messages(loader *l, kvs_dialogue *d, const json_t *object)
{
    static const struct {
        const char *list, *role, *text;
    } shapes[] = {{"messages", "role", "content"}, {"conversations", "from", "value"}, {"turns", NULL, NULL}};
    size_t s = 0;
    while (s < 3 && !json_object_get(object, shapes[s].list))
        s++;
    if (s == 3)
        return refuse(l, l->start, "the object has no \"messages\", \"conversations\" or \"turns\"");
    const json_t *list = json_object_get(object, shapes[s].list);
    if (!json_is_array(list))
        return refuse(l, l->start, "\"%s\" is %s, not an array", shapes[s].list, type_name(list));
    if (json_array_size(list) >= UINT32_MAX)
        return refuse(l, l->start, "\"%s\" has %zu elements", shapes[s].list, json_array_size(list));
    if (!shapes[s].role)
        return add_turns(l, d, list);
    size_t idx;
    json_t *m;
    json_array_foreach (list, idx, m)
        KVS_TRY(add_message(l, d, m, idx, shapes[s].role, shapes[s].text));
    return KVS_OK;
}

static kvs_status set_id(loader *l, kvs_dialogue *d, const json_t *object)
{
    const json_t *id = json_object_get(object, "id");
    if (!id)
        id = json_object_get(object, "question_id");
    int rc;
    if (!id)
        rc = asprintf(&d->id, "%s:%u", l->name, l->start);
    else if (json_is_string(id))
        rc = asprintf(&d->id, "%s", json_string_value(id));
    else if (json_is_integer(id))
        rc = asprintf(&d->id, "%" JSON_INTEGER_FORMAT, json_integer_value(id));
    else
        return refuse(l, l->start, "the id is %s, not a string or an integer", type_name(id));
    if (rc < 0) {
        d->id = NULL; /* asprintf leaves it undefined */
        return kvs_error_set(l->err, KVS_ENOMEM, "no memory for the id of a dialogue");
    }
    if (asprintf(&d->origin, "%s:%u", l->name, l->start) < 0) {
        d->origin = NULL;
        return kvs_error_set(l->err, KVS_ENOMEM, "no memory for the origin of a dialogue");
    }
    return KVS_OK;
}

static kvs_status fill_dialogue(loader *l, kvs_dialogue *d, const json_t *object)
{
    l->has_user = l->has_leading = false;
    KVS_TRY(set_id(l, d, object));
    KVS_TRY(add_messages(l, d, object));
    if (d->n_messages == 0 && !l->has_leading)
        return refuse(l, l->start, "the dialogue \"%.60s\" is empty: no message holds more than white space", d->id);
    l->set->n_leading_assistant += l->has_leading;
    if (!l->has_user) {
        l->set->n_without_user++;
        return KVS_OK;
    }
    for (uint32_t i = 0; i < d->n_messages; i++)
        d->has_assistant |= strcmp(d->messages[i].role, "assistant") == 0;
    return kvs_dialogue_set_append(l->set, d, l->err);
}

/* ---- one file ---- */

static void skip_space(loader *l)
{
    while (l->at < l->n_bytes && strchr(" \t\r\n", l->bytes[l->at]) && l->bytes[l->at] != '\0')
        l->line += l->bytes[l->at++] == '\n';
}

/* Parses the object at l->at and moves past it. *out is NULL on error. */
static kvs_status next_object(loader *l, json_t **out)
{
    *out = NULL;
    l->start = l->line;
    if (l->bytes[l->at] != '{')
        return refuse(l, l->line, "a dialogue has to be an object, but here stands '%c'", l->bytes[l->at]);
    json_error_t e;
    json_t *object =
        json_loadb(l->bytes + l->at, l->n_bytes - l->at, JSON_DISABLE_EOF_CHECK | JSON_REJECT_DUPLICATES, &e);
    if (!object)
        return refuse(l, l->line + (e.line > 0 ? (uint32_t)e.line - 1 : 0), "not JSON: %s", e.text);
    for (const size_t end = l->at + (size_t)e.position; l->at < end; l->at++)
        l->line += l->bytes[l->at] == '\n';
    *out = object;
    return KVS_OK;
}

static bool looks_like_dialogue(const json_t *object)
{
    return json_object_get(object, "messages") || json_object_get(object, "conversations") ||
           json_object_get(object, "turns");
}

/* The separator between two objects: a comma inside an array, white space otherwise. *more says if one follows. */
static kvs_status next_separator(loader *l, bool array, bool first, bool *more)
{
    skip_space(l);
    *more = l->at < l->n_bytes;
    if (!array)
        return KVS_OK;
    if (!*more)
        return refuse(l, l->line, "the file ends inside the array; a ']' is missing");
    if (l->bytes[l->at] == ']') {
        l->at++;
        skip_space(l);
        *more = false;
        return l->at == l->n_bytes ? KVS_OK : refuse(l, l->line, "something follows the closing ']'");
    }
    if (first)
        return KVS_OK;
    if (l->bytes[l->at] != ',')
        return refuse(l, l->line, "',' or ']' expected between dialogues, not '%c'", l->bytes[l->at]);
    l->at++;
    skip_space(l);
    return l->at < l->n_bytes ? KVS_OK : refuse(l, l->line, "the file ends after a ','");
}

static kvs_status check_utf8(loader *l)
{
    const size_t n_valid = kvs_utf8_valid_prefix(l->bytes, l->n_bytes);
    if (n_valid == l->n_bytes)
        return KVS_OK;
    uint32_t line = 1;
    for (size_t i = 0; i < n_valid; i++)
        line += l->bytes[i] == '\n'; /* NOLINT(clang-analyzer-core.UndefinedBinaryOperatorResult): from fread */
    return refuse(l, line, "invalid UTF-8 at byte %zu of the file", n_valid);
}

static kvs_status parse_objects(loader *l, bool may_skip, bool *skipped)
{
    if (l->n_bytes >= 3 && memcmp(l->bytes, "\xef\xbb\xbf", 3) == 0)
        l->at = 3; /* byte order mark */
    skip_space(l);
    const bool array = l->at < l->n_bytes && l->bytes[l->at] == '[';
    l->at += array;
    bool more;
    for (bool first = true;; first = false) {
        KVS_TRY(next_separator(l, array, first, &more));
        if (!more) {
            *skipped = first && may_skip;
            return first && !may_skip ? refuse(l, l->line, "no dialogue in the file") : KVS_OK;
        }
        /* In a folder, JSON of another shape is somebody else's file; a broken dialogue set is an error. */
        if (first && may_skip && l->bytes[l->at] != '{') {
            *skipped = true;
            return KVS_OK;
        }
        json_t *object;
        KVS_TRY(next_object(l, &object));
        if (first && may_skip && !looks_like_dialogue(object)) {
            json_decref(object);
            *skipped = true;
            return KVS_OK;
        }
        kvs_dialogue d = {0};
        const kvs_status status = fill_dialogue(l, &d, object);
        json_decref(object);
        kvs_dialogue_free(&d);
        KVS_TRY(status);
    }
}

kvs_status kvs_dialogue_set_parse(const char *name, const char *bytes, size_t n_bytes, bool may_skip,
                                  kvs_dialogue_set *s, kvs_error *err)
{
    if (n_bytes > KVS_DIALOGUE_FILE_BYTES_MAX)
        return kvs_error_set(err, KVS_EFORMAT, "%.120s has %zu bytes; a dialogue file has at most %zu", name, n_bytes,
                             KVS_DIALOGUE_FILE_BYTES_MAX);
    loader l = {.name = name, .bytes = bytes, .n_bytes = n_bytes, .line = 1, .set = s, .err = err};
    bool skipped = false;
    KVS_TRY(check_utf8(&l));
    KVS_TRY(parse_objects(&l, may_skip, &skipped));
    if (skipped)
        return note(s, err, name, "skipped, it is no dialogue set");
    return KVS_OK;
}

static kvs_status read_whole(const char *path, char **out, size_t *n_out, kvs_error *err)
{
    *out = NULL;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0) {
        const int code = errno;
        if (fd >= 0)
            close(fd);
        return kvs_error_set(err, KVS_EIO, "cannot open %.200s: %s", path, strerror(code));
    }
    kvs_status status = KVS_OK;
    char *bytes = NULL;
    size_t n = 0;
    if (!S_ISREG(st.st_mode))
        status = kvs_error_set(err, KVS_EIO, "%.200s is not a regular file", path);
    else if ((uint64_t)st.st_size > KVS_DIALOGUE_FILE_BYTES_MAX)
        status = kvs_error_set(err, KVS_EFORMAT, "%.200s has %lld bytes; a dialogue file has at most %zu", path,
                               (long long)st.st_size, KVS_DIALOGUE_FILE_BYTES_MAX);
    else if (!(bytes = malloc((size_t)st.st_size + 1)))
        status = kvs_error_set(err, KVS_ENOMEM, "no memory for the %lld bytes of %.200s", (long long)st.st_size, path);
    while (status == KVS_OK && n < (size_t)st.st_size) {
        const ssize_t got = read(fd, bytes + n, (size_t)st.st_size - n);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            status = kvs_error_set(err, KVS_EIO, "cannot read %.200s: %s", path, strerror(errno));
        if (got <= 0)
            break;
        n += (size_t)got;
    }
    close(fd);
    if (status != KVS_OK) {
        free(bytes);
        return status;
    }
    *out = bytes;
    *n_out = n;
    return KVS_OK;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static kvs_status load_file(const char *path, bool may_skip, XXH64_state_t *hash, kvs_dialogue_set *s, kvs_error *err)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    KVS_TRY(read_whole(path, &bytes, &n_bytes, err));
    const uint32_t n_before = s->n_items + s->n_without_user;
    const kvs_status status = kvs_dialogue_set_parse(base_name(path), bytes, n_bytes, may_skip, s, err);
    if (status == KVS_OK && s->n_items + s->n_without_user > n_before) { /* skipped files are not part of the set */
        XXH64_update(hash, bytes, n_bytes);
        s->n_bytes += n_bytes;
        s->n_files++;
    }
    free(bytes);
    return status;
}

/* ---- folders ---- */

static bool has_suffix(const char *text, const char *suffix)
{
    const size_t n = strlen(text), m = strlen(suffix);
    return n >= m && strcmp(text + n - m, suffix) == 0;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void free_names(char **names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(names[i]);
    free(names);
}

/* Names of the folder's *.json and *.jsonl, sorted by byte so that the order is the same in every locale. */
static kvs_status list_folder(const char *path, char ***out, size_t *n_out, kvs_error *err)
{
    DIR *dir = opendir(path);
    if (!dir)
        return kvs_error_set(err, KVS_EIO, "cannot open folder %.200s: %s", path, strerror(errno));
    char **names = NULL;
    size_t n = 0;
    bool ok = true;
    for (struct dirent *e; ok && (e = readdir(dir));) {
        if (e->d_name[0] == '.' || !(has_suffix(e->d_name, ".json") || has_suffix(e->d_name, ".jsonl")))
            continue;
        char **grown = realloc(names, (n + 1) * sizeof *names);
        if (grown)
            names = grown;
        ok = grown && (names[n] = strdup(e->d_name));
        n += ok;
    }
    closedir(dir);
    if (!ok) {
        free_names(names, n);
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the names in %.200s", path);
    }
    if (n)
        qsort(names, n, sizeof *names, by_name);
    *out = names;
    *n_out = n;
    return KVS_OK;
}

static kvs_status load_folder(const char *path, XXH64_state_t *hash, kvs_dialogue_set *s, kvs_error *err)
{
    char **names = NULL;
    size_t n = 0;
    KVS_TRY(list_folder(path, &names, &n, err));
    kvs_status status = KVS_OK;
    for (size_t i = 0; i < n && status == KVS_OK; i++) {
        char *file = NULL;
        if (asprintf(&file, "%s/%s", path, names[i]) < 0) {
            status = kvs_error_set(err, KVS_ENOMEM, "no memory for a path in %.200s", path);
            break;
        }
        status = load_file(file, true, hash, s, err);
        free(file);
    }
    free_names(names, n);
    if (status == KVS_OK && s->n_files == 0)
        status = kvs_error_set(err, KVS_EINVAL,
                               "%.200s holds no dialogue set (*.json or *.jsonl with messages, "
                               "conversations or turns)",
                               path);
    return status;
}

/* The "- licence:" line of the SOURCE.md that lies beside the data. A missing one is no error. */
static char *read_licence(const char *folder)
{
    char *file = NULL, *found = NULL, *line = NULL;
    if (asprintf(&file, "%s/SOURCE.md", folder) < 0)
        return strdup("unknown");
    FILE *f = fopen(file, "re");
    free(file);
    size_t cap = 0;
    static const char key[] = "- licence: ";
    while (f && !found && getline(&line, &cap, f) > 0) {
        line[strcspn(line, "\r\n")] = '\0';
        const bool is_text = kvs_utf8_valid_prefix(line, strlen(line)) == strlen(line);
        if (is_text && strncmp(line, key, sizeof key - 1) == 0)
            found = strdup(line + sizeof key - 1);
    }
    free(line);
    if (f)
        fclose(f);
    return found ? found : strdup("unknown");
}

/* The folder to read for a path: itself, its sharegpt_subset, or (for a file) the one it lies in. */
static kvs_status resolve(const char *path, bool *is_folder, char **read_path, char **folder, kvs_error *err)
{
    struct stat st;
    if (stat(path, &st) != 0)
        return kvs_error_set(err, KVS_EIO, "cannot open %.200s: %s", path, strerror(errno));
    *is_folder = S_ISDIR(st.st_mode);
    char *inner = NULL;
    if (asprintf(&inner, "%s/sharegpt_subset", path) < 0)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the path %.200s", path);
    if (*is_folder && stat(inner, &st) == 0 && S_ISDIR(st.st_mode)) {
        *read_path = inner;
    } else {
        free(inner);
        *read_path = strdup(path);
    }
    if (*read_path) {
        char *end = *read_path + strlen(*read_path);
        while (*is_folder && end > *read_path + 1 && end[-1] == '/')
            *--end = '\0';
        const char *slash = strrchr(*read_path, '/');
        if (*is_folder || (slash && slash == *read_path))
            *folder = strdup(*is_folder ? *read_path : "/");
        else
            *folder = slash ? strndup(*read_path, (size_t)(slash - *read_path)) : strdup(".");
    }
    if (!*read_path || !*folder)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the path %.200s", path);
    return KVS_OK;
}

static kvs_status load_path(const char *path, kvs_dialogue_set *s, XXH64_state_t *hash, char **folder, kvs_error *err)
{
    bool is_folder = false;
    KVS_TRY(resolve(path, &is_folder, &s->path, folder, err));
    s->name = strdup(base_name(s->path));
    s->licence = read_licence(*folder);
    s->notes = strdup("");
    if (!s->name || !s->licence || !s->notes)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the description of %.200s", path);
    KVS_TRY(is_folder ? load_folder(s->path, hash, s, err) : load_file(s->path, false, hash, s, err));
    s->xxh64 = XXH64_digest(hash);
    KVS_TRY(kvs_dialogue_set_dedup(s, err));
    char what[96];
    if (s->n_duplicates) {
        snprintf(what, sizeof what, "%u dialogues dropped, their words were loaded before", s->n_duplicates);
        KVS_TRY(note(s, err, s->name, what));
    }
    if (s->n_without_user) {
        snprintf(what, sizeof what, "%u dialogues dropped, no user message in them", s->n_without_user);
        KVS_TRY(note(s, err, s->name, what));
    }
    return KVS_OK;
}

kvs_status kvs_dialogue_set_load(const char *path, kvs_dialogue_set *out, kvs_error *err)
{
    memset(out, 0, sizeof *out);
    XXH64_state_t *hash = XXH64_createState();
    if (!hash)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for a hash state");
    XXH64_reset(hash, 0);
    char *folder = NULL;
    const kvs_status status = load_path(path, out, hash, &folder, err);
    free(folder);
    XXH64_freeState(hash);
    if (status != KVS_OK)
        kvs_dialogue_set_free(out);
    return status;
}

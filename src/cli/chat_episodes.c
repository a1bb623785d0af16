/* kvasir chat --episodes: questions about a recorded conversation, each answered on the cache of the nearest episode.
 * A saved one is a line "KVASIR-EPISODES1 sha256-of-the-model" and the library's own save behind it.
 */
#include "cli/cli.h"
#include "cli/line_input.h"

#include "bench/dialogue.h"
#include "model/model.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char magic[] = "KVASIR-EPISODES1 ";

typedef struct chat {
    const kvs_cli_args *args;
    kvs_model *m;
    kvs_episodes *e;
    kvs_sampling sampling;
    float *sensitivity; /* NULL: layers share alike */
    char path[4096];    /* empty: not saved */
    kvs_cli_progress progress;
    bool tty_in;
} chat;

/* ---- files ------------------------------------------------------------------------------------------------------ */

static kvs_status save(const chat *c, const char *path, kvs_error *err)
{
    size_t n;
    char head[128];
    KVS_TRY(kvs_episodes_save(c->e, NULL, 0, &n, err));
    void *const body = malloc(n);
    if (body == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory to save %zu bytes", n);
    snprintf(head, sizeof head, "%s%s\n", magic, kvs_model_sha256(c->m));
    kvs_status status = kvs_episodes_save(c->e, body, n, &n, err);
    if (status == KVS_OK)
        status = kvs_cli_write_file(path, head, strlen(head), body, n, err);
    free(body);
    return status;
}

static kvs_status read_saved(chat *c, const char *bytes, size_t n_bytes, kvs_error *err)
{
    const char *const sha = kvs_model_sha256(c->m);
    const size_t n_magic = sizeof magic - 1, n_head = n_magic + strlen(sha) + 1;
    if (n_bytes < n_head || memcmp(bytes, magic, n_magic) != 0)
        return kvs_error_set(err, KVS_EFORMAT, "%s does not hold episodes: it does not begin with %s", c->path, magic);
    if (memcmp(bytes + n_magic, sha, strlen(sha)) != 0)
        return kvs_error_set(err, KVS_EFORMAT,
                             "%s was saved with another model (sha256 %.12s..., this one has %.12s...)", c->path,
                             bytes + n_magic, sha);
    kvs_error cause;
    const kvs_status status = kvs_episodes_load(c->m, NULL, bytes + n_head, n_bytes - n_head, &c->e, &cause);
    return status == KVS_OK ? status : kvs_error_set(err, status, "%s: %s", c->path, cause.message);
}

static kvs_status load(chat *c, kvs_error *err)
{
    char *bytes;
    size_t n_bytes;
    KVS_TRY(kvs_cli_read_file(c->path, &bytes, &n_bytes, err));
    const kvs_status status = read_saved(c, bytes, n_bytes, err);
    free(bytes);
    KVS_TRY(status);
    kvs_episodes_usage u;
    kvs_episodes_get_usage(c->e, &u);
    const uint32_t k = c->args->episodes.items[0];
    if (c->args->keep_turns && !u.keep_turns)
        return kvs_error_set(err, KVS_EINVAL, "session %s drops its turns: --keep-turns is for a new one",
                             c->args->session);
    if (k != u.n_episodes)
        return kvs_error_set(err, KVS_EINVAL, "session %s has %u episodes, not %u", c->args->session, u.n_episodes, k);
    return KVS_OK;
}

/* ---- making ----------------------------------------------------------------------------------------------------- */

static bool on_progress(void *ctx, uint32_t episode, uint64_t n_done, uint64_t n_total)
{
    (void)episode;
    kvs_cli_progress_show(&((chat *)ctx)->progress, n_done, n_total, -1);
    return kvs_cli_interrupted == 0;
}

static kvs_status make(chat *c, const kvs_dialogue *d, kvs_error *err)
{
    const kvs_cli_args *const args = c->args;
    kvs_session_options as;
    kvs_cli_session_options(args, KVS_ARITH_NATIVE, &as);
    kvs_episodes_options o;
    kvs_episodes_options_default(&o);
    o.n_episodes = args->episodes.items[0];
    o.uniform_heads = args->uniform_heads;
    o.keep_turns = args->keep_turns;
    o.budget_bytes = as.budget_bytes;
    o.budget_tokens = as.budget_tokens;
    o.position = kvs_cli_last(&args->positions, NULL);
    o.kv_type = as.kv_type;
    o.arith = as.arith;
    o.seed = as.seed;
    o.on_progress = on_progress;
    o.ctx = c;
    o.sensitivity = c->sensitivity;
    kvs_message *const messages = calloc(d->n_messages + 1, sizeof *messages);
    if (messages == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %u messages", d->n_messages);
    uint32_t n = d->n_messages;
    for (uint32_t i = 0; i < n; i++)
        messages[i] = (kvs_message){d->messages[i].role, d->messages[i].content};
    while (n > 0 && strcmp(messages[n - 1].role, "assistant") != 0)
        n--; /* a last message without an answer is not history yet */
    kvs_cli_progress_begin(&c->progress, "prefill: tokens");
    const kvs_status status = kvs_episodes_create(c->m, &o, messages, n, &c->e, err);
    kvs_cli_progress_end(&c->progress);
    free(messages);
    return status;
}

static kvs_status make_from_file(chat *c, kvs_error *err)
{
    const kvs_cli_args *const args = c->args;
    if (args->dialogue == NULL)
        return kvs_error_set(err, KVS_EINVAL, "--episodes needs a history to cut up: --dialogue FILE%s",
                             args->session != NULL ? ", for this session is new" : "");
    kvs_dialogue_set set;
    KVS_TRY(kvs_dialogue_set_load(args->dialogue, &set, err));
    const kvs_status status =
        args->index < set.n_items
            ? make(c, &set.items[args->index], err)
            : kvs_error_set(err, KVS_EINVAL, "%s has %u dialogues; --index %u is over that (the first is 0)",
                            args->dialogue, set.n_items, args->index);
    kvs_dialogue_set_free(&set);
    return status;
}

static kvs_status open_episodes(chat *c, kvs_error *err)
{
    const kvs_cli_args *const args = c->args;
    if (args->session != NULL) {
        char leaf[300];
        snprintf(leaf, sizeof leaf, "sessions/%s.kve", args->session);
        if (!kvs_cli_xdg_path("XDG_STATE_HOME", ".local/state", leaf, c->path, sizeof c->path))
            return kvs_error_set(err, KVS_EIO, "--session needs a home folder: set HOME or XDG_STATE_HOME");
        if (access(c->path, F_OK) == 0)
            return args->dialogue == NULL && args->budgets.n == 0 && args->sensitivity == NULL
                       ? load(c, err)
                       : kvs_error_set(err, KVS_EINVAL,
                                       "session %s has its history and budget: --dialogue, --budget and --sensitivity "
                                       "are for a new one",
                                       args->session);
    }
    KVS_TRY(make_from_file(c, err));
    return c->path[0] != '\0' ? save(c, c->path, err) : KVS_OK;
}

/* ---- talking ---------------------------------------------------------------------------------------------------- */

static void print_usage(const chat *c)
{
    kvs_episodes_usage u;
    kvs_episodes_get_usage(c->e, &u);
    printf(
        "%u episodes, all in memory: %.2f MiB now, %.2f MiB at most so far, budget %.2f MiB (%.2f MiB of it planned);\n"
        "each keeps %u slots a head; one working room of %u slots a head. Scratch outside the budget: %.2f MiB\n",
        u.n_episodes, kvs_cli_mib(u.kv_bytes), kvs_cli_mib(u.kv_bytes_peak), kvs_cli_mib(u.budget_bytes),
        kvs_cli_mib(u.reserved_bytes), u.share_tokens, u.work_tokens, kvs_cli_mib(u.scratch_bytes));
}

/* The beginning of what speaks for each. */
static void print_episodes(const chat *c)
{
    kvs_episode_info info;
    for (uint32_t i = 0; kvs_episodes_get_info(c->e, i, &info); i++) {
        char text[161];
        size_t n = 0;
        for (uint32_t w = 0; w < info.n_words && n < sizeof text - 1; w++) {
            const size_t size = kvs_token_text(c->m, info.words[w], false, text + n, sizeof text - 1 - n);
            n = n + size < sizeof text - 1 ? n + size : sizeof text - 1;
        }
        n = kvs_utf8_valid_prefix(text, n);
        for (size_t k = 0; k < n; k++)
            text[k] = text[k] == '\n' ? ' ' : text[k];
        printf("%u: %u windows, %u speak for it (%u tokens): %.*s...\n", i, info.n_windows, info.n_medoids,
               info.n_words, (int)n, text);
    }
}

static bool on_token(void *ctx, int32_t token, const char *bytes, size_t n_bytes)
{
    (void)ctx;
    (void)token;
    fwrite(bytes, 1, n_bytes, stdout);
    return fflush(stdout) == 0 && kvs_cli_interrupted == 0;
}

static kvs_status answer(chat *c, const char *line, kvs_error *err)
{
    kvs_generation g = {0};
    uint32_t episode;
    kvs_episodes_usage u;
    kvs_episodes_get_usage(c->e, &u);
    KVS_TRY(kvs_episodes_turn(c->e, line, &c->sampling, on_token, NULL, &g, &episode, err));
    printf("\n[episode %u%s%s]\n", episode, u.keep_turns ? "" : " · turn dropped",
           g.stop != NULL && strcmp(g.stop, "cancelled") == 0 ? " · stopped" : "");
    return c->path[0] != '\0' && u.keep_turns ? save(c, c->path, err) : KVS_OK;
}

static kvs_status command(const chat *c, const char *line, bool *quit, kvs_error *err)
{
    if (strcmp(line, "/quit") == 0)
        *quit = true;
    else if (strcmp(line, "/usage") == 0)
        print_usage(c);
    else if (strcmp(line, "/episodes") == 0)
        print_episodes(c);
    else if (strncmp(line, "/save ", 6) == 0)
        return save(c, line + 6, err);
    else if (strcmp(line, "/help") == 0)
        printf("  /episodes   what each is about\n  /usage      memory of all of them\n  /save FILE  write them to a "
               "file\n  /quit       leave (also Ctrl-D)\nCtrl-C stops an answer; at the prompt, it leaves.\n");
    else
        return kvs_error_set(err, KVS_EINVAL, "unknown command %.40s; /help lists them", line);
    return KVS_OK;
}

static int loop(chat *c)
{
    kvs_line_input *const input = kvs_line_input_open(c->tty_in);
    if (input == NULL)
        return kvs_cli_failure("no memory for line editing");
    int code = KVS_EXIT_OK;
    for (bool quit = false; !quit && code == KVS_EXIT_OK;) {
        const char *line = NULL;
        kvs_error err = {0};
        kvs_cli_interrupted = 0;
        const kvs_line_result got = kvs_line_input_read(input, &line);
        if (got == KVS_LINE_INTERRUPTED)
            code = KVS_EXIT_INTERRUPTED;
        if (got != KVS_LINE_OK)
            break;
        if (line[strspn(line, " \t")] == '\0')
            continue;
        const kvs_status status = line[0] == '/' ? command(c, line, &quit, &err) : answer(c, line, &err);
        if (status != KVS_OK)
            fprintf(stderr, "kvasir chat: %s\n", err.message);
        if (status != KVS_OK && !c->tty_in)
            code = KVS_EXIT_FAILURE; /* a script wants to know */
        if (ferror(stdout))
            code = kvs_cli_failure("stdout cannot be written");
    }
    kvs_line_input_close(input);
    return code;
}

int kvs_chat_episodes(const kvs_cli_args *args, const kvs_sampling *sampling)
{
    if (args->episodes.n != 1)
        return kvs_cli_usage_error(args->command, "--episodes takes one number in a chat, not %u", args->episodes.n);
    if (args->policies.n > 0 || args->system != NULL || args->paper_compat)
        return kvs_cli_usage_error(args->command,
                                   "--episodes has its own policy and history: no --policy, --system, --paper-compat");
    kvs_error err = {0};
    chat c = {.args = args, .sampling = *sampling, .tty_in = isatty(STDIN_FILENO) != 0};
    kvs_cli_catch_interrupts();
    kvs_status status = kvs_cli_open_model(args, &c.m, &err);
    if (status == KVS_OK)
        status = kvs_cli_sensitivity(args, c.m, &c.sensitivity, &err);
    if (status == KVS_OK)
        status = open_episodes(&c, &err);
    int code;
    if (status == KVS_OK) {
        if (c.tty_in)
            print_usage(&c);
        code = loop(&c);
    } else {
        code = kvs_cli_report(args, &err);
    }
    if (status == KVS_ECANCELLED && kvs_cli_interrupted > 0)
        code = KVS_EXIT_INTERRUPTED;
    kvs_episodes_free(&c.e);
    free(c.sensitivity);
    kvs_model_close(&c.m);
    return code;
}

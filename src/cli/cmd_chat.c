/* kvasir chat: a conversation in the terminal. The loop, the /commands and the status line; reading a line is in
 * line_input.c, pictures in view.c, files in saved_session.c.
 */
#include "cli/cli.h"
#include "cli/line_input.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct chat {
    const kvs_cli_args *args;
    kvs_model *m;
    kvs_session *s;
    kvs_session_options opt; /* how s was made; its strings are below */
    char policy[512], position[32];
    kvs_sampling sampling;
    char session_path[4096]; /* empty: not saved */
    char *last_user;         /* for /regen */
    uint64_t before_last;    /* tokens said before it */
    uint64_t n_retries;      /* of the last answer: each draws from another seed */
    bool tty_in, dim;        /* the status line is dim on a terminal */
} chat;

static void say(const chat *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(const chat *c, const char *fmt, ...)
{
    va_list list;
    va_start(list, fmt);
    fputs(c->dim ? "\033[2m" : "", stdout);
    vprintf(fmt, list);
    fputs(c->dim ? "\033[0m\n" : "\n", stdout);
    va_end(list);
}

/* ---- one answer ------------------------------------------------------------------------------------------------- */

static bool on_token(void *ctx, int32_t token, const char *bytes, size_t n_bytes)
{
    (void)ctx;
    (void)token;
    fwrite(bytes, 1, n_bytes, stdout);
    return fflush(stdout) == 0 && kvs_cli_interrupted == 0;
}

static void print_status(const chat *c, const kvs_generation *g, uint64_t n_evictions_before,
                         const kvs_cli_held *before)
{
    kvs_usage u;
    kvs_health h;
    kvs_session_get_usage(c->s, &u);
    kvs_session_get_health(c->s, &h);
    char evicted[400] = "";
    const uint64_t n_events = u.n_evictions - n_evictions_before;
    if (n_events > 0) {
        char ranges[200];
        kvs_cli_held after;
        uint64_t n_lost = 0;
        ranges[0] = '\0';
        if (before->n_heads != NULL && kvs_cli_held_read(c->m, c->s, &after, NULL) == KVS_OK) {
            n_lost = kvs_cli_held_lost(before, &after, 3, ranges, sizeof ranges);
            kvs_cli_held_free(&after);
        }
        if (n_lost > 0)
            snprintf(evicted, sizeof evicted, " · %llu eviction%s: tokens %s gone", (unsigned long long)n_events,
                     n_events > 1 ? "s" : "", ranges);
        else
            snprintf(evicted, sizeof evicted, " · %llu eviction%s: every token still held by some head",
                     (unsigned long long)n_events, n_events > 1 ? "s" : "");
    }
    char worst[64] = "";
    if (h.score < 99.95 && h.worst != NULL && h.worst[0] != '\0')
        snprintf(worst, sizeof worst, " (%s)", h.worst);
    say(c, "[%llu tokens · %u/%llu slots · %.1f/%.1f MiB · health %.0f%s%s · %.1f tok/s%s]",
        (unsigned long long)kvs_session_n_tokens(c->s), u.n_slots_max, (unsigned long long)u.budget_tokens,
        kvs_cli_mib(u.kv_bytes), kvs_cli_mib(u.budget_bytes), h.score, worst, evicted,
        g->tpot_ms > 0 ? 1000 / g->tpot_ms : 0.0,
        g->stop != NULL && strcmp(g->stop, "cancelled") == 0 ? " · stopped" : "");
}

static void save_if_named(const chat *c)
{
    kvs_error err;
    if (c->session_path[0] != '\0' && kvs_cli_snapshot_save(c->session_path, c->m, c->s, &c->opt, &err) != KVS_OK)
        fprintf(stderr, "kvasir chat: the session is not saved: %s\n", err.message);
}

static kvs_status answer(chat *c, const char *user, kvs_error *err)
{
    kvs_usage u;
    kvs_cli_held before = {0};
    kvs_generation g = {0};
    kvs_session_get_usage(c->s, &u);
    (void)kvs_cli_held_read(c->m, c->s, &before, NULL); /* without it the status line only lacks the ranges */
    c->before_last = kvs_session_n_tokens(c->s);
    kvs_cli_interrupted = 0;
    kvs_sampling params = c->sampling;
    params.seed += c->n_retries;
    const kvs_status status = kvs_chat_turn(c->s, user, c->args->system, &params, on_token, NULL, &g, err);
    kvs_cli_interrupted = 0;
    putchar('\n');
    if (status == KVS_OK || status == KVS_ECANCELLED) {
        print_status(c, &g, u.n_evictions, &before);
        save_if_named(c);
    }
    kvs_cli_held_free(&before);
    return status == KVS_ECANCELLED ? KVS_OK : status;
}

static kvs_status answer_to(chat *c, const char *user, kvs_error *err)
{
    char *const copy = strdup(user);
    free(c->last_user);
    c->last_user = copy;
    c->n_retries = 0;
    return answer(c, user, err);
}

/* ---- /commands -------------------------------------------------------------------------------------------------- */

static kvs_status cmd_help(chat *c, const char *word, kvs_error *err);

/* The strings of opt that must outlive the command line move into the chat. */
static void adopt(chat *c, const kvs_session_options *opt)
{
    c->opt = *opt;
    snprintf(c->policy, sizeof c->policy, "%s", opt->policy != NULL ? opt->policy : "baseline");
    snprintf(c->position, sizeof c->position, "%s", opt->position != NULL ? opt->position : "");
    c->opt.policy = c->policy;
    c->opt.position = c->position[0] != '\0' ? c->position : NULL;
}

static kvs_status fork_onto(chat *c, const kvs_session_options *opt, kvs_error *err)
{
    kvs_session *fork = NULL;
    KVS_TRY(kvs_session_fork(c->s, opt, &fork, err));
    kvs_session_free(&c->s);
    c->s = fork;
    const kvs_session_options copy = *opt; /* opt may point into what adopt overwrites */
    char policy[512], position[32];
    snprintf(policy, sizeof policy, "%s", copy.policy != NULL ? copy.policy : "baseline");
    snprintf(position, sizeof position, "%s", copy.position != NULL ? copy.position : "");
    kvs_session_options next = copy;
    next.policy = policy;
    next.position = position[0] != '\0' ? position : NULL;
    adopt(c, &next);
    return KVS_OK;
}

static void show_policy(const chat *c)
{
    kvs_usage u;
    kvs_session_get_usage(c->s, &u);
    say(c, "policy %s, position %s, budget %llu slots a head, %.2f MiB", kvs_session_policy(c->s),
        kvs_position_name(kvs_session_position(c->s)), (unsigned long long)u.budget_tokens,
        kvs_cli_mib(u.budget_bytes));
}

static kvs_status cmd_policy(chat *c, const char *word, kvs_error *err)
{
    if (word[0] != '\0') {
        kvs_session_options opt = c->opt;
        opt.policy = word;
        KVS_TRY(kvs_policy_check(word, err));
        KVS_TRY(fork_onto(c, &opt, err));
    }
    show_policy(c);
    return KVS_OK;
}

static kvs_status cmd_budget(chat *c, const char *word, kvs_error *err)
{
    if (word[0] != '\0') {
        kvs_cli_size size;
        KVS_TRY(kvs_cli_parse_size(word, &size, err));
        kvs_session_options opt = c->opt;
        opt.budget_bytes = size.bytes;
        opt.budget_tokens = size.tokens;
        KVS_TRY(fork_onto(c, &opt, err));
    }
    show_policy(c);
    return KVS_OK;
}

static kvs_status cmd_position(chat *c, const char *word, kvs_error *err)
{
    if (word[0] != '\0') {
        kvs_session_options opt = c->opt;
        opt.position = word;
        KVS_TRY(fork_onto(c, &opt, err));
    }
    show_policy(c);
    return KVS_OK;
}

static kvs_status cmd_health(chat *c, const char *word, kvs_error *err)
{
    (void)word;
    (void)err;
    kvs_cli_print_health(c->s, stdout);
    return KVS_OK;
}

static kvs_status cmd_usage(chat *c, const char *word, kvs_error *err)
{
    (void)word;
    (void)err;
    kvs_cli_print_usage(c->s, stdout);
    return KVS_OK;
}

static kvs_status cmd_keep(chat *c, const char *word, kvs_error *err)
{
    (void)word;
    (void)err;
    kvs_cli_print_keep_map(c->m, c->s, stdout);
    return KVS_OK;
}

static kvs_status cmd_evict(chat *c, const char *word, kvs_error *err)
{
    char *end;
    const unsigned long n = word[0] >= '0' && word[0] <= '9' ? strtoul(word, &end, 10) : 0;
    if (word[0] != '\0' && (word[0] < '0' || word[0] > '9' || *end != '\0' || n == 0 || n > INT32_MAX))
        return kvs_error_set(err, KVS_EINVAL, "/evict takes a number of tokens to keep in every head, not '%s'", word);
    KVS_TRY(kvs_session_evict(c->s, (uint32_t)n, err));
    kvs_usage u;
    kvs_session_get_usage(c->s, &u);
    say(c, "now %u to %u slots a head, %.2f MiB", u.n_slots_min, u.n_slots_max, kvs_cli_mib(u.kv_bytes));
    save_if_named(c);
    return KVS_OK;
}

static kvs_status cmd_save(chat *c, const char *word, kvs_error *err)
{
    if (word[0] == '\0')
        return kvs_error_set(err, KVS_EINVAL, "/save needs a file name");
    KVS_TRY(kvs_cli_snapshot_save(word, c->m, c->s, &c->opt, err));
    say(c, "saved to %s", word);
    return KVS_OK;
}

static kvs_status load(chat *c, const char *path, kvs_error *err)
{
    kvs_session *loaded = NULL;
    kvs_cli_snapshot head;
    kvs_session_options opt;
    KVS_TRY(kvs_cli_snapshot_load(path, c->m, &head, &opt, &loaded, err));
    kvs_session_free(&c->s);
    c->s = loaded;
    opt.ffn_skip = NULL; /* head's text ends here; the session has its own, and so have its forks */
    adopt(c, &opt);
    free(c->last_user);
    c->last_user = NULL;
    return KVS_OK;
}

static kvs_status cmd_load(chat *c, const char *word, kvs_error *err)
{
    if (word[0] == '\0')
        return kvs_error_set(err, KVS_EINVAL, "/load needs a file name");
    KVS_TRY(load(c, word, err));
    say(c, "loaded %s: %llu tokens", word, (unsigned long long)kvs_session_n_tokens(c->s));
    save_if_named(c);
    return KVS_OK;
}

static kvs_status cmd_regen(chat *c, const char *word, kvs_error *err)
{
    (void)word;
    if (c->last_user == NULL)
        return kvs_error_set(err, KVS_EINVAL, "/regen: no answer of this sitting to repeat");
    KVS_TRY(kvs_session_truncate(c->s, c->before_last, err));
    c->n_retries++;
    char *const user = strdup(c->last_user);
    if (user == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the message");
    const kvs_status status = answer(c, user, err);
    free(user);
    return status;
}

static kvs_status cmd_new(chat *c, const char *word, kvs_error *err)
{
    (void)word;
    kvs_session *fresh = NULL;
    KVS_TRY(kvs_session_create(c->m, &c->opt, &fresh, err));
    kvs_session_free(&c->s);
    c->s = fresh;
    free(c->last_user);
    c->last_user = NULL;
    say(c, "a new conversation");
    save_if_named(c);
    return KVS_OK;
}

static const struct {
    const char *name, *operand, *doc;
    kvs_status (*run)(chat *c, const char *word, kvs_error *err);
} commands[] = {
    {"/help", "", "this list", cmd_help},
    {"/policy", "[SPEC]", "show or change the cache policy; the conversation goes on", cmd_policy},
    {"/budget", "[SIZE]", "show or change the cap, e.g. 64MiB or 1024tok", cmd_budget},
    {"/position", "[MODE]", "show or change what happens to positions", cmd_position},
    {"/health", "", "how close the next answer should be to the full cache's", cmd_health},
    {"/usage", "", "memory of the cache in its parts", cmd_usage},
    {"/keep", "", "map of what is held", cmd_keep},
    {"/evict", "[N]", "evict now, to N tokens in every head", cmd_evict},
    {"/save", "FILE", "write the session to a file", cmd_save},
    {"/load", "FILE", "go on with a saved session", cmd_load},
    {"/regen", "", "take the last answer back and ask again", cmd_regen},
    {"/new", "", "forget everything and begin again", cmd_new},
    {"/quit", "", "leave (also Ctrl-D)", NULL},
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static kvs_status cmd_help(chat *c, const char *word, kvs_error *err)
{
    (void)c;
    (void)word;
    (void)err;
    for (size_t i = 0; i < N_COMMANDS; i++)
        printf("  %-9s %-7s %s\n", commands[i].name, commands[i].operand, commands[i].doc);
    printf("Ctrl-C stops an answer; at the prompt, twice leaves.\n");
    return KVS_OK;
}

/* *quit is set by /quit; an error of a command is told and the conversation goes on. */
static bool command(chat *c, const char *line, bool *quit)
{
    const char *names[N_COMMANDS];
    const size_t n_name = strcspn(line, " \t");
    const char *const word = line + n_name + strspn(line + n_name, " \t");
    for (size_t i = 0; i < N_COMMANDS; i++) {
        names[i] = commands[i].name;
        if (strlen(commands[i].name) != n_name || memcmp(line, commands[i].name, n_name) != 0)
            continue;
        if (commands[i].run == NULL) {
            *quit = true;
            return true;
        }
        kvs_error err = {0};
        if (commands[i].run(c, word, &err) == KVS_OK)
            return true;
        printf("%s\n", err.message);
        return false;
    }
    char name[48];
    snprintf(name, sizeof name, "%.*s", (int)(n_name < 40 ? n_name : 40), line);
    const char *const near = kvs_nearest(name, names, N_COMMANDS);
    printf("unknown command %s%s%s; /help lists them\n", name, near != NULL ? "; did you mean " : "",
           near != NULL ? near : "");
    return false;
}

/* ---- the loop --------------------------------------------------------------------------------------------------- */

static int loop(chat *c)
{
    kvs_line_input *const input = kvs_line_input_open(c->tty_in);
    if (input == NULL)
        return kvs_cli_failure("no memory for line editing");
    int code = KVS_EXIT_OK;
    bool quit = false, asked = false;
    while (!quit && code == KVS_EXIT_OK) {
        const char *line = NULL;
        kvs_cli_interrupted = 0;
        const kvs_line_result got = kvs_line_input_read(input, &line);
        if (got == KVS_LINE_INTERRUPTED) {
            if (asked || !c->tty_in) {
                code = KVS_EXIT_INTERRUPTED;
                break;
            }
            asked = true;
            printf("\n/quit leaves; Ctrl-C again too\n");
            continue;
        }
        asked = false;
        if (got == KVS_LINE_END)
            break;
        if (line[strspn(line, " \t")] == '\0')
            continue;
        kvs_error err = {0};
        if (line[0] == '/') {
            const bool good = command(c, line, &quit);
            if (!good && !c->tty_in)
                code = KVS_EXIT_FAILURE; /* a script wants to know */
        } else if (answer_to(c, line, &err) != KVS_OK) {
            fprintf(stderr, "kvasir chat: %s\n", err.message);
            if (!c->tty_in)
                code = KVS_EXIT_FAILURE;
        }
        if (ferror(stdout))
            code = kvs_cli_failure("stdout cannot be written");
    }
    if (c->tty_in && !quit)
        putchar('\n');
    kvs_line_input_close(input);
    return code;
}

static kvs_status open_named(chat *c, const kvs_session_options *wanted, kvs_error *err)
{
    const kvs_cli_args *const args = c->args;
    KVS_TRY(load(c, c->session_path, err));
    /* The file's options hold unless the command line says otherwise. */
    kvs_session_options opt = c->opt;
    if (args->policies.n > 0)
        opt.policy = wanted->policy;
    if (args->positions.n > 0)
        opt.position = wanted->position;
    if (args->budgets.n > 0) {
        opt.budget_bytes = wanted->budget_bytes;
        opt.budget_tokens = wanted->budget_tokens;
    }
    if (kvs_cli_given(args, "seed"))
        opt.seed = wanted->seed;
    opt.ffn_skip = wanted->ffn_skip;
    if (args->policies.n + args->positions.n + args->budgets.n > 0 || kvs_cli_given(args, "seed") ||
        opt.ffn_skip != NULL)
        KVS_TRY(fork_onto(c, &opt, err));
    say(c, "session %s: %llu tokens so far", args->session, (unsigned long long)kvs_session_n_tokens(c->s));
    return KVS_OK;
}

static kvs_status open_session(chat *c, kvs_error *err)
{
    const kvs_cli_args *const args = c->args;
    kvs_session_options opt;
    kvs_cli_session_options(args, KVS_ARITH_NATIVE, &opt);
    if (args->policies.n == 0) {
        opt.policy = "streaming"; /* with a budget of the window: a chat that never dies */
        if (args->positions.n == 0)
            opt.position = "rerotate";
    }
    if (args->session != NULL) {
        char leaf[300];
        snprintf(leaf, sizeof leaf, "sessions/%s.kvs", args->session);
        if (!kvs_cli_xdg_path("XDG_STATE_HOME", ".local/state", leaf, c->session_path, sizeof c->session_path))
            return kvs_error_set(err, KVS_EIO, "--session needs a home folder: set HOME or XDG_STATE_HOME");
        if (access(c->session_path, F_OK) == 0)
            return open_named(c, &opt, err);
    }
    adopt(c, &opt);
    return kvs_session_create(c->m, &c->opt, &c->s, err);
}

static void greet(const chat *c)
{
    kvs_model_info info;
    kvs_usage u;
    kvs_model_get_info(c->m, &info);
    kvs_session_get_usage(c->s, &u);
    say(c, "%s on %u threads (%s); policy %s, position %s; the cache holds %llu tokens in %.1f MiB. /help",
        info.name != NULL && info.name[0] != '\0' ? info.name : info.path, info.n_threads, info.isa, c->policy,
        kvs_position_name(kvs_session_position(c->s)), (unsigned long long)u.budget_tokens,
        kvs_cli_mib(u.budget_bytes));
}

/* A session name becomes a file name. */
static bool name_is_plain(const char *name)
{
    const size_t n = strlen(name);
    return n <= 200 && name[0] != '.' &&
           strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == n;
}

int kvs_cmd_chat(const kvs_cli_args *args)
{
    if (args->json)
        return kvs_cli_usage_error(args->command, "a conversation has no --json; use `kvasir run --chat --json`");
    if (args->session != NULL && !name_is_plain(args->session))
        return kvs_cli_usage_error(args->command, "--session: '%s' is not a name of letters, digits, '.', '_' and '-'",
                                   args->session);
    kvs_error err = {0};
    chat c = {.args = args, .tty_in = isatty(STDIN_FILENO) != 0};
    c.dim = isatty(STDOUT_FILENO) != 0;
    kvs_cli_sampling(args, &c.sampling);
    if (!kvs_cli_given(args, "n-tokens"))
        c.sampling.max_tokens = 1024;
    if (args->episodes.n > 0)
        return kvs_chat_episodes(args, &c.sampling);
    if (args->dialogue != NULL)
        return kvs_cli_usage_error(args->command, "--dialogue is the history that --episodes K cuts up: give K");
    kvs_status status = kvs_cli_open_model(args, &c.m, &err);
    if (status == KVS_OK)
        status = open_session(&c, &err);
    int code;
    if (status == KVS_OK) {
        kvs_cli_catch_interrupts();
        if (c.tty_in)
            greet(&c);
        code = loop(&c);
    } else {
        code = kvs_cli_report(args, &err);
    }
    free(c.last_user);
    kvs_session_free(&c.s);
    kvs_model_close(&c.m);
    return code;
}

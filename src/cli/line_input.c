/* libedit with history. Its own reader retries after a signal, so characters come through a reader of ours that gives
 * up when Ctrl-C came; that is what lets the prompt ask before it leaves.
 */
#include "cli/line_input.h"

#include "cli/cli.h"

#include <errno.h>
#include <histedit.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <wchar.h>

enum { HISTORY_LINES = 1000 };

struct kvs_line_input {
    EditLine *edit;
    History *history;
    char history_path[4096]; /* empty: no home */
    char *line;              /* of getline, or a copy of libedit's line without its newline */
    size_t cap_bytes;
};

static char *prompt(EditLine *edit)
{
    static char text[] = "> ";
    (void)edit;
    return text;
}

static int read_char(EditLine *edit, wchar_t *out)
{
    (void)edit;
    mbstate_t state;
    memset(&state, 0, sizeof state);
    for (;;) {
        if (kvs_cli_interrupted > 0)
            return -1;
        struct pollfd fd = {.fd = STDIN_FILENO, .events = POLLIN};
        /* The limit closes the gap between looking at the flag and waiting. */
        const int ready = poll(&fd, 1, 200);
        if (ready < 0 && errno != EINTR)
            return -1;
        if (ready <= 0)
            continue;
        char byte;
        const ssize_t n = read(STDIN_FILENO, &byte, 1);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n <= 0)
            return (int)n;
        const size_t used = mbrtowc(out, &byte, 1, &state);
        if (used == (size_t)-2)
            continue; /* the first bytes of a longer character */
        if (used == (size_t)-1) {
            memset(&state, 0, sizeof state); /* a byte that is no text in this locale is left out */
            continue;
        }
        return 1;
    }
}

static bool open_editor(kvs_line_input *in)
{
    in->edit = el_init("kvasir", stdin, stdout, stderr);
    in->history = history_init();
    if (in->edit == NULL || in->history == NULL)
        return false;
    HistEvent event;
    history(in->history, &event, H_SETSIZE, HISTORY_LINES);
    history(in->history, &event, H_SETUNIQUE, 1);
    el_set(in->edit, EL_PROMPT, prompt);
    el_set(in->edit, EL_EDITOR, "emacs");
    el_set(in->edit, EL_HIST, history, in->history);
    el_set(in->edit, EL_GETCFN, read_char);
    el_set(in->edit, EL_BIND, "^R", "em-inc-search-prev", NULL);
    if (kvs_cli_xdg_path("XDG_STATE_HOME", ".local/state", "history", in->history_path, sizeof in->history_path))
        history(in->history, &event, H_LOAD, in->history_path);
    return true;
}

kvs_line_input *kvs_line_input_open(bool on_terminal)
{
    kvs_line_input *const in = calloc(1, sizeof *in);
    if (in == NULL)
        return NULL;
    if (on_terminal && !open_editor(in)) {
        kvs_line_input_close(in);
        return NULL;
    }
    return in;
}

static kvs_line_result read_plain(kvs_line_input *in, const char **line)
{
    errno = 0;
    const ssize_t n = getline(&in->line, &in->cap_bytes, stdin);
    if (n < 0)
        return errno == EINTR && kvs_cli_interrupted > 0 ? KVS_LINE_INTERRUPTED : KVS_LINE_END;
    in->line[strcspn(in->line, "\r\n")] = '\0';
    *line = in->line;
    return KVS_LINE_OK;
}

kvs_line_result kvs_line_input_read(kvs_line_input *in, const char **line)
{
    if (in->edit == NULL)
        return read_plain(in, line);
    int n = 0;
    const char *const text = el_gets(in->edit, &n);
    if (kvs_cli_interrupted > 0) {
        el_reset(in->edit);
        return KVS_LINE_INTERRUPTED;
    }
    if (text == NULL || n <= 0)
        return KVS_LINE_END;
    free(in->line);
    in->line = strdup(text);
    if (in->line == NULL)
        return KVS_LINE_END;
    HistEvent event;
    if (text[strspn(text, " \t\r\n")] != '\0') {
        history(in->history, &event, H_ENTER, text);
        if (in->history_path[0] != '\0' && kvs_cli_make_parents(in->history_path, NULL) == KVS_OK) {
            const mode_t before = umask(077); /* what a person said is theirs alone */
            history(in->history, &event, H_SAVE, in->history_path);
            umask(before);
        }
    }
    in->line[strcspn(in->line, "\r\n")] = '\0';
    *line = in->line;
    return KVS_LINE_OK;
}

void kvs_line_input_close(kvs_line_input *in)
{
    if (in == NULL)
        return;
    if (in->history != NULL)
        history_end(in->history);
    if (in->edit != NULL)
        el_end(in->edit);
    free(in->line);
    free(in);
}

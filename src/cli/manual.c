/* What is generated from the table in options.c: help, the man page, completion for bash, zsh and fish. */
#include "cli/cli.h"

#include <string.h>

enum { LINE_MAX_COLUMNS = 100 };

/* Words of text, broken at LINE_MAX_COLUMNS, every line after the first indented. */
static void print_wrapped(FILE *out, const char *text, size_t column, size_t indent)
{
    while (*text != '\0') {
        const size_t n = strcspn(text, " ");
        if (column + n > LINE_MAX_COLUMNS && column > indent) {
            fprintf(out, "\n%*s", (int)indent, "");
            column = indent;
        }
        fprintf(out, "%.*s", (int)n, text);
        column += n;
        text += n;
        if (*text == ' ') {
            text++;
            if (*text != '\0' && column + 1 + strcspn(text, " ") <= LINE_MAX_COLUMNS) {
                fputc(' ', out);
                column++;
            } else if (*text != '\0') {
                fprintf(out, "\n%*s", (int)indent, "");
                column = indent;
            }
        }
    }
    fputc('\n', out);
}

void kvs_cli_print_overview(FILE *out)
{
    fprintf(out,
            "kvasir %s: long conversations with a language model inside a hard KV-cache budget\n\n"
            "usage: kvasir COMMAND [OPTIONS]\n\n",
            kvs_version());
    for (uint32_t i = 0; i < kvs_cli_n_commands; i++)
        fprintf(out, "  %-10s %s\n", kvs_cli_commands[i].name, kvs_cli_commands[i].summary);
    fprintf(out, "\nkvasir COMMAND --help explains a command.\n"
                 "kvasir --version, kvasir --man, kvasir --completion bash|zsh|fish print what they say.\n"
                 "Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.\n");
}

static void option_heading(const kvs_cli_option *option, char *text, size_t cap_bytes)
{
    char letter[8] = "    ";
    if (option->letter != 0)
        snprintf(letter, sizeof letter, "-%c, ", option->letter);
    snprintf(text, cap_bytes, "%s--%s%s%s", letter, option->name, option->metavar != NULL ? " " : "",
             option->metavar != NULL ? option->metavar : "");
}

static bool repeatable(const kvs_cli_command *command, const kvs_cli_option *option)
{
    return option->kind == KVS_CLI_LIST && (strcmp(command->name, "bench") == 0 || strcmp(option->name, "text") == 0);
}

void kvs_cli_print_help(const kvs_cli_command *command, FILE *out)
{
    fprintf(out, "usage: kvasir %s [OPTIONS]%s%s\n\n", command->name, command->operands[0] != '\0' ? " " : "",
            command->operands);
    print_wrapped(out, command->summary, 0, 0);
    fputc('\n', out);
    print_wrapped(out, command->text, 0, 0);
    fprintf(out, "\noptions:\n");
    for (uint32_t i = 0; i < kvs_cli_n_options; i++) {
        const kvs_cli_option *const o = &kvs_cli_options[i];
        if (!kvs_cli_takes(command, o))
            continue;
        char heading[64], doc[300];
        option_heading(o, heading, sizeof heading);
        snprintf(doc, sizeof doc, "%s%s", o->doc, repeatable(command, o) ? " (may be repeated)" : "");
        if (o->kind == KVS_CLI_CHOICE) {
            size_t used = strlen(doc);
            for (size_t c = 0; o->choices[c] != NULL; c++, used = strlen(doc))
                snprintf(doc + used, sizeof doc - used, "%s%s", c == 0 ? " [" : "|", o->choices[c]);
            snprintf(doc + used, sizeof doc - used, "]");
        }
        fprintf(out, "  %-26s ", heading);
        print_wrapped(out, doc, 29, 29);
    }
    fprintf(out, "\nexamples:\n");
    for (const char *p = command->examples; *p != '\0';) {
        const size_t n = strcspn(p, "\t"), n_doc = strcspn(p + n + 1, "\n");
        fprintf(out, "  %.*s\n      %.*s\n", (int)n, p, (int)n_doc, p + n + 1);
        p += n + 1 + n_doc + 1;
    }
}

/* ---- man page --------------------------------------------------------------------------------------------------- */

/* roff: a backslash, a leading dot or quote, and a plain minus would be read as markup. */
static void print_roff(FILE *out, const char *text, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i++) {
        const bool line_start = i == 0 || text[i - 1] == '\n';
        if (line_start && (text[i] == '.' || text[i] == '\''))
            fputs("\\&", out);
        if (text[i] == '\\')
            fputs("\\e", out);
        else if (text[i] == '-')
            fputs("\\-", out);
        else
            fputc(text[i], out);
    }
}

static void roff_line(FILE *out, const char *before, const char *text, const char *after)
{
    fputs(before, out);
    print_roff(out, text, strlen(text));
    fputs(after, out);
}

static void man_command(FILE *out, const kvs_cli_command *command)
{
    fprintf(out, ".SS kvasir %s", command->name);
    roff_line(out, command->operands[0] != '\0' ? " " : "", command->operands, "\n");
    print_roff(out, command->summary, strlen(command->summary));
    roff_line(out, ".\n.PP\n", command->text, "\n");
    for (uint32_t i = 0; i < kvs_cli_n_options; i++) {
        const kvs_cli_option *const o = &kvs_cli_options[i];
        if (!kvs_cli_takes(command, o))
            continue;
        fputs(".TP\n.B ", out);
        if (o->letter != 0)
            fprintf(out, "\\-%c, ", o->letter);
        roff_line(out, "\\-\\-", o->name, "");
        if (o->metavar != NULL)
            roff_line(out, " \\fI", o->metavar, "\\fR");
        roff_line(out, "\n", o->doc, repeatable(command, o) ? " (may be repeated)\n" : "\n");
    }
    for (const char *p = command->examples; *p != '\0';) {
        const size_t n = strcspn(p, "\t"), n_doc = strcspn(p + n + 1, "\n");
        fputs(".TP\n.B ", out);
        print_roff(out, p, n);
        fputc('\n', out);
        print_roff(out, p + n + 1, n_doc);
        fputc('\n', out);
        p += n + 1 + n_doc + 1;
    }
}

void kvs_cli_print_man(FILE *out)
{
    fprintf(out, ".TH KVASIR 1 \"\" \"kvasir %s\" \"User Commands\"\n", kvs_version());
    fputs(".SH NAME\nkvasir \\- long conversations with a language model inside a hard KV\\-cache budget\n"
          ".SH SYNOPSIS\n.B kvasir\n\\fICOMMAND\\fR [\\fIOPTIONS\\fR]\n.SH COMMANDS\n",
          out);
    for (uint32_t i = 0; i < kvs_cli_n_commands; i++)
        man_command(out, &kvs_cli_commands[i]);
    fputs(".SH ENVIRONMENT\n.TP\n.B KVASIR_MODEL\nthe model used without \\-\\-model\n"
          ".TP\n.B XDG_CACHE_HOME\nwhere the set\\-up keeps the default model; default ~/.cache\n"
          ".TP\n.B XDG_STATE_HOME\nwhere chat keeps its history and sessions; default ~/.local/state\n"
          ".SH EXIT STATUS\n0 success; 1 failure; 2 wrong usage; 130 interrupted. "
          "1 and 2 come with one line on stderr that names what was wrong.\n",
          out);
}

/* ---- completion ------------------------------------------------------------------------------------------------- */

static bool takes_file(const kvs_cli_option *o)
{
    return o->kind == KVS_CLI_FILE || o->kind == KVS_CLI_DIR;
}

static void print_choices(FILE *out, const kvs_cli_option *o)
{
    for (size_t c = 0; o->choices[c] != NULL; c++)
        fprintf(out, "%s%s", c > 0 ? " " : "", o->choices[c]);
}

/* Values of --policy come from the registry at completion time, so that a new preset needs no new script. */
static const char policy_names[] = "kvasir policies 2>/dev/null | sed -n 's/^\\([a-z][a-z0-9_]*\\) .*/\\1/p'";

static void completion_bash(FILE *out)
{
    fputs("# kvasir --completion bash > ~/.local/share/bash-completion/completions/kvasir\n"
          "_kvasir() {\n    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} cmd=${COMP_WORDS[1]}\n"
          "    COMPREPLY=()\n    if [ \"$COMP_CWORD\" = 1 ]; then\n        COMPREPLY=($(compgen -W '",
          out);
    for (uint32_t i = 0; i < kvs_cli_n_commands; i++)
        fprintf(out, "%s ", kvs_cli_commands[i].name);
    fputs("--help --version --man --completion' -- \"$cur\"))\n        return\n    fi\n    case \"$cmd $prev\" in\n",
          out);
    fputs("    '--completion --completion') COMPREPLY=($(compgen -W 'bash zsh fish' -- \"$cur\")); return ;;\n", out);
    for (uint32_t i = 0; i < kvs_cli_n_options; i++) {
        const kvs_cli_option *const o = &kvs_cli_options[i];
        if (o->kind == KVS_CLI_FLAG)
            continue;
        bool first = true;
        fputs("    ", out);
        for (uint32_t c = 0; c < kvs_cli_n_commands; c++) {
            if (!kvs_cli_takes(&kvs_cli_commands[c], o))
                continue;
            fprintf(out, "%s'%s --%s'", first ? "" : " | ", kvs_cli_commands[c].name, o->name);
            if (o->letter != 0)
                fprintf(out, " | '%s -%c'", kvs_cli_commands[c].name, o->letter);
            first = false;
        }
        fputs(") COMPREPLY=(", out);
        if (strcmp(o->name, "policy") == 0) {
            fprintf(out, "$(compgen -W \"$(%s)\" -- \"$cur\")", policy_names);
        } else if (o->choices != NULL) {
            fputs("$(compgen -W '", out);
            print_choices(out, o);
            fputs("' -- \"$cur\")", out);
        } else if (takes_file(o)) {
            fputs("$(compgen -f -- \"$cur\")", out);
        }
        fputs("); return ;;\n", out);
    }
    fputs("    esac\n    case \"$cmd\" in\n", out);
    for (uint32_t c = 0; c < kvs_cli_n_commands; c++) {
        fprintf(out, "    %s) COMPREPLY=($(compgen -W '", kvs_cli_commands[c].name);
        for (uint32_t i = 0; i < kvs_cli_n_options; i++)
            if (kvs_cli_takes(&kvs_cli_commands[c], &kvs_cli_options[i]))
                fprintf(out, "--%s ", kvs_cli_options[i].name);
        fputs("' -- \"$cur\")", out);
        if (kvs_cli_commands[c].n_operands_min > 0)
            fputs(" $(compgen -f -- \"$cur\")", out);
        fputs(") ;;\n", out);
    }
    fputs("    esac\n}\ncomplete -o filenames -F _kvasir kvasir\n", out);
}

/* In single quotes for a shell, where ' itself cannot stand; zsh's _arguments also reads [ ] and : as its own. */
static void print_quoted(FILE *out, const char *text, bool zsh)
{
    for (; *text != '\0'; text++) {
        if (*text == '\'')
            fputs("'\\''", out);
        else if (zsh && (*text == '[' || *text == ']' || *text == ':'))
            fprintf(out, "\\%c", *text);
        else
            fputc(*text, out);
    }
}

static void completion_zsh(FILE *out)
{
    fputs("#compdef kvasir\n# kvasir --completion zsh > a folder of $fpath, as _kvasir\n_kvasir() {\n"
          "    local -a commands\n    commands=(\n",
          out);
    for (uint32_t i = 0; i < kvs_cli_n_commands; i++) {
        fprintf(out, "        '%s:", kvs_cli_commands[i].name);
        print_quoted(out, kvs_cli_commands[i].summary, true);
        fputs("'\n", out);
    }
    fputs("    )\n    if (( CURRENT == 2 )); then\n        _describe command commands\n        return\n    fi\n"
          "    local cmd=$words[2]\n    shift words\n    (( CURRENT-- ))\n    case $cmd in\n",
          out);
    for (uint32_t c = 0; c < kvs_cli_n_commands; c++) {
        fprintf(out, "    %s) _arguments", kvs_cli_commands[c].name);
        for (uint32_t i = 0; i < kvs_cli_n_options; i++) {
            const kvs_cli_option *const o = &kvs_cli_options[i];
            if (!kvs_cli_takes(&kvs_cli_commands[c], o))
                continue;
            fprintf(out, " \\\n        '%s--%s%s[", repeatable(&kvs_cli_commands[c], o) ? "*" : "", o->name,
                    o->kind == KVS_CLI_FLAG ? "" : "=");
            print_quoted(out, o->doc, true);
            fputc(']', out);
            if (o->kind != KVS_CLI_FLAG) {
                fprintf(out, ":%s:", o->metavar);
                if (strcmp(o->name, "policy") == 0) {
                    fputs("{compadd -- ${(f)\"$(", out);
                    print_quoted(out, policy_names, false);
                    fputs(")\"}}", out);
                } else if (o->choices != NULL) {
                    fputs("(", out);
                    for (size_t k = 0; o->choices[k] != NULL; k++) {
                        fputs(k > 0 ? " " : "", out);
                        print_quoted(out, o->choices[k], true);
                    }
                    fputs(")", out);
                } else if (takes_file(o)) {
                    fputs("_files", out);
                }
            }
            fputc('\'', out);
        }
        fputs(kvs_cli_commands[c].n_operands_min > 0 ? " \\\n        '*:file:_files' ;;\n" : " ;;\n", out);
    }
    fputs("    esac\n}\n_kvasir \"$@\"\n", out);
}

static void completion_fish(FILE *out)
{
    fputs("# kvasir --completion fish > ~/.config/fish/completions/kvasir.fish\ncomplete -c kvasir -f\n", out);
    for (uint32_t c = 0; c < kvs_cli_n_commands; c++) {
        const kvs_cli_command *const command = &kvs_cli_commands[c];
        fprintf(out, "complete -c kvasir -n __fish_use_subcommand -a %s -d '", command->name);
        print_quoted(out, command->summary, false);
        fputs("'\n", out);
        for (uint32_t i = 0; i < kvs_cli_n_options; i++) {
            const kvs_cli_option *const o = &kvs_cli_options[i];
            if (!kvs_cli_takes(command, o))
                continue;
            fprintf(out, "complete -c kvasir -n '__fish_seen_subcommand_from %s' -l %s", command->name, o->name);
            if (o->letter != 0)
                fprintf(out, " -s %c", o->letter);
            if (o->kind != KVS_CLI_FLAG)
                fputs(takes_file(o) ? " -r -F" : " -x", out);
            if (strcmp(o->name, "policy") == 0) {
                fputs(" -a '(", out);
                for (const char *p = policy_names; *p != '\0'; p++) /* fish escapes a quote with a backslash */
                    fprintf(out, "%s%c", *p == '\'' || *p == '\\' ? "\\" : "", *p);
                fputs(")'", out);
            } else if (o->choices != NULL) {
                fputs(" -a '", out);
                print_choices(out, o);
                fputs("'", out);
            }
            fputs(" -d '", out);
            for (const char *p = o->doc; *p != '\0'; p++)
                fprintf(out, "%s%c", *p == '\'' ? "\\" : "", *p);
            fputs("'\n", out);
        }
        if (command->n_operands_min > 0)
            fprintf(out, "complete -c kvasir -n '__fish_seen_subcommand_from %s' -F\n", command->name);
    }
}

int kvs_cli_print_completion(const char *shell, FILE *out)
{
    static const char *const shells[] = {"bash", "zsh", "fish"};
    if (strcmp(shell, "bash") == 0) {
        completion_bash(out);
    } else if (strcmp(shell, "zsh") == 0) {
        completion_zsh(out);
    } else if (strcmp(shell, "fish") == 0) {
        completion_fish(out);
    } else {
        const char *const near = shell[0] != '\0' ? kvs_nearest(shell, shells, 3) : NULL;
        fprintf(stderr, "kvasir: --completion '%s': known are bash, zsh and fish%s%s%s\n", shell,
                near != NULL ? "; did you mean '" : "", near != NULL ? near : "", near != NULL ? "'?" : "");
        return KVS_EXIT_USAGE;
    }
    return KVS_EXIT_OK;
}

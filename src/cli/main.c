/* Finds the command, parses its options and runs it. Everything about a command is in its own file. */
#include "cli/cli.h"

#include <locale.h>
#include <signal.h>
#include <string.h>

static int unknown_command(const char *word)
{
    const char *names[32];
    uint32_t n = 0;
    for (; n < kvs_cli_n_commands && n < 32; n++)
        names[n] = kvs_cli_commands[n].name;
    const char *const near = kvs_nearest(word, names, n);
    if (near != NULL)
        fprintf(stderr, "kvasir: unknown command '%s'; did you mean '%s'? (try kvasir --help)\n", word, near);
    else
        fprintf(stderr, "kvasir: unknown command '%s' (try kvasir --help)\n", word);
    return KVS_EXIT_USAGE;
}

static int help(int argc, char **argv)
{
    if (argc < 3) {
        kvs_cli_print_overview(stdout);
        return KVS_EXIT_OK;
    }
    const kvs_cli_command *const command = kvs_cli_find(argv[2]);
    if (command == NULL)
        return unknown_command(argv[2]);
    kvs_cli_print_help(command, stdout);
    return KVS_EXIT_OK;
}

int main(int argc, char **argv)
{
    setlocale(LC_CTYPE, "");  /* for line editing; numbers stay in the C locale */
    signal(SIGPIPE, SIG_IGN); /* `kvasir run | head` is a write error with a name, not a death */
    if (argc < 2) {
        kvs_cli_print_overview(stderr);
        return KVS_EXIT_USAGE;
    }
    const char *const word = argv[1];
    if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0 || strcmp(word, "help") == 0)
        return help(argc, argv);
    if (strcmp(word, "--version") == 0) {
        printf("kvasir %s\n", kvs_version());
        return KVS_EXIT_OK;
    }
    if (strcmp(word, "--man") == 0) {
        kvs_cli_print_man(stdout);
        return KVS_EXIT_OK;
    }
    if (strcmp(word, "--completion") == 0)
        return kvs_cli_print_completion(argc > 2 ? argv[2] : "", stdout);
    const kvs_cli_command *const command = kvs_cli_find(word);
    if (command == NULL)
        return unknown_command(word);
    kvs_cli_args args;
    int code = kvs_cli_parse(command, argc, argv, &args);
    if (code != 0)
        return code;
    if (args.help) {
        kvs_cli_print_help(command, stdout);
        return KVS_EXIT_OK;
    }
    code = kvs_cli_check_common(&args);
    if (code != 0)
        return code;
    code = command->run(&args);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        if (code == KVS_EXIT_OK)
            code = kvs_cli_failure("stdout cannot be written");
    }
    return code;
}

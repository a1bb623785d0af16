/* kvasir report: report.html of a bench output folder, written again (bench/report.h). */
#include "cli/cli.h"

#include "bench/report.h"

int kvs_cmd_report(const kvs_cli_args *args)
{
    kvs_error err = {0};
    if (kvs_report_write(args->operands[0], &err) != KVS_OK)
        return kvs_cli_report(args, &err);
    char path[4200];
    snprintf(path, sizeof path, "%s/report.html", args->operands[0]);
    if (args->json) {
        json_t *const o = json_object();
        kvs_cli_set_text(o, "report", path);
        return kvs_cli_print_json(o);
    }
    printf("%s\n", path);
    return KVS_EXIT_OK;
}

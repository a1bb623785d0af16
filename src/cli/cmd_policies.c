/* kvasir policies: what the registry says of itself. */
#include "cli/cli.h"

#include <string.h>

static json_t *as_json(const kvs_policy_info *p)
{
    json_t *const o = json_object(), *const params = json_array();
    kvs_cli_set_text(o, "name", p->name);
    kvs_cli_set_text(o, "doc", p->doc);
    kvs_cli_set_text(o, "source", p->source);
    kvs_cli_set_text(o, "exactness", p->exactness);
    kvs_cli_set_text(o, "stages", p->stages);
    kvs_cli_set_text(o, "needs", p->needs);
    for (uint32_t i = 0; i < p->n_params; i++) {
        json_t *const q = json_object();
        kvs_cli_set_text(q, "name", p->params[i].name);
        kvs_cli_set_text(q, "doc", p->params[i].doc);
        kvs_cli_set_real(q, "default", p->params[i].value);
        kvs_cli_set_real(q, "min", p->params[i].min);
        kvs_cli_set_real(q, "max", p->params[i].max);
        json_array_append_new(params, q);
    }
    json_object_set_new(o, "params", params);
    return o;
}

static const char *or_dash(const char *text)
{
    return text != NULL && text[0] != '\0' ? text : "-";
}

static void print_one(const kvs_policy_info *p)
{
    printf("%s\n  %s\n\n", p->name, or_dash(p->doc));
    printf("  source     %s\n  exactness  %s\n  stages     %s\n  needs      %s\n", or_dash(p->source),
           or_dash(p->exactness), or_dash(p->stages), or_dash(p->needs));
    if (p->n_params > 0)
        printf("\n  %-12s %10s  %-20s %s\n", "parameter", "default", "range", "");
    for (uint32_t i = 0; i < p->n_params; i++) {
        char range[64];
        snprintf(range, sizeof range, "%g to %g", p->params[i].min, p->params[i].max);
        printf("  %-12s %10g  %-20s %s\n", p->params[i].name, p->params[i].value, range, or_dash(p->params[i].doc));
    }
}

/* One line a preset; the defaults as a spec would write them. */
static void print_line(const kvs_policy_info *p)
{
    char spec[300];
    int n = snprintf(spec, sizeof spec, "%s", p->name);
    for (uint32_t i = 0; i < p->n_params && n > 0 && (size_t)n < sizeof spec; i++)
        n += snprintf(spec + n, sizeof spec - (size_t)n, "%s%s=%g", i == 0 ? ":" : ",", p->params[i].name,
                      p->params[i].value);
    printf("%-22s %s\n", p->name, or_dash(p->doc));
    printf("%-22s %s\n", "", or_dash(p->stages));
    if (p->n_params > 0)
        printf("%-22s %s\n", "", spec);
    printf("%-22s %s; %s\n\n", "", or_dash(p->exactness), or_dash(p->source));
}

static int unknown(const kvs_cli_args *args)
{
    const char *names[256];
    uint32_t n = 0;
    for (uint32_t i = 0; i < kvs_policy_count() && n < 256; i++) {
        kvs_policy_info p;
        if (kvs_policy_get_info(i, &p))
            names[n++] = p.name;
    }
    const char *const near = kvs_nearest(args->operands[0], names, n);
    return kvs_cli_usage_error(args->command, "unknown policy '%s'%s%s%s", args->operands[0],
                               near != NULL ? "; did you mean '" : "", near != NULL ? near : "",
                               near != NULL ? "'?" : "");
}

int kvs_cmd_policies(const kvs_cli_args *args)
{
    kvs_policy_info p;
    if (args->n_operands > 0) {
        for (uint32_t i = 0; i < kvs_policy_count(); i++) {
            if (!kvs_policy_get_info(i, &p) || strcmp(p.name, args->operands[0]) != 0)
                continue;
            if (args->json)
                return kvs_cli_print_json(as_json(&p));
            print_one(&p);
            return KVS_EXIT_OK;
        }
        return unknown(args);
    }
    json_t *const list = json_array();
    for (uint32_t i = 0; i < kvs_policy_count(); i++) {
        if (!kvs_policy_get_info(i, &p))
            continue;
        if (args->json)
            json_array_append_new(list, as_json(&p));
        else
            print_line(&p);
    }
    if (!args->json) {
        json_decref(list);
        printf("Any stage can be changed behind the preset: 'NAME:parameter=value +position=rerotate "
               "+protect=sinks:4,recent:256'.\n");
        return KVS_EXIT_OK;
    }
    json_t *const o = json_object();
    json_object_set_new(o, "policies", list);
    return kvs_cli_print_json(o);
}

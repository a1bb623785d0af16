/* The spec grammar:  preset[:name=value,...] [+stage=choice[:name=value,...]]...
 * Every word that is wrong is named, with the nearest right one; nothing is guessed. */
#include "policy/policy.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const schedule_names[KVS_SCHEDULE_COUNT] = {"full",          "bytes", "tokens", "once",    "chunk",
                                                               "after_prefill", "step",  "every",  "turn_end"};
static const char *const position_names[KVS_POSITION_COUNT] = {"rollback", "keep", "rerotate", "gapcap", "recompute"};
static const char *const stage_names[] = {"schedule", "position", "protect", "keep",   "probe",
                                          "rescore",  "budget",   "select",  "dispose"};

const char *kvs_position_name(kvs_position_mode mode)
{
    return (unsigned)mode < KVS_POSITION_COUNT ? position_names[mode] : "?";
}

/* ---- words and numbers ---- */

#define SPACE " \t\n\v\f\r"

enum { SPEC_BYTES_MAX = 400 };

/* As long as a spec: a word is never cut, so that what was read is what was meant. */
typedef struct word {
    char text[SPEC_BYTES_MAX + 1];
} word;

/* Copies text up to any of `stops` into w; returns what follows, at the stop character or the end. */
static const char *next_word(const char *text, const char *stops, word *w)
{
    const size_t n = strcspn(text, stops);
    const size_t copied = n < sizeof w->text - 1 ? n : sizeof w->text - 1;
    memcpy(w->text, text, copied);
    w->text[copied] = '\0';
    for (size_t i = 0; i < copied; i++)
        if (iscntrl((unsigned char)w->text[i]))
            w->text[i] = '?'; /* no name holds one, and messages are one line */
    return text + n;
}

static kvs_status unknown(kvs_error *err, const char *what, const char *text, const char *const *known, size_t n)
{
    const char *near = kvs_nearest(text, known, n);
    if (near != NULL)
        return kvs_error_set(err, KVS_EINVAL, "unknown %s '%.60s': did you mean '%s'?", what, text, near);
    char list[256] = "";
    for (size_t i = 0, at = 0; i < n && at < sizeof list - 32; i++)
        at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", i == 0 ? "" : ", ", known[i]);
    return kvs_error_set(err, KVS_EINVAL, "unknown %s '%.60s': known are %s", what, text, list);
}

static bool parse_double(const char *text, double *out)
{
    char *end;
    const double x = strtod(text, &end);
    if (end == text || *end != '\0' || !isfinite(x))
        return false;
    *out = x;
    return true;
}

kvs_status kvs_size_parse(const char *text, uint64_t *bytes, uint64_t *tokens, kvs_error *err)
{
    static const struct {
        const char *suffix;
        double scale; /* bytes; 0: tokens */
    } units[] = {{"tok", 0},  {"", 0},     {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"B", 1},
                 {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9},     {"k", 0x1p10},   {"M", 0x1p20},   {"G", 0x1p30}};
    *bytes = *tokens = 0;
    char *end;
    const double x = strtod(text, &end);
    if (end != text && isfinite(x) && x > 0) {
        for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
            if (strcmp(end, units[i].suffix) != 0)
                continue;
            const double value = units[i].scale == 0 ? x : x * units[i].scale;
            if (value < 1 || value > 9e15 || (units[i].scale == 0 && (value != floor(value) || value > UINT32_MAX)))
                break;
            *(units[i].scale == 0 ? tokens : bytes) = (uint64_t)value;
            return KVS_OK;
        }
    }
    word shown;
    next_word(text, "", &shown);
    return kvs_error_set(err, KVS_EINVAL, "size '%.60s' is not one: write 600MiB, 1.5GiB or 4800tok", shown.text);
}

kvs_status kvs_position_parse(const char *text, kvs_position_mode *mode, int32_t *gap_cap, kvs_error *err)
{
    word name;
    const char *rest = next_word(text, ":", &name);
    for (int m = 0; m < KVS_POSITION_COUNT; m++) {
        if (strcmp(name.text, position_names[m]) != 0)
            continue;
        *mode = (kvs_position_mode)m;
        *gap_cap = 16;
        if (*rest == '\0')
            return KVS_OK;
        double g;
        if (m != KVS_POSITION_GAPCAP || !parse_double(rest + 1, &g) || g < 1 || g > 1e9 || g != floor(g))
            return kvs_error_set(err, KVS_EINVAL,
                                 "position '%s' with '%.60s': only gapcap takes a number, from 1, as "
                                 "gapcap:16",
                                 position_names[m], next_word(rest + 1, "", &name) ? name.text : "");
        *gap_cap = (int32_t)g;
        return KVS_OK;
    }
    return unknown(err, "position mode", name.text, position_names, KVS_POSITION_COUNT);
}

/* A count, a share of what is held, or a share of all that was said, as 766tok, 0.9, 0.5said. */
static kvs_status parse_keep(const char *text, kvs_policy *p, kvs_error *err)
{
    double x;
    const size_t n = strlen(text);
    word share;
    if (n > SPEC_BYTES_MAX) /* a plug-in's */
        return kvs_error_set(err, KVS_EINVAL, "keep of %zu characters is over the longest, %d", n, SPEC_BYTES_MAX);
    if (n > 3 && strcmp(text + n - 3, "tok") == 0) {
        uint64_t bytes, tokens;
        KVS_TRY(kvs_size_parse(text, &bytes, &tokens, err));
        p->keep_tokens = (uint32_t)tokens;
        p->keep_ratio = 0;
        p->keep_of_said = false;
        return KVS_OK;
    }
    const bool said = n > 4 && strcmp(text + n - 4, "said") == 0;
    next_word(text, "", &share);
    if (said)
        share.text[n - 4] = '\0';
    if (!parse_double(share.text, &x) || x <= 0 || x > 1)
        return kvs_error_set(err, KVS_EINVAL,
                             "keep '%.60s' must be a share in (0, 1] (of all that was said: 0.5said) or a count such "
                             "as 766tok",
                             text);
    p->keep_ratio = x;
    p->keep_of_said = said;
    p->keep_tokens = 0;
    return KVS_OK;
}

/* ---- parameters of a preset or of a stage's choice ---- */

typedef struct param_target {
    const char *name;
    const kvs_param_info *params;
    uint32_t n_params;
    double *values;
    kvs_policy *keep_of; /* takes keep=...; NULL: keep is no parameter here */
    kvs_policy *file_of; /* takes file=... and hash=... for its budget stage; NULL: it reads none */
} param_target;

/* The file of the budget stage, and the first digits of its sha256. */
static kvs_status parse_file(const char *name, const char *value, const param_target *t, kvs_error *err)
{
    kvs_policy *const p = t->file_of;
    const bool hash = strcmp(name, "hash") == 0;
    const size_t n = strlen(value);
    if (hash && (n != KVS_POLICY_HASH_BYTES - 1 || strspn(value, "0123456789abcdef") != n))
        return kvs_error_set(err, KVS_EINVAL, "%s: hash '%.60s' must be the first %d hex digits of the file's sha256",
                             t->name, value, KVS_POLICY_HASH_BYTES - 1);
    if (n == 0)
        return kvs_error_set(err, KVS_EINVAL, "%s: file= needs a path, without blank, comma and plus", t->name);
    memcpy(hash ? p->budget_hash : p->budget_file, value, n + 1);
    return KVS_OK;
}

static kvs_status parse_param(const char *name, const char *value, const param_target *t, kvs_error *err)
{
    if (t->keep_of != NULL && strcmp(name, "keep") == 0)
        return parse_keep(value, t->keep_of, err);
    if (t->file_of != NULL && (strcmp(name, "file") == 0 || strcmp(name, "hash") == 0))
        return parse_file(name, value, t, err);
    const char *known[KVS_POLICY_PARAMS_MAX + 2];
    uint32_t n = 0;
    if (t->keep_of != NULL)
        known[n++] = "keep";
    if (t->file_of != NULL)
        known[n++] = "file";
    for (uint32_t i = 0; i < t->n_params; i++) {
        known[n++] = t->params[i].name;
        if (strcmp(t->params[i].name, name) != 0)
            continue;
        double x;
        if (!parse_double(value, &x) || x < t->params[i].min || x > t->params[i].max)
            return kvs_error_set(err, KVS_EINVAL, "%s: %s '%.60s' must be a number from %g to %g", t->name, name, value,
                                 t->params[i].min, t->params[i].max);
        t->values[i] = x;
        return KVS_OK;
    }
    char what[96];
    snprintf(what, sizeof what, "parameter of %s", t->name);
    return unknown(err, what, name, known, n);
}

static kvs_status parse_params(const char *args, const param_target *t, kvs_error *err)
{
    if (*args == '\0')
        return kvs_error_set(err, KVS_EINVAL, "%s: nothing follows the colon; name parameters as %s=%g", t->name,
                             t->n_params > 0 ? t->params[0].name : "keep", t->n_params > 0 ? t->params[0].value : 0.9);
    while (*args != '\0') {
        word name, value;
        args = next_word(args, "=,", &name);
        if (*args != '=')
            return kvs_error_set(err, KVS_EINVAL, "%s: '%.60s' must be name=value", t->name, name.text);
        args = next_word(args + 1, ",", &value);
        KVS_TRY(parse_param(name.text, value.text, t, err));
        if (*args == ',' && *++args == '\0')
            return kvs_error_set(err, KVS_EINVAL, "%s: nothing follows the last comma", t->name);
    }
    return KVS_OK;
}

/* ---- stages ---- */

static kvs_status parse_schedule(const char *text, kvs_policy *p, kvs_error *err)
{
    word name;
    const char *args = next_word(text, ":", &name);
    int kind = 0;
    while (kind < KVS_SCHEDULE_COUNT && strcmp(schedule_names[kind], name.text) != 0)
        kind++;
    if (kind == KVS_SCHEDULE_COUNT)
        return unknown(err, "schedule", name.text, schedule_names, KVS_SCHEDULE_COUNT);
    p->schedule = (kvs_schedule_kind)kind;
    p->schedule_value = 0;
    const bool takes_size = kind == KVS_SCHEDULE_BYTES || kind == KVS_SCHEDULE_TOKENS || kind == KVS_SCHEDULE_ONCE ||
                            kind == KVS_SCHEDULE_EVERY;
    const bool has_argument = *args == ':';
    args += has_argument;
    if (kind == KVS_SCHEDULE_ONCE && strncmp(args, "at=", 3) == 0)
        args += 3;
    if (takes_size ? *args == '\0' : has_argument)
        return kvs_error_set(err, KVS_EINVAL,
                             takes_size ? "schedule '%s' needs a size, as bytes:600MiB, tokens:4800, "
                                          "once:at=3000tok, every:128"
                                        : "schedule '%s' takes no argument",
                             name.text);
    if (!takes_size)
        return KVS_OK;
    uint64_t bytes, tokens;
    KVS_TRY(kvs_size_parse(args, &bytes, &tokens, err));
    if ((kind == KVS_SCHEDULE_BYTES) != (bytes != 0))
        return kvs_error_set(err, KVS_EINVAL, "schedule '%.60s': %s wants %s", text, schedule_names[kind],
                             kind == KVS_SCHEDULE_BYTES ? "bytes, as 600MiB" : "tokens, as 4800tok");
    p->schedule_value = bytes != 0 ? bytes : tokens;
    return KVS_OK;
}

static kvs_status parse_protect(const char *text, kvs_policy *p, kvs_error *err)
{
    static const char *const known[] = {"none", "sinks", "recent", "system", "template", "pinned"};
    kvs_protect out = {0};
    const char *const whole = text;
    if (*text == '\0')
        return kvs_error_set(err, KVS_EINVAL, "protect: name what stays, as sinks:4,system, or none");
    while (*text != '\0') {
        word name, value = {""};
        text = next_word(text, ":,", &name);
        if (*text == ':')
            text = next_word(text + 1, ",", &value);
        size_t which = 0;
        while (which < sizeof known / sizeof *known && strcmp(known[which], name.text) != 0)
            which++;
        if (which == sizeof known / sizeof *known)
            return unknown(err, "protection", name.text, known, which);
        double x = 0;
        const bool counted = strcmp(name.text, "sinks") == 0 || strcmp(name.text, "recent") == 0;
        if (counted && (!parse_double(value.text, &x) || x < 0 || x > 1e9 || x != floor(x)))
            return kvs_error_set(err, KVS_EINVAL, "protect: %s needs a count, as %s:4", name.text, name.text);
        if (!counted && value.text[0] != '\0')
            return kvs_error_set(err, KVS_EINVAL, "protect: %s takes no number", name.text);
        if (strcmp(name.text, "sinks") == 0)
            out.sinks = (uint32_t)x;
        else if (strcmp(name.text, "recent") == 0)
            out.recent = (uint32_t)x;
        else if (strcmp(name.text, "system") == 0)
            out.system = true;
        else if (strcmp(name.text, "template") == 0)
            out.template_markers = true;
        else if (strcmp(name.text, "pinned") == 0)
            out.pinned = true;
        else if (strcmp(whole, "none") != 0)
            return kvs_error_set(err, KVS_EINVAL, "protect: none stands alone, not in '%.60s'", whole);
        if (*text == ',' && *++text == '\0')
            return kvs_error_set(err, KVS_EINVAL, "protect: nothing follows the last comma");
    }
    p->protect = out;
    return KVS_OK;
}

/* ---- stages with a registry of choices ---- */

/* What the word for "no such stage" says. */
static const kvs_choice_info no_probe = {.name = "none"}, no_rescore = {.name = "none"},
                             no_budget = {.name = "uniform"}, no_select = {.name = "token"},
                             no_dispose = {.name = "drop"};

static const kvs_choice_info *probe_info(uint32_t i)
{
    const kvs_probe_ops *ops = kvs_probe_at(i);
    return ops == NULL ? NULL : &ops->info;
}
static const kvs_choice_info *rescore_info(uint32_t i)
{
    const kvs_rescore_ops *ops = kvs_rescore_at(i);
    return ops == NULL ? NULL : &ops->info;
}
static const kvs_choice_info *budget_info(uint32_t i)
{
    const kvs_budget_ops *ops = kvs_budget_at(i);
    return ops == NULL ? NULL : &ops->info;
}
static const kvs_choice_info *select_info(uint32_t i)
{
    const kvs_select_ops *ops = kvs_select_at(i);
    return ops == NULL ? NULL : &ops->info;
}

static const kvs_choice_info *dispose_info(uint32_t i)
{
    const kvs_dispose_ops *ops = kvs_dispose_at(i);
    return ops == NULL ? NULL : &ops->info;
}

/* `choice[:name=value,...]` of the list that `at` walks: its index, or UINT32_MAX for the word that means none. */
static kvs_status parse_choice(const char *stage, const char *none, const kvs_choice_info *(*at)(uint32_t),
                               const char *text, uint32_t *index, double *values, kvs_policy *file_of, kvs_error *err)
{
    word name;
    const char *args = next_word(text, ":", &name);
    const char *known[32];
    size_t n = 0;
    known[n++] = none;
    *index = UINT32_MAX;
    if (strcmp(name.text, none) == 0)
        return *args == '\0' ? KVS_OK : kvs_error_set(err, KVS_EINVAL, "stage %s: %s takes no parameters", stage, none);
    const kvs_choice_info *info;
    for (uint32_t i = 0; n < sizeof known / sizeof *known && (info = at(i)) != NULL; i++) {
        known[n++] = info->name;
        if (strcmp(info->name, name.text) != 0)
            continue;
        *index = i;
        for (uint32_t k = 0; k < info->n_params; k++)
            values[k] = info->params[k].value;
        const bool takes_file = file_of != NULL && kvs_budget_at(i)->file != NULL;
        const param_target target = {info->name, info->params, info->n_params,
                                     values,     NULL,         takes_file ? file_of : NULL};
        return *args == '\0' ? KVS_OK : parse_params(args + 1, &target, err);
    }
    return unknown(err, stage, name.text, known, n);
}

static kvs_status parse_probe(const char *text, kvs_policy *p, kvs_error *err)
{
    uint32_t i;
    KVS_TRY(parse_choice("probe", no_probe.name, probe_info, text, &i, p->probe_params, NULL, err));
    p->probe = i == UINT32_MAX ? NULL : kvs_probe_at(i);
    return KVS_OK;
}

static kvs_status parse_rescore(const char *text, kvs_policy *p, kvs_error *err)
{
    uint32_t i;
    KVS_TRY(parse_choice("rescore", no_rescore.name, rescore_info, text, &i, p->rescore_params, NULL, err));
    p->rescore = i == UINT32_MAX ? NULL : kvs_rescore_at(i);
    return KVS_OK;
}

static kvs_status parse_budget(const char *text, kvs_policy *p, kvs_error *err)
{
    uint32_t i;
    p->budget_file[0] = p->budget_hash[0] = '\0';
    KVS_TRY(parse_choice("budget", no_budget.name, budget_info, text, &i, p->budget_params, p, err));
    p->budget = i == UINT32_MAX ? NULL : kvs_budget_at(i);
    return KVS_OK;
}

static kvs_status parse_select(const char *text, kvs_policy *p, kvs_error *err)
{
    uint32_t i;
    KVS_TRY(parse_choice("select", no_select.name, select_info, text, &i, p->select_params, NULL, err));
    p->select = i == UINT32_MAX ? NULL : kvs_select_at(i);
    return KVS_OK;
}

static kvs_status parse_dispose(const char *text, kvs_policy *p, kvs_error *err)
{
    uint32_t i;
    KVS_TRY(parse_choice("dispose", no_dispose.name, dispose_info, text, &i, p->dispose_params, NULL, err));
    p->dispose = i == UINT32_MAX ? NULL : kvs_dispose_at(i);
    return KVS_OK;
}

static kvs_status parse_stage(const char *stage, const char *choice, kvs_policy *p, kvs_error *err)
{
    if (strcmp(stage, "schedule") == 0)
        return parse_schedule(choice, p, err);
    if (strcmp(stage, "position") == 0)
        return kvs_position_parse(choice, &p->position, &p->gap_cap, err);
    if (strcmp(stage, "protect") == 0)
        return parse_protect(choice, p, err);
    if (strcmp(stage, "keep") == 0)
        return parse_keep(choice, p, err);
    if (strcmp(stage, "probe") == 0)
        return parse_probe(choice, p, err);
    if (strcmp(stage, "rescore") == 0)
        return parse_rescore(choice, p, err);
    if (strcmp(stage, "budget") == 0)
        return parse_budget(choice, p, err);
    if (strcmp(stage, "select") == 0)
        return parse_select(choice, p, err);
    if (strcmp(stage, "dispose") == 0)
        return parse_dispose(choice, p, err);
    return unknown(err, "stage", stage, stage_names, sizeof stage_names / sizeof *stage_names);
}

/* ---- the whole spec ---- */

/* The shortest of 15 or 17 digits that reads back as x. */
static const char *number(double x, char buf[32])
{
    snprintf(buf, 32, "%.15g", x);
    if (strtod(buf, NULL) != x)
        snprintf(buf, 32, "%.17g", x);
    for (char *at = buf; *at != '\0'; at++) /* 1e+09: a plus would begin a stage */
        if (*at == '+')
            memmove(at, at + 1, strlen(at));
    return buf;
}

static char *write_choice(char *at, const char *end, const char *stage, const kvs_choice_info *info,
                          const double *values, const kvs_policy *file_of)
{
    char digits[32], separator = ':';
#define WRITE(...) at += (at < end ? snprintf(at, (size_t)(end - at), __VA_ARGS__) : 0)
    WRITE(" +%s=%s", stage, info->name);
    if (file_of != NULL && file_of->budget_file[0] != '\0') {
        WRITE(":file=%s", file_of->budget_file);
        separator = ',';
    }
    if (file_of != NULL && file_of->budget_hash[0] != '\0') {
        WRITE("%chash=%s", separator, file_of->budget_hash);
        separator = ',';
    }
    for (uint32_t i = 0; i < info->n_params; i++, separator = ',')
        WRITE("%c%s=%s", separator, info->params[i].name, number(values[i], digits));
#undef WRITE
    return at;
}

static void write_text(kvs_policy *p)
{
    char digits[32];
    char *at = p->text, *const end = p->text + sizeof p->text;
#define WRITE(...) at += (at < end ? snprintf(at, (size_t)(end - at), __VA_ARGS__) : 0)
    WRITE("%s", p->ops->name);
    char separator = ':';
    for (uint32_t i = 0; i < p->ops->n_params; i++, separator = ',')
        WRITE("%c%s=%s", separator, p->ops->params[i].name, number(p->params[i], digits));
    if (p->keep_tokens != 0)
        WRITE("%ckeep=%utok", separator, p->keep_tokens);
    else if (p->keep_ratio != 0)
        WRITE("%ckeep=%s%s", separator, number(p->keep_ratio, digits), p->keep_of_said ? "said" : "");
    /* "none" where the preset has a choice of its own and this one took it away. */
    if (p->probe != NULL || p->ops->probe != NULL)
        at = write_choice(at, end, "probe", p->probe == NULL ? &no_probe : &p->probe->info, p->probe_params, NULL);
    if (p->rescore != NULL || p->ops->rescore != NULL)
        at = write_choice(at, end, "rescore", p->rescore == NULL ? &no_rescore : &p->rescore->info, p->rescore_params,
                          NULL);
    if (p->budget != NULL || p->ops->budget != NULL)
        at = write_choice(at, end, "budget", p->budget == NULL ? &no_budget : &p->budget->info, p->budget_params, p);
    if (p->select != NULL || p->ops->select != NULL)
        at = write_choice(at, end, "select", p->select == NULL ? &no_select : &p->select->info, p->select_params, NULL);
    if (p->dispose != NULL || p->ops->dispose != NULL)
        at = write_choice(at, end, "dispose", p->dispose == NULL ? &no_dispose : &p->dispose->info, p->dispose_params,
                          NULL);
    WRITE(" +schedule=%s", schedule_names[p->schedule]);
    if (p->schedule_value != 0)
        WRITE(":%s%llu%s", p->schedule == KVS_SCHEDULE_ONCE ? "at=" : "", (unsigned long long)p->schedule_value,
              p->schedule == KVS_SCHEDULE_BYTES ? "B" : "tok");
    WRITE(" +position=%s", position_names[p->position]);
    if (p->position == KVS_POSITION_GAPCAP)
        WRITE(":%d", p->gap_cap);
    const kvs_protect *g = &p->protect;
    WRITE(" +protect=");
    if (g->sinks == 0 && g->recent == 0 && !g->system && !g->template_markers && !g->pinned)
        WRITE("none");
    else
        WRITE("sinks:%u,recent:%u%s%s%s", g->sinks, g->recent, g->system ? ",system" : "",
              g->template_markers ? ",template" : "", g->pinned ? ",pinned" : "");
#undef WRITE
}

/* A preset's name ends where parameters or stages begin; one that holds a plus itself (laq++) is known by the list. */
static const char *preset_name(const char *spec, word *name)
{
    const kvs_policy_ops *ops;
    for (uint32_t i = 0; (ops = kvs_policy_at(i)) != NULL; i++) {
        const size_t n = strlen(ops->name);
        if (strchr(ops->name, '+') != NULL && strncmp(spec, ops->name, n) == 0 && strchr(":+" SPACE, spec[n]) != NULL) {
            memcpy(name->text, ops->name, n + 1);
            return spec + n;
        }
    }
    return next_word(spec, ":+" SPACE, name);
}

static kvs_status find_preset(const char *name, const kvs_policy_ops **out, kvs_error *err)
{
    *out = kvs_policy_find(name);
    if (*out != NULL)
        return KVS_OK;
    const char *known[128];
    size_t n = 0;
    for (const kvs_policy_ops *ops; n < 128 && (ops = kvs_policy_at((uint32_t)n)) != NULL; n++)
        known[n] = ops->name;
    return unknown(err, "policy", name, known, n);
}

static kvs_status parse_stages(const char *spec, kvs_policy *p, kvs_error *err)
{
    for (;;) {
        word name, value;
        while (isspace((unsigned char)*spec))
            spec++;
        if (*spec == '\0')
            return KVS_OK;
        if (*spec != '+') {
            next_word(spec, "+" SPACE, &name);
            return kvs_error_set(err, KVS_EINVAL, "'%.60s' in the policy spec must begin with +, as +position=keep",
                                 name.text);
        }
        spec = next_word(spec + 1, "=+" SPACE, &name);
        if (*spec != '=')
            return kvs_error_set(err, KVS_EINVAL, "stage '+%.60s' needs a choice, as +position=keep", name.text);
        spec = next_word(spec + 1, "+" SPACE, &value);
        KVS_TRY(parse_stage(name.text, value.text, p, err));
    }
}

static kvs_status check_length(size_t n, kvs_error *err)
{
    return n <= SPEC_BYTES_MAX ? KVS_OK
                               : kvs_error_set(err, KVS_EINVAL, "policy spec of %zu characters is over the longest, %d",
                                               n, SPEC_BYTES_MAX);
}

/* The text with all values filled in is a spec too: a long path may make it longer than one may be. */
static kvs_status check_echo(const kvs_policy *p, kvs_error *err)
{
    const size_t n = strlen(p->text) + (p->budget_hash[0] == '\0' ? strlen(",hash=") + KVS_POLICY_HASH_BYTES - 1 : 0);
    return n <= SPEC_BYTES_MAX
               ? KVS_OK
               : kvs_error_set(
                     err, KVS_EINVAL,
                     "policy spec with all values filled in has %zu characters, %d at most: use a shorter path "
                     "than the %zu of file=",
                     n, SPEC_BYTES_MAX, strlen(p->budget_file));
}

kvs_status kvs_policy_parse(const char *spec, const char *position, bool paper_compat, kvs_policy *out, kvs_error *err)
{
    KVS_TRY(check_length(strlen(spec), err));
    for (size_t i = 0; spec[i] != '\0'; i++)
        if (iscntrl((unsigned char)spec[i]) && !isspace((unsigned char)spec[i]))
            return kvs_error_set(err, KVS_EINVAL, "policy spec holds control character %d at byte %zu", spec[i], i);
    while (isspace((unsigned char)*spec))
        spec++;
    word name;
    const kvs_policy_ops *ops;
    spec = preset_name(spec, &name);
    KVS_TRY(find_preset(name.text, &ops, err));
    return kvs_policy_parse_tail(ops, spec, position, paper_compat, out, err);
}

kvs_status kvs_policy_parse_tail(const kvs_policy_ops *ops, const char *tail, const char *position, bool paper_compat,
                                 kvs_policy *out, kvs_error *err)
{
    KVS_TRY(check_length(strlen(ops->name) + strlen(tail), err)); /* words are as long as the longest spec */
    kvs_policy p = {.ops = ops, .protect = {.sinks = 4, .system = true, .template_markers = true, .pinned = true}};
    for (uint32_t i = 0; i < p.ops->n_params; i++)
        p.params[i] = p.ops->params[i].value;
    if (p.ops->keep != NULL)
        KVS_TRY(parse_keep(p.ops->keep, &p, err));
    KVS_TRY(parse_schedule(p.ops->schedule, &p, err));
    KVS_TRY(kvs_position_parse(p.ops->position, &p.position, &p.gap_cap, err));
    if (p.ops->probe != NULL)
        KVS_TRY(parse_probe(p.ops->probe, &p, err));
    if (p.ops->rescore != NULL)
        KVS_TRY(parse_rescore(p.ops->rescore, &p, err));
    if (p.ops->budget != NULL)
        KVS_TRY(parse_budget(p.ops->budget, &p, err));
    if (p.ops->select != NULL)
        KVS_TRY(parse_select(p.ops->select, &p, err));
    if (p.ops->dispose != NULL)
        KVS_TRY(parse_dispose(p.ops->dispose, &p, err));
    if (paper_compat) {
        p.protect = (kvs_protect){0};
        p.position = KVS_POSITION_ROLLBACK;
    }
    if (*tail == ':') {
        word value;
        tail = next_word(tail + 1, "+" SPACE, &value);
        /* A preset whose own budget stage reads a file takes its path itself, as duo:file=PATH. */
        const bool takes_file = p.budget != NULL && p.budget->file != NULL;
        const param_target target = {p.ops->name, p.ops->params, p.ops->n_params, p.params, &p, takes_file ? &p : NULL};
        KVS_TRY(parse_params(value.text, &target, err));
    }
    KVS_TRY(parse_stages(tail, &p, err));
    if (p.budget != NULL && p.budget->recent_of != NULL)
        p.protect.recent = kvs_max_u32(p.protect.recent, p.budget->recent_of(p.budget_params));
    if (position != NULL)
        KVS_TRY(kvs_position_parse(position, &p.position, &p.gap_cap, err));
    p.params[p.ops->n_params] = p.keep_ratio;
    KVS_TRY(kvs_policy_check_rules(&p, err));
    write_text(&p);
    if (p.budget_file[0] != '\0')
        KVS_TRY(check_echo(&p, err));
    *out = p;
    return KVS_OK;
}

kvs_status kvs_policy_set_hash(kvs_policy *p, const char *sha256, kvs_error *err)
{
    char hash[KVS_POLICY_HASH_BYTES];
    snprintf(hash, sizeof hash, "%.*s", KVS_POLICY_HASH_BYTES - 1, sha256);
    if (p->budget_hash[0] != '\0' && strcmp(p->budget_hash, hash) != 0)
        return kvs_error_set(err, KVS_EINVAL,
                             "profile %.200s is not the one that was meant: its sha256 begins with %s, not %s",
                             p->budget_file, hash, p->budget_hash);
    memcpy(p->budget_hash, hash, sizeof hash);
    write_text(p);
    return check_echo(p, err);
}

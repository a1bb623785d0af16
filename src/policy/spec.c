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
static const char *const stage_names[] = {"schedule", "position", "protect", "keep"};

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

static kvs_status parse_keep(const char *text, kvs_policy *p, kvs_error *err)
{
    double x;
    const size_t n = strlen(text);
    if (n > 3 && strcmp(text + n - 3, "tok") == 0) {
        uint64_t bytes, tokens;
        KVS_TRY(kvs_size_parse(text, &bytes, &tokens, err));
        p->keep_tokens = (uint32_t)tokens;
        p->keep_ratio = 0;
        return KVS_OK;
    }
    if (!parse_double(text, &x) || x <= 0 || x > 1)
        return kvs_error_set(err, KVS_EINVAL, "keep '%.60s' must be a share in (0, 1] or a count such as 766tok", text);
    p->keep_ratio = x;
    p->keep_tokens = 0;
    return KVS_OK;
}

/* ---- the preset's parameters ---- */

static kvs_status parse_param(const char *name, const char *value, kvs_policy *p, kvs_error *err)
{
    const kvs_policy_ops *ops = p->ops;
    if (strcmp(name, "keep") == 0)
        return parse_keep(value, p, err);
    const char *known[KVS_POLICY_PARAMS_MAX + 1] = {"keep"};
    for (uint32_t i = 0; i < ops->n_params; i++) {
        known[i + 1] = ops->params[i].name;
        if (strcmp(ops->params[i].name, name) != 0)
            continue;
        double x;
        if (!parse_double(value, &x) || x < ops->params[i].min || x > ops->params[i].max)
            return kvs_error_set(err, KVS_EINVAL, "%s: %s '%.60s' must be a number from %g to %g", ops->name, name,
                                 value, ops->params[i].min, ops->params[i].max);
        p->params[i] = x;
        return KVS_OK;
    }
    char what[96];
    snprintf(what, sizeof what, "parameter of %s", ops->name);
    return unknown(err, what, name, known, ops->n_params + 1);
}

static kvs_status parse_params(const char *args, kvs_policy *p, kvs_error *err)
{
    if (*args == '\0')
        return kvs_error_set(err, KVS_EINVAL, "%s: nothing follows the colon; name parameters as keep=0.9",
                             p->ops->name);
    while (*args != '\0') {
        word name, value;
        args = next_word(args, "=,", &name);
        if (*args != '=')
            return kvs_error_set(err, KVS_EINVAL, "%s: '%.60s' must be name=value", p->ops->name, name.text);
        args = next_word(args + 1, ",", &value);
        KVS_TRY(parse_param(name.text, value.text, p, err));
        if (*args == ',' && *++args == '\0')
            return kvs_error_set(err, KVS_EINVAL, "%s: nothing follows the last comma", p->ops->name);
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
        WRITE("%ckeep=%s", separator, number(p->keep_ratio, digits));
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

static kvs_status find_preset(const char *name, const kvs_policy_ops **out, kvs_error *err)
{
    *out = kvs_policy_find(name);
    if (*out != NULL)
        return KVS_OK;
    const char *known[64];
    size_t n = 0;
    for (const kvs_policy_ops *ops; n < 64 && (ops = kvs_policy_at((uint32_t)n)) != NULL; n++)
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

kvs_status kvs_policy_parse(const char *spec, const char *position, bool paper_compat, kvs_policy *out, kvs_error *err)
{
    kvs_policy p = {.protect = {.sinks = 4, .system = true, .template_markers = true, .pinned = true}};
    if (strlen(spec) > SPEC_BYTES_MAX)
        return kvs_error_set(err, KVS_EINVAL, "policy spec of %zu characters is over the longest, %d", strlen(spec),
                             SPEC_BYTES_MAX);
    for (size_t i = 0; spec[i] != '\0'; i++)
        if (iscntrl((unsigned char)spec[i]) && !isspace((unsigned char)spec[i]))
            return kvs_error_set(err, KVS_EINVAL, "policy spec holds control character %d at byte %zu", spec[i], i);
    while (isspace((unsigned char)*spec))
        spec++;
    word name, value;
    spec = next_word(spec, ":+" SPACE, &name);
    KVS_TRY(find_preset(name.text, &p.ops, err));
    for (uint32_t i = 0; i < p.ops->n_params; i++)
        p.params[i] = p.ops->params[i].value;
    if (p.ops->keep != NULL)
        KVS_TRY(parse_keep(p.ops->keep, &p, err));
    KVS_TRY(parse_schedule(p.ops->schedule, &p, err));
    KVS_TRY(kvs_position_parse(p.ops->position, &p.position, &p.gap_cap, err));
    if (paper_compat) {
        p.protect = (kvs_protect){0};
        p.position = KVS_POSITION_ROLLBACK;
    }
    if (*spec == ':') {
        spec = next_word(spec + 1, "+" SPACE, &value);
        KVS_TRY(parse_params(value.text, &p, err));
    }
    KVS_TRY(parse_stages(spec, &p, err));
    if (position != NULL)
        KVS_TRY(kvs_position_parse(position, &p.position, &p.gap_cap, err));
    if (p.position == KVS_POSITION_RECOMPUTE && kvs_policy_scope_of(&p) != KVS_SCOPE_SHARED)
        return kvs_error_set(err, KVS_EINVAL,
                             "position recompute needs one keep set for all heads, %s keeps another set in each %s",
                             p.ops->name, kvs_policy_scope_of(&p) == KVS_SCOPE_LAYER ? "layer" : "head");
    p.params[p.ops->n_params] = p.keep_ratio;
    write_text(&p);
    *out = p;
    return KVS_OK;
}

/* ---- what the session asks ---- */

uint32_t kvs_policy_needs(const kvs_policy *p)
{
    return p->ops->needs | (p->ops->needs_of == NULL ? 0 : p->ops->needs_of(p->params));
}

kvs_policy_scope kvs_policy_scope_of(const kvs_policy *p)
{
    return p->ops->scope_of == NULL ? p->ops->scope : p->ops->scope_of(p->params);
}

uint32_t kvs_policy_target(const kvs_policy *p, const kvs_policy_view *view, uint32_t n_full)
{
    const uint32_t n = view->n_slots;
    uint32_t want = n_full;
    if (p->keep_tokens != 0)
        want = p->keep_tokens;
    else if (p->keep_ratio != 0)
        want = (uint32_t)(n * p->keep_ratio);
    if (p->ops->target != NULL)
        want = p->ops->target(p->params, view, want);
    /* What is protected outranks an aim: a share of few slots, or a budget less a chunk, may be below it. */
    return kvs_max_u32(kvs_max_u32(want, 1), kvs_protected_count(&p->protect, view));
}

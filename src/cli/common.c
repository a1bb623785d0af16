/* From the common options to a model and session options; sizes, JSON, progress, interrupts. Files are in files.c. */
#include "cli/cli.h"

#include "bench/suite.h"
#include "model/model.h"
#include "policy/policy.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

/* ---- interrupts and errors -------------------------------------------------------------------------------------- */

volatile int kvs_cli_interrupted;

static void on_interrupt(int signal_number)
{
    (void)signal_number;
    /* The third one leaves at once: a step that hangs must not make the program deaf. */
    if (++kvs_cli_interrupted >= 3)
        _exit(KVS_EXIT_INTERRUPTED);
}

void kvs_cli_catch_interrupts(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt; /* no SA_RESTART: a read at the prompt must come back */
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
}

int kvs_cli_failure(const char *fmt, ...)
{
    va_list list;
    va_start(list, fmt);
    fputs("kvasir: ", stderr);
    vfprintf(stderr, fmt, list);
    fputc('\n', stderr);
    va_end(list);
    return KVS_EXIT_FAILURE;
}

int kvs_cli_report(const kvs_cli_args *args, const kvs_error *err)
{
    fprintf(stderr, "kvasir %s: %s\n", args->command->name, err->message);
    return KVS_EXIT_FAILURE;
}

/* ---- values ----------------------------------------------------------------------------------------------------- */

kvs_status kvs_cli_parse_size(const char *text, kvs_cli_size *out, kvs_error *err)
{
    static const struct {
        const char *name;
        double factor;
    } units[] = {{"B", 1},       {"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0},
                 {"kB", 1000.0}, {"KB", 1000.0},  {"MB", 1e6},        {"GB", 1e9},
                 {"tok", 0},     {"tokens", 0}};
    *out = (kvs_cli_size){0, 0};
    if (strcmp(text, "window") == 0)
        return KVS_OK;
    char *end;
    const double number = text[0] >= '0' && text[0] <= '9' ? strtod(text, &end) : (end = (char *)(uintptr_t)text, 0.0);
    for (size_t i = 0; end != text && i < sizeof units / sizeof units[0]; i++) {
        if (strcmp(end, units[i].name) != 0)
            continue;
        const double scaled = units[i].factor > 0 ? number * units[i].factor : number;
        const double limit = units[i].factor > 0 ? 0x1p53 : (double)INT32_MAX;
        if (!(scaled >= 1 && scaled <= limit))
            break;
        if (units[i].factor > 0) {
            out->bytes = (uint64_t)scaled;
            return KVS_OK;
        }
        if (scaled != floor(scaled))
            break;
        out->tokens = (uint32_t)scaled;
        return KVS_OK;
    }
    return kvs_error_set(err, KVS_EINVAL,
                         "'%.60s' is not a size; sizes are 600MiB, 1.5GiB, 4800tok (slots in every head) or window",
                         text);
}

const char *kvs_cli_last(const kvs_cli_list *list, const char *fallback)
{
    return list->n > 0 ? list->items[list->n - 1] : fallback;
}

static int check_position(const kvs_cli_args *args, const char *mode)
{
    static const char *const modes[] = {"rollback", "keep", "rerotate", "gapcap:16", "recompute"};
    for (size_t i = 0; i < 5; i++)
        if (strcmp(mode, modes[i]) == 0)
            return 0;
    if (strncmp(mode, "gapcap:", 7) == 0 && mode[7] != '\0' && strlen(mode + 7) <= 7 &&
        strspn(mode + 7, "0123456789") == strlen(mode + 7) && atoi(mode + 7) >= 1)
        return 0;
    const char *const near = kvs_nearest(mode, modes, 5);
    return kvs_cli_usage_error(args->command,
                               "--position: unknown mode '%.60s'%s%s%s; known are rollback, keep, "
                               "rerotate, gapcap:G (G from 1) and recompute",
                               mode, near != NULL ? "; did you mean '" : "", near != NULL ? near : "",
                               near != NULL ? "'?" : "");
}

int kvs_cli_check_common(const kvs_cli_args *args)
{
    if (args->sensitivity != NULL && args->episodes.n == 0)
        return kvs_cli_usage_error(args->command,
                                   "--sensitivity goes with --episodes; a policy takes +budget=sensitivity:file=FILE");
    kvs_error err;
    const bool is_bench = strcmp(args->command->name, "bench") == 0;
    for (uint32_t i = 0; i < args->budgets.n; i++) {
        kvs_cli_size size;
        /* A bench grid also knows shares of the dialogue and "inf"; the runner checks those. */
        if (!is_bench && kvs_cli_parse_size(args->budgets.items[i], &size, &err) != KVS_OK)
            return kvs_cli_usage_error(args->command, "--budget: %s", err.message);
    }
    for (uint32_t i = 0; i < args->positions.n; i++) {
        const int code = check_position(args, args->positions.items[i]);
        if (code != 0)
            return code;
    }
    if (args->policy_plugin != NULL && kvs_policy_load_plugin(args->policy_plugin, &err) != KVS_OK)
        return kvs_cli_failure("--policy-plugin: %s", err.message);
    if (args->template_name != NULL && strcmp(args->template_name, "auto") != 0)
        return kvs_cli_failure("--template %s: this build uses the template in the model file; only auto is possible",
                               args->template_name);
    for (uint32_t i = 0; i < args->policies.n; i++)
        /* A bench grid marks some runs behind the spec; the suite checks those. */
        if (!(is_bench && strstr(args->policies.items[i], KVS_SUITE_FULL_FIRST) != NULL) &&
            kvs_policy_check(args->policies.items[i], &err) != KVS_OK)
            return kvs_cli_usage_error(args->command, "--policy: %s", err.message);
    return 0;
}

uint32_t kvs_cli_cpu_bits(const kvs_cli_args *args)
{
    static const uint32_t levels[] = {
        1u << 31, /* a bit no instruction set has: mask 0 would mean all */
        KVS_CPU_AVX2, KVS_CPU_AVX2 | KVS_CPU_AVX512, KVS_CPU_AVX2 | KVS_CPU_AVX512 | KVS_CPU_VNNI,
        KVS_CPU_NEON, KVS_CPU_NEON | KVS_CPU_DOTPROD};
    for (size_t i = 0; args->cpu_mask != NULL && i < sizeof levels / sizeof *levels; i++)
        if (strcmp(args->cpu_mask, kvs_cpu_isa_name(levels[i])) == 0)
            return levels[i];
    return 0;
}

/* ---- model and session ------------------------------------------------------------------------------------------ */

static const char default_model_file[] = "models/SmolLM2-135M-Instruct.Q4_1.gguf"; /* what scripts/setup fetches */

kvs_status kvs_cli_model_path(const kvs_cli_args *args, char *path, size_t cap_bytes, kvs_error *err)
{
    const char *const env = getenv("KVASIR_MODEL");
    const char *from = "--model";
    if (args->model != NULL) {
        snprintf(path, cap_bytes, "%s", args->model);
    } else if (env != NULL && env[0] != '\0') {
        snprintf(path, cap_bytes, "%s", env);
        from = "KVASIR_MODEL";
    } else {
        path[0] = '\0';
        from = NULL;
#ifdef KVS_DEFAULT_MODEL
        snprintf(path, cap_bytes, "%s", KVS_DEFAULT_MODEL);
#endif
        if ((path[0] == '\0' || access(path, R_OK) != 0) &&
            !kvs_cli_xdg_path("XDG_CACHE_HOME", ".cache", default_model_file, path, cap_bytes))
            return kvs_error_set(err, KVS_EIO, "no model: run scripts/setup or set KVASIR_MODEL");
    }
    if (access(path, R_OK) == 0)
        return KVS_OK;
    if (from == NULL)
        return kvs_error_set(err, KVS_EIO, "no model at %s: run scripts/setup or set KVASIR_MODEL", path);
    return kvs_error_set(err, KVS_EIO, "%s names %s: %s; run scripts/setup or set KVASIR_MODEL", from, path,
                         strerror(errno));
}

kvs_status kvs_cli_open_model(const kvs_cli_args *args, kvs_model **out, kvs_error *err)
{
    char path[4096];
    *out = NULL;
    KVS_TRY(kvs_cli_model_path(args, path, sizeof path, err));
    kvs_model_options opt;
    kvs_model_options_default(&opt);
    opt.n_threads = args->threads;
    opt.cpu_mask = kvs_cli_cpu_bits(args);
    return kvs_model_open(path, &opt, out, err);
}

void kvs_cli_session_options(const kvs_cli_args *args, kvs_arith default_arith, kvs_session_options *opt)
{
    kvs_session_options_default(opt);
    opt->policy = kvs_cli_last(&args->policies, NULL);
    opt->position = kvs_cli_last(&args->positions, NULL);
    kvs_cli_size size;
    if (kvs_cli_parse_size(kvs_cli_last(&args->budgets, "window"), &size, NULL) == KVS_OK) {
        opt->budget_bytes = size.bytes;
        opt->budget_tokens = size.tokens;
    }
    opt->kv_type = args->kv_type != NULL && strcmp(args->kv_type, "f32") == 0 ? KVS_KV_F32 : KVS_KV_F16;
    opt->arith = default_arith;
    if (args->arith != NULL)
        opt->arith = strcmp(args->arith, "f32") == 0 ? KVS_ARITH_F32 : KVS_ARITH_NATIVE;
    opt->prefill_full = args->prefill != NULL && strcmp(args->prefill, "full") == 0;
    opt->paper_compat = args->paper_compat;
    opt->ffn_skip = args->ffn_skip;
    opt->seed = args->seed;
}

void kvs_cli_sampling(const kvs_cli_args *args, kvs_sampling *p)
{
    kvs_sampling_default(p);
    p->seed = args->seed;
    if (kvs_cli_given(args, "temp"))
        p->temperature = (float)args->temp;
    if (kvs_cli_given(args, "top-k"))
        p->top_k = args->top_k;
    if (kvs_cli_given(args, "top-p"))
        p->top_p = (float)args->top_p;
    if (kvs_cli_given(args, "min-p"))
        p->min_p = (float)args->min_p;
    if (kvs_cli_given(args, "repeat-penalty"))
        p->repeat_penalty = (float)args->repeat_penalty;
    if (args->n_tokens > 0)
        p->max_tokens = args->n_tokens;
}

/* ---- JSON ------------------------------------------------------------------------------------------------------- */

void kvs_cli_set_real(json_t *object, const char *name, double value)
{
    json_object_set_new(object, name, isfinite(value) ? json_real(value) : json_null());
}

void kvs_cli_set_int(json_t *object, const char *name, uint64_t value)
{
    json_object_set_new(object, name, json_integer((json_int_t)value));
}

/* JSON must be valid UTF-8: bytes that are not become U+FFFD. */
static json_t *json_text(const char *bytes, size_t n_bytes)
{
    char *const clean = malloc(n_bytes * 3 + 1);
    if (clean == NULL)
        return json_null();
    size_t n = 0;
    while (n_bytes > 0) {
        const size_t good = kvs_utf8_valid_prefix(bytes, n_bytes);
        memcpy(clean + n, bytes, good);
        n += good;
        bytes += good;
        n_bytes -= good;
        if (n_bytes > 0) {
            memcpy(clean + n, "\xef\xbf\xbd", 3);
            n += 3;
            bytes++;
            n_bytes--;
        }
    }
    json_t *const value = json_stringn(clean, n);
    free(clean);
    return value != NULL ? value : json_null();
}

void kvs_cli_set_text(json_t *object, const char *name, const char *value)
{
    json_object_set_new(object, name, value != NULL ? json_text(value, strlen(value)) : json_null());
}

int kvs_cli_print_json(json_t *object)
{
    const int failed = json_dumpf(object, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(17) | JSON_PRESERVE_ORDER);
    fputc('\n', stdout);
    json_decref(object);
    if (failed != 0 || fflush(stdout) != 0)
        return kvs_cli_failure("stdout cannot be written");
    return KVS_EXIT_OK;
}

/* ---- progress --------------------------------------------------------------------------------------------------- */

void kvs_cli_progress_begin(kvs_cli_progress *p, const char *label)
{
    *p = (kvs_cli_progress){.label = label, .begin_ns = kvs_now_ns()};
}

static void format_seconds(double seconds, char *text, size_t cap_bytes)
{
    if (seconds < 100)
        snprintf(text, cap_bytes, "%.0f s", seconds);
    else if (seconds < 6000)
        snprintf(text, cap_bytes, "%.0f min", seconds / 60);
    else
        snprintf(text, cap_bytes, "%.1f h", seconds / 3600);
}

void kvs_cli_progress_show(kvs_cli_progress *p, uint64_t done, uint64_t total, double seconds_left)
{
    if (!isatty(STDERR_FILENO))
        return;
    const uint64_t now_ns = kvs_now_ns();
    if (now_ns - p->last_ns < 100000000u)
        return;
    p->last_ns = now_ns;
    p->shown = true;
    char left[48] = "";
    if (seconds_left < 0 && done > 0 && total >= done)
        seconds_left = (double)(now_ns - p->begin_ns) * 1e-9 * (double)(total - done) / (double)done;
    if (seconds_left >= 0) {
        strcpy(left, ", ");
        format_seconds(seconds_left, left + 2, sizeof left - 7);
        strcat(left, " left");
    }
    fprintf(stderr, "\r\033[K%s %llu/%llu%s", p->label, (unsigned long long)done, (unsigned long long)total, left);
    fflush(stderr);
}

void kvs_cli_progress_end(kvs_cli_progress *p)
{
    if (p->shown)
        fputs("\r\033[K", stderr);
    p->shown = false;
}

/* ---- the machine ------------------------------------------------------------------------------------------------ */

uint64_t kvs_cli_peak_rss_bytes(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (uint64_t)usage.ru_maxrss * 1024u : 0; /* Linux counts in KiB */
}

double kvs_cli_mib(uint64_t bytes)
{
    return (double)bytes / 1048576.0;
}

kvs_status kvs_cli_sensitivity(const kvs_cli_args *args, kvs_model *m, float **out, kvs_error *err)
{
    *out = NULL;
    if (args->sensitivity == NULL)
        return KVS_OK;
    uint32_t i = 0;
    while (strcmp(kvs_budget_at(i)->info.name, "sensitivity") != 0)
        i++;
    const kvs_allocator *const heap = kvs_allocator_default();
    const kvs_profile_model of = {kvs_model_sha256(m), m->info.n_layers, m->info.n_kv_heads};
    kvs_profile p;
    KVS_TRY(kvs_profile_read(args->sensitivity, kvs_budget_at(i)->file, &of, heap, &p, err));
    *out = malloc(of.n_layers * sizeof **out);
    for (uint32_t l = 0; *out != NULL && l < of.n_layers; l++)
        (*out)[l] = (float)p.layers[l];
    kvs_profile_free(&p, heap);
    return *out != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for %u layers", of.n_layers);
}

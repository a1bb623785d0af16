/* kvasir doctor: the machine, the model, the libraries, the folders; what is missing and what would be slow, and why. */
#include "cli/cli.h"

#include "model/model.h"

#include <ggml.h>
#include <histedit.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

typedef struct checkup {
    json_t *facts, *slow, *missing;
} checkup;

static void fact(checkup *c, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void fact(checkup *c, const char *name, const char *fmt, ...)
{
    char text[4400];
    va_list list;
    va_start(list, fmt);
    vsnprintf(text, sizeof text, fmt, list);
    va_end(list);
    kvs_cli_set_text(c->facts, name, text);
}

static void note(json_t *notes, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void note(json_t *notes, const char *fmt, ...)
{
    char text[4400];
    va_list list;
    va_start(list, fmt);
    vsnprintf(text, sizeof text, fmt, list);
    va_end(list);
    json_array_append_new(notes, json_string(text));
}

static void check_machine(const kvs_cli_args *args, checkup *c, uint64_t *available_bytes)
{
    const uint32_t n_cores = kvs_cores_available(), cpu = kvs_cpu_masked(kvs_cli_cpu_bits(args));
    const uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t total = (uint64_t)sysconf(_SC_PHYS_PAGES) * page_bytes;
    *available_bytes = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * page_bytes;
    FILE *const f = fopen("/proc/meminfo", "r"); /* counts the page cache that can be given back, too */
    char line[128];
    unsigned long long kib;
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
            *available_bytes = (uint64_t)kib * 1024u;
    if (f != NULL)
        fclose(f);
    fact(c, "cores", "%u", n_cores);
    fact(c, "isa", "%s", kvs_cpu_isa_name(cpu));
    fact(c, "memory", "%.1f GiB, %.1f GiB available", (double)total / 0x1p30, (double)*available_bytes / 0x1p30);
    const double bandwidth = kvs_cli_read_bandwidth(args->threads);
    fact(c, "read_bandwidth", "%.1f GB/s", bandwidth * 1e-9);
    if (n_cores == 1)
        note(c->slow, "one core: prefill is bound by arithmetic and would be nearly twice as fast on two");
    if (!(cpu & (KVS_CPU_AVX2 | KVS_CPU_NEON)))
        note(c->slow, "no AVX2 with FMA, no NEON: the plain C kernels run, an order of magnitude slower");
    else if (!(cpu & (KVS_CPU_VNNI | KVS_CPU_DOTPROD)))
        note(c->slow,
             "no 8-bit dot products (AVX512-VNNI, NEON SDOT): native prefill uses %s integer products, which need more "
             "instructions a product",
             kvs_cpu_isa_name(cpu));
    if (bandwidth > 0 && bandwidth < 5e9)
        note(c->slow, "memory is read at %.1f GB/s: a decoded token reads all weights once, so decode is bound by that",
             bandwidth * 1e-9);
}

static void check_model(const kvs_cli_args *args, checkup *c, uint64_t available_bytes)
{
    char path[4096];
    kvs_error err = {0};
    kvs_model *m = NULL;
    if (kvs_cli_model_path(args, path, sizeof path, &err) != KVS_OK) {
        fact(c, "model", "not found");
        note(c->missing, "%s", err.message);
        return;
    }
    fact(c, "model", "%s", path);
    const uint64_t begin_ns = kvs_now_ns();
    if (kvs_cli_open_model(args, &m, &err) != KVS_OK) {
        note(c->missing, "the model cannot be opened: %s", err.message);
        return;
    }
    const kvs_model_info *const i = &m->info;
    fact(c, "model_open_ms", "%.0f", (double)(kvs_now_ns() - begin_ns) * 1e-6);
    fact(c, "model_sha256", "%s", kvs_model_sha256(m));
    fact(c, "model_shape", "%s, %.1fM parameters, %u layers, %u heads over %u, window %u", i->arch,
         (double)i->n_params * 1e-6, i->n_layers, i->n_heads, i->n_kv_heads, i->window_tokens);
    const uint64_t token_bytes = 4ull * i->n_layers * i->n_kv_heads * i->head_dim;
    fact(c, "kv_cache", "%llu bytes a token in f16, %.0f MiB for the window", (unsigned long long)token_bytes,
         kvs_cli_mib(token_bytes * i->window_tokens));
    if (i->packed_bytes < i->weight_bytes / 2)
        note(c->slow,
             "most weights are of types without tiled kernels (%.0f of %.0f MiB packed): their prefill takes one "
             "dot product a row; Q4_0, Q4_1, Q8_0 and F32 have them",
             kvs_cli_mib(i->packed_bytes), kvs_cli_mib(i->weight_bytes));
    if (i->weight_bytes + i->packed_bytes + token_bytes * i->window_tokens > available_bytes)
        note(c->slow, "weights and a full window need %.1f GiB and %.1f are available: pages would go to disk",
             (double)(i->weight_bytes + i->packed_bytes + token_bytes * i->window_tokens) / 0x1p30,
             (double)available_bytes / 0x1p30);
    kvs_model_close(&m);
}

static void check_libraries(checkup *c)
{
    fact(c, "kvasir", "%s", kvs_version());
    fact(c, "ggml", "%s (%s)", ggml_version(), ggml_commit());
    fact(c, "jansson", "%s", jansson_version_str());
    fact(c, "libedit", "%d.%d", LIBEDIT_MAJOR, LIBEDIT_MINOR);
    fact(c, "xxhash", "%u.%u.%u", XXH_versionNumber() / 10000, XXH_versionNumber() / 100 % 100,
         XXH_versionNumber() % 100);
}

/* Writes a file and takes it away again: permissions, quotas and read-only mounts all show. */
static void check_folder(checkup *c, const char *name, const char *variable, const char *fallback, const char *purpose)
{
    char path[4096], leaf[64];
    kvs_error err = {0};
    snprintf(leaf, sizeof leaf, ".doctor.%ld", (long)getpid());
    if (!kvs_cli_xdg_path(variable, fallback, leaf, path, sizeof path)) {
        fact(c, name, "none: HOME and %s are not set", variable);
        note(c->slow, "no home folder: %s", purpose);
        return;
    }
    const kvs_status status = kvs_cli_write_file(path, "x", 1, "", 0, &err);
    unlink(path);
    *strrchr(path, '/') = '\0';
    fact(c, name, "%s, %s", path, status == KVS_OK ? "writable" : "not writable");
    if (status != KVS_OK)
        note(c->missing, "%s; %s", err.message, purpose);
}

static void print_notes(const char *title, json_t *notes)
{
    size_t i;
    json_t *text;
    json_array_foreach (notes, i, text)
        printf("%s%s\n", title, json_string_value(text));
}

int kvs_cmd_doctor(const kvs_cli_args *args)
{
    checkup c = {json_object(), json_array(), json_array()};
    uint64_t available_bytes = 0;
    check_machine(args, &c, &available_bytes);
    check_model(args, &c, available_bytes);
    check_libraries(&c);
    check_folder(&c, "cache_folder", "XDG_CACHE_HOME", ".cache", "the set-up cannot put a model there");
    check_folder(&c, "state_folder", "XDG_STATE_HOME", ".local/state", "chat cannot keep sessions and history");
    const bool good = json_array_size(c.missing) == 0;
    int code = good ? KVS_EXIT_OK : KVS_EXIT_FAILURE;
    if (args->json) {
        json_object_set_new(c.facts, "ok", json_boolean(good));
        json_object_set(c.facts, "slow", c.slow);
        json_object_set(c.facts, "missing", c.missing);
        if (kvs_cli_print_json(json_incref(c.facts)) != KVS_EXIT_OK)
            code = KVS_EXIT_FAILURE;
    } else {
        const char *name;
        json_t *value;
        json_object_foreach (c.facts, name, value)
            printf("%-16s %s\n", name, json_string_value(value));
        print_notes("slow: ", c.slow);
        print_notes("missing: ", c.missing);
        if (json_array_size(c.slow) == 0 && good)
            printf("nothing is missing and nothing here would be slow\n");
    }
    if (!good)
        fprintf(stderr, "kvasir doctor: %s\n", json_string_value(json_array_get(c.missing, 0)));
    json_decref(c.facts);
    json_decref(c.slow);
    json_decref(c.missing);
    return code;
}

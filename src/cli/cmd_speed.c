/* kvasir speed: prefill and decode rate against depth, beside what the machine's memory and arithmetic allow.
 *
 * The bounds are a roofline. A step of N sessions reads all weights once and every live slot once; a prompt token costs
 * two operations per weight of the layers and four per live slot, query head and dimension. Native arithmetic does the
 * products with quantised weights in 8-bit codes and attention in f32, each of which has its own peak; time at the peak
 * is the sum of both.
 */
#include "cli/cli.h"

#include "model/model.h"

#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { REPEATS_MAX = 63 };

typedef struct bench {
    const kvs_cli_args *args;
    kvs_model *model;
    kvs_cli_peaks peaks;
    uint32_t n_gen, n_append, n_repeats, n_sessions;
    struct lane *lanes; /* [n_sessions] */
    kvs_run *runs;      /* [n_sessions] */
    kvs_cli_progress progress;
    uint64_t n_done, n_total; /* tokens, for the progress line */
} bench;

/* One session of the step. */
struct lane {
    kvs_session *session;
    int32_t *tokens; /* the prompt, then what --prompt adds */
    int32_t next;    /* the likeliest token after the last one */
    uint32_t vocab_size;
};

typedef struct timing {
    double prefill_s, append_s, decode_s;
    double live_bytes; /* of all sessions, mean over the decoded tokens */
    double footprint;  /* of the prompt: live slots as a share of the full cache's, summed over its tokens */
    uint64_t peak_kv_bytes, n_evictions;
} timing;

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, uint32_t n)
{
    qsort(x, n, sizeof *x, compare_doubles);
    return n % 2 == 1 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

/* ---- what a token costs ------------------------------------------------------------------------------------------ */

typedef struct cost {
    double weight_bytes;      /* every matrix once, the embedding's one row aside */
    double int8_ops, f32_ops; /* of a row through all layers: products with quantised and with f32 weights */
    double head_int8, head_f32;
} cost;

static double matrix_bytes(const kvs_weight *w)
{
    return w->packed != NULL ? (double)w->packed_bytes : (double)w->n_out * (double)w->raw_row_bytes;
}

static void add_matrix(const kvs_weight *w, bool native, double *bytes, double *int8_ops, double *f32_ops)
{
    if (w->n_out == 0)
        return;
    *bytes += matrix_bytes(w);
    const bool dense = w->type == KVS_WEIGHT_F32 || w->type == KVS_WEIGHT_F16 || w->type == KVS_WEIGHT_BF16;
    *(native && !dense ? int8_ops : f32_ops) += 2.0 * w->n_out * w->n_in;
}

static cost model_cost(const kvs_model *m, bool native)
{
    cost c = {.weight_bytes = 0};
    add_matrix(&m->head, native, &c.weight_bytes, &c.head_int8, &c.head_f32);
    for (uint32_t i = 0; i < m->info.n_layers; i++) {
        const kvs_layer *const l = &m->layers[i];
        const kvs_layer_parts *const p = &m->parts[i];
        const kvs_weight *const matrices[] = {&l->qkv, &l->attn_out, &l->gate_up, &l->ffn_down, &p->q,
                                              &p->k,   &p->v,        &p->gate,    &p->up};
        for (size_t j = 0; j < sizeof matrices / sizeof matrices[0]; j++) {
            const bool joined = (j >= 4 && j < 7 && l->qkv.n_out > 0) || (j >= 7 && l->gate_up.n_out > 0);
            if (!joined)
                add_matrix(matrices[j], native, &c.weight_bytes, &c.int8_ops, &c.f32_ops);
        }
    }
    return c;
}

/* Score and output of one token over n_slots slots of every head. */
static double attention_ops(const kvs_model *m, double n_slots)
{
    return 4.0 * m->info.n_layers * m->info.n_heads * m->info.head_dim * n_slots;
}

/* Without an integer peak (no such instruction) everything is counted at the f32 peak. */
static double seconds_at_peak(const kvs_cli_peaks *peaks, double int8_ops, double f32_ops)
{
    return int8_ops / (peaks->int8_ops > 0 ? peaks->int8_ops : peaks->f32_flops) + f32_ops / peaks->f32_flops;
}

/* ---- one measurement --------------------------------------------------------------------------------------------- */

static bool take_likeliest(void *ctx, uint32_t row, const float *logits)
{
    (void)row;
    struct lane *const lane = ctx;
    uint32_t best = 0;
    for (uint32_t i = 1; i < lane->vocab_size; i++)
        if (logits[i] > logits[best])
            best = i;
    lane->next = (int32_t)best;
    return true;
}

/* One step of all sessions, timed; n_tokens 0: each feeds the token it chose. */
static kvs_status step(bench *b, uint32_t first, uint32_t n_tokens, double *seconds, kvs_error *err)
{
    for (uint32_t i = 0; i < b->n_sessions; i++) {
        struct lane *const lane = &b->lanes[i];
        b->runs[i] = (kvs_run){.session = lane->session,
                               .tokens = n_tokens > 0 ? lane->tokens + first : &lane->next,
                               .n_tokens = n_tokens > 0 ? n_tokens : 1,
                               .on_logits = take_likeliest,
                               .ctx = lane};
    }
    const uint64_t begin_ns = kvs_now_ns();
    KVS_TRY(kvs_step(b->runs, b->n_sessions, err));
    *seconds += (double)(kvs_now_ns() - begin_ns) * 1e-9;
    return kvs_cli_interrupted > 0 ? kvs_error_set(err, KVS_ECANCELLED, "stopped") : KVS_OK;
}

static double live_bytes(const bench *b)
{
    double bytes = 0;
    kvs_usage u;
    for (uint32_t i = 0; i < b->n_sessions; i++) {
        kvs_session_get_usage(b->lanes[i].session, &u);
        bytes += (double)u.live_bytes;
    }
    return bytes;
}

static kvs_status run_sessions(bench *b, uint32_t depth, timing *t, kvs_error *err)
{
    kvs_usage u;
    KVS_TRY(step(b, 0, depth, &t->prefill_s, err));
    kvs_session_get_usage(b->lanes[0].session, &u);
    t->footprint = u.footprint;
    for (uint32_t i = 0; i < b->n_gen; i++) {
        KVS_TRY(step(b, 0, 0, &t->decode_s, err));
        t->live_bytes += live_bytes(b) / b->n_gen;
    }
    if (b->n_append > 0)
        KVS_TRY(step(b, depth, b->n_append, &t->append_s, err));
    for (uint32_t i = 0; i < b->n_sessions; i++) {
        kvs_session_get_usage(b->lanes[i].session, &u);
        t->peak_kv_bytes += u.kv_bytes_peak;
        t->n_evictions += u.n_evictions;
    }
    return KVS_OK;
}

static kvs_status measure_once(bench *b, uint32_t depth, timing *t, kvs_error *err)
{
    kvs_session_options opt;
    kvs_cli_session_options(b->args, KVS_ARITH_NATIVE, &opt);
    if (b->args->budgets.n == 0)
        opt.budget_tokens = depth + b->n_gen + b->n_append;
    *t = (timing){.prefill_s = 0};
    kvs_status status = KVS_OK;
    for (uint32_t i = 0; status == KVS_OK && i < b->n_sessions; i++)
        status = kvs_session_create(b->model, &opt, &b->lanes[i].session, err);
    if (status == KVS_OK)
        status = run_sessions(b, depth, t, err);
    for (uint32_t i = 0; i < b->n_sessions; i++)
        kvs_session_free(&b->lanes[i].session);
    return status;
}

/* Lets the process's peak RSS start anew, so that each depth shows its own; where the kernel refuses, it only grows. */
static void reset_peak_rss(void)
{
    const int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    (void)!write(fd, "5", 1);
    close(fd);
}

static void fill_row(const bench *b, const timing *t, kvs_cli_speed_row *row)
{
    const kvs_model *const m = b->model;
    const bool native = b->args->arith == NULL || strcmp(b->args->arith, "native") == 0;
    const cost c = model_cost(m, native);
    const double n = row->n_sessions, depth = row->depth;
    const double prompt_attention = attention_ops(m, t->footprint * (depth + 1) / 2);
    const double prompt_s = seconds_at_peak(&b->peaks, c.int8_ops, c.f32_ops + prompt_attention);
    row->flops_per_token = c.int8_ops + c.f32_ops + prompt_attention;
    row->prefill_bound_tok_per_s = 1 / prompt_s;
    row->share_of_peak = row->prefill_tok_per_s * prompt_s;
    row->bytes_per_token = (c.weight_bytes + t->live_bytes) / n;
    row->share_of_bandwidth = row->bytes_per_token * row->decode_tok_per_s / b->peaks.read_bytes_per_s;
    const double slot_bytes = 2.0 * m->info.n_layers * m->info.n_kv_heads * m->info.head_dim *
                              (b->args->kv_type != NULL && strcmp(b->args->kv_type, "f32") == 0 ? 4 : 2);
    const double decode_s = seconds_at_peak(&b->peaks, c.int8_ops + c.head_int8,
                                            c.f32_ops + c.head_f32 + attention_ops(m, t->live_bytes / n / slot_bytes));
    row->decode_bound_tok_per_s = fmin(b->peaks.read_bytes_per_s / row->bytes_per_token, 1 / decode_s);
}

static kvs_status measure_depth(bench *b, kvs_cli_speed_row *row, kvs_error *err)
{
    double prefill[REPEATS_MAX], append[REPEATS_MAX], decode[REPEATS_MAX];
    const uint32_t depth = row->depth, n = b->n_sessions;
    kvs_status status = KVS_OK;
    kvs_rng rng = {.state = b->args->seed + depth};
    for (uint32_t i = 0; i < n; i++) {
        b->lanes[i].tokens = calloc((size_t)depth + b->n_append, sizeof(int32_t));
        if (b->lanes[i].tokens == NULL)
            status = kvs_error_set(err, KVS_ENOMEM, "no memory for a prompt of %u tokens", depth);
        for (uint32_t j = 0; status == KVS_OK && j < depth + b->n_append; j++)
            b->lanes[i].tokens[j] = (int32_t)kvs_rng_below(&rng, b->model->info.vocab_size);
    }
    timing t = {.prefill_s = 0};
    reset_peak_rss();
    for (uint32_t i = 0; status == KVS_OK && i < b->n_repeats; i++) {
        kvs_cli_progress_show(&b->progress, b->n_done, b->n_total, -1);
        status = measure_once(b, depth, &t, err);
        prefill[i] = (double)n * depth / t.prefill_s;
        append[i] = (double)n * b->n_append / t.append_s;
        decode[i] = (double)n * b->n_gen / t.decode_s;
        b->n_done += (uint64_t)n * (depth + b->n_gen + b->n_append);
    }
    if (status == KVS_OK) {
        row->prefill_tok_per_s = median(prefill, b->n_repeats);
        row->append_tok_per_s = b->n_append > 0 ? median(append, b->n_repeats) : NAN;
        row->decode_tok_per_s = median(decode, b->n_repeats);
        row->peak_kv_bytes = t.peak_kv_bytes;
        row->n_evictions = t.n_evictions;
        row->peak_rss_bytes = kvs_cli_peak_rss_bytes();
        fill_row(b, &t, row);
    }
    for (uint32_t i = 0; i < n; i++) {
        free(b->lanes[i].tokens);
        b->lanes[i].tokens = NULL;
    }
    return status;
}

/* ---- results ----------------------------------------------------------------------------------------------------- */

static const char *policy_of(const bench *b)
{
    return kvs_cli_last(&b->args->policies, "baseline");
}

static json_t *row_json(const kvs_cli_speed_row *row)
{
    json_t *const r = json_object();
    kvs_cli_set_int(r, "depth", row->depth);
    kvs_cli_set_int(r, "sessions", row->n_sessions);
    kvs_cli_set_real(r, "prefill_tok_per_s", row->prefill_tok_per_s);
    kvs_cli_set_real(r, "append_tok_per_s", row->append_tok_per_s);
    kvs_cli_set_real(r, "decode_tok_per_s", row->decode_tok_per_s);
    kvs_cli_set_real(r, "bytes_per_token", row->bytes_per_token);
    kvs_cli_set_real(r, "share_of_bandwidth", row->share_of_bandwidth);
    kvs_cli_set_real(r, "flops_per_token", row->flops_per_token);
    kvs_cli_set_real(r, "share_of_peak", row->share_of_peak);
    kvs_cli_set_int(r, "peak_kv_bytes", row->peak_kv_bytes);
    kvs_cli_set_int(r, "peak_rss_bytes", row->peak_rss_bytes);
    kvs_cli_set_int(r, "evictions", row->n_evictions);
    return r;
}

static int print_json(const bench *b, const kvs_cli_speed_row *rows, uint32_t n)
{
    json_t *const o = json_object(), *const list = json_array();
    for (uint32_t i = 0; i < n; i++)
        json_array_append_new(list, row_json(&rows[i]));
    json_object_set_new(o, "rows", list);
    kvs_cli_set_text(o, "isa", b->model->info.isa);
    kvs_cli_set_int(o, "threads", b->model->info.n_threads);
    kvs_cli_set_real(o, "read_bytes_per_s", b->peaks.read_bytes_per_s);
    kvs_cli_set_real(o, "f32_peak_flops", b->peaks.f32_flops);
    kvs_cli_set_real(o, "int8_peak_ops", b->peaks.int8_ops > 0 ? b->peaks.int8_ops : NAN);
    kvs_cli_set_text(o, "model", b->model->info.path);
    kvs_cli_set_text(o, "arith", b->args->arith != NULL ? b->args->arith : "native");
    kvs_cli_set_text(o, "policy", policy_of(b));
    kvs_cli_set_text(o, "budget", kvs_cli_last(&b->args->budgets, NULL));
    return kvs_cli_print_json(o);
}

static const char *limits_text(const bench *b, char *text, size_t cap_bytes)
{
    const kvs_cli_peaks *const p = &b->peaks;
    int n = snprintf(text, cap_bytes, "reads %.1f GB/s, %.*f GFLOP/s in f32", p->read_bytes_per_s * 1e-9,
                     p->f32_flops < 1e10 ? 1 : 0, p->f32_flops * 1e-9);
    if (p->int8_ops > 0)
        snprintf(text + n, cap_bytes - (size_t)n, ", %.0f Gop/s in int8", p->int8_ops * 1e-9);
    return text;
}

static int print_text(const bench *b, const kvs_cli_speed_row *rows, uint32_t n)
{
    const kvs_model_info *const m = &b->model->info;
    printf("%s, %s, %u thread%s, %u session%s, policy %s, budget %s\n", m->path, m->isa, m->n_threads,
           m->n_threads == 1 ? "" : "s", b->n_sessions, b->n_sessions == 1 ? "" : "s", policy_of(b),
           kvs_cli_last(&b->args->budgets, "what the depth needs"));
    char limits[120];
    printf("%s", limits_text(b, limits, sizeof limits));
    printf("\n%8s %14s %6s %14s %6s %12s %9s %9s\n", "depth", "prefill tok/s", "peak", "decode tok/s", "bandw.",
           "MB a token", "KV MiB", "RSS MiB");
    for (uint32_t i = 0; i < n; i++) {
        const kvs_cli_speed_row *const r = &rows[i];
        printf("%8u %14.1f %5.0f%% %14.1f %5.0f%% %12.1f %9.1f %9.1f\n", r->depth, r->prefill_tok_per_s,
               r->share_of_peak * 100, r->decode_tok_per_s, r->share_of_bandwidth * 100, r->bytes_per_token * 1e-6,
               kvs_cli_mib(r->peak_kv_bytes), kvs_cli_mib(r->peak_rss_bytes));
        if (!isnan(r->append_tok_per_s))
            printf("%8s %14.1f  (%u more prompt tokens there)\n", "", r->append_tok_per_s, b->n_append);
    }
    return KVS_EXIT_OK;
}

static kvs_status write_plot(const bench *b, const kvs_cli_speed_row *rows, uint32_t n, kvs_error *err)
{
    const char *const slash = strrchr(b->model->info.path, '/');
    char title[400], limits[120];
    snprintf(title, sizeof title, "%.100s, %s, %u thread%s, %u session%s, %.60s",
             slash != NULL ? slash + 1 : b->model->info.path, b->model->info.isa, b->model->info.n_threads,
             b->model->info.n_threads == 1 ? "" : "s", b->n_sessions, b->n_sessions == 1 ? "" : "s",
             b->args->policies.n > 0 ? policy_of(b) : "full cache");
    return kvs_cli_speed_plot(b->args->plot, title, limits_text(b, limits, sizeof limits), rows, n, err);
}

static kvs_status prepare(bench *b, const kvs_cli_numbers *depths, kvs_cli_speed_row *rows, kvs_error *err)
{
    const kvs_cli_args *const args = b->args;
    b->n_gen = args->gen_tokens > 0 ? args->gen_tokens : 16;
    b->n_append = args->prompt_tokens;
    b->n_repeats = args->repeats > 0 ? args->repeats : 3;
    b->n_sessions = args->n_sessions > 0 ? args->n_sessions : 1;
    KVS_TRY(kvs_cli_open_model(args, &b->model, err));
    b->lanes = calloc(b->n_sessions, sizeof *b->lanes);
    b->runs = calloc(b->n_sessions, sizeof *b->runs);
    if (b->lanes == NULL || b->runs == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %u sessions", b->n_sessions);
    for (uint32_t i = 0; i < b->n_sessions; i++)
        b->lanes[i].vocab_size = b->model->info.vocab_size;
    for (uint32_t i = 0; i < depths->n; i++) {
        rows[i] = (kvs_cli_speed_row){.depth = depths->items[i], .n_sessions = b->n_sessions};
        b->n_total += (uint64_t)b->n_sessions * b->n_repeats * (depths->items[i] + b->n_gen + b->n_append);
    }
    kvs_cli_measure_peaks(b->model->info.n_threads, b->model->kernels->cpu, &b->peaks);
    if (!(b->peaks.read_bytes_per_s > 0 && b->peaks.f32_flops > 0))
        return kvs_error_set(err, KVS_ENOMEM, "no memory for the bandwidth probe");
    return KVS_OK;
}

int kvs_cmd_speed(const kvs_cli_args *args)
{
    static const kvs_cli_numbers usual = {.items = {512, 2048, 4096}, .n = 3};
    const kvs_cli_numbers *const depths = args->depths.n > 0 ? &args->depths : &usual;
    kvs_cli_speed_row rows[KVS_CLI_LIST_MAX];
    kvs_error err = {0};
    bench b = {.args = args};
    kvs_cli_catch_interrupts();
    kvs_status status = prepare(&b, depths, rows, &err);
    kvs_cli_progress_begin(&b.progress, "speed: tokens");
    for (uint32_t i = 0; status == KVS_OK && i < depths->n; i++)
        status = measure_depth(&b, &rows[i], &err);
    kvs_cli_progress_end(&b.progress);
    int code = KVS_EXIT_OK;
    if (status == KVS_OK)
        code = args->json ? print_json(&b, rows, depths->n) : print_text(&b, rows, depths->n);
    if (status == KVS_OK && args->plot != NULL)
        status = write_plot(&b, rows, depths->n, &err);
    if (status != KVS_OK)
        code = kvs_cli_report(args, &err);
    if (status == KVS_ECANCELLED)
        code = KVS_EXIT_INTERRUPTED;
    free(b.lanes);
    free(b.runs);
    kvs_model_close(&b.model);
    return code;
}

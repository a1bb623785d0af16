/* kvasir speed: prefill and decode rate of the full cache against depth, as shares of the machine's read bandwidth. */
#include "cli/cli.h"

#include "model/model.h"

#include <math.h>
#include <stdlib.h>

typedef struct speed_row {
    uint32_t depth;
    double prefill_tok_per_s, append_tok_per_s, decode_tok_per_s, bytes_per_token, share_of_bandwidth;
} speed_row;

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

static uint64_t weight_bytes(const kvs_weight *w)
{
    if (w->n_out == 0)
        return 0;
    return w->packed != NULL ? w->packed_bytes : (uint64_t)w->n_out * w->raw_row_bytes;
}

/* Weights one decoded token reads: every matrix once, the embedding's one row aside. */
static uint64_t weight_bytes_per_token(const kvs_model *m)
{
    uint64_t n = weight_bytes(&m->head);
    for (uint32_t i = 0; i < m->info.n_layers; i++) {
        const kvs_layer *const l = &m->layers[i];
        n +=
            weight_bytes(&l->qkv) + weight_bytes(&l->attn_out) + weight_bytes(&l->gate_up) + weight_bytes(&l->ffn_down);
        const kvs_layer_parts *const p = &m->parts[i];
        if (l->qkv.n_out == 0)
            n += weight_bytes(&p->q) + weight_bytes(&p->k) + weight_bytes(&p->v);
        if (l->gate_up.n_out == 0)
            n += weight_bytes(&p->gate) + weight_bytes(&p->up);
    }
    return n;
}

typedef struct timing {
    double prefill_s, append_s, decode_s;
    uint64_t live_bytes;
} timing;

static kvs_status measure(const kvs_cli_args *args, kvs_model *m, const int32_t *tokens, uint32_t depth,
                          uint32_t n_append, uint32_t n_gen, float *logits, timing *out, kvs_error *err)
{
    kvs_session_options opt;
    kvs_session *s = NULL;
    kvs_cli_session_options(args, KVS_ARITH_NATIVE, &opt);
    opt.budget_tokens = depth + kvs_max_u32(n_append, n_gen);
    KVS_TRY(kvs_session_create(m, &opt, &s, err));
    uint64_t begin_ns = kvs_now_ns();
    kvs_status status = kvs_session_extend(s, tokens, NULL, depth, logits, err);
    out->prefill_s = (double)(kvs_now_ns() - begin_ns) * 1e-9;
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    out->live_bytes = u.live_bytes;
    begin_ns = kvs_now_ns();
    for (uint32_t i = 0; status == KVS_OK && i < n_gen; i++) {
        status = kvs_session_extend(s, tokens + depth + i, NULL, 1, logits, err);
        if (status == KVS_OK && kvs_cli_interrupted > 0)
            status = kvs_error_set(err, KVS_ECANCELLED, "stopped");
    }
    out->decode_s = (double)(kvs_now_ns() - begin_ns) * 1e-9;
    out->append_s = NAN;
    if (status == KVS_OK && n_append > 0) {
        status = kvs_session_truncate(s, depth, err);
        begin_ns = kvs_now_ns();
        if (status == KVS_OK)
            status = kvs_session_extend(s, tokens + depth, NULL, n_append, logits, err);
        out->append_s = (double)(kvs_now_ns() - begin_ns) * 1e-9;
    }
    kvs_session_free(&s);
    if (status == KVS_OK && kvs_cli_interrupted > 0)
        status = kvs_error_set(err, KVS_ECANCELLED, "stopped");
    return status;
}

static kvs_status measure_depth(const kvs_cli_args *args, kvs_model *m, uint32_t depth, double bandwidth,
                                speed_row *row, kvs_cli_progress *progress, uint64_t *n_done, uint64_t n_total,
                                kvs_error *err)
{
    const uint32_t n_gen = args->gen_tokens > 0 ? args->gen_tokens : 16, n_append = args->prompt_tokens;
    const uint32_t n_repeats = args->repeats > 0 ? args->repeats : 3;
    const uint32_t n = depth + kvs_max_u32(n_gen, n_append);
    double prefill[64], append[64], decode[64];
    int32_t *const tokens = calloc(n, sizeof *tokens);
    float *const logits = calloc(m->info.vocab_size, sizeof *logits);
    kvs_status status = tokens != NULL && logits != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory");
    kvs_rng rng = {.state = args->seed + depth};
    for (uint32_t i = 0; status == KVS_OK && i < n; i++)
        tokens[i] = (int32_t)kvs_rng_below(&rng, m->info.vocab_size);
    timing t = {.live_bytes = 0};
    for (uint32_t i = 0; status == KVS_OK && i < n_repeats; i++) {
        kvs_cli_progress_show(progress, *n_done, n_total, -1);
        status = measure(args, m, tokens, depth, n_append, n_gen, logits, &t, err);
        prefill[i] = depth / t.prefill_s;
        append[i] = n_append / t.append_s;
        decode[i] = n_gen / t.decode_s;
        *n_done += depth + n_gen + n_append;
    }
    if (status == KVS_OK) {
        row->depth = depth;
        row->prefill_tok_per_s = median(prefill, n_repeats);
        row->append_tok_per_s = n_append > 0 ? median(append, n_repeats) : NAN;
        row->decode_tok_per_s = median(decode, n_repeats);
        row->bytes_per_token = (double)(weight_bytes_per_token(m) + t.live_bytes);
        row->share_of_bandwidth = row->bytes_per_token * row->decode_tok_per_s / bandwidth;
    }
    free(tokens);
    free(logits);
    return status;
}

static int print_rows(const kvs_cli_args *args, const kvs_model *m, const speed_row *rows, uint32_t n, double bandwidth)
{
    if (args->json) {
        json_t *const o = json_object(), *const list = json_array();
        for (uint32_t i = 0; i < n; i++) {
            json_t *const r = json_object();
            kvs_cli_set_int(r, "depth", rows[i].depth);
            kvs_cli_set_real(r, "prefill_tok_per_s", rows[i].prefill_tok_per_s);
            kvs_cli_set_real(r, "append_tok_per_s", rows[i].append_tok_per_s);
            kvs_cli_set_real(r, "decode_tok_per_s", rows[i].decode_tok_per_s);
            kvs_cli_set_real(r, "bytes_per_token", rows[i].bytes_per_token);
            kvs_cli_set_real(r, "share_of_bandwidth", rows[i].share_of_bandwidth);
            json_array_append_new(list, r);
        }
        json_object_set_new(o, "rows", list);
        kvs_cli_set_text(o, "isa", m->info.isa);
        kvs_cli_set_int(o, "threads", m->info.n_threads);
        kvs_cli_set_real(o, "read_bytes_per_s", bandwidth);
        kvs_cli_set_text(o, "model", m->info.path);
        kvs_cli_set_text(o, "arith", args->arith != NULL ? args->arith : "native");
        return kvs_cli_print_json(o);
    }
    printf("%s, %s, %u threads, reads %.1f GB/s\n", m->info.path, m->info.isa, m->info.n_threads, bandwidth * 1e-9);
    printf("%8s %16s %15s %12s %20s\n", "depth", "prefill tok/s", "decode tok/s", "MB a token", "share of bandwidth");
    for (uint32_t i = 0; i < n; i++) {
        printf("%8u %16.1f %15.1f %12.1f %19.0f%%\n", rows[i].depth, rows[i].prefill_tok_per_s,
               rows[i].decode_tok_per_s, rows[i].bytes_per_token * 1e-6, rows[i].share_of_bandwidth * 100);
        if (!isnan(rows[i].append_tok_per_s))
            printf("%8s %16.1f  (%u more prompt tokens there)\n", "", rows[i].append_tok_per_s, args->prompt_tokens);
    }
    return KVS_EXIT_OK;
}

int kvs_cmd_speed(const kvs_cli_args *args)
{
    static const kvs_cli_numbers usual = {.items = {512, 2048, 4096}, .n = 3};
    const kvs_cli_numbers *const depths = args->depths.n > 0 ? &args->depths : &usual;
    kvs_error err = {0};
    kvs_model *m = NULL;
    speed_row rows[KVS_CLI_LIST_MAX];
    if (kvs_cli_open_model(args, &m, &err) != KVS_OK)
        return kvs_cli_report(args, &err);
    kvs_cli_catch_interrupts();
    const double bandwidth = kvs_cli_read_bandwidth(m->info.n_threads);
    kvs_status status = bandwidth > 0 ? KVS_OK : kvs_error_set(&err, KVS_ENOMEM, "no memory for the bandwidth probe");
    uint64_t n_done = 0, n_total = 0;
    for (uint32_t i = 0; i < depths->n; i++)
        n_total += ((uint64_t)depths->items[i] + (args->gen_tokens > 0 ? args->gen_tokens : 16) + args->prompt_tokens) *
                   (args->repeats > 0 ? args->repeats : 3);
    kvs_cli_progress progress;
    kvs_cli_progress_begin(&progress, "speed: tokens");
    for (uint32_t i = 0; status == KVS_OK && i < depths->n; i++)
        status = measure_depth(args, m, depths->items[i], bandwidth, &rows[i], &progress, &n_done, n_total, &err);
    kvs_cli_progress_end(&progress);
    int code;
    if (status == KVS_OK)
        code = print_rows(args, m, rows, depths->n, bandwidth);
    else
        code = kvs_cli_report(args, &err);
    if (status == KVS_ECANCELLED)
        code = KVS_EXIT_INTERRUPTED;
    kvs_model_close(&m);
    return code;
}

/* kvasir eval: a text or a dialogue, teacher-forced through a policy session beside a reference (eval/teacher.h). */
#include "cli/cli.h"

#include "bench/dialogue.h"
#include "eval/keep_sets.h"
#include "eval/teacher.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct stream {
    int32_t *tokens;
    uint8_t *flags, *turns; /* NULL for a text */
    uint32_t n_tokens;
} stream;

typedef struct dumps {
    FILE *logits;
    const char *keep_path;
    const kvs_model *m;
    const stream *x;
    json_t *state; /* what on_end reads of the session */
    int32_t *fact; /* tokens that --needle found */
    uint32_t n_fact;
    kvs_keep_report kept;
    kvs_routing routing;
    uint32_t vocab_size;
    kvs_cli_progress progress;
    kvs_error err;
} dumps;

static void stream_free(stream *x)
{
    free(x->tokens);
    free(x->flags);
    free(x->turns);
    *x = (stream){0};
}

static kvs_status read_text(const kvs_model *m, const char *path, stream *out, kvs_error *err)
{
    char *text;
    size_t n_bytes, n_tokens = 0;
    KVS_TRY(kvs_cli_read_file(path, &text, &n_bytes, err));
    out->tokens = calloc(n_bytes + 8, sizeof *out->tokens); /* a token is a byte at least, and a BOS */
    kvs_status status = out->tokens != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for %s", path);
    if (status == KVS_OK) {
        kvs_error cause = {0};
        status = kvs_tokenize(m, text, n_bytes, true, false, out->tokens, n_bytes + 8, &n_tokens, &cause);
        if (status != KVS_OK)
            kvs_error_set(err, status, "%s: %s", path, cause.message);
        else if (n_tokens < 2 || n_tokens > INT32_MAX)
            status = kvs_error_set(err, KVS_EINVAL, "%s has %zu tokens; 2 at least are needed", path, n_tokens);
    }
    free(text);
    out->n_tokens = (uint32_t)n_tokens;
    return status;
}

/* Turns begin with a user's message; system messages belong to the turn they stand before. */
static kvs_status render(const kvs_model *m, const kvs_message *messages, size_t n, stream *out, kvs_error *err)
{
    for (size_t at = 0; at < n;) {
        size_t end = at + 1;
        while (end < n && !(strcmp(messages[end].role, "user") == 0 && strcmp(messages[end - 1].role, "system") != 0))
            end++;
        kvs_rendered turn;
        KVS_TRY(kvs_chat_render(m, messages, end, at, false, &turn, err));
        const size_t total = out->n_tokens + turn.n_tokens;
        int32_t *const tokens = realloc(out->tokens, total * sizeof *tokens + 1);
        if (tokens != NULL)
            out->tokens = tokens;
        uint8_t *const flags = realloc(out->flags, total + 1), *const turns = realloc(out->turns, total + 1);
        if (flags != NULL)
            out->flags = flags;
        if (turns != NULL)
            out->turns = turns;
        const bool good = tokens != NULL && flags != NULL && turns != NULL && total <= INT32_MAX;
        if (good && turn.n_tokens > 0) {
            memcpy(tokens + out->n_tokens, turn.tokens, turn.n_tokens * sizeof *tokens);
            memcpy(flags + out->n_tokens, turn.flags, turn.n_tokens);
            memset(turns + out->n_tokens, 0, turn.n_tokens);
            turns[out->n_tokens] |= KVS_TEACHER_TURN_BEGIN;
            turns[total - 1] |= KVS_TEACHER_TURN_END;
            out->n_tokens = (uint32_t)total;
        }
        kvs_rendered_free(&turn);
        if (!good)
            return kvs_error_set(err, KVS_ENOMEM, "no memory for %zu tokens of dialogue", total);
        at = end;
    }
    return KVS_OK;
}

static kvs_status read_dialogue(const kvs_model *m, const char *path, uint32_t index, stream *out, kvs_error *err)
{
    kvs_dialogue_set set;
    KVS_TRY(kvs_dialogue_set_load(path, &set, err));
    kvs_status status = KVS_OK;
    kvs_message *messages = NULL;
    if (index >= set.n_items) {
        status = kvs_error_set(err, KVS_EINVAL, "%s has %u dialogues; --index %u is over that (the first is 0)", path,
                               set.n_items, index);
    } else {
        const kvs_dialogue *const d = &set.items[index];
        messages = calloc(d->n_messages, sizeof *messages);
        if (messages == NULL)
            status = kvs_error_set(err, KVS_ENOMEM, "no memory for %u messages", d->n_messages);
        for (uint32_t i = 0; messages != NULL && i < d->n_messages; i++)
            messages[i] = (kvs_message){d->messages[i].role, d->messages[i].content};
        if (status == KVS_OK)
            status = render(m, messages, d->n_messages, out, err);
    }
    free(messages);
    kvs_dialogue_set_free(&set);
    return status;
}

/* Flags the tokens of every place where the passage stands. */
static kvs_status mark_needle(const kvs_model *m, const char *needle, stream *x, kvs_error *err)
{
    size_t n_bytes = 0, *const ends = calloc((size_t)x->n_tokens + 1, sizeof *ends);
    for (uint32_t i = 0; ends != NULL && i < x->n_tokens; i++)
        ends[i] = n_bytes += kvs_token_text(m, x->tokens[i], false, NULL, 0);
    char *const text = malloc(n_bytes + 1);
    if (x->flags == NULL)
        x->flags = calloc(x->n_tokens, 1);
    kvs_status status = KVS_OK;
    if (ends == NULL || text == NULL || x->flags == NULL) {
        status = kvs_error_set(err, KVS_ENOMEM, "no memory to look for --needle in %u tokens", x->n_tokens);
    } else {
        const size_t length = strlen(needle);
        bool found = false;
        for (uint32_t i = 0; i < x->n_tokens; i++) {
            const size_t begin = i > 0 ? ends[i - 1] : 0;
            kvs_token_text(m, x->tokens[i], false, text + begin, n_bytes - begin);
        }
        for (size_t at = 0; length > 0 && at + length <= n_bytes; at++) {
            if (memcmp(text + at, needle, length) != 0)
                continue;
            found = true;
            for (uint32_t i = 0; i < x->n_tokens; i++)
                if ((i > 0 ? ends[i - 1] : 0) < at + length && ends[i] > at)
                    x->flags[i] |= KVS_TOKEN_NEEDLE;
        }
        if (!found)
            status = kvs_error_set(err, KVS_EINVAL, "--needle '%.60s' stands nowhere in the text", needle);
    }
    free(ends);
    free(text);
    return status;
}

/* ---- dumps ------------------------------------------------------------------------------------------------------ */

/* NumPy format 1.0: magic, version, header length, then a header padded so that the data are 64-byte aligned. */
static bool npy_head(FILE *f, uint32_t n_tokens, uint32_t vocab_size)
{
    char head[128];
    memset(head, ' ', sizeof head);
    memcpy(head, "\x93NUMPY\x01\x00", 8);
    head[8] = (char)(sizeof head - 10);
    head[9] = 0;
    const int n = snprintf(head + 10, sizeof head - 10, "{'descr': '<f4', 'fortran_order': False, 'shape': (%u, %u), }",
                           n_tokens, vocab_size);
    head[10 + n] = ' ';
    head[sizeof head - 1] = '\n';
    return fwrite(head, 1, sizeof head, f) == sizeof head;
}

static bool on_row(void *ctx, const kvs_teacher_row *row)
{
    dumps *const d = ctx;
    if (fwrite(row->logits, sizeof(float), d->vocab_size, d->logits) == d->vocab_size)
        return true;
    kvs_error_set(&d->err, KVS_EIO, "--dump-logits: token %u cannot be written: %s", row->token_idx, strerror(errno));
    return false;
}

static bool print_numbers(FILE *f, const char *name, const int32_t *x, uint32_t n)
{
    bool good = fprintf(f, ",\"%s\":[", name) > 0;
    for (uint32_t i = 0; good && i < n; i++)
        good = fprintf(f, "%s%d", i > 0 ? "," : "", x[i]) > 0;
    return good && fputc(']', f) != EOF;
}

static kvs_status list_fact(dumps *d, kvs_error *err)
{
    const stream *const x = d->x;
    d->fact = calloc((size_t)x->n_tokens + 1, sizeof *d->fact);
    if (d->fact == NULL)
        return kvs_error_set(err, KVS_ENOMEM, "no memory for %u tokens", x->n_tokens);
    for (uint32_t i = 0; x->flags != NULL && i < x->n_tokens; i++)
        if (x->flags[i] & KVS_TOKEN_NEEDLE)
            d->fact[d->n_fact++] = (int32_t)i;
    return KVS_OK;
}

/* Where the answer begins: a dialogue's last one, without the template's words; a text ends with its answer position. */
static uint32_t answer_from(const stream *x)
{
    const uint8_t said = KVS_TOKEN_ASSISTANT, mask = KVS_TOKEN_ASSISTANT | KVS_TOKEN_TEMPLATE;
    uint32_t end = x->turns != NULL ? x->n_tokens : 0;
    while (end > 0 && (x->flags[end - 1] & mask) != said)
        end--;
    uint32_t begin = end;
    while (begin > 0 && (x->flags[begin - 1] & mask) == said)
        begin--;
    return end > 0 ? begin : x->n_tokens - 1;
}

static bool on_end(void *ctx, const kvs_session *s)
{
    dumps *const d = ctx;
    kvs_cli_set_ffn(d->state, s);
    if (kvs_keep_report_make(d->m, s, d->fact, d->n_fact, &d->kept, &d->err) != KVS_OK)
        return false;
    if (d->keep_path == NULL)
        return true;
    kvs_model_info info;
    kvs_model_get_info(d->m, &info);
    const uint32_t cap = (uint32_t)kvs_session_n_tokens(s);
    int32_t *const pos = calloc((size_t)cap * 2 + 1, sizeof *pos);
    FILE *const f = fopen(d->keep_path, "w");
    bool good = f != NULL && pos != NULL;
    for (uint32_t layer = 0; good && layer < info.n_layers; layer++)
        for (uint32_t head = 0; good && head < info.n_kv_heads; head++) {
            const uint32_t n = kvs_min_u32(cap, kvs_session_keep_set(s, layer, head, pos, pos + cap, cap));
            good = fprintf(f, "{\"layer\":%u,\"kv_head\":%u", layer, head) > 0 && print_numbers(f, "pos", pos, n) &&
                   print_numbers(f, "rope_pos", pos + cap, n) && fputs("}\n", f) >= 0;
        }
    if (f != NULL && fclose(f) != 0)
        good = false;
    free(pos);
    if (!good)
        kvs_error_set(&d->err, KVS_EIO, "--dump-keep: %s cannot be written: %s", d->keep_path, strerror(errno));
    return good;
}

static void on_progress(void *ctx, uint64_t n_done, uint64_t n_total)
{
    kvs_cli_progress_show(&((dumps *)ctx)->progress, n_done, n_total, -1);
}

/* ---- results ---------------------------------------------------------------------------------------------------- */

static const char *const ref_names[] = {"none", "full", "window"};

static void set_results(json_t *o, const kvs_teacher_result *r, const kvs_teacher_options *t,
                        const kvs_model_info *info)
{
    kvs_cli_set_real(o, "nll", r->nll);
    kvs_cli_set_real(o, "ppl", exp(r->nll));
    kvs_cli_set_real(o, "kl_mean", r->kl_mean);
    kvs_cli_set_real(o, "kl_p99", r->kl_p99);
    kvs_cli_set_real(o, "top1", r->top1);
    kvs_cli_set_int(o, "n_tokens", r->n_tokens);
    kvs_cli_set_real(o, "ttft_ms", r->ttft_ms);
    kvs_cli_set_real(o, "tpot_ms", r->tpot_ms);
    kvs_cli_set_real(o, "prefill_tok_per_s", r->prefill_tok_per_s);
    kvs_cli_set_real(o, "decode_tok_per_s", r->decode_tok_per_s);
    kvs_cli_set_state(o, &r->usage, &r->positions, &r->health);
    kvs_cli_set_text(o, "ref", ref_names[t->ref]);
    kvs_cli_set_int(o, "n_ref_tokens", r->n_ref);
    kvs_cli_set_real(o, "ref_nll", r->ref_nll);
    kvs_cli_set_real(o, "ref_ppl", exp(r->ref_nll));
    kvs_cli_set_int(o, "n_assistant_tokens", r->n_assistant);
    kvs_cli_set_real(o, "assistant_nll", r->assistant_nll);
    kvs_cli_set_real(o, "assistant_kl_mean", r->assistant_kl_mean);
    kvs_cli_set_text(o, "policy", r->policy);
    kvs_cli_set_text(o, "position", r->position);
    kvs_cli_set_text(o, "model", info->path);
    kvs_cli_set_text(o, "arith", t->session.arith == KVS_ARITH_F32 ? "f32" : "native");
    kvs_cli_set_text(o, "kv_type", t->session.kv_type == KVS_KV_F32 ? "f32" : "f16");
    kvs_cli_set_text(o, "isa", info->isa);
}

static void set_list(json_t *o, const char *name, const double *x, uint32_t n)
{
    json_t *const list = json_array();
    for (uint32_t i = 0; i < n; i++)
        json_array_append_new(list, isfinite(x[i]) ? json_real(x[i]) : json_null());
    json_object_set_new(o, name, list);
}

/* docs/metrics.md, "Diagnostics". */
static void set_diagnostics(json_t *o, const kvs_keep_report *k, const kvs_routing *r)
{
    const uint32_t n = k->n_layers;
    kvs_cli_set_real(o, "head_consensus", k->head_consensus);
    kvs_cli_set_real(o, "ger", k->ger);
    kvs_cli_set_real(o, "ger_layer_max", k->ger_layer_max);
    kvs_cli_set_real(o, "utilisation", r->utilisation);
    kvs_cli_set_real(o, "utilisation_full", r->ref_utilisation);
    kvs_cli_set_real(o, "drift", r->drift);
    kvs_cli_set_real(o, "drift_last", r->drift_last);
    kvs_cli_set_real(o, "key_channels_50", r->key_channels_50);
    kvs_cli_set_real(o, "key_channels_90", r->key_channels_90);
    kvs_cli_set_real(o, "key_channels_90_min", r->key_channels_min);
    kvs_cli_set_real(o, "key_channels_90_max", r->key_channels_max);
    set_list(o, "head_consensus_layers", k->consensus, n);
    set_list(o, "ger_layers", k->ger_l, n);
    set_list(o, "utilisation_layers", r->utilisation_l, n);
    set_list(o, "utilisation_full_layers", r->ref_utilisation_l, n);
    set_list(o, "drift_layers", r->drift_l, n);
    set_list(o, "key_channels_90_heads", r->key_channels_lh, n * r->n_kv_heads);
}

static int print_table(json_t *o)
{
    const char *name;
    json_t *value;
    json_object_foreach (o, name, value) {
        if (json_is_array(value))
            continue; /* by layer: --json has it */
        printf("%-20s ", name);
        if (json_is_real(value))
            printf("%.6g\n", json_real_value(value));
        else if (json_is_integer(value))
            printf("%lld\n", (long long)json_integer_value(value));
        else
            printf("%s\n", json_is_string(value) ? json_string_value(value) : "-");
    }
    json_decref(o);
    return KVS_EXIT_OK;
}

static void choose(const kvs_cli_args *args, const kvs_model_info *info, const stream *x, kvs_teacher_options *t)
{
    kvs_cli_session_options(args, KVS_ARITH_F32, &t->session);
    /* No budget: room for all of it, and for the tokens that time decoding. */
    if (t->session.budget_bytes == 0 && t->session.budget_tokens == 0 && args->budgets.n == 0)
        t->session.budget_tokens = x->n_tokens + KVS_TEACHER_DECODE_TOKENS;
    t->ref = x->n_tokens <= info->window_tokens ? KVS_TEACHER_REF_FULL : KVS_TEACHER_REF_WINDOW;
    for (uint32_t i = 0; args->ref != NULL && i < 3; i++)
        if (strcmp(args->ref, ref_names[i]) == 0)
            t->ref = (kvs_teacher_ref)i;
    t->ref_tokens = args->ref_window;
    t->flags = x->flags;
    t->turns = x->turns;
    t->cancel = &kvs_cli_interrupted;
}

static kvs_status evaluate(const kvs_cli_args *args, kvs_model *m, const kvs_model_info *info, const stream *x,
                           json_t **results, kvs_error *err)
{
    kvs_teacher_options t = {.session = {0}};
    kvs_teacher_result r;
    dumps d = {.keep_path = args->dump_keep, .m = m, .x = x, .vocab_size = info->vocab_size};
    choose(args, info, x, &t);
    t.on_end = on_end;
    t.routing = &d.routing;
    KVS_TRY(list_fact(&d, err));
    t.fact = d.fact;
    t.n_fact = d.n_fact;
    t.answer_from = answer_from(x);
    t.on_progress = on_progress;
    t.ctx = &d;
    if (args->dump_logits != NULL) {
        d.logits = fopen(args->dump_logits, "wb");
        if (d.logits == NULL || !npy_head(d.logits, x->n_tokens, info->vocab_size)) {
            kvs_error_set(err, KVS_EIO, "--dump-logits: cannot write %s: %s", args->dump_logits, strerror(errno));
            if (d.logits != NULL)
                fclose(d.logits);
            free(d.fact);
            return KVS_EIO;
        }
        t.on_row = on_row;
    }
    d.state = json_object();
    kvs_cli_progress_begin(&d.progress, "eval: tokens");
    kvs_status status = kvs_eval_teacher_force(m, &t, x->tokens, x->n_tokens, &r, err);
    kvs_cli_progress_end(&d.progress);
    if (status == KVS_ECANCELLED && d.err.status != KVS_OK) {
        *err = d.err; /* why a dump asked to stop */
        status = d.err.status;
    }
    if (d.logits != NULL && fclose(d.logits) != 0 && status == KVS_OK)
        status = kvs_error_set(err, KVS_EIO, "--dump-logits: cannot write %s: %s", args->dump_logits, strerror(errno));
    struct stat file;
    if (status != KVS_OK && args->dump_logits != NULL && stat(args->dump_logits, &file) == 0 && S_ISREG(file.st_mode))
        unlink(args->dump_logits); /* its header promises rows that are not there */
    if (status == KVS_OK) {
        *results = json_object();
        set_results(*results, &r, &t, info);
        json_object_update(*results, d.state);
        set_diagnostics(*results, &d.kept, &d.routing);
    }
    json_decref(d.state);
    kvs_keep_report_free(&d.kept);
    kvs_routing_free(&d.routing);
    free(d.fact);
    return status;
}

int kvs_cmd_eval(const kvs_cli_args *args)
{
    if (args->n_recall > 0)
        return args->text == NULL ? kvs_eval_recall(args)
                                  : kvs_cli_usage_error(args->command, "--recall makes its own dialogues: no --text");
    if (args->episodes.n > 0)
        return kvs_cli_usage_error(args->command, "--episodes is measured with --recall N");
    if ((args->text == NULL) == (args->dialogue == NULL))
        return kvs_cli_usage_error(args->command, "needs --text FILE or --dialogue FILE, and not both");
    kvs_error err = {0};
    kvs_model *m = NULL;
    kvs_model_info info = {0};
    stream x = {0};
    json_t *results = NULL;
    kvs_status status = kvs_cli_open_model(args, &m, &err);
    if (status == KVS_OK) {
        kvs_model_get_info(m, &info);
        status = args->text != NULL ? read_text(m, args->text, &x, &err)
                                    : read_dialogue(m, args->dialogue, args->index, &x, &err);
    }
    if (status == KVS_OK && args->needle != NULL)
        status = mark_needle(m, args->needle, &x, &err);
    kvs_cli_catch_interrupts();
    if (status == KVS_OK)
        status = evaluate(args, m, &info, &x, &results, &err);
    int code;
    if (status == KVS_OK)
        code = args->json ? kvs_cli_print_json(results) : print_table(results);
    else
        code = kvs_cli_report(args, &err);
    if (status == KVS_ECANCELLED && kvs_cli_interrupted > 0)
        code = KVS_EXIT_INTERRUPTED;
    stream_free(&x);
    kvs_model_close(&m);
    return code;
}

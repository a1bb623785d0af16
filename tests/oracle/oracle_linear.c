/* Every linear layer of the real model in native arithmetic, against ggml's own product of the same rows on the same
 * quantised input.
 *
 *   oracle_linear [MODEL.gguf] [TEXT]
 *
 * Inputs are the hidden states of a run over real text, caught in the attention hook. Both sides multiply the same
 * codes, so block sums are equal integers; what differs is the order in which blocks are added in f32. With S the sum
 * of the magnitudes of all terms and n_blocks blocks, a sum of at most 2 n_blocks + 3 rounded operations (scale times
 * scale, one or two multiply-adds a block, the lanes of ggml's accumulator folded) errs by at most
 * gamma(2 n_blocks + 8) S on each side, gamma(k) = k u / (1 - k u), u = 2^-24 (Higham). The bound is twice that.
 * Prints `ok`/`not ok` lines and a closing count; exit 1 if any fails, 77 if there is no model or text. */
#include "kernels/matmul.h"
#include "session/session_internal.h"

#include <ggml-cpu.h>
#include <ggml.h>
#include <gguf.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { N_TOKENS = 64, ROW_STEP = 9, TEXT_BYTES = 2000 };

static int n_passed, n_failed;

static void check(bool ok, const char *name, const char *detail)
{
    printf("%s %s: %s\n", ok ? "ok" : "not ok", name, detail);
    fflush(stdout);
    *(ok ? &n_passed : &n_failed) += 1;
}

static void die(const char *what, const char *detail)
{
    fprintf(stderr, "oracle_linear: %s: %s\n", what, detail);
    exit(1);
}

/* ---- one output element by ggml, and the size of its terms -------------------------------------------------------- */

typedef struct tally {
    double worst_share; /* of the bound */
    uint64_t n, n_over;
    bool unsupported;
} tally;

/* The type as the kernels have it; KVS_WEIGHT_OTHER where there is no bound for it here. */
static kvs_weight_type packed_type(enum ggml_type type)
{
    static const struct {
        enum ggml_type ggml;
        kvs_weight_type type;
    } known[] = {{GGML_TYPE_Q4_0, KVS_WEIGHT_Q4_0}, {GGML_TYPE_Q4_1, KVS_WEIGHT_Q4_1},
                 {GGML_TYPE_Q5_0, KVS_WEIGHT_Q5_0}, {GGML_TYPE_Q5_1, KVS_WEIGHT_Q5_1},
                 {GGML_TYPE_Q8_0, KVS_WEIGHT_Q8_0}, {GGML_TYPE_Q4_K, KVS_WEIGHT_Q4_K},
                 {GGML_TYPE_Q5_K, KVS_WEIGHT_Q5_K}, {GGML_TYPE_Q6_K, KVS_WEIGHT_Q6_K},
                 {GGML_TYPE_F16, KVS_WEIGHT_F16},   {GGML_TYPE_BF16, KVS_WEIGHT_BF16}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].ggml == type)
            return known[i].type;
    return KVS_WEIGHT_OTHER;
}

/* |d| sum |q x| + |m s| of one row: x [n_in] as the native product sees it (quantised, widened), panel the row packed
 * alone. With minima each side multiplies m by a rounded sum of the same x. */
static double term_sizes(const struct kvs_panels *panel, const float *x)
{
    double sum = 0, x_sum = 0;
    float d = 0, m = 0;
    for (uint32_t k = 0; k < panel->n_in; k++) {
        if (kvs_dense_bytes(panel->type) != 0) {
            const uint8_t *const at = panel->base + (size_t)k * KVS_PANEL * kvs_dense_bytes(panel->type);
            sum += fabs((double)kvs_dense_at(panel->type, at) * (double)x[k]);
            continue;
        }
        if (k % KVS_SCALE_ELEMENTS == 0)
            kvs_panel_scales_at(panel, panel->base, k, 0, &d, &m);
        const uint8_t *const codes = panel->base + k / KVS_QBLOCK * kvs_panel_code_bytes(panel->type);
        const int32_t code = (int32_t)kvs_code_at(panel->type, codes, k % KVS_QBLOCK) - kvs_code_above(panel->type);
        sum += fabs((double)d * code * (double)x[k]);
        x_sum += (double)x[k];
        if (k % KVS_QBLOCK == KVS_QBLOCK - 1) {
            sum += kvs_has_min(panel->type) ? fabs((double)m * x_sum) : 0;
            x_sum = 0;
        }
    }
    return sum;
}

/* Compares rows of one tensor with columns [col, col + n_out) of y. */
static void compare(tally *t, const struct ggml_tensor *w, const float *x, size_t x_stride, const float *y,
                    size_t y_stride, uint32_t n_rows)
{
    const uint32_t n_in = (uint32_t)w->ne[0], n_out = (uint32_t)w->ne[1];
    const kvs_weight_type type = packed_type(w->type);
    if (type == KVS_WEIGHT_OTHER) {
        t->unsupported = true;
        return;
    }
    const bool dense = kvs_dense_bytes(type) != 0;
    const uint32_t n_steps = dense ? n_in / 2 : n_in / KVS_QBLOCK / (kvs_is_k(type) ? KVS_SUPER_BLOCKS : 1);
    const struct ggml_type_traits_cpu *traits = ggml_get_type_traits_cpu(w->type);
    const double k = 2.0 * n_steps + 8, gamma = k * 0x1p-24 / (1 - k * 0x1p-24);
    uint8_t *act = malloc(ggml_row_size(traits->vec_dot_type, n_in));
    float *seen = malloc(n_in * sizeof *seen);
    struct kvs_act_block *tile = malloc((n_in / KVS_QBLOCK + 1) * sizeof *tile);
    kvs_weight one = {.type = type, .n_out = 1, .n_in = n_in, .packed_bytes = kvs_weight_packed_bytes(type, 1, n_in)};
    one.packed = kvs_alloc(kvs_allocator_default(), 1, one.packed_bytes);
    for (uint32_t r = 0; r < n_rows; r += ROW_STEP) {
        const float *const row_x = x + r * x_stride;
        ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(row_x, act, n_in);
        if (dense)
            kvs_matmul_kernels_ref.round(type, row_x, n_in, seen);
        else
            (kvs_is_k(type) ? kvs_matmul_kernels_ref.quantise_k : kvs_matmul_kernels_ref.quantise)(row_x, n_in, tile,
                                                                                                   0);
        for (uint32_t i = 0; !dense && i < n_in; i++)
            seen[i] = tile[i / KVS_QBLOCK].d[0] * (float)tile[i / KVS_QBLOCK].q[0][i % KVS_QBLOCK];
        for (uint32_t o = 0; o < n_out; o++) {
            const uint8_t *row = (const uint8_t *)w->data + o * w->nb[1];
            const struct kvs_panels panel = kvs_weight_panels(&one, 0, 1);
            float theirs;
            traits->vec_dot((int)n_in, &theirs, 0, row, 0, act, 0, 1);
            kvs_weight_pack(&one, row, 0, 1);
            const double bound = 2 * gamma * term_sizes(&panel, seen);
            const double error = fabs((double)theirs - (double)y[r * y_stride + o]);
            t->n++;
            t->n_over += !(error <= bound);
            t->worst_share = fmax(t->worst_share, bound > 0 ? error / bound : error > 0 ? INFINITY : 0);
        }
    }
    kvs_free(kvs_allocator_default(), one.packed);
    free(tile);
    free(seen);
    free(act);
}

/* ---- catching every layer's inputs -------------------------------------------------------------------------------- */

typedef struct probe {
    kvs_attend_ctx *attend;
    struct ggml_context *weights;
    tally tally[5]; /* qkv, attn_out, gate_up, ffn_down, head */
    float *x, *norm, *act, *y;
    void *scratch;
} probe;

static const struct ggml_tensor *tensor(const probe *p, uint32_t layer, const char *name)
{
    char full[96];
    snprintf(full, sizeof full, "blk.%u.%s.weight", layer, name);
    const struct ggml_tensor *t = ggml_get_tensor(p->weights, full);
    if (t == NULL)
        die("no tensor", full);
    return t;
}

static void native(const probe *p, const kvs_model *m, const kvs_weight *w, const float *x, size_t x_stride,
                   uint32_t n_rows)
{
    if (w->n_out == 0)
        die("this oracle wants joined matrices", m->info.path);
    kvs_matmul_native(m->kernels, m->pool, w, x, x_stride, p->y, w->n_out, n_rows, p->scratch);
}

/* Attention hook: checks the layer's products with the inputs that the forward pass itself is about to use. */
static void hook(void *ctx, kvs_forward *f, uint32_t layer, uint32_t n_rows)
{
    probe *p = ctx;
    const kvs_model *m = f->model;
    const kvs_layer *l = &m->layers[layer];
    const size_t n_embd = m->info.n_embd, n_ff = m->info.n_ff, n_q = (size_t)m->info.n_heads * m->info.head_dim;
    const size_t n_kv = (size_t)m->info.n_kv_heads * m->info.head_dim, width = n_q + 2 * n_kv;
    compare(&p->tally[0], tensor(p, layer, "attn_q"), f->norm, n_embd, f->qkv, width, n_rows);
    compare(&p->tally[0], tensor(p, layer, "attn_k"), f->norm, n_embd, f->qkv + n_q, width, n_rows);
    compare(&p->tally[0], tensor(p, layer, "attn_v"), f->norm, n_embd, f->qkv + n_q + n_kv, width, n_rows);
    kvs_attend(p->attend, f, layer, n_rows);

    native(p, m, &l->attn_out, f->att, n_q, n_rows);
    compare(&p->tally[1], tensor(p, layer, "attn_output"), f->att, n_q, p->y, n_embd, n_rows);
    memcpy(p->x, f->x, n_rows * n_embd * sizeof *p->x);
    for (uint32_t r = 0; r < n_rows; r++) {
        m->kernels->add(p->x + r * n_embd, p->y + r * n_embd, (uint32_t)n_embd);
        m->kernels->rmsnorm(p->norm + r * n_embd, p->x + r * n_embd, l->ffn_norm, (uint32_t)n_embd, m->norm_eps);
    }
    native(p, m, &l->gate_up, p->norm, n_embd, n_rows);
    compare(&p->tally[2], tensor(p, layer, "ffn_gate"), p->norm, n_embd, p->y, 2 * n_ff, n_rows);
    compare(&p->tally[2], tensor(p, layer, "ffn_up"), p->norm, n_embd, p->y + n_ff, 2 * n_ff, n_rows);
    for (uint32_t r = 0; r < n_rows; r++)
        m->kernels->swiglu(p->act + r * n_ff, p->y + r * 2 * n_ff, p->y + r * 2 * n_ff + n_ff, (uint32_t)n_ff);
    native(p, m, &l->ffn_down, p->act, n_ff, n_rows);
    compare(&p->tally[3], tensor(p, layer, "ffn_down"), p->act, n_ff, p->y, n_embd, n_rows);
}

static void check_head(probe *p, kvs_forward *f, uint32_t n_rows)
{
    const uint32_t row = n_rows - 1;
    kvs_forward_logits(f, KVS_ARITH_NATIVE, &row, 1); /* leaves its input in f->norm */
    const struct ggml_tensor *w = ggml_get_tensor(p->weights, "output.weight");
    if (w == NULL) /* tied */
        w = ggml_get_tensor(p->weights, "token_embd.weight");
    if (w == NULL)
        die("no head", f->model->info.path);
    compare(&p->tally[4], w, f->norm, f->model->info.n_embd, f->logits, f->model->info.vocab_size, 1);
}

/* ---- the run ------------------------------------------------------------------------------------------------------ */

static void *need(void *p)
{
    if (p == NULL)
        die("out of memory", "");
    return p;
}

static void run(kvs_model *m, const int32_t *tokens)
{
    kvs_error err = {.message = ""};
    kvs_session_options o;
    kvs_session_options_default(&o);
    o.budget_tokens = 2 * N_TOKENS;
    kvs_session *s;
    if (kvs_session_create(m, &o, &s, &err) != KVS_OK)
        die("session", err.message);
    kvs_forward *f = m->forward;
    probe p = {0};
    struct gguf_init_params gp = {.no_alloc = false, .ctx = &p.weights};
    struct gguf_context *g = gguf_init_from_file(m->info.path, gp);
    if (g == NULL)
        die("ggml cannot open", m->info.path);
    const size_t wide = 2 * (size_t)m->info.n_ff + 4 * (size_t)m->info.n_embd;
    p.x = need(calloc(N_TOKENS * (size_t)m->info.n_embd, sizeof(float)));
    p.norm = need(calloc(N_TOKENS * (size_t)m->info.n_embd, sizeof(float)));
    p.act = need(calloc(N_TOKENS * (size_t)m->info.n_ff, sizeof(float)));
    p.y = need(calloc(N_TOKENS * wide, sizeof(float)));
    p.scratch = f->matmul_scratch; /* the forward pass is inside its hook: nobody else uses it */

    int32_t pos[N_TOKENS];
    for (int32_t i = 0; i < N_TOKENS; i++)
        pos[i] = i;
    kvs_attend_run r = {.session = s, .n_rows = N_TOKENS, .tap_from = N_TOKENS};
    kvs_attend_ctx ctx = {.runs = &r, .n_runs = 1};
    p.attend = &ctx;
    if (kvs_cache_append(s->cache, pos, tokens, NULL, N_TOKENS, &err) != KVS_OK)
        die("step", err.message);
    kvs_forward_rows(f, KVS_ARITH_NATIVE, tokens, N_TOKENS, hook, &p, NULL);
    check_head(&p, f, N_TOKENS);

    static const char *const names[] = {"q, k, v", "attention output", "gate and up", "down", "head"};
    for (int i = 0; i < 5; i++) {
        char name[96], line[160];
        const tally *t = &p.tally[i];
        snprintf(name, sizeof name, "%s against ggml's vec_dot", names[i]);
        snprintf(line, sizeof line, "%llu elements, %llu over the bound, worst %.3f of it%s", (unsigned long long)t->n,
                 (unsigned long long)t->n_over, t->worst_share,
                 t->unsupported ? "; a weight type this oracle has no bound for" : "");
        check(t->n > 0 && t->n_over == 0 && !t->unsupported, name, line);
    }
    gguf_free(g);
    ggml_free(p.weights);
    free(p.x);
    free(p.norm);
    free(p.act);
    free(p.y);
    kvs_session_free(&s);
}

int main(int argc, char **argv)
{
    char model_path[1024], text_path[1024], text[TEXT_BYTES + 1];
    const char *home = getenv("HOME"), *env = getenv("KVASIR_MODEL"), *data = getenv("KVASIR_DATA");
    snprintf(model_path, sizeof model_path, "%s/.cache/kvasir/models/SmolLM2-135M-Instruct.Q4_1.gguf", home);
    if (argc > 1 || env != NULL)
        snprintf(model_path, sizeof model_path, "%s", argc > 1 ? argv[1] : env);
    snprintf(text_path, sizeof text_path, "%s/books_public_domain/sherlock_holmes.txt",
             data != NULL ? data : KVS_SOURCE_DIR "/../shared/data");
    FILE *in = fopen(argc > 2 ? argv[2] : text_path, "rb");
    if (access(model_path, R_OK) != 0 || in == NULL) {
        printf("skipped: no model at %s or no text at %s\n0 passed, 0 failed, 5 skipped\n", model_path, text_path);
        return 77;
    }
    const size_t n_text = fread(text, 1, TEXT_BYTES, in);
    fclose(in);
    kvs_model *m;
    kvs_error err = {.message = ""};
    int32_t tokens[TEXT_BYTES];
    size_t n_tokens = 0;
    if (kvs_model_open(model_path, NULL, &m, &err) != KVS_OK)
        die("open", err.message);
    if (kvs_tokenize(m, text, kvs_utf8_valid_prefix(text, n_text), true, false, tokens, TEXT_BYTES, &n_tokens, &err) !=
            KVS_OK ||
        n_tokens < N_TOKENS)
        die("the text is too short or", err.message);
    run(m, tokens);
    kvs_model_close(&m);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0;
}

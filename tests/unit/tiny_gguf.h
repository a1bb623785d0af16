/* Writes a small llama-architecture GGUF with seeded random weights and a byte-level BPE vocabulary that libllama
 * loads, for tests that need a whole model and no download. Everything static, so that a test is one file.
 *
 *     tiny_options o;  tiny_defaults(&o);  o.type = GGML_TYPE_Q4_1;
 *     char path[TINY_PATH_BYTES];
 *     assert_true(tiny_temp(&o, path));  ...  unlink(path);
 */
#ifndef KVS_TINY_GGUF_H
#define KVS_TINY_GGUF_H

#include "base/base.h"

#include <ggml.h>
#include <gguf.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TINY_UNUSED __attribute__((unused))

enum {
    TINY_PATH_BYTES = 256,
    TINY_ENDOFTEXT = 0,
    TINY_IM_START = 1,
    TINY_IM_END = 2,
    TINY_FIRST_BYTE = 3, /* token of byte b is TINY_FIRST_BYTE + b */
    TINY_VOCAB_MIN = 300,
};

#define TINY_CHATML                                                                                                    \
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "    \
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

typedef struct tiny_options {
    uint32_t n_layers, n_heads, n_kv_heads, head_dim, n_ff, vocab_size, window_tokens;
    uint32_t n_embd;                  /* 0: n_heads * head_dim, else a key_length is written */
    enum ggml_type type;              /* of the layers' matrices; rows must be whole blocks of it */
    enum ggml_type v_type, embd_type; /* GGML_TYPE_COUNT: as type */
    bool tied;                        /* no output.weight */
    bool rope_freqs;                  /* with a rope_freqs.weight of ones and twos */
    float rope_base;
    const char *rope_scaling; /* with rope_factor; NULL: no such keys */
    float rope_factor;
    const char *chat_template; /* NULL: none */
    const char *extra[8];      /* markers at TINY_VOCAB_MIN on; vocab_size must leave room */
    int32_t extra_type;        /* 3: control, 4: user-defined */
    uint64_t no_ffn;           /* bit l: layer l's feed-forward block adds nothing */
    uint64_t seed;
} tiny_options;

static TINY_UNUSED void tiny_defaults(tiny_options *o)
{
    *o = (tiny_options){.n_layers = 2,
                        .n_heads = 4,
                        .n_kv_heads = 2,
                        .head_dim = 16,
                        .n_ff = 96,
                        .vocab_size = TINY_VOCAB_MIN,
                        .window_tokens = 512,
                        .type = GGML_TYPE_F32,
                        .v_type = GGML_TYPE_COUNT,
                        .embd_type = GGML_TYPE_COUNT,
                        .tied = true,
                        .rope_base = 10000.0f,
                        .chat_template = TINY_CHATML,
                        .extra_type = 3,
                        .seed = 1};
}

/* ---- vocabulary ------------------------------------------------------------------------------------------------- */

/* GPT-2's printable stand-in for a byte: itself where it prints, else the next code point from 256. Writes UTF-8. */
static TINY_UNUSED void tiny_byte_name(unsigned byte, char out[4])
{
    unsigned code = byte, n_moved = 0;
    for (unsigned b = 0; b <= byte; b++) {
        const bool prints = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        if (b == byte && !prints)
            code = 256 + n_moved;
        n_moved += !prints;
    }
    size_t n = 0;
    if (code < 0x80) {
        out[n++] = (char)code;
    } else {
        out[n++] = (char)(0xc0 | code >> 6);
        out[n++] = (char)(0x80 | (code & 0x3f));
    }
    out[n] = '\0';
}

/* "\xc4\xa0" is the stand-in of the space. Each result is a token of its own, in this order after the bytes. */
static const char *const tiny_merges[] = {
    "\xc4\xa0 t",
    "\xc4\xa0 a",
    "h e",
    "i n",
    "r e",
    "o n",
    "\xc4\xa0t he",
    "e r",
    "\xc4\xa0 s",
    "a t",
    "\xc4\xa0 w",
    "\xc4\xa0 o",
    "e n",
    "\xc4\xa0 c",
    "i t",
    "i s",
    "a n",
    "o r",
    "e s",
    "\xc4\xa0 b",
    "e d",
    "\xc4\xa0 f",
    "in g",
    "\xc4\xa0 p",
    "o u",
    "\xc4\xa0"
    "a n",
    "\xc4\xa0"
    "an d",
    "a l",
    "a r",
    "\xc4\xa0t o",
    "\xc4\xa0 m",
    "\xc4\xa0o f",
    "\xc4\xa0 in",
    "\xc4\xa0 d",
    "\xc4\xa0 h",
    "i c",
    "l l",
    "\xc4\xa0 I",
    "s t",
    "l e",
    "o m",
};
enum { TINY_N_MERGES = sizeof tiny_merges / sizeof *tiny_merges };
_Static_assert(TINY_FIRST_BYTE + 256 + TINY_N_MERGES == TINY_VOCAB_MIN, "TINY_VOCAB_MIN counts what there is");

static TINY_UNUSED void tiny_vocab(struct gguf_context *g, const tiny_options *o)
{
    const uint32_t vocab_size = o->vocab_size;
    char(*names)[24] = calloc(vocab_size, sizeof *names);
    const char **tokens = calloc(vocab_size, sizeof *tokens);
    int32_t *types = calloc(vocab_size, sizeof *types);
    if (names == NULL || tokens == NULL || types == NULL)
        abort();
    for (uint32_t i = 0; i < vocab_size; i++) {
        tokens[i] = names[i];
        types[i] = 1; /* normal */
        if (i < TINY_FIRST_BYTE) {
            tokens[i] = i == TINY_ENDOFTEXT ? "<|endoftext|>" : i == TINY_IM_START ? "<|im_start|>" : "<|im_end|>";
            types[i] = 3; /* control */
        } else if (i < TINY_FIRST_BYTE + 256) {
            tiny_byte_name(i - TINY_FIRST_BYTE, names[i]);
        } else if (i < TINY_VOCAB_MIN) {
            const char *merge = tiny_merges[i - TINY_FIRST_BYTE - 256], *gap = strchr(merge, ' ');
            snprintf(names[i], sizeof names[i], "%.*s%s", (int)(gap - merge), merge, gap + 1);
        } else if (i - TINY_VOCAB_MIN < 8 && o->extra[i - TINY_VOCAB_MIN] != NULL) {
            tokens[i] = o->extra[i - TINY_VOCAB_MIN];
            types[i] = o->extra_type;
        } else {
            snprintf(names[i], sizeof names[i], "<|filler_%u|>", i);
            types[i] = 5; /* unused */
        }
    }
    gguf_set_val_str(g, "tokenizer.ggml.model", "gpt2");
    gguf_set_val_str(g, "tokenizer.ggml.pre", "smollm");
    gguf_set_arr_str(g, "tokenizer.ggml.tokens", tokens, vocab_size);
    gguf_set_arr_data(g, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, types, vocab_size);
    gguf_set_arr_str(g, "tokenizer.ggml.merges", (const char **)tiny_merges, TINY_N_MERGES);
    gguf_set_val_u32(g, "tokenizer.ggml.bos_token_id", TINY_IM_START);
    gguf_set_val_u32(g, "tokenizer.ggml.eos_token_id", TINY_IM_END);
    gguf_set_val_u32(g, "tokenizer.ggml.unknown_token_id", TINY_ENDOFTEXT);
    gguf_set_val_bool(g, "tokenizer.ggml.add_bos_token", false);
    gguf_set_val_bool(g, "tokenizer.ggml.add_space_prefix", false);
    free(names);
    free(tokens);
    free(types);
}

/* ---- tensors ---------------------------------------------------------------------------------------------------- */

typedef struct tiny_writer {
    struct ggml_context *ctx;
    struct gguf_context *g;
    kvs_rng rng;
} tiny_writer;

/* Near-normal: the sum of four uniforms, of variance spread^2 around mean. No libm, so a seed means one file. */
static TINY_UNUSED float tiny_random(kvs_rng *rng, float mean, float spread)
{
    double sum = -2.0;
    for (int i = 0; i < 4; i++)
        sum += kvs_rng_double(rng);
    return mean + spread * (float)(sum * 1.7320508075688772);
}

static TINY_UNUSED void tiny_tensor(tiny_writer *w, const char *name, enum ggml_type type, uint32_t n_in,
                                    uint32_t n_out, float mean, float spread)
{
    struct ggml_tensor *t =
        n_out == 0 ? ggml_new_tensor_1d(w->ctx, type, n_in) : ggml_new_tensor_2d(w->ctx, type, n_in, n_out);
    const size_t rows = n_out == 0 ? 1 : n_out, n = rows * n_in;
    float *x = malloc(n * sizeof *x);
    if (t == NULL || x == NULL)
        abort();
    for (size_t i = 0; i < n; i++)
        x[i] = tiny_random(&w->rng, mean, spread);
    ggml_set_name(t, name);
    if (type == GGML_TYPE_F32)
        memcpy(t->data, x, n * sizeof *x);
    else
        ggml_quantize_chunk(type, x, t->data, 0, (int64_t)rows, n_in, NULL);
    gguf_add_tensor(w->g, t);
    free(x);
}

static TINY_UNUSED void tiny_layer(tiny_writer *w, const tiny_options *o, uint32_t layer, uint32_t n_embd)
{
    const uint32_t n_q = o->n_heads * o->head_dim, n_kv = o->n_kv_heads * o->head_dim;
    const enum ggml_type v_type = o->v_type == GGML_TYPE_COUNT ? o->type : o->v_type;
    const struct {
        const char *name;
        enum ggml_type type;
        uint32_t n_in, n_out;
    } rows[] = {
        {"attn_norm", GGML_TYPE_F32, n_embd, 0}, {"attn_q", o->type, n_embd, n_q},
        {"attn_k", o->type, n_embd, n_kv},       {"attn_v", v_type, n_embd, n_kv},
        {"attn_output", o->type, n_q, n_embd},   {"ffn_norm", GGML_TYPE_F32, n_embd, 0},
        {"ffn_gate", o->type, n_embd, o->n_ff},  {"ffn_up", o->type, n_embd, o->n_ff},
        {"ffn_down", o->type, o->n_ff, n_embd},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%u.%s.weight", layer, rows[i].name);
        if (rows[i].n_out == 0)
            tiny_tensor(w, name, rows[i].type, rows[i].n_in, 0, 1.0f, 0.1f);
        else
            /* q and k twice as wide as the rest, so that attention is not near uniform */
            tiny_tensor(w, name, rows[i].type, rows[i].n_in, rows[i].n_out, 0.0f,
                        (i == 8 && o->no_ffn >> layer & 1 ? 0.0f
                         : i == 1 || i == 2               ? 2.0f
                                                          : 1.0f) /
                            sqrtf((float)rows[i].n_in));
    }
}

static TINY_UNUSED void tiny_tensors(tiny_writer *w, const tiny_options *o, uint32_t n_embd)
{
    const enum ggml_type embd_type = o->embd_type == GGML_TYPE_COUNT ? o->type : o->embd_type;
    tiny_tensor(w, "token_embd.weight", embd_type, n_embd, o->vocab_size, 0.0f, 0.5f);
    tiny_tensor(w, "output_norm.weight", GGML_TYPE_F32, n_embd, 0, 1.0f, 0.1f);
    if (!o->tied)
        tiny_tensor(w, "output.weight", embd_type, n_embd, o->vocab_size, 0.0f, 0.5f);
    if (o->rope_freqs) {
        tiny_tensor(w, "rope_freqs.weight", GGML_TYPE_F32, o->head_dim / 2, 0, 1.0f, 0.0f);
        float *divisors = ggml_get_tensor(w->ctx, "rope_freqs.weight")->data;
        for (uint32_t i = 1; i < o->head_dim / 2; i += 2)
            divisors[i] = 2.0f;
    }
    for (uint32_t layer = 0; layer < o->n_layers; layer++)
        tiny_layer(w, o, layer, n_embd);
}

static TINY_UNUSED void tiny_keys(struct gguf_context *g, const tiny_options *o, uint32_t n_embd)
{
    gguf_set_val_str(g, "general.architecture", "llama");
    gguf_set_val_str(g, "general.name", "tiny");
    gguf_set_val_u32(g, "llama.block_count", o->n_layers);
    gguf_set_val_u32(g, "llama.context_length", o->window_tokens);
    gguf_set_val_u32(g, "llama.embedding_length", n_embd);
    gguf_set_val_u32(g, "llama.feed_forward_length", o->n_ff);
    gguf_set_val_u32(g, "llama.attention.head_count", o->n_heads);
    gguf_set_val_u32(g, "llama.attention.head_count_kv", o->n_kv_heads);
    if (o->n_embd != 0) {
        gguf_set_val_u32(g, "llama.attention.key_length", o->head_dim);
        gguf_set_val_u32(g, "llama.attention.value_length", o->head_dim);
    }
    gguf_set_val_u32(g, "llama.rope.dimension_count", o->head_dim);
    gguf_set_val_f32(g, "llama.rope.freq_base", o->rope_base);
    if (o->rope_scaling != NULL) {
        gguf_set_val_str(g, "llama.rope.scaling.type", o->rope_scaling);
        gguf_set_val_f32(g, "llama.rope.scaling.factor", o->rope_factor);
    }
    gguf_set_val_f32(g, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    if (o->chat_template != NULL)
        gguf_set_val_str(g, "tokenizer.chat_template", o->chat_template);
}

/* ---- the file --------------------------------------------------------------------------------------------------- */

static TINY_UNUSED bool tiny_write(const tiny_options *o, const char *path)
{
    const uint32_t n_embd = o->n_embd != 0 ? o->n_embd : o->n_heads * o->head_dim;
    const size_t n_q = (size_t)o->n_heads * o->head_dim;
    const size_t n_layer = (2 * n_q + 2 * (size_t)o->n_kv_heads * o->head_dim + 3 * (size_t)o->n_ff + 2) * n_embd;
    const size_t n = n_layer * o->n_layers + (2 * (size_t)o->vocab_size + 1) * n_embd + o->head_dim;
    const size_t n_tensors = 9 * (size_t)o->n_layers + 4;
    struct ggml_init_params params = {.mem_size = n * sizeof(float) + n_tensors * (ggml_tensor_overhead() + 64),
                                      .mem_buffer = NULL,
                                      .no_alloc = false};
    tiny_writer w = {.ctx = ggml_init(params), .g = gguf_init_empty(), .rng = {o->seed}};
    if (w.ctx == NULL || w.g == NULL)
        return false;
    tiny_keys(w.g, o, n_embd);
    tiny_vocab(w.g, o);
    tiny_tensors(&w, o, n_embd);
    const bool ok = gguf_write_to_file(w.g, path, false);
    gguf_free(w.g);
    ggml_free(w.ctx);
    return ok;
}

/* Writes to a fresh temporary file; the caller unlinks it. */
static TINY_UNUSED bool tiny_temp(const tiny_options *o, char path[TINY_PATH_BYTES])
{
    const char *dir = getenv("TMPDIR");
    snprintf(path, TINY_PATH_BYTES, "%s/kvs-tiny-XXXXXX", dir != NULL && dir[0] != '\0' ? dir : "/tmp");
    const int fd = mkstemp(path);
    if (fd < 0)
        return false;
    close(fd);
    return tiny_write(o, path);
}

#endif

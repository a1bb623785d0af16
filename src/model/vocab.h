/* libllama's tokenizer behind a narrow door, so that its headers stay inside *.c. */
#ifndef KVS_VOCAB_H
#define KVS_VOCAB_H

#include "model/gguf_check.h"
#include "model/model.h"

/* Once per process: ggml's CPU tables (before them every quantised vec_dot is silently wrong) and silent logs, for the
 * library never prints. This replaces log callbacks that the program itself gave libllama. */
void kvs_backend_init(void);

/* Loads the vocabulary of a file that kvs_gguf_check_tokenizer() has passed. EBACKEND: libllama's own words. */
kvs_status kvs_vocab_load(const char *path, uint32_t n_tokens, kvs_vocab **out, kvs_error *err);
void kvs_vocab_free(kvs_vocab *v);

/* A control token such as <|im_start|>: no plain text ever becomes one. */
bool kvs_vocab_is_control(const kvs_vocab *v, int32_t token);
/* A token that plain text does become where it contains its text. */
bool kvs_vocab_is_user_defined(const kvs_vocab *v, int32_t token);
/* The chat template's text from the GGUF, or NULL. */
const char *kvs_vocab_chat_template(const kvs_vocab *v);

#endif

/* The chat template's parts a turn loop needs beside kvs_chat_render(). */
#ifndef KVS_CHAT_TEMPLATE_H
#define KVS_CHAT_TEMPLATE_H

#include "base/base.h"

/* What the template puts after an assistant's content (chatml: <|im_end|> and a newline), all flagged TEMPLATE: a
 * model that has ended its turn by an end-of-generation token has said the first of these already. Rendering the
 * next message does not repeat them. Errors as kvs_chat_render(). */
kvs_status kvs_chat_turn_end(const kvs_model *m, kvs_rendered *out, kvs_error *err);

#endif

/* Reading one line: edited and with history on a terminal, plain otherwise. */
#ifndef KVS_CLI_LINE_INPUT_H
#define KVS_CLI_LINE_INPUT_H

#include <stdbool.h>

typedef struct kvs_line_input kvs_line_input;
typedef enum kvs_line_result { KVS_LINE_OK = 0, KVS_LINE_END, KVS_LINE_INTERRUPTED } kvs_line_result;

/* NULL without memory. History is read from and kept in the state folder. */
kvs_line_input *kvs_line_input_open(bool on_terminal);
/* *line is without its newline and valid until the next call. */
kvs_line_result kvs_line_input_read(kvs_line_input *in, const char **line);
void kvs_line_input_close(kvs_line_input *in);

#endif

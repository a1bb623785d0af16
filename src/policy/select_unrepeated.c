/* SkipKV's first stage (arXiv:2512.07993): the tokens of a sentence that a later one repeats go before all others, in every
 * head, whatever they score; the rest by single tokens. A sentence's meaning is the mean over its tokens of the last layer's
 * hidden states; it is repeated where a later one has a cosine of `threshold` or more with it. The session keeps the
 * sentences (src/session/sentences.c).
 * Reconstructed: all repeated sentences go at once, so that no fragment of one is left; a sentence that holds a slot which must
 * stay waits. Ours: `longest`, and `shortest`, below which an end does not count, so that a lone line break is no sentence. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"threshold", "cosine from which on a sentence repeats an earlier one", 0.95, -1, 2},
    {"shortest", "tokens that a sentence has at least", 4, 1, 65536},
    {"longest", "tokens after which a sentence ends in any case", 64, 1, 65536},
};

const kvs_select_ops kvs_select_unrepeated = {
    .info = {.name = "unrepeated",
             .doc = "sentences that a later one repeats go first",
             .source = "arXiv:2512.07993",
             .exactness =
                 "reconstructed: which repeated sentences go is not published; a token's own text ends a sentence",
             .params = params_info,
             .n_params = 3},
    .sentences = true,
    .meanings = true,
};

/* Whole sentences stay or go. Kvasir's own: a unit ends behind a token whose text ends a sentence, where template
 * markers begin or end, where the conversation has a gap (what stands on both sides was no sentence), and after `longest`
 * tokens, so that text without marks does not become one piece that never fits (64 tokens: ours). The first four
 * tokens, the sinks, are one unit. A token is looked at alone: the stop in an abbreviation counts. */
#include "policy/policy.h"

static const kvs_param_info params_info[] = {
    {"longest", "tokens after which a unit ends in any case", 64, 1, 65536},
};

enum { SINKS = 4 };

static bool ends_sentence(const kvs_policy_view *view, int32_t token)
{
    return view->sentence_ends != NULL && (view->sentence_ends[token / 64] >> (token % 64) & 1) != 0;
}

static void units(const double *params, const kvs_policy_view *view, uint32_t *unit)
{
    const uint32_t longest = (uint32_t)params[0];
    uint32_t n = 0, begin = 0;
    for (uint32_t i = 0; i < view->n_slots; i++) {
        const uint8_t marker = view->flags == NULL ? 0 : view->flags[i] & KVS_TOKEN_TEMPLATE;
        const uint8_t before = view->flags == NULL || i == 0 ? marker : view->flags[i - 1] & KVS_TOKEN_TEMPLATE;
        const bool sink = view->pos[i] < SINKS;
        const bool ended = i > 0 && !sink &&
                           (view->pos[i - 1] < SINKS || view->pos[i] != view->pos[i - 1] + 1 || marker != before ||
                            (marker == 0 && ends_sentence(view, view->token[i - 1])) || i - begin == longest);
        if (ended) {
            n++;
            begin = i;
        }
        unit[i] = n;
    }
}

const kvs_select_ops kvs_select_sentence = {
    .info = {.name = "sentence",
             .doc = "whole sentences stay or go together",
             .source = "Kvasir",
             .exactness = "exact; a token's own text decides what ends a sentence",
             .params = params_info,
             .n_params = 1},
    .sentences = true,
    .units = units,
};

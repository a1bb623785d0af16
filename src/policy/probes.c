/* The probes' names and numbers; src/session/probe.c runs them. */
#include "policy/policy.h"

/* KVzip (Kim et al., arXiv:2505.23416): chunks of 2,000 tokens behind a request to repeat them. */
static const kvs_param_info repeat_params[] = {
    {"chunk", "tokens said again at once; a quarter of the budget at most", 2000, 16, 65536},
};
const kvs_probe_ops kvs_probe_repeat = {
    .info = {"repeat", "what is held is said again behind a request to repeat it", "arXiv:2505.23416",
             "exact; the text is what the fullest head holds", repeat_params, 1},
    .kind = KVS_PROBE_REPEAT,
};

/* KVCompose (arXiv:2509.05165): the context again, on top of itself; here by chunks, so that a budget can hold it. */
static const kvs_param_info context_params[] = {
    {"chunk", "tokens said again at once; a quarter of the budget at most", 2000, 16, 65536},
};
const kvs_probe_ops kvs_probe_context = {
    .info = {"context", "what is held is said again as it is", "arXiv:2509.05165",
             "exact where one chunk holds it; the text is what the fullest head holds", context_params, 1},
    .kind = KVS_PROBE_CONTEXT,
};

/* Lookahead Q-Cache (arXiv:2505.20334): 8 pseudo tokens. */
static const kvs_param_info lookahead_params[] = {
    {"rows", "tokens generated and thrown away", 8, 1, 64},
};
const kvs_probe_ops kvs_probe_lookahead = {
    .info = {"lookahead", "the answer goes on for a few tokens on what the base policy keeps", "arXiv:2505.20334",
             "exact", lookahead_params, 1},
    .kind = KVS_PROBE_LOOKAHEAD,
};

/* Patched chunked eviction (arXiv:2506.17121): the prompt's last 64 tokens look at every chunk. */
static const kvs_param_info prompt_params[] = {
    {"rows", "last tokens of the prompt", 64, 1, KVS_POLICY_WINDOW_MAX},
};
const kvs_probe_ops kvs_probe_prompt = {
    .info = {"prompt", "the last tokens of the prompt to come are the window of every chunk", "arXiv:2506.17121",
             "exact; the rows cannot be of later calls", prompt_params, 1},
    .kind = KVS_PROBE_PROMPT,
};

/* EpiCache (arXiv:2509.17396): the patched prompt of its repository. */
static const kvs_param_info extract_params[] = {
    {"text", "room for an episode's own words behind the request, in tokens; 0: the request alone", 0, 0, 65536},
};
const kvs_probe_ops kvs_probe_extract = {
    .info = {"extract", "a request to extract what is essential, then the words of an episode", "arXiv:2509.17396",
             "exact, except that its rows stand behind the last token, not on it", extract_params, 1},
    .kind = KVS_PROBE_EXTRACT,
};

/* The one table of commands and options, and the parser that reads it. Help, man page and completion are made from the
 * same table in manual.c. What a value means (a policy spec, a size) is checked in common.c.
 */
#include "cli/cli.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum {
    RUN = 1u << 0,
    CHAT = 1u << 1,
    EVAL = 1u << 2,
    SPEED = 1u << 3,
    BENCH = 1u << 4,
    REPORT = 1u << 5,
    COMPARE = 1u << 6,
    POLICIES = 1u << 7,
    INSPECT = 1u << 8,
    DOCTOR = 1u << 9,
    PROFILE = 1u << 10,
    SESSIONS = RUN | CHAT | EVAL | BENCH, /* commands that hold a session under a policy */
    MODELS = SESSIONS | SPEED | DOCTOR | PROFILE,
    ALL = (1u << 11) - 1
};

#define SPEC_TEXT                                                                                                      \
    "SPEC is a preset with parameters and changed stages, such as 'streaming:sinks=4 +position=rerotate'; `kvasir "    \
    "policies` lists them. SIZE is 600MiB, 1.5GiB or 4800tok (slots in every head); 'window' is the model's window."

/* Order is the order of the bits above. */
const kvs_cli_command kvs_cli_commands[] = {
    {"run", "", "complete one prompt and stream the answer to stdout",
     "Completes the text of -p (or stdin with -p -) as it stands; with --chat it is one user message. " SPEC_TEXT,
     "kvasir run -p 'Once upon a time' -n 64\tcontinue a text\n"
     "kvasir run --chat -p 'What is a KV cache?' --json\tone answer with its timings\n"
     "kvasir run -p - --policy streaming --budget 1024tok < long.txt\ta long prompt in a small cache\n",
     0, 0, kvs_cmd_run},
    {"chat", "", "talk with the model in the terminal, in a cache that never grows past its budget",
     "Lines that begin with / are commands: /help lists them. Default policy streaming with position rerotate and a "
     "budget of the model's window, so that a chat does not end when the window is full. " SPEC_TEXT,
     "kvasir chat\tjust talk\n"
     "kvasir chat --session work --budget 64MiB\ta conversation that is there again next time\n"
     "kvasir chat --policy attention_top --system 'Answer in one sentence.'\tanother policy and a system prompt\n"
     "kvasir chat --episodes 4 --dialogue long.jsonl --budget 64MiB\task about a recorded conversation, in episodes\n",
     0, 0, kvs_cmd_chat},
    {"eval", "", "teacher-forced quality of a policy on a text or a dialogue",
     "Feeds a fixed text, compares each next-token distribution with a reference session's in lock-step, and prints "
     "nll, ppl, kl, top1, memory, time, position indices and health. Default arithmetic f32, default reference the "
     "full "
     "cache (beyond the model's window: a fresh prefill of the last window, on a stride of 64). Without --budget it "
     "is the length of the text. " SPEC_TEXT,
     "kvasir eval --text book.txt --policy streaming --budget 1024tok --position rerotate\tone policy\n"
     "kvasir eval --text a.txt --policy random:keep=766tok --prefill full --dump-keep keep.jsonl\twhat it keeps\n"
     "kvasir eval --dialogue threads.jsonl --index 3 --budget 512tok --json\ta recorded conversation\n"
     "kvasir eval --recall 4 --budget 1024tok --episodes 1,4 --policy streaming --policy kvzip\tplanted facts\n",
     0, 0, kvs_cmd_eval},
    {"speed", "", "prefill and decode rate against depth, as shares of the machine's bandwidth and arithmetic peak",
     "Measures a whole prompt of each depth, then single greedy tokens there; median of the repeats. Prompts are drawn "
     "from --seed. Without --budget the cache holds all of it. The limits are measured first, by the same threads with "
     "the same instruction set: reads of 256 MiB, fused multiply-adds, products of 8-bit codes. " SPEC_TEXT,
     "kvasir speed\tthree depths\n"
     "kvasir speed --depth 512,7680 --gen 32 --json\tfor a script\n"
     "kvasir speed --depth 1024 --sessions 8\teight conversations in one step, tokens a second in all\n"
     "kvasir speed --depth 2000,8000,32000 --budget 1024tok --policy streaming --gen 256\ta cache that stays small\n"
     "kvasir speed --depth 256,1024,4096 --plot speed.svg\tboth rates beside their bounds\n"
     "kvasir speed --cpu-mask avx2 --threads 1\twhat a smaller machine would do\n",
     0, 0, kvs_cmd_speed},
    {"bench", "", "dialogues x policies x budgets x position modes, with a report",
     "Writes manifest.json, events.jsonl, turns.jsonl, summary.csv, claims.json and report.html into --out. --policy, "
     "--budget and --position may be given several times and replace the suite's own. Ctrl-C leaves valid partial "
     "results; --resume goes on. " SPEC_TEXT,
     "kvasir bench --suite smoke\ta first look, in a few minutes\n"
     "kvasir bench --suite paper --data dialogues/ --out out/paper\tthe claims of arXiv 2511.04686\n"
     "kvasir bench --suite methods --policy 'snapkv (full first)' --policy caote\ttwo methods as docs/methods.md has "
     "them\n"
     "kvasir bench --policy streaming --policy random --budget 1024tok --position keep --position rerotate\tan own "
     "grid\n",
     0, 0, kvs_cmd_bench},
    {"report", "DIR", "write report.html of a bench output folder again", "Reads the files of DIR and nothing else.",
     "kvasir report out/paper\tafter an upgrade, or after merging shards\n", 1, 1, kvs_cmd_report},
    {"compare", "DIR DIR", "compare the results of two bench output folders",
     "Puts the rows of both summary.csv side by side. Folders of another model or other dialogues are refused.",
     "kvasir compare out/before out/after\twhat a change did\n", 2, 2, kvs_cmd_compare},
    {"policies", "[NAME]", "list the policies, their stages, parameters and papers",
     "Without NAME one line per preset; with NAME everything about it.",
     "kvasir policies\tthe list\nkvasir policies streaming\tone preset with its parameters\n", 0, 1, kvs_cmd_policies},
    {"inspect", "FILE", "show what a model, a session file or a bench output folder holds",
     "FILE is a GGUF model, a session that chat saved, or a folder that bench wrote.",
     "kvasir inspect model.gguf\tits dimensions and what a token of cache costs\n"
     "kvasir inspect ~/.local/state/kvasir/sessions/work.kvs\ta saved session\n",
     1, 1, kvs_cmd_inspect},
    {"doctor", "", "check the machine, the model and the libraries, and say what would be slow and why",
     "Exits with 1 if something is missing without which Kvasir cannot run.", "kvasir doctor\tcheck this machine\n", 0,
     0, kvs_cmd_doctor},
    {"profile", "KIND", "measure a model's heads and layers on texts, for policies that read a profile",
     "Runs the texts and writes a JSON file that budget stages take as file=FILE (docs/policies.md). KIND is baklava "
     "(a "
     "share for each KV head, searched for --budget; of several texts the last is not used but told), sensitivity (how "
     "much a layer's keys change without the far context, EpiCache), duo (which heads look far back, without training) "
     "or "
     "kvzip-head (which heads a repetition needs) or lukv (what heads should drop, at 99 ratios). The file belongs to "
     "this model. Default arithmetic f32.",
     "kvasir profile duo --text book.txt -o duo.json\tthen: --policy duo:file=duo.json\n"
     "kvasir profile baklava --text a.txt --text b.txt --text held-out.txt --tokens 2048 --budget 512tok -o "
     "b.json\tshares "
     "for 512 slots a head\n",
     1, 1, kvs_cmd_profile},
};
const uint32_t kvs_cli_n_commands = sizeof kvs_cli_commands / sizeof kvs_cli_commands[0];
_Static_assert(1u << (sizeof kvs_cli_commands / sizeof kvs_cli_commands[0]) == ALL + 1u, "a bit for every command");

static const char *const prefill_choices[] = {"chunked", "full", NULL};
static const char *const kv_type_choices[] = {"f16", "f32", NULL};
static const char *const arith_choices[] = {"native", "f32", NULL};
static const char *const cpu_choices[] = {"scalar", "avx2", "avx512", "avx512vnni", "neon", "neondot", NULL};
static const char *const ref_choices[] = {"full", "window", "none", NULL};
static const char *const suite_choices[] = {"smoke", "demo", "paper", "full", "methods", NULL};
static const char *const position_choices[] = {"rollback", "keep", "rerotate", "gapcap:16", "recompute", NULL};

#define AT(member) offsetof(kvs_cli_args, member)

const kvs_cli_option kvs_cli_options[] = {
    {"model", 'm', KVS_CLI_FILE, AT(model), MODELS, "FILE", "GGUF model; default $KVASIR_MODEL, else the one set up",
     NULL, 0, 0},
    {"text", 0, KVS_CLI_LIST, AT(texts), PROFILE, "FILE", "plain text to measure on (- is stdin)", NULL, 0, 0},
    {"out", 'o', KVS_CLI_FILE, AT(out), PROFILE, "FILE.json", "where the profile goes", NULL, 0, 0},
    {"tokens", 0, KVS_CLI_U32, AT(text_tokens), PROFILE, "N", "tokens of each text at most; default the model's window",
     NULL, 2, 1e8},
    {"block", 0, KVS_CLI_U32, AT(block_tokens), PROFILE, "N",
     "sensitivity: tokens of a block; default 4096, or a quarter of the shortest text", NULL, 1, 1e8},
    {"text", 0, KVS_CLI_FILE, AT(text), EVAL, "FILE", "plain text to feed (- is stdin)", NULL, 0, 0},
    {"dialogue", 0, KVS_CLI_FILE, AT(dialogue), EVAL | CHAT, "FILE",
     "messages in JSON or JSON lines; with --recall the fillers; in chat the history of --episodes", NULL, 0, 0},
    {"index", 0, KVS_CLI_U32, AT(index), EVAL | CHAT, "N", "which dialogue of the file, from 0; default 0", NULL, 0,
     1e9},
    {"prompt", 'p', KVS_CLI_STRING, AT(prompt), RUN, "TEXT", "the prompt (- reads stdin)", NULL, 0, 0},
    {"n-tokens", 'n', KVS_CLI_U32, AT(n_tokens), RUN | CHAT, "N", "tokens of an answer at most", NULL, 1, 1e9},
    {"chat", 0, KVS_CLI_FLAG, AT(chat), RUN, NULL, "send the prompt as a user message through the chat template", NULL,
     0, 0},
    {"system", 0, KVS_CLI_STRING, AT(system), RUN | CHAT, "TEXT", "system message; default the template's own", NULL, 0,
     0},
    {"session", 0, KVS_CLI_STRING, AT(session), CHAT, "NAME", "go on with this session and save it after every answer",
     NULL, 0, 0},
    {"temp", 0, KVS_CLI_REAL, AT(temp), RUN | CHAT, "T", "temperature; 0 is greedy", NULL, 0, 100},
    {"top-k", 0, KVS_CLI_U32, AT(top_k), RUN | CHAT, "K", "sample among the K likeliest; 0 is off", NULL, 0, 1e9},
    {"top-p", 0, KVS_CLI_REAL, AT(top_p), RUN | CHAT, "P", "sample among the likeliest that reach P; 1 is off", NULL, 0,
     1},
    {"min-p", 0, KVS_CLI_REAL, AT(min_p), RUN | CHAT, "P", "drop tokens under P times the likeliest; 0 is off", NULL, 0,
     1},
    {"repeat-penalty", 0, KVS_CLI_REAL, AT(repeat_penalty), RUN | CHAT, "R", "penalty on repeated tokens; 1 is off",
     NULL, 0.01, 100},
    {"suite", 0, KVS_CLI_CHOICE, AT(suite), BENCH, "NAME", "set of runs; default demo", suite_choices, 0, 0},
    {"data", 0, KVS_CLI_DIR, AT(data), BENCH, "PATH",
     "file or folder of dialogues; default KVASIR_DATA's ShareGPT subset, else the embedded set", NULL, 0, 0},
    {"dialogues", 0, KVS_CLI_U32, AT(n_dialogues), BENCH, "N", "how many dialogues; default the suite's own", NULL, 1,
     1e6},
    {"out", 0, KVS_CLI_DIR, AT(out), BENCH, "DIR", "output folder; default kvasir-bench-SUITE", NULL, 0, 0},
    {"resume", 0, KVS_CLI_FLAG, AT(resume), BENCH, NULL, "go on where an interrupted run into --out stopped", NULL, 0,
     0},
    {"shard", 0, KVS_CLI_STRING, AT(shard), BENCH, "I/N", "run only the Ith of N equal parts, from 0/N", NULL, 0, 0},
    {"profiles", 0, KVS_CLI_DIR, AT(profiles), BENCH, "DIR",
     "suite methods: where to look for the files of presets that need one (kvasir profile); default these are left out",
     NULL, 0, 0},
    {"free-running", 0, KVS_CLI_FLAG, AT(free_running), BENCH, NULL,
     "also let each policy answer for itself, as the paper did", NULL, 0, 0},
    {"policy", 0, KVS_CLI_LIST, AT(policies), SESSIONS | SPEED, "SPEC",
     "cache policy; default baseline (chat: streaming)", NULL, 0, 0},
    {"budget", 0, KVS_CLI_LIST, AT(budgets), SESSIONS | SPEED | PROFILE, "SIZE",
     "hard cap of the cache; default the model's window (speed: what the depth needs; profile: a quarter of the text)",
     NULL, 0, 0},
    {"position", 0, KVS_CLI_LIST, AT(positions), SESSIONS | SPEED, "MODE",
     "rollback, keep, rerotate, gapcap:G or recompute; default the policy's own", position_choices, 0, 0},
    {"steer", 0, KVS_CLI_STRING, AT(steer), RUN, "SPEC",
     "FILE:layer=L,alpha=A,gamma=G moves the answer's hidden states along a control vector; default off", NULL, 0, 0},
    {"prefill", 0, KVS_CLI_CHOICE, AT(prefill), RUN | CHAT | EVAL, "HOW",
     "chunked evicts between chunks of a prompt, full only after it; default chunked", prefill_choices, 0, 0},
    {"ffn-skip", 0, KVS_CLI_STRING, AT(ffn_skip), RUN | CHAT | EVAL, "SPEC",
     "decoded tokens go without feed-forward blocks that change little: threshold=S,warmup=TOKENS,cold=FIRST:LAST "
     "(docs/ffn-skip.md); default off",
     NULL, 0, 0},
    {"episodes", 0, KVS_CLI_NUMBERS, AT(episodes), EVAL | CHAT, "K",
     "caches of K episodes in one budget, a question goes to the nearest (docs/epicache.md); with --recall K,...", NULL,
     0, 1e6},
    {"uniform-heads", 0, KVS_CLI_FLAG, AT(uniform_heads), EVAL | CHAT, NULL,
     "with --episodes: every head of a layer keeps as many slots", NULL, 0, 0},
    {"sensitivity", 0, KVS_CLI_FILE, AT(sensitivity), EVAL | CHAT, "FILE",
     "with --episodes: layers share by a profile (kvasir profile sensitivity); default all the same", NULL, 0, 0},
    {"keep-turns", 0, KVS_CLI_FLAG, AT(keep_turns), CHAT, NULL,
     "with --episodes: what is asked and answered stays in that episode", NULL, 0, 0},
    {"recall", 0, KVS_CLI_U32, AT(n_recall), EVAL, "N",
     "ask about facts planted in N generated dialogues, under every --policy and --episodes at every --budget", NULL, 1,
     1e6},
    {"history", 0, KVS_CLI_U32, AT(history_tokens), EVAL, "N",
     "with --recall: tokens before the first question at least; default 2000", NULL, 256, 1e6},
    {"ref", 0, KVS_CLI_CHOICE, AT(ref), EVAL, "WHICH", "reference: full cache, fresh window, or none", ref_choices, 0,
     0},
    {"ref-window", 0, KVS_CLI_U32, AT(ref_window), EVAL, "N", "tokens of the window reference; default the model's",
     NULL, 128, 1e9},
    {"dump-logits", 0, KVS_CLI_FILE, AT(dump_logits), EVAL, "F.npy", "float32 [n_tokens][vocab] of the policy session",
     NULL, 0, 0},
    {"needle", 0, KVS_CLI_STRING, AT(needle), EVAL, "TEXT",
     "a passage to ask about: ger says what share of it no head holds at the end, utilisation what the answer's "
     "attention gives it",
     NULL, 0, 0},
    {"dump-keep", 0, KVS_CLI_FILE, AT(dump_keep), EVAL, "F.jsonl", "what every (layer, KV head) holds at the end", NULL,
     0, 0},
    {"kv-type", 0, KVS_CLI_CHOICE, AT(kv_type), SESSIONS | SPEED, "TYPE", "type of cached keys and values; default f16",
     kv_type_choices, 0, 0},
    {"arith", 0, KVS_CLI_CHOICE, AT(arith), SESSIONS | SPEED | PROFILE, "HOW",
     "native integer products, or f32; default native (eval, bench, profile: f32)", arith_choices, 0, 0},
    {"seed", 0, KVS_CLI_U64, AT(seed), SESSIONS | SPEED, "N", "seed of everything random; default 0", NULL, 0, 0},
    {"depth", 0, KVS_CLI_NUMBERS, AT(depths), SPEED, "N,...", "depths to measure; default 512,2048,4096", NULL, 1, 1e8},
    {"prompt", 0, KVS_CLI_U32, AT(prompt_tokens), SPEED, "N",
     "also the rate of N more prompt tokens after the decoded ones; default 0", NULL, 0, 1e8},
    {"gen", 0, KVS_CLI_U32, AT(gen_tokens), SPEED, "N", "tokens to decode at each depth; default 16", NULL, 1, 1e6},
    {"sessions", 0, KVS_CLI_U32, AT(n_sessions), SPEED, "N", "sessions of that depth stepped together; default 1", NULL,
     1, 4096},
    {"plot", 0, KVS_CLI_FILE, AT(plot), SPEED, "FILE.svg", "also draw both rates against depth, with their bounds",
     NULL, 0, 0},
    {"repeat", 0, KVS_CLI_U32, AT(repeats), SPEED, "N", "repeats, of which the median counts; default 3", NULL, 1, 63},
    {"threads", 0, KVS_CLI_U32, AT(threads), MODELS, "N", "threads; default one per core", NULL, 1, 1024},
    {"cpu-mask", 0, KVS_CLI_CHOICE, AT(cpu_mask), MODELS, "ISA", "use no instruction set above this one", cpu_choices,
     0, 0},
    {"template", 0, KVS_CLI_STRING, AT(template_name), SESSIONS, "NAME", "chat template; default auto, the model's own",
     NULL, 0, 0},
    {"policy-plugin", 0, KVS_CLI_FILE, AT(policy_plugin), SESSIONS | SPEED | POLICIES, "FILE.so",
     "add the policies of a shared object (docs/write-a-policy.md)", NULL, 0, 0},
    {"paper-compat", 0, KVS_CLI_FLAG, AT(paper_compat), SESSIONS, NULL,
     "the published script's traits, bugs included (docs/paper.md)", NULL, 0, 0},
    {"json", 0, KVS_CLI_FLAG, AT(json), ALL, NULL, "print one JSON object on stdout and nothing else there", NULL, 0,
     0},
    {"help", 'h', KVS_CLI_FLAG, AT(help), ALL, NULL, "show this", NULL, 0, 0},
};
const uint32_t kvs_cli_n_options = sizeof kvs_cli_options / sizeof kvs_cli_options[0];
_Static_assert(sizeof kvs_cli_options / sizeof kvs_cli_options[0] <= 64, "kvs_cli_args.given has a bit for each");

bool kvs_cli_takes(const kvs_cli_command *command, const kvs_cli_option *option)
{
    return (option->commands >> (command - kvs_cli_commands) & 1u) != 0;
}

const kvs_cli_command *kvs_cli_find(const char *name)
{
    for (uint32_t i = 0; i < kvs_cli_n_commands; i++)
        if (strcmp(name, kvs_cli_commands[i].name) == 0)
            return &kvs_cli_commands[i];
    return NULL;
}

bool kvs_cli_given(const kvs_cli_args *args, const char *option_name)
{
    for (uint32_t i = 0; i < kvs_cli_n_options; i++)
        if (args->given >> i & 1u && strcmp(option_name, kvs_cli_options[i].name) == 0)
            return true;
    return false;
}

int kvs_cli_usage_error(const kvs_cli_command *command, const char *fmt, ...)
{
    va_list list;
    va_start(list, fmt);
    fprintf(stderr, "kvasir %s: ", command->name);
    vfprintf(stderr, fmt, list);
    fprintf(stderr, " (try kvasir %s --help)\n", command->name);
    va_end(list);
    return KVS_EXIT_USAGE;
}

/* ---- values ----------------------------------------------------------------------------------------------------- */

static int bad_value(const kvs_cli_args *args, const kvs_cli_option *option, const char *value, const char *right)
{
    return kvs_cli_usage_error(args->command, "--%s: '%s' is not %s", option->name, value, right);
}

static int set_choice(kvs_cli_args *args, const kvs_cli_option *option, const char *value)
{
    size_t n = 0;
    char list[200] = "";
    for (; option->choices[n] != NULL; n++) {
        if (strcmp(value, option->choices[n]) == 0) {
            *(const char **)((char *)args + option->offset) = option->choices[n];
            return 0;
        }
        const size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, "%s%s", n > 0 ? ", " : "", option->choices[n]);
    }
    const char *const near = kvs_nearest(value, option->choices, n);
    if (near != NULL)
        return kvs_cli_usage_error(args->command, "--%s: unknown value '%s'; did you mean '%s'? known are %s",
                                   option->name, value, near, list);
    return kvs_cli_usage_error(args->command, "--%s: unknown value '%s'; known are %s", option->name, value, list);
}

static bool parse_u64(const char *text, uint64_t *out)
{
    char *end;
    if (text[0] < '0' || text[0] > '9')
        return false;
    errno = 0;
    *out = strtoull(text, &end, 10);
    return errno == 0 && *end == '\0';
}

static int set_numbers(kvs_cli_args *args, const kvs_cli_option *option, const char *value)
{
    kvs_cli_numbers *const numbers = (kvs_cli_numbers *)(void *)((char *)args + option->offset);
    numbers->n = 0;
    const char *p = value;
    for (;;) {
        char *end;
        errno = 0;
        const bool digit = *p >= '0' && *p <= '9';
        const uint64_t x = digit ? strtoull(p, &end, 10) : 0;
        if (!digit || errno != 0 || (*end != ',' && *end != '\0') || (double)x < option->min ||
            (double)x > option->max || numbers->n == KVS_CLI_LIST_MAX)
            return bad_value(args, option, value, "a list of whole numbers such as 512,2048 (64 of them at most)");
        numbers->items[numbers->n++] = (uint32_t)x;
        if (*end == '\0')
            return 0;
        p = end + 1;
    }
}

static int set_u32(kvs_cli_args *args, const kvs_cli_option *option, const char *value)
{
    uint64_t x;
    if (parse_u64(value, &x) && (double)x >= option->min && (double)x <= option->max) {
        *(uint32_t *)(void *)((char *)args + option->offset) = (uint32_t)x;
        return 0;
    }
    char right[80];
    snprintf(right, sizeof right, "a whole number from %.0f to %.0f", option->min, option->max);
    return bad_value(args, option, value, right);
}

static int set_real(kvs_cli_args *args, const kvs_cli_option *option, const char *value)
{
    char *end;
    const double x = strtod(value, &end);
    if (end != value && *end == '\0' && x >= option->min && x <= option->max) { /* false for NaN */
        *(double *)(void *)((char *)args + option->offset) = x;
        return 0;
    }
    char right[80];
    snprintf(right, sizeof right, "a number from %g to %g", option->min, option->max);
    return bad_value(args, option, value, right);
}

static int set_value(kvs_cli_args *args, const kvs_cli_option *option, const char *value)
{
    void *const at = (char *)args + option->offset;
    switch (option->kind) {
    case KVS_CLI_FLAG:
        *(bool *)at = true;
        return 0;
    case KVS_CLI_STRING:
    case KVS_CLI_FILE:
    case KVS_CLI_DIR:
        if (value[0] == '\0')
            return kvs_cli_usage_error(args->command, "--%s: the %s is empty", option->name, option->metavar);
        *(const char **)at = value;
        return 0;
    case KVS_CLI_LIST: {
        kvs_cli_list *const list = at;
        if (list->n == KVS_CLI_LIST_MAX)
            return kvs_cli_usage_error(args->command, "--%s is given more than %d times", option->name,
                                       KVS_CLI_LIST_MAX);
        list->items[list->n++] = value;
        return 0;
    }
    case KVS_CLI_U64:
        if (!parse_u64(value, at))
            return bad_value(args, option, value, "a whole number from 0 to 2^64 - 1");
        return 0;
    case KVS_CLI_CHOICE:
        return set_choice(args, option, value);
    case KVS_CLI_U32:
        return set_u32(args, option, value);
    case KVS_CLI_REAL:
        return set_real(args, option, value);
    case KVS_CLI_NUMBERS:
        return set_numbers(args, option, value);
    }
    return KVS_EXIT_USAGE;
}

/* ---- the command line ------------------------------------------------------------------------------------------- */

static const kvs_cli_option *find_long(const kvs_cli_command *command, const char *name, size_t n_bytes)
{
    for (uint32_t i = 0; i < kvs_cli_n_options; i++) {
        const kvs_cli_option *const o = &kvs_cli_options[i];
        if (kvs_cli_takes(command, o) && strlen(o->name) == n_bytes && memcmp(o->name, name, n_bytes) == 0)
            return o;
    }
    return NULL;
}

static const kvs_cli_option *find_letter(const kvs_cli_command *command, char letter)
{
    for (uint32_t i = 0; i < kvs_cli_n_options; i++)
        if (kvs_cli_takes(command, &kvs_cli_options[i]) && kvs_cli_options[i].letter == letter)
            return &kvs_cli_options[i];
    return NULL;
}

static int unknown_option(const kvs_cli_command *command, const char *word)
{
    const char *names[sizeof kvs_cli_options / sizeof kvs_cli_options[0]];
    size_t n = 0;
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)strcspn(word, "="), word);
    const char *const plain = name + strspn(name, "-");
    for (uint32_t i = 0; i < kvs_cli_n_options; i++)
        if (kvs_cli_takes(command, &kvs_cli_options[i]))
            names[n++] = kvs_cli_options[i].name;
    const char *const near = plain[0] != '\0' ? kvs_nearest(plain, names, n) : NULL;
    if (near != NULL)
        return kvs_cli_usage_error(command, "unknown option '%s'; did you mean '--%s'?", name, near);
    return kvs_cli_usage_error(command, "unknown option '%s'", name);
}

/* One option at argv[*i]; *i is left on its last word. */
static int parse_option(kvs_cli_args *args, int argc, char **argv, int *i)
{
    const char *const word = argv[*i], *value = NULL;
    const kvs_cli_option *option;
    if (word[1] == '-') {
        const size_t n_bytes = strcspn(word + 2, "=");
        option = find_long(args->command, word + 2, n_bytes);
        if (word[2 + n_bytes] == '=')
            value = word + 2 + n_bytes + 1;
    } else {
        option = find_letter(args->command, word[1]);
        if (option != NULL && option->kind == KVS_CLI_FLAG && word[2] != '\0')
            option = NULL;
        else if (word[2] != '\0')
            value = word + 2;
    }
    if (option == NULL)
        return unknown_option(args->command, word);
    if (option->kind == KVS_CLI_FLAG) {
        if (value != NULL)
            return kvs_cli_usage_error(args->command, "--%s takes no value, not '%s'", option->name, value);
    } else if (value == NULL) {
        if (*i + 1 >= argc)
            return kvs_cli_usage_error(args->command, "--%s needs a %s", option->name, option->metavar);
        value = argv[++*i];
    }
    args->given |= (uint64_t)1 << (option - kvs_cli_options);
    return set_value(args, option, value);
}

int kvs_cli_parse(const kvs_cli_command *command, int argc, char **argv, kvs_cli_args *args)
{
    memset(args, 0, sizeof *args);
    args->command = command;
    bool only_operands = false;
    for (int i = 2; i < argc; i++) {
        if (!only_operands && strcmp(argv[i], "--") == 0) {
            only_operands = true;
            continue;
        }
        if (!only_operands && argv[i][0] == '-' && argv[i][1] != '\0') {
            const int code = parse_option(args, argc, argv, &i);
            if (code != 0)
                return code;
            if (args->help)
                return 0;
            continue;
        }
        if (args->n_operands == command->n_operands_max)
            return kvs_cli_usage_error(command, "'%s' is one word too many", argv[i]);
        args->operands[args->n_operands++] = argv[i];
    }
    if (args->n_operands < command->n_operands_min)
        return kvs_cli_usage_error(command, "needs %s", command->operands);
    return 0;
}

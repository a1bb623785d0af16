#!/usr/bin/env bash
# The command line's contract (docs: design section 6): exit codes, one line on stderr, --json alone on stdout.
# Usage: tests/cli/test_cli.sh path/to/kvasir. What needs a model is skipped with a message if there is none.
set -u
kvasir=${1:?usage: test_cli.sh path/to/kvasir}
kvasir=$(cd "$(dirname "$kvasir")" && pwd)/$(basename "$kvasir")
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0

ok() { printf 'ok %s\n' "$1"; }
not_ok() {
    printf 'not ok %s: %s\n' "$1" "$2"
    failed=1
}

# expect NAME CODE PATTERN ARGS...: the exit code, and exactly one line on stderr that matches (none for code 0).
expect() {
    local name=$1 code=$2 pattern=$3 got
    shift 3
    "$kvasir" "$@" >"$tmp/out" 2>"$tmp/err" </dev/null
    got=$?
    if [ "$got" != "$code" ]; then
        not_ok "$name" "exit $got, not $code: $(head -c 200 "$tmp/err")"
    elif [ "$code" != 0 ] && [ "$(wc -l <"$tmp/err")" != 1 ]; then
        not_ok "$name" "$(wc -l <"$tmp/err") lines on stderr, not 1"
    elif [ "$code" != 0 ] && ! grep -q -- "$pattern" "$tmp/err"; then
        not_ok "$name" "stderr does not say '$pattern': $(head -c 200 "$tmp/err")"
    elif [ "$code" = 0 ] && [ -n "$pattern" ] && ! grep -q -- "$pattern" "$tmp/out"; then
        not_ok "$name" "stdout does not say '$pattern'"
    else
        ok "$name"
    fi
}

# one_object NAME KEYS ARGS...: stdout is one JSON object that has the keys, and nothing else.
one_object() {
    local name=$1 keys=$2
    shift 2
    if ! "$kvasir" "$@" >"$tmp/out" 2>"$tmp/err" </dev/null; then
        not_ok "$name" "failed: $(head -c 200 "$tmp/err")"
    elif python3 - "$tmp/out" "$keys" 2>"$tmp/why" <<'PY'
import json, sys
value = json.loads(open(sys.argv[1], encoding="utf-8").read(), parse_constant=lambda c: sys.exit("constant " + c))
assert isinstance(value, dict), "not an object"
missing = [k for k in sys.argv[2].split() if k not in value]
assert not missing, "lacks " + ", ".join(missing)
PY
    then
        ok "$name"
    else
        not_ok "$name" "$(tail -n 1 "$tmp/why")"
    fi
}

commands="run chat eval speed bench report compare policies inspect doctor profile"
for c in $commands; do
    expect "help_of_$c" 0 "^usage: kvasir $c" "$c" --help
    expect "unknown_option_of_$c" 2 "try kvasir $c --help" "$c" --no-such-option-at-all
    "$kvasir" "$c" --help | grep -q '^examples:' && ok "examples_of_$c" || not_ok "examples_of_$c" "none"
done
expect overview 0 "usage: kvasir COMMAND" --help
expect version 0 "^kvasir [0-9]" --version
expect nearest_command 2 "did you mean 'eval'" evla
expect nearest_option 2 "did you mean '--policy'" run --polcy streaming
expect nearest_choice 2 "did you mean 'native'" run -p x --arith natve
expect nearest_position 2 "did you mean 'rerotate'" run -p x --position rerotat
expect nearest_policy 2 "did you mean 'streaming'" run -p x --policy streeming
expect nearest_policy_name 2 "did you mean 'baseline'" policies baselin
expect wrong_size 2 "4800tok" run -p x --budget 600
expect wrong_number 2 "whole number" run -p x -n many
expect number_out_of_range 2 "from 0 to 1" run -p x --top-p 1.5
expect missing_value 2 "needs a SIZE" run -p x --budget
expect flag_with_value 2 "takes no value" run -p x --chat=yes
expect no_prompt 2 "needs a prompt" run
expect no_operand 2 "needs DIR" report
expect too_many_operands 2 "one word too many" report a b
expect episodes_two 2 "one number in a chat" chat --episodes 2,3
expect episodes_policy 2 "no --policy" chat --episodes 2 --policy streaming
expect sensitivity_alone 2 "goes with --episodes" chat --sensitivity f.json
expect episodes_alone 2 "with --recall" eval --episodes 2 --dialogue b
expect two_texts 2 "and not both" eval --text a --dialogue b
expect no_kind 2 "needs KIND" profile --text a -o b
expect wrong_kind 2 "did you mean 'sensitivity'" profile sensitivty --text a -o b
expect profile_of_nothing 2 "needs --text FILE" profile duo -o b
expect profile_to_nowhere 2 "needs -o FILE.json" profile duo --text a
expect file_for_no_reader 2 "unknown parameter of snapkv 'file'" run -p x --policy snapkv:file=a
expect wrong_shard 2 "I/N" bench --shard 3/2
expect wrong_shell 2 "bash, zsh and fish" --completion tcsh
expect missing_model 1 "run scripts/setup or set KVASIR_MODEL" run -p x -m "$tmp/none.gguf"
expect missing_folder 1 "manifest.json\|$tmp/none" report "$tmp/none"
expect missing_file 1 "none" inspect "$tmp/none"
expect foreign_file 1 "neither a GGUF model" inspect "$0"
expect missing_plugin 1 "none.so" run -p x --policy-plugin "$tmp/none.so"
expect no_plugin 1 "$0\|header" policies --policy-plugin "$0"
root=$(cd "$(dirname "$0")/../.." && pwd)
if "${CC:-cc}" -shared -fPIC "-I$root/include" -o "$tmp/my_policy.so" "$root/docs/examples/my_policy.c" 2>"$tmp/why"; then
    expect plugin_is_listed 0 "^my_policy" policies my_policy --policy-plugin "$tmp/my_policy.so"
    expect plugin_parameter 2 "half '0' must be" run -p x --policy my_policy:half=0 --policy-plugin "$tmp/my_policy.so"
    expect plugin_is_gone_again 2 "unknown policy 'my_policy'" run -p x --policy my_policy
else
    not_ok plugin_builds "$(head -n 1 "$tmp/why")"
fi
expect compare_missing 1 "manifest.json" compare "$tmp/a" "$tmp/b"

for s in bash zsh fish; do
    "$kvasir" --completion "$s" >"$tmp/completion.$s"
    if ! command -v "$s" >/dev/null; then
        echo "skipped completion_$s: no $s here"
    elif "$s" -n "$tmp/completion.$s" 2>"$tmp/why"; then
        ok "completion_$s"
    else
        not_ok "completion_$s" "$(head -n 1 "$tmp/why")"
    fi
done
completed=$(bash -c 'source "$1"; COMP_WORDS=(kvasir eval --ref wi); COMP_CWORD=3; _kvasir; echo "${COMPREPLY[*]}"' _ \
    "$tmp/completion.bash")
[ "$completed" = window ] && ok completion_of_a_choice || not_ok completion_of_a_choice "'$completed'"
"$kvasir" --man >"$tmp/kvasir.1"
missing=
for c in $commands; do grep -q "^\.SS kvasir $c" "$tmp/kvasir.1" || missing="$missing $c"; done
[ -z "$missing" ] && ok man_has_every_command || not_ok man_has_every_command "lacks$missing"

# Two folders that differ in one number; then one of other data, which must be refused.
folder() { # NAME DATA_HASH KL
    mkdir -p "$tmp/$1"
    printf '{"schema":1,"model":{"name":"m","sha256":"aa"},"data":{"name":"d","xxh64":"%s"},"runs":[{"run":"r0","policy":"streaming","position":"keep"}],"dialogues":[{"id":"d,0"}]}' "$2" >"$tmp/$1/manifest.json"
    printf 'run,dialogue,protocol,kl_mean,nll,top1\nr0,"d,0",tf,%s,2.5,\n' "$3" >"$tmp/$1/summary.csv"
}
folder one 11 0.25
folder two 11 0.75
folder other 22 0.25
expect compare_shows_the_difference 0 "+0.5" compare "$tmp/one" "$tmp/two"
expect compare_refuses_other_data 1 "different data" compare "$tmp/one" "$tmp/other"
one_object compare_json "runs" compare "$tmp/one" "$tmp/two" --json
one_object policies_json "policies" policies --json
one_object policy_json "name params source" policies baseline --json

if "$kvasir" doctor >"$tmp/out" 2>&1; then
    names="nll ppl kl_mean kl_p99 top1 n_tokens n_kept_mean footprint peak_kv_bytes budget_bytes peak_rss_bytes ttft_ms
        tpot_ms prefill_tok_per_s decode_tok_per_s evictions evict_ms health ldd rddi future out_of_window collision order
        backward gap seam policy position model arith head_consensus ger ger_layer_max"
    printf 'The keys of a cache are written once and never rewritten, so nothing drifts.\n%.0s' 1 2 3 4 5 6 >"$tmp/text"
    one_object doctor_json "ok isa model slow" doctor --json
    one_object run_json "text n_tokens ttft_ms health" run -p 'One, two, three,' -n 4 --temp 0 --json
    one_object speed_json "rows isa threads read_bytes_per_s f32_peak_flops int8_peak_ops" speed --depth 32,64 --gen 2 \
        --repeat 1 --sessions 2 --plot "$tmp/speed.svg" --json
    if python3 - "$tmp" <<'PY' 2>"$tmp/why"
import json, sys, xml.etree.ElementTree
row = json.load(open(sys.argv[1] + "/out"))["rows"][1]
assert row["depth"] == 64 and row["sessions"] == 2, row
for name in "prefill_tok_per_s decode_tok_per_s bytes_per_token share_of_bandwidth share_of_peak peak_kv_bytes".split():
    assert row[name] > 0, name
assert xml.etree.ElementTree.parse(sys.argv[1] + "/speed.svg").getroot().tag.endswith("svg")
PY
    then ok speed_rows_and_plot; else not_ok speed_rows_and_plot "$(tail -n 1 "$tmp/why")"; fi
    one_object run_with_a_plugin "text n_tokens health" run -p "$(cat "$tmp/text")" -n 4 --temp 0 --budget 64tok --json \
        --policy my_policy:half=20 --policy-plugin "$tmp/my_policy.so"
    one_object speed_beyond_the_budget "rows policy" speed --depth 300 --gen 2 --repeat 1 --budget 128tok \
        --policy streaming --json
    one_object eval_json "$names" eval --text "$tmp/text" --json --dump-logits "$tmp/l.npy" --dump-keep "$tmp/k.jsonl"
    # The baseline is its own reference: anything but 0 and 1 is a fault of the loop.
    if python3 - "$tmp" <<'PY' 2>"$tmp/why"
import ast, json, os, sys
d = sys.argv[1]
r = json.load(open(d + "/out"))
assert r["kl_mean"] == 0 and r["top1"] == 1 and r["evictions"] == 0, "kl %s, top1 %s" % (r["kl_mean"], r["top1"])
f = open(d + "/l.npy", "rb").read(128)
assert f[:6] == b"\x93NUMPY", "no npy magic"
rows, vocab = ast.literal_eval(f[10:128].decode().strip())["shape"]
assert rows == r["n_tokens"] and os.path.getsize(d + "/l.npy") == 128 + rows * vocab * 4, "npy shape and size differ"
for line in open(d + "/k.jsonl"):
    k = json.loads(line)
    assert k["pos"] == list(range(rows)) and len(k["rope_pos"]) == rows, "layer %d lost tokens" % k["layer"]
PY
    then ok eval_of_the_baseline_is_exact; else not_ok eval_of_the_baseline_is_exact "$(tail -n 1 "$tmp/why")"; fi
    printf '{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}]}\n' >"$tmp/talk.jsonl"
    expect no_episodes 1 "0 episodes are asked for: 1 to 64" chat --episodes 0 --dialogue "$tmp/talk.jsonl"
    expect more_episodes_than_windows 1 "at most 1" chat --episodes 2 --dialogue "$tmp/talk.jsonl"
    expect episodes_without_history 1 "needs a history" chat --episodes 2
    expect recall_without_budget 2 "needs --budget" eval --recall 1 --episodes 2
    expect missing_dialogue 1 "none.jsonl" eval --dialogue "$tmp/none.jsonl"
    expect no_template 1 "template" run -p x --template other
    expect model_shape 0 "n_kv_heads" inspect "$("$kvasir" doctor --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["model"])')"
    XDG_STATE_HOME=$tmp/state "$kvasir" chat --session t -n 4 --temp 0 <<<$'Hello.\n/usage\n/keep\n/quit' >"$tmp/out" 2>"$tmp/err"
    code=$?
    if [ "$code" = 0 ] && grep -q "tokens said" "$tmp/out" && [ -s "$tmp/state/kvasir/sessions/t.kvs" ]; then
        ok chat_saves_its_session
    else
        not_ok chat_saves_its_session "exit $code: $(head -c 200 "$tmp/err")"
    fi
    expect saved_session 0 "n_tokens" inspect "$tmp/state/kvasir/sessions/t.kvs"
else
    echo "skipped what needs a model: $(tail -n 1 "$tmp/out")"
fi
exit "$failed"

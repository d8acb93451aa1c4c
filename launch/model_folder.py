"""Whether a folder holds the whole embedded model. Knows nothing about how it is made.

The last step of making one is a manifest with the size and the hash of every file: a folder without it is
half-written, and one that differs from it is broken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONVERSION_VERSION = 2
"""Raise it when the conversion changes: folders that an older one made are then rebuilt."""

MANIFEST_FILE = "manifest.json"


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


def write_manifest(folder: Path, source: str) -> None:
    """Write down every file of a finished folder; without it a folder counts as half-written."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST_FILE]
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    manifest = {"source": source, "conversion_version": CONVERSION_VERSION, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")

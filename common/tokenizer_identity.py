"""Which tokenizer a model has, told without loading it."""

import hashlib
from pathlib import Path


def tokenizer_sha256(model: str) -> str:
    """The hash of the model's tokenizer.json, or "" where `model` is not a folder on this machine."""
    path = Path(model) / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

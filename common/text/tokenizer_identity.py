"""Which tokenizer a model has, told without loading the tokenizer.

Two models speak the same token ids where each id stands for the same token. The file as a whole does not tell that:
it changes with the release that wrote it, and holds settings, such as truncation, that change no id.
"""

import hashlib
from pathlib import Path
from typing import Any

import orjson


def tokenizer_sha256(model: str, revision: str | None = None) -> str:
    """The hash of the model's vocabulary, added tokens included: which id is which token.

    model: a folder, or a hub name, whose files are looked for in the Hugging Face cache of this machine.
    Returns "" where there is no tokenizer.json, or none that can be read.
    """
    path = _tokenizer_file(model, revision)
    if path is None:
        return ""
    try:
        tokens = sorted(_tokens(orjson.loads(path.read_bytes())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return hashlib.sha256(orjson.dumps(tokens)).hexdigest()


def _tokenizer_file(model: str, revision: str | None) -> Path | None:
    path = Path(model) / "tokenizer.json"
    if path.is_file():
        return path
    if Path(model).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "tokenizer.json", revision=revision)
    except HFValidationError:  # a path, but not of a folder on this machine
        return None
    return Path(cached) if isinstance(cached, str) else None


def _tokens(tokenizer: dict[str, Any]) -> set[tuple[int, str]]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {(token_id, token) for token, token_id in vocabulary.items()}
    else:  # a unigram model's list of tokens, each with its score
        tokens = {(token_id, token) for token_id, (token, _) in enumerate(vocabulary)}
    return tokens | {(added["id"], added["content"]) for added in tokenizer["added_tokens"]}

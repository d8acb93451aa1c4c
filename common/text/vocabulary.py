"""What a model's token ids stand for: the bytes of each, which are special, and the hash that tells two models apart.

A token is a piece of a byte string, not of a text: one emoji may be four tokens. How a tokenizer turns tokens into
bytes is read from its decoder, never from a model's name:

- ByteLevel (GPT-2, Llama 3, Qwen, SmolLM2): every character of a token stands for one byte.
- ByteFallback (Llama 2, Mistral, Gemma): "<0xE2>" is one byte, any other token is text, "▁" being a space.
- Any other decoder: a token is the text that the decoder itself adds for it in the middle of a text.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

_BYTE_FALLBACK_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each of the 256 characters of GPT-2's alphabet (its encoder.py, `bytes_to_unicode`)."""
    printable = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def decoder_types(tokenizer: Tokenizer) -> frozenset[str]:
    """The type names in a tokenizer's decoder, those inside a Sequence included; empty if it has none."""
    if tokenizer.decoder is None:
        return frozenset()
    return frozenset(_types_in(json.loads(tokenizer.decoder.__getstate__())))


def _types_in(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder["type"]
    for inner in decoder.get("decoders", ()):
        yield from _types_in(inner)


class Vocabulary:
    """Looks up bytes by token id, and keeps those of ids that were asked for: at most all of them.

    The bytes of a generation's ids, joined, are the UTF-8 of its text. Only the first token differs, where a
    decoder strips the leading space: `leading_bytes_of` is for that one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        types = decoder_types(tokenizer)
        self._is_byte_level = "ByteLevel" in types
        self._has_byte_fallback = "ByteFallback" in types
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token inside a text; b"" for an id outside the vocabulary.

        Added and special tokens give their literal content. One written in the byte-level alphabet alone
        ("é") is read as bytes all the same, because the decoder does so.
        """
        known = self.known.get(token_id)
        if known is not None:
            return known
        token = self._token(token_id)
        if token is None:  # not kept: there is no end of such ids
            return b""
        self.known[token_id] = found = self._bytes_of_token(token_id, token)
        return found

    def _bytes_of_token(self, token_id: int, token: str) -> bytes:
        if self._is_byte_level:
            try:
                return bytes([_BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:  # an added token, stored as it is written: the decoder takes it whole, too
                return token.encode()
        if self._has_byte_fallback and (match := _BYTE_FALLBACK_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        # Decoders treat the first token of a text differently, so the token goes second, behind itself.
        return self._decode([token_id, token_id])[len(self._decode([token_id])) :].encode()

    def leading_bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token that starts a text: without the space that the decoder strips there."""
        token_bytes = self.bytes_of(token_id)
        if not token_bytes or self._is_byte_level:
            return token_bytes
        alone = self._decode([token_id])
        # A lone byte of a longer character decodes to U+FFFD: its own byte is the truth.
        return token_bytes if alone == token_bytes.decode(errors="replace") else alone.encode()

    def _token(self, token_id: int) -> str | None:
        try:
            token: str | None = self.tokenizer.id_to_token(token_id)
        except OverflowError:  # negative, or above 32 bits
            return None
        return token

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


def tokenizer_sha256(model: str, revision: str | None = None) -> str:
    """The hash of a model's vocabulary, added tokens included: which id is which token. Loads no tokenizer.

    Two models speak the same token ids where each id stands for the same token. The file as a whole does not tell that:
    it changes with the release that wrote it, and holds settings, such as truncation, that change no id.

    model: a folder, or a hub name, whose files are looked for in the Hugging Face cache of this machine.
    Returns "" where there is no tokenizer.json, or none that can be read.
    """
    try:
        tokens = sorted(_tokens(orjson.loads(_tokenizer_file(model, revision).read_bytes())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return hashlib.sha256(orjson.dumps(tokens)).hexdigest()


def _tokenizer_file(model: str, revision: str | None) -> Path:
    """Raises:
    OSError, ValueError: there is none on this machine.
    """
    if Path(model).is_dir():
        return Path(model) / "tokenizer.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, "tokenizer.json", revision=revision, local_files_only=True))


def _tokens(tokenizer: dict[str, Any]) -> set[tuple[int, str]]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {(token_id, token) for token, token_id in vocabulary.items()}
    else:  # a unigram model's list of tokens, each with its score
        tokens = {(token_id, token) for token_id, (token, _) in enumerate(vocabulary)}
    return tokens | {(added["id"], added["content"]) for added in tokenizer["added_tokens"]}

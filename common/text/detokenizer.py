"""Text from token ids, all at once or as they arrive.

Why not `tokenizers.decoders.DecodeStream`: it cannot be asked for what is left at the end, it raises "Invalid
prefix" when a byte-fallback token makes the bytes before it invalid ("<0xE2><0x82><0xAC>" gives "€", then
"<0xFF>" takes it back), it holds a whole chunk back for one unfinished character, and it decodes a run of
invalid bytes again from its start at every step, which is quadratic. Here every token becomes bytes by itself
and an incremental UTF-8 decoder joins them: the split of the ids cannot matter, and each is looked at once.

The text equals `Tokenizer.decode` (without special tokens) but for two things. A character cut off at the end of the
generation is dropped, where `decode` gives U+FFFD. And where byte-fallback tokens are invalid UTF-8, only the invalid
bytes become U+FFFD, where `decode` also replaces the valid characters next to them.

A token is a piece of a byte string, not of a text: one emoji may be four tokens. How a tokenizer turns tokens into
bytes is read from its decoder, never from a model's name:

- ByteLevel (GPT-2, Llama 3, Qwen, SmolLM2): every character of a token stands for one byte.
- ByteFallback (Llama 2, Mistral, Gemma): "<0xE2>" is one byte, any other token is text, "▁" being a space.
- Any other decoder: a token is the text that the decoder itself adds for it in the middle of a text.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterator, Sequence, Set
from typing import Any

from tokenizers import Tokenizer

BYTE_FALLBACK_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """The byte behind each of the 256 characters of GPT-2's alphabet (its encoder.py, `bytes_to_unicode`)."""
    printable = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


BYTE_OF_CHARACTER = byte_level_alphabet()


def decoder_types(tokenizer: Tokenizer) -> frozenset[str]:
    """The type names in a tokenizer's decoder, those inside a Sequence included; empty if it has none."""
    if tokenizer.decoder is None:
        return frozenset()
    return frozenset(_types_in(json.loads(tokenizer.decoder.__getstate__())))


def _types_in(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder["type"]
    for inner in decoder.get("decoders", ()):
        yield from _types_in(inner)


class TokenBytes:
    """Looks up bytes by token id, and keeps those of ids that were asked for: at most the vocabulary's.

    The bytes of a generation's ids, joined, are the UTF-8 of its text. Only the first token differs, where a
    decoder strips the leading space: `leading_bytes_of` is for that one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        types = decoder_types(tokenizer)
        self._is_byte_level = "ByteLevel" in types
        self._has_byte_fallback = "ByteFallback" in types
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
            return _byte_level_bytes(token)
        if self._has_byte_fallback and (match := BYTE_FALLBACK_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return self._decoded_after_another(token_id).encode()

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
            token: str | None = self._tokenizer.id_to_token(token_id)
        except OverflowError:  # negative, or above 32 bits
            return None
        return token

    def _decoded_after_another(self, token_id: int) -> str:
        # Decoders treat the first token of a text differently, so the token goes second, behind itself.
        return self._decode([token_id, token_id])[len(self._decode([token_id])) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


@functools.lru_cache(maxsize=8)
def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The one table of a tokenizer, so that requests share what it has learned."""
    return TokenBytes(tokenizer)


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:  # an added token, stored as it is written: the decoder takes it whole, too
        return token.encode()


class IncrementalDetokenizer:
    """Turns the ids of one generation into text: for any split, the pushes joined are the push of all ids.

    hidden_ids: those that the text leaves out; None: the special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, hidden_ids: Set[int] | None = None) -> None:
        self._token_bytes = token_bytes(tokenizer)
        self._skipped_ids = special_token_ids(tokenizer) if hidden_ids is None else hidden_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_at_start = True

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete; "" while a character is unfinished, which at the end is dropped.

        token_ids: new ids only, length >= 0; ids outside the vocabulary add nothing.
        """
        shown_ids = [token_id for token_id in token_ids if token_id not in self._skipped_ids]
        known, bytes_of = self._token_bytes.known, self._token_bytes.bytes_of
        pieces = [known[each] if each in known else bytes_of(each) for each in shown_ids]  # mostly without a call
        if self._is_at_start:
            self._strip_leading_space(shown_ids, pieces)
        return self._utf8.decode(b"".join(pieces))

    def _strip_leading_space(self, shown_ids: list[int], pieces: list[bytes]) -> None:
        first = next((index for index, piece in enumerate(pieces) if piece), None)
        if first is not None:
            pieces[first] = self._token_bytes.leading_bytes_of(shown_ids[first])
            self._is_at_start = False


@functools.lru_cache(maxsize=8)
def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that the text leaves out: those of special tokens."""
    added_tokens = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added_tokens.items() if token.special)

"""Special tokens that a client writes out, such as "<|im_end|>", as the plain text that they are: nobody forges a turn.

A rendered prompt does not tell the template's special tokens from a client's. So a mark goes into those of the client,
behind the first character, before the template is rendered. The encoder matches special tokens before it normalizes,
and its normalizer takes the marks out: what is left is encoded in one piece, as text without marks would be.
"""

import re
import secrets
from collections.abc import Set
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers

# Noncharacters, which are in no text, and in an order that nobody outside can know.
MARK = "".join(secrets.choice([chr(code) for code in range(0xFDD0, 0xFDF0)]) for _ in range(8))
_TEMPLATES_OWN = ("role", "type")  # fields whose words templates compare


class LiteralSpecialTokens:
    """Marks special tokens in what a template is given. encoder: encodes prompts that have marks.

    prompt: one of the template's, for a word of a user. Its tokens frame turns even where they are not special by
    name (DeepSeek's "<｜User｜>"), so they are marked, too, except in what an assistant said: a model's answers have
    such tokens in them ("<think>").
    """

    def __init__(self, backend: Tokenizer, prompt: str) -> None:
        added = backend.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        ids_in_prompt = set(backend.encode(prompt, add_special_tokens=False).ids)
        framing = {added[token_id].content for token_id in ids_in_prompt & added.keys()}
        framing = {token for token in framing if re.search(r"[^\w\s]", token)}  # no white space, and no word
        self._in_assistants, self._in_others = _Marker(special), _Marker(special | framing)
        self.encoder = _marked_text_encoder(backend, special | framing)

    def marked(
        self, conversation: list[dict[str, Any]], tools: list[Any], options: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Any], dict[str, Any]]:
        """What a template is given, with marks; equal to what it was where no text has such a token."""
        return (
            [
                (self._in_assistants if message["role"] == "assistant" else self._in_others).marked(message)
                for message in conversation
            ],
            self._in_others.marked(tools),
            {name: self._in_others.marked(value) for name, value in options.items()},
        )


class _Marker:
    """Marks what is one of some tokens, or would be with one character of the template's on either side.

    Models have hundreds of tokens that differ in their ends only, so beginnings are looked for. To mark what is no
    token costs a little time, and changes no id.
    """

    def __init__(self, tokens: Set[str]) -> None:
        long = {token for token in tokens if len(token) > 5}
        self._beginnings = tuple({token[:-1][:8] for token in long} | {token for token in tokens - long if token[1:]})
        self._inner_beginnings = tuple({token[1:-1][:8] for token in long})

    def marked(self, value: Any) -> Any:
        """A message, a tool, or a part of one, with marks in all its texts, keys included: those are clients', too."""
        if isinstance(value, dict):
            return {
                key if key.isidentifier() else self._marked_text(key): part if _is_own(key, part) else self.marked(part)
                for key, part in value.items()
            }
        if isinstance(value, list):
            return [self.marked(part) for part in value]
        return self._marked_text(value) if isinstance(value, str) else value

    def _marked_text(self, text: str) -> str:
        if text.startswith(self._inner_beginnings):
            text = _with_mark(text)
        while found := [beginning for beginning in self._beginnings if beginning in text]:
            for beginning in found:  # where they overlap, some are left for the next time
                text = text.replace(beginning, _with_mark(beginning))
        return text


def _is_own(key: str, value: Any) -> bool:
    return key in _TEMPLATES_OWN and isinstance(value, str) and value.isidentifier()


def _with_mark(text: str) -> str:
    return text[0] + MARK + text[1:]


def _marked_text_encoder(backend: Tokenizer, tokens: Set[str]) -> Tokenizer:
    """The same tokenizer, on the same vocabulary in memory, but that it takes marks out.

    tokens: those that must be matched before that.

    Raises:
        ValueError: it would give added tokens other ids.
    """
    encoder = Tokenizer(backend.model)
    normalize = [normalizers.Replace(MARK, ""), *([backend.normalizer] if backend.normalizer is not None else [])]
    encoder.normalizer = normalizers.Sequence(normalize)
    encoder.pre_tokenizer = backend.pre_tokenizer
    added = sorted(backend.get_added_tokens_decoder().items())
    encoder.add_tokens([_unnormalized(token) if token.content in tokens else token for _, token in added])
    if any(encoder.token_to_id(token.content) != token_id for token_id, token in added):
        raise ValueError("the tokenizer's added tokens have gaps: only --parse-special-tokens works with it")
    return encoder


def _unnormalized(token: AddedToken) -> AddedToken:
    return AddedToken(**{**token.__getstate__(), "normalized": False})

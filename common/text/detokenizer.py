"""Text from token ids, all at once or as they arrive.

Why not `tokenizers.decoders.DecodeStream`: it cannot be asked for what is left at the end, it raises "Invalid
prefix" when a byte-fallback token makes the bytes before it invalid ("<0xE2><0x82><0xAC>" gives "€", then
"<0xFF>" takes it back), it holds a whole chunk back for one unfinished character, and it decodes a run of
invalid bytes again from its start at every step, which is quadratic. Here every token becomes bytes by itself
and an incremental UTF-8 decoder joins them: the split of the ids cannot matter, and each is looked at once.

The text equals `Tokenizer.decode` (without special tokens) but for two things. A character cut off at the end of the
generation is dropped, where `decode` gives U+FFFD. And where byte-fallback tokens are invalid UTF-8, only the invalid
bytes become U+FFFD, where `decode` also replaces the valid characters next to them.
"""

import codecs
import functools
from collections.abc import Sequence

from tokenizers import Tokenizer

from common.text.token_bytes import token_bytes


class IncrementalDetokenizer:
    """Turns the ids of one generation into text: for any split, pushes + flush == `detokenize(all ids)`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = token_bytes(tokenizer)
        self._skipped_ids = special_token_ids(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_at_start = True

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete; "" while a character is unfinished.

        token_ids: new ids only, length >= 0; ids outside the vocabulary add nothing.
        """
        shown_ids = [token_id for token_id in token_ids if token_id not in self._skipped_ids]
        pieces = [self._token_bytes.bytes_of(token_id) for token_id in shown_ids]
        if self._is_at_start:
            self._strip_leading_space(shown_ids, pieces)
        return self._utf8.decode(b"".join(pieces))

    def flush(self) -> str:
        """What is left when the generation ends: nothing, because a character that was cut off is dropped."""
        self._utf8.reset()
        return ""

    def _strip_leading_space(self, shown_ids: list[int], pieces: list[bytes]) -> None:
        first = next((index for index, piece in enumerate(pieces) if piece), None)
        if first is not None:
            pieces[first] = self._token_bytes.leading_bytes_of(shown_ids[first])
            self._is_at_start = False


def detokenize(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of a whole generation; a character cut off at its end is dropped."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    return detokenizer.push(token_ids) + detokenizer.flush()


@functools.lru_cache(maxsize=8)
def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that the text leaves out: those of special tokens."""
    added_tokens = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added_tokens.items() if token.special)

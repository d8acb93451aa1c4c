"""The text of one choice: token ids in, text to send out, ended by its stop strings."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from common.text.detokenizer import IncrementalDetokenizer
from common.text.stop_strings import StopStringMatcher


class GeneratedText:
    """Joins the detokenizer and the stop strings, and counts the tokens that made the text.

    num_tokens: every id pushed, special and unknown ones included; after a stop string only those up to and
    including the token that completed it, however many came in the same chunk.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop_strings = StopStringMatcher(stop) if stop else None
        self.num_tokens = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, if one did: the generation may then be aborted."""
        return self._stop_strings.matched if self._stop_strings else None

    def push(self, token_ids: Sequence[int]) -> str:
        """The text to send now, "" if none is final yet; token_ids: new ids only, length >= 0."""
        if self._stop_strings is None:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids)
        # One token at a time, to know which one completes a stop string.
        return "".join(self._push_token(token_id, self._stop_strings) for token_id in token_ids)

    def finish(self) -> str:
        """The text held back, when the generation has ended; "" after a stop string."""
        rest = self._detokenizer.flush()
        if self._stop_strings is None:
            return rest
        return self._stop_strings.push(rest) + self._stop_strings.flush()

    def _push_token(self, token_id: int, stop_strings: StopStringMatcher) -> str:
        if stop_strings.matched is not None:
            return ""
        self.num_tokens += 1
        return stop_strings.push(self._detokenizer.push([token_id]))

"""The text of a generation: token ids in, text to send out, ended by its stop strings.

Which stop string wins must not depend on how the text was split, so the rule is: the match that completes first; if
several complete at the same character, the one that starts earliest (the longest). With the stops "abcd" and "bc",
"abcd" never matches: "bc" has completed before it.

Why no library: `regex` finds partial matches, but always lets the one that starts first win, so that a text would
wait for "abcd" although "bc" is there; and no Aho-Corasick of PyPI tells how much of a text to hold back.
"""

from collections.abc import Sequence, Set

from tokenizers import Tokenizer

from common.text.detokenizer import IncrementalDetokenizer


class StopStringMatcher:
    """Passes text on up to the first stop string, and never a part that a stop string turns out to own.

    stop: non-empty strings; with none of them every text passes.

    Raises: ValueError for an empty stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise ValueError("a stop string must not be empty")
        self._stop = stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that can never become part of a stop string; "" once one has matched."""
        if self.matched is not None:
            return ""
        unsent, self._held = self._held + text, ""
        starts = {stop_string: unsent.find(stop_string) for stop_string in self._stop if stop_string in unsent}
        if starts:
            self.matched = min(starts, key=lambda found: (starts[found] + len(found), -len(found)))
            return unsent[: starts[self.matched]]
        num_sent = self._num_sendable(unsent)
        self._held = unsent[num_sent:]
        return unsent[:num_sent]

    def flush(self) -> str:
        """The text held back, when the generation ends without a match."""
        held, self._held = self._held, ""
        return held

    def _num_sendable(self, unsent: str) -> int:
        """Where the longest end of the text begins that a stop string begins with.

        Over a whole text that is one comparison per character and stop string: the search starts at what was held
        and goes on by as many characters as are sent.
        """
        start = max(0, len(unsent) - max(map(len, self._stop), default=1) + 1)
        while start < len(unsent) and not any(stop_string.startswith(unsent[start:]) for stop_string in self._stop):
            start += 1
        return start


class GeneratedText:
    """Joins the detokenizer and the stop strings, and counts the tokens that made the text.

    num_tokens: every id pushed, special and unknown ones included; after a stop string only those up to and
    including the token that completed it, however many came in the same chunk.

    hidden_ids: those that the text leaves out; None: the special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), hidden_ids: Set[int] | None = None) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, hidden_ids=hidden_ids)
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
        return self._stop_strings.flush() if self._stop_strings else ""

    def _push_token(self, token_id: int, stop_strings: StopStringMatcher) -> str:
        if stop_strings.matched is not None:
            return ""
        self.num_tokens += 1
        return stop_strings.push(self._detokenizer.push([token_id]))

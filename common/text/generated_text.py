"""The text of a generation: token ids in, text to send out, ended by its stop strings.

Why not `tokenizers.decoders.DecodeStream`: it cannot be asked for what is left at the end, it raises "Invalid
prefix" when a byte-fallback token makes the bytes before it invalid ("<0xE2><0x82><0xAC>" gives "€", then
"<0xFF>" takes it back), it holds a whole chunk back for one unfinished character, and it decodes a run of
invalid bytes again from its start at every step, which is quadratic. Here every token becomes bytes by itself
and an incremental UTF-8 decoder joins them: the split of the ids cannot matter, and each is looked at once.

The text equals `Tokenizer.decode` (without special tokens) but for two things. A character cut off at the end of the
generation is dropped, where `decode` gives U+FFFD. And where byte-fallback tokens are invalid UTF-8, only the invalid
bytes become U+FFFD, where `decode` also replaces the valid characters next to them.

Which stop string wins must not depend on how the text was split, so the rule is: the match that completes first; if
several complete at the same character, the one that starts earliest (the longest). With the stops "abcd" and "bc",
"abcd" never matches: "bc" has completed before it. Why no library: `regex` finds partial matches, but always lets the
one that starts first win, so that a text would wait for "abcd" although "bc" is there; and no Aho-Corasick of PyPI
tells how much of a text to hold back.
"""

import codecs
from collections.abc import Sequence, Set

from common.text.vocabulary import Vocabulary


class StopStringMatcher:
    """Passes text on up to the first stop string, and never a part that a stop string turns out to own.

    stop: non-empty strings; with none of them every text passes.
    """

    def __init__(self, stop: Sequence[str]) -> None:
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
    """Turns the ids of one generation into text: for any split, the pushes joined are the push of all ids.

    num_tokens: every id pushed, special and unknown ones included; after a stop string only those up to and
    including the token that completed it, however many came in the same chunk.

    hidden_ids: those that the text leaves out.
    """

    def __init__(self, vocabulary: Vocabulary, hidden_ids: Set[int], stop: Sequence[str] = ()) -> None:
        self._vocabulary, self._hidden_ids = vocabulary, hidden_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_at_start = True
        self._stop_strings = StopStringMatcher(stop) if stop else None
        self.num_tokens = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, if one did: the generation may then be aborted."""
        return self._stop_strings.matched if self._stop_strings else None

    def push(self, token_ids: Sequence[int]) -> str:
        """The text to send now; "" while a character, which is dropped at the end, or a stop string is unfinished.

        token_ids: new ids only, length >= 0; ids outside the vocabulary add nothing.
        """
        if self._stop_strings is None:
            self.num_tokens += len(token_ids)
            return self._decoded(token_ids)
        text = ""
        for token_id in token_ids:  # one at a time, to know which one completes a stop string
            if self._stop_strings.matched is None:
                self.num_tokens += 1
                text += self._stop_strings.push(self._decoded([token_id]))
        return text

    def finish(self) -> str:
        """The text held back, when the generation has ended; "" after a stop string."""
        return self._stop_strings.flush() if self._stop_strings else ""

    def _decoded(self, token_ids: Sequence[int]) -> str:
        shown_ids = [token_id for token_id in token_ids if token_id not in self._hidden_ids]
        known, bytes_of = self._vocabulary.known, self._vocabulary.bytes_of
        pieces = [known[each] if each in known else bytes_of(each) for each in shown_ids]  # mostly without a call
        if self._is_at_start:
            self._strip_leading_space(shown_ids, pieces)
        return self._utf8.decode(b"".join(pieces))

    def _strip_leading_space(self, shown_ids: list[int], pieces: list[bytes]) -> None:
        first = next((index for index, piece in enumerate(pieces) if piece), None)
        if first is not None:
            pieces[first] = self._vocabulary.leading_bytes_of(shown_ids[first])
            self._is_at_start = False

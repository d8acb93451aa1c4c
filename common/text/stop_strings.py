"""Stop strings, found in a text that arrives in pieces.

Knows nothing about tokens. Which match wins must not depend on how the text was split, so the rule is: the
match that completes first; if several complete at the same character, the one that starts earliest (the
longest). With the stops "abcd" and "bc", "abcd" never matches: "bc" has completed before it.
"""

from collections.abc import Sequence


class StopStringMatcher:
    """Passes text on up to the first stop string, and never a part that a stop string turns out to own.

    stop: non-empty strings; with none of them every text passes.

    Raises: ValueError for an empty stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise ValueError("a stop string must not be empty")
        self._prefixes = [_MatchedPrefix(stop_string) for stop_string in stop]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that can never become part of a stop string; "" once one has matched."""
        if self.matched is not None:
            return ""
        unsent = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            completed = [prefix.stop_string for prefix in self._prefixes if prefix.extend(character)]
            if completed:
                self.matched = max(completed, key=len)
                self._held = ""
                return unsent[: end - len(self.matched)]
        return self._hold_back(unsent)

    def flush(self) -> str:
        """The text held back, when the generation ends without a match."""
        held, self._held = self._held, ""
        return held

    def _hold_back(self, unsent: str) -> str:
        num_held = max((prefix.length for prefix in self._prefixes), default=0)
        num_sent = len(unsent) - num_held
        self._held = unsent[num_sent:]
        return unsent[:num_sent]


class _MatchedPrefix:
    """The longest prefix of a stop string that the text ends with; O(1) a character (Knuth-Morris-Pratt)."""

    def __init__(self, stop_string: str) -> None:
        self.stop_string = stop_string
        self.length = 0
        self._fallbacks = _fallback_lengths(stop_string)

    def extend(self, character: str) -> bool:
        """Takes the next character of the text, and says whether it completes the stop string."""
        self.length = _longest_prefix(self.stop_string, self._fallbacks, self.length, character)
        return self.length == len(self.stop_string)


def _longest_prefix(pattern: str, fallbacks: list[int], length: int, character: str) -> int:
    """The prefix length after `character`, when pattern[:length] came before it; length < len(pattern)."""
    while length and pattern[length] != character:
        length = fallbacks[length]
    return length + 1 if pattern[length] == character else 0


def _fallback_lengths(pattern: str) -> list[int]:
    """For every n <= len(pattern), the longest proper prefix that pattern[:n] also ends with."""
    fallbacks = [0, 0]
    for character in pattern[1:]:
        fallbacks.append(_longest_prefix(pattern, fallbacks, fallbacks[-1], character))
    return fallbacks

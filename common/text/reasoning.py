"""What a model thinks before it answers, `<think>...</think>`, read as it is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from tokenizers import Tokenizer

from common.text.detokenizer import special_token_ids
from common.text.tool_calls import MAX_SPACE, SpacedTags, TextReader
from common.wire import ProcessorChunk

OPENING, CLOSING = "<think>", "</think>"
_CLOSING = SpacedTags([CLOSING])


@dataclass(frozen=True)
class ReasoningForm:
    """How a model marks its thoughts. closing_id: of the token that ends them, if that is one token.

    is_always_open: its answers begin within thoughts, even where the prompt does not.
    """

    backend: Tokenizer
    closing_id: int | None
    is_always_open: bool

    @classmethod
    def of(cls, parser: str, backend: Tokenizer, template: str) -> "ReasoningForm | None":
        """parser: one of the names of --reasoning-parser. None: nothing is told from the answers."""
        closing_id = backend.token_to_id(CLOSING)
        is_clear = CLOSING in template and closing_id is not None and closing_id not in special_token_ids(backend)
        if parser == "none" or (parser == "auto" and not is_clear):
            return None
        return cls(backend, closing_id, is_always_open=parser == "deepseek-r1")

    def is_open(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to a prompt, by its token ids, begins within thoughts."""
        end: str = self.backend.decode(prompt[-8:], skip_special_tokens=False)
        return self.is_always_open or end.rstrip().endswith(OPENING)


class _Place(Enum):
    BEGINNING = auto()
    THOUGHTS = auto()
    BEHIND_THOUGHTS = auto()
    ANSWER = auto()


class ReasoningReader:
    """Tells thoughts from the answer, which another reader reads: any cut of a text gives the same.

    is_open: the text begins within thoughts, as where the prompt ends with "<think>". Otherwise one that does not begin
    with that, behind 99 white-space characters at most, has no thoughts. White space around thoughts is dropped.
    has_thought: whether there are any.
    """

    def __init__(self, answer: TextReader, *, is_open: bool, closing_id: int | None = None) -> None:
        self._answer, self._is_open, self._closing_id = answer, is_open, closing_id
        self._num_tokens, self._is_counted = 0, False
        self._held = ""
        self._place = _Place.BEGINNING
        self._is_before_first_word = True
        self.has_thought = is_open

    @property
    def has_called(self) -> bool:
        return self._answer.has_called

    def push(self, text: str) -> ProcessorChunk:
        chunk = ProcessorChunk()
        self._held += text
        if self._place is _Place.BEGINNING:
            self._look_for_opening()
        if self._place is _Place.THOUGHTS:
            chunk.reasoning_content = self._thoughts()
        if self._place is _Place.BEHIND_THOUGHTS:
            self._held = self._held.lstrip()
            self._place = _Place.ANSWER if self._held else _Place.BEHIND_THOUGHTS
        if self._place is _Place.ANSWER:
            chunk.add(self._answer.push(self._held))
            self._held = ""
        return chunk

    def flush(self) -> ProcessorChunk:
        chunk = ProcessorChunk()
        if self._place is _Place.THOUGHTS or (self._place is _Place.BEGINNING and self._is_open):
            chunk.reasoning_content = self._held
        elif self._place is _Place.BEGINNING:
            chunk.add(self._answer.push(self._held))
        chunk.add(self._answer.flush())
        return chunk

    def count(self, token_ids: Sequence[int]) -> None:
        """token_ids: the next ones behind the text."""
        if self._closing_id is not None and not self._is_counted:
            self._is_counted = self._closing_id in token_ids
            self._num_tokens += token_ids.index(self._closing_id) + 1 if self._is_counted else len(token_ids)

    @property
    def num_tokens(self) -> int | None:
        """How many were counted up to the one that ends the thoughts, and with it; None where no single one does."""
        return None if self._closing_id is None else self._num_tokens * self.has_thought

    def _look_for_opening(self) -> None:
        begun = self._held.lstrip()
        is_near = len(self._held) - len(begun) <= MAX_SPACE
        if is_near and begun.startswith(OPENING):
            self._held, self.has_thought = begun.removeprefix(OPENING), True
        elif is_near and OPENING.startswith(begun):
            return
        self._place = _Place.THOUGHTS if self.has_thought else _Place.ANSWER

    def _thoughts(self) -> str:
        """Up to where they end, or may end."""
        if self._is_before_first_word:
            self._held = self._held.lstrip()
            self._is_before_first_word = not self._held
        start, end = _CLOSING.find(self._held)
        thoughts, self._held = self._held[:start], self._held[start if end is None else end :]
        if end is not None:
            self._place = _Place.BEHIND_THOUGHTS
        return thoughts

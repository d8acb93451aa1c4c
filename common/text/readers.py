"""What is in a model's text, read as it is written: thoughts, calls of tools, and the rest, the answer's content.

    <think>It asks for ...</think>
    <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>     Hermes' form, Qwen's as well
    [{"name": "weather", "arguments": {"city": "Rome"}}, ...]                     what a grammar forces

A reader is pushed pieces of text and says what they complete: any cut of a text gives the same. A call's name comes
first, once it is that of a tool, then its arguments as the model writes them, character for character, be they JSON or
not (NaN). What only looks like a call is content, unchanged. White space around calls and thoughts is dropped.
"""

import json
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, Protocol

from common.text.vocabulary import Vocabulary
from common.wire import ProcessorChunk, ToolCallDelta

# White space is bounded here, so that no text makes a search slow.
_MAX_SPACE = 99
_SPACE = rf"\s{{0,{_MAX_SPACE}}}"
_BEGINNING = re.compile(
    rf'\{{{_SPACE}"name"{_SPACE}:{_SPACE}"([\w-]{{1,64}})"{_SPACE},{_SPACE}"(?:arguments|parameters)"{_SPACE}:{_SPACE}(?={{)'
)
_MAX_BEGINNING = 1000  # characters: more than the pattern can match
_MAX_PIECE = 4096  # characters


class TextReader(Protocol):
    """Makes chunks of an answer from its text, in pieces: content, calls of tools, or both."""

    @property
    def has_called(self) -> bool:
        """Whether the text has called tools, and the last of these calls is whole."""

    def push(self, text: str) -> ProcessorChunk:
        """What the next piece of the text makes final."""

    def flush(self) -> ProcessorChunk:
        """What was held back, when the text has ended."""


class PlainTextReader:
    """All of the text is content."""

    has_called = False

    def push(self, text: str) -> ProcessorChunk:
        return ProcessorChunk(content=text)

    def flush(self) -> ProcessorChunk:
        return ProcessorChunk()


class _SpacedTags:
    """Finds the first of some tags in a text that grows, with the white space before it.

    behind: a pattern of what belongs to a tag. The time for a search is linear in the text.
    """

    def __init__(self, tags: Sequence[str], behind: str = "") -> None:
        self._tag = re.compile(f"(?:{'|'.join(map(re.escape, tags))}){behind}")
        self._unfinished = re.compile(rf"(?:{'|'.join(map(_prefixes_of, tags))})\Z")
        self._max_unfinished = max(map(len, tags)) + _MAX_SPACE

    def find(self, text: str) -> tuple[int, int | None]:
        """Where it begins and ends. Without an end: one may begin there, at the latest at the end of the text."""
        if tag := self._tag.search(text):
            return _with_space_before(text, tag.start()), tag.end()
        unfinished = self._unfinished.search(text, max(0, len(text) - self._max_unfinished))
        return _with_space_before(text, unfinished.start() if unfinished else len(text)), None


def _prefixes_of(text: str) -> str:
    """A pattern for the beginnings of a text, and for white space behind the whole of it."""
    return reduce(lambda rest, character: f"{re.escape(character)}(?:{rest})?", reversed(text), _SPACE)


def _with_space_before(text: str, position: int) -> int:
    before = text[max(0, position - _MAX_SPACE) : position]
    return position - len(before) + len(before.rstrip())


class ToolCallReader:
    """Reads calls one after the other, and what is around them.

    names: of the tools there are. openings: what comes before a call's brace. closing: what comes behind a call.
    """

    def __init__(self, names: Iterable[str], openings: Sequence[str], closing: str) -> None:
        self._names = frozenset(names)
        self._openings = _SpacedTags(openings, behind=_SPACE + "(?={)")
        self._closing = closing
        self._held = self._opened_by = ""
        self._call: _Call | None = None
        self._is_behind_call = False
        self._num_calls = 0

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0 and self._call is None

    def push(self, text: str) -> ProcessorChunk:
        chunk = ProcessorChunk()
        for start in range(0, len(text), _MAX_PIECE):  # each call in a piece copies what is around it
            self._held += text[start : start + _MAX_PIECE]
            part = ProcessorChunk()
            while self._read_text(part) if self._call is None else self._read_call(self._call, part):
                pass
            chunk.add(part)
        return chunk

    def flush(self) -> ProcessorChunk:
        chunk = ProcessorChunk()
        if self._call is not None and not self._call.is_begun:
            self._add_content(self._opened_by + self._call.text, chunk)
            self._call = None
        elif not (self._is_behind_call and self._closing.startswith(self._held)):
            self._add_content(self._held, chunk)
        return chunk

    def _read_text(self, chunk: ProcessorChunk) -> bool:
        """Up to the beginning of a call, and whether there is one, or something else to go on with."""
        if self._is_behind_call:
            self._held = self._held.lstrip()
            if self._held.startswith(self._closing):
                self._held = self._held.removeprefix(self._closing)
                return True
            if self._closing.startswith(self._held):
                return False
        start, end = self._openings.find(self._held)
        self._add_content(self._held[:start], chunk)
        if end is not None:
            self._opened_by = self._held[start:end]
            self._call = _Call(self._num_calls, self._names)
        self._held = self._held[start if end is None else end :]
        return end is not None

    def _read_call(self, call: "_Call", chunk: ProcessorChunk) -> bool:
        """Up to the end of the call, and whether there is one."""
        self._held = call.push(self._held, chunk)
        if not call.is_ended:
            return False
        self._call = None
        if call.is_begun:
            self._num_calls += 1
            self._is_behind_call = True
        else:
            self._add_content(self._opened_by + call.text, chunk)
        return True

    def _add_content(self, text: str, chunk: ProcessorChunk) -> None:
        chunk.content += text
        self._is_behind_call = self._is_behind_call and not text


def hermes_reader(names: Iterable[str]) -> ToolCallReader:
    """For what models write that were trained on Hermes' form."""
    return ToolCallReader(names, ["<tool_call>"], "</tool_call>")


def forced_calls_reader(names: Iterable[str]) -> ToolCallReader:
    """For the JSON array of calls that a grammar forces."""
    return ToolCallReader(names, ["[", ","], "]")


class _Call:
    """One call, from its opening brace to the closing one.

    index: its place among the answer's calls. names: of the tools. text: what was pushed until the call began:
    all that there is of one that ends without having begun, which is no call.
    """

    def __init__(self, index: int, names: Set[str]) -> None:
        self._index, self._names = index, names
        self._brackets = _Brackets()
        self._are_arguments_ended = False
        self._pieces: list[str] = []
        self._num_characters = 0
        self.is_begun = self.is_ended = False

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, text: str, chunk: ProcessorChunk) -> str:
        """Adds what the text completes to the chunk, and returns the text behind the call."""
        if self.is_begun:
            return self._push_arguments(text, chunk)
        may_begin = self._num_characters < _MAX_BEGINNING
        self._pieces.append(text)
        self._num_characters += len(text)
        if may_begin and (beginning := _BEGINNING.match(self.text)) and beginning[1] in self._names:
            self._begin(beginning[1], chunk)
            self._brackets = _Brackets(depth=1)
            return self._push_arguments(self.text[beginning.end() :], chunk)
        return self._push_until_end(text, chunk)

    def _begin(self, name: str, chunk: ProcessorChunk) -> None:
        self.is_begun = True
        chunk.tool_calls.append(ToolCallDelta(self._index, name))

    def _push_arguments(self, text: str, chunk: ProcessorChunk) -> str:
        if not self._are_arguments_ended:
            arguments, text, self._are_arguments_ended = self._brackets.cut(text, depth=1)
            if arguments:
                chunk.tool_calls.append(ToolCallDelta(self._index, arguments=arguments))
        if self._are_arguments_ended:
            _, text, self.is_ended = self._brackets.cut(text, depth=0)
        return text

    def _push_until_end(self, text: str, chunk: ProcessorChunk) -> str:
        """An object with its keys in another order, or another object: only its end shows what it is."""
        _, behind, self.is_ended = self._brackets.cut(text, depth=0)
        self._pieces[-1] = text.removesuffix(behind)
        name, arguments = _name_and_arguments(self.text) if self.is_ended else ("", "")
        if name in self._names:
            self._begin(name, chunk)
            chunk.tool_calls.append(ToolCallDelta(self._index, arguments=arguments))
        return behind


def _name_and_arguments(text: str) -> tuple[str, str]:
    """Of a whole call; both "" where it is none, or has a number that JSON does not (NaN). Some models write the
    arguments' JSON as a string, or leave it out.
    """
    try:
        call: Any = json.loads(text)
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if isinstance(arguments, dict) and isinstance(call["name"], str):
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            # Half a surrogate pair has no UTF-8. Python's escape of it is that of JSON.
            return call["name"], written.encode(errors="backslashreplace").decode()
    except (ValueError, AttributeError, KeyError, RecursionError):
        pass
    return "", ""


class _Brackets:
    """The brackets of JSON that comes in pieces. depth: how many are open."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._is_in_string = self._is_escaped = False

    def cut(self, text: str, *, depth: int) -> tuple[str, str, bool]:
        """The text up to where a bracket closes and leaves no more than `depth` open, the rest, and whether one does.

        JSON has no "<" outside of a string: a tag ends all that was left open.
        """
        for position, character in enumerate(text):
            if self._is_in_string:
                self._is_in_string = self._is_escaped or character != '"'
                self._is_escaped = character == "\\" and not self._is_escaped
            elif character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= depth:
                    return text[: position + 1], text[position + 1 :], True
            elif character == "<":
                return text[:position], text[position:], True
        return text, "", False


_OPENING, _CLOSING = "<think>", "</think>"
_CLOSING_TAG = _SpacedTags([_CLOSING])


@dataclass(frozen=True)
class ReasoningForm:
    """How a model marks its thoughts. closing_id: of the token that ends them, if that is one token.

    is_always_open: its answers begin within thoughts, even where the prompt does not.
    """

    vocabulary: Vocabulary
    closing_id: int | None
    is_always_open: bool

    @classmethod
    def of(cls, parser: str, vocabulary: Vocabulary, template: str) -> "ReasoningForm | None":
        """parser: one of the names of --reasoning-parser. None: nothing is told from the answers."""
        closing_id = vocabulary.tokenizer.token_to_id(_CLOSING)
        is_clear = _CLOSING in template and closing_id is not None and closing_id not in vocabulary.special_ids
        if parser == "none" or (parser == "auto" and not is_clear):
            return None
        return cls(vocabulary, closing_id, is_always_open=parser == "deepseek-r1")

    def reader(self, answer: TextReader, prompt: Sequence[int], *, has_grammar: bool) -> "ReasoningReader":
        """For what comes behind a prompt, by its token ids. A grammar leaves no room for thoughts."""
        end: str = self.vocabulary.tokenizer.decode(prompt[-8:], skip_special_tokens=False)
        is_open = self.is_always_open or end.rstrip().endswith(_OPENING)
        return ReasoningReader(answer, is_open=is_open and not has_grammar, closing_id=self.closing_id)


class ReasoningReader:
    """Tells thoughts from the answer, which another reader reads.

    is_open: the text begins within thoughts, as where the prompt ends with "<think>". Otherwise one that does not begin
    with that, behind 99 white-space characters at most, has no thoughts. has_thought: whether there are any.
    """

    def __init__(self, answer: TextReader, *, is_open: bool, closing_id: int | None = None) -> None:
        self._answer, self._closing_id = answer, closing_id
        self._num_tokens, self._is_counted = 0, False
        self._held = ""
        self._place: Literal["beginning", "thoughts", "answer"] = "beginning"
        self._is_before_first_word = False  # of the thoughts, or of the answer behind them
        self.has_thought = is_open

    @property
    def has_called(self) -> bool:
        return self._answer.has_called

    def push(self, text: str) -> ProcessorChunk:
        chunk = ProcessorChunk()
        self._held += text
        if self._place == "beginning":
            self._look_for_opening()
        if self._place == "thoughts":
            chunk.reasoning_content = self._thoughts()
        if self._place == "answer":
            self._drop_space()
            chunk.add(self._answer.push(self._held))
            self._held = ""
        return chunk

    def flush(self) -> ProcessorChunk:
        chunk = ProcessorChunk()
        if self.has_thought:
            chunk.reasoning_content = self._held
        else:
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
        is_near = len(self._held) - len(begun) <= _MAX_SPACE
        if is_near and begun.startswith(_OPENING):
            self._held, self.has_thought = begun.removeprefix(_OPENING), True
        elif is_near and _OPENING.startswith(begun):
            return
        self._place = "thoughts" if self.has_thought else "answer"
        self._is_before_first_word = self.has_thought

    def _thoughts(self) -> str:
        """Up to where they end, or may end."""
        self._drop_space()
        start, end = _CLOSING_TAG.find(self._held)
        thoughts, self._held = self._held[:start], self._held[start if end is None else end :]
        if end is not None:
            self._place, self._is_before_first_word = "answer", True
        return thoughts

    def _drop_space(self) -> None:
        if self._is_before_first_word:
            self._held = self._held.lstrip()
            self._is_before_first_word = not self._held

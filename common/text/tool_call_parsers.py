"""SGLang's readers of tool calls, for models that write them in another form. Loads SGLang, and PyTorch with it."""

from collections.abc import Sequence
from typing import Any

from common.openai.request_parts import Tool
from common.wire import ProcessorChunk, ToolCallDelta

_MAX_PIECES = 32


def check_parser(name: str) -> None:
    """Raises:
    ValueError: SGLang has no parser of this name.
    """
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    names = sorted(FunctionCallParser.ToolCallParserEnum)
    if name not in names:
        raise ValueError(f"there is no tool call parser {name}: SGLang has {', '.join(names)}")


class SGLangToolCallReader:
    """A `TextReader`. Where its parser loses something of a stream, it comes at the end: what the whole text says more.

    is_streamed: pieces are wanted as they come; otherwise the text is read at its end. Many parsers read all of a call
    anew with each piece, so pieces are at least a part of 32 of what was read of the call: the time stays linear.
    """

    def __init__(self, parser: str, tools: Sequence[Tool], *, is_streamed: bool) -> None:
        from sglang.srt.entrypoints.openai import protocol
        from sglang.srt.function_call.function_call_parser import FunctionCallParser

        known = [protocol.Tool(**tool.model_dump(exclude_unset=True)) for tool in tools]
        self._parser, self._whole_parser = FunctionCallParser(known, parser), FunctionCallParser(known, parser)
        self._is_streamed = is_streamed
        self._text = self._content = ""  # all that was pushed, and the content that was sent
        self._held, self._num_read = "", 0  # what the parser has yet to read, and what it has read of this call
        self._arguments: list[str] = []  # of each call, as far as they were sent

    @property
    def has_called(self) -> bool:
        return bool(self._arguments)

    def push(self, text: str) -> ProcessorChunk:
        chunk = ProcessorChunk()
        self._text += text
        self._held += text
        if self._is_streamed and len(self._held) >= self._num_read // _MAX_PIECES:
            self._read_held(chunk)
        return chunk

    def flush(self) -> ProcessorChunk:
        chunk = ProcessorChunk()
        if self._is_streamed and self._held:
            self._read_held(chunk)
        content, items = self._whole_parser.parse_non_stream(self._text)
        if content.startswith(self._content):
            chunk.content += content.removeprefix(self._content)
        num_sent = len(self._arguments)
        for index, item in enumerate(items[:num_sent]):
            if item.parameters.startswith(self._arguments[index]):
                self._add_arguments(index, item.parameters.removeprefix(self._arguments[index]), chunk)
        self._add(items[num_sent:], chunk)
        return chunk

    def _read_held(self, chunk: ProcessorChunk) -> None:
        content, items = self._parser.parse_stream_chunk(self._held)
        if not self._arguments:  # behind a call, some parsers take what is left of it for content
            chunk.content += content
            self._content += content
        is_anew = content or any(item.name for item in items)
        self._num_read = 0 if is_anew else self._num_read + len(self._held)
        self._held = ""
        self._add(items, chunk)

    def _add(self, items: Sequence[Any], chunk: ProcessorChunk) -> None:
        for item in items:
            if item.name:
                chunk.tool_calls.append(ToolCallDelta(len(self._arguments), item.name))
                self._arguments.append("")
            if self._arguments:
                self._add_arguments(len(self._arguments) - 1, item.parameters, chunk)

    def _add_arguments(self, index: int, text: str, chunk: ProcessorChunk) -> None:
        if text:
            # Half a surrogate pair has no UTF-8. Python's escape of it is that of JSON.
            written = text.encode(errors="backslashreplace").decode()
            chunk.tool_calls.append(ToolCallDelta(index, arguments=written))
            self._arguments[index] += text

"""SGLang's readers of tool calls, for models that write them in another form. Loads SGLang, and PyTorch with it."""

from collections.abc import Sequence
from typing import Any

from common.openai.tools import Tool
from common.wire import ProcessorChunk, ToolCallDelta


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

    is_streamed: pieces are wanted as they come; otherwise the text is read at its end.
    """

    def __init__(self, parser: str, tools: Sequence[Tool], *, is_streamed: bool) -> None:
        from sglang.srt.entrypoints.openai import protocol
        from sglang.srt.function_call.function_call_parser import FunctionCallParser

        known = [protocol.Tool(**tool.model_dump(exclude_unset=True)) for tool in tools]
        self._parser, self._whole_parser = FunctionCallParser(known, parser), FunctionCallParser(known, parser)
        self._is_streamed = is_streamed
        self._text = self._content = ""  # all that was pushed, and the content that was sent
        self._arguments: list[str] = []  # of each call, as far as they were sent

    @property
    def has_called(self) -> bool:
        return bool(self._arguments)

    def push(self, text: str) -> ProcessorChunk:
        chunk = ProcessorChunk()
        self._text += text
        if self._is_streamed:
            chunk.content, items = self._parser.parse_stream_chunk(text)
            self._content += chunk.content
            self._add(items, chunk)
        return chunk

    def flush(self) -> ProcessorChunk:
        chunk = ProcessorChunk()
        content, items = self._whole_parser.parse_non_stream(self._text)
        if content.startswith(self._content):
            chunk.content = content.removeprefix(self._content)
        num_sent = len(self._arguments)
        if num_sent and len(items) >= num_sent and items[num_sent - 1].parameters.startswith(self._arguments[-1]):
            self._add_arguments(items[num_sent - 1].parameters.removeprefix(self._arguments[-1]), chunk)
        self._add(items[num_sent:], chunk)
        return chunk

    def _add(self, items: Sequence[Any], chunk: ProcessorChunk) -> None:
        for item in items:
            if item.name:
                chunk.tool_calls.append(ToolCallDelta(len(self._arguments), item.name))
                self._arguments.append("")
            if self._arguments:
                self._add_arguments(item.parameters, chunk)

    def _add_arguments(self, text: str, chunk: ProcessorChunk) -> None:
        if text:
            chunk.tool_calls.append(ToolCallDelta(len(self._arguments) - 1, arguments=text))
            self._arguments[-1] += text

"""The `n` choices of an answer: an engine's chunks in, the processor's chunks out."""

import asyncio
import functools
import math
from collections.abc import AsyncGenerator, Sequence, Set
from contextlib import aclosing
from typing import TypeVar

from common.errors import BadUpstream
from common.openai.request import ChatCompletionRequest
from common.sampling import engine_request
from common.text.chat_tokenizer import ChatTokenizer
from common.text.detokenizer import TokenBytes
from common.text.generated_text import GeneratedText
from common.text.reasoning import ReasoningReader
from common.text.tool_call_parsers import SGLangToolCallReader
from common.text.tool_calls import PlainTextReader, TextReader, forced_calls_reader, hermes_reader
from common.wire import (
    CompletionTokensDetails,
    EngineChunk,
    EngineRequest,
    FinishReason,
    LogprobEntry,
    ProcessorChunk,
    PromptTokensDetails,
    TokenLogprob,
    Usage,
)

T = TypeVar("T")
_QUEUE_LENGTH = 16
# JSON has no -Infinity; OpenAI sends this for a token that could not have been chosen.
_LOWEST = -9999.0


class Choice:
    """Accumulates all tokens and detokenizes them once; for a stream, or to look for stop strings, piece by piece.

    max_tokens: what the engine was asked for, at most. num_tokens: generated so far; after a stop string, up to the
    token that completed it. num_cached_tokens: of the prompt's, if the engine told. is_finished: nothing more will come
    of it, even if the engine has more.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, request: ChatCompletionRequest, prompt: list[int], index: int, max_tokens: int
    ) -> None:
        self._tokenizer, self._request, self._prompt = tokenizer, request, prompt
        self.index, self.max_tokens = index, max_tokens
        self.num_tokens = 0
        self.num_cached_tokens: int | None = None
        self.is_finished = False
        self._is_accumulated = not request.stream and not request.stop_strings
        self._token_ids: list[int] = []
        self._logprobs: list[LogprobEntry] | None = None
        self._hidden_ids = _hidden_ids(tokenizer, request)
        self._text = GeneratedText(tokenizer.backend, stop=request.stop_strings, hidden_ids=self._hidden_ids)
        self._reader = _reader_for(request, tokenizer)
        self._thoughts = _thoughts_before(self._reader, tokenizer, request, prompt)

    def engine_request(self) -> EngineRequest:
        """What an engine is asked for this choice."""
        defaults = self._tokenizer.sampling_defaults
        return engine_request(self._request, self._prompt, self.index, self.max_tokens, defaults)

    def push(self, data: EngineChunk) -> ProcessorChunk | None:
        """What the engine's chunk makes final, if that is anything; the last chunk has the finish_reason.

        Raises:
            BadUpstream: the engine sent more than `max_tokens`.
        """
        if self._thoughts is not None:
            self._thoughts.count(data.token_ids)
        chunk = self._accumulated(data) if self._is_accumulated else self._piece(data)
        if self.num_tokens > self.max_tokens:
            raise BadUpstream("The engine sent more tokens than it was asked for.")
        if data.cached_tokens is not None:
            self.num_cached_tokens = data.cached_tokens
        self.is_finished = chunk.finish_reason is not None
        return chunk if chunk.has_content or self.is_finished else None

    def _accumulated(self, data: EngineChunk) -> ProcessorChunk:
        self._token_ids += data.token_ids
        self.num_tokens = len(self._token_ids)
        entries = self._logprob_entries(data, len(data.token_ids))
        self._logprobs = self._logprobs if entries is None else (self._logprobs or []) + entries
        if data.finish_reason is None:
            return ProcessorChunk()
        return self._read(self._text.push(self._token_ids), self._logprobs, data.finish_reason)

    def _piece(self, data: EngineChunk) -> ProcessorChunk:
        content = self._text.push(data.token_ids)
        logprobs = self._logprob_entries(data, self._text.num_tokens - self.num_tokens)
        self.num_tokens = self._text.num_tokens
        if self._text.stopped is None and data.finish_reason is not None:
            content += self._text.finish()
        finish_reason = data.finish_reason if self._text.stopped is None else "stop"
        return self._read(content, logprobs, finish_reason)

    def _read(
        self, text: str, logprobs: list[LogprobEntry] | None, finish_reason: FinishReason | None
    ) -> ProcessorChunk:
        """What comes next of the text: thoughts, content, calls of tools."""
        reader = self._thoughts or self._reader
        chunk = reader.push(text)
        if finish_reason is not None:
            chunk.add(reader.flush())
        chunk.index, chunk.logprobs = self.index, logprobs
        has_called = finish_reason == "stop" and self._reader.has_called
        chunk.finish_reason = "tool_calls" if has_called else finish_reason
        return chunk

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Of those generated; None where the model has no thoughts, or none to be counted."""
        num_tokens = None if self._thoughts is None else self._thoughts.num_tokens
        return None if num_tokens is None else min(num_tokens, self.num_tokens)

    def _logprob_entries(self, data: EngineChunk, num_tokens: int) -> list[LogprobEntry] | None:
        if self._request.num_top_logprobs is None:
            return None
        token_bytes = self._tokenizer.token_bytes
        return logprob_entries(data, num_tokens, self._request.num_top_logprobs, token_bytes, self._hidden_ids)


def usage_of(num_prompt_tokens: int, choices: Sequence[Choice]) -> Usage:
    """So far. Cached are those of the prompt that each choice's engine found in its cache: the fewest."""
    num_tokens = sum(choice.num_tokens for choice in choices)
    usage = Usage(num_prompt_tokens, num_tokens, num_prompt_tokens + num_tokens)
    reasoning = [choice.num_reasoning_tokens for choice in choices if choice.num_reasoning_tokens is not None]
    if reasoning:
        usage.completion_tokens_details = CompletionTokensDetails(sum(reasoning))
    cached = [choice.num_cached_tokens for choice in choices if choice.num_cached_tokens is not None]
    if cached:  # one that went on elsewhere has its own first tokens in its prompt, too
        usage.prompt_tokens_details = PromptTokensDetails(min(num_prompt_tokens, *cached))
    return usage


def _hidden_ids(tokenizer: ChatTokenizer, request: ChatCompletionRequest) -> Set[int]:
    """The tokens that the text leaves out: special ones, but for the markup of calls, and those that end it."""
    hidden_ids: Set[int] = tokenizer.hidden_ids
    if request.usable_tools and tokenizer.shown_ids:
        hidden_ids -= tokenizer.shown_ids
    if request.stop_token_ids and not request.is_eos_ignored:
        hidden_ids |= frozenset(request.stop_token_ids)
    return hidden_ids


def _reader_for(request: ChatCompletionRequest, tokenizer: ChatTokenizer) -> TextReader:
    tools = request.usable_tools
    if not tools:
        return PlainTextReader()
    names = [tool.name for tool in tools]
    if request.max_forced_calls:
        return forced_calls_reader(names)
    if tokenizer.parsing.has_foreign_calls:
        return SGLangToolCallReader(str(tokenizer.parsing.tool_calls), tools, is_streamed=request.stream)
    return hermes_reader(names)


def _thoughts_before(
    answer: TextReader, tokenizer: ChatTokenizer, request: ChatCompletionRequest, prompt: list[int]
) -> ReasoningReader | None:
    if tokenizer.reasoning is None:
        return None
    is_open = request.answer_schema is None and tokenizer.reasoning.is_open(prompt)  # a grammar leaves no room for any
    return ReasoningReader(answer, is_open=is_open, closing_id=tokenizer.reasoning.closing_id)


def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all streams as they come. The first stream that fails ends all of them with its error."""
    return streams[0] if len(streams) == 1 else _merged(streams)


async def _merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    queue: asyncio.Queue[T | BaseException | None] = asyncio.Queue(_QUEUE_LENGTH)

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream) as source:
                async for item in source:
                    await queue.put(item)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            received = await queue.get()
            if isinstance(received, BaseException):
                raise received
            if received is None:
                num_open -= 1
            else:
                yield received
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _entry(token_bytes: TokenBytes, hidden_ids: Set[int], token_id: int, logprob: float) -> TokenLogprob:
    raw = token_bytes.bytes_of(token_id)
    return {
        "token": raw.decode("utf-8", errors="replace"),
        "logprob": max(logprob, _LOWEST) if math.isfinite(logprob) else _LOWEST,
        "bytes": None if token_id in hidden_ids else list(raw),
    }


def logprob_entries(
    chunk: EngineChunk, num_tokens: int, num_top_logprobs: int, token_bytes: TokenBytes, hidden_ids: Set[int]
) -> list[LogprobEntry] | None:
    """OpenAI's entries for the chunk's first `num_tokens` tokens; None where the engine sent no logprobs.

    The bytes of all entries, joined, are the bytes of the text: a token that the text leaves out, such as the one that
    ends the sequence, has null for its bytes.

    hidden_ids: the tokens that the text leaves out.
    """
    if chunk.log_probs is None:
        return None
    best = chunk.top_logprobs or [[]] * len(chunk.token_ids)
    entry = functools.partial(_entry, token_bytes, hidden_ids)
    return [
        {
            **entry(token_id, logprob),
            "top_logprobs": [entry(*alternative) for alternative in alternatives[:num_top_logprobs]],
        }
        for token_id, logprob, alternatives in zip(chunk.token_ids[:num_tokens], chunk.log_probs, best, strict=False)
    ]

"""The `n` choices of an answer: an engine's chunks in, the processor's chunks out."""

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence, Set
from contextlib import aclosing
from typing import TypeVar

from common.errors import BadUpstream
from common.openai.request import ChatCompletionRequest
from common.sampling import engine_request
from common.text.chat_tokenizer import ChatTokenizer
from common.text.generated_text import GeneratedText
from common.text.readers import PlainTextReader, TextReader, forced_calls_reader, hermes_reader
from common.text.tool_call_parsers import SGLangToolCallReader
from common.text.vocabulary import Vocabulary
from common.wire import (
    CompletionTokensDetails,
    EngineChunk,
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
    """One of the answers. A stream gets it piece by piece, any other caller as one chunk, when it is finished.

    max_tokens: what the engine was asked for, at most. num_tokens: generated so far; after a stop string, up to the
    token that completed it. num_cached_tokens: of the prompt's, if the engine told. is_finished: nothing more will come
    of it, even if the engine has more.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, request: ChatCompletionRequest, prompt: list[int], index: int, max_tokens: int
    ) -> None:
        self._vocabulary, self._request = tokenizer.vocabulary, request
        self.engine_request = engine_request(request, prompt, index, max_tokens, tokenizer.sampling_defaults)
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.num_cached_tokens: int | None = None
        self.is_finished = False
        self._hidden_ids = _hidden_ids(tokenizer, request)
        self._text = GeneratedText(tokenizer.vocabulary, self._hidden_ids, request.stop_strings)
        self._reader = _reader_for(request, tokenizer)
        self._thoughts = None
        if tokenizer.reasoning is not None:
            has_grammar = request.answer_schema is not None
            self._thoughts = tokenizer.reasoning.reader(self._reader, prompt, has_grammar=has_grammar)
        self._collected = ProcessorChunk(index)

    def push(self, data: EngineChunk) -> ProcessorChunk | None:
        """What there is to send now, if that is anything; the last chunk has the finish_reason.

        Raises:
            BadUpstream: the engine sent more than `max_tokens`.
        """
        if self._thoughts is not None:
            self._thoughts.count(data.token_ids)
        chunk = self._read(data)
        if self.num_tokens > self.max_tokens:
            raise BadUpstream("The engine sent more tokens than it was asked for.")
        if data.cached_tokens is not None:
            self.num_cached_tokens = data.cached_tokens
        self.is_finished = chunk.finish_reason is not None
        if self._request.stream:
            return chunk if chunk.has_content or self.is_finished else None
        self._collected.add(chunk)
        return self._collected if self.is_finished else None

    def _read(self, data: EngineChunk) -> ProcessorChunk:
        """What comes next of the text: thoughts, content, calls of tools."""
        text = self._text.push(data.token_ids)
        num_new, self.num_tokens = self._text.num_tokens - self.num_tokens, self._text.num_tokens
        finish_reason = data.finish_reason if self._text.stopped is None else "stop"
        reader = self._thoughts or self._reader
        chunk = reader.push(text)
        if finish_reason is not None:
            chunk.add(reader.push(self._text.finish()))
            chunk.add(reader.flush())
        chunk.index = self._collected.index
        if (num_top := self._request.num_top_logprobs) is not None:
            chunk.logprobs = logprob_entries(data, num_new, num_top, self._vocabulary, self._hidden_ids)
        has_called = finish_reason == "stop" and self._reader.has_called
        chunk.finish_reason = "tool_calls" if has_called else finish_reason
        return chunk

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Of those generated; None where the model has no thoughts, or none to be counted."""
        num_tokens = None if self._thoughts is None else self._thoughts.num_tokens
        return None if num_tokens is None else min(num_tokens, self.num_tokens)


def usage_of(num_prompt_tokens: int, choices: Sequence[Choice]) -> Usage:
    """So far. Cached are those of the prompt that each choice's engine found in its cache: the fewest."""
    num_tokens = sum(choice.num_tokens for choice in choices)
    usage = Usage(num_prompt_tokens, num_tokens, num_prompt_tokens + num_tokens)
    if reasoning := [num for choice in choices if (num := choice.num_reasoning_tokens) is not None]:
        usage.completion_tokens_details = CompletionTokensDetails(sum(reasoning))
    if cached := [num for choice in choices if (num := choice.num_cached_tokens) is not None]:
        # one that went on elsewhere has its own first tokens in its prompt, too
        usage.prompt_tokens_details = PromptTokensDetails(min(num_prompt_tokens, *cached))
    return usage


def _hidden_ids(tokenizer: ChatTokenizer, request: ChatCompletionRequest) -> Set[int]:
    """The tokens that the text leaves out: special ones, but for the markup of calls, and those that end it."""
    hidden_ids: Set[int] = tokenizer.vocabulary.special_ids
    if request.usable_tools and tokenizer.parsing.has_foreign_calls:
        hidden_ids -= tokenizer.markup_ids
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


def logprob_entries(
    chunk: EngineChunk, num_tokens: int, num_top_logprobs: int, vocabulary: Vocabulary, hidden_ids: Set[int]
) -> list[LogprobEntry] | None:
    """OpenAI's entries for the chunk's first `num_tokens` tokens; None where the engine sent no logprobs.

    The bytes of all entries, joined, are the bytes of the text: a token that the text leaves out, such as the one that
    ends the sequence, has null for its bytes.

    hidden_ids: the tokens that the text leaves out.
    """
    if chunk.log_probs is None:
        return None

    def entry(token_id: int, logprob: float) -> TokenLogprob:
        raw = vocabulary.bytes_of(token_id)
        return {
            "token": raw.decode("utf-8", errors="replace"),
            "logprob": max(logprob, _LOWEST) if math.isfinite(logprob) else _LOWEST,
            "bytes": None if token_id in hidden_ids else list(raw),
        }

    best = chunk.top_logprobs or [[]] * len(chunk.token_ids)
    return [
        {
            **entry(token_id, logprob),
            "top_logprobs": [entry(*alternative) for alternative in alternatives[:num_top_logprobs]],
        }
        for token_id, logprob, alternatives in zip(chunk.token_ids[:num_tokens], chunk.log_probs, best, strict=False)
    ]

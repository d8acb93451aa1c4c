"""The `n` choices of an answer: an engine's chunks in, the processor's chunks out."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from common.errors import BadUpstream
from common.openai.request import ChatCompletionRequest
from common.text.chat_tokenizer import ChatTokenizer
from common.text.detokenizer import detokenize
from common.text.generated_text import GeneratedText
from common.text.logprobs import logprob_entries
from common.wire import EngineChunk, LogprobEntry, ProcessorChunk

T = TypeVar("T")
_QUEUE_LENGTH = 16


class Choice:
    """Accumulates all tokens and detokenizes them once; for a stream, or to look for stop strings, piece by piece.

    max_tokens: what the engine was asked for, at most. num_tokens: generated so far; after a stop string, up to the
    token that completed it. is_finished: nothing more will come of it, even if the engine has more.
    """

    def __init__(self, tokenizer: ChatTokenizer, request: ChatCompletionRequest, index: int, max_tokens: int) -> None:
        self._tokenizer, self._num_top_logprobs = tokenizer, request.num_top_logprobs
        self.index, self.max_tokens = index, max_tokens
        self.num_tokens = 0
        self.is_finished = False
        self._is_accumulated = not request.stream and not request.stop_strings
        self._token_ids: list[int] = []
        self._logprobs: list[LogprobEntry] | None = None
        self._text = GeneratedText(tokenizer.backend, stop=request.stop_strings)

    def push(self, data: EngineChunk) -> ProcessorChunk | None:
        """What the engine's chunk makes final, if that is anything; the last chunk has the finish_reason.

        Raises:
            BadUpstream: the engine sent more than `max_tokens`.
        """
        chunk = self._accumulated(data) if self._is_accumulated else self._piece(data)
        if self.num_tokens > self.max_tokens:
            raise BadUpstream("The engine sent more tokens than it was asked for.")
        self.is_finished = chunk.finish_reason is not None
        return chunk if chunk.content or chunk.logprobs or self.is_finished else None

    def _accumulated(self, data: EngineChunk) -> ProcessorChunk:
        self._token_ids += data.token_ids
        self.num_tokens = len(self._token_ids)
        entries = self._logprob_entries(data, len(data.token_ids))
        self._logprobs = self._logprobs if entries is None else (self._logprobs or []) + entries
        if data.finish_reason is None:
            return ProcessorChunk()
        content = detokenize(self._tokenizer.backend, self._token_ids)
        return ProcessorChunk(self.index, content, data.finish_reason, self._logprobs)

    def _piece(self, data: EngineChunk) -> ProcessorChunk:
        content = self._text.push(data.token_ids)
        logprobs = self._logprob_entries(data, self._text.num_tokens - self.num_tokens)
        self.num_tokens = self._text.num_tokens
        if self._text.stopped is None and data.finish_reason is not None:
            content += self._text.finish()
        finish_reason = data.finish_reason if self._text.stopped is None else "stop"
        return ProcessorChunk(self.index, content, finish_reason, logprobs)

    def _logprob_entries(self, data: EngineChunk, num_tokens: int) -> list[LogprobEntry] | None:
        if self._num_top_logprobs is None:
            return None
        token_bytes, hidden_ids = self._tokenizer.token_bytes, self._tokenizer.hidden_ids
        return logprob_entries(data, num_tokens, self._num_top_logprobs, token_bytes, hidden_ids)


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all streams as they come. The first stream that fails ends all of them with its error."""
    if len(streams) == 1:  # the usual case needs no tasks
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
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

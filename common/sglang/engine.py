"""`sglang.Engine` as the engine script uses it: start, describe, generate, abort, shut down."""

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from common.dynamo.service import RequestContext, when_stopped
from common.errors import Aborted, Busy, InvalidRequest, PipelineError
from common.openai.json_schema import GRAMMAR_FAILED
from common.sampling import sglang_sampling_params
from common.sglang.engine_args import keep_ports_local, parse_engine_args
from common.sglang.pacing import Output, StreamPace
from common.text.vocabulary import tokenizer_sha256
from common.wire import SCHEMA_PARAM, EngineChunk, EngineDescription, EngineRequest

if TYPE_CHECKING:
    from common.sglang.cache_events import CacheEvents

# How SGLang begins to say that it has no grammar for a schema.
_GRAMMAR_ERRORS = ("Failed to compile json grammar", "Grammar preprocessing timed out", GRAMMAR_FAILED)


class SGLangEngine:
    """The engine that a command line describes (see `parse_engine_args`), running.

    As a context manager it shuts SGLang's processes down at the end.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        server_args = parse_engine_args(argv)
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.managers.tokenizer_manager import SignalHandler

        from common.sglang.grammars import can_constrain
        from common.sglang.sampler import supports_seed

        # SGLang takes SIGTERM for itself with its first request. SIGINT means the same here, and is still the worker's.
        SignalHandler.sigterm_handler = lambda *_: os.kill(os.getpid(), signal.SIGINT)
        keep_ports_local(server_args)
        self._engine = Engine(server_args=server_args)
        self._tokenizer_manager = self._engine.tokenizer_manager
        self._pace = StreamPace()
        self.cache_events = cache_events_of(server_args.kv_events_config)
        self._max_cached_tokens: int = self._engine._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"]
        model_config = self._tokenizer_manager.model_config
        # A prompt must pass the checks of SGLang's scheduler and of its tokenizer manager.
        room = model_config.context_len - self._tokenizer_manager.num_reserved_tokens
        tokenizer_id = tokenizer_sha256(server_args.tokenizer_path or server_args.model_path, server_args.revision)
        self.description = EngineDescription(
            model=server_args.model_path,
            context_length=model_config.context_len,
            vocab_size=model_config.vocab_size,
            is_seed_supported=supports_seed(server_args),
            tokenizer_sha256=tokenizer_id,
            max_input_tokens=min(self._tokenizer_manager.max_req_input_len, room) - 1,
            can_constrain=bool(tokenizer_id) and can_constrain(server_args),
        )

    def __enter__(self) -> "SGLangEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.shutdown()

    async def describe(self) -> EngineDescription:
        """With what is cached now, where that is followed."""
        if self.cache_events is not None:
            self.description.cache = self.cache_events.cached.describe(self._max_cached_tokens)
        return self.description

    async def generate(self, request: EngineRequest, context: RequestContext) -> AsyncGenerator[Output, None]:
        """SGLang's items for one request; only the last one where nobody streams. Leaving early aborts the request.

        They just end when `context` is stopped.

        Raises:
            InvalidRequest: SGLang does not take these parameters, or so many tokens. Busy: its queue is full.
            Aborted: SGLang aborted the request.
        """
        if request.sampling_options.seed is not None and not self.description.is_seed_supported:
            raise InvalidRequest("This engine does not support seeds.", param="seed")
        if request.sampling_options.json_schema is not None and not self.description.can_constrain:
            raise InvalidRequest("This engine does not support grammars.", param=SCHEMA_PARAM)
        rid = uuid.uuid4().hex  # unique, and never the prefix of another one
        loop, is_complete = asyncio.get_running_loop(), False

        def abort() -> None:
            self._tokenizer_manager.abort_request(rid=rid)

        try:
            with when_stopped(context, abort):
                async for output in self._outputs(request, rid):
                    meta_info = output["meta_info"]
                    if finish_reason := meta_info["finish_reason"]:
                        if finish_reason["type"] == "abort":
                            raise _error_of(finish_reason.get("status_code"), finish_reason["message"])
                        if (queue_time_s := meta_info.get("queue_time")) is not None:
                            context.record.waited(queue_time_s)
                    yield output
            is_complete = True
        except ValueError as error:
            raise _error_of(HTTPStatus.BAD_REQUEST, str(error)) from error
        except HTTPException as error:  # an abort with a status code, where nobody streams
            raise _error_of(error.status_code, error.detail) from error
        except Aborted:
            if context.is_stopped():  # it was us
                return
            raise
        finally:
            if not is_complete:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(abort)  # Dynamo may drop a stream in a thread of its own

    async def _outputs(self, request: EngineRequest, rid: str) -> AsyncGenerator[Output, None]:
        options = request.output_options
        sampling_params = sglang_sampling_params(request)
        if options.stream:
            sampling_params["stream_interval"] = self._pace.tokens_per_item()
        response = await self._engine.async_generate(
            input_ids=request.token_ids,
            sampling_params=sampling_params,
            rid=rid,
            stream=options.stream,
            return_logprob=options.logprobs is not None,
            top_logprobs_num=options.logprobs or 0,
        )
        if options.stream:
            async for output in self._pace.paced(response):
                yield output
        else:
            yield response


def cache_events_of(kv_events_config: str | None) -> "CacheEvents | None":
    """None where SGLang tells nobody, or somebody else: they need more of Dynamo than its oldest releases have."""
    endpoint: str = json.loads(kv_events_config or "{}").get("endpoint", "")
    if not endpoint.startswith("ipc://"):
        return None
    from common.sglang.cache_events import CacheEvents

    return CacheEvents(endpoint)


def new_tokens(output: Output, num_output_tokens_so_far: int) -> EngineChunk:
    """What SGLang's item adds: it repeats all tokens of the answer each time, the new ones last."""
    meta_info = output["meta_info"]
    finish_reason = meta_info["finish_reason"]
    chunk = EngineChunk(
        token_ids=output["output_ids"][num_output_tokens_so_far:],
        finish_reason=finish_reason["type"] if finish_reason else None,
    )
    if finish_reason:
        chunk.cached_tokens = meta_info.get("cached_tokens")
    if (logprobs := meta_info.get("output_token_logprobs")) is not None:
        chunk.log_probs = [logprob for logprob, _, _ in logprobs[num_output_tokens_so_far:]]
    if top_logprobs := meta_info.get("output_top_logprobs"):
        chunk.top_logprobs = [
            [(token_id, logprob) for logprob, token_id, _ in best or ()]
            for best in top_logprobs[num_output_tokens_so_far:]
        ]
    return chunk


def _error_of(status: int | None, message: str) -> PipelineError:
    """Whose fault an abort is: SGLang says it with one of HTTP's status codes."""
    message = message.rstrip(".")
    if message.startswith(_GRAMMAR_ERRORS):
        return InvalidRequest(f"The engine has no grammar for this schema: {message}.", param=SCHEMA_PARAM)
    if status == HTTPStatus.BAD_REQUEST:
        return InvalidRequest(f"The engine does not take this request: {message}.")
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return Busy(f"The engine's queue is full: {message}.")
    return Aborted(f"The engine aborted the request: {message}.")

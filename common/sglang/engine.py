"""`sglang.Engine` as the engine script uses it: start, describe, generate, abort, shut down."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from common.errors import Aborted, InvalidRequest
from common.sglang.engine_args import keep_ports_local
from common.sglang.output import Output
from common.sglang.stream_pace import StreamPace
from common.text.tokenizer_identity import tokenizer_sha256
from common.wire import EngineDescription, OutputOptions

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


class SGLangEngine:
    """A running engine. As a context manager it shuts SGLang's processes down at the end."""

    def __init__(self, server_args: "ServerArgs") -> None:
        from sglang.srt.entrypoints.engine import Engine

        from common.sglang.request_seeds import supports_seed

        keep_ports_local(server_args)
        self._engine = Engine(server_args=server_args)
        self._tokenizer_manager = self._engine.tokenizer_manager
        self._pace = StreamPace()
        model_config = self._tokenizer_manager.model_config
        self.description = EngineDescription(
            model=server_args.model_path,
            context_length=model_config.context_len,
            vocab_size=model_config.vocab_size,
            is_seed_supported=supports_seed(server_args),
            tokenizer_sha256=tokenizer_sha256(
                server_args.tokenizer_path or server_args.model_path, server_args.revision
            ),
        )

    def __enter__(self) -> "SGLangEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.shutdown()

    def leave_signals_to(self, request_stop: Callable[[], None]) -> None:
        """SGLang takes SIGTERM for itself with its first request; hand it on to where it was."""
        from sglang.srt.managers.tokenizer_manager import SignalHandler

        class HandedOn(SignalHandler):  # type: ignore[misc]
            def sigterm_handler(self, signum: Any = None, frame: Any = None) -> None:
                request_stop()

        self._tokenizer_manager.signal_handler_class = HandedOn

    async def generate(
        self,
        token_ids: list[int],
        sampling_params: dict[str, Any],
        *,
        rid: str,
        output_options: OutputOptions,
    ) -> AsyncGenerator[Output, None]:
        """SGLang's items for one request; one item for everything where nobody streams. Leaving early aborts it.

        Raises:
            InvalidRequest: SGLang does not take these parameters.
            Aborted: the request was aborted, by us or because SGLang is going down.
        """
        if output_options.stream:
            sampling_params["stream_interval"] = self._pace.tokens_per_item()
        call = {
            "input_ids": token_ids,
            "sampling_params": sampling_params,
            "rid": rid,
            "stream": output_options.stream,
            "return_logprob": output_options.logprobs is not None,
            "top_logprobs_num": output_options.logprobs or 0,
        }
        loop, is_complete = asyncio.get_running_loop(), False
        try:
            response = await self._engine.async_generate(**call)
            if not output_options.stream:
                is_complete = True
                yield _checked(response)
                return
            async for output in self._pace.paced(response):
                yield _checked(output)
            is_complete = True
        except ValueError as error:
            raise InvalidRequest(f"The engine does not take this request: {error}.") from error
        finally:
            if not is_complete:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self.abort, rid)  # Dynamo may drop a stream in a thread of its own

    def abort(self, rid: str) -> None:
        self._tokenizer_manager.abort_request(rid=rid)


def _checked(output: Output) -> Output:
    finish_reason = output["meta_info"]["finish_reason"]
    if finish_reason and finish_reason["type"] == "abort":
        raise Aborted("The engine aborted the request.")
    return output

"""Run a script and note when a request passes certain points of it.

`python -m bench.hop_times FILE SCRIPT [ARGUMENTS]`, or `... FILE -m MODULE [ARGUMENTS]`. One request at a time, so
no note needs to say whose it is: FILE gets lines of `time point` (seconds of `time.perf_counter`, which all
processes of a machine share) when the script ends.
"""

import atexit
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_notes: list[tuple[float, str]] = []


def _noting(holder: Any, name: str, *, before: str = "", after: str = "") -> None:
    """Replace `holder.name` by one that notes when it is called, and when it returns."""
    original: Callable[..., Any] = getattr(holder, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        if before:
            _notes.append((time.perf_counter(), before))
        result = original(*args, **kwargs)
        if after:
            _notes.append((time.perf_counter(), after))
        return result

    async def noted_coroutine(*args: Any, **kwargs: Any) -> Any:
        if before:
            _notes.append((time.perf_counter(), before))
        result = await original(*args, **kwargs)
        if after:
            _notes.append((time.perf_counter(), after))
        return result

    is_coroutine = getattr(original, "__code__", None) is not None and original.__code__.co_flags & 0x80
    setattr(holder, name, noted_coroutine if is_coroutine else noted)


def _watch(script: str) -> None:
    from common.dynamo import runtime
    from common.http import exchange, middleware
    from common.observability import request_records
    from common.openai import responses
    from common.sglang import engine
    from common.text import chat_tokenizer, choice, generated_text

    if script == "frontend":
        _noting(middleware.RequestId, "__call__", before="frontend has the headers")
        _noting(exchange, "parse_chat_request", after="frontend has checked the request")
        _noting(runtime.Client, "direct", before="frontend calls a processor")
        _noting(responses.AnswerStream, "check", before="frontend has text")
        _noting(responses.AnswerStream, "events", after="frontend has an event")
    elif script == "processor":
        _noting(request_records.RequestRecord, "asks", before="processor has the request")
        _noting(chat_tokenizer.ChatTokenizer, "encode_chat", after="processor has token ids")
        _noting(runtime.Client, "direct", before="processor calls an engine")
        _noting(choice.Choice, "push", before="processor has a token")
        _noting(generated_text.GeneratedText, "push", after="processor has text")
    else:
        _noting(request_records.RequestRecord, "asks", before="engine has the request")
        _noting(engine, "sglang_sampling_params", after="engine calls SGLang")
        _noting(request_records.RequestRecord, "answers", before="engine has a token")


def _write(path: Path) -> None:
    path.write_text("".join(f"{at!r} {point}\n" for at, point in _notes))


if __name__ == "__main__":
    path, *command = sys.argv[1:]
    script = next(Path(word).stem for word in command if word.endswith(".py"))
    _watch(script)
    atexit.register(_write, Path(path))  # after the runtime's own, so that it runs before
    sys.argv = command
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")

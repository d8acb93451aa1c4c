"""Reading a JSON request body, with a limit on its size and on its time."""

import asyncio
from typing import Any

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect

from common.errors import InvalidRequest, RequestTimeout, RequestTooLarge, UnsupportedMediaType


async def read_json(request: Request, *, max_bytes: int, timeout_s: float) -> Any:
    """The parsed body.

    Raises:
        UnsupportedMediaType, RequestTooLarge, RequestTimeout, InvalidRequest: what is wrong with it.
    """
    media_type = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType("The body must be JSON: send the header Content-Type: application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    raise RequestTooLarge(f"The body is larger than the limit of {max_bytes} bytes.")
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {timeout_s:.0f} seconds.") from None
    except ClientDisconnect:
        raise RequestTimeout("The client went away while it sent the body.") from None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None

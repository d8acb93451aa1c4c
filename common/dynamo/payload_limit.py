"""Telling a request that NATS does not carry from an instance that does not answer: asking elsewhere will not help."""

from typing import Any

from common.dynamo import releases
from common.dynamo.server_access import nats_max_payload
from common.errors import RequestTooLarge

# Dynamo's own words around a request count for NATS, not for its client: it sends what NATS then refuses.
_HEADERS_BYTES = 1024


async def too_large_for_nats(request: dict[str, Any], error: Exception) -> RequestTooLarge | None:
    """What to tell the client where `error`, of a call, came of the size of the request; else None."""
    if not releases.is_too_large(error) and not releases.is_unanswered(error):
        return None
    size, limit = releases.size_on_nats(request), await nats_max_payload()
    is_above_limit = limit is not None and size > limit - _HEADERS_BYTES
    if not releases.is_too_large(error) and not is_above_limit:
        return None
    return RequestTooLarge(f"The request takes {size} bytes on NATS, which carries {limit or 'less'} (max_payload).")

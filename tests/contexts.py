"""What a handler gets beside a request, without a caller and without Dynamo's runtime."""

from common.dynamo.runtime import Context
from common.dynamo.service import RequestContext
from common.observability.metrics import Metrics
from common.observability.request_records import RequestRecords
from common.wire import Envelope


def request_context(component: str = "processor", *, show_path: bool = False) -> RequestContext:
    """Its record counts in metrics of its own."""
    return RequestContext(Context(), RequestRecords(Metrics(component)).begin(Envelope("req-1", show_path=show_path)))

"""A collector of OTLP spans for tests: what an OpenTelemetry collector answers, and keeps what it was sent."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


class Collector(grpc.GenericRpcHandler):
    """spans: (service name, span) in the order of arrival. Logs, which Dynamo exports as well, are dropped."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.port = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        keep = self._keep if handler_call_details.method == EXPORT else self._drop
        return grpc.unary_unary_rpc_method_handler(keep)

    def _keep(self, body: bytes, _: grpc.ServicerContext) -> bytes:
        for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = attributes(resource_spans.resource)["service.name"]
            self.spans += [(service, span) for scope in resource_spans.scope_spans for span in scope.spans]
        return b""

    def _drop(self, body: bytes, _: grpc.ServicerContext) -> bytes:
        return b""

    def of_trace(self, trace_id: str) -> list[tuple[str, Span]]:
        return [(service, span) for service, span in self.spans if span.trace_id.hex() == trace_id]


def attributes(of: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in of.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of loopback."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[collector])
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        server.stop(grace=None).wait(5)

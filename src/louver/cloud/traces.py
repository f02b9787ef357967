"""A span of OpenTelemetry for each request for scores, if somebody asks for them.

A span is made when its request has ended, out of what the log line holds too, less the client: no feature, no score, no
token, no id of a request, no name and no address of a client. Where spans go is said by the environment variables of
OpenTelemetry (`OTEL_EXPORTER_OTLP_ENDPOINT` and others).
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from louver.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from louver.cloud.service import Request

__all__ = ["Traces", "traces_from_environment"]

_MOST_PARENT_BYTES = 128
"""A traceparent has 55 signs; later versions of it may add some."""


class Traces:
    """Makes spans with a provider, which is closed with it."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("louver")
        self._kind = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)
        self._extract = TraceContextTextMapPropagator().extract

    def add(self, request: Request, seconds: float) -> None:
        """The span of a request that has ended just now, as a part of its client's trace if it named one."""
        now = time.time_ns()
        # The rest of what W3C has (tracestate, baggage) may hold anything that a client likes, and is not taken.
        parent = (request.traceparent or b"")[:_MOST_PARENT_BYTES].decode("latin-1")
        span = self._tracer.start_span(
            "infer",
            context=self._extract({"traceparent": parent} if parent else {}),
            kind=self._kind,
            start_time=now - int(1e9 * seconds),
        )
        if not span.is_recording():
            return
        span.set_attributes(
            {"louver.protocol": request.protocol, "louver.status": request.status, "louver.rows": request.rows}
        )
        if request.served is not None:
            model = request.served.model
            span.set_attributes({"louver.model": model.name, "louver.version": model.version})
        if request.compute_s is not None:
            span.set_attributes({"louver.queue_s": request.queue_s, "louver.compute_s": request.compute_s})
        if request.status >= 500:
            span.set_status(self._failed)
        span.end(now)

    def close(self) -> None:
        """Sends what is left, for as long as the exporter may take."""
        self._provider.shutdown()


def traces_from_environment() -> Traces:
    """Traces that go where OpenTelemetry's environment variables say, over OTLP and HTTP by default.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
        ConfigError: the environment asks for another exporter.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"--traces needs {error.name}: pip install 'louver[traces]'") from error
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() or "otlp"
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if exporter != "otlp" or protocol not in (None, "", "http/protobuf"):
        raise ConfigError(
            f"expected OTEL_TRACES_EXPORTER otlp over http/protobuf, got {exporter} over {protocol or 'that'}; "
            "a collector of OpenTelemetry passes traces on in other forms"
        )
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # the environment gives no name
        resource = resource.merge(Resource({SERVICE_NAME: "louver"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)

"""Spans of OpenTelemetry: one for each request, a part of its client's trace, with nothing in it that is secret."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import numpy as np
import pytest

from bundles import toy_bundle
from louver.cloud import Batching, Repository, Settings, create_app, rpc
from louver.cloud import inference_pb2 as messages
from louver.cloud.tokens import add_client
from louver.cloud.traces import Traces, traces_from_environment
from louver.errors import ConfigError, MissingExtraError
from servers import PATIENCE_S, ask, asking, features, infer_path, message_of, running

pytestmark = pytest.mark.timeout(120)
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


class Place:
    """An application with tokens whose spans stay in memory."""

    def __init__(self, tmp_path, **options) -> None:
        sdk = pytest.importorskip("opentelemetry.sdk.trace")
        export = pytest.importorskip("opentelemetry.sdk.trace.export")
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        self.exporter = memory.InMemorySpanExporter()
        provider = sdk.TracerProvider(**options)
        provider.add_span_processor(export.SimpleSpanProcessor(self.exporter))
        self.bundle = toy_bundle(tmp_path / "toy")
        self.token = add_client(tmp_path / "tokens.json", "camera-1")
        self.repository = Repository([tmp_path / "toy"], batching=Batching(workers=1, threads=1))
        settings = Settings(tokens=tmp_path / "tokens.json")
        self.app = create_app(self.repository, settings, traces=Traces(provider))
        self.app.service.lines.write = lambda line: None

    def spans(self, work) -> list:
        """What `work` leaves; a span is made in the turn of the loop after its answer."""

        async def main() -> None:
            await work
            await asyncio.sleep(0.01)

        asyncio.run(main())
        return list(self.exporter.get_finished_spans())

    def ask(self, body: bytes, headers: dict[str, str], **options) -> object:
        return ask(self.app, infer_path(self.bundle), body, headers, token=self.token, **options)


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    made.repository.close()
    made.app.service.close()


def is_right(span, place: Place, *, protocol: str, rows: int) -> None:
    told = dict(span.attributes)
    seconds = [told.pop("louver.queue_s"), told.pop("louver.compute_s")]
    took = (span.end_time - span.start_time) / 1e9
    assert min(seconds) >= 0
    assert 0 < sum(seconds) <= took
    assert told == {
        "louver.protocol": protocol,
        "louver.status": 200,
        "louver.rows": rows,
        "louver.model": "toy",
        "louver.version": place.bundle.id,
    }
    assert (span.name, span.kind.name, span.status.status_code.name) == ("infer", "SERVER", "UNSET")
    assert abs(span.end_time / 1e9 - time.time()) < 60


def test_a_request_over_rest_goes_on_with_the_trace_of_its_client(place):
    body, headers = asking(features(3), call_id="id-17")
    (span,) = place.spans(place.ask(body, {**headers, "traceparent": PARENT, "tracestate": "a=feature"}))
    is_right(span, place, protocol="rest", rows=3)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert (f"{span.parent.span_id:016x}", span.parent.is_remote) == (SPAN, True)
    assert not span.context.trace_state
    told = span.to_json()
    for secret in (place.token, "camera-1", "id-17", "a=feature"):
        assert secret not in told


def test_a_request_over_grpc_goes_on_with_the_trace_of_its_client(place):
    feature = features(2)
    tensor = messages.ModelInferRequest.InferInputTensor(name="feature", datatype="UINT8", shape=feature.shape)
    asked = messages.ModelInferRequest(
        model_name="toy", id="id-17", inputs=[tensor], raw_input_contents=[feature.tobytes()]
    )

    class Context:
        def invocation_metadata(self):
            return (("authorization", f"Bearer {place.token}"), ("traceparent", PARENT))

    (span,) = place.spans(rpc._infer(place.app.service, message_of(asked.SerializeToString()), Context()))
    is_right(span, place, protocol="grpc", rows=2)
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)


@pytest.mark.parametrize("parent", [None, "hello", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 40_000])
def test_without_a_trace_to_go_on_with_a_new_one_begins(place, parent):
    body, headers = asking(features(1))
    (span,) = place.spans(place.ask(body, headers if parent is None else {**headers, "traceparent": parent}))
    assert span.parent is None
    assert span.context.is_valid


def test_refusals_and_failures_are_spans_too(place):
    body, headers = asking(features(1))
    served = place.repository.find("toy", None)

    def fails(feature):
        raise RuntimeError("secret")

    async def work() -> None:
        assert (await place.ask(body[:-1], headers)).status == 400
        assert (await ask(place.app, infer_path(place.bundle), body, headers)).status == 401
        served.batcher._network = fails
        assert (await place.ask(body, headers)).status == 500

    spans = place.spans(work())
    found = [(one.attributes["louver.status"], one.status.status_code.name) for one in spans]
    assert found == [(400, "UNSET"), (401, "UNSET"), (500, "ERROR")]
    assert "louver.model" not in spans[1].attributes  # nobody has looked yet
    assert "louver.compute_s" not in spans[0].attributes
    assert not any("secret" in one.to_json() for one in spans)


def test_each_request_of_a_batch_has_its_own_wait(place):
    served = place.repository.find("toy", None)
    network, begun = served.batcher._network, threading.Event()

    def slow(feature):
        begun.set()
        time.sleep(0.05)
        return network(feature)

    served.batcher._network = slow

    async def work() -> None:
        first = asyncio.create_task(place.ask(*asking(features(1))))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        await asyncio.gather(*(place.ask(*asking(features(rows))) for rows in (2, 3)), first)

    by_rows = {one.attributes["louver.rows"]: one.attributes for one in place.spans(work())}
    assert by_rows.keys() == {1, 2, 3}
    for rows in (2, 3):
        assert by_rows[rows]["louver.queue_s"] > 0.02
        assert by_rows[rows]["louver.compute_s"] >= 0.05
    assert by_rows[2]["louver.compute_s"] == by_rows[3]["louver.compute_s"]


def test_what_is_not_sampled_is_no_span(tmp_path):
    sampling = pytest.importorskip("opentelemetry.sdk.trace.sampling")
    place = Place(tmp_path, sampler=sampling.ALWAYS_OFF)
    assert place.spans(place.ask(*asking(features(1)))) == []
    place.repository.close()
    place.app.service.close()


class Collector(ThreadingHTTPServer):
    """Takes what an exporter sends."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *words) -> None:
        pass


@contextmanager
def collecting():
    collector = Collector()
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()


def test_the_server_sends_its_spans_to_a_collector(tmp_path, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    bundle = toy_bundle(tmp_path / "toy")
    feature = features(2)
    body, headers = asking(feature)
    tensor = messages.ModelInferRequest.InferInputTensor(name="feature", datatype="UINT8", shape=feature.shape)
    asked = messages.ModelInferRequest(model_name="toy", inputs=[tensor], raw_input_contents=[feature.tobytes()])
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        with running(tmp_path / "log", tmp_path / "toy", options=("--traces", "--drain-s", "0")) as server:
            assert server.ask(infer_path(bundle), body, {**headers, "traceparent": PARENT}).status == 200
            with grpc.insecure_channel(server.told["grpc"]) as channel:
                method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                assert method(asked.SerializeToString(), timeout=PATIENCE_S, metadata=(("traceparent", PARENT),))
        assert server.process.returncode == 0  # what was not sent yet was sent at the end
    found = []
    for path, content in collector.bodies:
        assert path == "/v1/traces"
        for one in service.ExportTraceServiceRequest.FromString(content).resource_spans:
            names = {pair.key: pair.value.string_value for pair in one.resource.attributes}
            assert names["service.name"] == "louver"
            found += [span for scope in one.scope_spans for span in scope.spans]
    assert [(span.trace_id.hex(), span.parent_span_id.hex()) for span in found] == [(TRACE, SPAN)] * 2
    told = [{pair.key: pair.value for pair in span.attributes} for span in found]
    assert sorted(one["louver.protocol"].string_value for one in told) == ["grpc", "rest"]
    assert np.ptp([one["louver.rows"].int_value for one in told]) == 0


def test_asked_for_and_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"pip install 'louver\[traces\]'"):
        traces_from_environment()


@pytest.mark.parametrize(
    "changes", [{"OTEL_TRACES_EXPORTER": "zipkin"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}], ids=json.dumps
)
def test_another_exporter_is_refused(monkeypatch, changes):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="http/protobuf"):
        traces_from_environment()

"""What is recorded of a request for OpenTelemetry, as a collector gets it."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from ep_serve.gateway.gateway import Gateway
from ep_serve.gateway.settings import SettingsError, load
from tests.clips import make_image
from tests.gateway.conftest import MakeWorld, bearer
from tests.gateway.mock_upstream import MockUpstream
from tests.gateway.test_media import data_url, fetching, origin, part

pytestmark = pytest.mark.anyio

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@dataclass
class Collector:
    """A server that takes spans by OTLP over HTTP."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        """In the order in which they began."""
        found: list[Span] = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found += scope.spans
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def is_named(self, name: str) -> Span:
        (span,) = [span for span in self.spans if span.name == name]
        return span


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()

    async def take(request: web.Request) -> web.Response:
        assert request.path == "/v1/traces"
        collector.bodies.append(await request.read())
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/{path:.*}", take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield collector
    finally:
        await runner.cleanup()


def attributes(span: Span) -> dict[str, Any]:
    kinds = {item.key: item.value.WhichOneof("value") for item in span.attributes}
    return {item.key: getattr(item.value, kinds[item.key]) for item in span.attributes}


def on(collector: Collector, **more: Any) -> dict[str, Any]:
    return {"enabled": True, "endpoint": collector.url, **more}


async def test_a_clients_trace_goes_on_through_the_gateway_to_the_engine(world: MakeWorld) -> None:
    async with collecting() as collector:
        async with world(tracing=on(collector)) as w:
            headers = {
                "traceparent": f"00-{TRACE}-{PARENT}-01",
                "tracestate": "a=1",
                "x-request-id": "abc",
            }
            await w.ask(headers=headers)
            async with w.stream(headers=headers) as response:
                await response.aread()
            sent = w.engine.headers
        server, upstream, *_ = collector.spans
        assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
        assert server.name == "POST /v1/chat/completions"
        assert server.kind == Span.SPAN_KIND_SERVER
        assert server.parent_span_id.hex() == PARENT
        assert attributes(server) == {
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "http.response.status_code": 200,
            "ep_serve.request_id": "abc",
        }
        assert upstream.name == "upstream"
        assert upstream.kind == Span.SPAN_KIND_CLIENT
        assert upstream.parent_span_id == server.span_id
        assert sent[0]["traceparent"] == f"00-{TRACE}-{upstream.span_id.hex()}-01"
        assert sent[0]["tracestate"] == "a=1"
        assert len(collector.spans) == 4


async def test_fetching_probing_and_waiting_are_spans_of_their_own(world: MakeWorld) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=make_image())

    engine = MockUpstream(gate=asyncio.Event())
    async with collecting() as collector, origin(answer) as (url, port, _):
        settings: dict[str, Any] = {
            "media": fetching(port),
            "routing": {"concurrency": 1, "first_byte_timeout_s": 60, "idle_timeout_s": 60},
            "queue": {"timeout_s": 60},
        }
        async with world([engine], tracing=on(collector), **settings) as w:
            first = asyncio.create_task(w.ask("x", stream=True))
            while not engine.running:
                await asyncio.sleep(0.01)
            second = asyncio.create_task(w.ask(part("image_url", f"{url}/a.png")))
            while not w.gateway.router._waiting:
                await asyncio.sleep(0.01)
            assert engine.gate is not None
            engine.gate.set()
            assert (await first).status_code == (await second).status_code == 200
        fetch, probe, queue = (collector.is_named(name) for name in ("fetch", "probe", "queue"))
        assert fetch.parent_span_id == probe.parent_span_id == queue.parent_span_id
        assert fetch.end_time_unix_nano <= probe.start_time_unix_nano
        assert attributes(fetch) == attributes(probe) == {"ep_serve.bytes": len(make_image())}


async def test_errors_are_recorded_by_their_type_only(world: MakeWorld) -> None:
    async with collecting() as collector:
        async with world(2, tracing=on(collector)) as w:
            for engine in w.engines:
                engine.mode = "error"
            assert (await w.ask()).status_code == 502
            assert (await w.client.get("/v1/files/file-a-secret-id")).status_code == 404
        failed = collector.is_named("POST /v1/chat/completions")
        assert failed.status.code == Status.STATUS_CODE_ERROR
        assert attributes(failed)["error.type"] == "502"
        attempts = [span for span in collector.spans if span.name == "upstream"]
        assert [attributes(span)["ep_serve.attempt"] for span in attempts] == [0, 1]
        assert {span.status.code for span in attempts} == {Status.STATUS_CODE_ERROR}
        assert collector.is_named("GET /v1/files/{file_id}").status.code != Status.STATUS_CODE_ERROR
        assert not any(span.events or span.status.message for span in collector.spans)


async def test_neither_media_nor_keys_nor_texts_are_recorded(world: MakeWorld) -> None:
    picture = make_image()

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=picture)

    async with collecting() as collector, origin(answer) as (url, port, _):
        async with world(keys=[{"name": "a"}], tracing=on(collector), media=fetching(port)) as w:
            content = [*part("image_url", data_url(picture)), {"type": "text", "text": "a secret"}]
            for mode in ("ok", "error", "echo_url", "die_mid"):
                w.engine.mode = mode
                await w.ask(content, headers=bearer("a"))
                await w.ask("a secret", stream=True, headers=bearer("a"))
            fetched = part("image_url", f"{url}/a-secret-path?a-secret-query")
            await w.ask(fetched, headers=bearer("a"))
            await w.ask("x", model="a-secret-model", headers=bearer("a"))
            await w.client.request("A-SECRET", "/a-secret-path", headers=bearer("a"))
        recorded = b"".join(collector.bodies)
        assert len(collector.spans) > 10
        for secret in (
            bearer("a")["authorization"].removeprefix("Bearer "),
            "secret",
            "SECRET",
            base64.b64encode(picture).decode()[:60],
            "/media/",
            url,
        ):
            assert secret.encode() not in recorded


async def test_the_client_decides_whether_its_trace_is_recorded(world: MakeWorld) -> None:
    async with collecting() as collector:
        async with world(tracing=on(collector, sample_ratio=0)) as w:
            await w.ask(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
            assert w.engine.headers[-1]["traceparent"].startswith(f"00-{TRACE}-")
            assert w.engine.headers[-1]["traceparent"].endswith("-00")
            await w.ask()
            await w.ask(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert [span.name for span in collector.spans] == ["POST /v1/chat/completions", "upstream"]


async def test_health_checks_are_not_recorded(world: MakeWorld) -> None:
    async with collecting() as collector:
        async with world(tracing=on(collector)) as w:
            await w.client.get("/health")
            await w.client.get("/ready")
        assert not collector.spans


async def test_an_unreachable_collector_does_not_affect_requests(world: MakeWorld) -> None:
    async with world(tracing={"enabled": True, "endpoint": "http://127.0.0.1:1"}) as w:
        assert (await w.ask()).status_code == 200


def test_without_the_packages_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    settings = load(None, {"upstreams": ["http://a"], "tracing": {"enabled": True}})
    with pytest.raises(SettingsError) as error:
        Gateway(settings)
    assert str(error.value) == (
        "tracing.enabled: OpenTelemetry is not installed; pip install 'ep-serve[tracing]'"
    )
    assert Gateway(load(None, {"upstreams": ["http://a"]})).tracing.traceparent == ""


def test_a_gateway_that_does_not_record_loads_nothing_of_it() -> None:
    code = """
import sys
from ep_serve.gateway.gateway import Gateway
from ep_serve.gateway.settings import load
Gateway(load(None, {"upstreams": ["http://a"]}))
sys.exit(any(name.split(".")[0] in ("opentelemetry", "obstore") for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

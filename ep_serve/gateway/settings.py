"""The configuration: a YAML file, environment variables and command line options.

Later sources override earlier ones. An environment variable is named by the path of its setting:
`EP_SERVE_GATEWAY_STORE__QUOTA_BYTES` sets `store.quota_bytes`. Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    UrlConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as PydanticSettingsError
from yarl import URL

from ep_serve.contract.generation import DEFAULT_MAX_N
from ep_serve.gateway.yaml_file import SettingsError as SettingsError
from ep_serve.gateway.yaml_file import read_yaml

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Bytes = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65_535)]


def _host_pattern(text: str) -> str:
    """Normalize a host pattern: IDNA encoded, lower case, without a trailing dot."""
    labels = text.rstrip(".").lower().split(".")
    if any(not label.isascii() and "*" in label for label in labels):
        raise ValueError("a '*' stands beside other letters only in an encoded name (xn--...)")
    hosts = (label if label.isascii() else URL.build(host=label).raw_host for label in labels)
    return ".".join(host or "" for host in hosts)


HostPattern = Annotated[str, AfterValidator(_host_pattern)]
UpstreamUrl = Annotated[AnyHttpUrl, UrlConstraints(allowed_schemes=["http", "https"])]

ENV_PREFIX = "EP_SERVE_GATEWAY_"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MetricsSettings(_Section):
    """The Prometheus endpoint."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Port = 9090


class PlaygroundSettings(_Section):
    """A page at `/playground` to try models by hand."""

    enabled: bool = False


class TracingSettings(_Section):
    """Spans for OpenTelemetry; needs the extra `tracing`."""

    enabled: bool = False
    endpoint: AnyHttpUrl | None = None
    """OTLP over HTTP, without `/v1/traces`; if not given, what `OTEL_EXPORTER_OTLP_*` say."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Of requests that come without a trace; the others were decided upon where it began."""
    service_name: Annotated[str, Field(min_length=1, max_length=255)] = "ep-serve-gateway"


class InternalSettings(_Section):
    """The endpoint where engines fetch media; must not be reachable for clients."""

    host: str = "127.0.0.1"
    port: Port = 0
    """0 selects a free port."""
    url: AnyHttpUrl | None = None
    """How engines reach this gateway; `http://host:port` if not given."""

    @model_validator(mode="after")
    def _can_be_named(self) -> Self:
        if self.url is None and self.host in ("0.0.0.0", "::"):
            raise ValueError(
                f"host {self.host} is no address that engines can fetch from; set internal.url"
            )
        return self


class RequestSettings(_Section):
    """Bounds on what a client may send."""

    max_body_bytes: Bytes = 48 * 2**20
    """A request body with its inlined media; uploads have `media.max_bytes`."""
    max_text_bytes: Bytes = 4 * 2**20
    """A request body without its inlined media."""
    max_buffered_bytes: Bytes = 192 * 2**20
    """Memory of all request bodies together, whose media go to the disk as they arrive; the rest of
    the process takes about 200 MiB."""
    max_buffered_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of it that one tenant may take, without keys one address."""
    max_header_bytes: Bytes = 32 * 2**10
    header_timeout_s: Seconds = 20
    body_timeout_s: Seconds = 30
    """Longest pause inside a body or an upload; being slower than `min_body_rate` counts as one."""
    min_body_rate: Bytes = 64 * 2**10
    """Bytes a second of a body or an upload."""
    max_messages: Count = 1_000
    max_parts: Count = 2_000
    max_n: Count = DEFAULT_MAX_N
    """Answers to one request (`n`)."""
    max_connections: Count = 4_096
    """Of clients. When there are more, those that wait for a request are closed, the oldest first;
    if all others have a running request, 503."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        share = int(self.max_buffered_bytes * self.max_buffered_share)
        if self.max_body_bytes > share:
            raise ValueError(
                f"max_body_bytes ({self.max_body_bytes}) must be at most max_buffered_bytes x "
                f"max_buffered_share ({share})"
            )
        return self


class FetchSettings(_Section):
    """Media behind `http:` and `https:` URLs."""

    enabled: bool = True
    ports: tuple[Port, ...] = (80, 443)
    allow_hosts: tuple[HostPattern, ...] | None = None
    """Hosts that may be fetched from, `*.example.org` for all below one; everything public if not
    given."""
    allow_networks: tuple[IPvAnyNetwork, ...] = ()
    """Networks that are fetched from though they are not public."""
    timeout_s: Seconds = 30
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 3


class ProbeSettings(_Section):
    """Bounds of media and of the cost of probing them."""

    max_duration_s: Seconds = 1_800
    max_frames: Count = 216_000
    max_pixels: Count = 8_192 * 4_320
    max_aspect: Annotated[float, Field(gt=1)] = 200.0
    timeout_s: Seconds = 10
    cpu_s: Annotated[int, Field(ge=1, le=600)] = 8
    memory_bytes: Bytes = 2**30
    concurrency: Count = 4


class MediaSettings(_Section):
    """Media of requests and uploads."""

    max_bytes: Bytes = 512 * 2**20
    max_per_request: Annotated[int, Field(ge=0)] = 16
    max_request_bytes: Bytes = 2**30
    """Total of all media of one request."""
    concurrency: Count = 32
    """Media that are fetched concurrently."""
    fetch: FetchSettings = FetchSettings()
    probe: ProbeSettings = ProbeSettings()


class S3Settings(_Section):
    """A bucket for uploaded files, shared by gateways: one may serve what another received."""

    bucket: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[\w.-]+$")]
    prefix: Annotated[str, Field(max_length=512, pattern=r"^([\w-][\w.-]*(/[\w-][\w.-]*)*)?$")] = ""
    """What the names of all objects begin with, without a slash at its ends."""
    endpoint: AnyHttpUrl | None = None
    """URL of an S3-compatible server; Amazon S3 if not given."""
    region: str = "us-east-1"
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    """Without keys, the environment is asked as Amazon's tools do (`AWS_*`, roles)."""
    quota_bytes: Bytes = 100 * 2**30
    timeout_s: Seconds = 30
    """Longest pause of the bucket, and how long a request that failed is repeated."""
    sync_interval_s: Seconds = 60
    """How often changes of other gateways are synchronized."""

    @model_validator(mode="after")
    def _whole_key(self) -> Self:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("give both access_key_id and secret_access_key, or neither")
        return self


class StoreSettings(_Section):
    """The media on disk. One process owns the folder."""

    path: Path = Path("ep-serve-media")
    quota_bytes: Bytes = 20 * 2**30
    """Complete media. When files fill it, media in use may take a quarter of it on top."""
    media_ttl_s: Annotated[float, Field(gt=0)] = 3_600
    """Media that came inside requests are kept this long after their last use."""
    file_ttl_s: Annotated[float, Field(gt=0)] = 7 * 86_400
    """Uploaded files are kept this long."""
    s3: S3Settings | None = None
    """Keep uploaded files in a bucket; the disk then holds copies of what is in use."""


class RoutingSettings(_Section):
    """Routing, retries and health checks."""

    load_bound: Annotated[float, Field(ge=1)] = 1.25
    """An engine whose work exceeds the mean by this factor loses its affinity."""
    concurrency: Count = 256
    """Concurrent requests of one engine; more wait in the queue."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Other engines to try, before the first byte of an answer was sent; a single one when an
    engine took the request and failed."""
    connect_timeout_s: Seconds = 2
    first_byte_timeout_s: Seconds = 120
    """Until a streamed answer begins."""
    answer_timeout_s: Seconds = 300
    """Until an answer that is not streamed is complete."""
    idle_timeout_s: Seconds = 60
    """Longest pause inside an answer."""
    health_interval_s: Seconds = 2
    health_timeout_s: Seconds = 2
    dns_interval_s: Seconds = 5
    breaker_failures: Count = 3
    """Time-outs or refused connections in a row after which an engine is left alone until it
    answers a request of the gateway's own; failed requests in a row after which it is sent one."""
    breaker_reset_s: Seconds = 5
    """Between two such requests."""
    quarantine_s: Seconds = 300
    """How long a request is refused that was in flight when two engines failed."""


class QueueSettings(_Section):
    """The queue of requests while all engines are full."""

    max_waiting: Annotated[int, Field(ge=0)] = 512
    timeout_s: Seconds = 10


class DrainSettings(_Section):
    """Graceful shutdown after SIGTERM."""

    delay_s: Annotated[float, Field(ge=0)] = 5
    """`/ready` returns 503 for this long before the port closes."""
    timeout_s: Seconds = 300
    """Running requests may take this long after that."""


class GatewaySettings(BaseSettings):
    """All settings of the gateway."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    host: str = "127.0.0.1"
    port: Port = 8080
    upstreams: tuple[UpstreamUrl, ...] = ()
    """Base URLs of engines, without `/v1`. A host name stands for all its addresses."""
    upstream_api_key: SecretStr | None = None
    forward_priority: bool = False
    """Send each key's priority on; the engines must run with priority scheduling."""
    keys_file: Path | None = None
    allow_anonymous: bool = False
    """Serve without keys on an address that others can reach."""
    request_timeout_s: Seconds = 600
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
    request: RequestSettings = RequestSettings()
    media: MediaSettings = MediaSettings()
    store: StoreSettings = StoreSettings()
    routing: RoutingSettings = RoutingSettings()
    queue: QueueSettings = QueueSettings()
    drain: DrainSettings = DrainSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    internal: InternalSettings = InternalSettings()
    playground: PlaygroundSettings = PlaygroundSettings()

    @field_validator("upstreams")
    @classmethod
    def _plain_urls(cls, urls: tuple[AnyHttpUrl, ...]) -> tuple[AnyHttpUrl, ...]:
        for url in urls:
            if url.username or url.password or url.query or url.fragment:
                raise ValueError("an upstream has no user, password, query or fragment")
            if (url.path or "/").rstrip("/").endswith("/v1"):
                raise ValueError("an upstream is named without /v1")
            try:
                (url.host or "").encode("idna")
            except UnicodeError:
                raise ValueError("the host of the upstream is not a valid host name") from None
        return urls

    @model_validator(mode="after")
    def _keys_off_loopback(self) -> Self:
        if not self.keys_file and not self.allow_anonymous and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached by others and no keys_file is given; "
                "give one, listen on 127.0.0.1, or set allow_anonymous: true"
            )
        if not self.upstreams:
            raise ValueError("upstreams is empty; give at least one --upstream URL")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *others: PydanticBaseSettingsSource,
        **more: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use only the arguments: `load` merges the sources in a different order."""
        return (init_settings,)


def load(file: Path | None = None, options: dict[str, Any] | None = None) -> GatewaySettings:
    """Load and validate the configuration.

    Args:
        file: a YAML file; None for none.
        options: from the command line, nested as in the file; they override the others.

    Raises:
        SettingsError: names each invalid setting.
    """
    given = _read(file) if file else {}
    try:
        environment: dict[str, Any] = EnvSettingsSource(GatewaySettings)()
        return GatewaySettings(**_merged(_merged(given, environment), options or {}))
    except PydanticSettingsError as error:
        raise SettingsError(str(error)) from None
    except ValidationError as error:
        raise SettingsError("\n".join(_sentence(item) for item in error.errors())) from None


def to_yaml(settings: GatewaySettings) -> str:
    """Return the configuration as YAML that `load` reads, with secrets masked."""
    text: str = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    return text


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a listening address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(file: Path) -> dict[str, Any]:
    content = read_yaml(file)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{file}: must hold settings by name, holds a {type(content).__name__}")
    for name in content:
        if not isinstance(name, str):
            raise SettingsError(f"{file}: {name}: unknown setting")
    return content


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        known = merged.get(name)
        if isinstance(known, dict) and isinstance(value, dict):
            value = _merged(known, value)
        merged[name] = value
    return merged


def _sentence(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name}: unknown setting"
    reason = item["msg"].removeprefix("Value error, ")
    if not name:
        return str(reason)
    value = item["input"]
    shown = f" (got {value!r})" if isinstance(value, str | int | float) else ""
    return f"{name}: {reason}{'' if 'key' in name else shown}"

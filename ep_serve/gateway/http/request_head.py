"""Validation of request heads."""

from __future__ import annotations

import re

from ep_serve.gateway.errors import ApiError, invalid

_HOST = re.compile(rb"[\w.~%!$&'()*+,;=:\[\]-]*", re.ASCII)


def head_error(headers: list[tuple[bytes, bytes]], method: bytes, version: str) -> ApiError | None:
    """Return an error for a head that a proxy might interpret differently (request smuggling)."""
    hosts = [value for name, value in headers if name == b"host"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if version not in ("1.0", "1.1"):
        message = f"HTTP/{version} is not supported."
        return ApiError(505, message, code="unsupported_http_version")
    if method == b"CONNECT":
        return ApiError(405, "CONNECT is not allowed.", code="method_not_allowed")
    if len(hosts) > 1 or not (hosts or version == "1.0"):
        return invalid_http("A request must have exactly one Host header.")
    if hosts and not _HOST.fullmatch(hosts[0]):
        return invalid_http("The Host header is not a valid host.")
    if codings and version == "1.0":
        return invalid_http("Transfer-Encoding is not allowed in HTTP/1.0.")
    if codings and [value.lower() for value in codings] != [b"chunked"]:
        message = "The only supported Transfer-Encoding is chunked."
        return ApiError(501, message, code="unsupported_transfer_encoding")
    return None


def invalid_http(message: str) -> ApiError:
    """400 for a malformed request."""
    return invalid(message, code="invalid_http")

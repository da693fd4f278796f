"""Validate URLs and addresses that media are fetched from.

This extends the classification of `ipaddress` with IPv4 addresses embedded in IPv6 ones and with a
cloud metadata service that has a public address.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import re
from typing import TYPE_CHECKING

from yarl import URL

from ep_serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ep_serve.gateway.settings import FetchSettings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_URL = 8_192
_UNICAST = ipaddress.ip_network("2000::/3")
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
_CLOSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("192.0.0.0/24", "192.88.99.0/24"),  # protocol assignments, 6to4 relays
        *("2001::/23", "2002::/16", "3fff::/20"),  # Teredo and others, 6to4, documentation
    )
)
"""Special-purpose networks that some versions of `ipaddress` report as global."""
_METADATA = (ipaddress.ip_address("168.63.129.16"),)
_NUMERIC = re.compile(r"(0x[0-9a-f]*|\d+)", re.IGNORECASE)
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.(?!-)[a-z0-9_-]{1,63})*", re.ASCII)


def is_public(address: Address) -> bool:
    """Return whether an address is on the public internet.

    IPv6 addresses with an embedded IPv4 address are classified by it if a host connects to it
    directly (mapped, translated), and rejected if a tunnel would (Teredo, 6to4).
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _TRANSLATED:
            return is_public(ipaddress.IPv4Address(address.packed[-4:]))
        if address not in _UNICAST or address.scope_id is not None:
            return False
    closed = any(address in network for network in _CLOSED if network.version == address.version)
    special = address.is_private or address.is_multicast or address.is_reserved
    return address.is_global and not special and not closed and address not in _METADATA


def is_allowed(address: str, networks: Sequence[Network]) -> bool:
    """Return whether media may be fetched from an address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    inside = any(parsed in network for network in networks if network.version == parsed.version)
    return inside or is_public(parsed)


def check_url(text: str, settings: FetchSettings) -> URL:
    """Parse and validate a URL, without resolving its host.

    Raises:
        ApiError: 400. Rejected and nonexistent hosts get the same message, which does not reveal
            internal host names.
    """
    if len(text) > MAX_URL:
        raise refused(f"The URL has {len(text)} characters; the limit is {MAX_URL}.")
    if any(ord(c) <= 32 or ord(c) == 127 or c == "\\" for c in text):
        raise refused("The URL contains an invalid character.")
    try:
        url = URL(text)
        port = url.port
        name = (url.raw_host or "").rstrip(".").lower()  # IDNA encoded
    except ValueError:  # UnicodeError is one
        raise refused("The URL is malformed.") from None
    if url.scheme not in ("http", "https"):
        raise refused("The scheme of a media URL must be data, http or https.")
    if "@" in re.split(r"[/?#]", text.partition("://")[2], maxsplit=1)[0]:
        raise refused("The URL must not contain a user or a password.")
    if port not in settings.ports:
        allowed = ", ".join(str(port) for port in settings.ports)
        raise refused(f"The port of the URL must be one of: {allowed}.")
    if not _is_plain(name):
        raise unreachable()
    if settings.allow_hosts is not None and not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in settings.allow_hosts
    ):
        raise unreachable()
    if _is_literal(name) and not is_allowed(name, settings.allow_networks):
        raise unreachable()
    return url


def refused(message: str) -> ApiError:
    """400 for a URL that is not allowed."""
    return ApiError(400, message, code="media_url_refused", param="messages")


def unreachable() -> ApiError:
    """400 for a host that does not exist or is not allowed, without distinction."""
    return refused("The host of the URL does not exist or is not allowed.")


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_plain(host: str) -> bool:
    """Return whether a host is a name or an address in canonical form.

    Resolvers also accept 2130706433, 0x7f.1 or 0177.0.0.1 as addresses, in inconsistent ways.
    """
    if _is_literal(host):
        return "%" not in host
    if not _HOST.fullmatch(host) or len(host) > 253:
        return False
    return not _NUMERIC.fullmatch(host.rpartition(".")[2])

"""Which addresses and URLs media may be fetched from.

`ipaddress` knows what is public; what it does not know is added here: IPv4 addresses inside IPv6
ones, and the one metadata service that has a public address.
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
"""What not every version of `ipaddress` keeps apart from the internet."""
_METADATA = (ipaddress.ip_address("168.63.129.16"),)
_NUMERIC = re.compile(r"(0x[0-9a-f]*|\d+)", re.IGNORECASE)
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.(?!-)[a-z0-9_-]{1,63})*", re.ASCII)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet at large.

    IPv6 addresses that carry an IPv4 address are judged by it where a host would connect to it
    directly (mapped, translated), and refused where a tunnel would (Teredo, 6to4).
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
    """Whether media may be fetched from an address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    inside = any(parsed in network for network in networks if network.version == parsed.version)
    return inside or is_public(parsed)


def check_url(text: str, settings: FetchSettings) -> URL:
    """The URL in `text`, if it may be fetched as far as it tells.

    Raises:
        ApiError: 400. Names that are refused and names that do not exist get the same answer, so
            that nobody learns which names exist inside.
    """
    if len(text) > MAX_URL:
        raise refused(f"The URL has {len(text)} characters; the limit is {MAX_URL}.")
    if any(ord(c) <= 32 or ord(c) == 127 or c == "\\" for c in text):
        raise refused("The URL contains a character that a URL cannot have.")
    try:
        url = URL(text)
        port = url.port
        name = (url.raw_host or "").rstrip(".").lower()  # encoded, as it is connected to
    except ValueError:  # UnicodeError is one
        raise refused("The URL is malformed.") from None
    if url.scheme not in ("http", "https"):
        raise refused("Media come by 'data:', 'http:' and 'https:' URLs.")
    if "@" in re.split(r"[/?#]", text.partition("://")[2], maxsplit=1)[0]:
        raise refused("A URL with a user or a password is not fetched.")
    if port not in settings.ports:
        allowed = ", ".join(str(port) for port in settings.ports)
        raise refused(f"Media are fetched from these ports: {allowed}.")
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
    """400: this URL is not fetched."""
    return ApiError(400, message, code="media_url_refused", param="messages")


def unreachable() -> ApiError:
    """400: the one answer for all hosts that do not exist or may not be reached."""
    return refused("The host of the URL does not exist or is not allowed.")


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_plain(host: str) -> bool:
    """Whether a host is a name, or an address in its usual form.

    Resolvers also take 2130706433, 0x7f.1 or 0177.0.0.1 for addresses, and they do not agree how.
    """
    if _is_literal(host):
        return "%" not in host
    if not _HOST.fullmatch(host) or len(host) > 253:
        return False
    return not _NUMERIC.fullmatch(host.rpartition(".")[2])

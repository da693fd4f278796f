"""Which addresses and URLs are fetched from."""

from __future__ import annotations

import ipaddress
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.fetch.addresses import check_url, is_allowed, is_public
from ep_serve.gateway.settings import FetchSettings

PRIVATE = [
    *("127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "0.0.0.0"),
    *("169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    *("224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "203.0.113.1"),
    *("::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:7f00:1::"),
    *("2002:808:808::", "2001:0:808:808::1", "fec0::1", "2001:10::1", "3fff::1"),
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    if address == "3fff::1" and ipaddress.ip_address(address).is_global:
        pytest.skip("this Python does not know RFC 9637 yet")
    assert not is_allowed(address, ())


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_allowed(address: str) -> None:
    assert is_allowed(address, ())


@given(st.ip_addresses(v=4))
def test_a_mapped_or_translated_address_is_judged_by_what_it_carries(
    address: ipaddress.IPv4Address,
) -> None:
    number = int(address)
    mapped = ipaddress.IPv6Address((0xFFFF << 32) | number)
    translated = ipaddress.IPv6Address((0x64FF9B << 96) | number)
    assert is_public(mapped) == is_public(translated) == is_public(address)


@given(st.ip_addresses())
def test_no_private_address_is_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is None and is_public(address):
        assert not address.is_private
        assert not address.is_loopback
        assert not address.is_link_local
        assert not address.is_multicast
        translated = address in ipaddress.ip_network("64:ff9b::/96")
        assert translated or not address.is_reserved


def test_a_network_can_be_allowed() -> None:
    networks = (ipaddress.ip_network("10.1.0.0/16"),)
    assert is_allowed("10.1.2.3", networks)
    assert not is_allowed("10.2.2.3", networks)
    assert not is_allowed("::1", networks)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.mp4",
        "http://example.org:80/a?b=c#d",
        "HTTPS://EXAMPLE.ORG./a",
        "https://8.8.8.8/a",
        "https://[2606:4700::1111]/a",
        "https://bücher.example/a",
        "https://xn--bcher-kva.example/a",
        "https://1e100.net/a",
        "https://a_b.example.org/",
    ],
)
def test_a_usual_url_is_fetched(url: str) -> None:
    assert check_url(url, FetchSettings())


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a",
        "gopher://example.org/",
        "//example.org/a",
        "/etc/passwd",
        "",
        "javascript:alert(1)",
        "http://user@example.org/",
        "http://user:password@example.org/",
        "http://@example.org/",
        "http://example.org@127.0.0.1/",
        "http://example.org:22/",
        "http://example.org:8080/",
        "http://example.org:0/",
        "http://example.org:99999/",
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://127.0.0.1./",
        "http://127.0.0.0x1/",
        "http://①②⑦.⓪.⓪.①/",
        "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[0:0:0:0:0:ffff:7f00:1]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[fe80::1%25eth0]/",
        "http://[64:ff9b::7f00:1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/",
        "http:///a",
        "http://.../a",
        "http://exa mple.org/",
        "http://example.org/\r\nx: y",
        "http://example.org\\@127.0.0.1/",
        "http://example.org/" + "a" * 9_000,
        "http://-bad-.example/",
    ],
)
def test_an_unusual_url_is_refused(url: str) -> None:
    with pytest.raises(ApiError) as error:
        check_url(url, FetchSettings())
    assert error.value.status == 400
    assert "127.0" not in error.value.message


def test_only_listed_hosts_are_fetched_from_if_there_is_a_list() -> None:
    settings = FetchSettings(allow_hosts=("cdn.example.org", "*.media.example"))
    for url in (
        "https://cdn.example.org/a",
        "https://a.b.media.example/",
        "https://CDN.example.ORG/",
    ):
        assert check_url(url, settings)
    for url in (
        "https://example.org/",
        "https://media.example/",
        "https://cdn.example.org.evil.net/",
    ):
        with pytest.raises(ApiError):
            check_url(url, settings)


@pytest.mark.parametrize(
    ("pattern", "same", "others"),
    [
        ("strasse.example", ["strasse.example", "STRASSE.example."], ["stra\u00dfe.example"]),
        (
            "Stra\u00dfe.Example",
            ["stra\u00dfe.example", "xn--strae-oqa.example", "XN--STRAE-OQA.example."],
            ["strasse.example", "strase.example"],
        ),
        ("xn--strae-oqa.example", ["stra\u00dfe.example"], ["strasse.example"]),
        ("*.b\u00fccher.example.", ["a.xn--bcher-kva.example"], ["a.bucher.example"]),
        (
            "*.example.org",
            ["a.example.org", "a.B.example.org."],
            ["a%2eexample.org", "example.org"],
        ),
        (
            "a.example.org",
            ["\uff41.example\u3002org"],
            ["%61.example.org", "a.example.org%00.evil.net"],
        ),
        ("2606:4700::1", ["[2606:4700::1]"], ["[2606:4700::1%25eth0]", "[2606:4700::2]"]),
    ],
)
def test_hosts_are_compared_as_they_are_connected_to(
    pattern: str, same: list[str], others: list[str]
) -> None:
    settings = FetchSettings(allow_hosts=(pattern,))
    for host in same:
        assert check_url(f"http://{host}/a", settings), host
    for host in others:
        with pytest.raises(ApiError):
            check_url(f"http://{host}/a", settings)


def test_a_pattern_that_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match="xn--"):
        FetchSettings(allow_hosts=("*b\u00fccher.example",))


@given(st.text(max_size=60))
def test_any_text_is_either_a_url_or_refused(text: str) -> None:
    for url in (text, f"http://{text}", f"https://example.org/{text}"):
        with suppress(ApiError):
            check_url(url, FetchSettings())

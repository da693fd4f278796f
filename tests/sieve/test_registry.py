from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from ep_serve.sieve import get_sieve, known_sieves, registry
from ep_serve.sieve.cs2 import CS2Sieve


def offer(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    entry = EntryPoint(name, value, registry.ENTRY_POINT_GROUP)

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [entry] if group == registry.ENTRY_POINT_GROUP else []

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_the_built_in_sieves_are_known() -> None:
    assert {"cs2", "omnisift", "omnizip", "uniform", "random", "none"} <= set(known_sieves())


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"one of .*cs2, none, omnisift, omnizip, random, uniform.*, not 'sieb'"
    ):
        get_sieve("sieb")


def test_an_installed_package_can_bring_a_sieve(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "theirs", "ep_serve.sieve.uniform:UniformSieve")
    assert "theirs" in known_sieves()
    assert get_sieve("theirs").name == "uniform"


def test_a_built_in_name_cannot_be_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "cs2", "ep_serve.sieve.uniform:UniformSieve")
    assert get_sieve("cs2") is CS2Sieve


def test_what_is_no_sieve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "theirs", "ep_serve.sieve.registry:get_sieve")
    with pytest.raises(TypeError, match=r"'theirs' \(ep_serve.sieve.registry:get_sieve\)"):
        get_sieve("theirs")

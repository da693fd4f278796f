"""Names of sieves. A package of its own joins through the entry point group `ep_serve.sieves`."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from ep_serve.sieve.base import Sieve
from ep_serve.sieve.cs2 import CS2Sieve
from ep_serve.sieve.keep_all import KeepAllSieve
from ep_serve.sieve.omnisift import OmniSiftSieve
from ep_serve.sieve.omnizip import OmniZipSieve
from ep_serve.sieve.random_choice import RandomSieve
from ep_serve.sieve.uniform import UniformSieve

ENTRY_POINT_GROUP = "ep_serve.sieves"

_BUILT_IN: dict[str, type[Sieve]] = {
    "cs2": CS2Sieve,
    "omnisift": OmniSiftSieve,
    "omnizip": OmniZipSieve,
    "uniform": UniformSieve,
    "random": RandomSieve,
    "none": KeepAllSieve,
}


def known_sieves() -> list[str]:
    """Names of all registered sieves, sorted."""
    return sorted({*_BUILT_IN, *_installed()})


def get_sieve(name: str) -> type[Sieve]:
    """The class of a sieve; build one with `for_model`. A built-in name cannot be taken over.

    Raises:
        ValueError: no sieve has that name.
        TypeError: an installed package offers something else than a `Sieve` under it.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    entry = _installed().get(name)
    if entry is None:
        raise ValueError(f"sieve must be one of {', '.join(known_sieves())}, not {name!r}")
    sieve = entry.load()
    if not (isinstance(sieve, type) and issubclass(sieve, Sieve)):
        raise TypeError(f"sieve {name!r} ({entry.value}) must be a subclass of {Sieve.__name__}")
    return sieve


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}

"""Sieves pick the survivors of a pool: one file for each, one line for each in the registry."""

from __future__ import annotations

from ep_serve.sieve.base import Pool, Sieve
from ep_serve.sieve.registry import get_sieve, known_sieves

__all__ = ["Pool", "Sieve", "get_sieve", "known_sieves"]

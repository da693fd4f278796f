"""Sieves pick the survivors of a pool: one file for each, one line for each in the registry."""

from __future__ import annotations

from ep_serve.sieve.base import Budget, Plan, Pool, Selection, Sieve
from ep_serve.sieve.registry import get_sieve, known_sieves

__all__ = ["Budget", "Plan", "Pool", "Selection", "Sieve", "get_sieve", "known_sieves"]

"""Compare answers of the gateway with those of its engine."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.engine


def bare(answer: Any) -> Any:
    """An answer or a chunk without what differs between two of them."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if k not in ("id", "created")}
        return [kept(item) for item in value] if isinstance(value, list) else value

    return kept(answer.model_dump(exclude_unset=True))


def joined(chunks: list[Any]) -> Any:
    """A stream put together: strings and lists one behind the other, else what came last."""
    whole: dict[int, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            whole[index] = _added(whole.get(index), {**choice, "index": 0})
    return whole, chunks[-1].get("usage"), {chunk["model"] for chunk in chunks}


def _added(one: Any, more: Any, name: str = "") -> Any:
    if one is None or more is None:
        return more if one is None else one
    if isinstance(more, dict):
        return {key: _added(one.get(key), more.get(key), key) for key in one | more}
    if name == "tool_calls":
        return [_added(one[0], more[0])] if one and more else one or more
    if isinstance(more, list) or name in ("content", "arguments"):
        return one + more
    return more


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; a batch of another size may round the last digits."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-3, abs=1e-3)
    return bool(one == other)

"""Which nodes of an AND-OR graph hold: what has a finite expansion, what may be empty."""

from __future__ import annotations

from collections.abc import Iterable


class AndOrGraph:
    """Nodes that hold when all (AND) or one (OR) of their children do.

    Cycles are allowed: a node that would have to hold for itself to hold does not.
    """

    def __init__(self) -> None:
        self._missing: list[int] = []
        self._parents: list[list[int]] = []

    def add(self) -> int:
        """Return a new node, that does not hold before it is defined."""
        self._missing.append(-1)
        self._parents.append([])
        return len(self._missing) - 1

    def require_all(self, node: int, children: Iterable[int]) -> int:
        """Let a node hold when all children do, at once if there are none; return it."""
        return self._define(node, list(children), every=True)

    def require_one(self, node: int, children: Iterable[int]) -> int:
        """Let a node hold when one of the children does; return it."""
        return self._define(node, list(children), every=False)

    def _define(self, node: int, children: list[int], *, every: bool) -> int:
        for child in children:
            self._parents[child].append(node)
        self._missing[node] = len(children) if every else (1 if children else -1)
        return node

    def solve(self) -> set[int]:
        """Return the nodes that hold."""
        missing = list(self._missing)
        ready = [node for node, count in enumerate(missing) if count == 0]
        holding = set(ready)
        while ready:
            for parent in self._parents[ready.pop()]:
                missing[parent] -= 1
                if missing[parent] == 0:
                    holding.add(parent)
                    ready.append(parent)
        return holding

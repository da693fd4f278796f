"""Evaluate AND-OR graphs with cycles, to find rules with a finite or an empty expansion."""

from __future__ import annotations

from collections.abc import Iterable


class AndOrGraph:
    """Nodes that are satisfied when all (AND) or one (OR) of their children are.

    `solve` computes the least fixed point, so a cycle does not satisfy itself.
    """

    def __init__(self) -> None:
        self._missing: list[int] = []
        self._parents: list[list[int]] = []

    def add(self) -> int:
        """Add a node, unsatisfied until it is defined, and return it."""
        self._missing.append(-1)
        self._parents.append([])
        return len(self._missing) - 1

    def require_all(self, node: int, children: Iterable[int]) -> int:
        """Define an AND node, satisfied if it has no children, and return it."""
        return self._define(node, list(children), every=True)

    def require_one(self, node: int, children: Iterable[int]) -> int:
        """Define an OR node and return it."""
        return self._define(node, list(children), every=False)

    def _define(self, node: int, children: list[int], *, every: bool) -> int:
        for child in children:
            self._parents[child].append(node)
        self._missing[node] = len(children) if every else (1 if children else -1)
        return node

    def solve(self) -> set[int]:
        """Return the satisfied nodes."""
        missing = list(self._missing)
        ready = [node for node, count in enumerate(missing) if count == 0]
        satisfied = set(ready)
        while ready:
            for parent in self._parents[ready.pop()]:
                missing[parent] -= 1
                if missing[parent] == 0:
                    satisfied.add(parent)
                    ready.append(parent)
        return satisfied

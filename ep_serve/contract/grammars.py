"""Parse and check EBNF grammars in the dialect of xgrammar 0.2.8."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ep_serve.contract.and_or_graph import AndOrGraph
from ep_serve.contract.errors import FieldError
from ep_serve.contract.expressions import (
    MAX_ADJACENT,
    Alt,
    Atom,
    Empty,
    Expr,
    ExpressionCost,
    Reader,
    Ref,
    Repeat,
    Seq,
    ambiguous,
    expression_cost,
)

MAX_GRAMMAR_CHARS = 16_384
MAX_RULES = 256

_TOKEN = re.compile(
    r"""(?:\s|\#[^\n]*)*(
        "(?:\\.|[^"\\\n])*"
      | \[\^?(?:\\.|[^\]\\])*\]
      | [A-Za-z_][\w.-]*(?:\s*::=)?
      | \{\s*\d+\s*(?:,\s*\d*\s*)?\}
      | \(=?
      | [)|*+?]
      | $)""",
    re.VERBOSE,
)


class _GrammarReader(Reader):
    def __init__(self, field: str, text: str) -> None:
        super().__init__(field)
        self._tokens: list[str] = []
        place = 0
        while place < len(text):
            found = _TOKEN.match(text, place)
            if found is None:
                rest = text[place:].strip()[:1]
                raise self.refuse(f"is not EBNF of the form root ::= ... (at {rest!r})")
            if found[1]:
                self._tokens.append(found[1])
            place = found.end()
        self._place = 0

    def peek(self) -> str | None:
        if self._place == len(self._tokens) or self._tokens[self._place].endswith("::="):
            return None
        return self._tokens[self._place]

    def take(self) -> str:
        self._place += 1
        return self._tokens[self._place - 1]

    def atom(self) -> Expr:
        token = self.take()
        if token[0] == '"':
            return Empty() if token == '""' else Atom(0)
        if token[0] == "[":
            return Atom(1)
        if token[0] in "*+?{":
            raise self.refuse(f"has {token} without a preceding element")
        return Ref(token)

    def rules(self) -> dict[str, Expr]:
        rules: dict[str, Expr] = {}
        while self._place < len(self._tokens):
            head = self.take()
            if not head.endswith("::="):
                raise self.refuse(f"has {head[:40]} where a rule name ::= ... is expected")
            if len(rules) == MAX_RULES:
                raise self.refuse(f"has more than {MAX_RULES} rules")
            rules[head.removesuffix("::=").strip()] = self.alternatives()
            if self.peek() is not None:
                raise self.refuse("has an unbalanced parenthesis")
        return rules


def grammar_cost(field: str, text: str) -> ExpressionCost:
    """Check a grammar and return the cost of its root.

    Raises:
        FieldError: for a syntax error, a missing rule, or a rule without a finite expansion.
    """
    if len(text) > MAX_GRAMMAR_CHARS:
        raise FieldError(field, f"has {len(text)} characters; the limit is {MAX_GRAMMAR_CHARS}")
    rules = _GrammarReader(field, text).rules()
    if "root" not in rules:
        raise FieldError(field, "has no rule root ::= ...")
    uses = {name: set(_references(expr)) for name, expr in rules.items()}
    missing = next((used for found in uses.values() for used in found - rules.keys()), None)
    if missing is not None:
        raise FieldError(field, f"uses the rule {missing[:64]}, which is not defined")
    finite = _finite_rules(rules, may_be_empty=False)
    endless = next((name for name in _reachable(uses, "root") if name not in finite), None)
    if endless is not None:
        raise FieldError(field, f"has a rule {endless[:64]} without a finite expansion")
    return _root_cost(rules, uses)


def _root_cost(rules: dict[str, Expr], uses: dict[str, set[str]]) -> ExpressionCost:
    """Return the cost of `root`. A recursive rule counts as one repetition, or as too many."""
    empty = _finite_rules(rules, may_be_empty=True)
    reached = {name: _reachable(uses, *uses[name]) for name in rules}
    known: dict[str, ExpressionCost] = {}
    waiting = ["root"]
    while waiting:
        name = waiting[-1]
        cycle = {other for other in reached[name] if name in reached[other]}
        if needed := uses[name] - cycle - known.keys():
            waiting += needed
            continue
        waiting.pop()
        loop = 1 if _most_references(rules[name], cycle & empty) == 1 else MAX_ADJACENT + 1
        own = {used: ambiguous(loop) if used in empty else ExpressionCost(True) for used in cycle}
        known[name] = expression_cost(rules[name], (known | own).__getitem__)
    return known["root"]


def _most_references(expr: Expr, names: set[str]) -> int:
    """Return the largest number of references to `names` in one derivation of an expression."""
    match expr:
        case Ref(name):
            return int(name in names)
        case Seq(items):
            return sum(_most_references(item, names) for item in items)
        case Alt(items):
            return max(_most_references(item, names) for item in items)
        case Repeat(item, _, high):
            return _most_references(item, names) * (2 if high != 1 else 1)
        case _:
            return 0


def _references(expr: Expr) -> Iterator[str]:
    match expr:
        case Ref(name):
            yield name
        case Seq(items) | Alt(items):
            for item in items:
                yield from _references(item)
        case Repeat(item, _, _):
            yield from _references(item)


def _reachable(uses: dict[str, set[str]], *starts: str) -> set[str]:
    found = set(starts)
    waiting = list(starts)
    while waiting:
        new = uses[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _finite_rules(rules: dict[str, Expr], *, may_be_empty: bool) -> set[str]:
    """Return the rules with a finite expansion or, with `may_be_empty`, with an empty one."""
    graph = AndOrGraph()
    nodes = {name: graph.add() for name in rules}

    def add(expr: Expr) -> int:
        match expr:
            case Ref(name):
                return nodes[name]
            case Seq(items):
                return graph.require_all(graph.add(), map(add, items))
            case Alt(items):
                return graph.require_one(graph.add(), map(add, items))
            case Repeat(item, low, _):
                return graph.require_all(graph.add(), [add(item)] if low else [])
            case Atom() if may_be_empty:
                return graph.require_one(graph.add(), [])
            case _:
                return graph.require_all(graph.add(), [])

    for name, expr in rules.items():
        graph.require_all(nodes[name], [add(expr)])
    satisfied = graph.solve()
    return {name for name, node in nodes.items() if node in satisfied}

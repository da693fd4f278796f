"""Parse regular expressions and EBNF grammars and estimate their cost for a grammar matcher.

xgrammar 0.2.8 compiles either into rules for an Earley parser that runs over the whole vocabulary
for each sampled token, inside an engine step. Such a step is slow not because of the length of an
expression but because of adjacent parts that may be empty or repeat: `([a-z]?){64}` takes seconds
for one token, `root ::= root root root | ""` never returns. `ExpressionCost.adjacent` counts them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ep_serve.contract.errors import FieldError

MAX_NESTING = 64
"""Nesting depth of groups."""
MAX_REPEAT = 10_000
"""Largest number in `{m,n}`."""
MAX_ADJACENT = 8
"""Adjacent parts that may be empty or repeat."""
MAX_STATES = 512
"""Character classes of a request once its repetitions are unrolled. Each is compiled against the
whole vocabulary: 40 to 100 ms with 152,000 tokens and two cores."""
COMPRESSED = 128
"""Longer repetitions of a part are counted instead of unrolled."""


@dataclass(frozen=True, slots=True)
class Empty:
    """Matches the empty string, as anchors do."""


@dataclass(frozen=True, slots=True)
class Atom:
    """A literal or a character class.

    Attributes:
        states: 1 for a class, 0 for a literal.
    """

    states: int


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to a rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Seq:
    """A sequence of expressions."""

    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """A choice of expressions."""

    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`item` repeated `low` to `high` times; None for no upper bound."""

    item: Expr
    low: int
    high: int | None


Expr = Empty | Atom | Ref | Seq | Alt | Repeat


@dataclass(frozen=True, slots=True)
class ExpressionCost:
    """Properties of an expression that determine the cost of matching it.

    Attributes:
        is_nonempty: whether it never matches the empty string.
        has_literal: whether every match contains a literal.
        before: adjacent parts that may be empty or repeat before the first literal.
        after: the same after the last literal; equal to `before` if there is none.
        adjacent: largest number of such adjacent parts anywhere.
        states: character classes once repetitions are unrolled.
    """

    is_nonempty: bool
    has_literal: bool = False
    before: int = 0
    after: int = 0
    adjacent: int = 0
    states: int = 0


def ambiguous(count: int) -> ExpressionCost:
    """Return the cost of `count` adjacent parts that may be empty or repeat."""
    return ExpressionCost(False, False, count, count, count)


def expression_cost(expr: Expr, rule: Callable[[str], ExpressionCost]) -> ExpressionCost:
    """Return the cost of an expression; `rule` returns that of a referenced rule."""
    match expr:
        case Empty():
            return ExpressionCost(False)
        case Atom(states):
            return ExpressionCost(True, not states, states=states)
        case Ref(name):
            return rule(name)
        case Seq(items):
            whole = ExpressionCost(False)
            for item in items:
                whole = _joined(whole, expression_cost(item, rule))
            return whole
        case Alt(items):
            return _alternatives([expression_cost(item, rule) for item in items])
        case Repeat(item, low, high):
            return _repeated(expression_cost(item, rule), low, high)


def _joined(a: ExpressionCost, b: ExpressionCost) -> ExpressionCost:
    return ExpressionCost(
        a.is_nonempty or b.is_nonempty,
        a.has_literal or b.has_literal,
        a.before if a.has_literal else a.before + b.before,
        b.after if b.has_literal else a.after + b.after,
        max(a.adjacent, b.adjacent, a.after + b.before),
        a.states + b.states,
    )


def _alternatives(shapes: list[ExpressionCost]) -> ExpressionCost:
    either = ExpressionCost(
        True,
        all(s.has_literal for s in shapes),
        max(s.before for s in shapes),
        max(s.after for s in shapes),
        max(s.adjacent for s in shapes),
        sum(s.states for s in shapes),
    )
    return either if all(s.is_nonempty for s in shapes) else _optional(either)


def _optional(body: ExpressionCost) -> ExpressionCost:
    before, after = body.before + 1, body.after + 1
    adjacent = max(body.adjacent, before, after)
    return ExpressionCost(False, False, before, after, adjacent, body.states)


def _repeated(body: ExpressionCost, low: int, high: int | None) -> ExpressionCost:
    states = body.states * min(high if high is not None else low + 1, COMPRESSED)
    if high == 0:
        return ExpressionCost(False)
    if not body.is_nonempty:
        again = ambiguous(body.adjacent * (high or MAX_ADJACENT + 1))
    elif body.has_literal:
        between = max(body.adjacent, body.after + body.before)
        again = ExpressionCost(True, True, body.before, body.after, between)
    else:
        count = body.adjacent * (high or 1)
        again = ExpressionCost(True, False, count, count, count)
    again = replace(again, states=states)
    if low == high or (high == 1 and low == 1):
        return again
    if low == 0 or not body.is_nonempty:
        return _optional(again)
    # A literal that repeats separates nothing: `(a{1,99}){1,99}` reads a text in many ways.
    after = again.after + 1
    return replace(again, has_literal=False, after=after, adjacent=max(again.adjacent, after))


class Reader:
    """Recursive descent over alternatives, sequences, groups and repetitions.

    Subclasses provide the tokens: `peek` returns the next one or None, `take` consumes it.
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self._depth = 0

    def peek(self) -> str | None:
        raise NotImplementedError

    def take(self) -> str:
        raise NotImplementedError

    def atom(self) -> Expr:
        """Parse a literal, a character class or a reference."""
        raise NotImplementedError

    def refuse(self, reason: str) -> FieldError:
        return FieldError(self.field, reason)

    def alternatives(self) -> Expr:
        items = [self._sequence()]
        while self.peek() == "|":
            self.take()
            items.append(self._sequence())
        return items[0] if len(items) == 1 else Alt(tuple(items))

    def _sequence(self) -> Expr:
        items: list[Expr] = []
        while (token := self.peek()) is not None and token not in ("|", ")"):
            item = self._group() if token.startswith("(") else self.atom()
            items.append(self._repetition(item))
        return items[0] if len(items) == 1 else Seq(tuple(items))

    def _group(self) -> Expr:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise self.refuse(f"nests groups deeper than {MAX_NESTING}")
        self.take()
        inner = self.alternatives()
        if self.peek() != ")":
            raise self.refuse("has an unbalanced parenthesis")
        self.take()
        self._depth -= 1
        return inner

    def _repetition(self, item: Expr) -> Expr:
        token = self.peek()
        if token is None or token[0] not in "*+?{":
            return item
        self.take()
        low, high = self._numbers(token)
        return Repeat(item, low, high)

    def _numbers(self, token: str) -> tuple[int, int | None]:
        if token[0] != "{":
            return (token[0] == "+", 1 if token[0] == "?" else None)
        first, comma, last = token[1:-1].partition(",")
        low = self._number(first)
        high = (self._number(last) if last.strip() else None) if comma else low
        if high is not None and high < low:
            raise self.refuse(f"repeats {token}, whose numbers are in the wrong order")
        return low, high

    def _number(self, digits: str) -> int:
        text = digits.strip() or "0"
        if len(text) > 9 or int(text) > MAX_REPEAT:
            raise self.refuse(f"repeats a part {text[:12]} times; the limit is {MAX_REPEAT}")
        return int(text)


_REGEX_TOKEN = re.compile(
    r"""\(\?(?:[:=!>]|<[=!]|P?<\w*>)   # the head of a group
      | \\(?:u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|u\{[0-9A-Fa-f]+\}|.|$)
      | \[\^?(?:\\.|[^\]\\])*\]?       # a character class
      | [*+?][?+]?                     # a repetition, lazy or not
      | \{\s*\d*\s*(?:,\s*\d*\s*)?\}[?+]?
      | .""",
    re.VERBOSE | re.DOTALL,
)


class _RegexReader(Reader):
    def __init__(self, field: str, pattern: str) -> None:
        super().__init__(field)
        self._tokens = _REGEX_TOKEN.findall(pattern)
        self._place = 0

    def peek(self) -> str | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def take(self) -> str:
        self._place += 1
        token: str = self._tokens[self._place - 1]
        return token

    def atom(self) -> Expr:
        token = self.take()
        if token in "^$":
            return Empty()
        is_class = token[0] in "[." or (token[0] == "\\" and token[1:2] in tuple("dDsSwWpP"))
        return Atom(int(is_class))

    def _numbers(self, token: str) -> tuple[int, int | None]:
        return super()._numbers(token.rstrip("?+") if token[0] == "{" else token)


def parse_regex(field: str, pattern: str) -> Expr:
    """Parse a regular expression.

    Raises:
        FieldError: for deep nesting, a large repetition or unbalanced parentheses.
    """
    reader = _RegexReader(field, pattern)
    expr = reader.alternatives()
    if reader.peek() is not None:
        raise FieldError(field, "has an unbalanced parenthesis")
    return expr

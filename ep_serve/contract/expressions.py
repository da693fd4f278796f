"""Regular expressions and EBNF grammars as trees, and what they cost a grammar matcher.

xgrammar 0.2.8 compiles either into rules for an Earley parser that runs over the whole vocabulary
for each sampled token, inside a step of the engine. What makes such a step slow is not the length
of an expression but parts that may be empty or repeat, without a literal between them:
`([a-z]?){64}` takes seconds for one token, `root ::= root root root | ""` does not come back.
`Shape.adjacent` counts them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ep_serve.contract.errors import FieldError

MAX_NESTING = 64
"""Groups inside each other."""
MAX_REPEAT = 10_000
"""Largest number in `{m,n}`."""
MAX_ADJACENT = 8
"""Parts that may be empty or repeat, right behind each other."""
MAX_STATES = 512
"""Character classes of a request once its repetitions are written out. Each is compiled against the
whole vocabulary: 40 to 100 ms with 152,000 tokens and two cores."""
COMPRESSED = 128
"""Longer repetitions of a part are counted instead of written out."""


@dataclass(frozen=True, slots=True)
class Empty:
    """Matches nothing: the empty string, an anchor."""


@dataclass(frozen=True, slots=True)
class Atom:
    """A literal or a character class.

    Attributes:
        states: 1 for a class, 0 for a literal.
    """

    states: int


@dataclass(frozen=True, slots=True)
class Ref:
    """The rule of this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Seq:
    """One behind the other."""

    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of them."""

    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`low` to `high` times, None for any number."""

    item: Expr
    low: int
    high: int | None


Expr = Empty | Atom | Ref | Seq | Alt | Repeat


@dataclass(frozen=True, slots=True)
class Shape:
    """What an expression costs.

    Attributes:
        solid: it never matches the empty string.
        fixed: it always holds a literal, which separates what is before from what is after.
        before: adjacent parts that may be empty or repeat before the first literal.
        after: the same after the last literal; all of them, as in `before`, if there is none.
        adjacent: the most of them anywhere.
        states: character classes once repetitions are written out.
    """

    solid: bool
    fixed: bool = False
    before: int = 0
    after: int = 0
    adjacent: int = 0
    states: int = 0


def loose(count: int) -> Shape:
    """What may be empty or repeat, `count` times as bad as one such part."""
    return Shape(False, False, count, count, count)


def shape(expr: Expr, rule: Callable[[str], Shape]) -> Shape:
    """Return the cost of an expression; `rule` gives that of a rule it refers to."""
    match expr:
        case Empty():
            return Shape(False)
        case Atom(states):
            return Shape(True, not states, states=states)
        case Ref(name):
            return rule(name)
        case Seq(items):
            whole = Shape(False)
            for item in items:
                whole = _joined(whole, shape(item, rule))
            return whole
        case Alt(items):
            return _alternatives([shape(item, rule) for item in items])
        case Repeat(item, low, high):
            return _repeated(shape(item, rule), low, high)


def _joined(a: Shape, b: Shape) -> Shape:
    return Shape(
        a.solid or b.solid,
        a.fixed or b.fixed,
        a.before if a.fixed else a.before + b.before,
        b.after if b.fixed else a.after + b.after,
        max(a.adjacent, b.adjacent, a.after + b.before),
        a.states + b.states,
    )


def _alternatives(shapes: list[Shape]) -> Shape:
    either = Shape(
        True,
        all(s.fixed for s in shapes),
        max(s.before for s in shapes),
        max(s.after for s in shapes),
        max(s.adjacent for s in shapes),
        sum(s.states for s in shapes),
    )
    return either if all(s.solid for s in shapes) else _optional(either)


def _optional(body: Shape) -> Shape:
    before, after = body.before + 1, body.after + 1
    return Shape(False, False, before, after, max(body.adjacent, before, after), body.states)


def _repeated(body: Shape, low: int, high: int | None) -> Shape:
    states = body.states * min(high if high is not None else low + 1, COMPRESSED)
    if high == 0:
        return Shape(False)
    if not body.solid:
        again = loose(body.adjacent * (high or MAX_ADJACENT + 1))
    elif body.fixed:
        between = max(body.adjacent, body.after + body.before)
        again = Shape(True, True, body.before, body.after, between)
    else:
        count = body.adjacent * (high or 1)
        again = Shape(True, False, count, count, count)
    again = replace(again, states=states)
    if low == high or (high == 1 and low == 1):
        return again
    if low == 0 or not body.solid:
        return _optional(again)
    # A literal that repeats separates nothing: `(a{1,99}){1,99}` reads a text in many ways.
    after = again.after + 1
    return replace(again, fixed=False, after=after, adjacent=max(again.adjacent, after))


class Reader:
    """Recursive descent over alternatives, sequences, groups and repetitions.

    Subclasses give the tokens: `peek` without and `take` with moving on, None at the end.
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self._depth = 0

    def peek(self) -> str | None:
        raise NotImplementedError

    def take(self) -> str:
        raise NotImplementedError

    def atom(self) -> Expr:
        """Read what is neither a group nor a repetition."""
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
    """Read a regular expression.

    Raises:
        FieldError: names the field; nesting, a repetition, a parenthesis.
    """
    reader = _RegexReader(field, pattern)
    expr = reader.alternatives()
    if reader.peek() is not None:
        raise FieldError(field, "has an unbalanced parenthesis")
    return expr

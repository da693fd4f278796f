"""Grade answers: normalized exact match, letter or text for multiple choice."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

_ARTICLES = frozenset(("a", "an", "the"))
_LEAD = re.compile(r"(?:the )?(?:(?:right|correct|best) )?(?:answer|option|choice)(?: is)?\b[\s:]*")
"""Introductory words before a letter."""
_LETTER = re.compile(r"[(\[]?([A-Za-z])(?![\w'])([)\].:,]*)\s*(.*)", re.DOTALL)
"""A single letter, its punctuation, and the rest."""


def normalise(text: str) -> str:
    """Fold case and remove punctuation, articles and extra spaces; a lone article stays."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Between letters and digits only what joins a word stays, as in "t-shirt" and "2.5".
    kept = "".join(c if c.isalnum() or c in "'-." else " " for c in folded)
    words = [word.strip("'-.") for word in kept.split()]
    words = [word for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def is_correct(got: str, right: str, options: Mapping[str, str] | None = None) -> bool:
    """Whether a model's answer is the right one.

    Args:
        got: The model's answer.
        right: The right answer; with options, its letter.
        options: {letter: text}. The answer may then be given as letter ("B", "b.", "(B)"), as text,
            or as both.
    """
    if not options:
        return normalise(got) == normalise(right)
    return chosen_option(got, options) == right


def chosen_option(got: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a model chose; None if it is not clear."""
    got = got.strip().strip("*")
    lead = _LEAD.match(got.casefold())
    found = _LETTER.match(got[lead.end() :] if lead else got)
    letter = found[1].upper() if found else ""
    if found and letter in options and not found[3]:
        return letter
    meant = [name for name, text in options.items() if normalise(text) == normalise(got)]
    if len(meant) == 1:
        return meant[0]
    if found is None or letter not in options:
        return None
    if normalise(found[3]) == normalise(options[letter]):
        return letter
    # "A dog" is a word and no choice of A; "A. A cat" chooses nothing if the cat is option B.
    contradicts = normalise(found[3]) in map(normalise, options.values())
    return letter if found[2] and not contradicts else None

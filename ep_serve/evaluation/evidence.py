"""Count which kept tokens lie in the time spans of a question's evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from ep_serve.evaluation.questions import Evidence, Span


class Placement(BaseModel):
    """Counts of AV tokens, kept ones and all of them; the share of all is what chance keeps.

    Attributes:
        kept: Tokens that survived.
        kept_then: Kept tokens in the spans of the evidence, video or audio.
        kept_evidence: Kept video tokens in its video spans, and audio tokens in its audio spans.
        full, full_then, full_evidence: The same before the reduction.
    """

    kept: int
    kept_then: int
    kept_evidence: int
    full: int
    full_then: int
    full_evidence: int


def count_placement(selection: Sequence[dict[str, Any]], evidence: Evidence) -> Placement:
    """Count tokens of the first medium of `usage.reduction.selection` by when they are.

    The time of a token is the middle of its span.
    """
    medium = selection[0]
    counts = np.zeros(6, dtype=np.int64)
    for kind, spans in (("video", evidence.video), ("audio", evidence.audio)):
        if kind not in medium or medium["type"] == "image":
            continue
        times, kept = token_times(medium[kind]), kept_mask(medium[kind])
        then, shows = _within(times, evidence.spans), _within(times, spans)
        counts += [
            *(kept.sum(), (kept & then).sum(), (kept & shows).sum()),
            *(kept.size, then.sum(), shows.sum()),
        ]
    return Placement(**dict(zip(Placement.model_fields, counts.tolist(), strict=True)))


def token_times(tokens: dict[str, Any]) -> NDArray[np.float64]:
    """(n,) seconds, the middle of each token of one kind in a selection."""
    if "grid" in tokens:
        steps, rows, columns = tokens["grid"]
        steps_each = np.repeat(np.arange(steps), rows * columns)
        return (steps_each + 0.5) * float(tokens["seconds_per_step"])
    return (np.arange(tokens["tokens"]) + 0.5) * float(tokens["seconds_per_token"])


def kept_mask(tokens: dict[str, Any]) -> NDArray[np.bool_]:
    """(n,) which tokens of one kind in a selection survived."""
    count = int(np.prod(tokens["grid"])) if "grid" in tokens else tokens["tokens"]
    mask = np.zeros(count, dtype=bool)
    mask[tokens["kept"]] = True
    return mask


def _within(times: NDArray[np.float64], spans: Iterable[Span]) -> NDArray[np.bool_]:
    inside = np.zeros(len(times), dtype=bool)
    for start, end in spans:
        inside |= (start <= times) & (times < end)
    return inside

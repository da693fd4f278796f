"""Where kept tokens lie: in the seconds that a question is about, or elsewhere."""

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
        kept_then: Those of them in the asked seconds, picture or sound.
        kept_evidence: Pictures where the answer can be seen, and sound where it can be heard.
        full, full_then, full_evidence: The same before the reduction.
    """

    kept: int
    kept_then: int
    kept_evidence: int
    full: int
    full_then: int
    full_evidence: int


def place(selection: Sequence[dict[str, Any]], evidence: Evidence) -> Placement:
    """Count tokens of the first medium of `usage.reduction.selection` by when they are.

    A token of video or sound is where the middle of its time is.
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

"""A reduction that a mock engine can report: `usage.reduction` of a clip that nobody looked at."""

from __future__ import annotations

import math
from typing import Any

STEPS, ROWS, COLUMNS = 4, 4, 6
AUDIO = 100
SECONDS_PER_STEP = 1.0
TEXT = 20
HEARD = 0.8
"""Share of the budget that goes to the sound, if the question asks for what is heard."""
SEEN = 0.2


def made_up(body: dict[str, Any]) -> dict[str, Any]:
    """What an engine would say about a clip of four seconds; the question moves the budget.

    The best patches are those near a point that goes from left to right.
    """
    video_scores = [
        _score(row - 1.5, column - 1.5 * step)
        for step in range(STEPS)
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]
    audio_scores = [_score(0, (token - 30) / 5) for token in range(AUDIO)]
    full = len(video_scores) + AUDIO
    budget = max(1, math.ceil(full * (body.get("keep_ratio") or 0.2)))
    tenant = HEARD if "hear" in _question(body) else SEEN
    audio_kept = min(AUDIO, max(round(budget * tenant), budget - len(video_scores)))
    video = {
        "grid": [STEPS, ROWS, COLUMNS],
        "seconds_per_step": SECONDS_PER_STEP,
        "kept": _best(video_scores, budget - audio_kept),
        "scores": video_scores,
    }
    audio = {
        "tokens": AUDIO,
        "seconds_per_token": 0.04,
        "kept": _best(audio_scores, audio_kept),
        "scores": audio_scores,
    }
    return {
        "keep_ratio": body.get("keep_ratio"),
        "prompt_tokens_full": full + TEXT,
        "prompt_tokens_reduced": budget + TEXT,
        "av_tokens_full": full,
        "av_tokens_kept": budget,
        "video": {"full": len(video_scores), "kept": budget - audio_kept},
        "audio": {"full": AUDIO, "kept": audio_kept},
        "image": {"full": 0, "kept": 0},
        "selection": [{"type": "video", "video": video, "audio": audio}],
    }


def _score(down: float, right: float) -> float:
    return round(2 - math.hypot(down, right), 4)


def _best(scores: list[float], count: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    return sorted(order[:count])


def _question(body: dict[str, Any]) -> str:
    content = body["messages"][-1].get("content")
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content)
    return content or ""

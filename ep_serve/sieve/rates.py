"""How a plain keep ratio is divided between sound and picture.

OmniSIFT (arXiv 2602.04804) publishes two settings, named by the share of all tokens they keep: 0.35
drops 0.4 of the sound and 0.67 of the picture, 0.25 drops 0.5 and 0.77. Both names are exact where
sound is 2 of 27 tokens, so the sound of another clip needs another pair. What the two pairs have in
common is an odds ratio: a token of sound is about three times as likely to survive as one of
picture. That ratio is kept, and the pair is chosen so that the asked share of all tokens survives.
"""

from __future__ import annotations

import math

PUBLISHED_PAIRS = {0.25: (0.5, 0.77), 0.35: (0.4, 0.67)}
"""Keep ratio: (rho_audio, rho_video), where sound is 2 of 27 tokens."""


def keep_shares(keep_ratio: float, num_audio: int, num_video: int) -> tuple[float, float]:
    """Divide a keep ratio between sound and picture.

    The shares (a, v) solve a * num_audio + v * num_video = keep_ratio * (num_audio + num_video)
    and odds(a) = c * odds(v). The odds ratio c is 3.348 up to a ratio of 0.25 and 3.045 from 0.35
    on, as in the published pairs, and linear between.

    Args:
        keep_ratio: Above 0 and at most 1.
        num_audio: Tokens of sound.
        num_video: Tokens of picture.

    Returns:
        The shares of sound and of picture to keep, each above 0 and at most 1. Of two shares
        that belong to nothing, both are the ratio.
    """
    total = num_audio + num_video
    if total == 0:
        return keep_ratio, keep_ratio
    c = _odds_ratio(keep_ratio)
    audio, video = num_audio / total, num_video / total
    # The root between 0 and 1 of x v^2 + y v - keep_ratio = 0, written without cancellation.
    x = video * (c - 1)
    y = audio * c + video - keep_ratio * (c - 1)
    root = math.sqrt(y * y + 4 * x * keep_ratio)
    v = 2 * keep_ratio / (y + root) if y > 0 else (root - y) / (2 * x)
    v = min(v, 1.0)
    return c * v / (1 + (c - 1) * v), v


def _odds_ratio(keep_ratio: float) -> float:
    (low, low_pair), (high, high_pair) = sorted(PUBLISHED_PAIRS.items())
    place = min(max((keep_ratio - low) / (high - low), 0.0), 1.0)
    return _odds_ratio_of(*low_pair) * (1 - place) + _odds_ratio_of(*high_pair) * place


def _odds_ratio_of(rho_audio: float, rho_video: float) -> float:
    return (1 - rho_audio) / rho_audio * rho_video / (1 - rho_video)

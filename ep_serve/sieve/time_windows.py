"""OmniZip's CPU side: windows of two seconds, the frames in them, and how much is kept.

Everything here is known from the layout of a prompt, before any tensor exists (OmniZip, arXiv
2511.14582, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ep_serve.layout import Kind, Layout, keep_count
from ep_serve.sieve.base import Budget, Plan
from ep_serve.sieve.frame_pairs import Ints, runs
from ep_serve.sieve.rates import keep_shares

RHO_AUDIO = 0.3
RHO_VIDEO = 0.6
ANCHOR_SHARE = 0.05
WINDOW = 50
"""Temporal positions in a window: two seconds of 25, as sound and picture alternate in a prompt."""


@dataclass(frozen=True, eq=False)
class Merge:
    """What happens to the tokens of one sound that are not salient, by their rank among them.

    Attributes:
        anchors: (c,) those that stay and take in others, at least one.
        absorbed: (m,) the others.
        video: (v,) pool indices of the picture of the same clip.
    """

    anchors: Ints
    absorbed: Ints
    video: Ints


@dataclass(frozen=True, eq=False)
class Sounds:
    """The audio tokens of a prompt; `n` of them, numbered 0 ... n - 1.

    Attributes:
        tokens: (n,) pool indices, ascending.
        medium: (n,) which sound a token belongs to, ascending from 0.
        salient: (sounds,) how many of each are kept for their saliency.
        merges: For the sounds that have anchors; ranks count through all sounds.
    """

    tokens: Ints
    medium: Ints
    salient: Ints
    merges: Sequence[Merge]

    @property
    def num_rest(self) -> int:
        """Tokens that are not salient."""
        return len(self.tokens) - int(self.salient.sum())


@dataclass(frozen=True, eq=False)
class Frames:
    """The video tokens of a prompt, by frame; `n` of them in `f` frames and `w` windows.

    Attributes:
        tokens: (n,) pool indices, ordered by frame.
        frame: (n,) the frame of each token, ascending from 0.
        sizes: (f,) tokens of each frame.
        window: (f,) the window of each frame, ascending from 0.
        previous: (f,) the frame before in its window for every second one, -1 for those that are
            looked at by themselves.
        sound: (w, 2) which of the prompt's audio tokens lie in each window: from, up to.
    """

    tokens: Ints
    frame: Ints
    sizes: Ints
    window: Ints
    previous: Ints
    sound: Ints


@dataclass(frozen=True, eq=False)
class OmniZipPlan(Plan):
    """Attributes beside `keep`.

    Attributes:
        size: AV tokens of the prompt.
        keep_video: Video tokens that stay.
        images: (n,) pool indices; they all stay.
    """

    size: int
    keep_video: int
    images: Ints
    sounds: Sounds
    frames: Frames


def plan_windows(layout: Layout, budget: Budget) -> OmniZipPlan:
    """Divide the budget between sound and picture, and each of them among media and windows.

    With rates, a sound of n tokens keeps round((1 - rho_audio) * n) salient ones and
    round(0.05 * n) anchors, and the clips together round((1 - rho_video) * n) video tokens. With a
    keep ratio, sound and picture together keep exactly `keep_count` of theirs, divided as
    `keep_shares` says. Images are kept whole on top. Where that leaves nothing, one token stays: of
    the picture if there is one, else of the longest sound.
    """
    is_av = layout.is_av
    kinds, time = layout.kinds[is_av], layout.positions[0, is_av]
    media = layout.media[is_av].astype(np.int64)
    audio, video = np.flatnonzero(kinds == Kind.AUDIO), np.flatnonzero(kinds == Kind.VIDEO)
    video = video[np.lexsort((time[video], media[video]))]

    names, medium = np.unique(media[audio], return_inverse=True)
    sizes = np.bincount(medium, minlength=len(names))
    if budget.keep_ratio is not None:
        keep_audio, keep_video = _split(budget.keep_ratio, sizes, len(video))
        anchors = np.where(keep_audio < sizes, np.minimum(_anchors(sizes), keep_audio), 0)
        salient = keep_audio - anchors
    else:
        rho_audio = RHO_AUDIO if budget.rho_audio is None else budget.rho_audio
        rho_video = RHO_VIDEO if budget.rho_video is None else budget.rho_video
        salient = np.rint((1 - rho_audio) * sizes).astype(np.int64)
        anchors = np.minimum(_anchors(sizes), sizes - salient)
        keep_video = round((1 - rho_video) * len(video))
    images = np.flatnonzero(kinds == Kind.IMAGE)
    if not (len(images) or keep_video or salient.any() or anchors.any()):
        if len(video):
            keep_video = 1
        elif len(audio):
            salient[sizes.argmax()] = 1
    pictures = [video[media[video] == name] for name in names]
    return OmniZipPlan(
        keep=int(salient.sum() + anchors.sum()) + keep_video + len(images),
        size=layout.num_av,
        keep_video=keep_video,
        images=images,
        sounds=Sounds(
            tokens=audio,
            medium=medium.astype(np.int64),
            salient=salient,
            merges=_merges(sizes - salient, anchors, pictures),
        ),
        frames=_frames(video, audio, media, time),
    )


def _anchors(sizes: Ints) -> Ints:
    anchors: Ints = np.rint(ANCHOR_SHARE * sizes).astype(np.int64)
    return anchors


def _split(keep_ratio: float, sounds: Ints, num_video: int) -> tuple[Ints, int]:
    """Audio tokens to keep of each sound, and video tokens to keep."""
    num_audio = int(sounds.sum())
    target = keep_count(num_audio + num_video, keep_ratio)
    share, _ = keep_shares(keep_ratio, num_audio, num_video)
    keep_audio = min(max(round(share * num_audio), target - num_video), num_audio, target)
    # Whole numbers of a running sum, so that the parts add up.
    ends = np.cumsum(sounds) * keep_audio // max(num_audio, 1)
    return np.diff(ends, prepend=0), target - keep_audio


def _merges(rest: Ints, anchors: Ints, pictures: Sequence[Ints]) -> list[Merge]:
    """Every step-th token of a sound's rest is an anchor, until there are enough."""
    merges = []
    begins = np.cumsum(rest) - rest
    for begin, size, count, video in zip(begins, rest, anchors, pictures, strict=True):
        if count:
            rank = np.arange(size)
            step = size // count
            is_anchor = (rank % step == 0) & (rank // step < count)
            merges.append(Merge(begin + rank[is_anchor], begin + rank[~is_anchor], video))
    return merges


def _frames(video: Ints, audio: Ints, media: Ints, time: Ints) -> Frames:
    starts = np.full(media.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(starts, media, time)
    slot = (time - starts[media]) // WINDOW
    # One number for each window of each medium, ascending along a medium and over the media.
    slot += media * (slot.max(initial=0) + 1)

    begins, sizes = runs(media[video], time[video])
    frame_slot = slot[video[begins]]
    windows, window = np.unique(frame_slot, return_inverse=True)
    place = np.arange(len(window)) - np.searchsorted(window, window)
    before = np.arange(len(window)) - 1
    same_size = np.diff(sizes, prepend=0) == 0
    return Frames(
        tokens=video,
        frame=np.repeat(np.arange(len(sizes)), sizes),
        sizes=sizes,
        window=window.astype(np.int64),
        previous=np.where((place % 2 == 1) & same_size, before, -1),
        sound=np.stack(
            [np.searchsorted(slot[audio], windows, side=side) for side in ("left", "right")], axis=1
        ),
    )

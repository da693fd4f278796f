"""OmniSIFT's CPU side: which frames form pairs, which sound belongs to them, how much they keep.

Everything here is known from the layout of a prompt, before any tensor exists (OmniSIFT, arXiv
2602.04804, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep_serve.layout import Kind, Layout, keep_count
from ep_serve.sieve.rates import keep_shares

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PairGroup:
    """All pairs of a prompt that are of one shape; the numbers are pool indices.

    Attributes:
        first: (P, n) tokens of each pair's first frame.
        second: (P, m) tokens of its second frame; m is 0 after the last frame of an odd number.
        sound: (P, a) audio tokens from the pair's start up to the next pair's.
    """

    first: Ints
    second: Ints
    sound: Ints

    @property
    def frames_match(self) -> bool:
        """The second frame can be compared with the first, place by place."""
        return self.second.shape == self.first.shape

    def dropped(self, rho_video: Floats) -> Ints:
        """How many tokens of a first frame go: (c,) for (c,) rates, cut as int() does."""
        dropped: Ints = np.floor(self.first.shape[1] * rho_video).astype(np.int64)
        return dropped

    def video_kept(self, rho_video: Floats) -> Ints:
        """How many video tokens of one pair stay, (c,) for (c,) rates."""
        frames = 2 if self.frames_match else 1
        kept: Ints = self.first.shape[1] + self.second.shape[1] - self.dropped(rho_video) * frames
        return kept

    def sound_kept(self, rho_audio: Floats, rho_video: float) -> Ints:
        """How many audio tokens of one pair stay, (c,) for (c,) rates."""
        if self.video_kept(np.array([rho_video]))[0] == 0:
            return np.full(rho_audio.shape, self.sound.shape[1])
        return thinned(self.sound.shape[1], rho_audio)


@dataclass(frozen=True, eq=False)
class FramePairs:
    """The pool of a prompt as OmniSIFT sees it.

    Attributes:
        groups: The pairs, one group for each shape that occurs.
        lone_sounds: For each medium whose sound has no picture: (n,) pool indices.
        images: (n,) pool indices.
    """

    groups: Sequence[PairGroup]
    lone_sounds: Sequence[Ints]
    images: Ints

    @property
    def num_video(self) -> int:
        return sum(group.first.size + group.second.size for group in self.groups)

    @property
    def num_audio(self) -> int:
        return sum(group.sound.size for group in self.groups) + sum(map(len, self.lone_sounds))

    def video_kept(self, rho_video: Floats) -> Ints:
        """Video tokens that stay, (c,) for (c,) rates."""
        kept = np.zeros(rho_video.shape, dtype=np.int64)
        for group in self.groups:
            kept += len(group.first) * group.video_kept(rho_video)
        return kept

    def audio_kept(self, rho_audio: Floats, rho_video: float) -> Ints:
        """Audio tokens that stay, (c,) for (c,) rates."""
        kept = np.zeros(rho_audio.shape, dtype=np.int64)
        for group in self.groups:
            kept += len(group.first) * group.sound_kept(rho_audio, rho_video)
        for sound in self.lone_sounds:
            kept += thinned(len(sound), rho_audio)
        return kept

    def rates_for(self, keep_ratio: float) -> tuple[float, float]:
        """The rates (rho_audio, rho_video) that come nearest to a keep ratio.

        The ratio counts sound and the pictures of clips; images are kept whole on top. It is
        divided as `keep_shares` says, first among frames: a step of `rho_video` moves every pair
        by two tokens. Sound then makes up for what that rounding left. So the budget is met to
        within one token per pair of frames (a sound without a picture counts as a pair), unless
        less than that is asked for: one token of every frame stays.
        """
        target = keep_count(self.num_audio + self.num_video, keep_ratio)
        audio_share, _ = keep_shares(keep_ratio, self.num_audio, self.num_video)
        steps = _steps([group.first.shape[1] for group in self.groups])
        steps = steps[steps < 1]
        missed: Floats = np.abs(self.video_kept(steps) - (target - audio_share * self.num_audio))
        rho_video = float(steps[missed.argmin()])
        video = int(self.video_kept(np.array([rho_video]))[0])
        sounds = [group.sound.shape[1] for group in self.groups]
        steps = _steps([*sounds, *map(len, self.lone_sounds)])
        missed = np.abs(self.audio_kept(steps, rho_video) - (target - video)).astype(np.float64)
        return float(steps[missed.argmin()]), rho_video


def thinned(size: int, rho: Floats) -> Ints:
    """What a group of `size` audio tokens keeps, (c,) for (c,) rates; a single one always stays."""
    if size <= 1:
        return np.full(rho.shape, size)
    return size - np.floor(size * rho).astype(np.int64)


def find_pairs(layout: Layout) -> FramePairs:
    """Pair the frames of each clip and give them their sound.

    A frame is a distinct T position of a clip's picture. Sound belongs to the pair with the latest
    start that is not after it, so the last pair takes all that follows.

    The authors' code takes all clips and sounds of a prompt for one: there the last frame of a clip
    can pair with the first of the next, and a sound of its own falls to the clip before it.

    Args:
        layout: Only its AV tokens count.
    """
    is_av = layout.is_av
    kinds, time = layout.kinds[is_av], layout.positions[0, is_av]
    clip = layout.media[is_av].astype(np.int64)

    video = np.flatnonzero(kinds == Kind.VIDEO)
    video = video[np.lexsort((time[video], clip[video]))]
    begins, sizes = runs(clip[video], time[video])
    frame_clip, frame_time = clip[video[begins]], time[video[begins]]
    place_in_clip = np.arange(len(begins)) - np.searchsorted(frame_clip, frame_clip)
    firsts = np.flatnonzero(place_in_clip % 2 == 0)
    seconds = np.minimum(firsts + 1, len(begins) - 1)
    second_sizes = np.where(place_in_clip[seconds] % 2 == 1, sizes[seconds], 0)

    audio = np.flatnonzero(kinds == Kind.AUDIO)
    pair = _pair_of_sound(clip[audio], time[audio], frame_clip[firsts], frame_time[firsts])
    lone = audio[pair < 0]
    audio, pair = audio[pair >= 0], pair[pair >= 0]
    audio = audio[np.argsort(pair, kind="stable")]
    sound_sizes = np.bincount(pair, minlength=len(firsts))
    sound_begins = np.cumsum(sound_sizes) - sound_sizes

    shapes = np.stack([sizes[firsts], second_sizes, sound_sizes], axis=1)
    groups = []
    for shape in np.unique(shapes, axis=0):
        of_shape = np.flatnonzero((shapes == shape).all(axis=1))
        groups.append(
            PairGroup(
                first=_take(video, begins[firsts[of_shape]], shape[0]),
                second=_take(video, begins[seconds[of_shape]], shape[1]),
                sound=_take(audio, sound_begins[of_shape], shape[2]),
            )
        )
    lone_sounds = [lone[clip[lone] == medium] for medium in np.unique(clip[lone])]
    return FramePairs(groups, lone_sounds, np.flatnonzero(kinds == Kind.IMAGE))


def runs(clip: Ints, time: Ints) -> tuple[Ints, Ints]:
    """Where each run of equal (clip, time) begins, and how long it is."""
    changes = (np.diff(clip) != 0) | (np.diff(time) != 0)
    begins = np.flatnonzero(np.concatenate([np.ones(min(len(clip), 1), dtype=bool), changes]))
    return begins, np.diff(begins, append=len(clip))


def _pair_of_sound(clip: Ints, time: Ints, pair_clip: Ints, pair_time: Ints) -> Ints:
    """The pair that each audio token belongs to, -1 where its clip has none that early."""
    if not len(pair_clip):
        return np.full(clip.shape, -1)
    span = 1 + max(int(time.max(initial=0)), int(pair_time.max()))
    pair = np.searchsorted(pair_clip * span + pair_time, clip * span + time, side="right") - 1
    return np.where((pair >= 0) & (pair_clip[pair] == clip), pair, -1)


def _take(tokens: Ints, begins: Ints, size: int) -> Ints:
    """`size` tokens from each beginning on: (len(begins), size)."""
    return tokens[begins[:, None] + np.arange(size)]


def _steps(sizes: Sequence[int]) -> Floats:
    """Every rate at which one of `sizes` tokens more is dropped, ascending."""
    parts = [np.zeros(1)]
    for size in set(sizes):
        rates = np.arange(1, size + 1) / max(size, 1)
        # k / n is rounded: the next float up makes int(n * rate) k and not k - 1.
        parts.append(np.minimum(np.nextafter(rates, 2), 1))
    return np.unique(np.concatenate(parts))

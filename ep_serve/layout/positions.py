"""Positions of one medium's tokens, relative to where the medium starts.

The rules are those of Qwen2.5-Omni (`get_rope_index` in transformers'
`models/qwen2_5_omni/modeling_qwen2_5_omni.py`), with whole arrays instead of loops over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep_serve.layout.kinds import Kind
from ep_serve.layout.media import Grid, Image, MediumShape, Video, video_tokens
from ep_serve.layout.tokens import MediaTokens

LATEST_POSITION = 2**24
"""Temporal positions are computed in float32, which counts whole numbers up to here."""


@dataclass(frozen=True, slots=True)
class Block:
    """The tokens of one medium, in prompt order.

    Attributes:
        kinds: (n,) int8, a `Kind` each.
        positions: (3, n) int64, rows T, H, W, counted from the medium's start.
        end: Where the prompt goes on, counted from the medium's start.
    """

    kinds: npt.NDArray[np.int8]
    positions: npt.NDArray[np.int64]
    end: int


def medium_block(medium: MediumShape, tokens: MediaTokens) -> Block:
    """Lay out one medium.

    Raises:
        ValueError: The grid is not divisible by the merge size, or the clip is too long to count.
    """
    if isinstance(medium, Video):
        picture = _vision(medium.grid_thw, medium.second_per_grid, tokens)
        if medium.audio_tokens:
            return _alternating(medium, picture, _count_up(medium.audio_tokens), tokens)
        positions = picture
    elif isinstance(medium, Image):
        positions = _vision(medium.grid_thw, 1.0, tokens)
    else:
        positions = _count_up(medium.tokens)
    kinds = np.full(positions.shape[1], medium.kind, dtype=np.int8)
    return Block(kinds, positions, int(positions.max()) + 1)


def _count_up(n: int) -> npt.NDArray[np.int64]:
    """Return positions (3, n) that count up, the same on all rows."""
    return np.broadcast_to(np.arange(n, dtype=np.int64), (3, n))


def _vision(grid: Grid, second_per_grid: float, tokens: MediaTokens) -> npt.NDArray[np.int64]:
    """Return positions (3, n): T in position ids, H and W in merged rows and columns."""
    video_tokens(grid, tokens.spatial_merge_size)  # refuses grids that cannot be merged
    steps, height, width = grid
    latest = steps * second_per_grid * tokens.position_id_per_seconds
    if latest > LATEST_POSITION:
        raise ValueError(
            f"{steps} steps of second_per_grid {second_per_grid!r} reach temporal position "
            f"{latest:g}; the limit is {LATEST_POSITION}"
        )
    # float32, rounded after each product and cut: another precision moves some frames by one.
    seconds = np.arange(steps, dtype=np.float32) * np.float32(second_per_grid)
    frames = seconds * np.float32(tokens.position_id_per_seconds)
    rows = np.arange(height // tokens.spatial_merge_size, dtype=np.int64)
    columns = np.arange(width // tokens.spatial_merge_size, dtype=np.int64)
    cells = np.meshgrid(frames.astype(np.int64), rows, columns, indexing="ij")
    return np.stack([axis.ravel() for axis in cells])


def _alternating(
    clip: Video,
    picture: npt.NDArray[np.int64],
    sound: npt.NDArray[np.int64],
    tokens: MediaTokens,
) -> Block:
    """Alternate picture and sound, chunk by chunk, each with its own positions.

    The prompt goes on after the chunk that stands last, not after the clip's largest position:
    where the sound ends in the last chunk but before the picture, text lies inside the picture's
    time.
    """
    span = tokens.position_id_per_seconds * tokens.seconds_per_chunk
    chunks = np.concatenate(
        [_picture_chunks(clip, tokens, span), np.arange(sound.shape[1]) // span]
    )
    kinds = np.repeat(
        np.array([Kind.VIDEO, Kind.AUDIO], dtype=np.int8), [picture.shape[1], sound.shape[1]]
    )
    order = np.lexsort((kinds, chunks))  # stable, and VIDEO sorts before AUDIO
    chunks, kinds = chunks[order], kinds[order]
    positions = np.concatenate([picture, sound], axis=1)[:, order]
    last = (chunks == chunks[-1]) & (kinds == kinds[-1])
    return Block(kinds, positions, int(positions[:, last].max()) + 1)


def _picture_chunks(clip: Video, tokens: MediaTokens, span: int) -> npt.NDArray[np.int64]:
    """Number the chunks: (n,) int64, one number for each video token of a clip with sound.

    Times are float64 and uncut here, as in the processor that puts the tokens in order, where
    `_vision` uses float32. At some frame rates the two fall on different sides of a chunk's border
    for a frame exactly on it (1.98 frames a second, for one). The authors' positions are then
    shifted against their tokens; here every token keeps the position of its own frame.
    """
    steps = clip.grid_thw[0]
    per_step = video_tokens(clip.grid_thw, tokens.spatial_merge_size) // steps
    size = steps * per_step
    times = np.arange(steps) * clip.second_per_grid * tokens.position_id_per_seconds
    chunk = np.arange(1, min(int(times[-1]) // span, size) + 1)
    begins = np.searchsorted(times, chunk * span) * per_step
    # A chunk takes one token at least, so steps longer than a chunk fill the chunks they jump over
    # with single tokens.
    begins = np.maximum.accumulate(begins - chunk) + chunk
    return np.searchsorted(begins, np.arange(size), side="right")

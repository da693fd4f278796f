"""Vision and audio towers, with a memory of what they computed.

A second question about a clip asks for the same tower outputs: they are kept on the device, by the
hash of their content, up to a bound in bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ep_serve.engine.item import FusedItem
    from ep_serve.engine.statistics import Snapshot

MAX_PATCHES = 65_536
"""Patches in one pass of the vision tower (16,384 tokens), to bound its activations.

A long video may be cut between frame pairs: attention in the tower stays inside one of them.
"""

Key = tuple[str, bytes]


class TowerCache:
    """Outputs of the towers, least recently used out first, at most `capacity` bytes."""

    def __init__(self, capacity: int, totals: Snapshot) -> None:
        self.capacity = capacity
        self._totals = totals
        self._outputs: OrderedDict[Key, torch.Tensor] = OrderedDict()

    def get(self, key: Key) -> torch.Tensor | None:
        output = self._outputs.get(key)
        if output is None:
            self._totals.tower_misses += 1
            return None
        self._outputs.move_to_end(key)
        self._totals.tower_hits += 1
        return output

    def put(self, key: Key, output: torch.Tensor) -> None:
        if output.nbytes > self.capacity:
            return
        # An output is a slice of its batch's: without a copy it would hold the whole batch.
        self._outputs[key] = output.clone()
        self._totals.tower_cache_bytes += output.nbytes
        while self._totals.tower_cache_bytes > self.capacity:
            _, evicted = self._outputs.popitem(last=False)
            self._totals.tower_cache_bytes -= evicted.nbytes

    def clear(self) -> None:
        self._outputs.clear()
        self._totals.tower_cache_bytes = 0


@dataclass(frozen=True)
class _Piece:
    """Part of a medium that goes through the vision tower at once."""

    key: Key
    pixels: torch.Tensor
    grid: tuple[int, int, int]


class Towers:
    """Runs the towers of a model for what the cache does not hold."""

    def __init__(self, model: Any, cache: TowerCache) -> None:
        self._model = model
        self.cache = cache

    def encode(self, items: Sequence[FusedItem]) -> list[tuple[torch.Tensor, ...]]:
        """For each item: its tower outputs in prompt order, first all vision, then all audio.

        Each output is (n, D) on the device. Equal media of a batch are computed once.
        """
        found: dict[Key, torch.Tensor] = {}
        vision: dict[Key, tuple[torch.Tensor, tuple[int, int, int]]] = {}
        sounds: dict[Key, torch.Tensor] = {}
        for item in items:
            for key, pixels, grid in _vision_inputs(item):
                if not self._known(key, found) and key not in vision:
                    vision[key] = (pixels, grid)
            for key, mel in _audio_inputs(item):
                if not self._known(key, found) and key not in sounds:
                    sounds[key] = mel
        found.update(self._run_vision(vision))
        found.update(self._run_audio(sounds))
        return [
            (
                *(found[("vision", key)] for key in item.vision_keys),
                *(found[("audio", key)] for key in item.audio_keys),
            )
            for item in items
        ]

    def _known(self, key: Key, found: dict[Key, torch.Tensor]) -> bool:
        if key in found:
            return True
        output = self.cache.get(key)
        if output is not None:
            found[key] = output
        return output is not None

    def _run_vision(
        self, media: dict[Key, tuple[torch.Tensor, tuple[int, int, int]]]
    ) -> dict[Key, torch.Tensor]:
        parts: dict[Key, list[torch.Tensor]] = {key: [] for key in media}
        pieces = [p for key, (pixels, grid) in media.items() for p in _pieces(key, pixels, grid)]
        for batch in _batches(pieces):
            outputs = self._model._process_video_input(
                {
                    "type": "pixel_values_videos",
                    "pixel_values_videos": torch.cat([p.pixels for p in batch])
                    if len(batch) > 1
                    else batch[0].pixels,
                    "video_grid_thw": torch.tensor([p.grid for p in batch]),
                }
            )
            for piece, output in zip(batch, outputs, strict=True):
                parts[piece.key].append(output)
        return self._remember(
            {key: torch.cat(outs) if len(outs) > 1 else outs[0] for key, outs in parts.items()}
        )

    def _run_audio(self, media: dict[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        if not media:
            return {}
        spectra = list(media.values())
        outputs = self._model._process_audio_input(
            {
                "input_features": torch.cat(spectra, dim=1),
                "audio_feature_lengths": torch.tensor([mel.shape[1] for mel in spectra]),
            }
        )
        return self._remember(dict(zip(media, outputs, strict=True)))

    def _remember(self, outputs: dict[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        for key, output in outputs.items():
            self.cache.put(key, output)
        return outputs


def _vision_inputs(
    item: FusedItem,
) -> Iterator[tuple[Key, torch.Tensor, tuple[int, int, int]]]:
    start = 0
    for key, row in zip(item.vision_keys, item.vision_grids.tolist(), strict=True):
        grid = (row[0], row[1], row[2])
        end = start + grid[0] * grid[1] * grid[2]
        yield ("vision", key), item.pixel_values[start:end], grid
        start = end


def _audio_inputs(item: FusedItem) -> Iterator[tuple[Key, torch.Tensor]]:
    start = 0
    for key, frames in zip(item.audio_keys, item.audio_frames.tolist(), strict=True):
        yield ("audio", key), item.mel[:, start : start + frames]
        start += frames


def _pieces(key: Key, pixels: torch.Tensor, grid: tuple[int, int, int]) -> Iterator[_Piece]:
    time, height, width = grid
    step = max(1, MAX_PATCHES // (height * width))
    for start in range(0, time, step):
        frames = min(step, time - start)
        first = start * height * width
        yield _Piece(key, pixels[first : first + frames * height * width], (frames, height, width))


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.pixels) > MAX_PATCHES:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.pixels)
    if batch:
        yield batch

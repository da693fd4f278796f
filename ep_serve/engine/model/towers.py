"""Vision and audio towers, with a cache of their outputs.

A second question about a clip asks for the same tower outputs: they are kept on the device, by the
hash of their content, up to a bound in bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ep_serve.sieve.saliency import windowed_saliency

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ep_serve.engine.input.fused_item import FusedItem
    from ep_serve.engine.model.statistics import Totals

MAX_PATCHES = 65_536
"""Patches in one pass of the vision tower (16,384 tokens), to bound its activations.

A long video may be cut between frame pairs: attention in the tower stays inside one of them.
"""

Key = tuple[str, bytes]
Grid = tuple[int, int, int]


class Output(NamedTuple):
    """The output of a tower for one medium."""

    embeddings: torch.Tensor
    """(n, D)"""
    saliency: torch.Tensor | None = None
    """(n,) float32 of a sound, for sieves with `uses_saliency`."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)


@dataclass(frozen=True)
class ItemOutputs:
    """The outputs of the towers for one item, in prompt order."""

    vision: list[Output]
    audio: list[Output]


class TowerCache:
    """Outputs of the towers, least recently used out first, at most `capacity` bytes."""

    def __init__(self, capacity: int, totals: Totals) -> None:
        self.capacity = capacity
        self._totals = totals
        self._outputs: OrderedDict[Key, Output] = OrderedDict()

    def get(self, key: Key) -> Output | None:
        output = self._outputs.get(key)
        if output is None:
            self._totals.tower_misses += 1
            return None
        self._outputs.move_to_end(key)
        self._totals.tower_hits += 1
        return output

    def put(self, key: Key, output: Output) -> None:
        if output.nbytes > self.capacity:
            return
        # An output is a slice of its batch's: without a copy it would hold the whole batch.
        saliency = None if output.saliency is None else output.saliency.clone()
        own = Output(output.embeddings.clone(), saliency)
        self._outputs[key] = own
        self._totals.tower_cache_bytes += own.nbytes
        while self._totals.tower_cache_bytes > self.capacity:
            _, evicted = self._outputs.popitem(last=False)
            self._totals.tower_cache_bytes -= evicted.nbytes

    def clear(self) -> None:
        self._outputs.clear()
        self._totals.tower_cache_bytes = 0


class AttentionHook:
    """Captures queries and keys of the audio tower's last attention layer, for saliency."""

    def __init__(self, audio_tower: Any) -> None:
        self._captured: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None
        attention = audio_tower.layers[-1].self_attn
        attention.register_forward_pre_hook(self._capture, with_kwargs=True)

    def _capture(self, attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        query, key = (
            project(states).unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj)
        )
        self._captured = query, key, kwargs["cu_seqlens"].tolist()

    def saliency(self, mel_frames: Sequence[int], tokens: Sequence[int]) -> list[torch.Tensor]:
        """(n,) float32 for each sound of the pass that just ended."""
        assert self._captured is not None, "the audio tower has run"
        query, key, borders = self._captured
        self._captured = None
        frames = [(mel - 1) // 2 + 1 for mel in mel_frames]  # the tower's convolution halves them
        return list(windowed_saliency(query, key, borders, frames).split(list(tokens)))


@dataclass(frozen=True)
class _Piece:
    """Part of a medium that goes through the vision tower at once."""

    key: Key
    pixels: torch.Tensor
    grid: Grid


class Towers:
    """Runs the towers of a model for media that are not cached."""

    def __init__(self, model: Any, cache: TowerCache, *, hooks_attention: bool = False) -> None:
        self._model = model
        self.cache = cache
        self._attention_hook = AttentionHook(model.audio_tower) if hooks_attention else None

    def encode(self, items: Sequence[FusedItem]) -> list[ItemOutputs]:
        """The outputs for each item, on the device. Equal media of a batch are computed once."""
        found: dict[Key, Output] = {}
        vision: dict[Key, tuple[torch.Tensor, Grid]] = {}
        sounds: dict[Key, torch.Tensor] = {}
        for item in items:
            for key, pixels, grid in _vision_inputs(item):
                if key not in vision and not self._known(key, found):
                    vision[key] = (pixels, grid)
            for key, mel in _audio_inputs(item):
                if key not in sounds and not self._known(key, found):
                    sounds[key] = mel
        for key, output in (*self._run_vision(vision), *self._run_audio(sounds)):
            self.cache.put(key, output)
            found[key] = output
        return [
            ItemOutputs(
                vision=[found[("vision", key)] for key in item.vision_keys],
                audio=[found[("audio", key)] for key in item.audio_keys],
            )
            for item in items
        ]

    def _known(self, key: Key, found: dict[Key, Output]) -> bool:
        if key in found:
            return True
        output = self.cache.get(key)
        if output is not None:
            found[key] = output
        return output is not None

    def _run_vision(
        self, media: dict[Key, tuple[torch.Tensor, Grid]]
    ) -> Iterator[tuple[Key, Output]]:
        parts: dict[Key, list[torch.Tensor]] = {key: [] for key in media}
        pieces = [p for key, (pixels, grid) in media.items() for p in _pieces(key, pixels, grid)]
        for batch in _batches(pieces):
            outputs = self._model._process_video_input(
                {
                    "type": "pixel_values_videos",
                    "pixel_values_videos": _join([p.pixels for p in batch]),
                    "video_grid_thw": torch.tensor([p.grid for p in batch]),
                }
            )
            for piece, output in zip(batch, outputs, strict=True):
                parts[piece.key].append(output)
        for key, outputs in parts.items():
            yield key, Output(_join(outputs))

    def _run_audio(self, media: dict[Key, torch.Tensor]) -> Iterator[tuple[Key, Output]]:
        if not media:
            return
        spectra = list(media.values())
        frames = [mel.shape[1] for mel in spectra]
        outputs = self._model._process_audio_input(
            {
                "input_features": torch.cat(spectra, dim=1),
                "audio_feature_lengths": torch.tensor(frames),
            }
        )
        saliency: Sequence[torch.Tensor | None] = [None] * len(outputs)
        if self._attention_hook is not None:
            saliency = self._attention_hook.saliency(frames, [len(output) for output in outputs])
        for key, output, received in zip(media, outputs, saliency, strict=True):
            yield key, Output(output, received)


def _vision_inputs(item: FusedItem) -> Iterator[tuple[Key, torch.Tensor, Grid]]:
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


def _pieces(key: Key, pixels: torch.Tensor, grid: Grid) -> Iterator[_Piece]:
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


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]

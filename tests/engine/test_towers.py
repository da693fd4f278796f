from __future__ import annotations

from typing import Any

import pytest
import torch

from ep_serve.engine.input.fused_item import MEL_BINS, PATCH_VALUES, FusedItem
from ep_serve.engine.model import towers as module
from ep_serve.engine.model.statistics import Totals
from ep_serve.engine.model.towers import TowerCache, Towers
from ep_serve.sieve import Budget

WIDTH = 4


class FakeModel:
    """Towers that say what they were given: each token is the mean of its patches."""

    def __init__(self) -> None:
        self.vision_passes: list[int] = []
        self.audio_passes: list[int] = []

    def _process_video_input(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        pixels, grids = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        self.vision_passes.append(len(pixels))
        sizes = grids.prod(-1).tolist()
        return tuple(
            part.mean(1).reshape(-1, 4).mean(1, keepdim=True).expand(-1, WIDTH)
            for part in pixels.split(sizes)
        )

    def _process_audio_input(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        lengths = inputs["audio_feature_lengths"].tolist()
        self.audio_passes.append(len(lengths))
        parts = inputs["input_features"].split(lengths, dim=1)
        return tuple(part.mean(0)[::4, None].expand(-1, WIDTH) for part in parts)


def item(name: int, grids: list[tuple[int, int, int]], frames: list[int]) -> FusedItem:
    """A request whose media are named by its number and their place."""
    patches = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator().manual_seed(name)
    return FusedItem(
        key=bytes([name]) * 32,
        token_ids=torch.empty(0),
        kinds=torch.empty(0),
        media=torch.empty(0),
        positions=torch.empty(3, 0),
        budget=Budget(1.0),
        return_selection=False,
        keep=0,
        start=0,
        after=0,
        tail=0,
        delta=0,
        vision_keys=[bytes([name, i]) for i in range(len(grids))],
        vision_grids=torch.tensor(grids).reshape(-1, 3),
        audio_keys=[bytes([name, i]) for i in range(len(frames))],
        audio_frames=torch.tensor(frames, dtype=torch.int64),
        pixel_values=torch.randn(patches, PATCH_VALUES, generator=generator),
        mel=torch.randn(MEL_BINS, sum(frames), generator=generator),
    )


def make(capacity: int = 1 << 20) -> tuple[FakeModel, Towers, Totals]:
    model, totals = FakeModel(), Totals()
    return model, Towers(model, TowerCache(capacity, totals)), totals


def test_media_of_a_batch_go_through_each_tower_once() -> None:
    model, towers, totals = make()
    batch = [item(1, [(2, 4, 4), (1, 2, 2)], [8]), item(2, [(1, 4, 4)], [12, 4])]
    outputs = towers.encode(batch)
    sizes = [[len(o.embeddings) for o in (*out.vision, *out.audio)] for out in outputs]
    assert sizes == [[8, 1, 2], [4, 3, 1]]
    assert (model.vision_passes, model.audio_passes) == ([52], [3])
    assert totals.tower_misses == 6


def test_equal_media_of_a_batch_are_computed_once() -> None:
    model, towers, _ = make()
    towers.encode([item(1, [(2, 4, 4)], [8])] * 3)
    assert (model.vision_passes, model.audio_passes) == ([32], [1])


def test_what_was_computed_is_remembered() -> None:
    model, towers, totals = make()
    first = towers.encode([item(1, [(2, 4, 4)], [8])])
    again = towers.encode([item(1, [(2, 4, 4)], [8])])
    for kind in ("vision", "audio"):
        (a,), (b,) = getattr(first[0], kind), getattr(again[0], kind)
        assert torch.equal(a.embeddings, b.embeddings)
    assert (len(model.vision_passes), len(model.audio_passes)) == (1, 1)
    assert (totals.tower_hits, totals.tower_misses) == (2, 2)


def test_the_memory_is_bounded_and_forgets_the_oldest() -> None:
    nbytes = 8 * WIDTH * 4
    model, towers, totals = make(capacity=2 * nbytes)
    for name in (1, 2, 1, 3):  # 2 is the least recently used when 3 comes
        towers.encode([item(name, [(2, 4, 4)], [])])
    assert totals.tower_cache_bytes == 2 * nbytes
    passes = len(model.vision_passes)
    towers.encode([item(1, [(2, 4, 4)], [])])
    assert len(model.vision_passes) == passes
    towers.encode([item(2, [(2, 4, 4)], [])])
    assert len(model.vision_passes) == passes + 1


def test_a_long_video_goes_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole, _ = make()
    expected = whole.encode([item(1, [(7, 4, 4)], [])])
    monkeypatch.setattr(module, "MAX_PATCHES", 40)  # two frame pairs at once
    model, towers, _ = make()
    found = towers.encode([item(1, [(7, 4, 4)], [])])
    assert torch.equal(found[0].vision[0].embeddings, expected[0].vision[0].embeddings)
    assert model.vision_passes == [32, 32, 32, 16]

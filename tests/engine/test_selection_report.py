from __future__ import annotations

import torch

from ep_serve.engine import statistics
from ep_serve.engine.selection_report import PoolRecord, describe
from ep_serve.engine.statistics import WorkerStatistics
from ep_serve.layout import Audio, Image, Kind, Medium, Video

V, A, I = Kind.VIDEO, Kind.AUDIO, Kind.IMAGE  # noqa: E741


def record(kinds: list[Kind], media: list[int], kept: list[int], scored: bool = True) -> PoolRecord:
    scores = torch.arange(len(kinds)) / 2 if scored else None
    return PoolRecord(
        torch.tensor(kinds, dtype=torch.int8),
        torch.tensor(media, dtype=torch.int32),
        torch.tensor(kept),
        scores,
    )


def test_picture_and_sound_of_a_clip_are_told_apart() -> None:
    clip = Video((2, 2, 4), second_per_grid=1.0, audio_tokens=2)
    pool = record([V, V, A, V, V, A], [0] * 6, kept=[1, 2, 4])
    (found,) = describe([clip], pool.as_lists())
    assert found == {
        "type": "video",
        "video": {
            "grid": [2, 1, 2],
            "seconds_per_step": 1.0,
            "kept": [1, 3],
            "scores": [0.0, 0.5, 1.5, 2.0],
        },
        "audio": {"tokens": 2, "seconds_per_token": 0.04, "kept": [0], "scores": [1.0, 2.5]},
    }


def test_media_are_told_apart() -> None:
    shapes: list[Medium] = [Audio(2), Image((1, 4, 2)), Video((1, 2, 2), second_per_grid=1.0)]
    pool = record([A, A, I, I, V], [0, 0, 1, 1, 2], kept=[1, 2, 3], scored=False)
    sound, image, clip = describe(shapes, pool.as_lists())
    assert sound["audio"]["kept"] == [1]
    assert "video" not in sound
    assert image["video"] == {
        "grid": [1, 2, 1],
        "seconds_per_step": None,
        "kept": [0, 1],
        "scores": None,
    }
    assert clip["video"]["kept"] == []
    assert "audio" not in clip


def test_a_selection_is_remembered_for_a_while() -> None:
    counted = WorkerStatistics()
    for number in range(statistics.REMEMBERED_SELECTIONS + 1):
        counted.record_selection(number.to_bytes(2, "big"), record([V], [0], kept=[0]))
    assert counted.selection((0).to_bytes(2, "big")) is None
    assert counted.selection((1).to_bytes(2, "big")) is not None

from __future__ import annotations

import numpy as np

from ep_serve.engine.input.selection_report import PoolShape, describe
from ep_serve.layout import Audio, Image, Kind, MediumShape, Video

V, A, I = Kind.VIDEO, Kind.AUDIO, Kind.IMAGE  # noqa: E741


def pool(shapes: list[MediumShape], kinds: list[Kind], media: list[int]) -> PoolShape:
    return PoolShape(shapes, np.array(kinds, dtype=np.int8), np.array(media, dtype=np.int32))


def places(*kept: int) -> np.ndarray:
    return np.array(kept, dtype=np.int32)


def test_video_and_audio_of_a_clip_are_separate_media() -> None:
    clip = Video((2, 2, 4), second_per_grid=1.0, audio_tokens=2)
    whole = pool([clip], [V, V, A, V, V, A], [0] * 6)
    (found,) = describe(whole, places(1, 2, 4), np.arange(0, 3, 0.5, dtype=np.float32))
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


def test_media_are_separate() -> None:
    shapes: list[MediumShape] = [Audio(2), Image((1, 4, 2)), Video((1, 2, 2), second_per_grid=1.0)]
    whole = pool(shapes, [A, A, I, I, V], [0, 0, 1, 1, 2])
    sound, image, clip = describe(whole, places(1, 2, 3), None)
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

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_serve.scenes.pictures import draw
from ep_serve.scenes.scene import MIN_SHARED_SLOTS, Scene, Sight, Sound, make_scene
from ep_serve.scenes.sounds import SAMPLE_RATE, synthesize
from ep_serve.training.data.clips import make_clip
from ep_serve.training.data.labels import label_seconds, label_tokens

BOUNDS = (9 * 28 * 28, 9 * 28 * 28)
scenes = st.builds(make_scene, st.integers(0, 10**7), st.integers(4, 30))


def red_square(start: float = 1.0, motion: str | None = None) -> Sight:
    place = None if motion else "left"
    return Sight(start, start + 1, "red", "square", place, motion, radius=0.2)


def test_one_seed_always_gives_the_same_scene() -> None:
    assert make_scene(5, 8) == make_scene(5, 8)
    assert make_scene(5, 8) != make_scene(6, 8)


def test_a_scene_too_short_for_its_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds must be at least 4, not 3"):
        make_scene(0, 3)


@settings(deadline=None)
@given(scenes)
def test_events_happen_inside_the_clip_and_one_after_the_other(scene: Scene) -> None:
    for events in (scene.sights, scene.sounds):
        borders = [border for event in events for border in (event.start, event.end)]
        assert borders == sorted(borders)
        assert borders[0] >= 0
        assert borders[-1] <= scene.seconds


@settings(deadline=None)
@given(scenes)
def test_at_least_three_slots_hold_both_a_shape_and_a_sound(scene: Scene) -> None:
    shared = [s for s in scene.sounds if scene.sight_in(int(s.start)) is not None]
    assert len(shared) >= MIN_SHARED_SLOTS


@settings(deadline=None)
@given(scenes)
def test_adjacent_shapes_differ(scene: Scene) -> None:
    for one, other in zip(scene.sights, scene.sights[1:], strict=False):
        assert one.end < other.start or one.name != other.name


def test_a_shape_is_drawn_at_its_place_and_time() -> None:
    scene = Scene(seed=0, seconds=4, sights=(red_square(),), sounds=())
    before, during = draw(scene, np.array([0.5, 1.5]), (100, 100)).astype(int)
    changed = np.argwhere((during != before).any(axis=-1))
    assert changed.mean(axis=0) == pytest.approx([49.5, 19.5], abs=1)
    red, green, blue = during[50, 20]
    assert red > 180 > 90 > max(green, blue)


def test_a_sound_is_only_in_its_time_span() -> None:
    beep = Sound(1.0, 2.0, "beep", pitch=0.3, loudness=1.0)
    wave = synthesize(Scene(seed=0, seconds=4, sights=(), sounds=(beep,)))
    assert len(wave) == 4 * SAMPLE_RATE
    heard = np.flatnonzero(wave) / SAMPLE_RATE
    assert heard.min() == pytest.approx(1.0, abs=0.01)
    assert heard.max() == pytest.approx(2.0, abs=0.01)
    assert abs(wave).max() == pytest.approx(0.5, abs=0.05)


def test_a_clip_has_two_frames_a_second_and_whole_aac_frames_of_sound() -> None:
    clip = make_clip(make_scene(1, 6), BOUNDS)
    assert clip.fps == 2.0
    assert len(clip.frames) == 12
    assert len(clip.sound) % 1024 == 0
    assert 0 <= len(clip.sound) - 6 * SAMPLE_RATE < 1024


@settings(deadline=None)
@given(scenes)
def test_every_pair_of_frames_shows_its_own_second(scene: Scene) -> None:
    clip = make_clip(scene, BOUNDS, degraded=False)
    seconds = clip.moments.reshape(-1, 2).astype(int)
    np.testing.assert_array_equal(seconds, np.repeat(np.arange(scene.seconds), 2).reshape(-1, 2))


def test_labels_say_what_is_in_each_second_and_square() -> None:
    scene = Scene(
        seed=0,
        seconds=4,
        sights=(red_square(), red_square(start=3.0, motion="up")),
        sounds=(Sound(2.0, 3.0, "chirp", 0.5, 0.5),),
    )
    labels = label_tokens(scene, make_clip(scene, BOUNDS), (3, 3), audio_tokens=100)
    assert {aspect: told.tolist() for aspect, told in label_seconds(scene).items()} == {
        "colour": [0, 1, 0, 1],
        "shape": [0, 2, 0, 2],
        "where": [0, 1, 0, 8],
        "sound": [0, 0, 2, 0],
        "sight number": [0, 1, 0, 2],
        "sound number": [0, 0, 1, 0],
        "sight begins": [0, 1, 0, 1],
        "sound begins": [0, 0, 1, 0],
        "sights": [2, 2, 2, 2],
        "sounds": [1, 1, 1, 1],
        "like its colour": [0, 2, 0, 2],
        "like its shape": [0, 2, 0, 2],
        "like its sound": [0, 0, 1, 0],
    }
    assert labels.covers[1].tolist() == [[False] * 3, [True, False, False], [False] * 3]
    assert not labels.covers[[0, 2]].any()
    assert np.flatnonzero(labels.heard).tolist() == list(range(50, 75))

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import av
import numpy as np
import pytest

from loadtest.clips import ClipShape, make_clip
from loadtest.records import Load
from loadtest.scenario import Scenario, arrivals, plan, prepare

SMALL = ClipShape(seconds=1, width=56, height=56, fps=4)


def decode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Frames and samples of a clip."""
    with av.open(io.BytesIO(data), "r") as file:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    with av.open(io.BytesIO(data), "r") as file:
        sound = np.concatenate([f.to_ndarray()[0] for f in file.decode(audio=0)])
    return frames, sound


def test_equal_seeds_give_equal_clips() -> None:
    assert make_clip(SMALL, 1) == make_clip(SMALL, 1)


def test_another_seed_gives_another_picture_and_another_sound() -> None:
    (pictures, sound), (others, noise) = decode(make_clip(SMALL, 1)), decode(make_clip(SMALL, 2))
    assert np.abs(pictures.astype(int) - others).mean() > 20
    assert np.abs(sound - noise[: len(sound)]).mean() > 0.05


def test_a_clip_has_the_shape_that_was_asked_for() -> None:
    frames, sound = decode(make_clip(ClipShape(2, 84, 56, 5), 1))
    assert frames.shape == (10, 56, 84, 3)
    assert len(sound) == pytest.approx(32_000, abs=2048)


def test_a_silent_clip_has_no_sound_track() -> None:
    with av.open(io.BytesIO(make_clip(ClipShape(1, 56, 56, 4, sound=False), 1)), "r") as file:
        assert not file.streams.audio


@pytest.mark.parametrize("field", ["seconds", "width", "fps"])
def test_a_clip_without_extent_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SMALL, **{field: 0})  # type: ignore[arg-type]  # the field is a number


def test_unique_media_never_repeat() -> None:
    planned = plan(Scenario(SMALL), 200, seed=1)
    assert len({planned.clip for planned in planned}) == 200
    assert {planned.novelty for planned in planned} == {"new"}


def test_plans_of_one_seed_are_equal_and_of_two_share_no_clip() -> None:
    scenario = Scenario(SMALL, repeat_media=0.5)
    assert plan(scenario, 50, 1) == plan(scenario, 50, 1)
    clips = [{planned.clip for planned in plan(scenario, 50, seed)} for seed in (1, 2)]
    assert clips[0].isdisjoint(clips[1])


def test_the_shares_of_repeats_are_kept() -> None:
    planned = plan(Scenario(SMALL, repeat_media=0.6, repeat_questions=0.25), 4000, seed=3)
    repeats = [planned for planned in planned if planned.novelty != "new"]
    same = [planned for planned in repeats if planned.novelty == "repeated"]
    assert len(repeats) / len(planned) == pytest.approx(0.6, abs=0.03)
    assert len(same) / len(repeats) == pytest.approx(0.25, abs=0.03)


def test_what_is_called_repeated_was_asked_before() -> None:
    seen: set[tuple[int, str]] = set()
    clips: set[int] = set()
    for planned in plan(Scenario(SMALL, repeat_media=0.7, repeat_questions=0.5), 300, seed=4):
        known = (planned.clip, planned.question) in seen
        expected = "repeated" if known else "known clip" if planned.clip in clips else "new"
        assert planned.novelty == expected
        seen.add((planned.clip, planned.question))
        clips.add(planned.clip)


def test_a_body_has_a_fixed_output_length_and_its_clip() -> None:
    scenario = Scenario(SMALL, output_tokens=7)
    (planned,) = plan(scenario, 1, seed=5)
    (request,) = prepare(scenario, [planned], "m", {"keep_ratio": 0.1})
    body = json.loads(request.body)
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (7, True, True)
    assert (body["model"], body["keep_ratio"]) == ("m", 0.1)
    clip, question = body["messages"][0]["content"]
    data = base64.b64decode(clip["video_url"]["url"].partition(",")[2])
    assert data == make_clip(SMALL, planned.clip)
    assert question["text"] == planned.question


def test_a_closed_loop_has_no_times() -> None:
    assert arrivals(Load(value=4), 10, 0) is None


@pytest.mark.parametrize(
    ("kind", "burstiness", "variation"),
    [("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5), ("constant", 1.0, 0.0)],
)
def test_gaps_have_the_mean_and_the_variation_of_their_law(
    kind: str, burstiness: float, variation: float
) -> None:
    load = Load(kind=kind, value=5.0, burstiness=burstiness)  # type: ignore[arg-type]
    times = arrivals(load, 40_000, seed=6)
    assert times is not None
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=0.06)
    if kind == "poisson":
        assert (gaps > 0.2).mean() == pytest.approx(np.exp(-1), abs=0.02)


def test_two_seeds_give_two_sequences_of_arrivals() -> None:
    load = Load(kind="poisson", value=5.0)
    assert arrivals(load, 10, 1) == arrivals(load, 10, 1) != arrivals(load, 10, 2)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="repeat_media must be from 0 to 1"):
        Scenario(SMALL, repeat_media=share)

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.scenes.questions import (
    ANSWERS,
    AUDIO_KINDS,
    KINDS,
    VIDEO_KINDS,
    Question,
    make_question,
    make_random_question,
    vocabulary,
)
from ep_serve.scenes.scene import Scene, Sight, Sound, make_scene

scenes = st.builds(make_scene, st.integers(0, 10**7), st.integers(4, 30))

# A red circle with a beep, a blue square with a buzz, a red ring in silence, then a lone beep.
SCENE = Scene(
    seed=0,
    seconds=8,
    sights=(
        Sight(0, 1, "red", "circle", "left", None, 0.2),
        Sight(2, 3, "blue", "square", None, "up", 0.2),
        Sight(4, 5, "red", "ring", "top", None, 0.2),
    ),
    sounds=(
        Sound(0.1, 0.9, "beep", 0.5, 1),
        Sound(2.1, 2.9, "buzz", 0.5, 1),
        Sound(6.1, 6.9, "beep", 0.5, 1),
    ),
)


def asked(kind: str, tries: int = 200) -> set[tuple[str, str]]:
    """What is asked about the scene, and answered, in many tries: the wording's last words."""
    questions = {make_question(SCENE, kind, np.random.default_rng(seed)) for seed in range(tries)}
    return {(q.text, q.answer) for q in questions if q is not None}


def answers(kind: str) -> set[str]:
    return {answer for _, answer in asked(kind)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("seen-colour", {"red", "blue"}),
        ("seen-shape", {"square"}),  # red things have two shapes
        ("heard-only", set()),  # there are two sounds
        ("where-place", {"left", "top"}),
        ("where-motion", {"up"}),
        ("count-sound", {"1", "2"}),
        ("count-sounds", {"3"}),
        ("cross-colour", {"blue"}),  # of the two beeps, one had no shape
        ("cross-shape", {"square"}),
        ("cross-sound", {"beep", "buzz", "nothing"}),
        ("order-sound", {"beep"}),
        ("order-shape", {"circle", "ring"}),
        ("order-sights", {"red circle", "blue square"}),
        ("order-sounds", set()),  # only the buzz sounds once
        ("order-mixed", {"yes", "no"}),
    ],
)
def test_only_questions_with_one_right_answer_are_asked(kind: str, expected: set[str]) -> None:
    assert answers(kind) == expected


def test_what_sounded_when_something_was_shown_is_found_by_time() -> None:
    told = dict(asked("cross-sound"))
    assert told["What sounded when the blue square was shown?"] == "buzz"
    assert told["What sounded when the circle was shown?"] == "beep"
    assert told["What sounded when the ring was shown?"] == "nothing"


def test_the_evidence_of_a_question_about_both_is_in_both() -> None:
    question = next(
        q
        for seed in range(100)
        if (q := make_question(SCENE, "cross-sound", np.random.default_rng(seed)))
        and q.answer == "buzz"
    )
    assert (question.seen, question.heard) == ((1,), (1,))


@given(scenes, st.integers(0, 10**6))
def test_every_scene_has_a_question(scene: Scene, seed: int) -> None:
    question = make_random_question(scene, np.random.default_rng(seed))
    assert question.kind in KINDS
    assert set(question.answer.split()) <= set(ANSWERS)
    assert all(index < len(scene.sights) for index in question.seen)
    assert all(index < len(scene.sounds) for index in question.heard)


@given(scenes, st.integers(0, 10**6))
def test_a_question_of_one_modality_has_evidence_in_that_modality(scene: Scene, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert not make_random_question(scene, rng, VIDEO_KINDS).heard
    assert not make_random_question(scene, rng, AUDIO_KINDS).seen


@given(scenes, st.integers(0, 10**6))
def test_every_word_of_a_question_and_its_answer_is_known(scene: Scene, seed: int) -> None:
    question = make_random_question(scene, np.random.default_rng(seed))
    first, *rest = question.text.rstrip("?").split(" ")
    known = set(vocabulary())
    assert first in known
    assert {f" {word.strip(',')}" for word in rest} <= known
    assert question.answer.split()[0] in known


def test_yes_and_no_are_equally_frequent_answers() -> None:
    counts: Counter[str] = Counter()
    for seed in range(600):
        scene = make_scene(seed, 4 + seed % 9)
        question = make_question(scene, "heard-there", np.random.default_rng(seed))
        assert isinstance(question, Question)
        counts[question.answer] += 1
    assert counts["yes"] / counts.total() == pytest.approx(0.5, abs=0.07)

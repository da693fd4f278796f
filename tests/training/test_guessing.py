from __future__ import annotations

import numpy as np
import pytest

from ep_serve.scenes.guessing import AvailableModalities, Guesser, SceneQuestion, guess_accuracy
from ep_serve.scenes.questions import make_question, make_random_question
from ep_serve.scenes.scene import make_scene

Shares = dict[str, dict[str, float]]


def asked(seeds: range, each: int = 3) -> list[SceneQuestion]:
    questions = []
    for seed in seeds:
        scene, rng = make_scene(seed, 4 + seed % 6), np.random.default_rng(seed)
        questions += [(scene, make_random_question(scene, rng)) for _ in range(each)]
    return questions


@pytest.fixture(scope="module")
def shares() -> Shares:
    return guess_accuracy(asked(range(1500)), asked(range(10_000, 10_300)))


def test_what_can_be_heard_is_known_without_the_picture(
    shares: Shares,
) -> None:
    assert shares["picture"]["heard"] == 1.0
    assert shares["sound"]["seen"] == shares["sound"]["where"] == 1.0


def test_what_needs_both_is_hard_to_guess_without_one(shares: Shares) -> None:
    assert max(shares[missing]["cross"] for missing in shares) < 0.4


def test_every_modality_raises_the_accuracy(shares: Shares) -> None:
    assert shares["both"]["all"] < min(shares["picture"]["all"], shares["sound"]["all"])
    assert shares["both"]["all"] < 0.4


def test_a_guesser_without_examples_chooses_among_the_named_options() -> None:
    guesser = Guesser(AvailableModalities(has_video=False, has_audio=False), [])
    scene = make_scene(0, 8)
    tries = (
        make_question(make_scene(s, 8), "order-sounds", np.random.default_rng(s)) for s in range(50)
    )
    question = next(q for q in tries if q is not None)
    assert f"the {guesser.guess(scene, question)} or" in question.text

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from ep_serve.layout import Kind
from ep_serve.scenes.questions import Question, ask
from ep_serve.scenes.scene import make_scene
from ep_serve.training.data.clip_features import Features, features
from ep_serve.training.data.examples import (
    NOT_TOLD,
    Prompts,
    collate_lessons,
    lesson,
    silent,
    sound_alone,
    still,
)
from ep_serve.training.data.labels import tell_seconds
from ep_serve.training.data.token_clip import TokenClip
from ep_serve.training.loop.language import Lessons, point
from ep_serve.training.model import architecture

SECONDS = 6


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    directory = tmp_path_factory.mktemp("frame")
    architecture.write_frame(directory)
    return Prompts(directory)


@pytest.fixture(scope="module")
def read() -> Features:
    return features(make_scene(3, SECONDS))


@pytest.fixture(scope="module")
def clip(read: Features) -> TokenClip:
    """A clip whose tokens are their own numbers: the picture's from 0, the sound's from 1000."""
    per_pair = read.labels.covers[0].size
    video = torch.arange(SECONDS * per_pair)[:, None].expand(-1, 4)
    audio = 1000 + torch.arange(read.audio_tokens)[:, None].expand(-1, 4)
    return TokenClip(
        read.scene, video.float(), audio.float(), read.grid, read.second_per_grid, read.labels
    )


def question(clip: TokenClip, kind: str) -> Question:
    tries = (ask(clip.scene, kind, np.random.default_rng(seed)) for seed in range(20))
    return next(q for q in tries if q is not None and q.answer not in ("no", "nothing"))


def test_a_prompt_is_short_and_made_of_words(prompts: Prompts) -> None:
    prompt = prompts.prompt("Which colour was shown when the beep sounded?")
    assert len(prompt) == 31
    assert prompts.read(prompts.answer("red circle")) == "red circle"
    assert len(prompts.answer("red circle")) == 3


def test_the_question_may_stand_before_the_clip(prompts: Prompts) -> None:
    after, before = (prompts.prompt("What?", question_first=first) for first in (False, True))
    assert Counter(after) == Counter(before)
    assert after != before


def test_tokens_stand_in_prompt_order(clip: TokenClip, prompts: Prompts) -> None:
    one = lesson(clip, question(clip, "seen-shape"), prompts).example
    av, kinds = one.av[:, 0].numpy(), one.layout.kinds[one.layout.is_av]
    np.testing.assert_array_equal(av[kinds == Kind.VIDEO], clip.video[:, 0].numpy())
    np.testing.assert_array_equal(av[kinds == Kind.AUDIO], clip.audio[:, 0].numpy())
    # Chunks of two seconds, each with its picture first.
    per_pair = len(clip.video) // SECONDS
    assert av[2 * per_pair] == 1000
    assert av[2 * per_pair + 50] == 2 * per_pair


def test_every_token_tells_its_own_second(clip: TokenClip, prompts: Prompts) -> None:
    one = lesson(clip, question(clip, "seen-shape"), prompts)
    number = one.example.av[:, 0].numpy()
    per_pair = len(clip.video) // SECONDS
    second = np.where(number < 1000, number // per_pair, (number - 1000) // 25).astype(int)
    inside = second < SECONDS
    truth = tell_seconds(clip.scene)
    for aspect, told in one.aspects.items():
        np.testing.assert_array_equal(told[inside], truth[aspect][second[inside]])
        assert (told[~inside] == NOT_TOLD).all()


@pytest.mark.parametrize(("kind", "groups"), [("cross-sound", 2), ("seen-shape", 1)])
def test_evidence_lies_in_the_asked_seconds(
    clip: TokenClip, prompts: Prompts, kind: str, groups: int
) -> None:
    asked = question(clip, kind)
    one = lesson(clip, asked, prompts)
    assert len(one.evidence) >= groups
    times = one.example.layout.positions[0][one.example.layout.is_av]
    start = times.min()
    spans = [clip.scene.sights[i] for i in asked.seen] + [clip.scene.sounds[i] for i in asked.heard]
    for group, span in zip(one.evidence, spans, strict=True):
        when = (times[group] - start) / 25
        assert when.size
        assert span.start - 0.02 <= when.min()
        assert when.max() <= span.end


def test_parts_of_a_clip_are_media_of_their_own(clip: TokenClip, prompts: Prompts) -> None:
    per_pair = len(clip.video) // SECONDS
    for shown, kind, expected in (
        (silent(clip), Kind.VIDEO, clip.video),
        (sound_alone(clip), Kind.AUDIO, clip.audio),
        (still(clip, 2), Kind.IMAGE, clip.video[2 * per_pair : 3 * per_pair]),
    ):
        one = lesson(clip, question(clip, "seen-shape"), prompts, shown)
        assert one.example.layout.num_av == one.example.layout.count(kind)
        assert torch.equal(one.example.av, expected)


def test_nothing_is_asked_about_what_is_not_shown(clip: TokenClip, prompts: Prompts) -> None:
    asked = question(clip, "seen-shape")
    assert (lesson(clip, asked, prompts, silent(clip)).aspects["sound"] == NOT_TOLD).all()
    assert (lesson(clip, asked, prompts, sound_alone(clip)).aspects["shape"] == NOT_TOLD).all()


def test_scores_on_the_evidence_cost_nothing(clip: TokenClip, prompts: Prompts) -> None:
    asked = [question(clip, kind) for kind in ("order-sound", "order-shape", "order-colour")]
    batch = collate_lessons([lesson(clip, one, prompts) for one in asked], [0.2] * 3)
    assert batch.rows.tolist() == [0, 1, 2]
    level = torch.zeros(batch.batch.valid.shape).masked_fill(~batch.batch.is_av, -torch.inf)
    assert point(level, batch) > 1
    assert point(level + 30.0 * batch.evidence, batch) == pytest.approx(0, abs=1e-3)


def test_a_batch_asks_about_clips_of_one_length(clip: TokenClip, prompts: Prompts) -> None:
    lessons = Lessons([clip], prompts)
    rng = np.random.default_rng(0)
    assert lessons.length(rng, 0.0) == SECONDS
    batch = lessons.batch(rng, SECONDS, 0.1)
    assert len(batch.kinds) == len(batch.batch.keep) == 16
    assert batch.batch.keep.max() < 0.11 * batch.batch.is_av.sum(1).max()

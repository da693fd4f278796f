from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from ep_serve.layout import Kind
from ep_serve.scenes.questions import Question, make_question
from ep_serve.scenes.scene import make_scene
from ep_serve.training.data.clip_features import ClipFeatures, extract_features
from ep_serve.training.data.examples import (
    IGNORE_INDEX,
    PromptEncoder,
    audio_view,
    build_example,
    collate_labelled,
    frame_view,
    video_view,
)
from ep_serve.training.data.labels import label_seconds
from ep_serve.training.data.token_clip import TokenClip
from ep_serve.training.loop.language import QuestionSampler, evidence_loss
from ep_serve.training.model import architecture

SECONDS = 6


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    directory = tmp_path_factory.mktemp("frame")
    architecture.write_config_files(directory)
    return PromptEncoder(directory)


@pytest.fixture(scope="module")
def read() -> ClipFeatures:
    return extract_features(make_scene(3, SECONDS))


@pytest.fixture(scope="module")
def clip(read: ClipFeatures) -> TokenClip:
    """A clip whose tokens are their own indices: video from 0, audio from 1000."""
    per_pair = read.labels.covers[0].size
    video = torch.arange(SECONDS * per_pair)[:, None].expand(-1, 4)
    audio = 1000 + torch.arange(read.audio_tokens)[:, None].expand(-1, 4)
    return TokenClip(
        read.scene, video.float(), audio.float(), read.grid, read.second_per_grid, read.labels
    )


def question(clip: TokenClip, kind: str) -> Question:
    tries = (make_question(clip.scene, kind, np.random.default_rng(seed)) for seed in range(20))
    return next(q for q in tries if q is not None and q.answer not in ("no", "nothing"))


def test_a_prompt_is_short_and_made_of_words(prompts: PromptEncoder) -> None:
    prompt = prompts.encode_prompt("Which colour was shown when the beep sounded?")
    assert len(prompt) == 31
    assert prompts.decode(prompts.encode_answer("red circle")) == "red circle"
    assert len(prompts.encode_answer("red circle")) == 3


def test_the_question_may_stand_before_the_clip(prompts: PromptEncoder) -> None:
    after, before = (
        prompts.encode_prompt("What?", question_first=first) for first in (False, True)
    )
    assert Counter(after) == Counter(before)
    assert after != before


def test_tokens_stand_in_prompt_order(clip: TokenClip, prompts: PromptEncoder) -> None:
    one = build_example(clip, question(clip, "seen-shape"), prompts).example
    av, kinds = one.av[:, 0].numpy(), one.layout.kinds[one.layout.is_av]
    np.testing.assert_array_equal(av[kinds == Kind.VIDEO], clip.video[:, 0].numpy())
    np.testing.assert_array_equal(av[kinds == Kind.AUDIO], clip.audio[:, 0].numpy())
    # Chunks of two seconds, each with its picture first.
    per_pair = len(clip.video) // SECONDS
    assert av[2 * per_pair] == 1000
    assert av[2 * per_pair + 50] == 2 * per_pair


def test_every_token_is_labelled_with_its_own_second(
    clip: TokenClip, prompts: PromptEncoder
) -> None:
    one = build_example(clip, question(clip, "seen-shape"), prompts)
    number = one.example.av[:, 0].numpy()
    per_pair = len(clip.video) // SECONDS
    second = np.where(number < 1000, number // per_pair, (number - 1000) // 25).astype(int)
    inside = second < SECONDS
    truth = label_seconds(clip.scene)
    for aspect, told in one.aspects.items():
        np.testing.assert_array_equal(told[inside], truth[aspect][second[inside]])
        assert (told[~inside] == IGNORE_INDEX).all()


@pytest.mark.parametrize(("kind", "groups"), [("cross-sound", 2), ("seen-shape", 1)])
def test_evidence_lies_in_the_seconds_of_its_events(
    clip: TokenClip, prompts: PromptEncoder, kind: str, groups: int
) -> None:
    asked = question(clip, kind)
    one = build_example(clip, asked, prompts)
    assert len(one.evidence) >= groups
    times = one.example.layout.positions[0][one.example.layout.is_av]
    start = times.min()
    spans = [clip.scene.sights[i] for i in asked.seen] + [clip.scene.sounds[i] for i in asked.heard]
    for group, span in zip(one.evidence, spans, strict=True):
        when = (times[group] - start) / 25
        assert when.size
        assert span.start - 0.02 <= when.min()
        assert when.max() <= span.end


def test_parts_of_a_clip_are_media_of_their_own(clip: TokenClip, prompts: PromptEncoder) -> None:
    per_pair = len(clip.video) // SECONDS
    for view, kind, expected in (
        (video_view(clip), Kind.VIDEO, clip.video),
        (audio_view(clip), Kind.AUDIO, clip.audio),
        (frame_view(clip, 2), Kind.IMAGE, clip.video[2 * per_pair : 3 * per_pair]),
    ):
        one = build_example(clip, question(clip, "seen-shape"), prompts, view)
        assert one.example.layout.num_av == one.example.layout.count(kind)
        assert torch.equal(one.example.av, expected)


def test_hidden_modalities_have_no_targets(clip: TokenClip, prompts: PromptEncoder) -> None:
    asked = question(clip, "seen-shape")
    assert (
        build_example(clip, asked, prompts, video_view(clip)).aspects["sound"] == IGNORE_INDEX
    ).all()
    assert (
        build_example(clip, asked, prompts, audio_view(clip)).aspects["shape"] == IGNORE_INDEX
    ).all()


def test_scores_on_the_evidence_have_no_loss(clip: TokenClip, prompts: PromptEncoder) -> None:
    asked = [question(clip, kind) for kind in ("order-sound", "order-shape", "order-colour")]
    batch = collate_labelled([build_example(clip, one, prompts) for one in asked], [0.2] * 3)
    assert batch.rows.tolist() == [0, 1, 2]
    level = torch.zeros(batch.batch.valid.shape).masked_fill(~batch.batch.is_av, -torch.inf)
    assert evidence_loss(level, batch) > 1
    assert evidence_loss(level + 30.0 * batch.evidence, batch) == pytest.approx(0, abs=1e-3)


def test_a_batch_has_clips_of_one_length(clip: TokenClip, prompts: PromptEncoder) -> None:
    sampler = QuestionSampler([clip], prompts)
    rng = np.random.default_rng(0)
    assert sampler.length(rng, 0.0) == SECONDS
    batch = sampler.batch(rng, SECONDS, 0.1)
    assert len(batch.kinds) == len(batch.batch.keep) == 16
    assert batch.batch.keep.max() < 0.11 * batch.batch.is_av.sum(1).max()

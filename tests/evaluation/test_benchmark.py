from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ep_serve.evaluation import benchmark
from ep_serve.evaluation.benchmark import LENGTHS, QUESTIONS_NAME, SUMMARY_NAME, Plan, make
from ep_serve.evaluation.questions import find_missing_media, read_questions
from ep_serve.media import MediaLimits, SamplingRule, decode_clip


def test_a_benchmark_can_be_run_and_is_reproducible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "EXAMPLES", 40)
    summary = make(tmp_path, Plan(clips=2, questions=3))
    written = (tmp_path / QUESTIONS_NAME).read_bytes()
    questions = read_questions(tmp_path / QUESTIONS_NAME)
    assert len(questions) == 6
    assert find_missing_media(questions, tmp_path) == []
    for name, seconds in zip(("00000", "00001"), LENGTHS, strict=False):
        data = (tmp_path / "clips" / f"{name}.mp4").read_bytes()
        clip = decode_clip(data, SamplingRule(), MediaLimits(timeout_s=60))
        assert clip.sound is not None
        assert clip.duration_s == pytest.approx(seconds)
    assert json.loads((tmp_path / SUMMARY_NAME).read_text()) == summary
    assert set(questions[0].meta.guesses) == {"picture", "sound", "both"}

    (tmp_path / "clips" / "00001.mp4").write_bytes(b"is there")
    make(tmp_path, Plan(clips=2, questions=3))
    assert (tmp_path / QUESTIONS_NAME).read_bytes() == written
    assert (tmp_path / "clips" / "00001.mp4").read_bytes() == b"is there"


def test_no_training_uses_its_scenes() -> None:
    assert Plan().scene(0).seed == 4_000_000
    assert Plan(seed=1).scene(0).seed > Plan().scene(benchmark.SEEDS_EACH - 1).seed


def test_every_task_is_equally_frequent() -> None:
    plan = Plan()
    tasks = Counter(
        question.task for number in range(320) for question in plan.questions_about(number)
    )
    assert tasks.total() == 1280
    assert min(tasks.values()) > 0.8 * 1280 / len(benchmark.TASKS)


def test_no_question_about_a_clip_is_repeated() -> None:
    texts = [question.text for question in Plan(questions=20).questions_about(0)]
    assert len(set(texts)) == len(texts) == 20


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"questions": 21}, {"seed": -1}])
def test_what_cannot_be_made_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
        Plan(**wrong)

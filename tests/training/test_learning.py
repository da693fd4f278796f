"""A few minutes of training, behind the towers of the shipped model, teach more than guessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ep_serve.demo
from ep_serve.training.data.store import save
from ep_serve.training.loop.embedded import TrainingScale, train
from ep_serve.training.loop.towers import AudioClassifier, VisionClassifier
from ep_serve.training.model import architecture
from ep_serve.training.model.weights import TOWERS, read_named

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MODEL = Path(ep_serve.demo.__file__).parent / "model"
SCALE = TrainingScale(
    segments=0, vision=0, audio=0, clips=250, language=260, held_out=50, variant=0, lengths=(4,)
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("learning")
    save(out / "towers.pt", shipped_towers())
    return train(out, SCALE)


def shipped_towers() -> dict[str, dict[str, torch.Tensor]]:
    """What stage one would have left; what only stage one reads is random."""
    config = architecture.config()
    vision, audio = VisionClassifier(config), AudioClassifier(config)
    for tower, prefix in (
        (vision.tower, TOWERS["visual"]),
        (audio.tower, TOWERS["audio_tower"]),
    ):
        stored = read_named(MODEL, {prefix + name for name in tower.state_dict()})
        tower.load_state_dict({n.removeprefix(prefix): value for n, value in stored.items()})
    return {"vision": vision.state_dict(), "audio": audio.state_dict()}


@pytest.mark.parametrize("keep_ratio", ["1", "0.2", "0.1", "0.05"])
def test_a_short_training_answers_more_than_a_guess(
    report: dict[str, Any], keep_ratio: str
) -> None:
    guess = report["guesses"]["both"]["all"]
    assert report["tasks"]["all"][keep_ratio]["right"] > guess + 0.05


def test_a_short_training_points_the_scores_at_the_evidence(report: dict[str, Any]) -> None:
    kept = report["tasks"]["all"]["0.05"]
    assert kept["kept_evidence"] > 2 * kept["evidence"]

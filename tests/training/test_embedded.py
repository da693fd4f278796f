"""A whole training of the embedded model, with few steps for all but one tower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ep_serve.checkpoint.check import check
from ep_serve.training.loop.embedded import TrainingScale, train
from ep_serve.training.loop.language import VARIANTS
from ep_serve.training.model.weights import load_thinker

pytestmark = pytest.mark.slow

SCALE = TrainingScale(segments=48, vision=1, audio=48, clips=8, language=2, held_out=8, variant=1)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded-training")
    train(out, SCALE)
    return out


def test_it_ends_with_a_checkpoint_that_can_be_served(out: Path) -> None:
    assert check(out / "model") == []


def test_a_short_training_classifies_sounds_better_than_chance(out: Path) -> None:
    told = json.loads((out / "towers.json").read_text())["audio"]["sound"]
    assert (
        told > 0.3
    )  # of the tokens with a sound, in clips that it was not trained on; chance: 0.17


def test_the_weights_fit_into_the_repository(out: Path) -> None:
    assert (out / "model" / "model.safetensors").stat().st_size < 12e6


def test_the_checkpoint_is_the_trained_model(out: Path) -> None:
    state = torch.load(out / "language" / "state.pt", weights_only=True)["module"]
    for name, value in load_thinker(out / "model").named_parameters():
        assert torch.equal(value, state[f"thinker.{name}"].bfloat16().float())
    towers = torch.load(out / "towers.pt", weights_only=True)
    stored = load_file(out / "model" / "model.safetensors")
    proj = towers["audio"]["tower.proj.weight"].bfloat16()
    assert torch.equal(stored["thinker.audio_tower.proj.weight"], proj)


def test_it_leaves_curves_and_a_report(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    of_all = report["tasks"]["all"]
    assert set(of_all) == {"1", "0.2", "0.1", "0.05", "one token"}
    assert of_all["1"]["questions"] == 4 * SCALE.held_out
    assert of_all["1"]["kept"] == of_all["1"]["pool"]
    assert of_all["one token"]["kept"] == 1
    by_seconds = report["seconds"].values()
    assert sum(span["all"]["1"]["questions"] for span in by_seconds) == 4 * SCALE.held_out
    assert report["guesses"]["both"]["all"] < 0.6


def test_a_finished_training_is_not_done_again(out: Path) -> None:
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    report = train(out, SCALE)
    assert report == json.loads((out / "report.json").read_text())
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_variant_starts_from_the_shipped_weights(out: Path) -> None:
    report = train(out, SCALE, variant="closed-random", processes=1)
    before = torch.load(out / "language" / "state.pt", weights_only=True)["module"]
    folder = out / "closed-random-0"
    after = torch.load(folder / "language" / "state.pt", weights_only=True)
    assert after["step"] == 1
    name = "thinker.model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(after["module"][name], before[name], atol=0.01, rtol=0)
    assert report == json.loads((folder / "report.json").read_text())


def test_a_selector_without_a_refiner_trains_from_scratch(out: Path) -> None:
    report = train(out, SCALE, variant="omnisift", processes=1)
    state = torch.load(out / "omnisift-0" / "language" / "state.pt", weights_only=True)
    assert state["step"] == VARIANTS["omnisift"].step_factor
    kept = [report["tasks"]["all"][ratio]["kept"] for ratio in ("1", "0.2", "0.05")]
    assert kept == sorted(kept, reverse=True)

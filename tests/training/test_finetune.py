from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ep_serve.checkpoint.check import check
from ep_serve.cli import main
from ep_serve.training.model.weights import load_thinker
from tests.clips import make_clip

OPTIONS = ("--batch", "2", "--rate", "1e-3", "--min-pixels", "3136", "--max-pixels", "12544")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.mp4").write_bytes(make_clip(4))
    video = {"type": "video", "video": "a.mp4"}
    lines = [
        {
            "messages": [
                {"role": "user", "content": [video, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in (("What is heard?", "A chirp."), ("What is seen?", "Waves."))
    ]
    path = folder / "conversations.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def train(checkpoint: Path, data: Path, target: Path, steps: int, *more: str) -> list[float]:
    """The losses of a training through the command line."""
    words = ["train", str(checkpoint), "--data", str(data), "--to", str(target)]
    assert main([*words, "--steps", str(steps), *OPTIONS, *more]) == 0
    work = (
        Path(more[more.index("--work") + 1]) if "--work" in more else target.with_name("out.work")
    )
    curve = work / "curve.jsonl"
    return [json.loads(line)["loss"] for line in curve.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(embedded: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "out"


def test_a_checkpoint_learns_its_answers_and_can_be_served(
    embedded: Path, data: Path, trained: Path
) -> None:
    losses = train(embedded, data, trained, 12)
    assert losses[-1] < losses[0] / 4
    assert check(trained) == []
    before, after = (load_file(d / "model.safetensors") for d in (embedded, trained))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert any(name.startswith("thinker.model.bidir_encoder") for name in changed)
    assert "thinker.model.compressor.score_head.0.weight" in changed
    assert not any(name.startswith(("thinker.visual", "thinker.audio_tower")) for name in changed)


def test_a_finished_training_is_not_done_again(embedded: Path, data: Path, tmp_path: Path) -> None:
    losses = train(embedded, data, tmp_path / "out", 3)
    again = train(embedded, data, tmp_path / "again", 3, "--work", str(tmp_path / "out.work"))
    assert losses == again
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert all(first[name].equal(second[name]) for name in first)


def test_a_frozen_decoder_stays_as_it_is(embedded: Path, data: Path, tmp_path: Path) -> None:
    train(embedded, data, tmp_path / "out", 2, "--freeze-decoder", "--close-bypass")
    before, after = load_thinker(embedded), load_thinker(tmp_path / "out")
    for part in ("layers.0.mlp.up_proj.weight", "embed_tokens.weight", "norm.weight"):
        name = f"model.{part}"
        assert before.get_parameter(name).equal(after.get_parameter(name))
    name = "model.bidir_encoder.layers.0.mlp.up_proj.weight"
    assert not before.get_parameter(name).equal(after.get_parameter(name))

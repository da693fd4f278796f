from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ep_serve.checkpoint import init as init_module
from ep_serve.checkpoint import tensors
from ep_serve.checkpoint.check import check
from ep_serve.checkpoint.config import ReductionConfig, load_config
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.init import init
from ep_serve.checkpoint.tensors import INDEX
from tests.checkpoint.conftest import edit_json

COMPRESSOR = "thinker.model.compressor."


def load(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def test_the_result_can_be_served(stock: Path, tmp_path: Path) -> None:
    init(stock, tmp_path / "new", layers=3, keep_ratio=0.1)
    assert check(tmp_path / "new") == []
    reduction = ReductionConfig.from_hf(load_config(tmp_path / "new"))
    assert reduction == ReductionConfig(3, 0.1, (9, 9, 9, 5))


def test_everything_else_is_the_source(stock: Path, tmp_path: Path) -> None:
    init(stock, tmp_path / "new", layers=2)
    old, new = load(stock), load(tmp_path / "new")
    kept = {name for name in old if name.startswith("thinker.")}
    assert all(torch.equal(old[name], new[name]) for name in kept)
    added = {name for name in new if "bidir_encoder" in name or "compressor" in name}
    assert new.keys() == kept | added


def test_the_refiner_is_a_copy_of_the_first_decoder_layers(stock: Path, tmp_path: Path) -> None:
    init(stock, tmp_path / "new", layers=2)
    new = load(tmp_path / "new")
    refiner = [name for name in new if "bidir_encoder" in name]
    assert len(refiner) == 24
    for name in refiner:
        assert torch.equal(new[name], new[name.replace("bidir_encoder.", "")])


def test_the_score_head_is_new(stock: Path, tmp_path: Path) -> None:
    init(stock, tmp_path / "new")
    new = load(tmp_path / "new")
    weight = new[COMPRESSOR + "score_head.0.weight"]
    assert weight.dtype == torch.bfloat16
    assert weight.float().std() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.float().mean()) < 0.001
    assert new[COMPRESSOR + "score_head.0.bias"].eq(0).all()
    assert new[COMPRESSOR + "score_head.2.bias"].eq(0).all()
    assert new[COMPRESSOR + "ln.weight"].eq(1).all()


def test_the_seed_decides_the_score_head(stock: Path, tmp_path: Path) -> None:
    name = COMPRESSOR + "score_head.2.weight"
    heads = []
    for directory, seed in (("a", 0), ("b", 0), ("c", 1)):
        init(stock, tmp_path / directory, seed=seed)
        heads.append(load(tmp_path / directory)[name])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_voice_stays_behind(stock: Path, tmp_path: Path) -> None:
    made = init(stock, tmp_path / "new")
    assert made.left_out == {"talker": 2, "token2wav": 1}
    assert not (tmp_path / "new" / "spk_dict.pt").exists()
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "talker_config" not in config
    assert config["enable_audio_output"] is False


def test_shards_are_bounded(stock: Path, tmp_path: Path) -> None:
    made = init(stock, tmp_path / "new", shard_bytes=1 << 20)
    sizes = [file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors")]
    assert len(sizes) >= made.nbytes >> 20
    assert max(sizes) <= (1 << 20) + 8192  # and a header
    assert (tmp_path / "new" / INDEX).is_file()


def test_memory_does_not_grow_with_the_model(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 1 << 16)
    # The score head is made in memory: a few bytes for each of its numbers.
    monkeypatch.setattr(
        init_module, "_score_head_tensor", lambda *_: tensors.NewTensor.of(TINY, "F32")
    )
    init(stock, tmp_path / "first")
    tracemalloc.start()
    made = init(stock, tmp_path / "second")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.nbytes > 8e6
    assert peak < 2e6


TINY = torch.zeros(1)


def test_a_target_with_content_is_left_alone(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(CheckpointError, match="is not an empty directory"):
        init(stock, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_empty_target_is_filled(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    init(stock, tmp_path / "new")
    assert (tmp_path / "new" / "config.json").is_file()


def test_a_failure_leaves_nothing_behind(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(init_module, "write_tensors", fail)
    with pytest.raises(OSError, match="disk is full"):
        init(stock, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_reduced_source_is_refused(embedded: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already is an EchoingPixels checkpoint"):
        init(embedded, tmp_path / "new")


def test_another_model_is_refused(stock: Path, tmp_path: Path) -> None:
    shutil.copytree(stock, tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", lambda data: data.update(model_type="llama"))
    with pytest.raises(CheckpointError, match=r"not a Qwen2.5-Omni .*'llama'"):
        init(tmp_path / "other", tmp_path / "new")


def test_an_incomplete_source_is_refused(stock: Path, tmp_path: Path) -> None:
    shutil.copytree(stock, tmp_path / "half")
    edit_json(
        tmp_path / "half" / "config.json",
        lambda data: data["thinker_config"]["text_config"].update(num_hidden_layers=5),
    )
    with pytest.raises(CheckpointError, match=r"source lacks the tensor thinker.model.layers.4."):
        init(tmp_path / "half", tmp_path / "new")


@pytest.mark.parametrize(
    ("layers", "keep_ratio", "message"),
    [
        (5, 0.2, "layers must be at most 4, .* but it is 5"),
        (0, 0.2, "av_refiner_layers .* is 0"),
        (4, 0.0, "compression_ratio .* is 0.0"),
        (4, 1.5, "compression_ratio .* is 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(
    stock: Path, tmp_path: Path, layers: int, keep_ratio: float, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        init(stock, tmp_path / "new", layers=layers, keep_ratio=keep_ratio)
    assert not (tmp_path / "new").exists()

from __future__ import annotations

from pathlib import Path

import pytest

from ep_serve.checkpoint.check import check
from ep_serve.checkpoint.kind import kind_of
from ep_serve.checkpoint.tensors import read_tensors
from loadtest.reference import build
from loadtest.shapes import EMBEDDED, REFERENCE


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("reference"), EMBEDDED)


def test_the_checkpoint_passes_the_check(made: tuple[Path, Path]) -> None:
    assert [finding for finding in check(made[0]) if finding.severity == "error"] == []


def test_the_twin_is_stock_and_has_the_same_weights(made: tuple[Path, Path]) -> None:
    ours, stock = (read_tensors(directory) for directory in made)
    assert kind_of(made[1]) == "stock"
    left_out = {name for name in ours if "bidir_encoder" in name or "compressor" in name}
    assert set(stock) == set(ours) - left_out
    assert left_out
    for name, tensor in stock.items():
        assert b"".join(tensor.chunks()) == b"".join(ours[name].chunks())


def test_equal_seeds_give_equal_weights(made: tuple[Path, Path], tmp_path: Path) -> None:
    again, _ = build(tmp_path, EMBEDDED)
    files = [directory / "model.safetensors" for directory in (made[0], again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_existing_checkpoint_is_not_rebuilt(made: tuple[Path, Path]) -> None:
    before = (made[0] / "model.safetensors").stat().st_mtime_ns
    build(made[0].parent, EMBEDDED)
    assert (made[0] / "model.safetensors").stat().st_mtime_ns == before


def test_configurations_can_be_made_alone(tmp_path: Path) -> None:
    for directory in build(tmp_path, REFERENCE, weights=False):
        assert (directory / "config.json").is_file()
        assert (directory / "tokenizer.json").is_file()
        assert not list(directory.glob("*.safetensors"))

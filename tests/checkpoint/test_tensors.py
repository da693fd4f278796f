from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ep_serve.checkpoint import tensors
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.tensors import INDEX, WEIGHTS, NewTensor, read_tensors, write_tensors
from tests.checkpoint.conftest import edit_json

VALUES = {
    "half": torch.arange(3, dtype=torch.float32),
    "wide": torch.linspace(-1, 1, 12).reshape(3, 4),
    "empty": torch.zeros(0, 4),
    "one": torch.tensor(2.5),
}
NEW = {name: NewTensor.of(v, "BF16" if name == "half" else "F32") for name, v in VALUES.items()}


def same(loaded: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == VALUES.keys() and all(
        torch.equal(loaded[name].float(), value) for name, value in VALUES.items()
    )


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    write_tensors(tmp_path, NEW)
    loaded = load_file(tmp_path / WEIGHTS)
    assert same(loaded)
    assert loaded["half"].dtype == torch.bfloat16


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / WEIGHTS, metadata={"format": "pt"})
    stored = read_tensors(tmp_path)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tuple(value.shape) for name, value in VALUES.items()
    }
    raw = b"".join(stored["wide"].chunks())
    assert torch.equal(
        torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(3, 4), VALUES["wide"]
    )


def test_shards_stay_below_their_limit_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    write_tensors(tmp_path, NEW, shard_bytes=54)
    index = json.loads((tmp_path / INDEX).read_text())
    files = set(index["weight_map"].values())
    assert files == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert index["metadata"]["total_size"] == 6 + 48 + 0 + 4
    assert same({k: v for file in files for k, v in load_file(tmp_path / file).items()})
    assert read_tensors(tmp_path).keys() == VALUES.keys()


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    write_tensors(tmp_path, NEW, shard_bytes=10)
    places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert [name for name in places if places[name] == places["wide"]] == ["wide"]


def test_copying_holds_one_chunk_at_a_time(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 1 << 16)
    stored = read_tensors(embedded)
    assert sum(tensor.nbytes for tensor in stored.values()) > 8e6
    tracemalloc.start()
    write_tensors(tmp_path, stored, shard_bytes=3 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_a_file_that_is_cut_short_is_refused(copied: Path) -> None:
    path = copied / WEIGHTS
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    with pytest.raises(CheckpointError, match="cut short: 5 of"):
        read_tensors(copied)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not safetensors at all",
        (9).to_bytes(8, "little") + b"not json!",
        (11).to_bytes(8, "little") + b'{"a": {}}  ',
        (4).to_bytes(8, "little") + b"[1] ",
        (63).to_bytes(8, "little")
        + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}  '[:63],
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="safetensors"):
        read_tensors(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"neither {WEIGHTS} nor {INDEX}"):
        read_tensors(tmp_path)


def test_an_absent_shard_is_named(stock: Path, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes((stock / INDEX).read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00001-of-0000\d\.safetensors is absent"):
        read_tensors(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path, NEW, shard_bytes=50)
    edit_json(tmp_path / INDEX, lambda data: data["weight_map"].update(ghost=first(tmp_path)))
    with pytest.raises(CheckpointError, match="holds ghost, but it does not"):
        read_tensors(tmp_path)


def test_an_index_cannot_point_outside(tmp_path: Path) -> None:
    write_tensors(tmp_path, NEW, shard_bytes=50)
    edit_json(tmp_path / INDEX, lambda data: data["weight_map"].update(half="../secret"))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        read_tensors(tmp_path)


def first(directory: Path) -> str:
    return min(file.name for file in directory.glob("*.safetensors"))

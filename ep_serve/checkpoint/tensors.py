"""Safetensors files, read by their headers and written in small pieces.

The safetensors library holds a whole file of tensors in memory to write it. A 7B checkpoint is
copied here a few megabytes at a time, so this module writes the format itself: eight bytes with the
length of a JSON header (little endian), the header, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ep_serve.checkpoint.directory import read_json, write_json
from ep_serve.checkpoint.errors import CheckpointError

Shape = tuple[int, ...]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
CHUNK_BYTES = 16 << 20
LONGEST_HEADER = 100_000_000  # the limit of the safetensors library

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
TORCH_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
}  # fmt: skip


class Tensor(Protocol):
    """Bytes with a dtype (its safetensors name) and a shape."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def nbytes(self) -> int: ...
    def chunks(self) -> Iterator[bytes]:
        """The row-major little-endian bytes, in pieces."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: `nbytes` bytes from `offset` on."""

    dtype: str
    shape: Shape
    path: Path
    offset: int
    nbytes: int

    def chunks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                chunk = file.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise CheckpointError(f"{self.path} ended while it was being read")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor in memory."""

    dtype: str
    shape: Shape
    data: bytes

    @classmethod
    def of(cls, values: torch.Tensor, dtype: str) -> NewTensor:
        """`values` cast to a floating `dtype`."""
        flat = values.to(TORCH_DTYPES[dtype]).reshape(-1)
        return cls(dtype, tuple(values.shape), flat.view(torch.uint8).numpy().tobytes())

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        yield self.data


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, from the headers alone; one file or shards with an index.

    Raises:
        CheckpointError: no weights, a shard is absent or damaged, or the index names a tensor that
            its file does not hold.
    """
    if (directory / INDEX).is_file():
        return _read_sharded(directory)
    if (directory / WEIGHTS).is_file():
        return _read_header(directory / WEIGHTS)
    raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}")


def _read_sharded(directory: Path) -> dict[str, StoredTensor]:
    places = read_json(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{directory / INDEX} has no weight_map")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(map(str, places.values()))):
        if Path(file).name != file:
            raise CheckpointError(f"{INDEX} names {file!r}, which is not a plain file name")
        shards[file] = _read_header(directory / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(f"{INDEX} says that {file} holds {name}, but it does not")
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is absent")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise CheckpointError(f"{path} is not a safetensors file, or is cut short")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _entry(entry, path, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} has a damaged safetensors header") from None
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end > size:
        raise CheckpointError(f"{path} is cut short: {end - size} of {end} bytes are missing")
    return tensors


def _entry(entry: dict[str, Any], path: Path, start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if begin < 0 or end - begin != math.prod(shape) * BITS[entry["dtype"]] // 8:
        raise ValueError("the offsets disagree with the shape")
    return StoredTensor(entry["dtype"], shape, path, start + begin, end - begin)


def write_tensors(
    directory: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors` as one file, or as shards of at most `shard_bytes` and an index.

    A tensor larger than `shard_bytes` gets a shard of its own.
    """
    shards = _split(tensors, shard_bytes)
    if len(shards) == 1:
        write_file(directory / WEIGHTS, shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(directory / INDEX, index)


def _split(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; equal tensors give equal bytes."""
    # Widest dtypes first keeps every tensor aligned to its own item size.
    ordered = sorted(tensors.items(), key=lambda item: (-BITS[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in ordered:
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]
        }  # fmt: skip
        begin = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for _, tensor in ordered:
            file.writelines(tensor.chunks())

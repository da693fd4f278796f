"""The one fused item that a request becomes.

All media of a request, and its text where the sieve reads it, reach vLLM as a single multimodal
item: the scheduler then sees one placeholder that is as long as the reduced prompt, and the worker
gets everything at once that the joint pool needs. This file is the only place that knows the
item's fields: `pack` runs in the API process, `unpack` in the worker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
)

from ep_serve.layout import Kind, Layout
from ep_serve.sieve import Budget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ep_serve.engine.input.media_features import MediumFeatures

MODALITY = "av"
"""The modality under which vLLM schedules fused items.

It is not "video" on purpose: with pruning on, vLLM 0.32 encodes items of that name one at a time
(`v1/worker/gpu_model_runner.py`, `_execute_mm_encoder`); under another name they are batched.
"""

PATCH_VALUES = 3 * 2 * 14 * 14
"""Numbers in one vision patch: colours x frames x rows x columns."""

MEL_BINS = 128

KEY_BYTES = 32

PROFILING_KEY = bytes(KEY_BYTES)
"""The key of the blank item that device memory is profiled with."""

_ON_DEVICE = ("pixel_values", "mel")
"""Fields that move to the device; the others stay on the CPU, where positions are computed."""


@dataclass(frozen=True)
class FusedItem:
    """One request as the worker sees it. Tensors: int64 on the CPU unless said otherwise."""

    key: bytes
    """Hash of everything the result depends on."""
    token_ids: torch.Tensor
    """(L,) the part of the full prompt that the item covers: all of it if the sieve reads text."""
    kinds: torch.Tensor
    """(L,) int8, see `Kind`."""
    media: torch.Tensor
    """(L,) index of the medium, -1 for text."""
    positions: torch.Tensor
    """(3, L) rotary positions, those of the full prompt."""
    budget: Budget
    """How much to keep, for the sieve's plan."""
    return_selection: bool
    """Whether the selection is reported (`return_selection`)."""
    keep: int
    """AV tokens that the plan keeps."""
    start: int
    """Place of the item in the reduced prompt: the text before it."""
    after: int
    """Rotary position of the first token after the item."""
    tail: int
    """Tokens of the prompt after the item."""
    delta: int
    """First decoded rotary position minus the length of the reduced prompt. It goes by the largest
    position of the full prompt, even if that is dropped."""
    vision_keys: list[bytes]
    """One content hash for each video or image, in prompt order."""
    vision_grids: torch.Tensor
    """(n, 3) patches in time, height and width of each video or image."""
    audio_keys: list[bytes]
    audio_frames: torch.Tensor
    """(n,) spectrum frames of each sound."""
    pixel_values: torch.Tensor
    """(patches, PATCH_VALUES), model dtype, on the device: all videos and images."""
    mel: torch.Tensor
    """(MEL_BINS, frames), model dtype, on the device: all sounds."""

    @property
    def length(self) -> int:
        """Tokens before reduction."""
        return self.token_ids.shape[0]

    @property
    def num_text(self) -> int:
        return int((self.kinds == Kind.TEXT).sum())

    @property
    def reduced_length(self) -> int:
        """Tokens after reduction."""
        return self.num_text + self.keep

    @property
    def layout(self) -> Layout:
        """The part as the sieves' plans take it."""
        return Layout(
            token_ids=self.token_ids.numpy(),
            kinds=self.kinds.numpy(),
            media=self.media.numpy(),
            positions=self.positions.numpy(),
        )


@dataclass(frozen=True)
class Span:
    """The part of a prompt that an item covers, and how the rest of the prompt lies around it."""

    layout: Layout
    keep: int
    start: int
    after: int
    tail: int
    delta: int


def cover(layout: Layout, keep: int, *, whole: bool) -> Span:
    """Cut the item's part out of a prompt: everything, or all from the first to the last AV token.

    Text outside the part counts up by one, so that its positions need not be sent: markers that
    share a position, as those of a clip with sound do, belong to the part.
    """
    first, end = 0, layout.length
    if not whole:
        (av,) = layout.is_av.nonzero()
        counted = layout.positions[0] == np.arange(layout.length)
        first = min(int(av[0]), int(np.argmin(counted)) if not counted.all() else layout.length)
        behind = layout.positions[0, int(av[-1]) + 1 :]
        breaks = np.flatnonzero(np.diff(behind) != 1)
        end = int(av[-1]) + 1 + (int(breaks[-1]) + 1 if breaks.size else 0)
    tail = layout.length - end
    return Span(
        layout=layout.part(first, end),
        keep=keep,
        start=first,
        after=int(layout.positions[0, end]) if tail else 0,
        tail=tail,
        delta=layout.next_position - layout.num_text - keep,
    )


def pack(
    key: bytes,
    span: Span,
    budget: Budget,
    features: Sequence[MediumFeatures],
    dtype: torch.dtype,
    *,
    return_selection: bool = False,
) -> MultiModalKwargsItem:
    """Build the item that vLLM sends to the worker."""
    layout = span.layout
    vision = [f for f in features if f.pixel_values is not None]
    sounds = [f for f in features if f.mel is not None]
    fields = {
        "key": _bytes_tensor([key])[0],
        "token_ids": torch.from_numpy(layout.token_ids),
        "kinds": torch.from_numpy(layout.kinds),
        "media": torch.from_numpy(layout.media),
        "positions": torch.from_numpy(layout.positions),
        "budget": torch.tensor(
            [_number(n) for n in (budget.keep_ratio, budget.rho_audio, budget.rho_video)],
            dtype=torch.float64,
        ),
        "return_selection": torch.tensor(return_selection),
        "span": torch.tensor([span.keep, span.start, span.after, span.tail, span.delta]),
        "vision_keys": _bytes_tensor([f.key for f in vision]),
        "vision_grids": torch.tensor([f.grid_thw for f in vision]).reshape(-1, 3),
        "audio_keys": _bytes_tensor([f.key for f in sounds]),
        "audio_frames": torch.tensor(
            [f.mel.shape[1] for f in sounds if f.mel is not None], dtype=torch.int64
        ),
        "pixel_values": _concatenate(
            [f.pixel_values for f in vision], torch.empty(0, PATCH_VALUES, dtype=dtype), dim=0
        ),
        "mel": _concatenate([f.mel for f in sounds], torch.empty(MEL_BINS, 0, dtype=dtype), dim=1),
    }
    return MultiModalKwargsItem(
        {
            name: MultiModalFieldElem(
                data=value,
                field=MultiModalBatchedField(keep_on_cpu=name not in _ON_DEVICE),
            )
            for name, value in fields.items()
        }
    )


def unpack(batch: Mapping[str, Any]) -> list[FusedItem]:
    """The items of a batch, from the keyword arguments of `embed_multimodal`.

    Each value is a list of tensors, or one stacked tensor where all shapes agree.
    """
    return [
        _unpack_one({name: values[i] for name, values in batch.items()})
        for i in range(len(batch["key"]))
    ]


def unpack_cpu_fields(item: Mapping[str, MultiModalFieldElem]) -> FusedItem:
    """An item without its device tensors, as the scheduler keeps it for cached prefixes."""
    fields: dict[str, Any] = {
        name: elem.data for name, elem in item.items() if name not in _ON_DEVICE
    }
    empty = torch.empty(0)
    return _unpack_one({**fields, "pixel_values": empty, "mel": empty})


def full_length(item: Mapping[str, MultiModalFieldElem] | None) -> int | None:
    """Tokens that an item covers before reduction; None where its content lies elsewhere."""
    if item is None or "token_ids" not in item:
        return None
    token_ids = item["token_ids"].data
    assert isinstance(token_ids, torch.Tensor)
    return token_ids.shape[0]


def _unpack_one(fields: dict[str, Any]) -> FusedItem:
    keep, start, after, tail, delta = fields["span"].tolist()
    return FusedItem(
        key=_to_bytes(fields["key"]),
        token_ids=fields["token_ids"],
        kinds=fields["kinds"],
        media=fields["media"],
        positions=fields["positions"],
        budget=Budget(*(None if math.isnan(n) else n for n in fields["budget"].tolist())),
        return_selection=bool(fields["return_selection"]),
        keep=keep,
        start=start,
        after=after,
        tail=tail,
        delta=delta,
        vision_keys=[_to_bytes(row) for row in fields["vision_keys"]],
        vision_grids=fields["vision_grids"],
        audio_keys=[_to_bytes(row) for row in fields["audio_keys"]],
        audio_frames=fields["audio_frames"],
        pixel_values=fields["pixel_values"],
        mel=fields["mel"],
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _bytes_tensor(keys: list[bytes]) -> torch.Tensor:
    array = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
    return torch.from_numpy(array.copy())


def _to_bytes(row: torch.Tensor) -> bytes:
    return row.numpy().tobytes()


def _concatenate(
    parts: Sequence[torch.Tensor | None], empty: torch.Tensor, dim: int
) -> torch.Tensor:
    present = [part for part in parts if part is not None]
    if len(present) == 1:
        return present[0]  # no copy of a clip more than needed
    return torch.cat(present, dim=dim) if present else empty

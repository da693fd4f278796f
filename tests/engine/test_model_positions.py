"""How positions reach vLLM's two model runners; the model itself is not built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

from ep_serve.engine.input.fused_item import cover, pack
from ep_serve.engine.model import position_codec
from ep_serve.engine.model.reducing_model import (
    Qwen2_5OmniCompressForConditionalGeneration as Model,
)
from ep_serve.layout import Image, Layout, MediaTokens, Video, build_layout
from ep_serve.sieve import Budget

TOKENS = MediaTokens(
    audio=502, image=508, video=509, audio_bos=503, audio_eos=504, vision_bos=505, vision_eos=506
)
WIDTH = 8


def runner_model(*, v2: bool) -> Any:
    """The positions part of the model, as one of the runners sees it."""
    model = SimpleNamespace(_offset_column=not v2)
    for name in ("get_mrope_input_positions", "recompute_mrope_positions"):
        setattr(model, name, getattr(Model, name).__get__(model))
    return model


def picture_prompt(*, whole: bool = True) -> tuple[Layout, int, list[Any]]:
    """A prompt with a picture of 16 tokens of which 4 are kept: layout, budget, vLLM's features."""
    prompt = [1, 2, TOKENS.vision_bos, TOKENS.image, TOKENS.vision_eos, 3, 4]
    layout = build_layout(prompt, [Image((1, 8, 8))], TOKENS)
    span = cover(layout, 4, whole=whole)
    data = pack(bytes(range(32)), span, Budget(0.25), [], torch.bfloat16)
    return layout, 4, [SimpleNamespace(data=data)]


def coded_rows(layout: Layout, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the sieve would return if it kept the last tokens, and the positions it wrote."""
    survivors = (
        np.flatnonzero(~layout.is_av).tolist() + np.flatnonzero(layout.is_av).tolist()[-keep:]
    )
    positions = torch.from_numpy(layout.positions)[:, sorted(survivors)]
    delta = layout.next_position - positions.shape[1]
    embeddings = torch.randn(positions.shape[1], WIDTH).to(torch.bfloat16)
    return position_codec.append(embeddings, 0, positions, delta), positions


def test_plain_text_counts_up() -> None:
    positions, delta = runner_model(v2=True).get_mrope_input_positions([5, 6, 7], [])
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert delta == 0


@pytest.mark.parametrize("v2", [False, True])
def test_generated_tokens_go_on_behind_the_full_prompt(v2: bool) -> None:
    layout, keep, features = picture_prompt()
    reduced = layout.num_text + keep
    resumed = list(range(reduced + 3))  # after preemption: the prompt and three generated tokens
    positions, delta = runner_model(v2=v2).get_mrope_input_positions(resumed, features)
    assert delta == layout.next_position - reduced
    expected = layout.next_position + torch.arange(3)
    assert torch.equal(positions[:, reduced : reduced + 3], expected.repeat(3, 1))
    assert positions.shape[1] == len(resumed) + (not v2)


def test_the_v1_runner_keeps_its_offset_in_steps_without_media() -> None:
    layout, keep, features = picture_prompt()
    model = runner_model(v2=False)
    prompt = [0] * (layout.num_text + keep)
    positions, delta = model.get_mrope_input_positions(prompt, features)
    for _ in range(2):
        _, positions, found = model.recompute_mrope_positions(prompt, [], positions, len(prompt))
        assert found == delta


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_v1_runner_gets_positions_chunk_by_chunk(chunk: int) -> None:
    layout, keep, features = picture_prompt()
    model = runner_model(v2=False)
    coded, expected = coded_rows(layout, keep)
    prompt = [0] * len(coded)
    positions, _ = model.get_mrope_input_positions(prompt, features)
    for start in range(0, len(coded), chunk):
        rows = coded[start : start + chunk]
        embeddings, positions, delta = model.recompute_mrope_positions(
            prompt, [rows], positions, start
        )
        assert torch.equal(embeddings[0], rows[:, :WIDTH])
        assert delta == layout.next_position - len(coded)
    assert torch.equal(positions[:, :-1], expected)


@pytest.mark.parametrize("overhang", [0, 40])
def test_an_item_of_the_clip_alone_leaves_the_text_where_it_is(overhang: int) -> None:
    # With an overhang the picture lasts longer than the sound: the text after lies inside its time.
    clip = Video((2, 4, 4), second_per_grid=1.0, audio_tokens=50 - overhang)
    prompt = [1, 2, TOKENS.vision_bos, TOKENS.video, TOKENS.vision_eos, 3, 4, 5]
    layout = build_layout(prompt, [clip], TOKENS)
    span = cover(layout, 6, whole=False)
    assert (span.start, span.tail) == (3, 4)
    data = pack(bytes(range(32)), span, Budget(0.1), [], torch.float32)
    assert not span.layout.is_av.all()  # the markers that share a position are inside
    assert span.layout.num_av == layout.num_av
    reduced = layout.num_text + 6
    positions, delta = runner_model(v2=True).get_mrope_input_positions(
        [0] * (reduced + 2), [SimpleNamespace(data=data)]
    )
    text = layout.positions[0, ~layout.is_av]
    assert positions[0, : span.start].tolist() == text[: span.start].tolist()
    assert positions[0, reduced - span.tail : reduced].tolist() == text[-span.tail :].tolist()
    generated = [layout.next_position, layout.next_position + 1]
    assert positions[0, reduced:].tolist() == generated
    assert delta == layout.next_position - reduced


class FakeRopeState:
    """vLLM's `RopeState` without its pinned memory and kernels."""

    def __init__(self, positions: torch.Tensor, delta: int) -> None:
        self.positions = positions.clone()
        self.delta = delta

    def read_prefill_positions(self, index: int, length: int) -> torch.Tensor:
        return self.positions[:, :length]

    def update_prefill_positions(self, index: int, positions: torch.Tensor, delta: int) -> None:
        self.positions[:, : positions.shape[1]] = positions
        self.delta = delta


def test_the_v2_runner_gets_positions_through_its_pruner() -> None:
    layout, keep, features = picture_prompt()
    model = runner_model(v2=True)
    coded, expected = coded_rows(layout, keep)
    length = len(coded)
    rope = FakeRopeState(*model.get_mrope_input_positions([0] * length, features))
    place = SimpleNamespace(offset=0, length=length)
    place.get_embeds_indices_in_range = lambda start, end: (start, end)
    cache = SimpleNamespace(mm_features={"r": [SimpleNamespace(mm_position=place)]})
    pruner = MultiModalPruner(model, rope, cache, WIDTH)
    requests = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=torch.zeros(1, length, dtype=torch.int64))
    )
    for start, end in ((0, 5), (5, length)):
        batch = SimpleNamespace(
            req_ids=["r"],
            idx_mapping_np=np.array([0]),
            prefill_len_np=np.array([length]),
            num_computed_prefill_tokens_np=np.array([start]),
            num_scheduled_tokens=np.array([end - start]),
        )
        (embeddings,) = pruner.recompute([coded[start:end]], batch, requests)
        assert embeddings.shape == (end - start, WIDTH)
    assert torch.equal(rope.positions, expected)
    assert rope.delta == layout.next_position - length

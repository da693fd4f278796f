"""Saliency within the audio tower's windows: against the plain formula, and against the paper's."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ep_serve.sieve import saliency
from ep_serve.sieve.saliency import windowed_saliency
from tests.goldens import CHECKPOINT, load_case, needs_goldens

HEADS, WIDTH = 2, 8

quick = settings(deadline=None, max_examples=40)
sounds = st.lists(st.integers(2, 330), min_size=1, max_size=4)


def tower_borders(frames: list[int]) -> list[int]:
    """Windows of 100 frames, as in Qwen2.5-Omni; none straddles two sounds."""
    borders = [0]
    for length in frames:
        begin = borders[-1]
        borders += [begin + end for end in range(100, length, 100)] + [begin + length]
    return borders


def make_states(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    query, key = torch.randn(2, HEADS, length, WIDTH, generator=generator)
    return 2 * query, key


def published(query: Tensor, key: Tensor, borders: list[int], frames: list[int]) -> Tensor:
    """One softmax over all that may see each other, T x T at once, pooled by two."""
    length = query.shape[1]
    window = torch.zeros(length, dtype=torch.int64)
    for number, (begin, end) in enumerate(pairwise(borders)):
        window[begin:end] = number
    logits = query.double() @ key.double().transpose(1, 2) / query.shape[-1] ** 0.5
    logits = logits.masked_fill(window[:, None] != window, -torch.inf)
    received = logits.softmax(-1).mean(0).sum(0)
    parts = [part[: len(part) // 2 * 2].view(-1, 2).mean(1) for part in received.split(frames)]
    return torch.cat(parts).float()


@quick
@given(frames=sounds)
def test_it_is_the_plain_formula_within_windows(frames: list[int]) -> None:
    borders, (query, key) = tower_borders(frames), make_states(sum(frames))
    got = windowed_saliency(query, key, borders, frames)
    assert got.shape == (sum(length // 2 for length in frames),)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, published(query, key, borders, frames), rtol=0, atol=1e-5)


def test_in_a_single_window_it_is_the_published_formula() -> None:
    query, key = make_states(100)
    got = windowed_saliency(query, key, [0, 100], [100])
    whole = (query @ key.transpose(1, 2) / WIDTH**0.5).softmax(-1).mean(0).sum(0)
    torch.testing.assert_close(got, whole.view(-1, 2).mean(1), rtol=0, atol=1e-5)


def test_the_frames_of_a_short_window_count_no_more_than_others() -> None:
    frames = [220]
    got = windowed_saliency(*make_states(220), tower_borders(frames), frames)
    assert [part.mean().item() for part in got.split([50, 50, 10])] == pytest.approx([1] * 3)


def test_no_attention_spans_more_than_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    # So the memory it takes does not grow with the sound.
    largest = 0
    attention = saliency._attention

    def watched(query: Tensor, key: Tensor) -> Tensor:
        nonlocal largest
        result = attention(query, key)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(saliency, "_attention", watched)
    sizes = []
    for frames in ([5_000], [50_000]):
        windowed_saliency(*make_states(frames[0]), tower_borders(frames), frames)
        sizes.append(largest)
    assert sizes[0] == sizes[1] == HEADS * 32 * 100 * 100


@pytest.mark.parametrize(("borders", "frames"), [([0, 9], [10]), ([0, 10], [9]), ([1, 10], [10])])
def test_windows_that_do_not_cover_the_sound_are_refused(
    borders: list[int], frames: list[int]
) -> None:
    with pytest.raises(ValueError, match="must run from 0 to 10"):
        windowed_saliency(*make_states(10), borders, frames)


@cache
def load_tower() -> Any:
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

    config = json.loads((CHECKPOINT / "config.json").read_text())["thinker_config"]["audio_config"]
    tower = omni.Qwen2_5OmniAudioEncoder(omni.Qwen2_5OmniAudioEncoderConfig(**config))
    prefix = "thinker.audio_tower."
    weights = load_file(CHECKPOINT / "model.safetensors")
    tower.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    return tower.eval().requires_grad_(False)


def listen(case: str) -> tuple[Tensor, Tensor, list[int]]:
    """Queries, keys and windows of the last layer of the audio tower."""
    tower, tensors = load_tower(), load_case(case)[1]
    found: dict[str, Any] = {}

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states = kwargs["hidden_states"]
        for name, project in (("query", module.q_proj), ("key", module.k_proj)):
            found[name] = project(states).unflatten(1, (module.num_heads, -1)).transpose(0, 1)
        found["borders"] = kwargs["cu_seqlens"].tolist()

    handle = tower.layers[-1].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    lengths = tensors["proc.feature_lengths"]
    convolved, _ = tower._get_feat_extract_output_lengths(lengths)
    tower(tensors["proc.input_features.0"].view(128, -1), lengths, convolved)
    handle.remove()
    return found["query"], found["key"], found["borders"]


@needs_goldens
@pytest.mark.parametrize(
    ("case", "least"),
    [
        ("aiv_a_r020", 0.95),  # 4 s
        ("aiv_b_r020", 0.9),  # 6 s
        ("aiv_f_short_audio_r020", 0.95),  # 2 s
        ("audio_d_r020", 0.9),  # 2.5 s
    ],
)
def test_on_short_clips_nearly_the_tokens_of_the_paper_are_salient(case: str, least: float) -> None:
    query, key, borders = listen(case)
    length = query.shape[1]
    ours = windowed_saliency(query, key, borders, [length])
    paper = published(query, key, [0, length], [length])
    keep = round(0.7 * len(ours))
    both = torch.isin(ours.topk(keep).indices, paper.topk(keep).indices).sum()
    assert both / keep >= least

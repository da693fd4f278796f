"""Pools and layouts of a given size, and those of random prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from ep_serve.layout import Kind, Layout, Video, build_layout
from ep_serve.sieve import Pool
from tests.layout.prompts import ANY_PROMPT, TOKENS, Prompt

HIDDEN_SIZE = 16


def make_pool(size: int, seed: int = 0) -> Pool:
    """A pool of video tokens with random states."""
    return pool_of(torch.randn(size, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)))


def pool_of(hidden: Tensor) -> Pool:
    """A pool of video tokens with these states."""
    size = len(hidden)
    return Pool(
        hidden=hidden,
        kinds=torch.full((size,), Kind.VIDEO, dtype=torch.int8),
        positions=torch.arange(size).expand(3, -1),
        media=torch.zeros(size, dtype=torch.int32),
    )


def make_layout(num_av: int) -> Layout:
    """A prompt of three text tokens and then `num_av` video tokens."""
    length = 3 + num_av
    is_av = np.arange(length) >= 3
    return Layout(
        token_ids=np.zeros(length, dtype=np.int64),
        kinds=np.where(is_av, Kind.VIDEO, Kind.TEXT).astype(np.int8),
        media=np.where(is_av, 0, -1).astype(np.int32),
        positions=np.tile(np.arange(length, dtype=np.int64), (3, 1)),
    )


def as_one_clip(layout: Layout) -> Layout:
    """All media of a prompt as one, which is how OmniSIFT's authors pair frames."""
    return replace(layout, media=np.where(layout.is_av, 0, layout.media).astype(np.int32))


def lay_out(prompt: Prompt) -> Layout:
    return build_layout(prompt.ids, prompt.media, TOKENS)


def clip_layout(steps: int, per_step: int, audio: int, seconds: float = 1.0) -> Layout:
    """A prompt with one clip of `steps` frames of `per_step` tokens, `seconds` apart."""
    clip = Video((steps, 2, 2 * per_step), seconds, audio)
    return lay_out(Prompt().text(1, 2).add(clip).text(3))


def pool_for(layout: Layout, seed: int = 0, hidden_size: int = HIDDEN_SIZE) -> Pool:
    """The pool of a prompt, with random states and saliency."""
    generator = torch.Generator().manual_seed(seed)
    return Pool(
        hidden=torch.randn(layout.num_av, hidden_size, generator=generator),
        kinds=torch.from_numpy(layout.kinds[layout.is_av]),
        positions=torch.from_numpy(layout.positions[:, layout.is_av]),
        media=torch.from_numpy(layout.media[layout.is_av]),
        saliency=torch.rand(layout.count(Kind.AUDIO), generator=generator),
    )


def without_text(layout: Layout) -> Layout:
    """The AV tokens of a prompt alone."""
    is_av = layout.is_av
    return replace(
        layout,
        token_ids=layout.token_ids[is_av],
        kinds=layout.kinds[is_av],
        media=layout.media[is_av],
        positions=layout.positions[:, is_av],
    )


LAYOUTS: st.SearchStrategy[Layout] = ANY_PROMPT.map(lay_out)

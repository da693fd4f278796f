"""Which tensors an EchoingPixels checkpoint holds, and their shapes.

Towers and decoder are read off transformers' own thinker, built without memory, so that no list
of names has to be kept in step with it. The refiner has the leaves of decoder layers; the score
head is an RMS norm, a linear layer, SiLU, and a linear layer to one number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from ep_serve.checkpoint.config import text_config
from ep_serve.checkpoint.tensors import Shape

THINKER = "thinker."
DECODER_LAYERS = "thinker.model.layers."
REFINER_LAYERS = "thinker.model.bidir_encoder.layers."
COMPRESSOR = "thinker.model.compressor."
EMBEDDING = "thinker.model.embed_tokens.weight"
OUTPUT = "thinker.lm_head.weight"
SPEECH = ("talker.", "token2wav.")  # Qwen2.5-Omni's voice, which is not served


def stock_shapes(config: Any) -> dict[str, Shape]:
    """Towers, embedding table, decoder and output of a whole Qwen2.5-Omni configuration.

    The output is absent where it is tied to the embedding table.
    """
    with torch.device("meta"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
    shapes = {THINKER + name: tuple(value.shape) for name, value in thinker.state_dict().items()}
    if text_config(config).tie_word_embeddings:
        del shapes[OUTPUT]
    return shapes


def refiner_sources(names: Iterable[str], layers: int) -> dict[str, str]:
    """The refiner's tensor names, each with the decoder tensor of the same layer and leaf."""
    firsts = tuple(f"{DECODER_LAYERS}{layer}." for layer in range(layers))
    return {
        REFINER_LAYERS + name.removeprefix(DECODER_LAYERS): name
        for name in names
        if name.startswith(firsts)
    }


def refiner_layers_in(names: Iterable[str]) -> int:
    """How many refiner layers a set of tensor names speaks of."""
    found = {
        name.removeprefix(REFINER_LAYERS).split(".")[0]
        for name in names
        if name.startswith(REFINER_LAYERS)
    }
    return len(found)


def compressor_shapes(hidden_size: int) -> dict[str, Shape]:
    """The score head for hidden states of `hidden_size`."""
    return {
        COMPRESSOR + "ln.weight": (hidden_size,),
        COMPRESSOR + "score_head.0.weight": (hidden_size, hidden_size),
        COMPRESSOR + "score_head.0.bias": (hidden_size,),
        COMPRESSOR + "score_head.2.weight": (1, hidden_size),
        COMPRESSOR + "score_head.2.bias": (1,),
    }


def expected_shapes(config: Any, refiner_layers: int) -> dict[str, Shape]:
    """Everything an EchoingPixels checkpoint with this configuration has to hold."""
    stock = stock_shapes(config)
    # One layer stands for all: a refiner may be deeper than the decoder.
    leaves = {
        name.removeprefix(DECODER_LAYERS + "0."): shape
        for name, shape in stock.items()
        if name.startswith(DECODER_LAYERS + "0.")
    }
    refiner = {
        f"{REFINER_LAYERS}{layer}.{leaf}": shape
        for layer in range(refiner_layers)
        for leaf, shape in leaves.items()
    }
    return stock | refiner | compressor_shapes(text_config(config).hidden_size)

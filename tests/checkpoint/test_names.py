from __future__ import annotations

import copy
import json

import pytest

from ep_serve.checkpoint import names
from ep_serve.checkpoint.config import load_config, parse_config
from ep_serve.checkpoint.embedded import CONFIG
from ep_serve.checkpoint.tensors import read_tensors
from tests.goldens import CHECKPOINT, needs_goldens


@needs_goldens
def test_the_official_tensors_are_all_expected_and_all_there() -> None:
    found = {name: tensor.shape for name, tensor in read_tensors(CHECKPOINT).items()}
    assert names.expected_shapes(load_config(CHECKPOINT), 2) == found


def test_tied_embeddings_need_no_output() -> None:
    data = copy.deepcopy(CONFIG)
    data["thinker_config"]["text_config"]["tie_word_embeddings"] = True
    untied = names.stock_shapes(parse_config(CONFIG))
    assert untied.keys() - names.stock_shapes(parse_config(data)).keys() == {names.OUTPUT}


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "hidden", "mlp", "vocabulary"),
    [(36, 16, 2, 2048, 11008, 151936), (28, 28, 4, 3584, 18944, 152064)],
    ids=["3B", "7B"],
)
def test_the_published_sizes_have_the_shapes_of_the_paper(
    layers: int, heads: int, kv_heads: int, hidden: int, mlp: int, vocabulary: int
) -> None:
    data = json.loads(json.dumps(CONFIG))
    thinker = data["thinker_config"]
    thinker["text_config"] |= {
        "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocabulary,
    }  # fmt: skip
    thinker["vision_config"]["out_hidden_size"] = thinker["audio_config"]["output_dim"] = hidden
    shapes = names.expected_shapes(parse_config(data), 4)
    refiner = "thinker.model.bidir_encoder.layers.3."
    assert shapes[refiner + "self_attn.k_proj.weight"] == (kv_heads * 128, hidden)
    assert shapes[refiner + "mlp.down_proj.weight"] == (hidden, mlp)
    assert shapes["thinker.model.compressor.score_head.0.weight"] == (hidden, hidden)
    assert shapes["thinker.lm_head.weight"] == (vocabulary, hidden)
    assert f"thinker.model.layers.{layers - 1}.input_layernorm.weight" in shapes
    assert names.refiner_layers_in(shapes) == 4


def test_the_refiner_begins_as_the_first_decoder_layers() -> None:
    stock = names.stock_shapes(parse_config(CONFIG))
    sources = names.refiner_sources(stock, 2)
    assert len(sources) == 24
    for name, origin in sources.items():
        assert name.replace("bidir_encoder.", "") == origin
        assert origin.split(".")[3] in ("0", "1")

from __future__ import annotations

import pytest
from vllm.model_executor.models.utils import WeightsMapper

from ep_serve.engine.model import reducing_model

MODELS = [
    reducing_model.Qwen2_5OmniReducedForConditionalGeneration,
    reducing_model.Qwen2_5OmniCompressForConditionalGeneration,
]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("head", reducing_model.SCORE_HEADS)
def test_a_sieve_without_weights_leaves_out_those_of_the_checkpoint(kind: type, head: str) -> None:
    mapper: WeightsMapper = kind.hf_to_vllm_mapper  # type: ignore[attr-defined]
    names = [f"{head}score_head.0.weight", "thinker.model.layers.0.mlp.up_proj.weight"]
    assert mapper.apply_list(names)[0] == "sieve.score_head.0.weight"
    left = reducing_model.without_score_head(mapper).apply_list(names)
    assert left == mapper.apply_list(names[1:])

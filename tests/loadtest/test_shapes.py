from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ep_serve.checkpoint import names
from ep_serve.checkpoint.config import parse_config
from loadtest.reference import config_of
from loadtest.shapes import (
    EMBEDDED,
    REFERENCE,
    SHAPES,
    AudioTower,
    ModelShape,
    Prompt,
    VisionTower,
    bound,
    from_checkpoint,
    stages,
    table,
)

TINY = ModelShape(
    name="tiny",
    hidden=4,
    layers=3,
    heads=2,
    kv_heads=1,
    head_dim=2,
    intermediate=8,
    vocabulary=10,
    refiner_layers=1,
    vision=VisionTower(layers=0, hidden=1, intermediate=1, full_layers=0),
    audio=AudioTower(layers=0, hidden=1, intermediate=1),
)
PROMPT = Prompt(video=16, audio=0, text=4, frame_tokens=4, output=3)


def costs(keep_ratio: float | None) -> dict[str, float]:
    return {stage.name: stage.flops for stage in stages(TINY, PROMPT, keep_ratio)}


def test_a_layer_has_the_weights_counted_by_hand() -> None:
    queries, keys_and_values, output, mlp = 4 * 4, 2 * 4 * 2, 4 * 4, 3 * 4 * 8
    assert TINY.layer_weights == queries + keys_and_values + output + mlp == 144


def test_prefill_is_counted_as_by_hand() -> None:
    # 20 tokens: 3 layers x 2 x 144 each; 210 causal pairs x 4 x 4 in 3 layers; one row of logits
    assert costs(None)["prefill"] == 20 * 3 * 288 + 3 * 210 * 16 + 2 * 4 * 10


def test_the_refiner_sees_all_pairs_of_the_full_prompt() -> None:
    assert costs(0.25)["refiner"] == 20 * 288 + 400 * 16


def test_the_reduced_prompt_keeps_its_text() -> None:
    # 4 text tokens and a quarter of 16
    assert PROMPT.reduced(0.25) == 8
    assert costs(0.25)["prefill"] == 8 * 3 * 288 + 3 * 36 * 16 + 2 * 4 * 10


def test_selection_is_the_score_head_over_the_media() -> None:
    assert costs(0.25)["selection"] == 16 * 2 * (4 * 4 + 4)


def test_decoding_reads_weights_and_cache_at_every_step() -> None:
    decode = stages(TINY, PROMPT, None)[-1]
    # two steps after the prefill, at 21 and 22 tokens
    assert decode.flops == 2 * 3 * 288 + 3 * 43 * 16 + 2 * 2 * 4 * 10
    kv_token = 2 * 3 * 1 * 2 * 2
    assert decode.nbytes == 2 * 2 * (3 * 144 + 40) + 43 * kv_token


def test_the_kv_cache_of_the_reference_is_12_kib_a_token() -> None:
    assert REFERENCE.kv_bytes_per_token == 12 * 1024


def test_the_bound_is_the_ratio_of_what_comes_before_the_first_token() -> None:
    full, reduced = costs(None), costs(0.25)
    before = [sum(list(part.values())[:-1]) for part in (full, reduced)]
    limit = bound(TINY, PROMPT, 0.25)
    assert limit.first_token == before[0] / before[1]
    assert limit.request == sum(full.values()) / sum(reduced.values())
    assert limit.kv == 20 / 8


def test_a_smaller_keep_ratio_has_a_larger_bound() -> None:
    prompt = Prompt.of_clip(30, 144)
    limits = [bound(REFERENCE, prompt, ratio).first_token for ratio in (1.0, 0.5, 0.2, 0.05)]
    assert limits == sorted(limits)
    assert limits[0] < 1 < limits[1]


def test_a_clip_of_30_s_is_about_5100_tokens() -> None:
    prompt = Prompt.of_clip(30, 144)
    assert (prompt.video, prompt.audio, prompt.full) == (4320, 750, 5102)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_count_the_weights_that_checkpoints_have(shape: ModelShape) -> None:
    config = parse_config(config_of(shape))
    found = names.expected_shapes(config, shape.refiner_layers)

    def matrices(prefix: str) -> int:
        sizes = (math.prod(s) for n, s in found.items() if n.startswith(prefix) and len(s) > 1)
        return sum(sizes)

    assert shape.layer_weights == matrices("thinker.model.layers.0.")
    assert shape.head_weights == matrices("thinker.model.compressor.")
    assert shape.vision.weights(shape.hidden) == matrices("thinker.visual.")
    marks = matrices("thinker.audio_tower.audio_bos_eos_token")  # a table, not a product
    assert shape.audio.weights(shape.hidden) == matrices("thinker.audio_tower.") - marks


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_can_be_read_from_a_checkpoint(tmp_path: Path, shape: ModelShape) -> None:
    folder = tmp_path / shape.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    assert from_checkpoint(folder) == shape


def test_a_config_without_a_size_is_refused(tmp_path: Path) -> None:
    config = config_of(EMBEDDED)
    del config["thinker_config"]["text_config"]["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hidden_size"):
        from_checkpoint(tmp_path)


def test_the_table_shows_every_stage() -> None:
    shown = table(REFERENCE, Prompt.of_clip(30, 144))
    for name in ("towers", "refiner", "selection", "prefill", "decode"):
        assert f"| {name} |" in shown

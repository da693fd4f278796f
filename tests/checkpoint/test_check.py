from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_serve.checkpoint import names
from ep_serve.checkpoint.check import Finding, check
from ep_serve.checkpoint.tensors import WEIGHTS, NewTensor, Tensor, read_tensors, write_tensors
from tests.checkpoint.conftest import edit_json
from tests.goldens import CHECKPOINT, needs_goldens

LN = "thinker.model.compressor.ln.weight"
NEW = NewTensor.of(torch.ones(256), "BF16")


def only(findings: list[Finding], severity: str = "error") -> str:
    assert [finding.severity for finding in findings] == [severity], findings
    return findings[0].text


@pytest.fixture
def with_weights(embedded: Path, copied: Path) -> Callable[..., Path]:
    """The embedded checkpoint with some tensors dropped and some added."""

    def make(drop: str = "nothing", **add: Tensor) -> Path:
        tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in read_tensors(embedded).items()
            if not name.startswith(drop)
        }
        write_tensors(copied, tensors | add)
        return copied

    return make


@pytest.fixture
def with_config(copied: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """The embedded checkpoint with another config.json."""

    def make(edit: Callable[[dict[str, Any]], Any]) -> Path:
        edit_json(copied / "config.json", edit)
        return copied

    return make


@needs_goldens
def test_the_official_checkpoint_has_no_faults() -> None:
    assert check(CHECKPOINT) == []


def test_the_embedded_checkpoint_has_no_faults(embedded: Path) -> None:
    assert check(embedded) == []


def test_a_stock_checkpoint_is_sent_to_init(stock: Path) -> None:
    assert "make an EchoingPixels checkpoint from it with `ep-serve checkpoint init`" in only(
        check(stock)
    )


def test_an_empty_directory_is_one_fault(tmp_path: Path) -> None:
    assert only(check(tmp_path)) == f"{tmp_path} holds no config.json"


def test_absent_weights_are_one_fault(copied: Path) -> None:
    (copied / WEIGHTS).unlink()
    assert f"neither {WEIGHTS} nor" in only(check(copied))


def test_a_missing_tensor_is_named(with_weights: Callable[..., Path]) -> None:
    assert only(check(with_weights(drop=LN))) == f"1 tensors are missing: {LN}"


def test_many_missing_tensors_are_counted(with_weights: Callable[..., Path]) -> None:
    text = only(check(with_weights(drop="thinker.visual.")))
    assert text.startswith("38 tensors are missing: ")
    assert text.endswith(" and 35 more")


def test_missing_refiner_weights_are_named(with_weights: Callable[..., Path]) -> None:
    text = only(check(with_weights(drop=names.REFINER_LAYERS)))
    assert text == "the weights hold no refiner (thinker.model.bidir_encoder.layers.*)"


def test_a_config_with_another_number_of_refiner_layers_is_a_fault(
    with_weights: Callable[..., Path],
) -> None:
    text = only(check(with_weights(drop=names.REFINER_LAYERS + "1.")))
    assert text == "av_refiner_layers is 2, but the weights hold 1 such layers"


def test_a_tensor_of_another_shape_is_a_fault(with_weights: Callable[..., Path]) -> None:
    changed = NewTensor.of(torch.ones(128), "BF16")
    text = only(check(with_weights(**{LN: changed})))
    assert text.endswith(f"config.json says: {LN} is [128] instead of [256]")


def test_a_tensor_that_belongs_to_nothing_is_a_fault(with_weights: Callable[..., Path]) -> None:
    text = only(check(with_weights(**{"thinker.model.surprise": NEW})))
    assert text == "1 tensors belong to nothing in config.json: thinker.model.surprise"


def test_a_voice_is_only_a_warning(with_weights: Callable[..., Path]) -> None:
    text = only(check(with_weights(**{"talker.x": NEW, "token2wav.y": NEW})), "warning")
    assert text == "2 tensors (0 MiB) of the voice are never used"


def test_an_output_beside_tied_embeddings_is_only_a_warning(
    with_config: Callable[..., Path],
) -> None:
    def tie(data: dict[str, Any]) -> None:
        data["thinker_config"]["text_config"]["tie_word_embeddings"] = True

    assert "lm_head.weight is never used" in only(check(with_config(tie)), "warning")


def test_a_senseless_ratio_is_a_fault(with_config: Callable[..., Path]) -> None:
    def spoil(data: dict[str, Any]) -> None:
        data["thinker_config"]["text_config"]["compression_ratio"] = 20

    assert "compression_ratio in thinker_config.text_config must be" in only(
        check(with_config(spoil))
    )


def test_another_architecture_is_a_fault(with_config: Callable[..., Path]) -> None:
    findings = check(with_config(lambda data: data.update(architectures=["Qwen2VL"])))
    assert only(findings).startswith("architectures must name Qwen2_5OmniCompress")


def test_a_missing_mrope_section_is_a_fault(with_config: Callable[..., Path]) -> None:
    def spoil(data: dict[str, Any]) -> None:
        data["thinker_config"]["text_config"]["rope_scaling"] = {"rope_type": "default"}

    assert "needs an mrope_section with the sum 32" in only(check(with_config(spoil)))


def test_a_token_with_another_id_is_a_fault(with_config: Callable[..., Path]) -> None:
    findings = check(with_config(lambda data: data["thinker_config"].update(video_token_index=9)))
    assert only(findings) == (
        "video_token <|VIDEO|> has id 266 in the tokenizer, but video_token_index in "
        "thinker_config is 9"
    )


def test_an_absent_tokenizer_is_a_fault(copied: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (copied / name).unlink()
    assert "tokenizer" in only(check(copied))


def test_a_tokenizer_without_media_tokens_is_a_fault(copied: Path) -> None:
    def spoil(data: dict[str, Any]) -> None:
        del data["audio_token"], data["extra_special_tokens"]["audio_token"]

    edit_json(copied / "tokenizer_config.json", spoil)
    assert only(check(copied)) == "the tokenizer has no audio_token"


def test_an_absent_chat_template_is_only_a_warning(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    assert "no chat template" in only(check(copied), "warning")


def test_an_absent_processor_is_a_fault(copied: Path) -> None:
    (copied / "preprocessor_config.json").unlink()
    assert only(check(copied)) == f"{copied} holds no preprocessor_config.json"


def test_a_processor_that_disagrees_with_the_towers_is_a_fault(copied: Path) -> None:
    edit_json(copied / "preprocessor_config.json", lambda data: data.update(patch_size=16))
    assert only(check(copied)) == (
        "patch_size in the processor's configuration must be 14, but it is 16"
    )


def test_a_processor_saved_by_transformers_5_is_understood(copied: Path) -> None:
    from transformers import Qwen2_5OmniProcessor

    processor = Qwen2_5OmniProcessor.from_pretrained(copied)
    (copied / "preprocessor_config.json").unlink()
    (copied / "video_preprocessor_config.json").unlink()
    processor.save_pretrained(copied)
    assert check(copied) == []

"""The configuration of an EchoingPixels checkpoint.

It is Qwen2.5-Omni's with two keys more in `thinker_config.text_config`, `av_refiner_layers` and
`compression_ratio`, and one that may be there, `sync_rope_section`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from transformers import AutoConfig, Qwen2_5OmniConfig, Qwen2_5OmniThinkerConfig

from ep_serve.checkpoint.directory import read_json
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.sections import Sections, scaled_sections

ARCHITECTURE = "Qwen2_5OmniCompressForConditionalGeneration"
REDUCED_ARCHITECTURE = "Qwen2_5OmniReducedForConditionalGeneration"
"""What a stock or OmniSIFT checkpoint is served as; it is not in any config.json."""

MEDIA_DEFAULTS = "media_defaults"
"""Key of config.json that may say how media were processed when the checkpoint was trained, such as
`{"max_pixels": 7056}`; the server's own options win."""

MODEL_TYPE = "qwen2_5_omni_compress"
THINKER_MODEL_TYPE = "qwen2_5_omni_compress_thinker"
STOCK_MODEL_TYPE = "qwen2_5_omni"


class Qwen2_5OmniCompressThinkerConfig(Qwen2_5OmniThinkerConfig):  # type: ignore[misc]  # noqa: N801
    """The thinker: towers, refiner, sieve and decoder."""

    model_type = THINKER_MODEL_TYPE
    if TYPE_CHECKING:
        text_config: Any  # at run time a field of the parent

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = _with_old_defaults(self.text_config, self.tie_word_embeddings)
        super().__post_init__(**kwargs)


class Qwen2_5OmniCompressConfig(Qwen2_5OmniConfig):  # type: ignore[misc]  # noqa: N801
    """The whole checkpoint. A talker in it is tolerated and never used."""

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {
        **Qwen2_5OmniConfig.sub_configs,
        "thinker_config": Qwen2_5OmniCompressThinkerConfig,
    }
    if TYPE_CHECKING:
        thinker_config: Any  # at run time a field of the parent

    def __post_init__(self, **kwargs: Any) -> None:
        if self.thinker_config is None or isinstance(self.thinker_config, dict):
            self.thinker_config = Qwen2_5OmniCompressThinkerConfig(**(self.thinker_config or {}))
        super().__post_init__(**kwargs)


def _with_old_defaults(text: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Fill in what transformers 4.x, which wrote the official checkpoints, took for granted.

    Without these fields, transformers 5 ties the embeddings and does not use M-RoPE.
    """
    filled = {"tie_word_embeddings": tied} | text
    if not (filled.get("rope_scaling") or filled.get("rope_parameters")):
        filled["rope_scaling"] = {"mrope_section": [16, 24, 24], "rope_type": "default"}
    return filled


def register_config() -> None:
    """Make `AutoConfig` know both model types; calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, Qwen2_5OmniCompressConfig, exist_ok=True)
    AutoConfig.register(THINKER_MODEL_TYPE, Qwen2_5OmniCompressThinkerConfig, exist_ok=True)


def parse_config(data: dict[str, Any]) -> Qwen2_5OmniCompressConfig:
    """The configuration in the content of a config.json.

    Raises:
        CheckpointError: `data` is not an EchoingPixels configuration, or transformers refuses it.
    """
    model_type = data.get("model_type")
    if model_type == STOCK_MODEL_TYPE:
        raise CheckpointError(
            "this is a stock Qwen2.5-Omni checkpoint, without refiner and score head; make an "
            "EchoingPixels checkpoint from it with `ep-serve checkpoint init`"
        )
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            f"model_type in config.json must be {MODEL_TYPE!r}, but it is {model_type!r}"
        )
    try:
        # transformers adds to the dictionaries that it is given.
        config: Qwen2_5OmniCompressConfig = Qwen2_5OmniCompressConfig.from_dict(deepcopy(data))
    except Exception as error:  # transformers has no common base class for what it raises here
        message = " ".join(str(error).split())
        raise CheckpointError(f"config.json is refused by transformers: {message}") from error
    return config


def load_config(directory: Path) -> Qwen2_5OmniCompressConfig:
    """The configuration of the EchoingPixels checkpoint in `directory`.

    Raises:
        CheckpointError: no directory, no config.json, or see `parse_config`.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    return parse_config(read_json(directory / "config.json"))


def text_config(config: Any) -> Any:
    """The text part of a whole, a thinker or a text configuration."""
    thinker = getattr(config, "thinker_config", config)
    return getattr(thinker, "text_config", thinker)


def head_dim(config: Any) -> int:
    """Size of one attention head of the decoder (and the refiner).

    Raises:
        CheckpointError: hidden_size is not a multiple of num_attention_heads.
    """
    text = text_config(config)
    if size := getattr(text, "head_dim", None):
        return int(size)
    if text.hidden_size % text.num_attention_heads:
        raise CheckpointError(
            f"hidden_size {text.hidden_size} is not a multiple of "
            f"num_attention_heads {text.num_attention_heads}"
        )
    return int(text.hidden_size // text.num_attention_heads)


@dataclass(frozen=True, slots=True)
class ReductionConfig:
    """The reduction settings of a checkpoint.

    refiner_layers: number of bidirectional layers, at least 1.
    keep_ratio: fraction of the pool that survives, 0 < keep_ratio <= 1.
    sync_rope_sections: channels of rows T, H, W and T again; their sum is half a head.
    """

    refiner_layers: int
    keep_ratio: float
    sync_rope_sections: Sections

    @classmethod
    def from_hf(cls, config: Any) -> ReductionConfig:
        """Read a whole, a thinker or a text configuration.

        Raises:
            CheckpointError: a key is missing, or its value makes no sense.
        """
        text = text_config(config)
        layers = getattr(text, "av_refiner_layers", None)
        if not _is_int(layers) or layers < 1:
            raise _refused("av_refiner_layers", "an integer of at least 1", layers)
        ratio = getattr(text, "compression_ratio", None)
        if not (_is_int(ratio) or isinstance(ratio, float)) or not 0 < ratio <= 1:
            raise _refused("compression_ratio", "a number above 0 and at most 1", ratio)
        return cls(layers, float(ratio), _sections(text))


def _sections(text: Any) -> Sections:
    size = head_dim(text)
    sections = getattr(text, "sync_rope_section", None)
    if sections is None:
        return scaled_sections(size)
    limits = f"four integers of at least 0 with the sum {size // 2} (half of head_dim)"
    if not isinstance(sections, list | tuple) or not all(_is_int(n) and n >= 0 for n in sections):
        raise _refused("sync_rope_section", limits, sections)
    if len(sections) != 4 or sum(sections) != size // 2:
        raise _refused("sync_rope_section", limits, sections)
    t, h, w, again = sections
    return t, h, w, again


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(key: str, limits: str, value: Any) -> CheckpointError:
    found = "is missing" if value is None else f"is {value!r}"
    return CheckpointError(f"{key} in thinker_config.text_config must be {limits}, but it {found}")

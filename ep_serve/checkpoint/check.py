"""Is a directory an EchoingPixels checkpoint this project can serve?

Only headers and small files are read, so a 7B checkpoint is checked in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from ep_serve.checkpoint import names
from ep_serve.checkpoint.config import (
    ARCHITECTURE,
    ReductionConfig,
    head_dim,
    load_config,
    register_config,
    text_config,
)
from ep_serve.checkpoint.directory import read_json
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.tensors import Shape, StoredTensor, read_tensors

# The tokenizer's name for each special token, and the key of its id in thinker_config.
TOKEN_KEYS = {
    "audio_token": "audio_token_index",
    "image_token": "image_token_index",
    "video_token": "video_token_index",
    "audio_bos_token": "audio_start_token_id",
    "audio_eos_token": "audio_end_token_id",
    "vision_bos_token": "vision_start_token_id",
    "vision_eos_token": "vision_end_token_id",
}
SAMPLING_RATE = 16000  # Hz; the audio tower's 25 tokens a second depend on it


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found wrong, as a sentence. A checkpoint with an error cannot be served."""

    severity: Literal["error", "warning"]
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


def check(directory: Path) -> list[Finding]:
    """Everything wrong with the checkpoint in `directory`; an empty list if nothing is."""
    try:
        config = load_config(directory)
    except CheckpointError as error:
        return [_error(str(error))]
    return [
        *_check_config(config),
        *_check_weights(directory, config),
        *_check_processor(directory, config.thinker_config),
        *_check_tokenizer(directory, config.thinker_config),
    ]


def _error(text: str) -> Finding:
    return Finding("error", text)


def _warning(text: str) -> Finding:
    return Finding("warning", text)


def _some(found: Iterable[str], limit: int = 3) -> str:
    """The first few of many names."""
    listed = sorted(found)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _check_config(config: Any) -> Iterator[Finding]:
    text = text_config(config)
    thinker = config.thinker_config
    try:
        ReductionConfig.from_hf(config)
        half = head_dim(config) // 2
    except CheckpointError as error:
        yield _error(str(error))
        return
    if ARCHITECTURE not in (config.architectures or ()):
        yield _error(f"architectures must name {ARCHITECTURE}, but it is {config.architectures}")
    sections = (text.rope_parameters or {}).get("mrope_section")
    if not sections or sum(sections) != half:
        # vLLM takes a model without it for one with plain rotary embedding.
        yield _error(
            f"rope_scaling in text_config needs an mrope_section with the sum {half} (half of "
            f"head_dim), but it is {sections}"
        )
    for key, width in {
        "vision_config.out_hidden_size": thinker.vision_config.out_hidden_size,
        "audio_config.output_dim": thinker.audio_config.output_dim,
    }.items():
        if width != text.hidden_size:
            yield _error(
                f"{key} must equal hidden_size {text.hidden_size} of text_config, but it is {width}"
            )


def _check_weights(directory: Path, config: Any) -> Iterator[Finding]:
    try:
        found = read_tensors(directory)
    except CheckpointError as error:
        yield _error(str(error))
        return
    layers = names.refiner_layers_in(found)
    promised = getattr(text_config(config), "av_refiner_layers", None)
    if not layers:
        yield _error(f"the weights hold no refiner ({names.REFINER_LAYERS}*)")
    elif layers != promised:
        yield _error(f"av_refiner_layers is {promised}, but the weights hold {layers} such layers")
    yield from _compare(found, names.expected_shapes(config, layers), config)


def _compare(
    found: dict[str, StoredTensor], expected: dict[str, Shape], config: Any
) -> Iterator[Finding]:
    if missing := expected.keys() - found.keys():
        yield _error(f"{len(missing)} tensors are missing: {_some(missing)}")
    unknown = found.keys() - expected.keys()
    speech = {name for name in unknown if name.startswith(names.SPEECH)}
    if speech:
        size = sum(found[name].nbytes for name in speech) / 2**20
        yield _warning(f"{len(speech)} tensors ({size:.0f} MiB) of the voice are never used")
    if names.OUTPUT in unknown and text_config(config).tie_word_embeddings:
        unknown -= {names.OUTPUT}
        yield _warning(f"{names.OUTPUT} is never used, because tie_word_embeddings is set")
    if unknown - speech:
        yield _error(
            f"{len(unknown - speech)} tensors belong to nothing in config.json: "
            f"{_some(unknown - speech)}"
        )
    wrong = [
        f"{name} is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if wrong:
        yield _error(
            f"{len(wrong)} tensors have another shape than config.json says: {_some(wrong)}"
        )


def _check_processor(directory: Path, thinker: Any) -> Iterator[Finding]:
    try:
        settings = _processor_settings(directory)
    except CheckpointError as error:
        yield _error(str(error))
        return
    vision = thinker.vision_config
    for key, value in {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "feature_size": thinker.audio_config.num_mel_bins,
        "sampling_rate": SAMPLING_RATE,
    }.items():
        if settings.get(key) != value:
            yield _error(
                f"{key} in the processor's configuration must be {value}, but it is "
                f"{settings.get(key)}"
            )


def _processor_settings(directory: Path) -> dict[str, Any]:
    """Image and audio settings; transformers 5 may have saved them in parts of another file."""
    if (directory / "processor_config.json").is_file():
        parts = read_json(directory / "processor_config.json")
        settings: dict[str, Any] = parts.get("image_processor", {}) | parts.get(
            "feature_extractor", {}
        )
        if settings:
            return settings
    return read_json(directory / "preprocessor_config.json")


def _check_tokenizer(directory: Path, thinker: Any) -> Iterator[Finding]:
    register_config()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever its loader raises, the answer is the same
        yield _error(f"the tokenizer cannot be loaded: {' '.join(str(error).split())}")
        return
    for attribute, key in TOKEN_KEYS.items():
        token, wanted = getattr(tokenizer, attribute, None), getattr(thinker, key, None)
        if token is None:
            yield _error(f"the tokenizer has no {attribute}")
            continue
        number = tokenizer.get_vocab().get(token)
        if number is None or number != wanted:
            yield _error(
                f"{attribute} {token} has id {number} in the tokenizer, but {key} in "
                f"thinker_config is {wanted}"
            )
    rows = thinker.text_config.vocab_size
    if len(tokenizer) > rows:
        yield _error(f"the tokenizer has {len(tokenizer)} tokens, but vocab_size is only {rows}")
    if tokenizer.eos_token is None:
        yield _warning("the tokenizer has no eos_token, so answers end at their length limit")
    if not tokenizer.chat_template:
        yield _warning("there is no chat template, so one must be given to the server")

"""Count operations and bytes of a request, and bound the gain of reduction.

    python -m loadtest.shapes                         # the reference shape, a clip of 30 s
    python -m loadtest.shapes 3b --seconds 60
    python -m loadtest.shapes path/to/checkpoint --frame-tokens 144

One multiply-add counts as two operations. Causal attention counts the pairs below the diagonal,
the refiner's all of them. Bytes are those of the weights, read once a pass, and of the KV cache;
activations are left out. The bound is that of a machine which runs every operation at the same
rate and does nothing else. Below keep ratios of about 0.1 the refiner is most of what remains, so
a machine that is better or worse at attention than at matrix products moves the bound.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ep_serve.layout import keep_count

AUDIO_TOKENS_PER_SECOND = 25
PATCHES_PER_TOKEN = 4
PATCH_VALUES = 3 * 2 * 14 * 14
KEEP_RATIOS = (1.0, 0.2, 0.1, 0.05)


@dataclass(frozen=True, slots=True)
class VisionTower:
    """Qwen2.5's: windowed attention, in `full_layers` over a whole frame; gated MLP."""

    layers: int
    hidden: int
    intermediate: int
    full_layers: int
    window_patches: int = 64

    def weights(self, out: int) -> int:
        """Parameters of the matrices."""
        block = self.hidden * (4 * self.hidden + 3 * self.intermediate)
        merged = PATCHES_PER_TOKEN * self.hidden
        return PATCH_VALUES * self.hidden + self.layers * block + merged * (merged + out)

    def flops(self, tokens: int, frame_tokens: int, out: int) -> float:
        patches = PATCHES_PER_TOKEN * tokens
        block = 2 * self.hidden * (4 * self.hidden + 3 * self.intermediate)
        seen = (
            self.full_layers * PATCHES_PER_TOKEN * frame_tokens
            + (self.layers - self.full_layers) * self.window_patches
        )
        merged = PATCHES_PER_TOKEN * self.hidden
        return (
            patches * (2 * PATCH_VALUES * self.hidden + self.layers * block)
            + 4 * patches * seen * self.hidden
            + 2 * tokens * merged * (merged + out)
        )


@dataclass(frozen=True, slots=True)
class AudioTower:
    """Whisper's encoder: two convolutions, windows of two seconds; two positions make a token."""

    layers: int
    hidden: int
    intermediate: int
    bins: int = 128
    window: int = 100

    def weights(self, out: int) -> int:
        convolutions = 3 * self.hidden * (self.bins + self.hidden)
        block = self.hidden * (4 * self.hidden + 2 * self.intermediate)
        return convolutions + self.layers * block + self.hidden * out

    def flops(self, tokens: int, out: int) -> float:
        positions = 2 * tokens
        convolutions = 2 * 3 * self.hidden * (2 * positions * self.bins + positions * self.hidden)
        block = 2 * self.hidden * (4 * self.hidden + 2 * self.intermediate)
        attention = 4 * positions * min(self.window, positions) * self.hidden
        return (
            convolutions
            + self.layers * (positions * block + attention)
            + 2 * tokens * self.hidden * out
        )


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a checkpoint; `refiner_layers` is 0 for a stock one."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    refiner_layers: int
    vision: VisionTower
    audio: AudioTower
    weight_bytes: int = 2
    kv_bytes: int = 2

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's matrices, in decoder and refiner alike."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * queries + 2 * keys + 3 * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Parameters of the score head's matrices."""
        return self.hidden * (self.hidden + 1)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes

    def linear(self, layers: int, tokens: int) -> float:
        """Operations of matrix products in `layers` layers."""
        return 2.0 * layers * tokens * self.layer_weights

    def attention(self, layers: int, pairs: float) -> float:
        """Operations for `pairs` of query and key in `layers` layers."""
        return 4.0 * layers * pairs * self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of one request before reduction; `frame_tokens` are those of one pair of frames."""

    video: int
    audio: int
    text: int
    frame_tokens: int
    output: int = 8

    @classmethod
    def of_clip(
        cls,
        seconds: float,
        frame_tokens: int,
        *,
        text: int = 32,
        sound: bool = True,
        fps: float = 2,
    ) -> Prompt:
        """A clip sampled at `fps`; two frames share their tokens."""
        pairs = max(2, math.floor(seconds * fps / 2))
        audio = round(seconds * AUDIO_TOKENS_PER_SECOND) if sound else 0
        return cls(pairs * frame_tokens, audio, text, frame_tokens)

    @property
    def media(self) -> int:
        return self.video + self.audio

    @property
    def full(self) -> int:
        return self.media + self.text

    def reduced(self, keep_ratio: float) -> int:
        """Length after reduction."""
        return self.text + keep_count(self.media, keep_ratio)


@dataclass(frozen=True, slots=True)
class Stage:
    """Operations and bytes of one stage of a request."""

    name: str
    flops: float
    nbytes: float


def stages(model: ModelShape, prompt: Prompt, keep_ratio: float | None) -> list[Stage]:
    """The parts of a request in order, decoding last.

    Args:
        model: its shape.
        prompt: the request.
        keep_ratio: None for all tokens and no refiner, as stock vLLM does it.
    """
    size = model.weight_bytes
    towers = model.vision.flops(prompt.video, prompt.frame_tokens, model.hidden)
    towers += model.audio.flops(prompt.audio, model.hidden) if prompt.audio else 0.0
    tower_weights = model.vision.weights(model.hidden) + model.audio.weights(model.hidden)
    parts = [Stage("towers", towers, size * tower_weights)]
    length = prompt.full
    if keep_ratio is not None:
        parts.append(_refiner(model, prompt))
        head = 2.0 * prompt.media * model.head_weights
        parts.append(Stage("selection", head, size * model.head_weights))
        length = prompt.reduced(keep_ratio)
    parts.append(_prefill(model, length))
    parts.append(_decode(model, length, prompt.output))
    return parts


def _refiner(model: ModelShape, prompt: Prompt) -> Stage:
    layers, length = model.refiner_layers, prompt.full
    flops = model.linear(layers, length) + model.attention(layers, float(length) ** 2)
    return Stage("refiner", flops, model.weight_bytes * layers * model.layer_weights)


def _prefill(model: ModelShape, length: int) -> Stage:
    pairs = length * (length + 1) / 2
    output = 2.0 * model.hidden * model.vocabulary  # logits of the last position only
    flops = model.linear(model.layers, length) + model.attention(model.layers, pairs) + output
    weights = model.layers * model.layer_weights + model.hidden * model.vocabulary
    return Stage("prefill", flops, model.weight_bytes * weights + length * model.kv_bytes_per_token)


def _decode(model: ModelShape, length: int, output: int) -> Stage:
    steps = max(0, output - 1)  # the prefill gives the first token
    seen = steps * length + steps * (steps + 1) / 2
    logits = 2.0 * steps * model.hidden * model.vocabulary
    flops = model.linear(model.layers, steps) + model.attention(model.layers, seen) + logits
    weights = model.layers * model.layer_weights + model.hidden * model.vocabulary
    nbytes = steps * model.weight_bytes * weights + seen * model.kv_bytes_per_token
    return Stage("decode", flops, nbytes)


@dataclass(frozen=True, slots=True)
class Bound:
    """Upper bounds of the gains over all tokens: ratios of operations and of memory."""

    keep_ratio: float
    first_token: float
    """Gain in time to first token: everything up to the prefill."""
    request: float
    """Gain in requests a second: with decoding."""
    kv: float
    """Gain in KV cache for each prompt."""


def bound(model: ModelShape, prompt: Prompt, keep_ratio: float) -> Bound:
    """Compute the bounds of one prompt and keep ratio."""
    full = [stage.flops for stage in stages(model, prompt, None)]
    reduced = [stage.flops for stage in stages(model, prompt, keep_ratio)]
    return Bound(
        keep_ratio,
        first_token=sum(full[:-1]) / sum(reduced[:-1]),
        request=sum(full) / sum(reduced),
        kv=prompt.full / prompt.reduced(keep_ratio),
    )


SMALL_VISION = VisionTower(layers=2, hidden=64, intermediate=128, full_layers=1)
SMALL_AUDIO = AudioTower(layers=2, hidden=64, intermediate=128)
OMNI_VISION = VisionTower(layers=32, hidden=1280, intermediate=3420, full_layers=4)
OMNI_AUDIO = AudioTower(layers=32, hidden=1280, intermediate=5120)

REFERENCE = ModelShape(
    "reference", 896, 24, 14, 2, 64, 4864, 320, 4, SMALL_VISION, SMALL_AUDIO
)  # towers and vocabulary of the embedded checkpoint, so that decoder and refiner are what counts
BALANCED = replace(
    REFERENCE,
    name="balanced",
    vision=VisionTower(layers=16, hidden=512, intermediate=1368, full_layers=2),
    audio=AudioTower(layers=8, hidden=512, intermediate=2048),
)  # the same behind towers that are half of a reduced request, as they are in 7b
EMBEDDED = ModelShape("embedded", 256, 4, 4, 2, 64, 512, 320, 2, SMALL_VISION, SMALL_AUDIO)
OMNI_3B = ModelShape("3b", 2048, 36, 16, 2, 128, 11008, 151936, 4, OMNI_VISION, OMNI_AUDIO)
OMNI_7B = ModelShape("7b", 3584, 28, 28, 4, 128, 18944, 152064, 4, OMNI_VISION, OMNI_AUDIO)
SHAPES = {shape.name: shape for shape in (REFERENCE, BALANCED, EMBEDDED, OMNI_3B, OMNI_7B)}


def from_checkpoint(directory: Path) -> ModelShape:
    """The shape in a checkpoint's config.json, of any Qwen2.5-Omni layout.

    Raises:
        OSError: no config.json.
        ValueError: it is not JSON, or lacks a size.
    """
    data: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    thinker = data.get("thinker_config", data)
    try:
        return _from_thinker(directory.name, thinker)
    except KeyError as error:
        raise ValueError(f"{directory / 'config.json'} lacks {error}") from None


def _from_thinker(name: str, thinker: dict[str, Any]) -> ModelShape:
    text, vision, audio = (thinker[f"{part}_config"] for part in ("text", "vision", "audio"))
    return ModelShape(
        name=name,
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        intermediate=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        refiner_layers=text.get("av_refiner_layers", 0),
        vision=VisionTower(
            vision["depth"],
            vision["hidden_size"],
            vision["intermediate_size"],
            len(vision["fullatt_block_indexes"]),
            (vision["window_size"] // vision["patch_size"]) ** 2,
        ),
        audio=AudioTower(
            audio["encoder_layers"],
            audio["d_model"],
            audio["encoder_ffn_dim"],
            audio["num_mel_bins"],
            audio["n_window"],
        ),
    )


def find(name: str) -> ModelShape:
    """A built-in shape by name, or that of a checkpoint directory."""
    return SHAPES[name] if name in SHAPES else from_checkpoint(Path(name))


def table(model: ModelShape, prompt: Prompt, ratios: tuple[float, ...] = KEEP_RATIOS) -> str:
    """Operations and bytes of every stage and the bounds, in Markdown."""
    lines = [
        f"{model.name}: {prompt.full} tokens before reduction ({prompt.video} video, "
        f"{prompt.audio} audio, {prompt.text} text), {prompt.output} decoded",
        "",
        "| keep | stage | GFLOP | MB read and written |",
        "|---:|---|---:|---:|",
    ]
    for ratio in (None, *ratios):
        for stage in stages(model, prompt, ratio):
            shown = "all tokens" if ratio is None else f"{ratio:g}"
            lines.append(
                f"| {shown} | {stage.name} | {stage.flops / 1e9:.1f} | {stage.nbytes / 1e6:.0f} |"
            )
    lines += [
        "",
        "| keep | prompt tokens | KV cache, MB | first token, bound | requests/s, bound |",
        "|---:|---:|---:|---:|---:|",
        f"| all tokens | {prompt.full} | {_kv_mb(model, prompt.full)} | 1 | 1 |",
    ]
    for ratio in ratios:
        limit, length = bound(model, prompt, ratio), prompt.reduced(ratio)
        lines.append(
            f"| {ratio:g} | {length} | {_kv_mb(model, length)} "
            f"| {limit.first_token:.2f}x | {limit.request:.2f}x |"
        )
    return "\n".join(lines)


def _kv_mb(model: ModelShape, tokens: int) -> str:
    return f"{tokens * model.kv_bytes_per_token / 1e6:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(SHAPES)
    parser.add_argument("shape", nargs="?", default="reference", help=f"{names}, or a checkpoint")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the clip (30)")
    parser.add_argument("--fps", type=float, default=2.0, help="frames sampled a second (2)")
    parser.add_argument(
        "--frame-tokens", type=int, default=144, help="of one pair of frames (144: 336 x 336)"
    )
    parser.add_argument("--text", type=int, default=100, help="text tokens (100)")
    parser.add_argument("--output", type=int, default=8, help="decoded tokens (8)")
    parser.add_argument("--refiner-layers", type=int, help="another number than the shape's")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP_RATIOS)
    args = parser.parse_args()
    model = find(args.shape)
    if args.refiner_layers is not None:
        model = replace(model, refiner_layers=args.refiner_layers)
    prompt = Prompt.of_clip(args.seconds, args.frame_tokens, text=args.text, fps=args.fps)
    print(table(model, replace(prompt, output=args.output), tuple(args.keep)))


if __name__ == "__main__":
    main()

"""Write the sizing table of deploy/README.md: `python deploy/sizing.py`.

Sizes are those of `loadtest.shapes`; clip, model and GPU are options.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loadtest.shapes import ModelShape, Prompt, find

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- sizing -->\n", "<!-- end of sizing -->\n"
KEEP_RATIOS = (1.0, 0.2, 0.1, 0.05)
GIB = 2**30


def weight_bytes(model: ModelShape) -> int:
    """Decoder, refiner, scorer, towers, embeddings and output matrix."""
    layers = (model.layers + model.refiner_layers) * model.layer_weights
    tables = 2 * model.vocabulary * model.hidden
    towers = model.vision.weights(model.hidden) + model.audio.weights(model.hidden)
    return model.weight_bytes * (layers + tables + towers + model.head_weights)


def rows(model: ModelShape, prompt: Prompt, gpu_gib: float, reserve_gib: float) -> list[str]:
    """One row for each keep ratio."""
    available = (0.92 * gpu_gib - reserve_gib) * GIB - weight_bytes(model)
    found = []
    for ratio in KEEP_RATIOS:
        tokens = prompt.reduced(ratio)
        held = (tokens + prompt.output) * model.kv_bytes_per_token
        found.append(
            f"| {model.name} | {weight_bytes(model) / GIB:.1f} | {ratio:g} | {prompt.full} "
            f"| {tokens} | {held / 2**20:.0f} | {int(available // held)} |\n"
        )
    return found


def table(
    models: tuple[str, ...] = ("3b", "7b"),
    *,
    seconds: float = 30,
    frame_tokens: int = 144,
    text: int = 100,
    output: int = 256,
    gpu_gib: float = 80,
    reserve_gib: float = 8,
) -> str:
    """The table in Markdown."""
    clip = Prompt.of_clip(seconds, frame_tokens, text=text)
    prompt = Prompt(clip.video, clip.audio, clip.text, clip.frame_tokens, output)
    head = (
        f"Clips of {seconds:g} s with sound, {frame_tokens} tokens for each pair of frames, "
        f"{text} tokens of text, {output} of answer; {gpu_gib:g} GiB of device memory used to 92 "
        f"%, {reserve_gib:g} GiB of it for activations and the tower cache:\n\n"
        "| Model | Weights, GiB | Keep ratio | Tokens before | Tokens after | KV cache of a "
        "request, MiB | Requests at once |\n|---|---:|---:|---:|---:|---:|---:|\n"
    )
    return head + "".join(
        row for name in models for row in rows(find(name), prompt, gpu_gib, reserve_gib)
    )


def with_table(readme: str) -> str:
    """The README with the current table."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}{table()}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="3b, 7b or a checkpoint; prints instead")
    parser.add_argument("--seconds", type=float, default=30, help="length of the clips (30)")
    parser.add_argument("--frame-tokens", type=int, default=144, help="of a pair of frames (144)")
    parser.add_argument("--output", type=int, default=256, help="tokens of an answer (256)")
    parser.add_argument("--gpu-gib", type=float, default=80, help="device memory (80)")
    given = parser.parse_args()
    if given.models:
        options = {name: value for name, value in vars(given).items() if name != "models"}
        print(table(tuple(given.models), **options), end="")
    else:
        README.write_text(with_table(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

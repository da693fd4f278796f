"""Train the embedded model from scratch: clips, towers, language model, evaluation, checkpoint.

Every stage writes files; an interrupted training resumes from them.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ep_serve.checkpoint.directory import new_directory, read_json, write_json
from ep_serve.training.data.clip_features import FeatureExtractor
from ep_serve.training.data.store import make_parts, read_parts, save
from ep_serve.training.loop import towers
from ep_serve.training.loop.data_parallel import run_data_parallel
from ep_serve.training.loop.evaluation import evaluate, guesses, held_out_questions, summarize
from ep_serve.training.loop.language import (
    KEEP_RATIOS,
    ONE_TOKEN,
    VARIANTS,
    TrainingJob,
    train_rank,
)
from ep_serve.training.loop.tokens import TokenExtractor
from ep_serve.training.model import architecture
from ep_serve.training.model.weights import write_weights

SEGMENTS = (4, 5, 6)
"""Seconds of the clips for the towers."""
LENGTHS = (4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28)
"""Seconds of the clips for the language model, as often as they are made."""
HELD_OUT = 1_000_000
"""Seeds from here on belong to clips that no training sees."""


@dataclass(frozen=True, slots=True)
class TrainingScale:
    """The size of a training: clips and steps of each stage.

    Attributes:
        segments: Clips for the towers.
        vision: Steps of the vision tower.
        audio: Steps of the audio tower.
        clips: For the language model.
        language: Steps of the language model.
        held_out: Clips for the evaluation.
        variant: Steps of a variant that starts from the shipped model.
        lengths: Seconds of the clips for the language model, as often as they are made.
    """

    segments: int
    vision: int
    audio: int
    clips: int
    language: int
    held_out: int
    variant: int
    lengths: tuple[int, ...] = LENGTHS


VARIANT_RATE = 1.5e-3

FULL = TrainingScale(
    segments=4000,
    vision=4000,
    audio=1200,
    clips=8000,
    language=3200,
    held_out=400,
    variant=350,
)
"""What led to the shipped weights, without the detours that the model card describes."""
SHORT = TrainingScale(
    segments=400,
    vision=300,
    audio=200,
    clips=300,
    language=250,
    held_out=60,
    variant=50,
)
"""A few minutes, in which every stage does something."""


def train(
    out: Path,
    scale: TrainingScale,
    *,
    variant: str = "shipped",
    seed: int = 0,
    processes: int = 2,
) -> dict[str, Any]:
    """Train the checkpoint `out/model`, resuming an interrupted training.

    Another seed, or a variant, shares towers and clips with what is in `out` already; its results
    go to `out/VARIANT-SEED`. A variant starts from the weights of the shipped model,
    unless it trains from scratch; it writes a checkpoint only if that can be served.

    Args:
        out: For data, curves, states and results.
        scale: Clips and steps of each stage.
        variant: One of `VARIANTS`.
        seed: Of the language model; clips and towers are the same for all.
        processes: Processes of one thread each.

    Returns:
        The shares of right answers and guesses, also written to `report.json`.
    """
    frame = out / "frame"
    architecture.write_config_files(frame)
    _train_towers(out, scale, processes)
    extract = TokenExtractor(out / "towers.pt", scale.lengths)
    clips = make_parts(out / "clips", extract, range(scale.clips), processes)
    seeds = range(HELD_OUT, HELD_OUT + scale.held_out)
    held_out = make_parts(out / "held-out", extract, seeds, processes)
    own = out if (variant, seed) == ("shipped", 0) else out / f"{variant}-{seed}"
    job = TrainingJob(
        folder=own / "language",
        parts=tuple(clips),
        checkpoint=frame,
        steps=scale.language,
        seed=seed,
    )
    if variant != "shipped":
        train(out, scale, processes=processes)
        chosen = VARIANTS[variant]
        job = replace(job, steps=scale.variant * chosen.step_factor, variant=chosen)
        if not chosen.from_scratch:
            job = replace(job, rate=VARIANT_RATE, init_from=out / "language" / "state.pt")
    is_servable = job.variant.is_servable
    if not (own / ("model" if is_servable else "report.json")).exists():
        run_data_parallel(train_rank, processes, job)
        if is_servable:
            export(job, out / "towers.pt", own / "model")
    if not (own / "report.json").is_file():
        write_json(own / "report.json", _evaluate(job, held_out))
    return read_json(own / "report.json")


def export(job: TrainingJob, towers_file: Path, target: Path) -> None:
    """Write the checkpoint of a finished training."""
    towers_state = torch.load(towers_file, weights_only=True)
    state = torch.load(job.folder / "state.pt", weights_only=True)["module"]
    config = architecture.config()
    if job.variant.sections is not None:
        text = config["thinker_config"]["text_config"]
        text["sync_rope_section"] = list(job.variant.sections)
    with new_directory(target) as new:
        architecture.write_config_files(new)
        write_json(new / "config.json", config)
        write_weights(
            new,
            config,
            _part(state, "thinker."),
            {
                "visual": _part(towers_state["vision"], "tower."),
                "audio_tower": _part(towers_state["audio"], "tower."),
            },
        )


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}


def _train_towers(out: Path, scale: TrainingScale, processes: int) -> None:
    if (out / "towers.pt").is_file():
        return
    segments = FeatureExtractor(SEGMENTS)
    parts = make_parts(out / "segments", segments, range(scale.segments), processes)
    seeds = range(HELD_OUT, HELD_OUT + scale.held_out // 2)
    held_out = make_parts(out / "segments-held-out", segments, seeds, processes)
    jobs = [
        TowerJob("vision", out, tuple(parts), tuple(held_out), scale.vision),
        TowerJob("audio", out, tuple(parts), tuple(held_out), scale.audio),
    ]
    with ProcessPoolExecutor(min(processes, 2), get_context("spawn")) as pool:
        results = dict(zip(("vision", "audio"), pool.map(_train_tower, jobs), strict=True))
    figures = {name: figures for name, (_, figures) in results.items()}
    write_json(out / "towers.json", figures)
    save(out / "towers.pt", {name: state for name, (state, _) in results.items()})
    shutil.rmtree(out / "segments")


@dataclass(frozen=True, slots=True)
class TowerJob:
    """The training of one tower, for a process of its own."""

    name: str
    out: Path
    parts: tuple[Path, ...]
    held_out: tuple[Path, ...]
    steps: int


def _train_tower(job: TowerJob) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind = towers.VisionClassifier if job.name == "vision" else towers.AudioClassifier
    tower = kind(architecture.config())
    held_out = list(read_parts(job.held_out))
    figures = towers.train(
        tower,
        list(read_parts(job.parts)),
        held_out,
        job.out / job.name,
        steps=job.steps,
        seed=0,
    )
    towers.scale_tokens(tower, held_out)
    return tower.state_dict(), figures


def _evaluate(job: TrainingJob, held_out: list[Path]) -> dict[str, Any]:
    torch.set_num_threads(1)  # two threads wait for each other on a busy machine
    model = job.build_model()
    model.load_state_dict(torch.load(job.folder / "state.pt", weights_only=True)["module"])
    questions = held_out_questions(job.load_sampler(held_out))
    with torch.autocast("cpu", torch.bfloat16):
        results = evaluate(model, questions, (*KEEP_RATIOS, ONE_TOKEN))
    return summarize(results) | {"guesses": guesses(job.load_sampler(job.parts), questions)}

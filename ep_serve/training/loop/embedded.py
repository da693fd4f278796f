"""The embedded model from nothing: clips, towers, language model, examination, checkpoint.

Every stage leaves files; a run that was stopped goes on where it was.
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
from ep_serve.training.data.clip_features import MakeFeatures
from ep_serve.training.data.store import make_parts, read_parts, save
from ep_serve.training.loop import towers
from ep_serve.training.loop.data_parallel import train_together
from ep_serve.training.loop.examination import examine, guesses, held_out_questions, summary
from ep_serve.training.loop.language import KEEP_RATIOS, ONE_TOKEN, VARIANTS, Course, follow
from ep_serve.training.loop.tokens import MakeTokens
from ep_serve.training.model import architecture
from ep_serve.training.model.weights import write_weights

SEGMENTS = (4, 5, 6)
"""Seconds of the clips for the towers."""
LENGTHS = (4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28)
"""Seconds of the clips for the language model, as often as they are made."""
HELD_OUT = 1_000_000
"""Seeds from here on belong to clips that no training sees."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done: clips and steps of the stages, and steps of a variant.

    Attributes:
        segments: Clips for the towers.
        seeing: Steps of the vision tower.
        hearing: Steps of the audio tower.
        clips: For the language model.
        language: Steps of the language model.
        held_out: Clips for the examination.
        variant: Steps of a variant that goes on from the shipped model.
        lengths: Seconds of the clips for the language model, as often as they are made.
    """

    segments: int
    seeing: int
    hearing: int
    clips: int
    language: int
    held_out: int
    variant: int
    lengths: tuple[int, ...] = LENGTHS


VARIANT_RATE = 1.5e-3

FULL = Effort(
    segments=4000,
    seeing=4000,
    hearing=1200,
    clips=8000,
    language=3200,
    held_out=400,
    variant=350,
)
"""What led to the shipped weights, without the detours that their model card tells of."""
SHORT = Effort(
    segments=400,
    seeing=300,
    hearing=200,
    clips=300,
    language=250,
    held_out=60,
    variant=50,
)
"""A few minutes, in which every stage does something."""


def train(
    out: Path,
    effort: Effort,
    *,
    variant: str = "shipped",
    seed: int = 0,
    processes: int = 2,
) -> dict[str, Any]:
    """Make the checkpoint `out/model`, or finish one that was begun.

    Another seed, or a variant, shares towers and clips with what is in `out` already; its results
    go to `out/VARIANT-SEED`. A variant begins with what the shipped one has learned, if it does not
    begin anew, and goes on for a while; it leaves a checkpoint only if that can be served.

    Args:
        out: For data, curves, states and results.
        effort: How much to do.
        variant: One of `VARIANTS`.
        seed: Of the language model; clips and towers are the same for all.
        processes: Processes of one thread each.

    Returns:
        The shares of right answers and guesses, also written to `report.json`.
    """
    frame = out / "frame"
    architecture.write_frame(frame)
    _train_towers(out, effort, processes)
    made = MakeTokens(out / "towers.pt", effort.lengths)
    clips = make_parts(out / "clips", made, range(effort.clips), processes)
    held = range(HELD_OUT, HELD_OUT + effort.held_out)
    held_out = make_parts(out / "held-out", made, held, processes)
    own = out if (variant, seed) == ("shipped", 0) else out / f"{variant}-{seed}"
    course = Course(
        folder=own / "language",
        parts=tuple(clips),
        checkpoint=frame,
        steps=effort.language,
        seed=seed,
    )
    if variant != "shipped":
        train(out, effort, processes=processes)
        chosen = VARIANTS[variant]
        course = replace(course, steps=effort.variant * chosen.patience, variant=chosen)
        if not chosen.anew:
            course = replace(course, rate=VARIANT_RATE, begin=out / "language" / "state.pt")
    serves = course.variant.serves
    if not (own / ("model" if serves else "report.json")).exists():
        train_together(follow, processes, course)
        if serves:
            export(course, out / "towers.pt", own / "model")
    if not (own / "report.json").is_file():
        write_json(own / "report.json", _examine(course, held_out))
    return read_json(own / "report.json")


def export(course: Course, towers_file: Path, target: Path) -> None:
    """Write the checkpoint of a finished training."""
    towers_state = torch.load(towers_file, weights_only=True)
    state = torch.load(course.folder / "state.pt", weights_only=True)["module"]
    config = architecture.config()
    if course.variant.sections is not None:
        text = config["thinker_config"]["text_config"]
        text["sync_rope_section"] = list(course.variant.sections)
    with new_directory(target) as new:
        architecture.write_frame(new)
        write_json(new / "config.json", config)
        write_weights(
            new,
            config,
            _part(state, "thinker."),
            {
                "visual": _part(towers_state["seeing"], "tower."),
                "audio_tower": _part(towers_state["hearing"], "tower."),
            },
        )


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}


def _train_towers(out: Path, effort: Effort, processes: int) -> None:
    if (out / "towers.pt").is_file():
        return
    segments = MakeFeatures(SEGMENTS)
    parts = make_parts(out / "segments", segments, range(effort.segments), processes)
    held = range(HELD_OUT, HELD_OUT + effort.held_out // 2)
    held_out = make_parts(out / "segments-held-out", segments, held, processes)
    jobs = [
        TowerJob("seeing", out, tuple(parts), tuple(held_out), effort.seeing),
        TowerJob("hearing", out, tuple(parts), tuple(held_out), effort.hearing),
    ]
    with ProcessPoolExecutor(min(processes, 2), get_context("spawn")) as pool:
        results = dict(zip(("seeing", "hearing"), pool.map(_train_tower, jobs), strict=True))
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
    kind = towers.Seeing if job.name == "seeing" else towers.Hearing
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
    towers.set_size(tower, held_out)
    return tower.state_dict(), figures


def _examine(course: Course, held_out: list[Path]) -> dict[str, Any]:
    torch.set_num_threads(1)  # two wait for each other where anything else runs
    student = course.student()
    student.load_state_dict(torch.load(course.folder / "state.pt", weights_only=True)["module"])
    asked = held_out_questions(course.lessons(held_out))
    with torch.autocast("cpu", torch.bfloat16):
        verdicts = examine(student, asked, (*KEEP_RATIOS, ONE_TOKEN))
    return summary(verdicts) | {"guesses": guesses(course.lessons(course.parts), asked)}

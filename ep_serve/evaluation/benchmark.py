"""Generate the built-in benchmark: synthetic clips as MP4 files, and questions about them.

The same arguments give the same files. No training uses these scenes: its seeds are below
`FIRST_SEED`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ep_serve.evaluation.questions import Evidence, Meta, Question
from ep_serve.scenes import questions as scene_questions
from ep_serve.scenes.encoding import Encoding, encode
from ep_serve.scenes.guessing import MISSING_MODALITIES, Guesser, SceneQuestion
from ep_serve.scenes.scene import Scene, make_scene

FIRST_SEED = 4_000_000
EXAMPLE_SEED = 3_000_000
"""First seed of the scenes on which the guessers are fitted."""
SEEDS_EACH = 100_000
"""Clips that one benchmark may have at most."""
LENGTHS = (4, 5, 6, 7, 8, 8, 10, 12, 12, 16, 20, 25, 30)
"""Seconds of one clip after the other; their number shares no divisor with the encodings'."""
ENCODINGS = (
    Encoding(),
    Encoding((320, 240), 30, 28),
    Encoding((320, 180), 24, 23, 32_000, 44_100),
    Encoding((160, 160), 10, 33),
    Encoding((640, 360), 30, 23, 96_000),
    Encoding((180, 240), 12, 30, 24_000, 16_000),
    Encoding((192, 144), 15, 36, 32_000, 22_050),
    Encoding((256, 256), 8, 18, 128_000),
)
"""From clean to poor, 8 to 30 frames a second, square, wide and upright."""
KINDS = {
    task: tuple(kind for kind in scene_questions.KINDS if kind.split("-")[0] == task)
    for task in dict.fromkeys(kind.split("-")[0] for kind in scene_questions.KINDS)
}
TASKS = tuple(KINDS)
TRIES = 20
"""Draws to find a question of a task about a scene."""
EXAMPLES = 3000
"""Scenes on which the guessers are fitted."""
PROCESSES = 2
NICENESS = 15
"""Encoding uses its processors fully, so it runs at low priority."""

QUESTIONS_NAME = "questions.jsonl"
SUMMARY_NAME = "benchmark.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """Size and seed of a benchmark.

    Attributes:
        clips: Number of clips, up to `SEEDS_EACH`.
        questions: Different questions about each.
        seed: Another one makes another benchmark of the same kind.

    Raises:
        ValueError: A number that is out of bounds.
    """

    clips: int = 320
    questions: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.clips <= SEEDS_EACH:
            raise ValueError(f"clips must be from 1 to {SEEDS_EACH}, not {self.clips}")
        if not 1 <= self.questions <= 20:
            raise ValueError(f"questions must be from 1 to 20, not {self.questions}")
        if self.seed < 0:
            raise ValueError(f"seed must not be below 0, but is {self.seed}")

    def scene(self, number: int) -> Scene:
        """The scene of a clip."""
        seed = FIRST_SEED + SEEDS_EACH * self.seed + number
        return make_scene(seed, LENGTHS[number % len(LENGTHS)])

    def questions_about(self, number: int) -> Iterator[scene_questions.Question]:
        """Questions about a clip."""
        return questions_about(self.scene(number), number, self.questions)


def make(folder: Path, plan: Plan) -> dict[str, object]:
    """Write clips, `questions.jsonl` and `benchmark.json`; clips that are there stay.

    Returns:
        What `benchmark.json` holds: counts, encodings, accuracy of guessing.
    """
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    asked = [
        (plan.scene(i), question) for i in range(plan.clips) for question in plan.questions_about(i)
    ]
    guessers = _guessers(plan)
    questions = [
        _as_question(number, plan, scene, question, guessers)
        for number, (scene, question) in enumerate(asked)
    ]
    _encode_all(folder, plan)
    lines = [question.model_dump_json(exclude_defaults=True) for question in questions]
    (folder / QUESTIONS_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary = _summary(plan, questions)
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (folder / SUMMARY_NAME).write_text(text + "\n", encoding="utf-8")
    return summary


def questions_about(scene: Scene, number: int, count: int) -> Iterator[scene_questions.Question]:
    """Different questions about clip `number`, so that all tasks and their kinds come as often.

    The question frequencies of training are not used here.
    """
    rng = np.random.default_rng([scene.seed, 1])
    texts: set[str] = set()
    for turn in itertools.count(number * count):
        question = _question_of_task(TASKS[turn % len(TASKS)], scene, rng)
        if question is not None and question.text not in texts:
            texts.add(question.text)
            yield question
        if len(texts) == count:
            return


def _question_of_task(
    task: str, scene: Scene, rng: np.random.Generator
) -> scene_questions.Question | None:
    """A question of a task, or None if none was found in `TRIES` draws."""
    for _ in range(TRIES):
        kind = KINDS[task][rng.integers(len(KINDS[task]))]
        question = scene_questions.make_question(scene, kind, rng)
        if question is None:
            continue
        # Scenes make some answers too frequent.
        if rng.random() < scene_questions.ACCEPTANCE_RATES.get((kind, question.answer), 1.0):
            return question
    return None


def _guessers(plan: Plan) -> dict[str, Guesser]:
    """Guessers without each modality, fitted on scenes that are not in the benchmark."""
    examples: list[SceneQuestion] = []
    for number in range(EXAMPLES):
        scene = make_scene(EXAMPLE_SEED + number, LENGTHS[number % len(LENGTHS)])
        examples += [
            (scene, question) for question in questions_about(scene, number, plan.questions)
        ]
    return {
        missing: Guesser(available, examples) for missing, available in MISSING_MODALITIES.items()
    }


def _as_question(
    number: int,
    plan: Plan,
    scene: Scene,
    question: scene_questions.Question,
    guessers: dict[str, Guesser],
) -> Question:
    clip = number // plan.questions
    evidence = Evidence(
        video=[(scene.sights[i].start, scene.sights[i].end) for i in question.seen],
        audio=[
            (round(scene.sounds[i].start, 3), round(scene.sounds[i].end, 3)) for i in question.heard
        ],
    )
    return Question(
        id=f"{clip:05}-{number % plan.questions}",
        media=[_clip_name(clip)],
        question=question.text,
        answer=question.answer,
        task=question.task,
        meta=Meta.model_validate(
            {
                "evidence": evidence if evidence.spans else None,
                "guesses": {m: g.guess(scene, question) for m, g in guessers.items()},
                "kind": question.kind,
                "seconds": scene.seconds,
                "encoding": _describe(_encoding(clip)),
            }
        ),
    )


def _clip_name(number: int) -> str:
    return f"clips/{number:05}.mp4"


def _encoding(number: int) -> Encoding:
    return ENCODINGS[number % len(ENCODINGS)]


def _describe(encoding: Encoding) -> str:
    width, height = encoding.size
    audio = f"{encoding.bit_rate // 1000} kbit/s"
    return f"{width}x{height}, {encoding.fps}/s, crf {encoding.crf}, {audio}"


def _encode_all(folder: Path, plan: Plan) -> None:
    jobs = [
        (folder / _clip_name(number), plan, number)
        for number in range(plan.clips)
        if not (folder / _clip_name(number)).is_file()
    ]
    # Not forked: libraries of the calling process may hold threads and locks.
    context = get_context("spawn")
    bar = tqdm(total=plan.clips, initial=plan.clips - len(jobs), desc="clips", unit="clip")
    with bar, ProcessPoolExecutor(PROCESSES, context, os.nice, (NICENESS,)) as pool:
        for _ in pool.map(_write_clip, jobs):
            bar.update()


def _write_clip(job: tuple[Path, Plan, int]) -> None:
    path, plan, number = job
    half = path.with_suffix(".part")
    half.write_bytes(encode(plan.scene(number), _encoding(number)))
    half.replace(path)


def _summary(plan: Plan, questions: list[Question]) -> dict[str, object]:
    tasks = Counter(question.task for question in questions)
    guessed = {
        missing: {
            task: round(_guessed(missing, [q for q in questions if task in (q.task, "all")]), 4)
            for task in (*sorted(tasks), "all")
        }
        for missing in MISSING_MODALITIES
    }
    return {
        "clips": plan.clips,
        "questions": len(questions),
        "seed": plan.seed,
        "seconds": sum(plan.scene(number).seconds for number in range(plan.clips)),
        "tasks": dict(sorted(tasks.items())),
        "answers": dict(Counter(question.answer for question in questions).most_common()),
        "encodings": [_describe(encoding) for encoding in ENCODINGS],
        "right when guessing without": guessed,
    }


def _guessed(missing: str, questions: list[Question]) -> float:
    return sum(q.meta.guesses[missing] == q.answer for q in questions) / len(questions)

"""`ep-serve inspect`: write a page that shows which tokens of a clip are kept for a question.

The page holds everything it shows. Tokens are drawn by the gateway's playground: its style sheet
and its modules are put into the page as they are, so that both look and work alike.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ep_serve.evaluation.client import RequestError, Server, media_type
from ep_serve.evaluation.errors import EvaluationError
from ep_serve.evaluation.evidence import kept_mask
from ep_serve.media import MediaLimits, SamplingRule, decode_clip, decode_image, decode_sound

FRAME_WIDTH = 336
"""Width in pixels of embedded frames."""
FRAME_QUALITY = 80
SAMPLE_RATE = 16_000
MAX_PLAYED_BYTES = 16 * 2**20
"""Maximum bytes of a clip that is embedded to be played."""
LIMITS = MediaLimits(timeout_s=60)
ROUNDING = 1e-6
"""Relative increase of the frame rate, against rounding to one frame less."""

MODULES = ("card", "dom", "figures", "heat", "overlay", "selection", "tables", "timeline")
"""Modules of the playground that the page uses."""
_IMPORT = re.compile(r'from "\./(\w+\.js)"')

Selection = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """One completion, with the field names of the playground's cards.

    `number` is that of question and server; the keep ratio is chosen on the page.
    """

    number: int
    question: str
    ratio: float
    server: str
    answer: str
    seconds: float
    usage: dict[str, Any]

    @property
    def reduction(self) -> dict[str, Any]:
        found: dict[str, Any] = self.usage["reduction"]
        return found

    @property
    def selection(self) -> Selection:
        found: Selection = self.reduction["selection"]
        return found


@dataclass(frozen=True, slots=True)
class ClipPreview:
    """Decoded frames and audio of the clip.

    Attributes:
        times: Seconds of the pictures.
        pictures: JPEG files as data URLs, the first frame of each step.
        peaks: The loudest sample of each audio token.
    """

    times: list[float]
    pictures: list[str]
    peaks: list[float]


def inspect(
    clip: Path,
    questions: Sequence[str],
    keep_ratios: Sequence[float],
    servers: Sequence[Server],
    target: Path,
    *,
    max_tokens: int,
) -> None:
    """Request every question at every keep ratio, and write the page.

    Raises:
        EvaluationError: A request failed, or a server does not return the selection.
        MediaError: The clip cannot be read.
    """
    cards = [(question, server) for question in questions for server in servers]
    jobs = [(number, *card, r) for number, card in enumerate(cards, start=1) for r in keep_ratios]
    runs = [_request_run(clip, max_tokens, *job) for job in tqdm(jobs, "asking")]
    preview = build_preview(clip.read_bytes(), media_type(clip), runs[0].selection[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(clip, preview, runs), encoding="utf-8")


def _request_run(
    clip: Path, max_tokens: int, number: int, question: str, server: Server, ratio: float
) -> Run:
    try:
        answer = server.complete([clip], question, ratio, max_tokens=max_tokens, selection=True)
    except RequestError as error:
        raise EvaluationError(f"{server.url}: {error}") from None
    if not (answer.reduction or {}).get("selection"):
        raise EvaluationError(
            f"{server.url} does not return which tokens it kept (return_selection)"
        )
    return Run(number, question, ratio, server.name, answer.text, answer.seconds, answer.usage)


def build_preview(data: bytes, mime: str, medium: dict[str, Any]) -> ClipPreview:
    """Decode the frames and audio that the engine processed.

    Args:
        data: The file.
        mime: Its MIME type.
        medium: Its entry in `usage.reduction.selection`.
    """
    kind = mime.split("/")[0]
    if kind == "image":
        return ClipPreview([0.0], [_jpeg(np.asarray(decode_image(data, LIMITS)))], [])
    if kind == "audio":
        return ClipPreview([], [], _peaks(decode_sound(data, LIMITS), medium))
    each = medium["video"]["seconds_per_step"]
    found = decode_clip(data, SamplingRule(fps=2 / each * (1 + ROUNDING)), LIMITS)
    count = len(found.frames)
    times = [i * found.duration_s / max(1, count - 1) for i in range(0, count, 2)]
    peaks = [] if found.sound is None else _peaks(found.sound, medium)
    return ClipPreview(times, [_jpeg(frame) for frame in found.frames[::2]], peaks)


def _peaks(sound: np.ndarray, medium: dict[str, Any]) -> list[float]:
    if "audio" not in medium:
        return []
    size = round(medium["audio"]["seconds_per_token"] * SAMPLE_RATE)
    padded = np.zeros(-(-len(sound) // size) * size, dtype=np.float32)
    padded[: len(sound)] = np.abs(sound)
    peaks: list[float] = padded.reshape(-1, size).max(axis=1).round(4).tolist()
    return peaks


def _jpeg(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((FRAME_WIDTH, FRAME_WIDTH))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=FRAME_QUALITY)
    return _data_url("image/jpeg", file.getvalue())


def _data_url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def page(clip: Path, preview: ClipPreview, runs: Sequence[Run]) -> str:
    """The HTML."""
    own = resources.files(__package__).joinpath("page")
    drawing = resources.files("ep_serve").joinpath("gateway", "playground", "page")
    ratios = list(dict.fromkeys(run.ratio for run in runs))
    scripts = {
        f"{name}.js": _module(drawing.joinpath(f"{name}.js").read_text("utf-8")) for name in MODULES
    }
    data = {"name": clip.name, **asdict(preview), "runs": [asdict(run) for run in runs]}
    style = drawing.joinpath("style.css").read_text("utf-8")
    return Template(own.joinpath("inspect.html").read_text("utf-8")).substitute(
        name=html.escape(clip.name),
        style=style + own.joinpath("inspect.css").read_text("utf-8"),
        player=_player(clip),
        ratios="".join(_choice(ratio, ratio == ratios[0]) for ratio in ratios),
        answers=_answers(runs),
        shared=_selection_overlap(runs),
        imports=_json({"imports": scripts}),
        data=_json(data),
        script=_use_bare_imports(own.joinpath("inspect.js").read_text("utf-8")),
    )


def _use_bare_imports(code: str) -> str:
    """Rewrite relative imports to bare names, which the page's import map resolves."""
    return _IMPORT.sub(r'from "\1"', code)


def _module(code: str) -> str:
    return _data_url("text/javascript", _use_bare_imports(code).encode())


def _json(value: Any) -> str:
    """JSON that cannot end the element that holds it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _player(clip: Path) -> str:
    mime = media_type(clip)
    kind, name = mime.split("/")[0], html.escape(clip.name, quote=True)
    if clip.stat().st_size > MAX_PLAYED_BYTES:
        return '<p class="hint">The clip is too large to be played from this page.</p>'
    url = _data_url(mime, clip.read_bytes())
    if kind == "image":
        return f'<img src="{url}" alt="The picture {name}">'
    return f'<{kind} controls src="{url}" aria-label="The clip {name}"></{kind}>'


def _choice(ratio: float, checked: bool) -> str:
    mark = " checked" if checked else ""
    return (
        f'<label class="check"><input type="radio" name="ratio" value="{ratio:g}"{mark}> '
        f"{100 * ratio:g} %</label>"
    )


def _answers(runs: Sequence[Run]) -> str:
    """All answers as a table, also without scripts."""
    several = len({run.server for run in runs}) > 1
    kinds = [
        k for k in ("video", "audio", "image") if any(run.reduction[k]["full"] for run in runs)
    ]
    heads = [
        "Question",
        *(["Server"] if several else []),
        "Keep ratio",
        "Answer",
        "Tokens kept",
    ]
    heads += [*(kind.capitalize() for kind in kinds), "Sound among kept", "Seconds"]
    rows = []
    for run in runs:
        found = run.reduction
        kept = found["av_tokens_kept"]
        cells = [run.question, *([run.server] if several else []), f"{run.ratio:g}", run.answer]
        cells += [f"{kept} of {found['av_tokens_full']}"]
        cells += [f"{found[kind]['kept']} of {found[kind]['full']}" for kind in kinds]
        cells += [_percent(found["audio"]["kept"] / kept) if kept else "-"]
        cells += [f"{run.seconds:.2f}"]
        first = f'<th scope="row">{html.escape(cells[0])}</th>'
        rows.append(first + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells[1:]))
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        "<table><caption>All answers</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _selection_overlap(runs: Sequence[Run]) -> str:
    """Share of the tokens kept for the first question that the second one keeps too."""
    first = runs[0]
    parts = []
    for ratio in dict.fromkeys(run.ratio for run in runs):
        same = [run for run in runs if run.ratio == ratio and run.server == first.server]
        if len(same) < 2:
            continue
        one, other = _kept(same[0]), _kept(same[1])
        if one.shape == other.shape and one.any():
            parts.append(f"{_percent((one & other).sum() / one.sum())} at {100 * ratio:g} %")
    if not parts:
        return ""
    words = "Of the tokens kept for the first question, these were kept for the second one too"
    return f'<p class="hint">{words}: {", ".join(parts)}.</p>'


def _kept(run: Run) -> np.ndarray:
    """(n,) bool, all tokens of all media."""
    kinds = [medium[k] for medium in run.selection for k in ("video", "audio") if k in medium]
    return np.concatenate([kept_mask(tokens) for tokens in kinds])


def _percent(share: float) -> str:
    """Rounded as the page's scripts do."""
    return f"{math.floor(100 * share + 0.5)} %"

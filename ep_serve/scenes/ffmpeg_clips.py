"""Render scenes with FFmpeg's filters, as clips outside the training distribution.

They share nothing with `pictures` and `sounds`: colours, edges and waveforms differ, backgrounds
move or are test cards, pink noise and optionally speech are mixed into the sound. They measure how
far the embedded model generalizes.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np

from ep_serve.scenes.questions import KINDS, Question, make_question
from ep_serve.scenes.scene import MOTIONS, PLACES, Scene, Sight, make_scene

FIRST_SEED = 6_000_000
CLIPS = 24
QUESTIONS = 6
"""About each clip."""
LENGTHS = (6, 8, 10, 12)
SIZE = (320, 240)
FPS = 25
SAMPLE_RATE = 48_000

BACKGROUNDS = {
    "grey": "color=c=0x404040",
    "test card": "smptebars",
    "gradient": "gradients=c0=0x203040:c1=0x604838:speed=0.01",
    "life": "life=mold=10:ratio=0.05:life_color=0x505868:death_color=0x202428:mold_color=0x303438",
    "test pattern": "testsrc2",
    "cells": "cellauto=rule=110,format=rgb24,lutrgb=r=val*0.3:g=val*0.3:b=val*0.3",
}
"""FFmpeg sources, still and moving."""
TINTS = {
    "red": "0xD02020",
    "green": "0x209030",
    "blue": "0x3060E0",
    "yellow": "0xF0D020",
    "purple": "0xA040C0",
    "white": "0xFFFFFF",
}
_SHAPE_MASKS = {
    "square": "1",
    "circle": "lte(hypot(X-W/2,Y-H/2),W/2)",
    "ring": "between(hypot(X-W/2,Y-H/2),W*0.3,W/2)",
    "triangle": "lte(abs(X-W/2),Y/2)",
    "cross": "lte(abs(X-W/2),W/6)+lte(abs(Y-H/2),H/6)",
}
"""Masks of the shapes as FFmpeg expressions."""
_WAVES = {
    "beep": "sin(2*PI*900*t)",
    "chirp": "sin(2*PI*(350*mod(t,0.5)+2200*pow(mod(t,0.5),2)))",
    "siren": "sin(2*PI*if(lt(mod(t,0.3),0.15),600,900)*t)",
    "clicks": "exp(-400*mod(t,0.125))*sin(2*PI*2000*mod(t,0.125))",
    "noise": "(random(0)-0.5)",
    "buzz": "(2*mod(t*100,1)-1)",
}
"""Waveforms as FFmpeg expressions."""
VOICES = ("en-gb", "en-us", "en-gb-scotland", "en-029")
SPEECH = (
    "In the morning the harbour was quiet, and nobody had yet opened a window. Later a cart came "
    "up the hill with apples and bread. The baker asked for the news, but there was none to tell. "
    "So they talked about the rain that had to come, and about the bridge that was never finished."
)
"""Longer than any clip when spoken."""


class VoiceError(RuntimeError):
    """espeak-ng is not installed."""


def write(folder: Path, *, speech: bool = False) -> Path:
    """Write clips and `questions.jsonl` in the format of `ep-serve eval run`.

    Args:
        folder: Target folder, created if absent.
        speech: Mix speech by espeak-ng into the sound.

    Returns:
        The file of questions.

    Raises:
        VoiceError: `speech` is set and espeak-ng is not installed.
    """
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for number in range(CLIPS):
        scene = make_scene(FIRST_SEED + number, LENGTHS[number % len(LENGTHS)])
        background = list(BACKGROUNDS)[number % len(BACKGROUNDS)]
        name = f"clips/{number:02}.mp4"
        encode(scene, background, folder / name, speech=speech)
        lines += [
            {
                "id": f"{number:02}-{index}",
                "media": [name],
                "question": question.text,
                "answer": question.answer,
                "task": question.task,
                "meta": {"kind": question.kind, "encoding": background},
            }
            for index, question in enumerate(islice(_questions_about(scene), QUESTIONS))
        ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def encode(scene: Scene, background: str, path: Path, *, speech: bool = False) -> None:
    """Write a scene as an MP4 file.

    Raises:
        VoiceError: `speech` is set and espeak-ng is not installed.
    """
    with TemporaryDirectory() as made, av.open(path, "w") as output:
        spoken = write_speech(scene, Path(made) / "spoken.wav") if speech else None
        video = output.add_stream("libx264", rate=FPS)
        video.width, video.height = SIZE
        video.pix_fmt = "yuv420p"
        audio = output.add_stream("aac", rate=SAMPLE_RATE)
        audio.codec_context.layout = "mono"
        for frame in _frames(picture_graph(scene, background), "video"):
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        for frame in _frames(sound_graph(scene, spoken), "audio"):
            output.mux(audio.encode(frame))
        output.mux(audio.encode(None))


def picture_graph(scene: Scene, background: str) -> str:
    """FFmpeg filter graph of the video."""
    width, height = SIZE
    size = f"s={width}x{height}:r={FPS}"
    first, *rest = BACKGROUNDS[background].split(",")
    source = ",".join([f"{first}{':' if '=' in first else '='}{size}", *rest])
    parts = [f"{source},trim=duration={scene.seconds},format=rgb24[b0]"]
    for number, sight in enumerate(scene.sights):
        side = 2 * round(sight.radius * min(SIZE))
        x, y = _place(sight)
        parts.append(
            f"color=c={TINTS[sight.colour]}:s={side}x{side}:r={FPS}:d={scene.seconds},format=rgba,"
            f"geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='255*gt({_SHAPE_MASKS[sight.shape]},0)'[s{number}]"
        )
        during = f"gte(t,{sight.start})*lt(t,{sight.end})"
        parts.append(
            f"[b{number}][s{number}]overlay=x='{x}':y='{y}':enable='{during}'[b{number + 1}]"
        )
    return ";".join([*parts, f"[b{len(scene.sights)}]format=yuv420p"])


def sound_graph(scene: Scene, spoken: Path | None = None) -> str:
    """FFmpeg filter graph of the audio: sounds, faint pink noise, and speech."""
    waves = "+".join(
        f"{0.15 + 0.3 * sound.loudness:.2f}*between(t,{sound.start:.3f},{sound.end:.3f})"
        f"*{_WAVES[sound.name]}"
        for sound in scene.sounds
    )
    seed = random.Random(scene.seed).randrange(1 << 30)
    length = f"d={scene.seconds}"
    sources = [
        f"aevalsrc='{waves}':s={SAMPLE_RATE}:{length}",
        f"anoisesrc=color=pink:amplitude=0.01:r={SAMPLE_RATE}:{length}:seed={seed}",
    ]
    if spoken is not None:
        sources.append(f"amovie='{spoken}',aresample={SAMPLE_RATE},volume=0.15")
    parts = [f"{source}[a{number}]" for number, source in enumerate(sources)]
    inputs = "".join(f"[a{number}]" for number in range(len(sources)))
    mixed = f"{inputs}amix=inputs={len(sources)}:normalize=0:duration=first"
    return ";".join([*parts, f"{mixed},aformat=sample_fmts=fltp:channel_layouts=mono"])


def write_speech(scene: Scene, path: Path) -> Path:
    """Write a WAV file of speech that is longer than the scene."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise VoiceError("espeak-ng is not installed (Debian's package has the same name)")
    voice = VOICES[scene.seed % len(VOICES)]
    subprocess.run([program, "-v", voice, "-w", str(path), SPEECH], check=True)
    return path


def _place(sight: Sight) -> tuple[str, str]:
    """FFmpeg expressions of the left and upper border over time."""
    if sight.motion is None:
        across, down = (str(share) for share in PLACES[sight.place or ""])
    else:
        along = f"((t-{sight.start})/{sight.end - sight.start}-0.5)*0.5"
        right, low = MOTIONS[sight.motion]
        across, down = f"0.5+{right}*{along}", f"0.5+{low}*{along}"
    return f"({across})*W-w/2", f"({down})*H-h/2"


def _frames(description: str, kind: str) -> Iterator[Any]:
    """Frames of a filter graph, without timestamps: the encoder sets them."""
    with av.open(f"{description}[out0]", format="lavfi") as made:
        for frame in made.decode(**{kind: 0}):
            frame.pts = None
            yield frame


def _questions_about(scene: Scene) -> Iterator[Question]:
    """Questions about a scene, one of each kind, in random order."""
    rng = np.random.default_rng([scene.seed, 1])
    for number in rng.permutation(len(KINDS)):
        question = make_question(scene, KINDS[number], rng)
        if question is not None:
            yield question

"""Generate the demo's clip with sound, and questions about it."""

from __future__ import annotations

from dataclasses import dataclass

from ep_serve.scenes.encoding import encode
from ep_serve.scenes.scene import Scene, Sight, Sound

SECONDS = 12


@dataclass(frozen=True, slots=True)
class ClipQuestion:
    """A question about the clip and its right answer."""

    question: str
    answer: str


SCENE = Scene(
    seed=4_000_000,  # far from the seeds of clips that the model was trained on
    seconds=SECONDS,
    sights=(
        Sight(1.0, 2.0, "red", "circle", place="left", motion=None, radius=0.2),
        Sight(3.0, 4.0, "blue", "square", place=None, motion="right", radius=0.19),
        Sight(5.0, 7.0, "green", "triangle", place="top", motion=None, radius=0.2),
        Sight(8.0, 9.0, "white", "cross", place="middle", motion=None, radius=0.21),
    ),
    sounds=(
        Sound(1.05, 1.95, "beep", pitch=0.5, loudness=0.6),
        Sound(3.05, 3.95, "siren", pitch=0.4, loudness=0.7),
        Sound(8.05, 8.95, "clicks", pitch=0.5, loudness=0.8),
        Sound(10.05, 10.95, "buzz", pitch=0.5, loudness=0.5),
    ),
)
QUESTIONS = (
    ClipQuestion("Which colour was shown when the siren sounded?", "blue"),
    ClipQuestion("What sounded when the white cross was shown?", "clicks"),
    ClipQuestion("Where was the green triangle?", "top"),
    ClipQuestion("Which way did the blue square move?", "right"),
    ClipQuestion("What was the last sound?", "buzz"),
    ClipQuestion("How many shapes were shown?", "4"),
)


def make_clip() -> bytes:
    """`SCENE` as an MP4 file with H.264 and AAC."""
    return encode(SCENE)

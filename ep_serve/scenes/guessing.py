"""Accuracy of guessing without video, without audio, and without both: the baseline of a model.

The guesser has perfect information about the modalities that it is given and the statistics of
the generated questions. A model has to exceed its accuracy to show any understanding.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ep_serve.scenes.questions import AUDIO_KINDS, VIDEO_KINDS, Question
from ep_serve.scenes.scene import Scene

SceneQuestion = tuple[Scene, Question]


@dataclass(frozen=True, slots=True)
class AvailableModalities:
    """The modalities that a guesser is given."""

    has_video: bool
    has_audio: bool


MISSING_MODALITIES = {
    "picture": AvailableModalities(has_video=False, has_audio=True),
    "sound": AvailableModalities(has_video=True, has_audio=False),
    "both": AvailableModalities(has_video=False, has_audio=False),
}


class Guesser:
    """Predicts the most frequent answer among examples with the same known features."""

    def __init__(self, available: AvailableModalities, examples: Iterable[SceneQuestion]) -> None:
        self._available = available
        self._counts: dict[tuple[object, ...], Counter[str]] = defaultdict(Counter)
        for scene, question in examples:
            self._counts[self._features(scene, question)][question.answer] += 1
            self._counts[(question.kind,)][question.answer] += 1

    def guess(self, scene: Scene, question: Question) -> str:
        """Guess the answer to a question."""
        if self._perceives_answer(question):
            return question.answer
        if choice := self._choices(scene, question):
            return Counter(choice).most_common(1)[0][0]
        known = self._counts.get(self._features(scene, question)) or self._counts[(question.kind,)]
        return known.most_common(1)[0][0] if known else ""

    def _perceives_answer(self, question: Question) -> bool:
        by_video, by_audio = question.kind in VIDEO_KINDS, question.kind in AUDIO_KINDS
        return (self._available.has_video and by_video) or (self._available.has_audio and by_audio)

    def _choices(self, scene: Scene, question: Question) -> Sequence[str]:
        """Possible answers, as far as the available modalities limit them."""
        if question.kind in ("order-sights", "order-sounds"):
            _, named = question.text.rstrip("?").split(", the ")
            return named.split(" or the ")
        if self._available.has_video and question.kind == "cross-colour":
            return [sight.colour for sight in scene.sights]
        if self._available.has_video and question.kind == "cross-shape":
            return [sight.shape for sight in scene.sights]
        if self._available.has_audio and question.kind == "cross-sound":
            return [sound.name for sound in scene.sounds]
        return ()

    def _features(self, scene: Scene, question: Question) -> tuple[object, ...]:
        """Features that the answer may depend on: counts of events, and the time asked about."""
        features: list[object] = [question.kind, scene.seconds, "before" in question.text]
        if self._available.has_video:
            features += [
                len(scene.sights),
                *(_third(scene.sights[i].start, scene) for i in question.seen),
            ]
        if self._available.has_audio:
            features += [
                len(scene.sounds),
                *(_third(scene.sounds[i].start, scene) for i in question.heard),
            ]
        return tuple(features)


def _third(start: float, scene: Scene) -> int:
    return int(3 * start / scene.seconds)


def guess_accuracy(
    train: Sequence[SceneQuestion], test: Sequence[SceneQuestion]
) -> dict[str, dict[str, float]]:
    """Accuracy of guesses: {missing modality: {task or "all": share}}."""
    shares = {}
    for missing, available in MISSING_MODALITIES.items():
        guesser = Guesser(available, train)
        right = defaultdict(list)
        for scene, question in test:
            hit = guesser.guess(scene, question) == question.answer
            right[question.task].append(hit)
            right["all"].append(hit)
        shares[missing] = {t: round(sum(h) / len(h), 4) for t, h in sorted(right.items())}
    return shares

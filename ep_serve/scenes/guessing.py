"""How well one can answer without looking, without listening, and without either.

The guesser perceives perfectly with the sense it is left, knows how the questions are made, and
does the best it can: it is the bar that a model has to be above before it has understood anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ep_serve.scenes.questions import BY_EAR, BY_EYE, Question
from ep_serve.scenes.scene import Scene

Asked = tuple[Scene, Question]


@dataclass(frozen=True, slots=True)
class Senses:
    """What is left to a guesser."""

    sees: bool
    hears: bool


WITHOUT = {
    "picture": Senses(sees=False, hears=True),
    "sound": Senses(sees=True, hears=False),
    "both": Senses(sees=False, hears=False),
}


class Guesser:
    """Learns from questions and their answers which answer is the likeliest for which clue."""

    def __init__(self, senses: Senses, examples: Iterable[Asked]) -> None:
        self._senses = senses
        self._seen: dict[tuple[object, ...], Counter[str]] = defaultdict(Counter)
        for scene, question in examples:
            self._seen[self._clue(scene, question)][question.answer] += 1
            self._seen[(question.kind,)][question.answer] += 1

    def guess(self, scene: Scene, question: Question) -> str:
        """The best answer it can give."""
        if self._knows(question):
            return question.answer
        if choice := self._choice(scene, question):
            return Counter(choice).most_common(1)[0][0]
        known = self._seen.get(self._clue(scene, question)) or self._seen[(question.kind,)]
        return known.most_common(1)[0][0] if known else ""

    def _knows(self, question: Question) -> bool:
        by_eye, by_ear = question.kind in BY_EYE, question.kind in BY_EAR
        return (self._senses.sees and by_eye) or (self._senses.hears and by_ear)

    def _choice(self, scene: Scene, question: Question) -> Sequence[str]:
        """What the answer has to be one of, as far as the guesser perceives it."""
        if question.kind in ("order-sights", "order-sounds"):
            _, named = question.text.rstrip("?").split(", the ")
            return named.split(" or the ")
        if self._senses.sees and question.kind == "cross-colour":
            return [sight.colour for sight in scene.sights]
        if self._senses.sees and question.kind == "cross-shape":
            return [sight.shape for sight in scene.sights]
        if self._senses.hears and question.kind == "cross-sound":
            return [sound.name for sound in scene.sounds]
        return ()

    def _clue(self, scene: Scene, question: Question) -> tuple[object, ...]:
        """What an answer may depend on: how much goes on, and when it is asked about."""
        clue: list[object] = [question.kind, scene.seconds, "before" in question.text]
        if self._senses.sees:
            clue += [
                len(scene.sights),
                *(_third(scene.sights[i].start, scene) for i in question.seen),
            ]
        if self._senses.hears:
            clue += [
                len(scene.sounds),
                *(_third(scene.sounds[i].start, scene) for i in question.heard),
            ]
        return tuple(clue)


def _third(start: float, scene: Scene) -> int:
    return int(3 * start / scene.seconds)


def guessed_right(train: Sequence[Asked], test: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """Shares of right guesses: {what is missing: {task or "all": share}}."""
    shares = {}
    for missing, senses in WITHOUT.items():
        guesser = Guesser(senses, train)
        right = defaultdict(list)
        for scene, question in test:
            hit = guesser.guess(scene, question) == question.answer
            right[question.task].append(hit)
            right["all"].append(hit)
        shares[missing] = {t: round(sum(h) / len(h), 4) for t, h in sorted(right.items())}
    return shares

"""Reading Dockerfiles: stages, their instructions, arguments filled in."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DOCKER = Path(__file__).resolve().parents[2] / "docker"


@dataclass(frozen=True)
class Instruction:
    """`RUN --mount=... command`: its word, the flags, and the rest."""

    word: str
    flags: tuple[str, ...]
    text: str

    @property
    def words(self) -> list[str]:
        """The rest as words, of the JSON form too."""
        if self.text.startswith("["):
            found: list[str] = json.loads(self.text)
            return found
        return shlex.split(self.text)


@dataclass
class Stage:
    """From one FROM to the next."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, word: str) -> list[Instruction]:
        return [item for item in self.instructions if item.word == word]

    def last(self, word: str) -> Instruction:
        return self.all(word)[-1]

    @property
    def environment(self) -> dict[str, str]:
        """What ENV sets, with references as they are written."""
        pairs = (word.partition("=")[::2] for item in self.all("ENV") for word in item.words)
        return dict(pairs)


def parse(name: str, given: Mapping[str, str] | None = None) -> list[Stage]:
    """The stages of a Dockerfile; arguments that are not given have their defaults."""
    text = re.sub(r"^#.*\n", "", (DOCKER / f"{name}.Dockerfile").read_text(), flags=re.MULTILINE)
    stages: list[Stage] = []
    arguments: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, _, rest = line.partition(" ")
        if word == "ARG":
            argument, _, default = rest.partition("=")
            arguments[argument] = (given or {}).get(argument, default)
        if word == "FROM":
            base, _, stage = filled(rest, arguments).partition(" AS ")
            stages.append(Stage(base.strip(), stage.strip()))
        elif stages:
            flags = re.match(r"((?:--\S+\s+)*)(.*)", rest.strip())
            assert flags is not None
            rest = filled(flags[2], arguments)
            stages[-1].instructions.append(Instruction(word, tuple(flags[1].split()), rest))
    return stages


def filled(text: str, arguments: dict[str, str]) -> str:
    """`text` with `${NAME}` and `${NAME:+...}` of known arguments replaced."""

    def value(found: re.Match[str]) -> str:
        name, alternative = found[1], found[2]
        if name not in arguments:
            return found[0]
        if alternative is not None:
            return filled(alternative, arguments) if arguments[name] else ""
        return arguments[name]

    return re.sub(r"\$\{(\w+)(?::\+((?:[^{}]|\$\{\w+\})*))?\}", value, text)

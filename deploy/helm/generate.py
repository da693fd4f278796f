"""Generate the chart's README.md and values.schema.json from its values.yaml.

`python deploy/helm/generate.py` writes both; `--check` only checks that they are current.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from values_schema import values_schema

CHART = Path(__file__).parent / "ep-serve"
EXAMPLES = Path(__file__).parent / "examples"

HEAD = """\
# ep-serve

{description}. Installing, sizing and running it: [deploy/README.md](../../README.md).

    helm install omni deploy/helm/ep-serve -f my-values.yaml
    helm test omni

An entry of `models` may override everything below `engine`. Wrong names and values are refused by
`values.schema.json` before anything is sent to the cluster.

## Examples

{examples}

## Values

This page is made by `deploy/helm/generate.py` from `values.yaml`.

| Value | Default | Meaning |
|---|---|---|
"""


@dataclass(frozen=True)
class Value:
    """One documented value: its dotted name, its default and its comment."""

    name: str
    default: Any
    comment: str


def documented(text: str) -> Iterator[Value]:
    """The values of a values.yaml that have a `# -- ...` comment, in order."""
    defaults = yaml.safe_load(text)
    path: list[tuple[int, str]] = []
    comment = ""
    for line in text.splitlines():
        if found := re.match(r"\s*# -- (.*)", line):
            comment = found[1]
        elif found := re.match(r"( *)([A-Za-z]\w*):", line):
            indent = len(found[1])
            path = [(depth, name) for depth, name in path if depth < indent]
            path.append((indent, found[2]))
            if comment:
                names = [name for _, name in path]
                yield Value(".".join(names), _at(defaults, names), comment)
            comment = ""


def readme(values: list[Value]) -> str:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    examples = "\n".join(
        f"- [{file.stem}](../examples/{file.name}): {_first_comment(file)}"
        for file in sorted(EXAMPLES.glob("*.yaml"))
    )
    head = HEAD.format(description=chart["description"], examples=examples)
    rows = (
        f"| `{value.name}` | `{json.dumps(value.default)}` | {value.comment} |\n"
        for value in values
    )
    return head + "".join(row.replace("||", r"\|\|") for row in rows)


def outputs() -> dict[Path, str]:
    """The files that are generated, with their content."""
    values = list(documented((CHART / "values.yaml").read_text()))
    schema = values_schema({value.name: value.comment for value in values})
    return {
        CHART / "README.md": readme(values),
        CHART / "values.schema.json": json.dumps(schema, indent=1) + "\n",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if not current")
    check = parser.parse_args().check
    stale = [file for file, text in outputs().items() if not _is_current(file, text)]
    for file in stale:
        if check:
            print(f"{file.name} is not current: run deploy/helm/generate.py", file=sys.stderr)
        else:
            file.write_text(outputs()[file])
            print(f"wrote {file.name}")
    return int(check and bool(stale))


def _at(values: Any, names: list[str]) -> Any:
    for name in names:
        values = values[name]
    return values


def _first_comment(file: Path) -> str:
    """The leading comment of a file, as one line."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _is_current(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text() == text


if __name__ == "__main__":
    sys.exit(main())

"""Reading the YAML files of an operator, with errors that a person can act on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path


class SettingsError(Exception):
    """The configuration makes no sense; the message has one line for each problem."""


class _DuplicateKeyError(yaml.MarkedYAMLError):
    """A mapping has the same key twice."""


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _DuplicateKeyError(problem_mark=key.start_mark)
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(file: Path) -> Any:
    """The content of a YAML file.

    Raises:
        SettingsError: one sentence that names the file, and the line if that is known. It quotes
            nothing of the content, which may hold secrets.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{file}: cannot be read (it is not UTF-8 text)") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark is not None else ""
        twice = isinstance(error, _DuplicateKeyError)
        problem = "has a key for the second time" if twice else "is not YAML"
        raise SettingsError(f"{file}: {problem}{where}") from None
    # The constructors of YAML's types raise what they like, for a date of 99 months, say.
    except (yaml.YAMLError, ArithmeticError, LookupError, ValueError, TypeError, RecursionError):
        raise SettingsError(f"{file}: is not YAML") from None

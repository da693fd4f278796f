"""Read YAML configuration files with readable errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path


class SettingsError(Exception):
    """The configuration is invalid; the message has one line for each problem."""


class _DuplicateKeyError(yaml.MarkedYAMLError):
    """A mapping has the same key twice."""


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, of which PyYAML silently uses the last."""

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
    """Load a YAML file.

    Raises:
        SettingsError: names the file and, if known, the line. It does not quote the content, which
            may hold secrets.
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
    # YAML's type constructors raise various errors, such as for a date with month 99.
    except (yaml.YAMLError, ArithmeticError, LookupError, ValueError, TypeError, RecursionError):
        raise SettingsError(f"{file}: is not YAML") from None

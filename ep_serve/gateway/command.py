"""The command `ep-serve gateway`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the most used settings; the config file and the environment have all of them."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    parser.add_argument(
        "--upstream", action="append", metavar="URL", help="an engine; may be given several times"
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8080)")
    parser.add_argument("--keys-file", type=Path, metavar="FILE", help="YAML file with API keys")
    parser.add_argument("--store", type=Path, metavar="DIR", help="folder for media")
    parser.add_argument(
        "--playground", action="store_true", help="serve a page at /playground to try models"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings in force and stop"
    )
    parser.add_argument(
        "--new-key", metavar="NAME", help="print a new API key and its entry in the key file"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    from ep_serve.gateway.settings import SettingsError, load, to_yaml

    if arguments.new_key:
        return _print_key(arguments.new_key)
    try:
        settings = load(arguments.config, _options(arguments))
        if arguments.print_config:
            print(to_yaml(settings), end="")
            return 0
        import uvloop

        from ep_serve.gateway import logs
        from ep_serve.gateway.server import serve

        logs.configure(settings.log_level)
        uvloop.run(serve(settings))
    except SettingsError as error:
        for line in str(error).splitlines():
            print(f"ep-serve gateway: {line}", file=sys.stderr)
        return 1
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {
        "upstreams": arguments.upstream,
        "host": arguments.host,
        "port": arguments.port,
        "keys_file": arguments.keys_file,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.store is not None:
        options["store"] = {"path": arguments.store}
    if arguments.playground:
        options["playground"] = {"enabled": True}
    return options


def _print_key(name: str) -> int:
    from ep_serve.gateway.keys import new_key

    key, entry = new_key(name)
    print(f"# The key, shown only now: {key}\n# Its entry in the key file:\n{entry}", end="")
    return 0

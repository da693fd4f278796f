"""`python -m ep_serve.training embedded --out DIR` and `... elsewhere --to DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from transformers.utils import logging


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ep_serve.training", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    embedded = actions.add_parser("embedded", help="train the embedded model from nothing")
    embedded.add_argument("--out", type=Path, required=True, metavar="DIR", help="for all files")
    embedded.add_argument("--short", action="store_true", help="a few minutes, to try it out")
    embedded.add_argument(
        "--variant",
        default="shipped",
        help="to compare with: again, full, uniform, random, closed, closed-uniform and "
        "closed-random go on from the shipped one; anew, mrope and omnisift begin from nothing",
    )
    embedded.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    embedded.add_argument("--processes", type=int, default=2, help="of one thread each")
    embedded.set_defaults(handler=train_embedded)
    elsewhere = actions.add_parser("elsewhere", help="clips by other means, for `ep-serve eval`")
    elsewhere.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to make")
    elsewhere.add_argument("--speech", action="store_true", help="with a voice; needs espeak-ng")
    elsewhere.set_defaults(handler=make_elsewhere)
    arguments = parser.parse_args()
    code: int = arguments.handler(arguments)
    return code


def train_embedded(arguments: argparse.Namespace) -> int:
    """Train the embedded model, and print how it answers."""
    logging.set_verbosity_error()  # warnings about the voice that the model does not have
    from ep_serve.training.loop.embedded import FULL, SHORT, train

    report = train(
        arguments.out,
        SHORT if arguments.short else FULL,
        variant=arguments.variant,
        seed=arguments.seed,
        processes=arguments.processes,
    )
    print(json.dumps(report, indent=2))
    return 0


def make_elsewhere(arguments: argparse.Namespace) -> int:
    """Write clips of FFmpeg's making, and questions about them."""
    from ep_serve.scenes.other_sources import VoiceError, write

    try:
        print(write(arguments.to, speech=arguments.speech))
    except VoiceError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

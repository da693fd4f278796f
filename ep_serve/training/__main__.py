"""`python -m ep_serve.training embedded --out DIR`."""

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
        help="full, closed, closed-uniform, closed-random or mrope, to compare with",
    )
    embedded.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    embedded.add_argument("--processes", type=int, default=2, help="of one thread each")
    arguments = parser.parse_args()
    logging.set_verbosity_error()  # warnings about the voice that the model does not have

    from ep_serve.training.embedded import FULL, SHORT, train

    report = train(
        arguments.out,
        SHORT if arguments.short else FULL,
        variant=arguments.variant,
        seed=arguments.seed,
        processes=arguments.processes,
    )
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

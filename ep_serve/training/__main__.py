"""`python -m ep_serve.training embedded --out DIR` and `... ffmpeg-clips --to DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from transformers.utils import logging


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ep_serve.training", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    embedded = actions.add_parser("embedded", help="train the embedded model from scratch")
    embedded.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    embedded.add_argument("--short", action="store_true", help="a training of a few minutes")
    embedded.add_argument(
        "--variant",
        default="shipped",
        help="an ablation: again, full, uniform, random, closed, closed-uniform and "
        "closed-random start from the shipped model; anew, mrope and omnisift from scratch",
    )
    embedded.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    embedded.add_argument(
        "--processes",
        type=int,
        default=2,
        help="data-parallel processes of one thread each (default: 2)",
    )
    embedded.set_defaults(handler=train_embedded)
    clips = actions.add_parser(
        "ffmpeg-clips", aliases=["elsewhere"], help="clips rendered by FFmpeg, for `ep-serve eval`"
    )
    clips.add_argument("--to", type=Path, required=True, metavar="DIR", help="output folder")
    clips.add_argument("--speech", action="store_true", help="mix in speech; needs espeak-ng")
    clips.set_defaults(handler=write_ffmpeg_clips)
    arguments = parser.parse_args()
    code: int = arguments.handler(arguments)
    return code


def train_embedded(arguments: argparse.Namespace) -> int:
    """Train the embedded model and print its evaluation."""
    logging.set_verbosity_error()  # warnings about the speech output that the model does not have
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


def write_ffmpeg_clips(arguments: argparse.Namespace) -> int:
    """Write clips rendered by FFmpeg, and questions about them."""
    from ep_serve.scenes.ffmpeg_clips import VoiceError, write

    try:
        print(write(arguments.to, speech=arguments.speech))
    except VoiceError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

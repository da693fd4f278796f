"""The `ep-serve` command.

Each entry of `COMMANDS` adds one command. A command's parser sets `handler`, which gets the parsed
arguments and returns the exit code; it imports what it needs when it runs, so that `--help` answers
at once. A parser that also sets `forwards=True` gets the options it does not know, in order, as
`arguments.forwarded`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.engine.errors import ServeError

if TYPE_CHECKING:
    Groups = argparse._SubParsersAction[argparse.ArgumentParser]


def add_checkpoint(groups: Groups) -> None:
    """`ep-serve checkpoint check | init | embedded`."""
    parser = groups.add_parser("checkpoint", help="check a checkpoint, or make one")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    check = actions.add_parser("check", help="say what is wrong with a checkpoint")
    check.add_argument("directory", type=Path)
    check.set_defaults(handler=check_checkpoint)

    init = actions.add_parser(
        "init",
        help="make an untrained EchoingPixels checkpoint from a Qwen2.5-Omni one",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    stock = "directory of a stock Qwen2.5-Omni checkpoint"
    init.add_argument(
        "--from", type=Path, required=True, metavar="STOCK", dest="source", help=stock
    )
    init.add_argument(
        "--to", type=Path, required=True, metavar="DIR", dest="target", help="directory to make"
    )
    init.add_argument("--layers", type=int, default=4, help="bidirectional layers")
    init.add_argument("--keep-ratio", type=float, default=0.2, help="fraction of tokens to keep")
    init.add_argument("--seed", type=int, default=0, help="of the score head's random weights")
    init.set_defaults(handler=init_checkpoint)

    embedded = actions.add_parser("embedded", help="write the embedded model into a directory")
    embedded.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory to make")
    embedded.add_argument(
        "--random",
        type=int,
        metavar="SEED",
        dest="seed",
        help="one with random weights instead, whose answers mean nothing",
    )
    embedded.set_defaults(handler=embedded_checkpoint)


def check_checkpoint(arguments: argparse.Namespace) -> int:
    """Print every finding; 1 if one of them is an error."""
    _quiet_transformers()
    from ep_serve.checkpoint.check import check

    findings = check(arguments.directory)
    for finding in findings:
        print(finding)
    if any(finding.severity == "error" for finding in findings):
        return 1
    print(f"{arguments.directory} is an EchoingPixels checkpoint that can be served")
    return 0


def init_checkpoint(arguments: argparse.Namespace) -> int:
    """Make a checkpoint to train, and say what it is."""
    _quiet_transformers()
    from ep_serve.checkpoint.init import init

    made = init(
        arguments.source,
        arguments.target,
        layers=arguments.layers,
        keep_ratio=arguments.keep_ratio,
        seed=arguments.seed,
    )
    print(f"{made.directory}: {made.tensors} tensors, {made.nbytes / 2**30:.2f} GiB")
    for part, count in sorted(made.left_out.items()):
        print(f"left out: {count} tensors of {part}")
    print(
        "This checkpoint is UNTRAINED. Its refiner is a copy of the first "
        f"{arguments.layers} decoder layers and its score head is random: train it before you "
        "trust an answer."
    )
    return 0


def embedded_checkpoint(arguments: argparse.Namespace) -> int:
    """Write the embedded model, or one with random weights."""
    _quiet_transformers()
    import shutil

    from ep_serve.checkpoint.directory import new_directory
    from ep_serve.checkpoint.embedded import build
    from ep_serve.demo import MODEL

    if arguments.seed is not None:
        print(f"{build(arguments.to, arguments.seed)}: random weights, for trials only")
        return 0
    with new_directory(arguments.to) as new:
        shutil.copytree(MODEL, new, dirs_exist_ok=True)
    print(f"{arguments.to}: answers about clips of this project's making; see its README.md")
    return 0


def _quiet_transformers() -> None:
    # Loading any Qwen2.5-Omni configuration warns about the token ids of the unused voice.
    from transformers.utils import logging

    logging.set_verbosity_error()


def add_serve(groups: Groups) -> None:
    """`ep-serve serve CHECKPOINT`, with every option of vLLM's server."""
    parser = groups.add_parser(
        "serve",
        help="serve a checkpoint over the OpenAI API",
        description="Serve a checkpoint. Options not listed here are those of vLLM's server.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="directory or model name of a checkpoint")
    media = parser.add_argument_group("media (defaults: the checkpoint's and Qwen2.5-Omni's)")
    media.add_argument("--keep-ratio", type=float, help="fraction of the AV tokens to keep")
    media.add_argument(
        "--rho-audio", type=float, help="fraction of audio tokens to drop (omnisift, omnizip)"
    )
    media.add_argument(
        "--rho-video", type=float, help="fraction of video tokens to drop (omnisift, omnizip)"
    )
    media.add_argument("--fps", type=float, help="frames sampled from each second of a video")
    media.add_argument("--max-fps", type=float, help="highest fps that a request may ask for")
    media.add_argument("--max-frames", type=int, help="frames sampled from one video at most")
    media.add_argument("--min-pixels", type=int, help="smaller frames are enlarged to this")
    media.add_argument("--max-pixels", type=int, help="larger frames are shrunk to this")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--sieve", help="cs2, omnisift, omnizip, uniform, random, none or an installed one"
    )
    engine.add_argument("--max-full-tokens", type=int, help="longest prompt before reduction")
    engine.add_argument("--tower-cache-gib", type=float, help="GiB for cached tower outputs")
    engine.add_argument("--media-cache-gib", type=float, help="GiB for cached media features")
    engine.add_argument("--max-n", type=int, help="most answers to one request [8]")
    engine.add_argument(
        "--step-timeout",
        type=float,
        metavar="SECONDS",
        dest="step_timeout_s",
        help="/health fails when requests run and no step of the engine ended for that long "
        "[600; 3600 on a CPU]",
    )
    front = parser.add_argument_group("gateway")
    front.add_argument(
        "--gateway",
        action="store_true",
        help="put the gateway in front, on --host and --port; the engine stays on loopback",
    )
    front.add_argument("--gateway-config", type=Path, metavar="FILE", help="its settings")
    front.add_argument(
        "--playground",
        action="store_true",
        help="the gateway with a page at /playground to try the model",
    )
    parser.set_defaults(handler=serve_checkpoint, forwards=True)


def serve_checkpoint(arguments: argparse.Namespace) -> int:
    """Validate the checkpoint, then run the server until SIGTERM or SIGINT."""
    from ep_serve.engine.server.loading import exit_on_signal

    with exit_on_signal():
        _quiet_transformers()
        from ep_serve.engine.server.serve import problems, serve

        if found := problems(Path(arguments.checkpoint)):
            print("\n".join(found), file=sys.stderr)
            return 1
        if arguments.gateway or arguments.playground:
            return _serve_behind_gateway(arguments)
        return serve(arguments, arguments.forwarded)


def _serve_behind_gateway(arguments: argparse.Namespace) -> int:
    from ep_serve.node import serve_with_gateway, split_options

    words = arguments.words[arguments.words.index("serve") + 1 :]
    words.remove(arguments.checkpoint)
    _, words = split_options(words, ["--gateway-config"])
    words = [word for word in words if word not in ("--gateway", "--playground")]
    address, engine_options = split_options(words, ["--host", "--port"])
    config = arguments.gateway_config
    settings = [] if config is None else ["--config", str(config)]
    page = ["--playground"] if arguments.playground else []
    return serve_with_gateway(arguments.checkpoint, engine_options, [*address, *settings, *page])


def add_gateway(groups: Groups) -> None:
    """`ep-serve gateway --upstream URL`."""
    from ep_serve.gateway.command import add_options, run

    parser = groups.add_parser("gateway", help="run the gateway in front of one or many engines")
    add_options(parser)
    parser.set_defaults(handler=run)


def add_train(groups: Groups) -> None:
    """`ep-serve train CHECKPOINT --data FILE --to DIR`."""
    parser = groups.add_parser(
        "train",
        help="train a checkpoint on conversations about media",
        description="Train refiner, score head and decoder of an EchoingPixels checkpoint; the "
        "towers stay as they are. An interrupted training resumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="directory of a checkpoint")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="JSONL of conversations"
    )
    parser.add_argument(
        "--media", type=Path, metavar="DIR", help="where its paths start from [the file's folder]"
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", dest="target", help="directory to make"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for curve and state [DIR of --to with .work]"
    )
    parser.add_argument("--steps", type=int, required=True, help="of the optimizer")
    parser.add_argument("--batch", type=int, default=4, help="conversations in a step")
    parser.add_argument("--rate", type=float, default=1e-5, help="highest learning rate")
    parser.add_argument(
        "--keep-ratios",
        type=float,
        nargs="+",
        default=[1.0, 0.2, 0.1, 0.05],
        help="one is drawn for each conversation; 1 alone trains with all tokens",
    )
    parser.add_argument("--freeze-decoder", action="store_true", help="train only what reduces")
    parser.add_argument(
        "--close-bypass", action="store_true", help="keep refined text from the decoder"
    )
    parser.add_argument("--fps", type=float, default=2.0, help="frames sampled from a second")
    parser.add_argument("--min-pixels", type=int, default=128 * 28 * 28, help="of a video frame")
    parser.add_argument("--max-pixels", type=int, default=768 * 28 * 28, help="of a video frame")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the keep ratios")
    parser.set_defaults(handler=train_checkpoint)


def train_checkpoint(arguments: argparse.Namespace) -> int:
    """Train, then write the trained checkpoint."""
    _quiet_transformers()
    from ep_serve.training.loop.finetune import Plan, finetune, write_checkpoint

    target: Path = arguments.target
    plan = Plan(
        checkpoint=arguments.checkpoint,
        conversations=arguments.data,
        media=arguments.media or arguments.data.parent,
        work=arguments.work or target.with_name(target.name + ".work"),
        steps=arguments.steps,
        batch=arguments.batch,
        rate=arguments.rate,
        keep_ratios=arguments.keep_ratios,
        decoder=not arguments.freeze_decoder,
        close_bypass=arguments.close_bypass,
        fps=arguments.fps,
        video_pixels=(arguments.min_pixels, arguments.max_pixels),
        seed=arguments.seed,
    )
    write_checkpoint(arguments.checkpoint, finetune(plan), target)
    print(f"{target}: trained for {arguments.steps} steps")
    return 0


def add_eval(groups: Groups) -> None:
    """`ep-serve eval make | run | report`."""
    from ep_serve.evaluation.command import add_eval_options

    add_eval_options(groups.add_parser("eval", help="ask a benchmark through the API of servers"))


def add_inspect(groups: Groups) -> None:
    """`ep-serve inspect CLIP --question TEXT --server URL --to PAGE`."""
    from ep_serve.evaluation.command import add_inspect_options

    words = "write a page that shows which tokens of a clip survive"
    add_inspect_options(groups.add_parser("inspect", help=words))


COMMANDS: tuple[Callable[[Groups], None], ...] = (
    add_serve,
    add_gateway,
    add_checkpoint,
    add_train,
    add_eval,
    add_inspect,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code, 0 or 1.

    Errors are one line on stderr. A wrong usage ends the process with exit code 2, as argparse
    does.
    """
    parser = argparse.ArgumentParser(
        prog="ep-serve", description="Audio-visual token reduction inside vLLM."
    )
    groups = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(groups)
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser.parse_known_args(words)
    if unknown and not getattr(arguments, "forwards", False):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.forwarded = unknown
    arguments.words = words
    try:
        code: int = arguments.handler(arguments)
    except (CheckpointError, ServeError, OSError) as error:
        print(f"ep-serve: {error}", file=sys.stderr)
        return 1
    return code

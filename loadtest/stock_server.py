"""Stock vLLM's server without the plugin: `python -m loadtest.stock_server CHECKPOINT ...`.

vLLM's `vllm` command is not used: the command fails because its CPU build has another package name.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    os.environ["VLLM_PLUGINS"] = ""  # an empty name matches no plugin

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="stock_server"))
    arguments = parser.parse_args(sys.argv[1:])
    configure_logging_from_args(arguments)
    command = ServeSubcommand()
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    main()

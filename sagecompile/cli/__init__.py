"""The `sagecompile` command: one file a subcommand.

In: the command line. Out: an exit code: 0, or 2 with one line that says what to type instead; 130 after Ctrl-C, as
shells have it. `--help` loads no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from sagecompile.errors import SageCompileError

from . import bench, calibrate, doctor, explain

COMMANDS = (bench, calibrate, doctor, explain)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(
        prog="sagecompile", description="See what sagecompile does to a model, and what this machine can run."
    )
    parser.add_argument("--version", action="version", version=metadata.version("sagecompile"))
    subparsers = parser.add_subparsers(required=True)
    for command in COMMANDS:
        assert command.__doc__ is not None
        sub = subparsers.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.HELP,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    parsed = parser.parse_args(given[:end])
    parsed.rest = given[end + 1 :]
    try:
        code: int = parsed.run(parsed)
    except SageCompileError as error:
        print(f"sagecompile: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsagecompile: stopped", file=sys.stderr)
        return 130
    return code

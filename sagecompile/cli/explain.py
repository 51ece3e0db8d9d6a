"""Report every attention call of a model: used or kept, and why.

TARGET is one of
  module:factory   a function without arguments that returns (model, inputs): inputs a tuple of positional arguments,
                   a dict of keyword arguments, or one tensor. It is run once under torch.no_grad().
  script.py        a script that uses torch.compile(..., backend="sage_inductor"); it runs as it is, with the
                   arguments that stand after `--`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import runpy
import sys
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagecompile.errors import SageCompileError
from sagecompile.settings import ENVIRONMENT_PREFIX, Settings

if TYPE_CHECKING:
    from sagecompile.report import Report

HELP = "every attention call of a model: used or kept, and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="module:factory or script.py")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write the graphs before and after into DIR")
    parser.add_argument("--policy", help="auto, always or never; a script's own options go before it")
    parser.add_argument(
        "--measure-error",
        action="store_true",
        help="run the rewritten graphs, without Inductor, and show how wrong each used site is on these inputs",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    if arguments.policy is not None:
        Settings(policy=arguments.policy)  # says what it can be, before anything runs
    with ExitStack() as stack:
        if arguments.measure_error:
            from sagecompile.measure import measuring

            stack.enter_context(measuring())
        if arguments.dump:
            from sagecompile.dump import dumping

            if arguments.dump.exists() and not arguments.dump.is_dir():
                raise SageCompileError(f"--dump {arguments.dump} is a file: it needs a folder")
            stack.enter_context(dumping(arguments.dump))
        if arguments.target.endswith(".py"):
            report = _of_script(arguments.target, arguments.rest, arguments.policy)
        else:
            report = _of_factory(arguments.target, arguments.policy)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    if arguments.dump and not arguments.json:
        print(f"graphs before and after: {arguments.dump}/graph_*.py")
    return 0


def _of_factory(target: str, policy: str | None) -> Report:
    import torch

    from sagecompile.backend import explain_with

    module, _, name = target.partition(":")
    if not module or not name:
        raise SageCompileError(f"{target!r} is neither module:factory nor script.py; try my_models:make_model")
    sys.path.insert(0, "")
    try:
        factory = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SageCompileError(f"cannot load {target}: {error}") from error
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise SageCompileError(f"{target} must be a function that can be called without arguments: {error}") from error
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2):
        raise SageCompileError(f"{target}() returned {type(made).__name__}; it must return (model, inputs)")
    model, inputs = made
    positional = () if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    options = {"sage.policy": policy} if policy else {}
    with torch.no_grad():
        return explain_with({"options": options}, model, positional, inputs if isinstance(inputs, dict) else {})


def _of_script(path: str, script_arguments: list[str], policy: str | None) -> Report:
    from torch._dynamo.exc import BackendCompilerFailed

    from sagecompile.report import Report, recording

    if not Path(path).is_file():
        raise SageCompileError(f"no file {path}")
    if policy is not None:
        os.environ[f"{ENVIRONMENT_PREFIX}POLICY"] = policy
    before: tuple[Any, Any] = (sys.argv, sys.path[:])
    sys.argv = [path, *script_arguments]
    sys.path.insert(0, str(Path(path).parent.resolve()))
    try:
        with recording() as reports:
            runpy.run_path(path, run_name="__main__")
    except BackendCompilerFailed as error:  # Dynamo's, around what our backend says of a wrong option
        if isinstance(error.inner_exception, SageCompileError):
            raise error.inner_exception from None
        raise
    finally:
        sys.argv, sys.path[:] = before
    if not reports:
        raise SageCompileError(
            f'{path} compiled nothing with our backend: it needs torch.compile(model, backend="sage_inductor")'
        )
    return sum(reports, start=Report(graphs=0))

"""What the benchmarks share around the timing: the device, how it is timed, the results and where they go.

In: the arguments. Out: a torch.device that is there; results with the machine's facts, written also if a run is cut
short; an optional package, or one line that says what to install; progress, for `calibrate` too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from sagecompile.errors import SageCompileError
from sagecompile.kernels import available

SCHEMA = 2
"""Of --json. 1 had one ratio, against plain SDPA."""


def device_of(arguments: argparse.Namespace) -> torch.device:
    """--device or the default, made the current one."""
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or index == ""):
        raise SageCompileError(f"--device {name}: it is cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise SageCompileError(f"--device {name}: torch sees no CUDA GPU here; `sagecompile doctor` says what there is")
    torch.cuda.set_device(torch.device(name).index or 0)
    return torch.device("cuda", torch.cuda.current_device())


def captures_graphs(arguments: argparse.Namespace, device: torch.device) -> bool:
    """--graph, the default where CUDA graphs are possible, or --eager."""
    if arguments.graph and device.type != "cuda":
        raise SageCompileError(f"--graph: CUDA graphs need a CUDA device, this is {device.type}; leave it out")
    return device.type == "cuda" and arguments.graph is not False


@contextmanager
def results(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The machine's facts and `rows` to fill; goes to --json in any case, and to the last line of the output."""
    found: dict[str, Any] = {"schema": SCHEMA} | machine(device) | {"rows": []}
    try:
        yield found
    finally:
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"device": found["device"], "rows": len(found["rows"])}))


def machine(device: torch.device) -> dict[str, Any]:
    """Device, threads of a CPU, versions, date."""
    found = available.device(str(device))
    return {
        "device": found.name,
        "threads": found.threads,
        "torch": torch.__version__,
        "triton": available.version("triton"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def require(module: str, wanted_by: str) -> Any:
    """An optional package's module."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SageCompileError(f"{wanted_by} needs {package}: pip install {package} ({error})") from error


def progress(what: str, done: int, steps: int, from_before: int = 0) -> None:
    """On stderr, now and then and at the end, in place on a terminal."""
    in_place, every = (True, 10) if sys.stderr.isatty() else (False, max(1, steps // 10))
    if done % every == 0 or done == steps:
        kept = f" ({from_before} from before)" if from_before else ""
        text = f"{what}: {done} of {steps} measurements{kept}"
        end = "" if in_place and done < steps else "\n"
        print(f"\r{text:78}" if in_place else text, end=end, file=sys.stderr, flush=True)

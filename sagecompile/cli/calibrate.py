"""Measure this device on a grid of shapes, and write the profile that `policy=auto` goes by.

In: nothing but the machine. Out: a file in the cache folder, used from then on in place of a shipped profile; with
--share the same on stdout, to become one. What was measured is kept as it is found: a run that was cut short goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from sagecompile.errors import SageCompileError
from sagecompile.site import Prologue

if TYPE_CHECKING:
    import torch

    from sagecompile.cost.profile import Family, Time
    from sagecompile.site import AttentionSite

HELP = "measure this device, for policy=auto"


@dataclass(frozen=True)
class Grid:
    """Every combination whose calls have at most `flops`."""

    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    heads: tuple[int, ...]
    """Of all sequences."""
    lengths: tuple[int, ...]
    """Round ones, and others between them."""
    fused_dtypes: tuple[str, ...]
    """That are measured with a QK-norm and RoPE in front as well."""
    flops: float
    turns: int
    """How often all of it is measured. The fastest counts: what else runs on a CPU only slows, and not for long."""
    budget_s: float
    """Of timing for one shape, about; at least three runs of each alternative."""


GRIDS = {
    "cpu": Grid(
        dtypes=("float32", "bfloat16"),
        head_dims=(32, 64, 96, 128),
        heads=(2, 6, 16, 48),
        lengths=(
            *(16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
            *(9, 23, 29, 34, 46, 50, 61, 66, 94, 125, 130, 189, 194, 253, 258, 361, 509, 514, 725, 1449, 2897),
        ),
        fused_dtypes=(),
        flops=2e9,
        turns=4,
        budget_s=0.005,
    ),
    "cuda": Grid(
        dtypes=("bfloat16",),
        head_dims=(64, 96, 128),
        heads=(4, 16, 64, 256),
        lengths=(512, 725, 1024, 1449, 2048, 2897, 4096, 5793, 8192, 11585, 16384, 23170, 32768),
        fused_dtypes=("bfloat16",),
        flops=1e13,
        turns=1,
        budget_s=0.025,
    ),
}


FUSED = (Prologue(norm=True, weight="bfloat16", rope="interleaved", table="float32"),) * 2
"""The one that stands for all: it reads the largest tables."""
COPIES_OF = tuple((norm, rope) for rope in ("half", "interleaved") for norm in (False, True))
COMPILED = 2
"""How often Inductor compiles each. The faster counts: now and then its choice among its own kernels is a bad one."""
COPIED = 8192, 32, 128
"""Tokens, heads, head_dim."""
HEADS = 16
"""Of one sequence at most, as models have them; more are of several."""
LAUNCHES_EVERY = 10
"""Shapes: a launch takes as long at any."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--share", action="store_true", help="print the profile as well, for a pull request")
    parser.add_argument(
        "--again", action="store_true", help="forget first what was measured here before, also while compiling"
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from sagecompile import cost
    from sagecompile.cost.profile import Point, to_json

    from .bench.session import device_of, machine

    device = device_of(arguments)
    facts = machine(device)
    with torch.no_grad():
        measured = _measure(str(device), arguments.again)
        copies = _copies(device) if any(site.prologues for site, _ in measured) else {}
    if not measured:
        raise SageCompileError(f"{facts['device']}: no kernel runs here; `sagecompile doctor` says why")
    points = [
        Point(_family(site), site.batch * site.heads, site.q_len, {name: time.device for name, time in times.items()})
        for site, times in measured
    ]
    text = render(to_json(facts, points, _launches(measured), copies))
    file = cost.own_profiles() / f"{''.join(c if c.isalnum() else '_' for c in facts['device'].lower())}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise SageCompileError(f"cannot write {file}: {error.strerror}; --share prints the profile") from error
    finally:
        if arguments.share:
            print(text, end="")
    print(f"{len(points)} shapes of {facts['device']} in {file}: policy=auto uses them from now on", file=sys.stderr)
    return 0


def _measure(device: str, again: bool) -> list[tuple[AttentionSite, dict[str, Time]]]:
    """Every point of the device's grid that a kernel can run, with progress on stderr."""
    import torch

    from sagecompile import ops
    from sagecompile.backend import measurements
    from sagecompile.cost import store
    from sagecompile.cost.local import race
    from sagecompile.cost.profile import Time, fastest
    from sagecompile.formats import fuses
    from sagecompile.kernels import available

    from .bench.shapes import Shape

    if again:
        store.forget()
    grid = GRIDS[device.partition(":")[0]]
    local = measurements(device, cuda_graphs=False)
    shapes = (
        Shape(dtype, head_dim, is_causal, length, batch=-(-heads // HEADS), heads=min(heads, HEADS))
        for dtype, head_dim, is_causal, heads, length in product(
            grid.dtypes, grid.head_dims, (False, True), grid.heads, grid.lengths
        )
    )
    plain = [shape.site(torch.device(device)) for shape in shapes if shape.flops <= grid.flops]
    fused = [replace(site, prologues=FUSED) for site in plain if site.dtype in grid.fused_dtypes]
    able = [(site, available.runners(site)) for site in plain + fused]
    sites = [
        (site, runners)
        for site, runners in able
        if runners and (not site.prologues or any(fuses(runner, site.head_dim) for runner in runners))
    ]
    times: list[dict[str, Time]] = [{} for _ in sites]
    for turn, (which, (site, runners)) in product(range(grid.turns), enumerate(sites)):
        done = turn * len(sites) + which
        if done % 10 == 0:
            total = f"{done} of {grid.turns * len(sites)}"
            print(f"\rcalibrating {available.device(device).name}: {total} shapes", end="", file=sys.stderr)
        key = {"calibration": turn, "runners": [" ".join(runner) for runner in runners]} | local.key(site)
        found = store.recall(key)
        if found is None:
            try:
                found = dict(race(site, runners, ops, grid.budget_s, launches=which % LAUNCHES_EVERY == 0))
            except (torch.OutOfMemoryError, MemoryError):
                print(f"\n{site.shape} left out: no memory", file=sys.stderr)
                continue
            store.remember(key, found)
        times[which] = fastest(times[which], {name: Time(*time) for name, time in found.items()})
    print(f"\rcalibrated: {len(sites)} shapes{' ' * 40}", file=sys.stderr)
    return [(site, measured) for (site, _), measured in zip(sites, times, strict=True) if measured]


def _copies(device: torch.device) -> dict[str, float]:
    """By a prologue's kind, what Inductor's kernel for q and k takes, in copies of them; the least is 1."""
    import torch
    from torch._inductor.utils import fresh_cache

    from sagecompile.cost.timer import interleaved_times

    from .bench.block import Block, angles
    from .bench.compiled import compiled_apart

    tokens, heads, head_dim = COPIED
    dtype = torch.bfloat16
    q, k = (torch.randn((1, tokens, heads, head_dim), device=device, dtype=dtype) for _ in range(2))
    found = {}
    for norm, rope in COPIES_OF:
        made = Block(head_dim, rope, is_causal=False, norm=norm).to(device, dtype).prologues
        inputs = {"q": q, "k": k} | angles(tokens, head_dim, rope, dtype, device)
        calls: dict[str, Callable[[], object]] = {"copy": lambda: (q.clone(), k.clone())}
        for i in range(COMPILED):
            calls[str(i)] = compiled_apart(made, inputs, {})
            with fresh_cache():
                calls[str(i)]()
        copy, *compiled = (time.device for time in interleaved_times(calls, device.type, 0.05, launches=False).values())
        found[Prologue(norm=norm, rope=rope).kind] = max(1.0, min(compiled) / copy)
    return found


def _family(site: AttentionSite) -> Family:
    from sagecompile.cost.profile import Family

    return Family(site.dtype, site.head_dim, site.is_causal, site.prologues is not None)


def _launches(measured: Iterable[tuple[AttentionSite, Mapping[str, Time]]]) -> dict[str, float]:
    """Median microseconds of the host by name, which no shape changes; nothing where there are none."""
    from sagecompile.cost.profile import launched

    found: dict[str, list[float]] = {}
    for site, times in measured:
        for name, time in times.items():
            if time.launch > 0:
                found.setdefault(launched(name, _family(site).fused), []).append(time.launch)
    return {name: statistics.median(us) for name, us in sorted(found.items())}


def render(profile: dict[str, Any]) -> str:
    """JSON with one shape a line, so that a new measurement can be read as a diff."""
    head = json.dumps({key: value for key, value in profile.items() if key != "points"}, indent=1)
    groups, next_group = [], ",\n  "
    for group in profile["points"]:
        facts = json.dumps({key: value for key, value in group.items() if key != "heads_length_us"})
        rows = ",\n   ".join(json.dumps(row) for row in group["heads_length_us"])
        groups.append(f'{facts[:-1]}, "heads_length_us": [\n   {rows}\n  ]}}')
    return f'{head[:-2]},\n "points": [\n  {next_group.join(groups)}\n ]\n}}\n'

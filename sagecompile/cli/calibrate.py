"""Measure this device on a grid of shapes, and write the profile that `policy=auto` goes by.

In: nothing but the machine. Out: a file in the cache folder, used from then on in place of a shipped profile; with
--share the same on stdout, to become one. What was measured is kept as it is found: a run that was cut short goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product, starmap
from typing import TYPE_CHECKING, Any

from sagecompile.errors import SageCompileError
from sagecompile.site import Prologue

if TYPE_CHECKING:
    import torch

    from sagecompile.cost import Alternative
    from sagecompile.cost.profile import Family, Time
    from sagecompile.cost.prologues import PrologueCosts
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
    """Round ones, and others between them: on a CPU little and much beyond them, as cost/profile.py has it."""
    flops: float
    turns: int
    """How often all of it is measured, for the mean: what else runs on a CPU comes and goes."""
    budget_s: float
    """Of timing for one shape, about; at least three runs of each alternative."""


GRIDS = {
    "cpu": Grid(
        dtypes=("float32", "bfloat16"),
        head_dims=(32, 64, 96, 128),
        heads=(2, 6, 16, 48),
        lengths=(
            *(16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
            *(18, 34, 50, 66, 130, 194, 258, 514, 1026, 2050),
            *(13, 29, 45, 61, 93, 125, 189, 253, 509, 1021, 2045),
        ),
        flops=2e9,
        turns=4,
        budget_s=0.005,
    ),
    "cuda": Grid(
        dtypes=("bfloat16",),
        head_dims=(64, 96, 128),
        heads=(4, 16, 64, 256),
        lengths=(512, 725, 1024, 1449, 2048, 2897, 4096, 5793, 8192, 11585, 16384, 23170, 32768),
        flops=1e13,
        turns=1,
        budget_s=0.025,
    ),
}


PROLOGUES = tuple(
    Prologue(norm, "bfloat16" if norm else None, rope, table)
    for rope, table in (("half", "bfloat16"), ("interleaved", "float32"))
    for norm in (False, True)
)
"""Of q and of k, as Llama, Qwen, and Flux with and without its norm have them."""
MADE = ((16, 512), (64, 512), (64, 2048), (256, 2048))
"""Heads and tokens that these are measured at: from where launches are all that counts to where only bytes do, but not
so long that attention hides what they take."""
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

    from sagecompile import cost, files
    from sagecompile.cost.profile import Point, launches_us, to_json

    from .bench.session import device_of, machine

    device = device_of(arguments)
    facts = machine(device) | cost.versions()
    file = files.folder("profiles") / f"{''.join(c if c.isalnum() else '_' for c in facts['device'].lower())}.json"
    why_not_kept = files.why_not_kept("profiles")  # before the minutes that it takes
    if why_not_kept and not arguments.share:
        raise SageCompileError(f"{why_not_kept}, or --share to have the profile printed alone")
    try:
        with torch.no_grad():
            measured = _measure(str(device), arguments.again)
            prologues = _prologues(device, measured)
    except KeyboardInterrupt:
        print("\nsagecompile: stopped; run it again, it goes on where it was", file=sys.stderr)
        return 130
    points = [
        Point(_family(site), site.batch * site.heads, site.q_len, {name: time.device for name, time in times.items()})
        for site, times in measured.items()
        if site.prologues is None
    ]
    if not points:
        raise SageCompileError(f"{facts['device']}: no kernel runs here; `sagecompile doctor` says why")
    launches = launches_us((site.prologues is not None, times) for site, times in measured.items())
    text = render(to_json(facts, points, launches, prologues))
    if arguments.share:
        print(text, end="")
    if why_not_kept:
        return 0
    try:
        files.write(file, text.encode())
    except OSError as error:
        raise SageCompileError(f"cannot write {file}: {error.strerror}; --share prints the profile") from error
    print(f"{len(points)} shapes of {facts['device']} in {file}: policy=auto uses them from now on", file=sys.stderr)
    return 0


def _measure(device: str, again: bool) -> dict[AttentionSite, dict[str, Time]]:
    """All of `_sites`, with progress on stderr, and whether others were at work."""
    import torch

    from sagecompile import ops
    from sagecompile.backend import measurements
    from sagecompile.cost import store
    from sagecompile.cost.profile import Time, averaged
    from sagecompile.cost.race import race
    from sagecompile.cost.timer import MOST_WAITED, waited_s
    from sagecompile.kernels import available

    from .bench.session import progress

    if again:
        store.forget()
    grid, local = GRIDS[device.partition(":")[0]], measurements(device, cuda_graphs=False)
    sites = _sites(device, grid)
    name, steps, from_before = available.device(device).name, grid.turns * len(sites), 0
    races: list[list[dict[str, Time]]] = [[] for _ in sites]
    begun, waited = time.perf_counter(), waited_s()
    for done, (turn, which) in enumerate(product(range(grid.turns), range(len(sites)))):
        progress(f"calibrating {name}", done, steps, from_before)
        one, runners = sites[which]
        key = {"calibration": turn, "runners": [" ".join(runner) for runner in runners]} | local.key(one)
        found = store.recall(key, lambda found: {name: Time.read(us) for name, us in found.items()})
        if found is None:
            try:
                launches = None if which % LAUNCHES_EVERY == 0 or one.prologues is not None else ()
                found = dict(race(one, runners, ops, grid.budget_s, launches))
            except (torch.OutOfMemoryError, MemoryError):
                print(f"\n{one.shape} left out: no memory", file=sys.stderr)
                continue
            store.remember(key, found)
        else:
            from_before += 1
        races[which].append(found)
    waited = (waited_s() - waited) / (time.perf_counter() - begun)
    progress(f"calibrating {name}", steps, steps, from_before)
    if device == "cpu" and waited > MOST_WAITED:
        print(f"others were at work on this CPU {waited:.0%} of the time: --again, once they are done", file=sys.stderr)
    return {one: averaged(raced) for (one, _), raced in zip(sites, races, strict=True) if raced}


def _sites(device: str, grid: Grid) -> list[tuple[AttentionSite, list[Alternative]]]:
    """Every point of the grid that kernels can run, and what they may fuse; with those kernels."""
    import torch

    from sagecompile.formats import fuses
    from sagecompile.kernels import available

    from .bench.shapes import Shape

    def site(dtype: str, head_dim: int, is_causal: bool, heads: int, length: int) -> AttentionSite:
        shape = Shape(dtype, head_dim, is_causal, length, batch=-(-heads // HEADS), heads=min(heads, HEADS))
        return shape.site(torch.device(device))

    shapes = starmap(site, product(grid.dtypes, grid.head_dims, (False, True), grid.heads, grid.lengths))
    able = {one: available.runners(one) for one in shapes if one.flops <= grid.flops}
    for dtype, head_dim, made_at in product(grid.dtypes, grid.head_dims, MADE):
        plain = site(dtype, head_dim, False, *made_at)
        runners = available.runners(plain)
        if fusing := [runner for runner in runners if fuses(runner, head_dim)]:
            able |= {plain: runners} | {replace(plain, prologues=(made, made)): fusing for made in PROLOGUES}
    return [(one, runners) for one, runners in able.items() if runners]


def _prologues(device: torch.device, measured: Mapping[AttentionSite, Mapping[str, Time]]) -> PrologueCosts:
    """Of the kernels what was measured with prologues, less the same without; of Inductor the copies that it takes."""
    from sagecompile.cost.prologues import COPY, SDPA, PrologueCosts

    from .bench.prologues import copy_us

    copied_us = cache(partial(copy_us, device))
    copies = _by_inductor(device) if any(site.prologues for site in measured) else {}
    found: dict[tuple[str, int], dict[str, list[tuple[int, float]]]] = {}
    for site, times in measured.items():
        plain = measured.get(replace(site, prologues=None))
        if site.prologues is None or plain is None:
            continue
        kind, size = site.prologues[0].kind, site.batch * site.heads * site.q_len
        size_bytes = 2 * size * site.head_dim
        added = {name: max(0.01, time.device - plain[name].device) for name, time in times.items()}
        added[COPY] = 2 * copied_us(size_bytes)
        added[SDPA] = 2 * copied_us(int(copies[kind] * size_bytes))
        for name, us in added.items():
            found.setdefault((kind, site.head_dim), {}).setdefault(name, []).append((size, us))
    return PrologueCosts(
        {key: {name: tuple(sorted(sizes)) for name, sizes in by_name.items()} for key, by_name in found.items()}
    )


def _by_inductor(device: torch.device) -> dict[str, float]:
    """How many copies of q and k each kind of prologue takes where only bytes count, of the widest heads."""
    from sagecompile.backend import measurements
    from sagecompile.cost import store

    from .bench.prologues import copies_by_inductor

    found = {}
    for made in PROLOGUES:
        print(f"calibrating Inductor's {made.kind}", file=sys.stderr)
        key = {"calibration": made.kind} | dict(measurements(str(device), cuda_graphs=False).machine)
        copies = store.recall(key, lambda known: store.positive(known["copies"]))
        if copies is None:
            copies = copies_by_inductor(device, made, *MADE[-1], max(GRIDS[device.type].head_dims))
            store.remember(key, {"copies": copies})
        found[made.kind] = copies
    return found


def _family(site: AttentionSite) -> Family:
    from sagecompile.cost.profile import Family

    return Family(site.dtype, site.head_dim, site.mask.is_causal)


def render(profile: dict[str, Any]) -> str:
    """JSON with one shape a line, so that a new measurement can be read as a diff."""
    parts = [f'"{key}": {json.dumps(value)}' for key, value in profile.items() if key not in ("prologues", "points")]
    parts.append(f'"prologues": {_lines(map(json.dumps, profile["prologues"]), " ")}')
    groups = []
    for group in profile["points"]:
        facts = json.dumps({key: value for key, value in group.items() if key != "heads_length_us"})
        rows = _lines(map(json.dumps, group["heads_length_us"]), "  ")
        groups.append(f'{facts[:-1]}, "heads_length_us": {rows}}}')
    parts.append(f'"points": {_lines(groups, " ")}')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def _lines(items: Iterable[str], indent: str) -> str:
    """A JSON list with each item on a line of its own."""
    text = f",\n{indent} ".join(items)
    return f"[\n{indent} {text}\n{indent}]" if text else "[]"

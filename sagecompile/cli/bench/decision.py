"""How good the decision is: random shapes that no profile holds, decided as `policy=auto` does, then measured.

In: how many shapes, a seed. Out: a row a shape: what was chosen, the times of all, the regret (the chosen time over the
best, less one), the predicted speed-up against the measured one; and what they come to together. Launches count as a
quiet host does them: no shape changes what they take, but the moments of a run do, at times to twice as much.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sagecompile import backend, ops
from sagecompile.cost import Alternative, beyond_a_copy_us
from sagecompile.cost.profile import Time, averaged, launched, launches_us, without_stalls
from sagecompile.cost.race import race
from sagecompile.decide import Decision, Use
from sagecompile.formats import fuses
from sagecompile.kernels import available
from sagecompile.settings import Settings
from sagecompile.site import AttentionSite, Prologue

from ..calibrate import PROLOGUES
from .measure import or_left_out
from .session import captures_graphs, device_of, progress, require, results
from .shapes import Shape

BUDGET_S = {"cpu": 0.2, "cuda": 0.1}
"""Of measuring one shape, about."""
TIMES = f"{'us':>9} {'best':>9} {'regret':>7} predicted   seen"
HEADER = f"{'shape':22} {'dtype':8} causal {'chosen':26} {TIMES} prologue"
TURNS = {"cpu": 8, "cuda": 1}
"""In so many parts, with all other shapes in between."""
CLOSE = 0.03
"""Two times that differ by less are taken for equal: either choice is right."""


@dataclass(frozen=True)
class Shapes:
    """What random shapes are drawn from."""

    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    batches: tuple[int, int]
    heads: tuple[int, ...]
    lengths: tuple[int, int]
    flops: float
    """Of a call at most, which keeps a run to a minute or two."""
    prologues: tuple[Prologue | None, ...] = (None,)
    """Of q and k alike."""


DRAWN = {
    "cpu": Shapes(("float32", "bfloat16"), (32, 64, 96, 128), (1, 8), (2, 4, 8, 12, 16), (17, 4000), 3e10),
    "cuda": Shapes(
        ("bfloat16", "float16"),
        (64, 96, 128),
        (1, 32),
        (8, 12, 16, 24, 32),
        (100, 40000),
        1e13,
        (None, None, *PROLOGUES),
    ),
}


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments)
    if arguments.plot:
        require("matplotlib", "--plot")
    graph = captures_graphs(arguments, device)
    device_name = available.device(str(device)).name
    decision = backend.decider(Settings(measure=arguments.measure), graph)
    with results(arguments, device) as found, torch.no_grad():
        found["cuda_graphs"] = graph
        sites = list(draw(str(device), arguments.shapes, arguments.seed))
        decided = {site: decision(site) for site in sites}
        races: dict[AttentionSite, list[dict[str, Time]]] = {}
        try:
            _measure(sites, device.type, device_name, races)
        finally:
            measured = {site: averaged(raced) for site, raced in races.items()}
            stalls = sum(len(raced) - len(without_stalls(raced)) for raced in races.values())
            found["launch_us"] = launches_us((site.prologues is not None, times) for site, times in measured.items())
            print(HEADER)
            for site, raced in measured.items():
                times = {name: _at_any_time(time, name, site, found["launch_us"]) for name, time in raced.items()}
                found["rows"].append(row := judge(site, decided[site], times, graph))
                print(_render(row))
        found["summary"] = summary(found["rows"]) | {"races left out, as one call stood still": stalls}
        for name, value in found["summary"].items():
            print(f"{name:52} {value}")
    if arguments.plot:
        plot(found["rows"], found["device"], arguments.plot)
    return 0


def _measure(
    sites: Sequence[AttentionSite],
    device_type: str,
    device_name: str,
    found: dict[AttentionSite, list[dict[str, Time]]],
) -> None:
    """Into `found` the turns of each; a site that cannot run is said and left out."""
    turns = TURNS[device_type]
    runners = {site: available.runners(site) for site in sites}
    for done, (_, site) in enumerate(product(range(turns), sites)):
        progress(f"measuring on {device_name}", done, turns * len(sites))
        with or_left_out(site.shape):
            raced = race(site, runners[site], ops, BUDGET_S[device_type] / turns)
            found.setdefault(site, []).append(_with_prologues(site, runners[site], raced, device_name))
    progress(f"measuring on {device_name}", turns * len(sites), turns * len(sites))


def _at_any_time(time: Time, name: str, site: AttentionSite, launches: Mapping[str, float]) -> Time:
    """With the launch that all shapes had, not the one of the moment when this one was measured."""
    return time._replace(launch=launches.get(launched(name, site.prologues is not None), 0.0))


def _with_prologues(
    site: AttentionSite, runners: Sequence[Alternative], raced: Mapping[str, Time], device_name: str
) -> dict[str, Time]:
    """What Inductor takes for them beyond the copy that was raced is the profile's here too; `bench block` times it."""
    more = beyond_a_copy_us(site, site.batch * site.heads, device_name)
    fused = {" ".join(runner) for runner in runners if fuses(runner, site.head_dim)}
    return {name: time if name in fused else time._replace(device=time.device + more) for name, time in raced.items()}


def draw(device: str, count: int, seed: int) -> Iterator[AttentionSite]:
    """Attention of random sizes, all different, lengths as likely short as long.

    In one of three queries share KV heads; of the others half of those neither causal nor behind prologues are
    cross-attention, to keys of another number.
    """
    numbers, drawn, before = random.Random(seed), DRAWN[device.partition(":")[0]], set[AttentionSite]()
    while count:
        low, high = drawn.lengths
        length = round(low * (high / low) ** numbers.random())
        head_dim, heads = numbers.choice(drawn.head_dims), numbers.choice(drawn.heads)
        batch = round(drawn.batches[0] * (drawn.batches[1] / drawn.batches[0]) ** numbers.random())
        dtype, is_causal = numbers.choice(drawn.dtypes), numbers.random() < 0.5
        shape = Shape(dtype, head_dim, is_causal, length, batch, heads)
        made = numbers.choice(drawn.prologues)
        site = replace(shape.site(torch.device(device)), prologues=made and (made, made))
        if numbers.random() < 1 / 3:
            site = replace(site, kv_heads=max(1, heads // 4))
        elif not is_causal and made is None and numbers.random() < 1 / 2:
            site = replace(site, kv_len=numbers.choice((77, 256, 2 * length)))
        if site.flops <= drawn.flops and site not in before:
            before.add(site)
            yield site
            count -= 1


def judge(site: AttentionSite, decision: Decision, raced: Mapping[str, Time], cuda_graphs: bool) -> dict[str, Any]:
    """One site: what was decided, and what was measured after that."""
    times = {name: time.us(cuda_graphs) for name, time in raced.items()}
    chosen = f"{decision.format} {decision.provider}" if isinstance(decision, Use) else "sdpa"
    best = min(times, key=times.__getitem__)
    other = min((us for name, us in times.items() if name != "sdpa"), default=times["sdpa"])
    predicted = decision.prediction.speedup if isinstance(decision, Use) and decision.prediction else None
    return {
        "shape": site.shape,
        "dtype": site.dtype,
        "is_causal": site.mask.is_causal,
        "prologue": site.prologues[0].kind if site.prologues else "",
        "us": times,
        "chosen": chosen,
        "best": best,
        "regret": times[chosen] / times[best] - 1,
        "clear": max(times["sdpa"], other) / min(times["sdpa"], other) > 1 + CLOSE,
        "predicted": predicted,
        "measured": times["sdpa"] / times[chosen] if predicted else None,
        "reason": decision.reason,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all shapes; a figure of no shapes is None."""
    regrets = sorted(row["regret"] for row in rows)
    clear = [row for row in rows if row["clear"]]
    right = [row for row in clear if row["regret"] <= CLOSE]
    ratios = [row["predicted"] / row["measured"] for row in rows if row["predicted"]]
    near = [ratio for ratio in ratios if 1 / 1.15 <= ratio <= 1.15]
    if not rows:
        return {"shapes": 0}
    return {
        "shapes": len(rows),
        "regret, median": f"{statistics.median(regrets):.1%}",
        "regret, 95th percentile": f"{regrets[min(len(regrets) - 1, int(0.95 * len(regrets)))]:.1%}",
        "regret, worst": f"{regrets[-1]:.1%}",
        f"right where times differ by more than {CLOSE:.0%}": f"{len(right)} of {len(clear)}",
        "predicted within 15% of measured, of those used": f"{len(near)} of {len(ratios)}",
    }


def _render(row: dict[str, Any]) -> str:
    predicted = f"{row['predicted']:9.2f} {row['measured']:6.2f}" if row["predicted"] else f"{'':9} {'':6}"
    times = f"{row['us'][row['chosen']]:9.1f} {row['us'][row['best']]:9.1f} {row['regret']:7.1%}"
    causal = "yes" if row["is_causal"] else "no"
    return f"{row['shape']:22} {row['dtype']:8} {causal:6} {row['chosen']:26} {times} {predicted:16} {row['prologue']}"


def plot(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Predicted against measured speed-up, and the regrets in order."""
    figure = require("matplotlib.figure", "--plot").Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(f"decisions on {device}: {len(rows)} shapes that no profile holds")
    left, right = figure.subplots(1, 2)
    used = [row for row in rows if row["predicted"]]
    left.scatter([row["measured"] for row in used], [row["predicted"] for row in used], s=9)
    top = max([1.0, *(row["measured"] for row in used), *(row["predicted"] for row in used)])
    left.plot([0, top], [0, top], color="gray", linewidth=0.8)
    left.set_xlabel("measured speed-up")
    left.set_ylabel("predicted speed-up")
    right.plot(sorted(100 * row["regret"] for row in rows), marker=".", linestyle="none")
    right.set_xlabel("shapes, by regret")
    right.set_ylabel("regret, %")
    figure.savefig(path)

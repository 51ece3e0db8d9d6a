"""How many rows each site has computed exactly so far, and which sites lose by that what they were chosen for.

In: the used sites of compiled graphs, each with what was predicted of it, and what the kernels count as they run. Out:
`exact_rows()`; and where exact rows take the time that a site was to save, a line in the log and a file by which the
next compilation keeps it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from sagecompile.cost.local import Local, remember_loss
from sagecompile.decide import Use
from sagecompile.kernels import counts
from sagecompile.kernels.counts import Counts
from sagecompile.report import Report

logger = logging.getLogger("sagecompile")

COST = {"cpu": 1.0, "cuda": 2.0}
"""Of computing a row exactly, in units of what SDPA takes for it: on an H200 our exact kernel takes 1.7 to 2.6."""
ENOUGH_CALLS = 20


class _Used(NamedTuple):
    """A site that was chosen for a speed-up, without its symbols, which would keep their graph."""

    label: str
    device_type: str
    speedup: float
    key: Mapping[str, Any]


_used: dict[str, _Used] = {}
"""By key."""
os.register_at_fork(after_in_child=_used.clear)


def exact_rows() -> dict[str, Counts]:
    """By the name of each site that ran in this process: (calls, rows, exact rows), of all devices together.

    It waits for the devices. Replays of CUDA graphs count. Sites of the same name are added up; what `sageattention`
    runs is not counted.
    """
    counted = counts.read(wait=True).items()
    return counts.added_up((label.partition("\t")[0], one) for label, one in counted)


def watch(report: Report, local: Callable[[str], Local]) -> None:
    """Have `look` judge the report's used sites from now on; `local`: what this machine says of a device."""
    _look_at_exit()
    for entry in report.used:
        site, use = entry.site, entry.decision
        if isinstance(use, Use) and use.prediction is not None:
            key = local(site.device).key_of_loss(site)
            _used[json.dumps(key, sort_keys=True)] = _Used(site.label, site.device_type, use.prediction.speedup, key)


def look() -> None:
    """Log and remember each site that has lost its win, once. It waits for nothing that runs, and never raises."""
    try:
        if _used and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            _look(counts.read())
    except Exception as error:  # whatever a device raises, at the end of a process too: nobody waits for this
        logger.debug("exact rows could not be read: %r", error)


def _look(counted: Mapping[str, Counts]) -> None:
    for key, used in list(_used.items()):
        calls, rows, exact = counted.get(used.label, Counts())
        if calls < ENOUGH_CALLS or used.speedup <= 1 or exact * COST[used.device_type] <= rows * (1 - 1 / used.speedup):
            continue
        del _used[key]
        remember_loss(used.key, exact / rows)
        name, _, shape = used.label.split("\t")
        logger.warning(
            "%s (%s): %.0f%% of its rows were computed exactly, which takes more time than the %.2fx saves that it was "
            "chosen for. Nothing to do: it is kept from the next compilation on, until `sagecompile calibrate --again` "
            "forgets that",
            name,
            shape,
            100 * exact / rows,
            used.speedup,
        )


@cache
def _look_at_exit() -> None:
    atexit.register(look)

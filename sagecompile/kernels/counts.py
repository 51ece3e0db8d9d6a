"""How many rows of results were computed exactly at each site of this process, as the kernels themselves count them.

In: calls of the ops, each with its site's name; one without a name is not counted. Out: `Counts` by name. Nothing here
asks a device or waits for one while the ops run: on a GPU a kernel adds to memory whose address stays the same, so that
replays of CUDA graphs count too. A C++ library has a table of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes


class Counts(NamedTuple):
    """Of a site."""

    calls: int = 0
    rows: int = 0
    """Of the output: B * H * Nq of each call."""
    exact: int = 0
    """Those of them that 8 bits do not hold, or that share a tile with such a one."""

    def plus(self, other: Counts) -> Counts:
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))


MOST_SITES = 4096
"""Of a device; those beyond are not counted."""
of_libraries: dict[str, Callable[[], dict[str, Counts]]] = {}
"""The tables of C++ libraries, by path."""

_lock = threading.Lock()
_slots: dict[torch.device, dict[str, torch.Tensor]] = {}
"""By site; the first one, of no name, is not read."""
_buffers: dict[torch.device, torch.Tensor] = {}
"""(MOST_SITES, 4) int64 of each device: a slot takes 32 bytes."""


def slot(device: torch.device, site: str) -> torch.Tensor:
    """Where a kernel on this device adds to the calls, the rows and the exact rows of a site: (3) int64."""
    found = _slots.get(device, {}).get(site)
    if found is not None:
        return found
    with _lock, _disable_current_modes(), torch.inference_mode(False):
        if device not in _slots:
            _buffers[device] = _zeros(device)
            _slots[device] = {"": _buffers[device][0, :3]}
        slots = _slots[device]
        if site not in slots and len(slots) == MOST_SITES:
            return slots[""]
        return slots.setdefault(site, _buffers[device][len(slots), :3])


def _zeros(device: torch.device) -> torch.Tensor:
    """On a GPU on a stream of its own: the current one's new memory may be that of CUDA graphs, which warm up on it.

    A first call is never captured, as no kernel can be loaded then.
    """
    if device.type != "cuda":
        return torch.zeros((MOST_SITES, 4), dtype=torch.int64, device=device)
    current, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    with torch.cuda.stream(own):
        made = torch.zeros((MOST_SITES, 4), dtype=torch.int64, device=device)
    current.wait_stream(own)
    return made


def add(exact: torch.Tensor, site: str) -> None:
    """One call on the device of `exact` (B, H, Nq), which says of each row whether it is exact."""
    if site:
        to = slot(exact.device, site)
        with _lock:
            for number, more in zip(to, (1, exact.numel(), exact.sum()), strict=True):
                number.add_(more)


def read(*, wait: bool = False) -> dict[str, Counts]:
    """By site, all devices together. `wait`: for what runs on them; else it is what they have counted by now."""
    tables = [library() for library in list(of_libraries.values())]
    with _lock:
        devices = {device: list(slots) for device, slots in _slots.items()}
    tables += [_read(device, sites, wait) for device, sites in devices.items()]
    return added_up(item for table in tables for item in table.items())


def added_up(counted: Iterable[tuple[str, Counts]]) -> dict[str, Counts]:
    """Those of the same name together."""
    found: dict[str, Counts] = {}
    for name, one in counted:
        found[name] = one.plus(found.get(name, Counts()))
    return found


def _read(device: torch.device, sites: list[str], wait: bool) -> dict[str, Counts]:
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    # A stream of its own waits for none of those on which something runs.
    apart = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    with apart, _disable_current_modes(), torch.inference_mode(False):
        rows = _buffers[device][: len(sites), :3].cpu().tolist()
    return {site: Counts(*row) for site, row in zip(sites, rows, strict=True) if site and row[0]}


def _after_fork() -> None:
    """A child has no devices of its parent's, and none of its threads."""
    global _lock
    _lock = threading.Lock()
    _slots.clear()
    _buffers.clear()


os.register_at_fork(after_in_child=_after_fork)

"""How far the attention of rewritten graphs is from exact, on what the graphs are run on.

In: a rewritten graph's report, and its nodes that call our ops. Out: the same report with a `Measured` for every used
site, filled in whenever the graph runs: each of those nodes calls its op as before, then computes the same attention
in float64, a KV head at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from sagecompile.decide import Use
from sagecompile.kernels import counts
from sagecompile.kernels.call import Call
from sagecompile.kernels.prologue import Prologue
from sagecompile.kernels.sdpa import sdpa
from sagecompile.ops import reference
from sagecompile.report import Measured, Report

MAX_SCORES = 1 << 24
"""Held at a time (128 MiB in float64)."""

_asked: ContextVar[bool] = ContextVar("sagecompile_measure", default=False)


@contextmanager
def measuring(asked: bool = True) -> Iterator[None]:
    """Whether graphs that are compiled inside the `with` measure their errors; Inductor does not compile those."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def is_asked() -> bool:
    """Whether the graph that is being compiled should measure its errors."""
    return _asked.get()


def watch(report: Report, nodes: Sequence[Node]) -> Report:
    """Make the nodes, one for each used site of the report in its order, fill in what the returned report has."""
    ops = iter(nodes)
    entries = []
    for entry in report.entries:
        if isinstance(entry.decision, Use):
            measured, node = Measured(), next(ops)
            node.target = _watched(node.target, measured)  # type: ignore[arg-type]
            entry = replace(entry, measured=measured)
        entries.append(entry)
    for module in {node.graph.owning_module for node in nodes}:
        assert module is not None
        module.recompile()
    return replace(report, entries=tuple(entries))


def _watched(op: Callable[..., torch.Tensor], measured: Measured) -> Callable[..., torch.Tensor]:
    """The op, which adds to `measured` at every call."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *of_prologues: torch.Tensor | None, **how: Any
    ) -> torch.Tensor:
        calls_before, _, exact_before = counts.read(wait=True).get(how["site"], counts.Counts())
        out = op(q, k, v, *of_prologues, **how)
        if out.numel() == 0 or k.shape[2] == 0:
            return out
        calls, _, exact = counts.read(wait=True).get(how["site"], counts.Counts())
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            scale = how["scale"] if how["scale"] is not None else q.shape[3] ** -0.5
            seen = {name: how.get(name) for name in ("behind", "low", "high", "mask")}
            call = Call(q, k, v, scale, how["ahead"], **seen)
            if of_prologues:
                q_weight, k_weight, cos, sin = of_prologues
                q_prologue = Prologue(how["q_eps"], q_weight, how["q_rope"], cos, sin)
                k_prologue = Prologue(how["k_eps"], k_weight, how["k_rope"], cos, sin)
                call = replace(call, q_prologue=q_prologue, k_prologue=k_prologue).after_prologues()
            error = _error(call, out)
            rows = exact - exact_before
            if calls == calls_before:  # the provider does not tell
                # A kernel judges by tiles, and may have a few more than the format's specification.
                rows = sum(int(reference.exact_rows(head, format=how["format"]).sum()) for head, _ in _heads(call, out))
        measured.add(error, rows / out[..., 0].numel())
        return out

    return attention


def _error(call: Call, out: torch.Tensor) -> float:
    """||out - exact|| / ||exact||, without the elements that are NaN or Inf in exact attention."""
    wrong = size = torch.zeros((), dtype=torch.float64, device=out.device)
    for head, out_head in _heads(call, out):
        head = replace(head, k=head.k.double(), v=head.v.double())
        step = max(1, MAX_SCORES // (head.q.shape[1] * head.k.shape[2]))
        for start in range(0, head.q.shape[2], step):
            part = slice(start, start + step)
            exact = sdpa(_of_queries(head, part).of_seen_keys())
            finite = exact.isfinite()
            difference = torch.where(finite, out_head[:, :, part] - exact, 0.0)
            wrong = wrong + difference.square().sum()
            size = size + torch.where(finite, exact, 0.0).square().sum()
    if not wrong:
        return 0.0
    return math.sqrt(wrong / size) if size and wrong.isfinite() else math.inf


def _heads(call: Call, out: torch.Tensor) -> Iterator[tuple[Call, torch.Tensor]]:
    """Every KV head by itself, with the query heads that share it and what they have of `out`."""
    group = call.q.shape[1] // call.k.shape[1]
    for batch in range(call.q.shape[0]):
        for head in range(call.k.shape[1]):
            its, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
            one = slice(batch, batch + 1)
            mine = replace(call, q=call.q[one, its], k=call.k[one, own], v=call.v[one, own])
            if not call.is_affine:
                mask = call.joined_mask()
                assert mask is not None
                expanded = mask.expand(*call.q.shape[:3], call.k.shape[2])[one, its]
                mine = replace(mine, ahead=None, behind=None, low=None, high=None, mask=expanded)
            yield mine, out[one, its]


def _of_queries(head: Call, part: slice) -> Call:
    """The call of some of the queries, in float64."""
    ahead = None if head.ahead is None else head.ahead + part.start
    mask = None if head.mask is None else head.mask[:, :, part]
    return replace(head, q=head.q[:, :, part].double(), ahead=ahead, mask=mask)

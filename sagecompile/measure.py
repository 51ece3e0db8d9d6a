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
            if of_prologues:
                q_weight, k_weight, cos, sin = of_prologues
                q = Prologue(how["q_eps"], q_weight, how["q_rope"], cos, sin).apply(q).to(q.dtype)
                k = Prologue(how["k_eps"], k_weight, how["k_rope"], cos, sin).apply(k).to(k.dtype)
            scale = how["scale"] if how["scale"] is not None else q.shape[3] ** -0.5
            error = _error(q, k, v, out, scale, how["ahead"])
            rows = exact - exact_before
            if calls == calls_before:  # the provider does not tell
                rows = _specified_rows(q, k, v, scale=scale, ahead=how["ahead"], format=how["format"])
        measured.add(error, rows / out[..., 0].numel())
        return out

    return attention


def _error(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float, ahead: int | None
) -> float:
    """||out - exact|| / ||exact||, without the elements that are NaN or Inf in exact attention."""
    wrong = size = torch.zeros((), dtype=torch.float64, device=q.device)
    for q_head, k_head, v_head, out_head in _by_kv_head(q, k, v, out):
        k_head, v_head = k_head.double(), v_head.double()
        step = max(1, MAX_SCORES // (q_head.shape[1] * k.shape[2]))
        for start in range(0, q.shape[2], step):
            part = slice(start, start + step)
            seen = slice(None if ahead is None else ahead + start + step)
            tensors = q_head[:, :, part].double(), k_head[:, :, seen], v_head[:, :, seen]
            exact = sdpa(*tensors, scale=scale, is_causal=ahead is not None, causal_offset=(ahead or 0) + start)
            finite = exact.isfinite()
            difference = torch.where(finite, out_head[:, :, part] - exact, 0.0)
            wrong = wrong + difference.square().sum()
            size = size + torch.where(finite, exact, 0.0).square().sum()
    if not wrong:
        return 0.0
    return math.sqrt(wrong / size) if size and wrong.isfinite() else math.inf


def _specified_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> int:
    """How many rows the format's specification computes exactly: a kernel judges by tiles, and may have a few more."""
    return sum(int(reference.exact_rows(*heads, **how).sum()) for heads in _by_kv_head(q, k, v))


def _by_kv_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *like_q: torch.Tensor) -> Iterator[Any]:
    """Every KV head by itself, with the query heads that share it; all tensors have 4 dims."""
    group = q.shape[1] // k.shape[1]
    for batch in range(q.shape[0]):
        for head in range(k.shape[1]):
            its, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
            one = slice(batch, batch + 1)
            yield q[one, its], k[one, own], v[one, own], *(x[one, its] for x in like_q)

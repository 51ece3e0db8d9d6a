"""Compare a symbolic size in a way that Dynamo can keep: as a guard, where there may be one.

In: a torch.SymInt of a graph that is being compiled. Out: whether it reaches a number.
"""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint, statically_known_true


def reaches(size: torch.SymInt, least: int) -> bool | None:
    """Whether `size >= least`, from here on guarded.

    None, without a guard, where it may be less and none may be added: of a size that was given a range, as by
    `torch._dynamo.mark_dynamic(x, 1, min=16, max=4096)`, which Dynamo lets nothing narrow, or of one without a value.
    """
    if statically_known_true(size >= least):
        return True
    if _has_promised_range(size) or not size.node.has_hint():
        return None
    return bool(size >= least)


def _has_promised_range(size: torch.SymInt) -> bool:
    promised = set()
    for tracked in size.node.shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for axis, constraint in enumerate(constraints):
            if isinstance(constraint, StrictMinMaxConstraint):
                promised |= _symbols_of(tracked.fake.shape[axis])
    return not promised.isdisjoint(_symbols_of(size))


def _symbols_of(size: int | torch.SymInt) -> set[object]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()

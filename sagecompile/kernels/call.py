"""One attention call as a value: what the ops make of their arguments, and what every kernel takes.

In: tensors, and what is to be done with them. Out: a `Call`. What a kernel may leave alone of it, its provider's row in
formats.py says; a new feature is a field here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .prologue import Prologue


@dataclass(frozen=True, eq=False)
class Call:
    """softmax(scale * q k^T) v over the keys that a query sees, after the prologues of q and k."""

    q: torch.Tensor
    """(B, Hq, Nq, D), any strides; so are k and v."""
    k: torch.Tensor
    """(B, Hkv, Nk, D), Hq being a multiple of Hkv."""
    v: torch.Tensor
    """As k."""
    scale: float
    ahead: int | None = None
    """Query i sees the keys j <= i + ahead: 0 is SDPA's `is_causal`, more is causal behind a cached context, and None
    lets it see all keys."""
    q_prologue: Prologue | None = None
    """Applied to q as it is read. So is `k_prologue`."""
    k_prologue: Prologue | None = None
    site: str = ""
    """The name under which the call and its exact rows are counted, see counts.py."""

    @property
    def is_causal(self) -> bool:
        """Whether not every query sees all keys."""
        return self.ahead is not None

    def after_prologues(self) -> Call:
        """The same without any: q and k as the prologues make them, rounded to their dtypes."""
        q, k = (
            x if prologue is None else prologue.apply(x).to(x.dtype)
            for x, prologue in ((self.q, self.q_prologue), (self.k, self.k_prologue))
        )
        return replace(self, q=q, k=k, q_prologue=None, k_prologue=None)

    def of_seen_keys(self) -> Call:
        """The same without the keys behind the last that any query sees."""
        if self.ahead is None:
            return self
        k, v = (x[:, :, : self.q.shape[2] + self.ahead] for x in (self.k, self.v))
        return replace(self, k=k, v=v)

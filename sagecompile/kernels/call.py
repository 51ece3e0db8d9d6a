"""One attention call as a value: what the ops make of their arguments, and what every kernel takes.

In: tensors, and what is to be done with them. Out: a `Call`. What a kernel may leave alone of it, its provider's row in
formats.py says; a new feature is a field here.
"""

from __future__ import annotations

import math
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
    lets it see all keys that the others let it see."""
    q_prologue: Prologue | None = None
    """Applied to q as it is read. So is `k_prologue`."""
    k_prologue: Prologue | None = None
    site: str = ""
    """The name under which the call and its exact rows are counted, see counts.py."""
    behind: int | None = None
    """It sees the keys j >= i - behind."""
    low: torch.Tensor | None = None
    """In sequence b it sees the keys j >= low[b, i]; int32, (B or 1, Nq or 1). `high`: j < high[b, i]."""
    high: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    """As SDPA takes it: of booleans, True is seen; else added to the scores, of dtype float32 or q's. Any shape of at
    most 4 dims and any strides that broadcast to (B, Hq, Nq, Nk)."""

    @property
    def is_causal(self) -> bool:
        """Whether queries see no keys from some place after them on."""
        return self.ahead is not None

    @property
    def is_affine(self) -> bool:
        """Whether `ahead` says all of which keys are seen."""
        return self.behind is None and self.low is None and self.high is None and self.mask is None

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
        seen = self.q.shape[2] + self.ahead
        k, v = (x[:, :, :seen] for x in (self.k, self.v))
        mask = self.mask
        if mask is not None and mask.dim() and mask.shape[-1] != 1:
            mask = mask[..., :seen]
        return replace(self, k=k, v=v, mask=mask)

    def joined_mask(self) -> torch.Tensor | None:
        """All that says which keys are seen as the one tensor that SDPA takes, of 4 dims; None where all see all."""
        device = self.q.device
        query = torch.arange(self.q.shape[2], device=device)[:, None]
        key = torch.arange(self.k.shape[2], device=device)
        seen = [] if self.ahead is None else [key <= query + self.ahead]
        seen += [] if self.behind is None else [key >= query - self.behind]
        seen += [] if self.low is None else [key >= self.low[:, None, :, None]]
        seen += [] if self.high is None else [key < self.high[:, None, :, None]]
        mask = self.mask
        for one in seen:
            if mask is None or mask.dtype == torch.bool:
                mask = one if mask is None else mask & one
            else:
                mask = torch.where(one, mask, -math.inf)
        return mask if mask is None else mask[(None,) * (4 - mask.dim())]

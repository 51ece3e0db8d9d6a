"""Which keys a query sees, as a value that goes from the graph to the kernels.

In: what the matcher proved of a call's mask. Out: a `Mask`: an interval of the keys for each query, and what there is
beyond it as a tensor of which nothing more is known. No torch: a bound that is a symbol stays the SymInt it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Bound = Any
"""An int, or a torch.SymInt where the graph is compiled for more than one size."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Query i sees the keys j <= i + ahead. Two that read the same are equal: comparing SymInts would add a guard."""

    ahead: Bound | None = None
    """0 is SDPA's `is_causal`, more is causal behind a cached context; never less. None: every query sees all keys."""
    tensor: str | None = None
    """Of what masks more than that, its dtype and shape: `bool (2, 1, 40, 40)`. No kernel takes it."""

    @property
    def is_causal(self) -> bool:
        """Whether not every query sees all keys."""
        return self.ahead is not None

    @property
    def is_plain(self) -> bool:
        """Whether SDPA says it without a tensor: no mask, or `is_causal`."""
        return self.tensor is None and (self.ahead is None or (isinstance(self.ahead, int) and self.ahead == 0))

    def keys(self, q_len: int, kv_len: int) -> float:
        """That a query sees on average, of lengths and bounds that are numbers; half of them in a causal square."""
        if self.ahead is None:
            return kv_len
        rising = min(max(kv_len - self.ahead, 0), q_len)  # rows that see more keys than the one before
        return float(rising * (self.ahead + rising / 2) + (q_len - rising) * kv_len) / q_len

    def __and__(self, other: Mask) -> Mask:
        """What both let through; bounds that are not both numbers must read the same."""
        bounds = {str(mask.ahead): mask.ahead for mask in (self, other) if mask.ahead is not None}
        if len(bounds) > 1 and not all(isinstance(bound, int) for bound in bounds.values()):
            return Mask(tensor=f"{self} and {other}")
        return Mask(min(bounds.values()) if bounds else None, self.tensor or other.tensor)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a bound that is a symbol becomes its expression as text."""
        fixed = self.ahead is None or isinstance(self.ahead, int)
        return {"ahead": self.ahead if fixed else str(self.ahead), "tensor": self.tensor}

    def __str__(self) -> str:
        """`none`, `causal`, `causal + 88`, `bool (2, 1, 40, 40)`."""
        interval = [] if self.ahead is None else ["causal" if str(self.ahead) == "0" else f"causal + {self.ahead}"]
        return " and ".join([*interval, *([self.tensor] if self.tensor else [])]) or "none"

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))


ALL = Mask()
"""Every query sees every key."""
CAUSAL = Mask(ahead=0)
"""SDPA's `is_causal`: query i sees the keys j <= i, also where there are more or fewer keys than queries."""

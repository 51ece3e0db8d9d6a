"""Which keys a query sees, as a value that goes from the graph to the kernels.

In: what the matcher proved of a call's mask. Out: a `Mask`: an interval of the keys for each query, and what there is
beyond it as a tensor of which nothing more is known. No torch: a bound that is a symbol stays the SymInt it is, and of
a tensor there is only what it is like; its values are in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Bound = Any
"""An int, or a torch.SymInt where the graph is compiled for more than one size."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys j query i of sequence b sees: those that every field lets through that is not None.

    Two that read the same are equal: comparing SymInts would add a guard.
    """

    ahead: Bound | None = None
    """j <= i + ahead: 0 is SDPA's `is_causal`, more is causal behind a cached context; never less."""
    behind: Bound | None = None
    """j >= i - behind: a sliding window; never less than 0."""
    low: str | None = None
    """j >= low[b, i], of which the dtype and shape are said: `int32 (1, 40)`."""
    high: str | None = None
    """j < high[b, i], likewise."""
    tensor: str | None = None
    """Of what masks more than that, or is added to the scores, dtype and shape: `bool (2, 1, 1, 40)`."""

    @property
    def is_causal(self) -> bool:
        """Whether queries see no keys from some place after them on."""
        return self.ahead is not None

    @property
    def is_affine(self) -> bool:
        """Whether `ahead` says it all."""
        return self.behind is None and not self.has_tensors

    @property
    def is_plain(self) -> bool:
        """Whether SDPA says it without a tensor: no mask, or `is_causal`."""
        return self.is_affine and (self.ahead is None or (isinstance(self.ahead, int) and self.ahead == 0))

    @property
    def has_tensors(self) -> bool:
        """Whether what a query sees is in part known only when the call is made."""
        return not (self.low is None and self.high is None and self.tensor is None)

    def keys(self, q_len: int, kv_len: int) -> float:
        """That a query sees on average, of lengths and bounds that are numbers; half of them in a causal square.

        As if tensors let all of them through.
        """
        after, before = 0.0, 0.0  # keys that `ahead` and `behind` hide from all queries together
        if self.ahead is not None:
            rising = min(max(kv_len - self.ahead, 0), q_len)  # rows that see more keys than the one before
            after = rising * (kv_len - self.ahead - rising / 2)
        if self.behind is not None:
            cut = max(q_len - self.behind, 0)
            more = max(cut - kv_len, 0)  # rows that see none
            before = (cut**2 - more**2) / 2
        return float(max(q_len * kv_len - after - before, 1)) / q_len

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a bound that is a symbol becomes its expression as text."""

        def plain(bound: Bound | None) -> Any:
            return bound if bound is None or isinstance(bound, int) else str(bound)

        found = {"ahead": plain(self.ahead), "behind": plain(self.behind)}
        return found | {"low": self.low, "high": self.high, "tensor": self.tensor}

    def __str__(self) -> str:
        """`none`, `causal`, `causal + 88`, `causal and 15 behind`, `bool (2, 1, 40, 40)`."""
        said = [] if self.ahead is None else ["causal" if str(self.ahead) == "0" else f"causal + {self.ahead}"]
        said += [] if self.behind is None else [f"{self.behind} behind"]
        said += [f"{name} {given}" for name, given in (("low", self.low), ("high", self.high)) if given]
        return " and ".join([*said, *([self.tensor] if self.tensor else [])]) or "none"

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))


ALL = Mask()
"""Every query sees every key."""
CAUSAL = Mask(ahead=0)
"""SDPA's `is_causal`: query i sees the keys j <= i, also where there are more or fewer keys than queries."""

"""The facts of one attention call in a graph, and of the device it is on.

In: what the matcher read off the FX graph. Out: an `AttentionSite`, which `decide` judges and the report prints.
No policy here, and no torch: a symbolic size stays the SymInt it is, so that comparing it becomes a Dynamo guard.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from .mask import ALL, Mask

Size = Any
"""An int, or a torch.SymInt where the graph is compiled for more than one size."""


class Prologue(NamedTuple):
    """What makes q or k out of its projection, as far as a kernel can do it as it reads that: kernels/prologue.py."""

    norm: bool = False
    weight: str | None = None
    """Of the norm: its dtype; None without one."""
    rope: str = "none"
    """Which channels turn together."""
    table: str | None = None
    """Dtype of cos and sin."""

    @property
    def kind(self) -> str:
        """What it computes, whatever its dtypes: `half`, `norm, interleaved`."""
        return f"norm, {self.rope}" if self.norm else self.rope


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention call: q (batch, heads, q_len, head_dim), k and v (batch, kv_heads, kv_len, head_dim).

    Two are equal whose facts read the same: a symbolic size counts as the text it prints as. Comparing the SymInts of
    one graph would add a guard, and those of two cannot be compared; they have no hash either.
    """

    name: str
    """Module path, e.g. `model.layers.3.self_attn`."""
    source: str
    """File and line of the call, e.g. `sdpa_attention.py:193`."""
    spelling: str
    """How the model writes it: `sdpa`, `matmul`, `einsum`, `nn.MultiheadAttention`, ..."""
    batch: Size
    heads: Size
    kv_heads: Size
    """Fewer than `heads` for grouped-query attention; a `repeat_kv` in front of k and v is already undone here."""
    q_len: Size
    kv_len: Size
    head_dim: Size
    value_dim: Size
    dtype: str
    """In which the call computes: that of q, k and v, or autocast's."""
    device: str
    """Type and index, e.g. `cuda:0`."""
    mask: Mask = ALL
    """What is known of which keys a query sees."""
    scale: float | None = None
    """Multiplies the scores; None is 1 / sqrt(head_dim)."""
    dropout_p: float = 0.0
    needs_grad: bool = False
    prologues: tuple[Prologue, Prologue] | None = None
    """Of q and k, where there is something that a kernel could do."""
    obstacle: str | None = None
    """What in the graph itself stands in the way, e.g. `attention weights: used elsewhere (by mean)`."""

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def flops(self) -> float:
        """Of the two matmuls, of sizes that are numbers and keys that are seen."""
        keys = self.mask.keys(self.q_len, self.kv_len)
        return float(4.0 * self.batch * self.heads * self.q_len * keys * self.head_dim)

    @property
    def shape(self) -> str:
        """`2x16x1024x64`, with `16/4` for 16 query heads on 4 KV heads and `512-1024` for unequal lengths."""
        heads = f"{self.heads}" if _same(self.heads, self.kv_heads) else f"{self.heads}/{self.kv_heads}"
        length = f"{self.q_len}" if _same(self.q_len, self.kv_len) else f"{self.q_len}-{self.kv_len}"
        return f"{self.batch}x{heads}x{length}x{self.head_dim}"

    @property
    def label(self) -> str:
        """What its calls are counted under: its name, and what else tells it from sites of the same name."""
        return f"{self.name}\t{self.source}\t{self.shape}"

    @property
    def prologue(self) -> str:
        """Both in words: `QK-norm and RoPE`, `Q-norm and Q-RoPE`; "" if there are none."""
        found = dict(zip("QK", self.prologues or (), strict=False))
        norm = "".join(name for name, made in found.items() if made.norm)
        rope = "".join(name for name, made in found.items() if made.rope != "none")
        parts = [f"{norm}-norm"] if norm else []
        parts += [] if not rope else ["RoPE" if rope == "QK" else f"{rope}-RoPE"]
        return " and ".join(parts)

    def __eq__(self, other: object) -> bool:
        return self._facts() == other._facts() if isinstance(other, AttentionSite) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._facts())

    def _facts(self) -> tuple[Any, ...]:
        """All of them, sizes that are symbols as text."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value if isinstance(value, tuple) else _plain(value) for value in values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a symbolic size becomes its expression as text."""
        named = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        named["mask"] = self.mask.to_dict()
        return named | {"prologues": [made._asdict() for made in self.prologues] if self.prologues else None}


@dataclass(frozen=True)
class Device:
    """What is known of the device that a site is on."""

    type: str
    """`cpu`, `cuda`, ..."""
    name: str
    """As the maker names it, e.g. `NVIDIA H200`: the key of the profiles."""
    compute_capability: tuple[int, int] | None = None
    """Of a CUDA device."""
    threads: int | None = None
    """Of a CPU, as many as torch uses."""
    slow_launches: bool = False
    """Whether Python launches what C++ would, if there was a compiler and a newer driver."""


def _same(a: Size, b: Size) -> bool:
    """Equal as written: compares text, because comparing two SymInts would add a guard."""
    return str(a) == str(b)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

"""Where the dims of the scores are in a tensor on their way to the product with V: transposed, or regrouped by views.

In: the scores' labels and sizes, then each call on the way. Out: the label of every dim of what the product reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from .graph import RESHAPES, argument, calls, tensor
from .operand import permutation_of

ONE = "."
"""The label of a dim of size 1 that a view put in."""


@dataclass(frozen=True)
class Layout:
    """The label of each dim of a tensor: one of the scores, a digit where others were regrouped, or ONE."""

    sizes: dict[str, str]
    """Of each label, as text."""
    dims: str
    regrouped: tuple[tuple[str, str], ...] = ()
    """(labels, digits): these dims together became those, in row-major order."""

    def through(self, node: fx.Node) -> Layout | None:
        """The layout of the call's result, if that of what it reads is this one; None if it cannot be said."""
        found = tensor(node)
        if found is None:
            return None
        permutation = permutation_of(node)
        if permutation is not None:
            return replace(self, dims="".join(self.dims[dim] for dim in permutation))
        if calls(node, *RESHAPES):
            read = tensor(argument(node, 0, "input"))
            if read is None or read.dtype != found.dtype:  # view(dtype) reads other numbers
                return None
            return self._reshaped([str(size) for size in found.shape])
        return self

    def as_regrouped(self, labels: str) -> str | None:
        """Labels of the scores as they stand in this tensor, digits in place of those that were regrouped."""
        for held, digits in self.regrouped:
            if held not in labels:
                return None
            labels = labels.replace(held, digits)
        return labels

    def _reshaped(self, shape: list[str]) -> Layout | None:
        """Dims in front and at the end that stay as they are keep their labels, what is between them is regrouped."""
        old = self.dims.replace(ONE, "")
        front = self._alike(old, shape)
        old, shape = old[len(front.replace(ONE, "")) :], shape[len(front) :]
        end = self._alike(old[::-1], shape[::-1])[::-1]
        old, shape = old[: len(old) - len(end.replace(ONE, ""))], shape[: len(shape) - len(end)]
        if not old and not shape:
            return replace(self, dims=front + end)
        for held, digits in self.regrouped:
            if digits == old and [self.sizes[label] for label in held] == shape:  # as it was before
                others = tuple(pair for pair in self.regrouped if pair != (held, digits))
                return Layout(self.sizes, front + held + end, others)
        if not old or not shape or any(label.isdigit() for label in old):
            return None
        first = sum(len(digits) for _, digits in self.regrouped)
        digits = "".join(str(first + i) for i in range(len(shape)))
        sizes = self.sizes | dict(zip(digits, shape, strict=False))
        return (
            Layout(sizes, front + digits + end, (*self.regrouped, (old, digits))) if first + len(shape) < 10 else None
        )

    def _alike(self, old: str, shape: list[str]) -> str:
        """The labels of the first sizes of `shape`, as far as they are those of `old`, or 1."""
        labels = ""
        for size in shape:
            following = old[len(labels.replace(ONE, "")) :][:1]
            if following and self.sizes[following] == size:
                labels += following
            elif size == "1":
                labels += ONE
            else:
                break
        return labels

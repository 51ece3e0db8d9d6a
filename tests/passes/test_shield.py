"""Inductor's own attention fusion is kept from what it misreads: what inductor gets wrong or refuses is right here."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import compiled, detached, relative_error
from torch import Tensor

Q = (2, 3, 8, 16)
MASKED: dict[str, Callable[..., Tensor]] = {
    "operator": lambda q, k, v, m, t: (q @ k.mT / t + m).softmax(-1) @ v,
    "method": lambda q, k, v, m, t: ((q @ k.mT).div(t) + m).softmax(-1) @ v,
    "in place": lambda q, k, v, m, t: (q @ k.mT).div_(t).add_(m).softmax(-1) @ v,
    "in place, and read by its old name": lambda q, k, v, m, t: [s := q @ k.mT, s.div_(t), (s + m).softmax(-1) @ v][-1],
    "dropout off": lambda q, k, v, m, t: F.dropout((q @ k.mT / t + m).softmax(-1), 0.0) @ v,
    "tokens first": lambda q, k, v, m, t: (
        ((q.transpose(1, 2).contiguous().permute(0, 2, 1, 3) @ k.permute(0, 1, 3, 2)).div(t) + m).softmax(-1) @ v
    ),
    "torch.true_divide": lambda q, k, v, m, t: (torch.true_divide(q @ k.mT, t) + m).softmax(-1) @ v,
    "no mask": lambda q, k, v, m, t: (q @ k.mT / t).softmax(-1) @ v,
    "bmm": lambda q, k, v, m, t: (torch.bmm(q[0], k[0].mT) / t + m).softmax(-1) @ v[0],
}
DIVISORS = {
    "a number": lambda: torch.tensor(4.0),
    "one for each head": lambda: torch.rand(1, 3, 1, 1) + 1,
    "one for each key": lambda: torch.rand(8) + 1,
    "one for each score": lambda: torch.rand(2, 3, 8, 8) + 1,
}


CASES = [(name, "a number") for name in MASKED] + [
    (name, divisor) for name in ("operator", "in place") for divisor in DIVISORS if divisor != "a number"
]


@pytest.mark.parametrize(("name", "divisor"), CASES)
def test_a_divisor_that_is_a_tensor(name: str, divisor: str) -> None:
    inputs = (*(torch.randn(Q) for _ in range(3)), torch.randn(8, 8), DIVISORS[divisor]())
    expected = MASKED[name](*detached(inputs))
    actual, report = compiled(MASKED[name], *inputs)
    assert len(report.kept) == 1 and not report.used
    assert relative_error(actual, expected) < 1e-5


def test_a_divisor_that_changes_its_scores_in_place_for_others_too() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        scores /= t
        return (scores + 1.0).softmax(-1) @ v, scores

    inputs = (*(torch.randn(Q) for _ in range(3)), torch.tensor(4.0))
    expected = fn(*detached(inputs))
    assert relative_error(compiled(fn, *inputs)[0], expected) < 1e-5


def test_what_is_written_to_out_is_left_alone() -> None:
    def quotient(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        buffer = torch.full_like(scores, 7.0)
        torch.div(scores, t, out=buffer)
        return buffer, scores

    def inner(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT / 5
        buffer = torch.zeros_like(scores)
        return torch.softmax(scores, -2, out=buffer) @ v, buffer

    inputs = (*(torch.randn(Q) for _ in range(3)), torch.tensor(3.0))
    for fn in (quotient, inner):
        expected = fn(*detached(inputs))
        assert relative_error(compiled(fn, *inputs, policy="never")[0], expected) < 1e-5

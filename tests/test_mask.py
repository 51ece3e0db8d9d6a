"""A mask as a value: what two of them let through, how many keys queries see, and how it reads."""

from __future__ import annotations

import pytest
import torch

from sagecompile.mask import ALL, CAUSAL, Mask


@pytest.mark.parametrize("q_len, kv_len", [(40, 40), (8, 100), (100, 8), (1, 30), (30, 1)])
@pytest.mark.parametrize("ahead", [None, 0, 3, 50, 1000])
def test_keys_are_those_of_the_mean_query(ahead: int | None, q_len: int, kv_len: int) -> None:
    seen = torch.ones(q_len, kv_len)
    seen = seen if ahead is None else seen.tril(ahead)
    assert Mask(ahead).keys(q_len, kv_len) == pytest.approx(float(seen.sum()) / q_len, abs=0.5)


def test_two_masks() -> None:
    other = Mask(tensor="bool (8, 8)")
    assert (ALL & ALL, ALL & CAUSAL, Mask(5) & Mask(3), Mask(5) & CAUSAL) == (ALL, CAUSAL, Mask(3), CAUSAL)
    assert CAUSAL & other == other & CAUSAL == Mask(0, "bool (8, 8)")


@pytest.mark.parametrize(
    ("mask", "text", "plain"),
    [(ALL, "none", True), (CAUSAL, "causal", True), (Mask(88), "causal + 88", False), (Mask(tensor="x"), "x", False)],
)
def test_how_it_reads(mask: Mask, text: str, plain: bool) -> None:
    assert (str(mask), mask.is_plain, hash(mask)) == (text, plain, hash(Mask(mask.ahead, mask.tensor)))
    assert mask.to_dict() == {"ahead": mask.ahead, "tensor": mask.tensor}

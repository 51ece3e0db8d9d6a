"""Formulas of masks with symbolic lengths: what they say is true of every length; what they cannot say is unknown."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sagecompile.mask import ALL, CAUSAL, Mask
from sagecompile.passes import masks
from sagecompile.passes.graph import tensor

Make = Callable[[int, int], Tensor]
INF, LOWEST = float("-inf"), torch.finfo(torch.float32).min
ARANGE = torch.arange


def recognised(make: Make, q_len: int = 12, kv_len: int = 12, true_means_masked: bool = False) -> Mask | None:
    """What `make(q_len, kv_len)` is recognised as when captured for all lengths above 1; equal lengths stay equal."""
    results: list[Mask | None] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        output = next(iter(reversed(gm.graph.nodes)))
        mask, q, k = output.args[0]
        (m,), (n,) = tensor(q).shape, tensor(k).shape
        assert isinstance(m, int) == (q_len == 1) and isinstance(n, int) == (kv_len == 1)
        guards = tensor(q).fake_mode.shape_env.guards
        before = len(guards)
        results.append(masks.recognise(mask, m, n, true_means_masked))
        assert len(guards) == before
        return gm.forward

    torch._dynamo.reset()
    q = torch.ones(q_len)
    inputs = q, q if q_len == kv_len else torch.ones(kv_len)
    for x in inputs:
        if len(x) > 1:
            torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(lambda q, k: (make(len(q), len(k)), q + 1, k + 1), backend=backend, fullgraph=True)
    assert torch.equal(compiled(*inputs)[0], make(q_len, kv_len))
    (result,) = results
    return result


def transformers_packed(m: int, n: int) -> Tensor:
    """Without a cache: sequences end where the position ids do not go up by one, which here is nowhere."""
    position_ids = (ARANGE(m) + 0)[None].expand(2, -1)
    diff = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    packed = (diff != 1).cumsum(-1)
    batch, q, k = ARANGE(2)[:, None, None, None], ARANGE(m)[None, None, :, None], ARANGE(n)[None, None, None, :]
    mask = q.new_ones((), dtype=torch.bool) & (position_ids[batch, k] <= position_ids[batch, q])
    return (mask & (packed[batch, q] == packed[batch, k])).expand(2, -1, m, n)


CAUSAL_SQUARE = {
    "compared positions": lambda m, n: ARANGE(m)[:, None] >= ARANGE(n),
    "strictly, moved by one": lambda m, n: ARANGE(n) < ARANGE(1, m + 1).view(-1, 1),
    "not later": lambda m, n: ~(ARANGE(n) > ARANGE(m).unsqueeze(-1)),
    "difference": lambda m, n: ARANGE(n)[None] - ARANGE(m)[:, None] <= 0,
    "twice the difference": lambda m, n: (ARANGE(m)[:, None] - ARANGE(n)).neg() < 1,
    "both moved by the length": lambda m, n: ARANGE(n, 2 * n) <= ARANGE(m)[:, None] + n,
    "with batch and heads": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n))[None, None].expand(2, 1, m, n),
    "repeated for the batch": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n))[None, None].repeat(2, 1, 1, 1),
    "tril": lambda m, n: torch.ones(m, n, dtype=torch.bool).tril(),
    "not triu": lambda m, n: ~torch.ones(m, n, dtype=torch.bool).triu(1),
    "float triu": lambda m, n: torch.full((m, n), INF).triu(1),
    "where": lambda m, n: torch.where(ARANGE(m)[:, None] < ARANGE(n), LOWEST, torch.tensor(0.0)),
    "where as a method": lambda m, n: torch.zeros(m, n).where(ARANGE(m)[:, None] >= ARANGE(n), INF),
    "masked_fill": lambda m, n: torch.zeros(m, n).masked_fill(ARANGE(m)[:, None] < ARANGE(n), INF),
    "1 - tril, scaled": lambda m, n: (1.0 - torch.ones(m, n).tril()) * LOWEST,
    "through float and back": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n)).float().bool(),
    "and a window of the length": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n)) & (ARANGE(m)[:, None] - ARANGE(n) < n),
    "and what it implies": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n)) & (ARANGE(n) < ARANGE(m)[:, None] + 3),
    "or what implies it": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n)) | (ARANGE(n) + 3 < ARANGE(m)[:, None]),
    "gathered": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n))[ARANGE(m)[:, None], ARANGE(n)],
    "one column taken after another": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n))[:, ARANGE(n)],
    "sliced from a larger one": lambda m, n: (ARANGE(2 * m)[:, None] >= ARANGE(2 * n))[m:, n:],
    "as Transformers makes it": transformers_packed,
}


@pytest.mark.parametrize("name", CAUSAL_SQUARE)
def test_causal(name: str) -> None:
    assert recognised(CAUSAL_SQUARE[name]) == CAUSAL


@pytest.mark.parametrize("name", ["compared positions", "tril", "where", "1 - tril, scaled"])
@pytest.mark.parametrize("q_len, kv_len", [(7, 12), (12, 7)])
def test_causal_is_top_left(name: str, q_len: int, kv_len: int) -> None:
    """Two lengths that have nothing to do with each other."""
    assert recognised(CAUSAL_SQUARE[name], q_len, kv_len) == CAUSAL


NOTHING = {
    "ones": lambda m, n: torch.ones(m, n, dtype=torch.bool),
    "zeros": lambda m, n: torch.zeros(1, 1, m, n),
    "ones for padding, inverted": lambda m, n: (1.0 - torch.ones(2, n)[:, None, None, :]) * LOWEST,
    "positions that are never negative": lambda m, n: ARANGE(m)[:, None] + ARANGE(n) >= 0,
    "keys before the length": lambda m, n: (ARANGE(n) < n).expand(m, n),
    "causal or later": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n)) | (ARANGE(m)[:, None] < ARANGE(n)),
    "a window of all keys": lambda m, n: ARANGE(n) - ARANGE(m)[:, None] < n,
    "counted up, minus one": lambda m, n: torch.ones(m, n, dtype=torch.long).cumsum(-1) - 1 == ARANGE(n),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_masked(name: str) -> None:
    assert recognised(NOTHING[name]) == ALL


def test_true_may_mean_masked() -> None:
    assert recognised(lambda m, n: ARANGE(m)[:, None] < ARANGE(n), true_means_masked=True) == CAUSAL
    assert recognised(lambda m, n: ARANGE(m)[:, None] >= ARANGE(n), true_means_masked=True) is None


AHEAD = {
    "one diagonal more": (1, lambda m, n: ARANGE(n) <= ARANGE(m)[:, None] + 1),
    "behind 88": (88, lambda m, n: ARANGE(n) <= ARANGE(m)[:, None] + 88),
    "strictly": (4, lambda m, n: ARANGE(n)[None] < ARANGE(5, m + 5)[:, None]),
    "tril": (7, lambda m, n: torch.ones(m, n, dtype=torch.bool).tril(7)),
    "float triu": (2, lambda m, n: torch.full((m, n), INF).triu(3)),
    "two of them": (2, lambda m, n: (ARANGE(n) <= ARANGE(m)[:, None] + 2) & (ARANGE(n) < ARANGE(m)[:, None] + 9)),
}


@pytest.mark.parametrize("q_len, kv_len", [(12, 12), (7, 500), (500, 7)])
@pytest.mark.parametrize("name", AHEAD)
def test_causal_behind_a_context(name: str, q_len: int, kv_len: int) -> None:
    ahead, make = AHEAD[name]
    assert recognised(make, q_len, kv_len) == Mask(ahead)


def test_the_last_tokens_of_all() -> None:
    """Aligned to the end, of a context and new tokens whose numbers are symbols."""
    found = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        mask, q, k = next(iter(reversed(gm.graph.nodes))).args[0]
        found.append((masks.recognise(mask, tensor(q).shape[0], tensor(k).shape[0]), tensor(k).shape[0]))
        return gm.forward

    def fn(cached: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        k = torch.cat((cached, new))
        return ARANGE(len(k)) <= ARANGE(len(new))[:, None] + len(cached), new + 1, k

    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    inputs = torch.ones(50), torch.ones(9)
    assert torch.equal(compiled(*inputs)[0], torch.ones(9, 59, dtype=torch.bool).tril(50))
    ((mask, kv_len),) = found
    assert mask is not None and not isinstance(mask.ahead, int) and str(mask.ahead) in str(kv_len)


LOOKALIKES = {
    "sliding window: the length may be above it": lambda m, n: (
        (ARANGE(m)[:, None] >= ARANGE(n)) & (ARANGE(m)[:, None] - ARANGE(n) < 100)
    ),
    "one diagonal less": lambda m, n: ARANGE(n) < ARANGE(m)[:, None],
    "moved by an offset that is 0 at this length": lambda m, n: ARANGE(n) <= ARANGE(m)[:, None] + (m - 12),
    "anti-causal": lambda m, n: ARANGE(n) >= ARANGE(m)[:, None],
    "a coarser step": lambda m, n: 2 * ARANGE(n) <= ARANGE(m)[:, None],
    "reversed": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n)).flip(0),
    "everything masked": lambda m, n: torch.zeros(m, n, dtype=torch.bool),
    "prefix": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n)) | (ARANGE(n) < 5),
    "soft: -1 instead of -inf": lambda m, n: torch.where(ARANGE(m)[:, None] < ARANGE(n), -1.0, 0.0),
    "not zero where it takes part": lambda m, n: torch.where(ARANGE(m)[:, None] < ARANGE(n), INF, 0.5),
    "inverted": lambda m, n: torch.where(ARANGE(m)[:, None] < ARANGE(n), 0.0, INF),
    "0 times -inf is NaN": lambda m, n: torch.ones(m, n).triu(1).mul(INF).nan_to_num(nan=1.0),
    "ALiBi": lambda m, n: (ARANGE(n) - ARANGE(m)[:, None]).float(),
    "the first column of all": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n))[:, :1].expand(m, n) & (ARANGE(n) < 3),
    "rows only": lambda m, n: (ARANGE(n) <= 3).expand(m, n),
    "bits, not truth": lambda m, n: ~(ARANGE(m)[:, None] >= ARANGE(n)).long() == 0,
    "an index counted from the end": lambda m, n: (ARANGE(n) < ARANGE(m)[:, None])[:, ARANGE(n) - 1],
    "positions that wrap around": lambda m, n: ARANGE(m, dtype=torch.uint8)[:, None] >= ARANGE(n, dtype=torch.uint8),
    "positions that bfloat16 rounds": lambda m, n: ARANGE(m).bfloat16()[:, None] >= ARANGE(n).bfloat16(),
    "two packed sequences": lambda m, n: (
        (ARANGE(m)[:, None] >= ARANGE(n)) & ((ARANGE(m)[:, None] < 5) == (ARANGE(n) < 5))
    ),
    "for part of the batch": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n)) | (ARANGE(2)[:, None, None, None] == 1),
    "transposed": lambda m, n: (ARANGE(m)[:, None] >= ARANGE(n)).mT,
    "alpha": lambda m, n: torch.add(ARANGE(m)[:, None], ARANGE(n), alpha=-2) >= 0,
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes(name: str) -> None:
    assert recognised(LOOKALIKES[name]) is None


LOOKALIKES_WITH_TWO_LENGTHS = {
    "bottom-right": lambda m, n: ARANGE(n) <= ARANGE(m)[:, None] + (n - m),
    "bottom-right tril": lambda m, n: torch.ones(m, n, dtype=torch.bool).tril(n - m),
    "keys before the number of queries": lambda m, n: (ARANGE(n) < m).expand(m, n),
}


@pytest.mark.parametrize("name", LOOKALIKES_WITH_TWO_LENGTHS)
def test_lookalikes_with_two_lengths(name: str) -> None:
    assert recognised(LOOKALIKES_WITH_TWO_LENGTHS[name], 7, 12) is None


def test_bottom_right_is_causal_where_the_lengths_are_equal() -> None:
    """As of self-attention without a cache: the graph has one symbol for both."""
    for make in list(LOOKALIKES_WITH_TWO_LENGTHS.values())[:2]:
        assert recognised(make) == CAUSAL


def test_decoding() -> None:
    """One query behind s keys: the last sees all, the first (SDPA's top-left alignment) one."""
    assert recognised(lambda m, n: ARANGE(n)[None] <= ARANGE(m)[:, None] + (n - 1), 1, 12) == ALL
    assert recognised(lambda m, n: ARANGE(n)[None] <= ARANGE(m)[:, None], 1, 12) == CAUSAL
    assert recognised(lambda m, n: ARANGE(n)[None] <= ARANGE(m)[:, None] + 1, 1, 12) == Mask(1)
    assert recognised(lambda m, n: ARANGE(n)[None] <= ARANGE(m)[:, None], 12, 1) == ALL


def test_a_mask_that_is_broadcast_is_not_causal() -> None:
    """(1, n) for all queries: each of them sees the first key alone."""
    assert recognised(lambda m, n: ARANGE(n)[None] <= 0, 12, 12) is None


def test_a_length_that_is_bounded_decides_a_window() -> None:
    def windowed(m: int, n: int) -> Tensor:
        torch._check(m <= 64)
        return (ARANGE(m)[:, None] >= ARANGE(n)) & (ARANGE(m)[:, None] - ARANGE(n) < 64)

    assert recognised(windowed) == CAUSAL


def changed_afterwards(m: int, n: int) -> Tensor:
    mask = ARANGE(m)[:, None] >= ARANGE(n)
    mask[:, 0] = False
    return mask


def changed_through_a_view(m: int, n: int) -> Tensor:
    positions = ARANGE(m)
    positions.view(1, -1).mul_(0)
    return positions[:, None] >= ARANGE(n)


@pytest.mark.parametrize("make", [changed_afterwards, changed_through_a_view])
def test_written_to(make: Make) -> None:
    assert recognised(make) is None


def random_mask(rng: random.Random) -> Make:
    """Arithmetic, comparisons, views and logic on positions; most results are no usual mask."""

    def positions(rows: bool) -> Make:
        start, step, taken = (
            rng.choice((0, 0, 0, 1, 2)),
            rng.choice((1, 1, 1, 2)),
            rng.choice(("", "", "slice", "gather")),
        )

        def make(m: int, n: int) -> Tensor:
            length = m if rows else n
            found = ARANGE(start, start + step * length, step)
            if taken == "slice":
                found = ARANGE(length + 3)[2 - start : length + 2 - start]
            elif taken == "gather":
                found = ARANGE(2 * length + 2)[found]
            return found[:, None] if rows else found[None]

        return make

    def offset() -> Callable[[int, int], int]:
        return rng.choice(
            (lambda m, n: 0, lambda m, n: 1, lambda m, n: -1, lambda m, n: n, lambda m, n: n - m, lambda m, n: m)
        )

    def comparison() -> Make:
        q, k, by = positions(True), positions(False), offset()
        compare = rng.choice((torch.le, torch.lt, torch.ge, torch.gt, torch.le, torch.ge, torch.eq, torch.ne))
        kind = rng.randrange(4)
        if kind == 0:
            return lambda m, n: compare(k(m, n), q(m, n) + by(m, n))
        if kind == 1:
            return lambda m, n: compare(q(m, n) - k(m, n), by(m, n))
        if kind == 2:
            return lambda m, n: compare(k(m, n), by(m, n)).expand(m, n)
        diagonal = rng.choice((-1, 0, 0, 1))
        return lambda m, n: getattr(torch.ones(m, n, dtype=torch.bool), rng_triangle)(diagonal)

    rng_triangle = rng.choice(("tril", "triu"))
    mask = comparison()
    for _ in range(rng.randrange(4)):
        mask = combined(rng, mask, comparison())
    return floated(rng, mask)


def combined(rng: random.Random, a: Make, b: Make) -> Make:
    return rng.choice(
        (
            lambda m, n: a(m, n) & b(m, n),
            lambda m, n: a(m, n) | b(m, n),
            lambda m, n: ~a(m, n),
            lambda m, n: torch.where(a(m, n), b(m, n), True),
            lambda m, n: a(m, n).masked_fill(b(m, n), False),
            lambda m, n: a(m, n)[..., 1:, :][..., : m - 1, :].new_ones(m, n) & b(m, n),
            lambda m, n: a(m, n).long() * 2 > b(m, n).long(),
            lambda m, n: a(m, n)[ARANGE(m)[:, None], ARANGE(n)[None]],
            lambda m, n: a(m, n).tril(),
        )
    )


def floated(rng: random.Random, mask: Make) -> Make:
    return rng.choice(
        (
            mask,
            lambda m, n: torch.where(mask(m, n), 0.0, INF),
            lambda m, n: (1 - mask(m, n).float()) * LOWEST,
            lambda m, n: torch.zeros(m, n).masked_fill(mask(m, n), -1e9),
        )
    )


def is_true(said: Mask, mask: Tensor) -> bool:
    """Of a mask of known lengths."""
    allowed = mask if mask.dtype == torch.bool else mask == 0
    expected = torch.ones_like(allowed)
    return torch.equal(allowed, expected if said.ahead is None else expected.tril(said.ahead))


@pytest.mark.parametrize("seed", range(150))
def test_random_masks(seed: int) -> None:
    """Whatever is recognised for symbolic lengths is true of these."""
    rng = random.Random(seed)
    make = random_mask(rng)
    q_len, kv_len = rng.choice([(6, 6), (5, 8), (8, 5)])
    said = recognised(make, q_len, kv_len)
    if said is not None:
        lengths = [2, 3, 5, 8, 13]
        for m, n in [(a, a) for a in lengths] if q_len == kv_len else [(a, b) for a in lengths for b in lengths]:
            assert is_true(said, make(m, n)), (said, m, n)


def test_random_masks_are_recognised_often_enough_to_mean_something() -> None:
    said = [recognised(random_mask(random.Random(seed)), 6, 6) for seed in range(60)]
    assert said.count(CAUSAL) >= 3 and said.count(ALL) >= 3

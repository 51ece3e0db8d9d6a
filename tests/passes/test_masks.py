"""Masks that the graph itself computes: causal ones are recognised, whatever they are made of; nothing else is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import ACCURATE, TOLERANCE, Rewriter, assert_kept, assert_used, relative_error, rewritten
from torch import Tensor

from sagecompile import report
from sagecompile.decide import decide
from sagecompile.mask import Mask
from sagecompile.report import Report
from sagecompile.settings import Settings
from sagecompile.site import Device

N, INF = 24, float("-inf")
LOWEST = torch.finfo(torch.float32).min


def attend(make_mask: Callable[[int, int], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=make_mask(q.shape[2], k.shape[2]))


def qkv(q_len: int = N, kv_len: int = N) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 2, q_len, 16), torch.randn(2, 2, kv_len, 16), torch.randn(2, 2, kv_len, 16)


def fill_in_place(q_len: int, kv_len: int) -> Tensor:
    return torch.zeros(q_len, kv_len).masked_fill_(torch.ones(q_len, kv_len, dtype=torch.bool).triu(1), INF)


CAUSAL = {
    "tril of ones": lambda m, n: torch.ones(m, n, dtype=torch.bool).tril(),
    "not triu": lambda m, n: ~torch.ones(m, n, dtype=torch.bool).triu(1),
    "compared positions": lambda m, n: torch.arange(m)[:, None] >= torch.arange(n)[None],
    "compared the other way": lambda m, n: torch.arange(n)[None].le(torch.arange(m)[:, None]),
    "with batch and heads": lambda m, n: (torch.arange(m)[:, None] >= torch.arange(n))[None, None].expand(2, 1, m, n),
    "float, -inf": lambda m, n: torch.full((m, n), INF).triu(1),
    "float, the lowest value": lambda m, n: torch.full((m, n), LOWEST).triu(diagonal=1),
    "float, -1e9": lambda m, n: torch.triu(torch.ones(m, n), 1) * -1e9,
    "where": lambda m, n: torch.where(torch.arange(m)[:, None] < torch.arange(n), INF, 0.0),
    "masked_fill": lambda m, n: torch.zeros(m, n).masked_fill(torch.ones(m, n, dtype=torch.bool).triu(1), LOWEST),
    "1 - tril, scaled": lambda m, n: (1.0 - torch.ones(m, n).tril()) * LOWEST,
    "a window wider than the sequence": lambda m, n: (
        (torch.arange(m)[:, None] >= torch.arange(n)) & (torch.arange(m)[:, None] - torch.arange(n) < 1000)
    ),
    "masked_fill in place": fill_in_place,
    "PyTorch's own": lambda m, n: torch.nn.Transformer.generate_square_subsequent_mask(n),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_recognised_as_causal(name: str) -> None:
    backend = assert_used(attend(CAUSAL[name]), *qkv())
    assert backend.report.used[0].site.mask.is_causal
    assert "scaled_dot_product_attention" not in backend.targets


@pytest.mark.parametrize("q_len, kv_len", [(8, 24), (24, 8)])
def test_recognised_as_causal_top_left(q_len: int, kv_len: int) -> None:
    assert_used(attend(lambda m, n: torch.ones(m, n, dtype=torch.bool).tril()), *qkv(q_len, kv_len))


NOTHING_MASKED = {
    "all true": lambda m, n: torch.ones(m, n, dtype=torch.bool),
    "all zero": lambda m, n: torch.zeros(m, n),
    "broadcast": lambda m, n: torch.ones(2, 1, 1, n, dtype=torch.bool),
}


@pytest.mark.parametrize("name", NOTHING_MASKED)
def test_recognised_as_masking_nothing(name: str) -> None:
    backend = assert_used(attend(NOTHING_MASKED[name]), *qkv())
    assert not backend.report.used[0].site.mask.is_causal


def changed_through_a_view(m: int, n: int) -> Tensor:
    mask = torch.ones(m, n, dtype=torch.bool).tril()
    mask[3].fill_(True)
    return mask


def changed_afterwards(m: int, n: int) -> Tensor:
    mask = torch.ones(m, n, dtype=torch.bool).tril()
    mask[:, 0] = False
    mask[0] = True
    return mask


LOOKALIKES = {
    "sliding window": lambda m, n: (
        (torch.arange(m)[:, None] >= torch.arange(n)) & (torch.arange(m)[:, None] - torch.arange(n) < 4)
    ),
    "diagonal hidden too": lambda m, n: torch.ones(m, n, dtype=torch.bool).tril(-1) | torch.eye(m, n).bool(),
    "one diagonal less": lambda m, n: torch.ones(m, n, dtype=torch.bool).tril(-1),
    "anti-causal": lambda m, n: torch.ones(m, n, dtype=torch.bool).triu(),
    "prefix": lambda m, n: torch.ones(m, n, dtype=torch.bool).tril() | (torch.arange(n) < 5),
    "soft: -1 instead of -inf": lambda m, n: torch.full((m, n), -1.0).triu(1),
    "ALiBi": lambda m, n: torch.full((m, n), INF).triu(1) + 0.5 * torch.arange(n),
    "inverted": lambda m, n: torch.full((m, n), INF).tril(-1),
    "changed through a view": changed_through_a_view,
    "changed afterwards": changed_afterwards,
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_not_recognised(name: str) -> None:
    assert_kept(attend(LOOKALIKES[name]), *qkv(), because="mask ")


def test_a_random_mask_is_kept() -> None:
    _, backend = rewritten(attend(lambda m, n: torch.rand(m, n) > 0.5), *qkv())
    assert backend.report.kept[0].decision.reason.startswith("mask bool (24, 24)")


def test_a_mask_that_is_too_large_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagecompile.passes.masks.MAX_ELEMENTS", N * N - 1)
    assert_kept(attend(fill_in_place), *qkv(), because="mask float32 (24, 24)")


BEHIND = {
    "aligned to the end": (16, lambda m, n: torch.ones(m, n, dtype=torch.bool).tril(n - m)),
    "one diagonal more": (1, lambda m, n: torch.ones(m, n, dtype=torch.bool).tril(1)),
    "positions": (5, lambda m, n: torch.arange(n)[None] <= torch.arange(m)[:, None] + 5),
    "Llama's": (16, lambda m, n: torch.hstack([torch.zeros(m, n - m), torch.full((m, m), INF).triu(1)])),
}


@pytest.mark.parametrize("spelled", ["sdpa", "unfused"])
@pytest.mark.parametrize("name", BEHIND)
def test_causal_behind_a_context(name: str, spelled: str) -> None:
    ahead, make = BEHIND[name]

    def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, scores = make(q.shape[2], k.shape[2]), q @ k.mT / 4
        scores = scores.masked_fill(~mask, INF) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v

    backend = assert_used(attend(make) if spelled == "sdpa" else unfused, *qkv(8, 24))
    assert backend.report.used[0].site.mask == Mask(ahead)
    assert str(backend.report).splitlines()[1].split("float32")[1].strip().startswith(f"causal + {ahead} ")


@pytest.mark.parametrize("compile", ["rewritten", "Inductor"])
def test_a_chunk_behind_any_context(compile: str) -> None:
    """Lengths are symbols, and so is how far ahead a query sees: one graph, right at every length."""

    def chunk(q: Tensor, k: Tensor, v: Tensor, cached: tuple[Tensor, Tensor]) -> Tensor:
        k, v = (torch.cat(pair, 2) for pair in zip(cached, (k, v), strict=True))
        rows = torch.arange(q.shape[2])[:, None] + cached[0].shape[2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(k.shape[2])[None] <= rows)

    torch._dynamo.utils.counters.clear()
    backend: Any = Rewriter() if compile == "rewritten" else "sage_inductor"
    options = {} if compile == "rewritten" else {"options": {"sage.policy": "always"}}
    compiled = torch.compile(chunk, backend=backend, dynamic=True, **options)
    with report.recording() as reports:
        for tokens, context in ((9, 50), (30, 7), (12, 200)):
            cached = torch.randn(2, 2, 2, context, 16).unbind(0)
            q, k, v = qkv(tokens, tokens)
            actual, expected = compiled(q, k, v, cached), chunk(q, k, v, cached)
            assert relative_error(actual, expected) <= TOLERANCE[ACCURATE]
    assert not torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_bypass"]
    done = backend.report if compile == "rewritten" else sum(reports, Report())
    assert (len(done.used), len(done.kept)) == (1, 0) and not isinstance(done.used[0].site.mask.ahead, int)


def test_a_provider_without_an_offset_is_not_asked() -> None:
    site = replace(rewritten(attend(BEHIND["positions"][1]), *qkv())[1].report.used[0].site, device="cuda:0")
    device = Device("cuda", "NVIDIA A100", (8, 0))
    kept = decide(site, device, Settings(policy="always"), lambda *_: None)
    assert "mask causal + 5: triton needs none or causal" in kept.reason


def test_causal_for_part_of_the_batch_only() -> None:
    def half(m: int, n: int) -> Tensor:
        causal = torch.ones(m, n, dtype=torch.bool).tril()
        return torch.stack([causal, torch.ones_like(causal)])[:, None]

    assert_kept(attend(half), *qkv(), because="mask bool (2, 1, 24, 24)")


def test_a_causal_mask_with_the_padding_of_an_input_is_kept() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=torch.bool).tril() & valid[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert_kept(padded, *qkv(), torch.arange(N).expand(2, N) < 20, because="mask bool (2, 1, 24, 24)")


def test_a_formula_has_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed for what positions.py can read."""
    monkeypatch.setattr("sagecompile.passes.masks.MAX_ELEMENTS", 0)
    assert_used(attend(CAUSAL["tril of ones"]), *qkv())


WITHOUT_A_FORMULA = ("masked_fill in place",)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in WITHOUT_A_FORMULA])
def test_symbolic_lengths(name: str) -> None:
    if name == "a window wider than the sequence":  # not than every sequence
        assert_kept(attend(CAUSAL[name]), *qkv(), because="mask bool (s", dynamic=True)
    else:
        assert assert_used(attend(CAUSAL[name]), *qkv(), dynamic=True).report.used[0].site.mask.is_causal


@pytest.mark.parametrize("name", NOTHING_MASKED)
def test_symbolic_lengths_and_nothing_masked(name: str) -> None:
    assert not assert_used(attend(NOTHING_MASKED[name]), *qkv(), dynamic=True).report.used[0].site.mask.is_causal


@pytest.mark.parametrize("name", [*LOOKALIKES, *WITHOUT_A_FORMULA])
def test_symbolic_lengths_assume_nothing(name: str) -> None:
    assert_kept(attend({**LOOKALIKES, **CAUSAL}[name]), *qkv(), because="mask ", dynamic=True)


def test_one_graph_for_all_lengths() -> None:
    backend, fn = Rewriter(), attend(CAUSAL["compared positions"])
    compiled = torch.compile(fn, backend=backend, dynamic=True)
    for n in (N, 9, 63):
        inputs = qkv(n, n)
        assert relative_error(compiled(*inputs), fn(*inputs)) <= TOLERANCE[ACCURATE]
    assert len(backend.report.used) == 1


def test_a_change_of_the_scores_does_not_hide_the_mask() -> None:
    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores += torch.full((N, N), INF).triu(1)
        return scores.softmax(-1) @ v

    assert assert_used(eager, *qkv()).report.used[0].site.mask.is_causal


def test_forty_layers_compute_their_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sagecompile.passes import masks

    read = []
    original = masks.formulas
    monkeypatch.setattr(masks, "formulas", lambda node: read.append(node) or original(node))

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        for _ in range(40):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return q

    assert_used(layers, *qkv(), sites=40)
    assert len(read) == 1

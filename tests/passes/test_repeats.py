"""A repeat of the KV heads in front of K and V is undone, so that each is quantized once; other repeats are not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import assert_used
from torch import Tensor

B, H, KV, N, D = 2, 8, 2, 24, 16
Repeat = Callable[[Tensor], Tensor]


def qkv(kv_heads: int = KV) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, N, D), torch.randn(B, kv_heads, N, D), torch.randn(B, kv_heads, N, D)


def sdpa_on(repeat_k: Repeat, repeat_v: Repeat) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeat_k(k), repeat_v(v))


def eager_on(repeat_k: Repeat, repeat_v: Repeat) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: (q @ repeat_k(k).mT / 4).softmax(-1) @ repeat_v(v)


REPEATS: dict[str, Repeat] = {
    "as Transformers writes it": lambda x: x[:, :, None, :, :].expand(B, KV, H // KV, N, D).reshape(B, H, N, D),
    "short index": lambda x: x[:, :, None].expand(-1, -1, 4, -1, -1).reshape(B, -1, N, D),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(B, KV, 4, N, D).flatten(1, 2),
    "unsqueeze from the end": lambda x: x.unsqueeze(-3).expand(B, KV, 4, N, D).reshape(B, H, N, D),
    "repeat_interleave": lambda x: x.repeat_interleave(4, dim=1),
    "repeat_interleave, negative dim": lambda x: torch.repeat_interleave(x, 4, -3),
    "repeat_interleave, keywords": lambda x: torch.repeat_interleave(input=x, dim=1, repeats=4),
    "tokens first": lambda x: x.transpose(1, 2).repeat_interleave(4, dim=2).transpose(1, 2),
}


@pytest.mark.parametrize("attention", [sdpa_on, eager_on])
@pytest.mark.parametrize("name", REPEATS)
def test_undone(name: str, attention: Callable[..., Callable[..., Tensor]]) -> None:
    backend = assert_used(attention(REPEATS[name], REPEATS[name]), *qkv())
    site = backend.report.used[0].site
    assert (site.heads, site.kv_heads) == (H, KV)
    assert not {"repeat_interleave", "expand", "reshape", "flatten"} & set(backend.targets)


def test_one_head_expanded_to_all() -> None:
    expand = lambda x: x.expand(-1, H, -1, -1)  # noqa: E731
    assert assert_used(sdpa_on(expand, expand), *qkv(1)).report.used[0].site.kv_heads == 1


def test_two_spellings_of_one_repeat() -> None:
    fn = sdpa_on(REPEATS["unsqueeze"], REPEATS["repeat_interleave"])
    assert assert_used(fn, *qkv()).report.used[0].site.kv_heads == KV


def test_symbolic_lengths() -> None:
    def repeat(x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 4, n, d).reshape(b, h * 4, n, d)

    backend = assert_used(sdpa_on(repeat, repeat), *qkv(), dynamic=True)
    assert backend.report.used[0].site.kv_heads in (KV, H)  # heads may be symbolic here


LOOKALIKES: dict[str, Repeat] = {
    "heads in tile order": lambda x: x.repeat(1, 4, 1, 1),
    "heads in tile order by expand": lambda x: x[:, None].expand(B, 4, KV, N, D).reshape(B, H, N, D),
    "the tokens": lambda x: x.repeat_interleave(4, dim=1).repeat_interleave(2, dim=2),
    "a slice of the repeat": lambda x: x.repeat_interleave(5, dim=1)[:, :H],
    "some tokens only": lambda x: x[:, :, None, 3:].expand(B, KV, 4, N - 3, D).reshape(B, H, N - 3, D),
    "repeated by counts": lambda x: x.repeat_interleave(torch.tensor([3, 5]), dim=1, output_size=H),
    "merged in another order": lambda x: x.unsqueeze(3).expand(B, KV, N, 4, D).reshape(B, H, N, D),
    "merged into the tokens": lambda x: x.unsqueeze(3).expand(B, KV, N, 4, D).reshape(B, H, N, D).flip(1),
    "twice": lambda x: x[:, :, None].expand(B, KV, 4, N, D).reshape(B, H, N, D) * 1,
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_not_undone(name: str) -> None:
    backend = assert_used(sdpa_on(LOOKALIKES[name], LOOKALIKES[name]), *qkv())
    assert backend.report.used[0].site.kv_heads == H


def test_k_and_v_repeated_differently_are_not_undone() -> None:
    backend = assert_used(sdpa_on(REPEATS["unsqueeze"], LOOKALIKES["heads in tile order"]), *qkv())
    assert backend.report.used[0].site.kv_heads == H


def test_k_and_v_repeated_from_other_numbers_of_heads_are_not_undone() -> None:
    q, k, _ = qkv()
    fn = sdpa_on(lambda x: x.repeat_interleave(4, 1), lambda x: x.repeat_interleave(2, 1))
    assert assert_used(fn, q, k, torch.randn(B, 4, N, D)).report.used[0].site.kv_heads == H


@pytest.mark.parametrize("repeat", ["as Transformers writes it", "repeat_interleave"])
def test_an_original_that_is_changed_after_the_repeat_is_not_read(repeat: str) -> None:
    def changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide_k, wide_v = REPEATS[repeat](k), REPEATS[repeat](v)
        k.zero_()
        return F.scaled_dot_product_attention(q, wide_k, wide_v)

    assert assert_used(changed, *qkv()).report.used[0].site.kv_heads == H


def test_a_cache_written_before_the_repeat_is_read_after_it() -> None:
    def cached(q: Tensor, k_cache: Tensor, v_cache: Tensor, new: Tensor) -> Tensor:
        k_cache[:, :, 5:6] = new
        v_cache[:, :, 5:6] = new
        return sdpa_on(REPEATS["unsqueeze"], REPEATS["unsqueeze"])(q, k_cache, v_cache)

    backend = assert_used(cached, *qkv(), torch.randn(B, KV, 1, D))
    assert backend.report.used[0].site.kv_heads == KV

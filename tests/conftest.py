"""Fixtures for all tests: one seed, no gradient unless a test asks for it, and the devices a test runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import exact_attention, share_libraries

from sagecompile.cost import local
from sagecompile.kernels.call import Call
from sagecompile.ops import reference


@pytest.fixture(autouse=True, scope="session")
def measurements_of_the_tests_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `auto` measures goes to a folder of this run, and the user's own is not read; libraries are the user's."""
    folder = tmp_path_factory.mktemp("cache")
    share_libraries(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> Iterator[None]:
    """A fixed seed, and a Dynamo that remembers nothing of the test before."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield


@pytest.fixture(autouse=True)
def tests_beside_this_one_do_not_count() -> Iterator[None]:
    """They keep the CPU busy, on which nothing would be measured then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "waited_s", lambda: 0.0)
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU always, and a GPU under `-m gpu`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return str(request.param)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For modules, whose parameters need a gradient otherwise: `@pytest.mark.usefixtures("no_grad")`."""
    with torch.no_grad():
        yield


@pytest.fixture
def not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference without quantization, in float64, so that any other error shows, be it small."""

    def exactly(call: Call, out: torch.Tensor, *, format: str) -> None:
        prologues = call.q_prologue, call.k_prologue
        q, k = (x if p is None else p.apply(x) for x, p in zip((call.q, call.k), prologues, strict=True))
        out.copy_(exact_attention(q, k, call.v, scale=call.scale, is_causal=call.is_causal))

    monkeypatch.setattr(reference, "attention", exactly)

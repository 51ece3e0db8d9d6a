"""Fixtures for all tests: one seed, no gradient unless a test asks for it, and the devices a test runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> Iterator[None]:
    """A fixed seed, and a Dynamo that remembers nothing of the test before."""
    torch.manual_seed(0)
    torch._dynamo.reset()
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

"""C++ that is built while Python does the same job: never waited for, unless somebody asks to."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sagecompile.errors import UnsupportedError
from sagecompile.kernels import compiler
from sagecompile.kernels.compiler import Background


@pytest.fixture(autouse=True)
def others(monkeypatch) -> None:
    """None but those of the test."""
    monkeypatch.setattr(compiler, "_libraries", [])
    monkeypatch.setattr(compiler, "_begun", [])


class Building:
    """What a test holds up for as long as it likes."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.may_end, self.builds, self.loads, self.failure = threading.Event(), 0, 0, failure

    def build(self) -> Path:
        self.builds += 1
        assert self.may_end.wait(timeout=60)
        if self.failure:
            raise self.failure
        return Path("library.so")

    def load(self, path: Path) -> str:
        self.loads += 1
        return f"loaded {path}"


def test_nobody_waits_for_it():
    building = Building()
    library = Background(building.build, building.load, "slower")
    assert library.now() is None and library.now() is None
    building.may_end.set()
    compiler.settle()
    assert library.now() == library.now() == "loaded library.so"
    assert (building.builds, building.loads) == (1, 1)


def test_what_nobody_asked_for_is_not_built():
    building = Building()
    Background(building.build, building.load, "slower")
    compiler.settle()
    assert building.builds == 0


@pytest.mark.parametrize("failure", [UnsupportedError("no compiler"), OSError("no such library")])
def test_without_it_the_reason_is_said_once(caplog, failure):
    building = Building(failure)
    library = Background(building.build, building.load, "ten times as slow")
    building.may_end.set()
    assert library.now() is None
    compiler.settle()
    assert library.now() is None and library.now() is None
    (record,) = caplog.records
    assert record.message == f"ten times as slow: {failure}"


def test_many_threads_load_it_once():
    building = Building()
    library, begin = Background(building.build, building.load, "slower"), threading.Barrier(8)
    found = []

    def use() -> None:
        begin.wait()
        library.now()
        compiler.settle()
        found.append(library.now())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    building.may_end.set()
    for thread in threads:
        thread.join()
    assert found == ["loaded library.so"] * 8 and (building.builds, building.loads) == (1, 1)


def test_settled_is_what_was_begun_too():
    building = Building()
    begun = compiler.in_background(building.build)
    building.may_end.set()
    compiler.settle()
    assert begun.done()


def test_the_libraries_of_both_devices_are_such():
    from sagecompile.kernels.cpu.build import OPS_LIBRARY
    from sagecompile.kernels.hopper.relaunch import LIBRARY

    assert isinstance(OPS_LIBRARY, Background) and isinstance(LIBRARY, Background)

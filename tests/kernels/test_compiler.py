"""C++ that is built while Python does the same job: never waited for, unless somebody asks to."""

from __future__ import annotations

import os
import subprocess
import sys
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


@pytest.mark.parametrize(
    "failure", [UnsupportedError("no compiler"), OSError("no such library"), AttributeError("no such function")]
)
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


def test_many_threads_get_their_own():
    def same(number: int) -> int:
        return number

    found = {}

    def ask(number: int) -> None:
        for i in range(50):
            found[number, i] = compiler.in_background(same, 50 * number + i).result()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400 and all(value == 50 * number + i for (number, i), value in found.items())


def test_where_there_are_no_more_threads_it_is_done_at_once(monkeypatch):
    class Full:
        def submit(self, *_: object, **__: object) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(compiler, "_threads", Full())
    building = Building()
    building.may_end.set()
    library = Background(building.build, building.load, "slower")
    assert library.now() == "loaded library.so"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_builds_again_what_its_parent_was_at():
    """And what nobody has begun: the parent's threads are not there."""
    code = """
import os, threading
from pathlib import Path
from sagecompile.kernels import compiler
may_end = threading.Event()
unfinished = compiler.Background(lambda: may_end.wait() and Path("first.so"), str, "slower")
later = compiler.Background(lambda: Path("later.so"), str, "slower")
compiler.in_background(int).result()
unfinished.now()
child = os.fork()
may_end.set()
assert not child or os.waitpid(child, 0)[1] == 0
unfinished.now(), later.now()
compiler.settle()
print(unfinished.now(), later.now(), flush=True)
os._exit(0) if not child else None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["first.so", "later.so"] * 2, done.stderr

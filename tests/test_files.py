"""What we keep on disk: for this user alone, whole or not at all, built once for many processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sagecompile import files
from sagecompile.errors import UnsupportedError
from sagecompile.kernels import compiler

HAS_COMPILER = pytest.mark.skipif(compiler.why_none() is not None, reason=str(compiler.why_none()))
IS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="needs to be root, to give files to others")
NOBODY = 65534


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """Where all is kept, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files.warn_once.cache_clear()
    return tmp_path / "cache" / "sagecompile"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def built(name: str = "it.so", content: bytes = b"code") -> files.Built:
    return files.built("libraries", name, lambda: content)


class TestFolder:
    def test_is_in_the_users_cache(self, root, monkeypatch):
        assert files.folder("measured") == root / "measured" and not root.exists()
        for given in ("", "here"):  # a relative one is as none
            monkeypatch.setenv("XDG_CACHE_HOME", given)
            assert files.folder("cubins") == Path.home() / ".cache" / "sagecompile" / "cubins"

    @pytest.mark.parametrize("home", ["nobody's", "relative"])
    def test_without_a_home_is_this_processs_alone(self, monkeypatch, caplog, home):
        """Under a name that nobody can make beforehand."""
        import pwd

        def unknown(uid):
            raise KeyError(uid)

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(pwd, "getpwuid", unknown)
        monkeypatch.setenv("HOME", "here") if home == "relative" else monkeypatch.delenv("HOME")
        place = files.folder("libraries")
        assert place == files.folder("libraries") and mode(place.parent) == 0o700
        assert place.parent.name.startswith("sagecompile-") and place.parent.name != "sagecompile-"
        assert built().path.parent == place and "no home" in str(files.why_not_kept("libraries"))
        assert [record.message for record in caplog.records] == [files.NO_HOME]

    def test_without_a_home_is_gone_when_the_process_ends(self, tmp_path):
        """And that of its child then, too, which has one of its own."""
        code = (
            "import os; from sagecompile import files\n"
            "files._of_the_user = lambda: None\n"
            "files.write(files.folder('measured') / 'a.json', b'{}')\n"
            "child = os.fork()\n"
            "files.write(files.folder('measured') / 'a.json', b'{}')\n"
            "os.write(1, os.fsencode(files.folder('measured').parent) + b'\\n')\n"
            "child and os.waitpid(child, 0)\n"
            "assert (files.folder('measured') / 'a.json').exists()\n"
        )
        env = {**os.environ, "TMPDIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        folders = {Path(line) for line in done.stdout.split()}
        assert len(folders) == 2 and all(folder.parent == tmp_path and not folder.exists() for folder in folders)

    def test_says_why_nothing_can_be_kept(self, root, monkeypatch):
        assert files.why_not_kept("measured") is None and not list((root / "measured").iterdir())
        (root / "measured").chmod(0o777)
        assert "can be written to by others" in str(files.why_not_kept("measured"))
        (root / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "file"))
        assert "cannot be written to (Not a directory): set XDG_CACHE_HOME" in str(files.why_not_kept("measured"))


class TestModes:
    def test_folders_are_0700_and_files_0600(self, root, tmp_path):
        """Whatever the umask lets others do."""
        before = os.umask(0)
        try:
            files.write(files.folder("measured") / "a.json", b"{}")
            built()
        finally:
            os.umask(before)
        made = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
        assert {path.name for path in made} >= {"cache", "sagecompile", "measured", "libraries", "a.json", "it.so"}
        assert all(mode(path) == (0o700 if path.is_dir() else 0o600) for path in made)

    def test_what_others_may_read_is_closed_to_them(self, root):
        """As older versions made it."""
        (root / "measured").mkdir(parents=True)
        (root / "measured" / "a.json").write_text("{}")
        for path in (root, root / "measured"):
            path.chmod(0o755)
        assert files.read(root / "measured" / "a.json") == b"{}"
        assert mode(root) == mode(root / "measured") == 0o700


class TestCheck:
    @pytest.mark.parametrize("bits", [0o702, 0o720, 0o777])
    @pytest.mark.parametrize("place", ["", "libraries", "libraries/it.so"])
    def test_what_others_can_write_to_is_refused(self, root, place, bits):
        found = built().path
        (root / place).chmod(bits)
        with pytest.raises(UnsupportedError) as caught:
            built()
        said = str(caught.value)
        assert said.startswith(f"{root / place} can be written to by others (mode 0{bits:o})")
        assert f"rm -r {root / place}" in said and "XDG_CACHE_HOME" in said
        assert files.read(found) is None and mode(root / place) == bits, "nor is it closed now that it is too late"

    @IS_ROOT
    @pytest.mark.parametrize("place", ["", "libraries", "libraries/it.so"])
    def test_what_belongs_to_another_user_is_refused(self, root, place):
        built()
        os.chown(root / place, NOBODY, NOBODY)
        with pytest.raises(UnsupportedError, match=f"{root / place} belongs to user {NOBODY}, and this is user 0"):
            built()

    def test_nor_is_anything_written_there(self, root):
        root.mkdir(parents=True)
        root.chmod(0o777)
        with pytest.raises(UnsupportedError, match="can be written to by others"):
            files.write(root / "measured" / "a.json", b"{}")
        assert not list((root / "measured").iterdir())

    @IS_ROOT
    @pytest.mark.parametrize("whose", ["link", "target"])
    def test_a_link_of_or_to_another_user_is_refused(self, root, tmp_path, whose):
        (tmp_path / "there").mkdir(0o700)
        root.mkdir(0o700, parents=True)
        (root / "libraries").symlink_to(tmp_path / "there")
        os.chown(root / "libraries" if whose == "link" else tmp_path / "there", NOBODY, NOBODY, follow_symlinks=False)
        with pytest.raises(UnsupportedError, match=f"{root / 'libraries'} belongs to user {NOBODY}"):
            built()
        assert not list((tmp_path / "there").iterdir())

    def test_a_link_of_ours_to_a_folder_of_ours_is_used(self, root, tmp_path):
        (tmp_path / "there").mkdir(0o755)
        root.mkdir(0o700, parents=True)
        (root / "libraries").symlink_to(tmp_path / "there")
        built()
        assert (tmp_path / "there" / "it.so").exists() and mode(tmp_path / "there") == 0o700

    def test_a_system_without_users_is_not_asked(self, root, monkeypatch):
        built().path.chmod(0o666)
        monkeypatch.delattr(os, "getuid")
        assert built(content=b"other").content == b"code"

    def test_what_may_not_be_read_is_said_once(self, root, caplog):
        files.write(root / "profiles" / "a.json", b"{}")
        (root / "profiles").chmod(0o777)
        with caplog.at_level(logging.WARNING, "sagecompile"):
            assert files.read(root / "profiles" / "a.json") is None and files.of_kind("profiles") == []
        (record,) = caplog.records
        assert "is not used: remove it" in record.message


class TestWrite:
    def test_nobody_sees_half_of_it(self, root):
        file, contents = root / "measured" / "a.json", [bytes([i]) * 1_000_000 for i in range(4)]
        files.write(file, contents[0])
        is_over = threading.Event()

        def write(content: bytes) -> None:
            while not is_over.is_set():
                files.write(file, content)

        threads = [threading.Thread(target=write, args=(content,)) for content in contents]
        for thread in threads:
            thread.start()
        seen = {files.read(file) for _ in range(200)}
        is_over.set()
        for thread in threads:
            thread.join()
        assert seen <= set(contents) and [file.name for file in file.parent.iterdir()] == ["a.json"]

    def test_what_fails_leaves_what_was_there(self, root, monkeypatch):
        file = root / "measured" / "a.json"
        files.write(file, b"before")

        def refuse(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="No space"):
            files.write(file, b"after")
        assert file.read_bytes() == b"before" and [file.name for file in file.parent.iterdir()] == ["a.json"]

    def test_a_user_of_other_folders_only_sees_none(self, root):
        assert files.read(root / "measured" / "a.json") is None and files.of_kind("measured") == []
        assert not root.exists(), "to look makes nothing"


LIBRARY = r"""
#include <stdio.h>
#include <stdlib.h>
extern "C" int answer() { return 42; }
"""
BUILD = """
import ctypes, sys
from pathlib import Path
from sagecompile.kernels import compiler
print(ctypes.CDLL(str(compiler.library(Path(sys.argv[1]), "a test's library", []))).answer())
"""


class TestBuilt:
    def test_once(self, root):
        assert built() == files.Built(root / "libraries" / "it.so", b"code") == built(content=b"other")

    @pytest.mark.parametrize("damage", [b"", b"cod", b"code", b"x" * 36])
    def test_what_is_broken_is_set_aside_and_built_again(self, caplog, damage):
        path = built().path
        path.write_bytes(damage)
        with caplog.at_level(logging.WARNING, "sagecompile"):
            assert built(content=b"again").content == b"again" == built().content
        assert "it.so is not whole: set aside as it.bad" in caplog.text
        assert path.with_suffix(".bad").read_bytes() == damage

    @pytest.mark.parametrize("obstacle", ["file", "full"])
    def test_where_nothing_can_be_kept_it_is_built_for_this_process(self, root, monkeypatch, caplog, obstacle):
        if obstacle == "file":
            root.parent.write_text("")
        else:
            write = files.write

            def full(file, content):
                if file.is_relative_to(root):
                    raise OSError(28, "No space left on device")
                write(file, content)

            monkeypatch.setattr(files, "write", full)
        with caplog.at_level(logging.WARNING, "sagecompile"):
            found = built()
        assert found.content == b"code" and found.path.read_bytes().startswith(b"code")
        assert found.path.parent.parent.name.startswith("sagecompile-") and mode(found.path) == 0o600
        (record,) = caplog.records
        assert f"cannot be kept in {root / 'libraries'} (" in record.message

    def test_where_nothing_can_be_written_at_all_that_is_the_reason(self, monkeypatch):
        def full(file, content):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "write", full)
        with pytest.raises(UnsupportedError, match=r"cannot be written \(No space left on device\)"):
            built()

    def test_a_build_that_fails_leaves_nothing_and_holds_nobody_up(self, root):
        def fail():
            raise UnsupportedError("no such luck")

        with pytest.raises(UnsupportedError, match="no such luck"):
            files.built("libraries", "it.so", fail)
        assert not (root / "libraries" / "it.so").exists() and built().content == b"code"

    def test_another_that_takes_too_long_is_not_waited_for(self, monkeypatch):
        monkeypatch.setattr(files, "BUILD_LIMIT_S", 0.2)
        may_end, has_begun = threading.Event(), threading.Event()

        def slowly():
            has_begun.set()
            assert may_end.wait(60)
            return b"code"

        other = threading.Thread(target=files.built, args=("libraries", "it.so", slowly))
        other.start()
        assert has_begun.wait(60)
        assert built().content == b"code"
        may_end.set()
        other.join()

    @HAS_COMPILER
    def test_many_processes_build_a_library_once(self, tmp_path, root):
        """By a compiler that writes down each time that it builds, and takes its time."""
        (tmp_path / "answer.cpp").write_text(LIBRARY)
        log, cxx = tmp_path / "log", tmp_path / "cxx"
        cxx.write_text(
            '#!/bin/sh\ncase "$1" in --version) ;; *) '
            f'echo built >> {log}; sleep 1 ;; esac\nexec {compiler.get_cpp_compiler()} "$@"\n'
        )
        cxx.chmod(0o700)
        env = {**os.environ, "CXX": str(cxx)}
        command = [sys.executable, "-c", BUILD, str(tmp_path / "answer.cpp")]
        processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
        assert [process.communicate()[0].strip() for process in processes] == [b"42"] * 2
        assert log.read_text() == "built\n"
        (library,) = (root / "libraries").glob("*.so")
        assert mode(library) == 0o600


@HAS_COMPILER
class TestCompiler:
    @pytest.fixture
    def source(self, tmp_path, monkeypatch):
        """And the compiler's place, which the test writes."""
        from torch._inductor import config

        (tmp_path / "answer.cpp").write_text(LIBRARY)
        with config.patch({"cpp.cxx": (str(tmp_path / "cxx"),)}):
            yield tmp_path / "answer.cpp"

    def test_one_that_hangs_is_a_reason_in_time(self, source, monkeypatch):
        """With what it started, which has its output, too."""
        monkeypatch.setattr(files, "BUILD_LIMIT_S", 0.5)
        cxx = source.with_name("cxx")
        cxx.write_text('#!/bin/sh\n[ "$1" = --version ] || sleep 30\n')
        cxx.chmod(0o700)
        begun = time.perf_counter()
        with pytest.raises(UnsupportedError, match=r"answer\.cpp .* was stopped after 0\.5 s: .* set CXX"):
            compiler.library(source, "a test's library", [])
        assert time.perf_counter() - begun < 10
        assert not list(files.folder("libraries").glob("*.so"))

    def test_one_in_a_folder_of_others_is_a_reason(self, source, root):
        source.with_name("cxx").symlink_to("/usr/bin/g++")
        compiler.library(source, "a test's library", [])
        (root / "libraries").chmod(0o777)
        with pytest.raises(UnsupportedError, match=r"can be written to by others \(mode 0777\)"):
            compiler.library(source, "a test's library", [])

    def test_one_that_is_gone_is_a_reason(self, source):
        cxx = source.with_name("cxx")
        cxx.write_text("#!/bin/sh\n")
        cxx.chmod(0o700)
        assert compiler.why_none() is None
        cxx.unlink()
        with pytest.raises(UnsupportedError, match=r"cannot be run: .*No such file"):
            compiler.library(source, "a test's library", [])

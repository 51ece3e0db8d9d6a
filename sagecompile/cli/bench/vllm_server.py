"""A vLLM server in processes of its own, from its start to its end.

In: a model, vLLM's arguments, environment variables. Out: its address while it runs, its log, the memory it takes.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from sagecompile.errors import SageCompileError

COUNTS = re.compile(r"sagecompile: (\d+) of (\d+) tokens")
"""In the log, as vllm/counters.py writes it."""


@dataclass(frozen=True)
class Server:
    """One that answers."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def counts(self) -> tuple[int, int]:
        """Tokens that our kernels did, and all, by the last line that says it; zeros where none does."""
        found = COUNTS.findall(self.log.read_text(errors="replace"))
        return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)

    def memory_gib(self) -> float:
        """Resident in its processes; on a GPU, used on the first that nvidia-smi lists."""
        kib = sum(_resident_kib(pid) for pid in _tree(self.process.pid))
        return (_used_on_gpu_mib() << 10 or kib) / 2**20


@contextmanager
def serving(
    model: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path, patience_s: float = 900
) -> Iterator[Server]:
    """Start, wait until it answers, and end it. Raises SageCompileError with the end of its log if it does not."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environment)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        end = time.monotonic() + patience_s
        while not _answers(server.url):
            if process.poll() is not None or time.monotonic() > end:
                last = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                raise SageCompileError(f"the server did not start; {' '.join(command)} said\n{last}")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _tree(pid: int) -> list[int]:
    """A process and all that it started, on Linux."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        started = [int(child) for child in children.read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(below for child in started for below in _tree(child))]


def _resident_kib(pid: int) -> int:
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has ended
        return 0
    return int(found[1]) if found else 0


def _used_on_gpu_mib() -> int:
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):  # no GPU, or none that it knows
        return 0

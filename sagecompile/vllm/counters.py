"""How much of a server's work goes through our kernels, as it says in its log.

In: each batch, and each request that a kernel of ours did in a layer. Out: `Counts`, and a line in vLLM's log whenever
they have changed within `INTERVAL_S` seconds, like vLLM's own of its throughput.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

logger = logging.getLogger("vllm.sagecompile")
INTERVAL_S = 10.0


@dataclass
class Counts:
    """Of this process."""

    seen: Counter[str] = field(default_factory=Counter)
    """Tokens of all batches, by the group of layers that they were planned for; decodes in CUDA graphs among them."""
    done: Counter[str] = field(default_factory=Counter)
    """Tokens that our kernels did, by layer."""

    def line(self) -> str:
        """What the log says."""
        seen, done = (max(tokens.values(), default=0) for tokens in (self.seen, self.done))
        share = 100 * done / max(1, seen)
        return f"sagecompile: {done} of {seen} tokens ({share:.1f}%) by our kernels in {len(self.done)} layers"


counts = Counts()


def count(layer: str, tokens: int) -> None:
    """A kernel of ours did so many tokens in a layer."""
    counts.done[layer] += tokens


def count_batch(group: str, tokens: int) -> None:
    """A batch is about to run."""
    _start_saying()
    counts.seen[group] += tokens


@cache
def _start_saying() -> None:
    threading.Thread(target=_say, name="sagecompile counters", daemon=True).start()


def _say() -> None:
    said = ""
    while True:
        time.sleep(INTERVAL_S)
        if counts.line() != said:
            said = counts.line()
            logger.info(said)

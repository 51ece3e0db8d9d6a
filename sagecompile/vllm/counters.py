"""How much of a server's work goes through our kernels, as it says in its log.

In: each batch, and each request that a kernel of ours did in a layer. Out: `Counts`, and a line in vLLM's log when they
have changed, at most every `INTERVAL_S` seconds and at the end of the process.
"""

from __future__ import annotations

import multiprocessing.util
import time
from collections import Counter
from dataclasses import dataclass, field

from vllm.logger import init_logger

logger = init_logger("vllm.sagecompile")
INTERVAL_S = 10.0


@dataclass
class Counts:
    """Of this process."""

    tokens: int = 0
    """In all batches."""
    planned: int = 0
    """Of these, those of requests that a plan gave to our kernels."""
    done: Counter[str] = field(default_factory=Counter)
    """Tokens that our kernels did, by layer."""
    said: int = 0
    """`tokens` at the last line in the log."""
    said_at: float = 0.0

    def line(self) -> str:
        """What the log says."""
        layers = len(self.done)
        share = 100 * self.planned / max(1, self.tokens)
        return f"sagecompile: {self.planned} of {self.tokens} tokens ({share:.1f}%) by our kernels in {layers} layers"


counts = Counts()


def count(layer: str, tokens: int) -> None:
    """A kernel of ours did so many tokens in a layer."""
    counts.done[layer] += tokens


def count_batch(tokens: int, planned: int) -> None:
    """A batch was planned."""
    counts.tokens += tokens
    counts.planned += planned
    if time.monotonic() - counts.said_at >= INTERVAL_S:
        say()


def say() -> None:
    """Write the line, if there is anything new in it."""
    if counts.tokens > counts.said:
        counts.said, counts.said_at = counts.tokens, time.monotonic()
        logger.info(counts.line())


# Also in vLLM's own processes, which end without atexit.
multiprocessing.util.Finalize(None, say, exitpriority=1)

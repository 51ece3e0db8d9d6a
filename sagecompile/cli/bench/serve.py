"""The same requests to two vLLM servers, one after the other: without us, and with the pass.

In: a model, the lengths of the prompts, how many requests and how many at a time; vLLM's own arguments after `--`. Out:
a row a server: time to the first token, between tokens, tokens a second, memory, the share of tokens that our kernels
did, and how many answers are alike to the token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sagecompile.errors import OptionError

from .session import device_of, require, results
from .vllm_server import Server, serving

PARTITION = {"use_inductor_graph_partition": True}
PASS = PARTITION | {"inductor_passes": {"post_grad_custom_post_pass": "sagecompile.vllm_pass"}}
WITHOUT, WITH = "vllm", "vllm, sagecompile"
COMPILATION = {WITHOUT: PARTITION, WITH: PASS}
"""Alike but for the pass."""
SETTLE_S = 11
"""Until the counters of the last batches are in the log."""


@dataclass(frozen=True)
class Answer:
    """One request, timed by the client."""

    length: int
    """Of the prompt."""
    tokens: tuple[int, ...]
    at: tuple[float, ...]
    """Seconds from the request to each token."""


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments)
    if arguments.plot:
        require("matplotlib", "--plot")
    refuse_compilation(arguments.rest)
    require("vllm", "bench serve")
    prompts = make_prompts(arguments.lengths, arguments.requests, arguments.vocabulary, arguments.seed)
    answers: dict[str, list[Answer]] = {}
    with results(arguments, device) as found, tempfile.TemporaryDirectory() as folder:
        found |= {"model": arguments.model, "vllm_arguments": arguments.rest, "policy": arguments.policy}
        found |= {"concurrency": arguments.concurrency, "lengths": arguments.lengths}
        print(HEADER)
        for what, compilation in COMPILATION.items():
            ours = ["--compilation-config", json.dumps(compilation)]
            environment = {"SAGECOMPILE_POLICY": arguments.policy}
            log = (arguments.logs or Path(folder)) / f"{what.replace(', ', '-')}.log"
            with serving(arguments.model, [*arguments.rest, *ours], environment, log) as server:
                warm = make_prompts(arguments.lengths, 2 * len(arguments.lengths), arguments.vocabulary, -1)
                asyncio.run(replay(server, arguments.model, warm, arguments.output_length, arguments.concurrency))
                time.sleep(SETTLE_S)
                done_before, seen_before = server.counts()
                start = time.perf_counter()
                answers[what], peak = asyncio.run(
                    replay(server, arguments.model, prompts, arguments.output_length, arguments.concurrency)
                )
                seconds = time.perf_counter() - start
                time.sleep(SETTLE_S)
                done, seen = server.counts()
            share = (done - done_before) / (seen - seen_before) if seen > seen_before else 0.0
            row = {"what": what} | figures(answers[what], seconds) | {"peak_gib": round(peak, 2), "share": share}
            row["alike"] = sum(a.tokens == b.tokens for a, b in zip(answers[what], answers[WITHOUT], strict=True))
            found["rows"].append(row | {"ttft_by_length": [(one.length, one.at[0]) for one in answers[what]]})
            print(_render(row, len(prompts)), flush=True)
    if arguments.plot:
        plot(found["rows"], f"{arguments.model} on {found['device']}", arguments.plot)
    return 0


def refuse_compilation(given: Sequence[str]) -> None:
    """Raises OptionError for a compilation config among vLLM's arguments: each server has one of ours."""
    for argument in given:
        if argument.replace("_", "-").startswith(("--compilation-config", "-cc")):
            raise OptionError(f"{argument}: bench serve gives each server its own; leave it out of what follows --")


def make_prompts(lengths: Sequence[int], count: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random tokens, so that no prefix is shared; the lengths in turn."""
    chosen = random.Random(seed)
    return [[chosen.randrange(vocabulary) for _ in range(lengths[i % len(lengths)])] for i in range(count)]


async def replay(
    server: Server, model: str, prompts: Sequence[Sequence[int]], output_length: int, concurrency: int
) -> tuple[list[Answer], float]:
    """All prompts, `concurrency` at a time in their order, and the most memory that was seen, in GiB."""
    peak, gate = server.memory_gib(), asyncio.Semaphore(concurrency)
    async with require("httpx", "bench serve").AsyncClient(base_url=server.url, timeout=None) as client:

        async def one(prompt: Sequence[int]) -> Answer:
            async with gate:
                return await ask(client, model, prompt, output_length)

        waiting = asyncio.gather(*map(one, prompts))
        while not waiting.done():
            peak = max(peak, await asyncio.to_thread(server.memory_gib))
            await asyncio.wait([waiting], timeout=1.0)
        return await waiting, peak


async def ask(client: Any, model: str, prompt: Sequence[int], output_length: int) -> Answer:
    """One streamed completion, greedy."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": output_length, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
    tokens: list[int] = []
    at: list[float] = []
    start = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                new = json.loads(line[6:])["choices"][0].get("token_ids") or []
                tokens += new
                at += [time.perf_counter() - start] * len(new)
    return Answer(len(prompt), tuple(tokens), tuple(at))


def figures(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Milliseconds to the first token and between tokens, and tokens a second, of prompts and in all."""
    first = sorted(1e3 * one.at[0] for one in answers)
    between = sorted(1e3 * (b - a) for one in answers for a, b in pairwise(one.at)) or [0.0]
    read, written = sum(one.length for one in answers), sum(len(one.tokens) for one in answers)
    return {
        "ttft_ms": statistics.median(first),
        "ttft_p99_ms": _p99(first),
        "itl_ms": statistics.median(between),
        "itl_p99_ms": _p99(between),
        "prompt_tokens_per_s": read / seconds,
        "tokens_per_s": (read + written) / seconds,
    }


def _p99(ordered: Sequence[float]) -> float:
    """What at most one in a hundred is above."""
    return ordered[math.ceil(0.99 * len(ordered)) - 1]


HEADER = (
    f"{'server':18} {'ttft ms':>9} {'p99':>9} {'itl ms':>8} {'p99':>8} {'tokens/s':>9} {'GiB':>7} {'ours':>6}  alike"
)


def _render(row: dict[str, Any], requests: int) -> str:
    times = f"{row['ttft_ms']:9.1f} {row['ttft_p99_ms']:9.1f} {row['itl_ms']:8.2f} {row['itl_p99_ms']:8.2f}"
    rest = f"{row['tokens_per_s']:9.0f} {row['peak_gib']:7.2f} {100 * row['share']:5.1f}%  {row['alike']}/{requests}"
    return f"{row['what']:18} {times} {rest}"


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Time to the first token by the length of the prompt, a point a request."""
    sheet = require("matplotlib.figure", "--plot").Figure(figsize=(7, 4.5), layout="constrained")
    axes = sheet.subplots()
    for shift, row in zip((0.98, 1.02), rows, strict=True):
        lengths, seconds = zip(*row["ttft_by_length"], strict=True)
        axes.scatter([shift * x for x in lengths], [1e3 * s for s in seconds], s=12, alpha=0.6, label=row["what"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("time to the first token, ms")
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    sheet.savefig(path)

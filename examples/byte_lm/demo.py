"""The main job on a real model: compile a trained byte-level Llama with `sage_inductor`; what it costs and gains.

In: the trained weights beside this file and text they never saw. Out: the report of every attention call, bits per byte
with SDPA and with each format, and the time of each against plain Inductor.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from sagecompile import explain
from sagecompile.cost.timer import interleaved_median_us
from sagecompile.formats import FORMATS
from sagecompile.report import recording

HERE = Path(__file__).resolve().parent
CONTEXT = 2048
BLOCKS = 8
"""Blocks of CONTEXT bytes to score."""


class NextByte(torch.nn.Module):
    """Bytes (batch, tokens) to the logits of the byte behind each, (batch, tokens, 256)."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=text, use_cache=False).logits


def bits_per_byte(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """Mean over blocks (n, CONTEXT + 1): each byte predicted from those before it in its block."""
    nats = [F.cross_entropy(model(block[None, :-1])[0].float(), block[1:]).item() for block in blocks]
    return sum(nats) / len(nats) / math.log(2)


def say(text: str = "") -> None:
    print(text, flush=True)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (HERE / "model" / "model.safetensors").exists():
        say(f"no weights in {HERE / 'model'}: run train.py there first")
        return 1
    text = torch.frombuffer(bytearray((HERE / "heldout.txt").read_bytes()), dtype=torch.uint8).long()
    blocks = text[: BLOCKS * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT).to(device)
    model = NextByte(LlamaForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)).eval().to(device)
    say(f"A byte-level Llama, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}.")
    say(f"Text it never saw: {blocks.shape[0]} blocks of {CONTEXT} bytes of Jane Austen's Persuasion.\n")

    say("1. Every attention call, and what policy=auto, the default, does with it:\n")
    say(str(explain(model, blocks[:1, :-1])))

    say("\n2. Compile and score it, once with plain Inductor and once each way with sage_inductor:\n")
    ways = {"inductor": torch.compile(model, backend="inductor")}
    ways["sage_inductor, policy=auto"] = torch.compile(model, backend="sage_inductor")
    for format in FORMATS:
        options = {"sage.policy": "always", "sage.formats": format}
        ways[f"sage_inductor, {format}"] = torch.compile(model, backend="sage_inductor", options=options)
    bits, run_by = {}, {}
    for name, compiled in ways.items():
        with recording() as reports:
            bits[name] = bits_per_byte(compiled, blocks)
        run_by[name] = ", ".join({e.decision.provider for report in reports for e in report.used}) or "SDPA"
        say(f"   {name}: {bits[name]:.4f} bits per byte")

    say(f"\n3. Time for one block of {CONTEXT} bytes, interleaved medians:\n")
    runs = {name: partial(compiled, blocks[:1, :-1]) for name, compiled in ways.items()}
    times = interleaved_median_us(runs, device, budget_s=10)
    base = "inductor"
    say(f"   {'':32} {'attention':10} {'bits/byte':>9} {'change':>8} {'ms':>8} {'speed':>7}")
    for name in ways:
        change, speed = bits[name] / bits[base] - 1, times[base] / times[name]
        figures = f"{bits[name]:9.4f} {change:+8.2%} {times[name] / 1000:8.1f} {speed:6.2f}x"
        say(f"   {name:32} {run_by[name]:10} {figures}")

    if "reference" in run_by.values():
        say(
            "\npolicy=always uses a format wherever it is legal, here also by the reference: the specification in plain"
        )
        say("torch, not fast. policy=auto, the default, uses only what was measured to win on this device.")
    say("\nNext: `sagecompile doctor` says what this machine can run; for a model of your own,")
    say('   model = torch.compile(model, backend="sage_inductor")')
    say("   with torch.no_grad():")
    say("       print(sagecompile.explain(model, *inputs))")
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())

"""Whole encoders under `sage_inductor` against `inductor`: are they faster by what their share of attention predicts?

In: random models of BERT-base's and ViT-B/16's shape. Out: a table with the time of each, the speed, what the share of
SDPA in the model and the kernel's own speed at that shape predict, and the difference between the outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from sagecompile.cost.timer import interleaved_median_us
from sagecompile.ops import attention
from sagecompile.report import Report, recording

LAYERS, HEADS, HEAD_DIM = 12, 12, 64
"""Of both models."""


def bert(batch: int, tokens: int) -> tuple[torch.nn.Module, torch.Tensor]:
    return BertModel(BertConfig(max_position_embeddings=1024)), torch.randint(0, 30000, (batch, tokens))


def vit(batch: int, tokens: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """`tokens` is a square plus the class token: 577 is an image of 384 x 384."""
    side = int((tokens - 1) ** 0.5) * 16
    return ViTModel(ViTConfig(image_size=side)), torch.randn(batch, 3, side, side)


CASES: dict[str, tuple[Callable[[int, int], tuple[torch.nn.Module, torch.Tensor]], int, int]] = {
    "BERT-base, 2 x 1024 tokens": (bert, 2, 1024),
    "ViT-B/16, 1 x 577 tokens": (vit, 1, 577),
    "BERT-base, 1 x 32 tokens": (bert, 1, 32),
}


def predicted_speed(report: Report, model_us: float, batch: int, tokens: int) -> float:
    """1 where nothing was rewritten; else from the time of SDPA and of the op that replaced it, measured alone."""
    if not report.used:
        return 1.0
    use = report.used[0].decision
    q, k, v = torch.randn(3, batch, tokens, HEADS, HEAD_DIM).transpose(2, 3)
    alone = interleaved_median_us(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
            "ours": lambda: attention(
                q, k, v, scale=None, ahead=None, format=use.format, provider=use.provider, tokens_first=True
            ),
        },
        "cpu",
    )
    return model_us / (model_us - LAYERS * (alone["sdpa"] - alone["ours"]))


def main() -> None:
    print(f"{'':28} {'inductor ms':>11} {'ours ms':>8} {'speed':>6} {'predicted':>9} {'difference':>10}  decisions")
    rows = []
    for name, (make, batch, tokens) in CASES.items():
        torch.manual_seed(0)
        model, inputs = make(batch, tokens)
        ways = {backend: torch.compile(model.eval(), backend=backend) for backend in ("inductor", "sage_inductor")}
        with recording() as reports:
            expected, actual = (compiled(inputs)[0] for compiled in ways.values())
        report = sum(reports, start=Report(graphs=0))
        runs = {backend: partial(compiled, inputs) for backend, compiled in ways.items()}
        times = interleaved_median_us(runs, "cpu", budget_s=10.0)
        base, ours = times["inductor"], times["sage_inductor"]
        difference = float((actual - expected).norm() / expected.norm())
        predicted = predicted_speed(report, base, batch, tokens)
        figures = f"{base / 1e3:11.1f} {ours / 1e3:8.1f} {base / ours:6.2f} {predicted:9.2f} {difference:10.5f}"
        print(f"{name:28} {figures}  {report.summary()}", flush=True)
        rows.append({"case": name, "speed": round(base / ours, 3), "predicted": round(predicted, 3)})
    print(json.dumps(rows))


if __name__ == "__main__":
    with torch.inference_mode():
        main()

"""Time attention: every format and provider against SDPA on the same inputs in the same run, each beside its error.

Lengths are q_len = kv_len; the batch fills up to --tokens tokens in all. Times are end to end, quantization included.
The error is the relative L2 error against float64 on a sample of the queries, for N(0,1) inputs with a bias of 3 on K.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagecompile.errors import SageCompileError

if TYPE_CHECKING:
    import torch

HELP = "time attention against SDPA, each figure beside its error"
SAMPLED_QUERIES = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["attention"])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--lengths", type=_integers, default=[512, 1024, 2048, 4096], help="comma-separated")
    parser.add_argument("--head-dims", type=_integers, default=[64, 128], help="comma-separated")
    parser.add_argument("--heads", type=int, default=None, help="default: 2048 / head_dim on a GPU, 8 on a CPU")
    parser.add_argument("--tokens", type=int, default=None, help="in all; default 16384 on a GPU, 1 sequence on a CPU")
    parser.add_argument("--dtypes", type=_names, default=["bfloat16"], help="of float16, bfloat16 (default), float32")
    parser.add_argument(
        "--reference", action="store_true", help="time the plain-torch reference as well, which is slow"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON as well")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write what `policy=auto` reads for this device")


def _integers(text: str) -> list[int]:
    try:
        numbers = [int(item) for item in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: needs numbers from 1 on, such as 512,1024")
    return numbers


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - {"float16", "bfloat16", "float32"}:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: can be float16, bfloat16, float32")
    return names


def run(arguments: argparse.Namespace) -> int:
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SageCompileError(
            f"--device {device}: torch sees no CUDA GPU here; `sagecompile doctor` says what there is"
        )
    shape_header = f"{'dtype':8} {'head_dim':>8} {'causal':>6} {'length':>6} {'batch':>5}"
    print(f"{shape_header}  {'what':28} {'us':>10} {'TFLOP/s':>8} {'ratio':>6} {'error':>7}")
    rows = []
    shapes = product(arguments.dtypes, arguments.head_dims, (False, True), arguments.lengths)
    for dtype, head_dim, is_causal, length in shapes:
        for row in _measure(arguments, device, dtype, head_dim, is_causal, length):
            rows.append(row)
            print(_render_row(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(_machine(device) | {"rows": rows}, indent=1) + "\n")
    if arguments.profile:
        arguments.profile.write_text(render_profile(profile(_machine(device), rows)))
    print(json.dumps({"device": _machine(device)["device"], "rows": len(rows)}))
    return 0


def _render_row(row: dict[str, Any]) -> str:
    causal = "yes" if row["is_causal"] else "no"
    shape = f"{row['dtype']:8} {row['head_dim']:8} {causal:>6} {row['length']:6} {row['batch']:5}"
    return f"{shape}  {row['what']:28} {row['us']:10.1f} {row['tflops']:8.2f} {row['ratio']:6.2f} {row['error']:7.4f}"


def _measure(
    arguments: argparse.Namespace, device: str, dtype_name: str, head_dim: int, is_causal: bool, length: int
) -> Iterator[dict[str, Any]]:
    """One shape: SDPA first, then every format and provider that can run it."""
    import torch
    import torch.nn.functional as F

    from sagecompile.cost.timer import interleaved_median_us
    from sagecompile.formats import PROVIDERS
    from sagecompile.kernels import available
    from sagecompile.ops import attention
    from sagecompile.site import AttentionSite

    on_gpu = device.startswith("cuda")
    heads = arguments.heads or (max(1, 2048 // head_dim) if on_gpu else 8)
    batch = max(1, (arguments.tokens or (16384 if on_gpu else length)) // length)
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, heads, length, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    k += 3 * torch.randn((1, heads, 1, head_dim), generator=generator, device=device).to(dtype)
    calls: dict[str, Any] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)}
    site = AttentionSite(
        *("bench", "", "sdpa", batch, heads, heads, length, length, head_dim, head_dim, dtype_name, str(q.device)),
        is_causal=is_causal,
    )
    for provider in PROVIDERS.values():
        offered = q.device.type in provider.devices and (arguments.reference or provider.name != "reference")
        for format in provider.formats if offered else ():
            if available.refusal(site, format, provider.name, cuda_graphs=False) is None:
                calls[f"{format} {provider.name}"] = lambda f=format, p=provider.name: attention(
                    q, k, v, scale=None, is_causal=is_causal, format=f, provider=p, tokens_first=False
                )
    flops = 4 * batch * heads * length * length * head_dim / (2 if is_causal else 1)
    with torch.inference_mode():
        times = interleaved_median_us(calls, q.device.type)
        for what, us in times.items():
            yield {
                "what": what,
                "head_dim": head_dim,
                "is_causal": is_causal,
                "length": length,
                "batch": batch,
                "heads": heads,
                "dtype": dtype_name,
                "us": round(us, 2),
                "tflops": round(flops / us * 1e-6, 3),
                "ratio": round(times["sdpa"] / us, 4),
                "error": round(_error(calls[what](), q, k, v, is_causal), 5),
            }


def _error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> float:
    """Of evenly spaced queries of the first head of the first sequence, against float64."""
    import torch

    length = q.shape[2]
    rows = torch.linspace(0, length - 1, min(length, SAMPLED_QUERIES), device=q.device).long()
    scores = q[0, 0, rows].double() @ k[0, 0].double().mT * q.shape[3] ** -0.5
    if is_causal:
        scores.masked_fill_(torch.arange(length, device=q.device) > rows[:, None], float("-inf"))
    expected = scores.softmax(-1) @ v[0, 0].double()
    return float((out[0, 0, rows].double() - expected).norm() / expected.norm())


def _machine(device: str) -> dict[str, Any]:
    import torch

    from sagecompile.kernels import available

    return {
        "schema": 1,
        "device": available.device(device).name,
        "torch": torch.__version__,
        "triton": available.version("triton"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def profile(machine: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `sagecompile.cost` reads: for each format, provider, head dim and causality the speed-up at each length."""
    groups: dict[tuple[Any, ...], list[list[float]]] = {}
    for row in rows:
        if row["what"] != "sdpa":
            key = (*row["what"].split(), row["head_dim"], row["is_causal"], row["dtype"], row["heads"])
            groups.setdefault(key, []).append([row["length"], round(row["ratio"], 3)])
    return machine | {
        "rows": [
            {
                "format": format,
                "provider": provider,
                "head_dim": head_dim,
                "is_causal": is_causal,
                "dtypes": [dtype],
                "min_batch_heads": heads,
                "speedup_at_length": found,
            }
            for (format, provider, head_dim, is_causal, dtype, heads), found in groups.items()
        ]
    }


def render_profile(found: dict[str, Any]) -> str:
    """JSON with one row a line, so that a new measurement can be read as a diff."""
    head = json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in found["rows"])
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'

"""What the tests share: how an error is measured and what it may be, how to compile something and see what was done.

In: a function and its inputs. Out: its output and the Report; `compiled` goes through Inductor, `rewritten` does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true as known
from torch.utils._pytree import tree_leaves, tree_map_only

from sagecompile import files, passes, report
from sagecompile.backend import decider, fusing
from sagecompile.report import Report
from sagecompile.settings import Settings

ACCURATE, FAST = "qk_int8_pv_fp16", "qk_int8_pv_fp8"

# Relative L2 error, ||actual - expected|| / ||expected||, against float64 attention, for N(0,1) q, k, v and a bias of 3
# on every channel of k.
TOLERANCE = {ACCURATE: 0.02, FAST: 0.045}

# The same metric between two computations that are both not quantized, in the dtype of the inputs.
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def share_libraries(cache: Path) -> None:
    """Give a folder for $XDG_CACHE_HOME the libraries of the present one, so that no test builds them again."""
    if files.why_not_kept("libraries") is None:
        (cache / "sagecompile").mkdir(0o700)
        (cache / "sagecompile" / "libraries").symlink_to(files.folder("libraries").resolve())


def relative_error(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected|| over all elements in float64, those of a tuple's or dict's tensors together.

    Infinite if a NaN or Inf is on one side only; where it is on both sides, the place does not count.
    """
    a = torch.cat([leaf.detach().cpu().double().flatten() for leaf in tree_leaves(actual) if torch.is_tensor(leaf)])
    e = torch.cat([leaf.detach().cpu().double().flatten() for leaf in tree_leaves(expected) if torch.is_tensor(leaf)])
    assert a.shape == e.shape, f"{tuple(a.shape)} and {tuple(e.shape)} elements"
    finite = e.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(e.isnan(), a.isnan()):
        return float("inf")
    a, e = a[finite], e[finite]
    return float((a - e).norm() / e.norm().clamp_min(1e-300)) if e.numel() else 0.0


def exact_attention(
    q: Any, k: Any, v: Any, scale: float | None = None, is_causal: bool = False, causal_offset: int = 0
) -> torch.Tensor:
    """In float64, spelled out; q (B, H, Nq, D), k and v (B, Hkv, Nk, D); causal: query i sees keys j <= i + offset."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (scale if scale is not None else q.shape[-1] ** -0.5)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + causal_offset)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v


def compiled(
    fn: Callable[..., Any],
    *args: Any,
    policy: str = "always",
    formats: Iterable[str] | None = None,
    options: dict[str, Any] | None = None,
    call_kwargs: dict[str, Any] | None = None,
    **compile_kwargs: Any,
) -> tuple[Any, Report]:
    """What `torch.compile(fn, backend="sage_inductor")` returns for `args`, and the Report of all its graphs."""
    options = {"sage.policy": policy, **({"sage.formats": tuple(formats)} if formats else {}), **(options or {})}
    torch._dynamo.reset()
    with report.recording() as reports:
        out = torch.compile(fn, backend="sage_inductor", options=options, **compile_kwargs)(
            *args, **(call_kwargs or {})
        )
    return out, sum(reports, Report(graphs=0))


def _layouts_of_results(graph: fx.Graph) -> list[tuple[list[Any], list[Any]]]:
    """Sizes and strides of each tensor that the graph returns."""
    found = [node.meta.get("example_value") for node in graph.output_node().all_input_nodes]
    tensors = [leaf for leaf in tree_leaves(found) if torch.is_tensor(leaf) and leaf.layout == torch.strided]
    return [([*x.shape], [*x.stride()]) for x in tensors]


def _assert_same_layouts(before: Any, after: Any) -> None:
    """Strides of dims that have one element may differ."""
    for (sizes, strides), (_, others) in zip(before, after, strict=True):
        assert all(known(n == 1) or known(a == b) for n, a, b in zip(sizes, strides, others, strict=True)), (
            sizes,
            strides,
            others,
        )


class Rewriter:
    """A torch.compile backend that runs our passes and then the graph as it is: fast, and the graph can be read."""

    def __init__(self, formats: Iterable[str] = (ACCURATE,), policy: str = "always") -> None:
        settings = Settings(policy=policy, formats=tuple(formats))
        self.decide, self.fusing = decider(settings, cuda_graphs=False), fusing(settings)
        self.graphs: list[fx.GraphModule] = []
        self.before: list[list[str]] = []
        self.report = Report(graphs=0)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.before.append([node.format_node() or "" for node in gm.graph.nodes])
        layouts = _layouts_of_results(gm.graph)
        self.report += passes.run(gm, self.decide, self.fusing)
        gm.graph.lint()
        _assert_same_layouts(layouts, _layouts_of_results(gm.graph))
        self.graphs.append(gm)
        return gm.forward

    @property
    def targets(self) -> list[str]:
        """Names of the calls in the graphs afterwards, in order."""
        calls = [node for gm in self.graphs for node in gm.graph.nodes if node.op.startswith("call")]
        return [getattr(node.target, "__name__", str(node.target)) for node in calls]


def rewritten(
    fn: Callable[..., Any],
    *args: Any,
    call_kwargs: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    **how: Any,
) -> tuple[Any, Rewriter]:
    """What `fn` returns with its graphs rewritten but not compiled, and the Rewriter with report and graphs."""
    torch._dynamo.reset()
    backend = Rewriter(**how)
    return torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **(call_kwargs or {})), backend


def detached(inputs: Any) -> Any:
    """Copies of all tensors, for a second run on the same values."""
    return tree_map_only(torch.Tensor, lambda x: x.detach().clone(), inputs)


def assert_used(fn: Callable[..., Any], *args: Any, sites: int = 1, tolerance: float = 0.02, **how: Any) -> Rewriter:
    """Every site of `fn(*args)` is rewritten, there are `sites` of them, and the result is `fn`'s."""
    expected = fn(*detached(args))
    actual, backend = rewritten(fn, *args, **how)
    assert [entry.decision.reason for entry in backend.report.kept] == []
    assert len(backend.report.used) == sites
    assert relative_error(actual, expected) <= tolerance
    return backend


def assert_kept(fn: Callable[..., Any], *args: Any, because: str, **how: Any) -> Rewriter:
    """The one site of `fn(*args)` is kept with a reason that starts with `because`, and the result is `fn`'s own."""
    expected = fn(*detached(args))
    actual, backend = rewritten(fn, *args, **how)
    assert backend.report.used == ()
    (entry,) = backend.report.kept
    assert entry.decision.reason.startswith(because), entry.decision.reason
    assert relative_error(actual, expected) <= 1e-6
    return backend


def assert_no_site(fn: Callable[..., Any], *args: Any, **how: Any) -> Rewriter:
    """`fn(*args)` has no site, and the result is `fn`'s own."""
    expected = fn(*detached(args))
    actual, backend = rewritten(fn, *args, **how)
    assert backend.report.entries == ()
    assert relative_error(actual, expected) <= 1e-6
    return backend


# Q and K that plain INT8 with a smoothed K does not hold, by name: the error of a whole call against float64, at most,
# in qk_int8_pv_fp16 and in qk_int8_pv_fp8, and that of its worst row (0.25 where nothing is said).
HARD = {
    **{
        f"a bias of {size} in {count} channels that RoPE turns, {form}": (0.02, 0.045) if size <= 60 else (0.03, 0.05)
        for size in (3, 30, 60, 150)
        for count in (1, 4, 8)
        for form in ("halves", "interleaved")
    },
    **{f"a channel of K times {size}": (0.02, 0.045) if size <= 60 else (0.03, 0.05) for size in (3, 10, 30, 60, 100)},
    "four channels of K times 30": (0.02, 0.045),
    "a channel of Q times 30": (0.02, 0.045),
    "a token of K times 20": (0.02, 0.045, float("inf")),  # of some rows it has half the weight
    "every 97th token of K times 20": (0.02, 0.045),
    "a constant of 3 added to Q": (0.03, 0.045),  # all rows look at the same few keys, and share their errors
    **{f"scores of {size}": (0.02, 0.045) for size in (20, 200, 600)},
}


def hard_inputs(name: str, tokens: int, dim: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """q, k, v of a row of HARD: N(0, 1) but for what the name says."""
    q, k = torch.randn(1, heads, tokens, dim), torch.randn(1, kv_heads, tokens, dim)
    numbers = [int(word) for word in name.replace(",", "").split() if word.isdigit()]
    if "RoPE" in name:
        size, count = numbers
        bias = torch.zeros(dim)
        bias[torch.randperm(dim)[:count]] = size * torch.tensor([1.0, -1.0, 0.7, 0.5, -0.8, 0.9, 0.6, -0.4])[:count]
        q, k = (turned_by_rope(x, interleaved="interleaved" in name) for x in (q + 0.02 * bias, k + bias))
    elif "channel of Q" in name:
        q[..., 7] *= numbers[0]
    elif "channel" in name:
        k[..., 3 : 7 if "four" in name else 4] *= numbers[0]
    elif "97th" in name:
        k[:, :, ::97] *= 20
    elif "token" in name:
        k[:, :, tokens // 3] *= 20
    elif "constant" in name:
        q += 3
    else:
        q *= numbers[0] / 5  # the largest of so many N(0, 1)
    return q, k, torch.randn_like(k)


def turned_by_rope(x: torch.Tensor, *, interleaved: bool = False, base: float = 1e4) -> torch.Tensor:
    """RoPE of x (B, H, N, D), by halves or by pairs of channels."""
    tokens, dim = x.shape[-2:]
    angle = torch.outer(torch.arange(tokens).float(), base ** (-torch.arange(0, dim, 2) / dim))
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def assert_holds(name: str, format: str, actual: torch.Tensor, q: Any, k: Any, v: Any, is_causal: bool) -> None:
    """The promise of a row of HARD."""
    expected = exact_attention(q, k, v, is_causal=is_causal)
    rows = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    whole, worst = HARD[name][(ACCURATE, FAST).index(format)], (*HARD[name], 0.25)[2]
    assert relative_error(actual, expected) <= whole and float(rows.max()) <= worst


class Promised(NamedTuple):
    """What the README says of errors: K's outliers, and what they may lead to in ACCURATE and FAST."""

    bias: float
    """At most, that RoPE turns, in so many channels."""
    channels: int
    times: float
    """As large as others a channel may be."""
    errors: tuple[float, float]


def promised() -> Promised:
    """By the README's own sentence."""
    text = " ".join((Path(__file__).parent.parent / "README.md").read_text().split())
    found = re.search(
        r"Where K has a constant bias, a bias of up to (\d+) in up to (\d+) channels that RoPE turns, or channels up "
        r"to (\d+) times as large as the others, the relative L2 error of a call of our kernels is at "
        r"most ([\d.]+) \(`qk_int8_pv_fp16`\) or ([\d.]+) \(`qk_int8_pv_fp8`\)\. ",
        text,
    )
    assert found, "the README has no sentence that says which error holds"
    bias, channels, times, *errors = map(float, found.groups())
    return Promised(bias, int(channels), times, (errors[0], errors[1]))

"""Time what sagecompile changes: attention alone, a block around it, whole models, a server; judge its decisions.

In: the command line. Out: a table, each figure beside its error; JSON; a plot.
Only the command line is here, so that `--help` loads no torch; each benchmark is the file of its name.
"""

from __future__ import annotations

import argparse
import inspect
from importlib import import_module
from pathlib import Path

HELP = "time attention, a block, whole models or a vLLM server against what there is, each figure beside its error"
DTYPES = ("float16", "bfloat16", "float32")
ROPES = ("half", "interleaved")
MODELS = (
    *("flux", "wan", "wan-14b", "dit", "llama", "llama-decode", "bert-base", "bert-large", "vit-base", "vit-large"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(required=True, metavar=f"{{{','.join(BENCHMARKS)}}}", dest="what")
    for name, add in BENCHMARKS.items():
        text = inspect.cleandoc(add.__doc__ or "")
        sub = benchmarks.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
        sub.add_argument("--json", type=_file, metavar="FILE", help="write the rows as JSON as well")
        add(sub)


def run(arguments: argparse.Namespace) -> int:
    code: int = import_module(f".{arguments.what}", __name__).run(arguments)
    return code


def _add_attention(parser: argparse.ArgumentParser) -> None:
    """every format and provider against SDPA's backends, FlashAttention-3 and sageattention

    All run on the same inputs in the same run, q, k and v as (batch, heads, length, head_dim) except for
    FlashAttention-3, which gets them packed as it likes them; that copy is not timed. Lengths are q_len = kv_len; the
    batch fills up to --tokens tokens in all. Times are end to end, quantization included. `of best` is the speed
    against the fastest one that does not quantize (any backend of SDPA, FlashAttention-3), `of sdpa` against plain
    SDPA, which is what would run otherwise. The error is the relative L2 error against float64 on a sample of the
    queries, for N(0,1) inputs with a bias of 3 on K.
    """
    _add_reference(parser)
    _add_shapes(parser)
    _add_timing(parser)
    parser.add_argument(
        "--kernel-only",
        action="store_true",
        help="time the attention kernels without the quantization, and the quantization alone against the bytes "
        "that it must move; only providers that offer the two apart",
    )
    parser.add_argument(
        "--flash-attention-3",
        type=Path,
        metavar="FILE",
        help="vLLM's _vllm_fa3_C.abi3.so (default: that of the installed vllm)",
    )
    parser.add_argument("--plot", type=_file, metavar="FILE.png", help="draw time and ratio against length")


def _add_block(parser: argparse.ArgumentParser) -> None:
    """QK-norm, RoPE and attention of a transformer block under sage_inductor against inductor

    q, k and v come in as the projections leave them, (batch, length, heads, head_dim); what follows is compiled by
    inductor and by sage_inductor, with policy `always` for each format and with `auto`. The error is the relative
    L2 error of the whole output against a float32 eager run of the same block.
    """
    _add_reference(parser)
    _add_shapes(parser)
    _add_timing(parser)
    parser.add_argument(
        "--rope",
        choices=ROPES,
        default="half",
        help="rotate the two halves of a head, as Transformers does (default), or its pairs, as diffusers does",
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    """whole models of real width and few layers under sage_inductor against inductor

    Random weights in bfloat16: Flux (24 heads of 128; --layers double and as many single blocks), Wan (12 heads of
    128, or 40: wan-14b), DiT-XL/2, Llama (8B's shape, a prefill with logits for the last token, or one token after a
    context), BERT and ViT. A length is that of the self-attention, text included. Each forward is timed with
    its launches; the error is the relative L2 error of the output against inductor's, the peak memory that of one
    forward with the weights, the compile time that of the first call without caches. The report lists every site.
    """
    _add_reference(parser)
    parser.add_argument(
        "--models",
        type=_names(MODELS),
        default=["flux", "wan", "llama"],
        help=f"of {', '.join(MODELS)}; default flux,wan,llama",
    )
    parser.add_argument("--lengths", type=_integers, default=None, help="comma-separated; default: each model's own")
    parser.add_argument("--batches", type=_integers, default=[1], help="sequences, comma-separated; default 1")
    parser.add_argument("--layers", type=_positive, default=2, help="default 2")
    parser.add_argument("--auto-only", action="store_true", help="policy=auto against inductor, and no other")
    parser.add_argument("--small", action="store_true", help="tiny widths, one length: to try the command on a CPU")


def _add_decision(parser: argparse.ArgumentParser) -> None:
    """random shapes, decided as `policy=auto` does and then measured: how often right, and what a wrong one costs

    The regret of a shape is the time of what was chosen over that of the best, less one. Shapes are drawn with --seed;
    the profile holds none of them but by chance.
    """
    parser.add_argument("--shapes", type=_positive, default=100, help="default 100")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--profile-only",
        dest="measure",
        action="store_false",
        help="let `auto` measure nothing more, as sage.measure=false does; else it does where the profile is not sure",
    )
    _add_regime(parser)
    parser.add_argument("--plot", type=_file, metavar="FILE.png", help="draw predicted against measured, and regrets")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    """the same requests to two vLLM servers, without us and with the pass

    Prompts are random tokens, answers greedy; requests keep their order, --concurrency at a time. `ours` is the share
    of tokens in all batches that our kernels did, as the server's log says; `alike` how many answers are the first
    server's to the token: quantization may choose otherwise between tokens that are nearly as likely. Memory is that
    of the GPU, or of the server's processes on a CPU. Arguments after `--` go to both servers.
    """
    parser.add_argument("model", help="as vllm takes it")
    parser.add_argument("--lengths", type=_integers, default=[512, 1024, 4096], help="in turn; default 512,1024,4096")
    parser.add_argument("--requests", type=_positive, default=96, help="default 96")
    parser.add_argument("--concurrency", type=_positive, default=8, help="default 8")
    parser.add_argument("--output-length", type=_positive, default=32, help="tokens of an answer; default 32")
    parser.add_argument("--vocabulary", type=_positive, default=256, help="tokens are below this; default 256")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--policy", choices=("auto", "always"), default="auto", help="of the second; default auto")
    parser.add_argument("--logs", type=_folder, metavar="DIR", help="keep the servers' logs there")
    parser.add_argument("--plot", type=_file, metavar="FILE.png", help="draw the time to the first token by length")


def _add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference", action="store_true", help="time the plain-torch reference as well, which is slow"
    )


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=_integers, default=[512, 1024, 2048, 4096], help="default 512,1024,2048,4096")
    parser.add_argument("--head-dims", type=_integers, default=[64, 128], help="default 64,128")
    parser.add_argument("--heads", type=_positive, default=None, help="default: 2048 / head_dim on a GPU, 8 on a CPU")
    parser.add_argument(
        "--tokens", type=_positive, default=None, help="in all; default 16384 on a GPU, 1 sequence on a CPU"
    )
    parser.add_argument(
        "--dtypes", type=_names(DTYPES), default=["bfloat16"], help=f"of {', '.join(DTYPES)}; default bfloat16"
    )


def _add_timing(parser: argparse.ArgumentParser) -> None:
    _add_regime(parser)
    parser.add_argument("--seconds", type=_seconds, default=1.0, help="of timing for one shape, about; default 1")


def _add_regime(parser: argparse.ArgumentParser) -> None:
    timing = parser.add_mutually_exclusive_group()
    timing.add_argument(
        "--graph",
        action="store_true",
        default=None,
        help="capture each in a CUDA graph and time its replays, without launches (default on CUDA); the inputs "
        "stay the same, so small ones are read from the cache; what cannot be captured is timed eagerly and marked so",
    )
    timing.add_argument("--eager", dest="graph", action="store_false", help="time with launches")


def _integers(text: str) -> list[int]:
    try:
        numbers = [int(item) for item in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: needs numbers from 1 on, such as 512,1024")
    return numbers


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: needs one number from 1 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: needs a number above 0 and at most 3600, such as 0.5")
    return seconds


BENCHMARKS = {
    "attention": _add_attention,
    "block": _add_block,
    "models": _add_models,
    "decision": _add_decision,
    "serve": _add_serve,
}


class _names:
    """An argument type: comma-separated names out of those known."""

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def __call__(self, text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in self.known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: can be {', '.join(self.known)}")
        return names


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return Path(text)


def _file(text: str) -> Path:
    """A file that will be written after minutes of timing: its folder is looked at now."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no folder {path.parent}")
    return path

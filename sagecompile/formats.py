"""The table of formats (ways to quantize attention) and of providers (who can run them): facts only.

In: nothing. Out: `FORMATS` and `PROVIDERS`, one row each, that `decide` checks a site against and `doctor` prints.
No torch here: dtypes and devices are names, so that the table can be read and tested anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A way to quantize attention."""

    name: str
    summary: str
    dtypes: tuple[str, ...]
    """Of q, k and v, which must agree, and of the result."""
    compute_capability: tuple[int, int]
    """The least one, on CUDA devices."""
    error_bound: float
    """Relative L2 error against float64 for N(0,1) q, k, v with a bias of 3 on every channel of k."""


@dataclass(frozen=True)
class Provider:
    """Who runs a format, and what of it: `decide` reads every column, `sagecompile doctor` shows them.

    Its module has `attention`, see kernels.launcher, and may have `refusal(site, format, cuda_graphs)`: why it cannot
    run a site here, or None.
    """

    name: str
    summary: str
    module: str
    devices: tuple[str, ...]
    """Device types that `decide` offers it on."""
    formats: tuple[str, ...]
    package: str
    """What must be installed."""
    head_dims: tuple[int, ...] = (64, 96, 128)
    """That it runs as they are, rising; others up to the last one it pads."""
    compute_capability: tuple[int, int] | None = None
    """The only one of CUDA devices that it runs on; None: all of its formats' own."""
    beats: tuple[str, ...] = ()
    """Providers that need not be tried where this one runs the format: never seen faster."""
    may_win: bool = True
    """False: right, but slower than SDPA: `auto` leaves it out."""
    prologues: bool = False
    """Whether it can apply RMSNorm and RoPE to Q and K as it reads them, see kernels/prologue.py."""
    causal_offset: bool = False
    """Whether query i can be made to see the keys j <= i + an offset, as where a prompt's earlier part is cached."""
    masks: bool = False
    """Whether it takes the rest of a mask: how far behind a query sees, bounds in tensors, a tensor of any shape."""
    cuda_graphs: bool = True
    """Whether its calls can be captured in a CUDA graph."""
    trial_tokens: int | None = 200
    """Of the trial before it is used on a machine, by default not a whole number of blocks; None: there is no trial."""

    @property
    def max_head_dim(self) -> int:
        return self.head_dims[-1]


DTYPES = ("float16", "bfloat16", "float32")

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            name="qk_int8_pv_fp16",
            summary="INT8 QK^T with smoothed K, PV in 16 bits: accurate",
            dtypes=DTYPES,
            compute_capability=(8, 0),
            error_bound=0.02,
        ),
        Format(
            name="qk_int8_pv_fp8",
            summary="INT8 QK^T with smoothed K, PV in FP8 (e4m3): fast",
            dtypes=DTYPES,
            compute_capability=(8, 9),
            error_bound=0.045,
        ),
    )
}

PROVIDERS: dict[str, Provider] = {
    row.name: row
    for row in (
        Provider(
            "hopper",
            "our CUDA C++ kernels for compute capability 9.0",
            "sagecompile.kernels.hopper",
            ("cuda",),
            tuple(FORMATS),
            package="triton",  # its exact rows are Triton's
            compute_capability=(9, 0),
            beats=("triton", "sageattention"),
            prologues=True,
            causal_offset=True,
        ),
        Provider("triton", "our Triton kernels", "sagecompile.kernels.triton", ("cuda",), tuple(FORMATS), "triton"),
        Provider(
            "sageattention",
            "the installed sageattention package",
            "sagecompile.kernels.sageattention",
            ("cuda",),
            tuple(FORMATS),
            "sageattention",
            cuda_graphs=False,
            trial_tokens=256,  # it is used on whole blocks only
        ),
        Provider(
            "cpu",
            "our C++ kernel for AVX-512 VNNI",
            "sagecompile.kernels.cpu",
            ("cpu",),
            ("qk_int8_pv_fp16",),
            "torch",
            head_dims=(64, 96, 128, 256),
            causal_offset=True,
            masks=True,
        ),
        Provider(
            "reference",
            "plain torch: the specification, not fast",
            "sagecompile.ops.reference",
            ("cpu",),
            tuple(FORMATS),
            "torch",
            head_dims=(64, 96, 128, 256),
            trial_tokens=None,
            may_win=False,
            prologues=True,
            causal_offset=True,
        ),
    )
}


def fuses(alternative: tuple[str, str], head_dim: int) -> bool:
    """Whether a (format, provider) does the prologues of q and k too: where it need not pad the head dim."""
    row = PROVIDERS[alternative[1]]
    return row.prologues and head_dim in row.head_dims


def fusing_devices(may_win: bool) -> frozenset[str]:
    """Device types with a provider that does prologues; `may_win`: one that `auto` may use."""
    rows = (row for row in PROVIDERS.values() if row.prologues and (row.may_win or not may_win))
    return frozenset(device for row in rows for device in row.devices)


def beats(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether another (format, provider) need not be tried where this one runs, which comes before it in the table."""
    return one[0] == other[0] and other[1] in PROVIDERS[one[1]].beats

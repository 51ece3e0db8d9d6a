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
    max_head_dim: int
    """Head dims up to this one; those between the native ones are padded inside the kernel."""
    native_head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    """Of q, k and v, which must agree, and of the result."""
    compute_capability: tuple[int, int]
    """The least one, on CUDA devices."""
    masks: tuple[str, ...]
    causal_alignments: tuple[str, ...]
    """`top_left` is SDPA's: query i sees keys j <= i, also when the lengths differ."""
    cuda_graphs: bool
    """Whether it can be captured in a CUDA graph (a provider may still be unable to)."""
    error_bound: float
    """Relative L2 error against float64 for N(0,1) q, k, v with a bias of 3 on every channel of k."""


@dataclass(frozen=True)
class Provider:
    """Who runs a format."""

    name: str
    summary: str
    devices: tuple[str, ...]
    """Device types that `decide` offers it on."""
    formats: tuple[str, ...]
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


_COMMON = {
    "max_head_dim": 128,
    "native_head_dims": (64, 96, 128),
    "dtypes": ("float16", "bfloat16", "float32"),
    "masks": ("none",),
    "causal_alignments": ("top_left",),
    "cuda_graphs": True,
}

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            name="qk_int8_pv_fp16",
            summary="INT8 QK^T with smoothed K, PV in 16 bits: accurate",
            compute_capability=(8, 0),
            error_bound=0.02,
            **_COMMON,  # type: ignore[arg-type]
        ),
        Format(
            name="qk_int8_pv_fp8",
            summary="INT8 QK^T with smoothed K, PV in FP8 (e4m3): fast",
            compute_capability=(8, 9),
            error_bound=0.045,
            **_COMMON,  # type: ignore[arg-type]
        ),
    )
}

PROVIDERS: dict[str, Provider] = {
    row.name: row
    for row in (
        Provider(
            "hopper",
            "our CUDA C++ kernels for compute capability 9.0",
            ("cuda",),
            tuple(FORMATS),
            (9, 0),
            beats=("triton", "sageattention"),
            prologues=True,
            causal_offset=True,
        ),
        Provider("triton", "our Triton kernels", ("cuda",), tuple(FORMATS)),
        Provider("sageattention", "the installed sageattention package", ("cuda",), tuple(FORMATS)),
        Provider("cpu", "our C++ kernel for AVX-512 VNNI", ("cpu",), ("qk_int8_pv_fp16",), causal_offset=True),
        Provider(
            "reference",
            "plain torch: the specification, not fast",
            ("cpu",),
            tuple(FORMATS),
            may_win=False,
            prologues=True,
            causal_offset=True,
        ),
    )
}


def fuses(alternative: tuple[str, str], head_dim: int) -> bool:
    """Whether a (format, provider) does the prologues of q and k too: where it need not pad the head dim."""
    format, provider = alternative
    return PROVIDERS[provider].prologues and head_dim in FORMATS[format].native_head_dims


def fusing_devices(may_win: bool) -> frozenset[str]:
    """Device types with a provider that does prologues; `may_win`: one that `auto` may use."""
    rows = (row for row in PROVIDERS.values() if row.prologues and (row.may_win or not may_win))
    return frozenset(device for row in rows for device in row.devices)


def beats(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether another (format, provider) need not be tried where this one runs, which comes before it in the table."""
    return one[0] == other[0] and other[1] in PROVIDERS[one[1]].beats

"""FlashAttention-3 as vLLM builds it, called through its op without importing vLLM.

In: the library `_vllm_fa3_C.abi3.so`, given or that of the installed vllm; q, k, v (B, H, N, D). Out: a call on the
packed copies that it likes best, (B * N, H, D), with the arguments that vLLM 0.20.2's `flash_attn_varlen_func` passes
by default: no scheduler metadata, `num_splits` 0 (its own heuristic).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sagecompile.errors import SageCompileError
from sagecompile.kernels import available

from .measure import Call, in_one_line, say

NAME, LIBRARY = "flash_attention_3", "vllm_flash_attn/_vllm_fa3_C.abi3.so"
CAPABILITY = 9
"""Major compute capability it is built for (9.0a)."""


def load(given: Path | None, device: torch.device) -> bool:
    """Load the library at `given`, or that of the installed vllm; False if it cannot run here, said on a GPU.

    Raises SageCompileError if `given` is no file.
    """
    if given is not None and not given.is_file():
        raise SageCompileError(f"--flash-attention-3: no file {given}")
    capability = available.device(str(device)).compute_capability
    path = given or _installed()
    if capability is None or capability[0] != CAPABILITY:
        why = f"it needs compute capability {CAPABILITY}.0, this is {device.type} {capability or ''}".rstrip()
    elif path is None:
        why = "vllm is not installed; --flash-attention-3 FILE takes its _vllm_fa3_C.abi3.so alone"
    else:
        try:
            torch.ops.load_library(str(path))
            return True
        except OSError as error:
            why = in_one_line(error)
    if given is not None or device.type == "cuda":
        say(NAME, f"left out: {why}")
    return False


def _installed() -> Path | None:
    spec = find_spec("vllm")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (path := Path(folder) / LIBRARY).is_file():
            return path
    return None


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> Call:
    """A call that returns (B, H, N, D), a view of the packed output; q, k, v: (B, H, N, D), copied here.

    Its causal mask is aligned to the bottom right, which is SDPA's for as many queries as keys. Raises ValueError if
    the library's op does not take what is passed.
    """
    batch, heads, length, head_dim = q.shape
    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
    given: dict[str, Any] = {
        name: x.transpose(1, 2).flatten(0, 1).contiguous() for name, x in (("q", q), ("k", k), ("v", v))
    }
    given |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": length, "max_seqlen_k": length}
    given |= {"softmax_scale": head_dim**-0.5, "is_causal": is_causal, "softcap": 0.0, "is_rotary_interleaved": True}
    given |= {"window_size_left": -1, "window_size_right": -1, "num_splits": 0, "sm_margin": 0}
    given |= {"cp_world_size": 1, "cp_rank": 0}
    op = torch.ops._vllm_fa3_C.fwd.default
    names = [argument.name for argument in op._schema.arguments]
    if unknown := given.keys() - set(names):
        raise ValueError(f"{LIBRARY} is another version: fwd has no {', '.join(sorted(unknown))}; 0.20.2 was tried")
    arguments = [given.get(name) for name in names]

    def call() -> torch.Tensor:
        out: torch.Tensor = op(*arguments)[0]
        return out.view(batch, length, heads, head_dim).transpose(1, 2)

    return call

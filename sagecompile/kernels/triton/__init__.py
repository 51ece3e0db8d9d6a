"""Quantized attention in portable Triton.

In: a call, and an output to fill. Out: nothing; `out` is written.
Importing this package imports triton, so callers do it late.
"""

from .attention import FORMATS, attention

__all__ = ["FORMATS", "attention"]

"""The torch.library ops that rewritten graphs call: importing this registers `torch.ops.sagecompile`."""

from .attention import attention

__all__ = ["attention"]

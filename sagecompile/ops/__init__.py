"""The torch.library ops that rewritten graphs call: importing this registers `torch.ops.sagecompile`."""

from .attention import attention, qk_norm_rope_attention

__all__ = ["attention", "qk_norm_rope_attention"]

"""The torch.library ops that rewritten graphs call: importing this registers `torch.ops.sagecompile`."""

from sagecompile.kernels.compiler import settle

from .attention import attention, attention_into, qk_norm_rope_attention

__all__ = ["attention", "attention_into", "qk_norm_rope_attention", "settle"]

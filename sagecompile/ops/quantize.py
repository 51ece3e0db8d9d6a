"""Quantization in plain torch: the specification that every kernel follows.

In: q, k or v (batch, heads, tokens, head_dim) in any float dtype. Out: the quantized values held in float32 (so that
products of INT8 values are exact: at most 127 * 127 * 256 < 2^24), and their float32 scales; value = quantized * scale.

Before Q and K are rounded they change basis, by three steps of which none changes a softmax: K is *smoothed* (less its
mean), channels are *balanced* between Q and K, and both are *rotated*. After the softmax a *guard* predicts the error
of each row from what is then known; rows that 8 bits cannot hold are computed exactly. What is said to be measured was
so on q, k and v of SmolLM2-135M and Gemma-3-270M, and on rows with hard biases, channels and tokens.

Smoothing, INT8: SageAttention, arXiv:2410.02367; FP8 V: SageAttention2, arXiv:2411.10958; balance: SmoothQuant,
arXiv:2211.10438, there between activations and weights; rotation: QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

INT8_MAX = 127.0
FP8_MAX = 448.0
"""Of float8_e4m3fn."""
K_BLOCK = 128
"""Tokens of K that share one scale."""
TINY = 1e-30
"""The least scale: an all-zero row divides by this."""

SAMPLE = 128
"""Tokens, evenly spaced, that the balance of a head is taken from: with all of them errors are the same."""
LEAST_RMS = 2.0**-7
"""Of a channel, relative to the head's largest, as the balance counts it."""
LEAST_EXPONENT = 0.5
"""By less, as a power of two, channels are not balanced: five times the deviation of a sample's."""
WIDTH_STEP = 16
"""Rotated head dims are padded with zeros to a multiple of this."""

ROWS = 64
"""Consecutive queries of a head that are judged together, and are exact together. A kernel may take fewer or more."""
MOST_ERROR = 0.022
"""Predicted for ROWS, beyond which they are exact: a whole call is then within 0.02. That of N(0, 1) is 0.012."""
MOST_ERROR_OF_A_ROW = 0.07
MOST_NOISE = 0.1
"""Of a score, beyond which its row is exact without a look at the softmax: so nothing is computed twice."""

STEEPEST = 2.0**-6
"""The largest unit of an integer score, in powers of two of P, that INT8 is used for.

Rounding Q and K moves a score by up to some hundred units, so that above this (scores of more than about 200) weights
would be off by factors. A head with such scores is computed exactly, as one with a NaN or Inf is.
"""


def mean(x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Over the tokens of x (B, H, N, D), those that are seen (B, H, N) if that is given: (B, H, 1, D)."""
    if seen is None:
        return x.mean(-2, keepdim=True)
    total = torch.where(seen[..., None], x, 0.0).sum(-2, keepdim=True)
    return total / seen.sum(-1).clamp_min(1)[..., None, None]


def smooth_k(k: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """K minus its mean over the tokens, float32: softmax does not see a vector that is added to every key.

    seen (B, H, N): the keys that some query sees; the mean is of them, and the others become 0.
    """
    k = k.float()
    smooth = k - mean(k, seen)
    return smooth if seen is None else torch.where(seen[..., None], smooth, 0.0)


def sample(x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """At most SAMPLE tokens of x (B, H, N, D), evenly spaced: always the same ones; of those that are seen alone."""
    tokens = x.shape[-2]
    count = min(SAMPLE, tokens)
    places = torch.arange(count, device=x.device)
    if seen is None:
        return x[..., places * tokens // count, :]
    order = seen.int().argsort(dim=-1, descending=True, stable=True)  # those that are seen, then the others
    chosen = order.gather(-1, places * seen.sum(-1, keepdim=True) // count)
    return x.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))


def balance(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """a (B, H, 1, D), so that q * a and k / a have the same scores as q and k, and each channel the same size in both.

    q (B, H, N, D): of all heads that share a head of K, one after the other; k: smoothed; seen: as of `smooth_k`. a = sqrt(rms(k) / rms(q)) of
    each channel makes sum(rms(q * a)^2) * sum(rms(k / a)^2), to which the noise of rotated scores is proportional, the
    least there is (Cauchy-Schwarz). Any a is exact: a sample of tokens does, and a NaN or Inf in it counts as 0. Where
    channels are alike it is 1, as far as a sample can say: a part of the queries has the basis of all of them then.
    """

    def log2_rms(x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        x = sample(x, seen).double()
        size = torch.where(x.isfinite(), x, 0.0).square().mean(-2, keepdim=True).sqrt()
        return size.maximum(size.amax(-1, keepdim=True) * LEAST_RMS).clamp_min(TINY).log2()

    exponent = (log2_rms(k, seen) - log2_rms(q)) / 2
    exponent = exponent - exponent.mean(-1, keepdim=True)
    return torch.where(exponent.abs() > LEAST_EXPONENT, exponent, 0.0).exp2().float()


def signs(width: int, device: torch.device | None = None) -> torch.Tensor:
    """+1 and -1 by a quadratic form of the bits of the channel, sum over i of bit 2i * bit 2i+1.

    It is bent: what has the pattern of a row of a Hadamard matrix, such as a constant, becomes as flat as one channel.
    """
    channel = torch.arange(width, device=device)
    pairs = channel & (channel >> 1)
    parity = torch.stack([pairs >> bit & 1 for bit in range(0, 16, 2)]).sum(0) & 1
    return 1.0 - 2.0 * parity.float()


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x (..., D) times the signs, then an orthonormal matrix: (..., D up to a multiple of WIDTH_STEP).

    A channel's outliers are spread over all channels, and every row is near a normal distribution, whose largest value
    is small for its size. The matrix is Hadamard's. Where the width is no power of two, it is those of its parts (96 is
    64 and 32), from the largest on, and then each part, from the last one on, mixed with the end of the one before.
    """
    width = -(-x.shape[-1] // WIDTH_STEP) * WIDTH_STEP
    sizes = [size for size in (256, 128, 64, 32, 16) if width & size]
    parts = F.pad(x * signs(x.shape[-1], x.device), (0, width - x.shape[-1])).split(sizes, -1)
    parts = [hadamard(part) for part in parts]
    for i in range(len(sizes) - 1, 0, -1):
        kept, end = parts[i - 1].split((sizes[i - 1] - sizes[i], sizes[i]), -1)
        parts[i - 1] = torch.cat((kept, (end + parts[i]) * 0.5**0.5), -1)
        parts[i] = (end - parts[i]) * 0.5**0.5
    return torch.cat(parts, -1)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x (..., a power of two) times an orthonormal Hadamard matrix."""
    size = step = x.shape[-1]
    while step > 1:
        step //= 2
        first, second = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
    return x * math.pow(size, -0.5)


def int8_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 with one scale a token: (B, H, N, D) -> (B, H, N, D), (B, H, N, 1)."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / INT8_MAX).clamp_min(TINY)
    return (x / scale).round().clamp(-INT8_MAX, INT8_MAX), scale


def int8_per_block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 with one scale for each K_BLOCK tokens: (B, H, N, D) -> (B, H, N, D), (B, H, N, 1)."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True)
    blocks = [block.amax(-2, keepdim=True).expand_as(block) for block in amax.split(K_BLOCK, -2)]
    scale = (torch.cat(blocks, -2) / INT8_MAX).clamp_min(TINY)
    return (x / scale).round().clamp(-INT8_MAX, INT8_MAX), scale


def fp8(x: torch.Tensor) -> torch.Tensor:
    """Rounded to float8_e4m3fn, held in float32."""
    return x.to(torch.float8_e4m3fn).float()


def fp8_per_channel(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 with one scale a channel: (B, H, N, D) -> (B, H, N, D), (B, H, 1, D)."""
    v = v.float()
    scale = (v.abs().amax(-2, keepdim=True) / FP8_MAX).clamp_min(TINY)
    return fp8((v / scale).clamp(-FP8_MAX, FP8_MAX)), scale


def square_of_blocks(x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """|x|^2 of the tokens of each K_BLOCK, (B, H, N, D) -> (B, H, N, 1): sqrt(mean(|x|^4)), in which outliers count."""
    squares = x.square().sum(-1, keepdim=True)
    blocks = squares.split(K_BLOCK, -2)
    those = [None] * len(blocks) if seen is None else seen.split(K_BLOCK, -1)
    means = [mean(block.square(), of).sqrt().expand_as(block) for block, of in zip(blocks, those, strict=True)]
    return torch.cat(means, -2)


def noise(unit: torch.Tensor, q_square: torch.Tensor, k_square: torch.Tensor) -> torch.Tensor:
    """The standard deviation of a score, squared, from rounding q and k: `unit` is that of an integer score, squared.

    Each rounding is off by 1/12 on average of the square: sum over channels of (q dk + k dq) by (|q|^2 + |k|^2) / 12, q
    and k being the integers. unit: as a power of two; the result: as a power of e.
    """
    return unit * (math.log(2) ** 2 / 12) * (q_square + k_square)


def predicted_error(
    noise: torch.Tensor, largest: torch.Tensor, v_square: torch.Tensor, out_square: torch.Tensor
) -> torch.Tensor:
    """The relative error of a row of the output, squared, from that of its scores, squared.

    largest: the largest weight of the row, p; v_square: |v|^2 of its values, weighted; out_square: |out|^2. The error
    is sum_j p_j (e_j - e) v_j, e_j being the score's. Where values are independent and weights even, that is as large
    relative to |out| as e_j is. It is smaller
    - where one key has most of the weight: nothing else is there to be exchanged for it. With one other key of note it
      is 2 (1 - p) at most, with many 1 - p; (1 - p)^0.75 is between them over the p that matter;
    - by sqrt(p) |v| / |out|, where values have a mean in common: sum_j p_j^2 |v_j|^2 is at most p |v|^2.
    It is larger where scores move so far that p itself is wrong: exp(e) - 1 has about e exp(e^2) as its mean square.
    Measured: 0.7 to 1.6 times the error of a call, by how lucky its few deciding keys are rounded; for single tokens
    of K that outlie twentyfold 0.4 to 1.
    """
    common = torch.where(largest * v_square < out_square, largest * v_square / out_square, 1.0)
    return noise * (2 * noise).clamp_max(60).exp() * (1 - largest).clamp_min(0) ** 1.5 * common


def exact_rows(noise: torch.Tensor, error: torch.Tensor, out_square: torch.Tensor) -> torch.Tensor:
    """Which rows, (B, H, N), are to be computed exactly: all squared; noise: of a score with keys of the usual size.

    By ROWS: where one row passes MOST_NOISE or MOST_ERROR_OF_A_ROW, or all together MOST_ERROR.
    """
    rows = error.shape[-1]
    hard = (noise > MOST_NOISE**2) | (error > MOST_ERROR_OF_A_ROW**2)
    hard, error, out_square = (F.pad(x, (0, -rows % ROWS)).unflatten(-1, (-1, ROWS)) for x in (hard, error, out_square))
    together = (error * out_square).sum(-1) > MOST_ERROR**2 * out_square.sum(-1)
    exact: torch.Tensor = together | hard.any(-1)
    return exact.repeat_interleave(ROWS, -1)[..., :rows]

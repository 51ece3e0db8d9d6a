"""Predict each byte from the two before it, by counting: the baseline that a language model has to beat.

In: training bytes and text to score. Out: bits per byte. Why: a model's figure says little beside nothing simpler.
Smoothing is Witten and Bell's (IEEE Trans. Information Theory 37(4), 1991): each order falls back on the one below.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def count_ngrams(text: NDArray[np.int64], order: int) -> NDArray[np.int64]:
    """Count every run of `order` bytes. Returns an array with `order` axes of 256: earlier bytes first."""
    length = len(text) - order + 1
    index = np.zeros(length, dtype=np.int64)
    for position in range(order):
        index = index * 256 + text[position : position + length]
    return np.bincount(index, minlength=256**order).reshape((256,) * order)


def smooth(counts: NDArray[np.int64], shorter: Floats) -> Floats:
    """Mix the relative frequencies of each context with `shorter`, which weighs kinds / (kinds + total)."""
    total = counts.sum(-1, keepdims=True)
    kinds = np.count_nonzero(counts, axis=-1, keepdims=True)
    unseen = total == 0
    return np.where(unseen, shorter, (counts + kinds * shorter) / np.where(unseen, 1, total + kinds))


class Trigram:
    """Interpolated byte trigrams of one training text."""

    def __init__(self, train: bytes) -> None:
        text = np.frombuffer(train, np.uint8).astype(np.int64)
        unigram = smooth(count_ngrams(text, 1), np.full(256, 1 / 256))
        self.bigram = smooth(count_ngrams(text, 2), unigram)
        self.trigram = smooth(count_ngrams(text, 3), self.bigram)

    def bits_per_byte(self, heldout: bytes) -> float:
        """Mean of -log2 p over every byte of `heldout` but the first; the second is predicted from one byte alone."""
        text = np.frombuffer(heldout, np.uint8)
        p_second = self.bigram[text[0], text[1]]
        p_rest = self.trigram[text[:-2], text[1:-1], text[2:]]
        return float(-(np.log2(p_second) + np.log2(p_rest).sum()) / (len(text) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parent / "data")
    data = parser.parse_args().data
    model = Trigram((data / "train.bin").read_bytes())
    print(f"trigram: {model.bits_per_byte((data / 'heldout.bin').read_bytes()):.4f} bits per byte")


if __name__ == "__main__":
    main()

"""Entropy coding: a range coder and its frequency tables."""

from __future__ import annotations

import lzma
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from utils.packages import need

Array: TypeAlias = NDArray[Any]

LARGEST_TABLES = 2**23  # frequencies in all tables, unless one alone is larger
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6}]

# A frequency is stored in one byte, as a floating-point number with two bits after the leading one.
FREQUENCIES = np.array([*range(4), *((4 + c % 4) << (c // 4) for c in range(120))], dtype=float)


class Coder:
    """A range coder with fixed frequency tables.

    tables (T, K), uint8, index FREQUENCIES; code j of a chunk uses table j mod T. The models are
    computed from these numbers alone, with the same arithmetic on every machine.
    """

    def __init__(self, tables: Array) -> None:
        from constriction import stream  # type: ignore[import-untyped]

        self.queue = stream.queue
        self.models = [
            # The library needs at least two symbols.
            stream.model.Categorical(np.append(FREQUENCIES[row], 0.0), perfect=False)
            for row in tables
        ]

    def encode(self, codes: Array) -> Array:
        """Encode codes (n,), n a multiple of T, to words, uint32."""
        encoder = self.queue.RangeEncoder()
        by_table = codes.astype(np.int32).reshape(-1, len(self.models))
        for symbols, model in zip(by_table.T, self.models):
            encoder.encode(symbols.ravel(), model)
        words: Array = encoder.get_compressed()
        return words

    def decode(self, words: Array, number: int) -> Array:
        """Decode words to codes (number,), int32.

        Raises ValueError or AssertionError for words that are detected as damaged.
        """
        decoder = self.queue.RangeDecoder(words.astype(np.uint32))
        each = number // len(self.models)
        return np.stack([decoder.decode(model, each) for model in self.models], axis=-1).ravel()


def need_coder(flag: str) -> None:
    """Raise UserError naming the flag if the entropy coder cannot be imported."""
    need("constriction", flag)


def cheapest_tables(counts: Array, slots: int) -> tuple[Array, bytes]:
    """Choose the frequency tables that make the smallest file: (T, K) uint8, and their bytes.

    counts (T', K) distinguish up to T' tables: one for all codes, one per unit slot (m), or one per
    slot and position (H·W·m) where all images have one size.
    """
    cheapest, least = (counts, b""), np.inf
    for num_tables in sorted({1, slots, len(counts)}):
        if len(counts) % num_tables == 0:
            merged = counts.reshape(-1, num_tables, counts.shape[1]).sum(0)  # (T, K)
            tables = nearest_frequencies(merged)
            packed = lzma.compress(tables.tobytes(), lzma.FORMAT_RAW, filters=LZMA_FILTERS)
            used, frequencies = merged > 0, FREQUENCIES[tables]
            share = frequencies / frequencies.sum(1, keepdims=True)
            size = 8 * len(packed) - (merged[used] * np.log2(share[used])).sum()
            if size < least:
                cheapest, least = (tables, packed), size
    return cheapest


def nearest_frequencies(counts: Array) -> Array:
    """Indices, uint8, of the entries of FREQUENCIES nearest to the counts; 0 only for 0."""
    borders = (FREQUENCIES[1:] + FREQUENCIES[:-1]) / 2
    return np.searchsorted(borders, counts, side="right").astype(np.uint8)

"""Usage of a codebook and rate of its indices, counted batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from modules.quantizers.looc.ranks import sum_over_ranks
from utils.distributed import gather
from utils.evaluation.schema import CodebookUse, Rate


def entropy_bits(counts: Tensor) -> float:
    """Empirical entropy −Σ p·log2 p of a vector of counts, in bits; 0 without counts."""
    used = counts[counts > 0].double()
    share = used / used.sum()
    return float(-(share * share.log2()).sum())


def perplexity(counts: Tensor) -> float:
    """2 to the entropy: the number of codevectors that, equally used, would carry as much."""
    return 2 ** entropy_bits(counts)


def usage(counts: Tensor) -> float:
    """Share of codevectors that are used at all, in [0, 1]."""
    return float((counts > 0).double().mean())


def use_of(counts: Tensor) -> dict[str, float]:
    """Usage in per cent and perplexity, by name; empty without codevectors."""
    if not len(counts):
        return {}
    return {"usage_percent": 100 * usage(counts), "perplexity": perplexity(counts)}


def in_words(scores: Mapping[str, float]) -> str:
    """Usage, for a line of the log."""
    return f"usage {scores['usage_percent']:.0f} %" if "usage_percent" in scores else "no codebook"


def numbered(indices: Tensor, num_embedding: int, num_codebooks: int) -> Tensor:
    """Indices (…, m) into the concatenation of all slots' codebooks."""
    return indices + torch.arange(max(1, num_codebooks), device=indices.device) * num_embedding


class CodebookStatistics:
    """Counts of every codevector in every unit slot; memory m × K, however many images.

    num_codebooks: 1 if all slots share a codebook, m if each has its own, 0 without a quantiser.
    """

    def __init__(self, num_embedding: int, num_codebooks: int = 1) -> None:
        self.num_embedding = num_embedding
        self.num_codebooks = num_codebooks
        self.slot_counts = torch.zeros(0, num_embedding, dtype=torch.int64)  # (m, K)
        self.num_images = 0

    def add(self, indices: Tensor) -> None:
        """Count indices (B, H, W, m)."""
        slots = indices.shape[-1]
        flat = numbered(indices, self.num_embedding, slots).flatten()
        counts = torch.bincount(flat, minlength=slots * self.num_embedding).cpu()
        counts = counts.view(slots, self.num_embedding)
        self.slot_counts = counts if self.num_images == 0 else self.slot_counts + counts
        self.num_images += len(indices)

    def sum_over_ranks(self) -> None:
        """Add up the counts of all processes."""
        slots = max(gather(len(self.slot_counts)))
        counts = torch.zeros(slots, self.num_embedding, dtype=torch.int64)
        counts[: len(self.slot_counts)] = self.slot_counts
        self.slot_counts = sum_over_ranks(counts)
        self.num_images = sum(gather(self.num_images))

    @property
    def counts(self) -> Tensor:
        """Uses of each codevector: (K,), or (m·K,), slot after slot."""
        return self.slot_counts.sum(0) if self.num_codebooks == 1 else self.slot_counts.flatten()

    def rate(self, num_pixels: float) -> Rate:
        """Codes per image and bits per pixel, for images of num_pixels on average."""
        if not len(self.slot_counts):
            return Rate()
        by_slot = sum(entropy_bits(row) for row in self.slot_counts) / len(self.slot_counts)
        codes_per_image = int(self.slot_counts.sum()) / self.num_images
        codes = codes_per_image / num_pixels
        return Rate(
            codes_per_image=codes_per_image,
            nominal_bits_per_pixel=codes * math.log2(self.num_embedding),
            entropy_bits_per_pixel=codes * entropy_bits(self.slot_counts.sum(0)),
            entropy_bits_per_pixel_by_slot=codes * by_slot,
        )

    def summary(self) -> CodebookUse:
        """Usage, perplexity and counts; without a quantiser the number of images alone."""
        if not len(self.slot_counts):
            return CodebookUse(self.num_images)
        return CodebookUse(
            images=self.num_images,
            codevectors=len(self.counts),
            **use_of(self.counts),
            slots=len(self.slot_counts),
            slot_usage_percent=[100 * usage(row) for row in self.slot_counts],
            slot_perplexity=[perplexity(row) for row in self.slot_counts],
            counts=self.counts.tolist(),
            slot_counts=self.slot_counts.tolist(),
            slots_per_codevector=(self.slot_counts > 0).sum(0).tolist(),
        )

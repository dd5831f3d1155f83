"""How a codebook is used, and what its indices cost: counted batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modules.quantizers.looc.ranks import sum_over_ranks
from utils.distributed import gather


def entropy_bits(counts: Tensor) -> float:
    """Empirical entropy −Σ p·log2 p of a vector of counts, in bits; 0 where nothing was counted."""
    used = counts[counts > 0].double()
    share = used / used.sum()
    return float(-(share * share.log2()).sum())


def perplexity(counts: Tensor) -> float:
    """2 to the entropy: how many codevectors, equally used, would carry as much."""
    return 2 ** entropy_bits(counts)


def usage(counts: Tensor) -> float:
    """The share of codevectors that were used at all, in [0, 1]."""
    return float((counts > 0).double().mean())


def use_of(counts: Tensor) -> dict[str, float]:
    """Usage in per cent and perplexity by name; nothing where there is no codevector."""
    if not len(counts):
        return {}
    return {"usage_percent": 100 * usage(counts), "perplexity": perplexity(counts)}


def in_words(scores: Mapping[str, float]) -> str:
    """The usage among scores."""
    return f"usage {scores['usage_percent']:.0f} %" if "usage_percent" in scores else "no codebook"


def numbered(indices: Tensor, num_embedding: int, num_codebooks: int) -> Tensor:
    """Indices (…, m) as numbers of codevectors, the codebooks standing one after another."""
    return indices + torch.arange(max(1, num_codebooks), device=indices.device) * num_embedding


class CodebookStatistics:
    """Counts of every codevector in every unit slot; memory m × K, however many images.

    num_codebooks: 1 where all slots share a codebook, m where each has its own, 0 where latents are
    not quantised and there is no slot.
    """

    def __init__(self, num_embedding: int, num_codebooks: int = 1) -> None:
        self.num_embedding = num_embedding
        self.num_codebooks = num_codebooks
        self.slot_counts = torch.zeros(0, num_embedding, dtype=torch.int64)  # (m, K)
        self.num_images = 0
        self.codes_per_image = 0

    def add(self, indices: Tensor) -> None:
        """Count indices (B, H, W, m)."""
        slots = indices.shape[-1]
        flat = numbered(indices, self.num_embedding, slots).flatten()
        counts = torch.bincount(flat, minlength=slots * self.num_embedding)
        counts = counts.view(slots, self.num_embedding).cpu()
        self.slot_counts = counts if self.num_images == 0 else self.slot_counts + counts
        self.num_images += len(indices)
        self.codes_per_image = indices[0].numel()

    def sum_over_ranks(self) -> None:
        """Add up what all processes have counted."""
        slots = max(gather(len(self.slot_counts)))
        counts = torch.zeros(slots, self.num_embedding, dtype=torch.int64)
        counts[: len(self.slot_counts)] = self.slot_counts
        self.slot_counts = sum_over_ranks(counts)
        self.num_images = sum(gather(self.num_images))
        self.codes_per_image = max(gather(self.codes_per_image))

    @property
    def counts(self) -> Tensor:
        """How often each codevector was used: (K,), or (m·K,), the slots one after another."""
        return self.slot_counts.sum(0) if self.num_codebooks == 1 else self.slot_counts.flatten()

    def rate(self, num_pixels: int) -> dict[str, float]:
        """Codes per image and bits per pixel, for images of num_pixels positions.

        Nominal: log2 K bits a code. Entropy: what an ideal entropy coder needs with one table of
        frequencies for all indices, and with one for each unit slot. Empty without a quantiser.
        """
        if not len(self.slot_counts):
            return {}
        by_slot = sum(entropy_bits(row) for row in self.slot_counts) / len(self.slot_counts)
        codes = self.codes_per_image / num_pixels
        return {
            "codes_per_image": self.codes_per_image,
            "nominal_bits_per_pixel": codes * math.log2(self.num_embedding),
            "entropy_bits_per_pixel": codes * entropy_bits(self.slot_counts.sum(0)),
            "entropy_bits_per_pixel_by_slot": codes * by_slot,
        }

    def summary(self) -> dict[str, Any]:
        """Usage, perplexity and counts, ready for JSON; without a quantiser the images alone."""
        if not len(self.slot_counts):
            return {"images": self.num_images}
        return {
            "images": self.num_images,
            "codevectors": len(self.counts),
            **use_of(self.counts),
            "slots": len(self.slot_counts),
            "slot_usage_percent": [100 * usage(row) for row in self.slot_counts],
            "slot_perplexity": [perplexity(row) for row in self.slot_counts],
            "counts": self.counts.tolist(),
            "slot_counts": self.slot_counts.tolist(),
            "slots_per_codevector": (self.slot_counts > 0).sum(0).tolist(),
        }

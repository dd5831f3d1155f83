"""Entropy coding of codes by the probabilities of a prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from modules import Autoencoder
from modules.priors.sampling import in_order
from modules.priors.spaces import CodeSpace
from modules.priors.transformer import CodeTransformer
from utils.checkpoints.digest import model_digest, tensors_digest
from utils.codebook.codes.coder import Array
from utils.codebook.codes.header import CodesInfo
from utils.errors import UserError
from utils.generation.checkpoints import read_prior

TOGETHER = 64  # images; rounding, and with it the words, depends on it
# Position, slot, probabilities (b, K) → codes (b,).
Visit: TypeAlias = Callable[[int, int, Array], Array]


class PriorCoder:
    """A range coder whose probabilities are those of a causal prior, given all codes before.

    Encoder and decoder compute the same probabilities, in the same steps and batches. Words can be
    decoded only where these round in the same way: with the same device and version of PyTorch.
    """

    def __init__(self, prior: CodeTransformer) -> None:
        from constriction import stream  # type: ignore[import-untyped]

        self.prior, self.queue = prior, stream.queue
        self.digest = tensors_digest(prior.state_dict())
        self.family = stream.model.Categorical(perfect=False)

    def encode(self, codes: Array) -> Array:
        """Encode codes (n·L·m,) of n images to words, uint32."""
        encoder = self.queue.RangeEncoder()
        images = codes.reshape(-1, *self.shape).astype(np.int32)
        for start in range(0, len(images), TOGETHER):
            batch = images[start : start + TOGETHER]

            def write(position: int, slot: int, shares: Array, batch: Array = batch) -> Array:
                symbols = np.ascontiguousarray(batch[:, position, slot])
                encoder.encode(symbols, self.family, shares)
                return symbols

            self.walk(len(batch), write)
        words: Array = encoder.get_compressed()
        return words

    def decode(self, words: Array, number: int) -> Array:
        """Decode words to codes (number,), int32."""
        num_images = number // math.prod(self.shape)
        decoder = self.queue.RangeDecoder(words.astype(np.uint32))

        def read(_position: int, _slot: int, shares: Array) -> Array:
            symbols: Array = decoder.decode(self.family, shares)
            return symbols

        sizes = [min(TOGETHER, num_images - start) for start in range(0, num_images, TOGETHER)]
        return np.concatenate([self.walk(size, read) for size in sizes]).ravel()

    @property
    def shape(self) -> tuple[int, int]:
        """(L, m)."""
        return self.prior.space.num_positions, self.prior.space.num_slots

    @torch.no_grad()
    def walk(self, size: int, visit: Visit) -> Array:
        """Codes (size, L, m) that visit returns for a position, a slot and probabilities (b, K)."""
        device = next(self.prior.parameters()).device

        def choose(position: int) -> Callable[[Tensor, int], Tensor]:
            def chosen(logits: Tensor, slot: int) -> Tensor:
                shares = logits.float().softmax(-1).cpu().numpy()
                return torch.from_numpy(visit(position, slot, shares)).to(device, torch.int64)

            return chosen

        labels = torch.full((size,), -1, device=device)
        codes = torch.stack(list(in_order(self.prior, labels, choose)), dim=1)
        return codes.cpu().numpy().astype(np.int32)


def open_prior(path: Path, model: Autoencoder, info: CodesInfo, device: torch.device) -> PriorCoder:
    """Open the prior of --prior for these codes. Raises UserError if it models others."""
    stored = read_prior(path)
    space = CodeSpace(info.num_embedding, info.slots, info.height, info.width)
    if stored.config.prior != "transformer":
        raise UserError(f"--prior {path} is {stored.config.prior}, which has no likelihood")
    if not stored.knows_no_class:
        raise UserError(f"--prior {path} models images given their class (--label_dropout 0)")
    if stored.first_stage.digest != model_digest(model):
        raise UserError(f"--prior {path} models another model, {stored.first_stage.path}")
    if stored.space != space:
        raise UserError(f"--prior {path} models {stored.space}, not {space}")
    prior = stored.model().to(device)
    assert isinstance(prior, CodeTransformer)
    return PriorCoder(prior)

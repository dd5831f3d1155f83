"""Drawing codes from a prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import option
from .diffusion import NUM_LEVELS, SAMPLERS
from .spec import Noise
from .transformer import Cache, CodeTransformer

CHOICE_TEMPERATURE = 4.5  # of the Gumbel noise in the first round, as in MaskGIT
CANDIDATES = 16  # of an image, where a causal prior has to meet known codes


@dataclass(frozen=True)
class Sampling:
    """Drawing codes or latents from a prior.

    Raises ValueError, naming the flags and both values, if fields contradict each other.
    """

    temperature: float = option(
        1.0, "divides the logits; 0 takes the most probable code", minimum=0, maximum=100
    )
    top_k: int = option(0, "draw from the most probable codes only (0: all)", minimum=0)
    top_p: float = option(
        1.0, "draw from the most probable codes of this total probability", above=0, maximum=1
    )
    # Logits or predictions are none + g·(class − none); Ho and Salimans, arXiv 2207.12598.
    guidance: float = option(
        1.0, "weight of the class in classifier-free guidance (1: none)", minimum=0, maximum=100
    )
    rounds: int = option(12, "rounds of a masked prior", minimum=1, maximum=2**12)
    sampler: str = option("ddim", "sampler of a diffusion prior", choices=SAMPLERS)
    sampling_steps: int = option(50, "its steps", minimum=1, maximum=NUM_LEVELS)

    def __post_init__(self) -> None:
        if self.sampler != "dpm-solver++" and NUM_LEVELS % self.sampling_steps:
            raise ValueError(
                f"--sampling_steps {self.sampling_steps} does not divide the {NUM_LEVELS} noise "
                f"levels, as --sampler {self.sampler} needs"
            )


@dataclass(frozen=True)
class Known:
    """Codes or latents that are given, and the positions that keep them.

    Attributes:
        items: codes (B, H, W, m) or latents (B, C, H, W).
        mask: the positions that are kept, (H, W) or (B, H, W), bool.
        share: of the noise levels that latent diffusion goes through, the last ones.
    """

    items: Tensor
    mask: Tensor
    share: float = 1.0


@torch.no_grad()
def sample(
    model: CodeTransformer,
    labels: Tensor,
    noise: Noise,
    how: Sampling,
    known: Known | None = None,
    *,
    cached: bool = True,
) -> Tensor:
    """Draw codes (B, H, W, m), int64, of the classes `labels` (B,), −1 for no class.

    A causal prior draws one position after another, several candidates where known codes follow. A
    masked prior fills in the unknown positions in rounds, and sees all known codes from the start.
    cached=False computes all positions anew at every step of a causal prior; the result is equal.
    """
    space, device = model.space, labels.device
    shape = (len(labels), space.num_positions, space.num_slots)
    if known is None:
        mask = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        codes = torch.zeros(shape, dtype=torch.int64, device=device)
    else:
        mask = known.mask.expand(len(labels), space.height, space.width).flatten(1)
        codes = known.items.reshape(shape).clone()
    if model.causal:
        codes = draw_in_order(model, labels, noise, how, codes, mask, cached=cached)
    else:
        draw_in_rounds(model, labels, noise, how, codes, mask)
    return codes.view(len(codes), space.height, space.width, space.num_slots)


def draw_in_order(
    model: CodeTransformer,
    labels: Tensor,
    noise: Noise,
    how: Sampling,
    codes: Tensor,
    mask: Tensor,
    *,
    cached: bool,
) -> Tensor:
    """Fill in the codes (B, L, m) outside the mask (B, L), in raster order: → codes.

    A causal prior sees no known code that follows. There CANDIDATES of each image are drawn, and
    after each run of known codes drawn again, by the probability that they gave to these codes: a
    particle filter (Gordon et al., 1993), whose draws follow the prior given all known codes as the
    number of candidates grows.
    """
    size, length, slots = codes.shape
    count = CANDIDATES if (mask[:, 1:] & ~mask[:, :-1]).any() else 1
    draws = noise(count, length, slots).to(codes.device).flatten(0, 1)
    chances = noise(length, count).to(codes.device)
    ends = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    codes, mask, labels = (x.repeat_interleave(count, 0) for x in (codes, mask, labels))
    labels, twice = guided(model, labels, how)
    numbers = torch.arange(len(codes), device=codes.device).view(size, count)
    weights = torch.zeros(size, count, dtype=torch.float64, device=codes.device)
    chooser = Chooser(draws[:, 0], how, twice)

    def choose(position: int) -> Callable[[Tensor, int], Tensor]:
        nonlocal chooser
        given = codes[:, position].masked_fill(~mask[:, position, None], -1)
        chooser = Chooser(draws[:, position], how, twice, given)
        return chooser

    positions = in_order(model, labels, choose, cached=cached)
    found = next(positions)
    for position in range(length):
        codes[:, position] = found[: len(codes)]
        weights += chooser.log_probability.masked_fill(~mask[:, position], 0).view(size, count)
        rows = None
        if count > 1 and ends[:, position].any():
            below = weights.softmax(1).cumsum(1)
            chosen = torch.searchsorted(below, chances[:, position].double().contiguous())
            again = numbers.gather(1, chosen.clamp_max(count - 1))
            rows = torch.where(ends[:, position, None], again, numbers).flatten()
            codes = codes[rows]
            weights = weights.masked_fill(ends[:, position, None], 0)
            rows = torch.cat([rows + len(rows) * number for number in range(twice)])
        if position + 1 < length:
            found = positions.send(rows)
    return codes[numbers[:, 0]]


def in_order(
    model: CodeTransformer,
    labels: Tensor,
    choose: Callable[[int], Callable[[Tensor, int], Tensor]],
    *,
    cached: bool = True,
) -> Generator[Tensor, Tensor | None, None]:
    """Yield the codes (b, m) of one position after another, of the classes `labels` (b,).

    choose: position → a function of a slot's logits (b, K) and its number that returns codes (b,).
    What is sent back, if anything, are the rows (b,) with which the next position goes on.
    """
    caches = [Cache(model.space.num_positions) for _ in model.blocks] if cached else None
    inputs = model.blank.expand(len(labels), 1, -1)
    for position in range(model.space.num_positions):
        contexts = model.contexts(inputs, labels, caches)[:, -1]
        codes = model.slot_codes(contexts, choose(position))
        rows = yield codes
        if rows is not None:
            codes, inputs = codes[rows], inputs[rows]
            for cache in caches or ():
                cache.select(rows)
        latest = model.embed(model.codes, codes[:, None]).sum(2)
        inputs = latest if cached else torch.cat([inputs, latest], dim=1)


def draw_in_rounds(
    model: CodeTransformer,
    labels: Tensor,
    noise: Noise,
    how: Sampling,
    codes: Tensor,
    mask: Tensor,
) -> None:
    """Fill in the codes (B, L, m) outside the mask (B, L), the most certain ones first.

    After round t of T, cos(π/2 · t/T) of the positions are left; Gumbel noise on the certainties
    falls to 0 (MaskGIT, Chang et al., CVPR 2022).
    """
    size, length, slots = codes.shape
    labels, twice = guided(model, labels, how)
    done = mask
    unknown = (~mask).sum(1, keepdim=True).double()
    for number in range(1, how.rounds + 1):
        embedded = model.embed(model.codes, codes).sum(2)
        inputs = torch.where(done[:, :, None], embedded, model.blank).repeat(twice, 1, 1)
        contexts = model.contexts(inputs, labels).flatten(0, 1)
        choose = Chooser(noise(length, slots).to(codes.device).flatten(0, 1), how, twice)
        drawn = model.slot_codes(contexts, choose)[: size * length].view(size, length, slots)
        codes.copy_(torch.where(done[:, :, None], codes, drawn))
        gumbel = -(-noise(length).to(codes.device).clamp_min(1e-20).log()).log()
        randomness = CHOICE_TEMPERATURE * (1 - number / how.rounds)
        certainty = choose.log_probability.view(size, length) + randomness * gumbel
        certainty = certainty.masked_fill(done, math.inf)
        left = (unknown * math.cos(math.pi / 2 * number / how.rounds)).long()
        ranks = certainty.argsort(dim=1, descending=True).argsort(dim=1)
        done = ranks < length - left


def guided(model: CodeTransformer, labels: Tensor, how: Sampling) -> tuple[Tensor, int]:
    """Labels of all rows that are computed, and their number per image: 2 with guidance."""
    if how.guidance == 1 or model.classes is None:
        return labels, 1
    return torch.cat([labels, torch.full_like(labels, -1)]), 2


class Chooser:
    """Codes of one slot after another from their logits.

    Args:
        draws: (b, m), uniform in [0, 1).
        twice: 2 if the second half of the rows is the first one without its classes.
        given: codes (b, m) that are not drawn; −1 where they are.

    Attributes:
        log_probability: of the codes chosen so far, (b,).
    """

    def __init__(
        self, draws: Tensor, how: Sampling, twice: int, given: Tensor | None = None
    ) -> None:
        self.draws, self.how, self.twice, self.given = draws, how, twice, given
        self.log_probability = torch.zeros(len(draws), device=draws.device)

    def __call__(self, logits: Tensor, slot: int) -> Tensor:
        """Logits (twice·b, K) → codes (twice·b,)."""
        logits = logits.float()
        if self.twice == 2:
            given, none = logits.chunk(2)
            logits = none + self.how.guidance * (given - none)
        codes = pick(logits, self.draws[:, slot], self.how)
        if self.given is not None:
            codes = torch.where(self.given[:, slot] < 0, codes, self.given[:, slot])
        self.log_probability += logits.log_softmax(-1).gather(1, codes[:, None])[:, 0]
        return codes.repeat(self.twice)


def pick(logits: Tensor, draws: Tensor, how: Sampling) -> Tensor:
    """Invert the distribution function of logits (b, K) at draws (b,): → codes (b,)."""
    if how.temperature == 0:
        return logits.argmax(-1)
    shares = (logits.double() / how.temperature).softmax(-1)
    if how.top_k:
        least = shares.topk(min(how.top_k, shares.shape[1])).values[:, -1:]
        shares = shares.masked_fill(shares < least, 0)
    if how.top_p < 1:
        shares = shares / shares.sum(-1, keepdim=True)
        ordered = shares.sort(descending=True).values
        before = ordered.cumsum(-1) - ordered
        least = ordered.masked_fill(before >= how.top_p, math.inf).amin(-1, keepdim=True)
        shares = shares.masked_fill(shares < least, 0)
    below = shares.cumsum(-1)
    target = draws.double()[:, None] * below[:, -1:]
    codes: Tensor = torch.searchsorted(below, target, right=True)[:, 0]
    return codes.clamp_max(logits.shape[1] - 1)

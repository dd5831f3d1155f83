"""Pictures edited by a prior: inpainting, variations and interpolation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import Autoencoder
from modules.priors.sampling import Known
from modules.priors.spaces import LatentSpace, Space
from modules.priors.spec import Noise
from utils.generation.samples import noise_of
from utils.images import to_signed

RESULTS = 8  # of a picture, in a row of the grid
GREY = 128  # of what is drawn anew, in the grid
SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Editing:
    """The pictures that samples are made from, and what of them is kept.

    Sample i is made from picture i mod n, or with steps from the pair of pictures i // steps and
    the next one.

    Args:
        originals: the n pictures, (n, C, h, w), uint8.
        space: the prior's codes or latents.
        known: the positions that are kept, (H, W), bool; None: none of latents, and of codes those
            that are chosen at random for each sample.
        share: of the positions of codes, or noise levels of latents, that are drawn anew.
        steps: images between two pictures.
    """

    originals: Tensor
    space: Space
    known: Tensor | None = None
    share: float = 0.0
    steps: int = 0

    @property
    def usual_count(self) -> int:
        """Number of samples, unless the user says another."""
        count = len(self.originals)
        return (count - 1) * self.steps if self.steps else count * RESULTS

    def digest(self) -> str:
        """Return a text that tells these pictures and their known part from others."""
        content = [self.originals] if self.known is None else [self.originals, self.known]
        digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in content)).hexdigest()
        return f"{len(self.originals)} pictures of digest {digest[:16]}"

    def noise(self, seed: int, numbers: list[int]) -> Noise:
        """Uniform numbers for these samples: the same for all between two pictures."""
        return noise_of(
            seed, [number // self.steps for number in numbers] if self.steps else numbers
        )

    @torch.no_grad()
    def start(self, first_stage: Autoencoder, numbers: list[int], noise: Noise) -> Known:
        """The codes or latents that the samples of these numbers start from."""
        device = next(first_stage.parameters()).device
        # One at a time: the codes of a picture may not depend on the others in the batch.
        items = torch.cat([self.items(first_stage, number, device) for number in numbers])
        size = self.space.height, self.space.width
        if self.known is not None:
            return Known(items, self.known.to(device))
        if isinstance(self.space, LatentSpace):
            return Known(items, torch.zeros(size, dtype=torch.bool, device=device), self.share)
        length = self.space.num_positions
        drawn = max(1, round(self.share * length))
        known = noise(length).argsort(dim=1).argsort(dim=1) >= drawn
        return Known(items, known.view(-1, *size).to(device))

    def items(self, first_stage: Autoencoder, number: int, device: torch.device) -> Tensor:
        """Codes or latents of a sample's picture, or between those of two; a batch of one."""

        def latents(index: int) -> Tensor:
            return first_stage.latents(to_signed(self.originals[index, None].to(device)))

        if self.steps:
            pair, step = divmod(number, self.steps)
            found = latents(pair).lerp(latents(pair + 1), (step + 1) / (self.steps + 1))
        else:
            found = latents(number % len(self.originals))
        return found if isinstance(self.space, LatentSpace) else first_stage.quantizer.encode(found)

    def arrange(self, samples: Tensor) -> tuple[Tensor, int]:
        """Arrange the first samples in rows, behind their picture, and how many make a row.

        Inpainting shows the known part too; interpolation has the second picture at the end.
        """
        rows: list[list[Tensor]] = []
        white = torch.full_like(samples[0], 255)
        if self.steps:
            for pair, drawn in enumerate(torch.split(samples, self.steps)):
                rows.append([self.originals[pair], *drawn])
                if len(drawn) == self.steps:
                    rows[-1].append(self.originals[pair + 1])
        else:
            count = len(self.originals)
            for index, original in enumerate(self.originals[: len(samples)]):
                before = [original] if self.known is None else [original, self.masked(original)]
                for drawn in torch.split(samples[index::count], RESULTS):
                    rows.append([*before, *drawn])
                    before = [white] * len(before)
        columns = max(map(len, rows))
        cells = [image for row in rows for image in (*row, *[white] * (columns - len(row)))]
        return torch.stack(cells), columns

    def masked(self, original: Tensor) -> Tensor:
        """A picture (C, h, w) with grey where it is drawn anew."""
        assert self.known is not None
        known = F.interpolate(self.known[None, None].float(), original.shape[1:])[0]
        return torch.where(known > 0, original, GREY)


def known_positions(part: str | Tensor, space: Space) -> Tensor:
    """Positions (H, W), bool, that a side of the picture or a mask (h, w) leaves as they are.

    A position is drawn anew as soon as the part touches it.
    """
    if isinstance(part, Tensor):
        size = space.height, space.width
        return F.adaptive_max_pool2d(part[None].float(), size)[0] == 0
    known = torch.zeros(space.height, space.width, dtype=torch.bool)
    rows, columns = space.height // 2, space.width // 2
    kept = {
        "left": known[:, -columns:],
        "right": known[:, :columns],
        "top": known[-rows:],
        "bottom": known[:rows],
    }
    kept[part][:] = True
    return known

"""Measuring: the values of each pair, and the features of both sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError
from utils.evaluation import metrics
from utils.evaluation.config import EvaluationConfig
from utils.evaluation.extremes import KeptPairs, Shown
from utils.evaluation.feature_cache import cache_file, read_statistics, write_statistics
from utils.evaluation.metrics import (
    CHOICES,
    LPIPS_BACKBONES,
    METRICS,
    NEIGHBOURS,
    FeatureStatistics,
)
from utils.evaluation.networks import Network
from utils.evaluation.pairs import Entry, batches, first_few
from utils.evaluation.protocols import SIDES
from utils.evaluation.schema import Score
from utils.logger import log


@dataclass(frozen=True)
class Scores:
    """The values of each pair, in the order of names, and the features of the two sets."""

    names: list[str]  # none with --unpaired
    values: dict[str, list[float]]
    originals: FeatureStatistics
    reconstructions: FeatureStatistics
    skipped: dict[str, str]  # name → why it was not measured
    shown: Mapping[str, Shown]  # by name: the extremes of each metric, and those asked for

    @property
    def images(self) -> dict[str, int]:
        """The images of each set."""
        return {"gt_path": self.originals.count, "g_path": self.reconstructions.count}

    @property
    def number(self) -> int:
        """The pairs, or without pairs the images of the smaller set."""
        return len(self.names) or min(self.images.values())


def measure(
    config: EvaluationConfig,
    entries: Sequence[Entry],
    skipped: Mapping[str, str],
    networks: Mapping[str, Network],
    device: torch.device,
    named: Iterable[str] = (),
) -> Scores:
    """Measure everything; takes the memory of a few batches, and the features that metrics need.

    skipped: what was skipped before, name → reason. named: pairs to keep for showing, whatever
    their values. Raises UserError if too little remains.
    """
    torch.backends.cudnn.allow_tf32 = False  # values of a GPU equal those of the CPU
    keep = not {"kid", *NEIGHBOURS}.isdisjoint(config.metrics)  # they need all vectors
    cache = cache_file(config, entries, networks, device)
    num_originals = count(entries)["original"]
    known = read_statistics(cache, num_originals, keep=keep) if cache is not None else None
    originals, reconstructions = known or FeatureStatistics(keep=keep), FeatureStatistics(keep=keep)
    sets = dict(zip(SIDES, (originals, reconstructions)))
    if known and config.unpaired:
        entries = [entry for entry in entries if "original" not in entry.files]
    names: list[str] = []
    values: dict[str, list[float]] = {}
    skipped, kept = dict(skipped), KeptPairs(named)
    with tqdm(total=len(entries), unit="image", disable=None, leave=False) as bar:
        for batch in batches(config, entries):
            bar.update(len(batch.names) + len(batch.skipped))
            skipped.update(batch.skipped)
            if not batch.names:
                continue
            columns = dict(batch.values)
            if "lpips" in networks:
                x, y = (torch.from_numpy(images).to(device) for images in batch.images.values())
                columns["lpips"] = metrics.lpips(x, y, networks["lpips"].module)
                check_finite(torch.from_numpy(columns["lpips"]), networks["lpips"])
            for side, images in batch.for_inception.items():
                if sets[side] is not known:
                    pictures = torch.from_numpy(images).to(device)
                    features = metrics.features(pictures, networks["inception"].module)
                    check_finite(features, networks["inception"])
                    sets[side].update(features)
            if cache is not None and known is None and originals.count == num_originals:
                write_statistics(cache, originals)
                known = originals
            if not config.unpaired:
                names.extend(batch.names)
                for name, column in columns.items():
                    values.setdefault(name, []).extend(column.tolist())
                kept.add(batch.names, batch.images.values(), columns)
    remain = (originals.count, reconstructions.count) if config.unpaired else (len(names),) * 2
    check_number(config, remain, skipped)
    skipped = dict(sorted(skipped.items()))
    return Scores(names, values, originals, reconstructions, skipped, kept.shown)


def check_finite(values: Tensor, network: Network) -> None:
    if not values.isfinite().all():
        raise UserError(f"the weights {network.path} are damaged: their values are not finite")


def count(entries: Iterable[Entry]) -> Counter[str]:
    """Count the images of each side."""
    return Counter(side for entry in entries for side in entry.files)


def check_entries(
    config: EvaluationConfig, entries: Sequence[Entry], skipped: Mapping[str, str]
) -> None:
    """Raise UserError if a metric needs more or larger images."""
    counts = count(entries)
    check_number(config, [counts[side] for side in SIDES], skipped)
    for choice in config.metrics:
        flags = f"--metrics {choice}"
        smallest = max(METRICS[metric].smallest_side for metric in CHOICES[choice])
        if choice == "lpips":
            flags += f" with --lpips_net {config.lpips_net}"
            smallest = LPIPS_BACKBONES[config.lpips_net]
        small = [entry.name for entry in entries if min(entry.size) < smallest]
        if small:
            raise UserError(
                f"{flags} needs images of {smallest}×{smallest} or more; "
                f"{len(small)} of {len(entries)} are smaller: {first_few(small)}"
            )


def check_number(
    config: EvaluationConfig, numbers: Iterable[int], skipped: Mapping[str, str]
) -> None:
    """Raise UserError if too few images of a side remain for a choice of --metrics."""
    for flag, number in zip(("--gt_path", "--g_path"), numbers):
        place = f" in {flag}" if config.unpaired else ""
        if number == 0:
            reason = next(iter(skipped.values()))
            what = "images" if config.unpaired else f"{len(skipped)} pairs"
            raise UserError(f"none of the {what}{place} can be measured; {reason}")
        for choice in config.metrics:
            needed = max(METRICS[name].smallest_set for name in CHOICES[choice])
            if number < needed:
                there = f"there {'is 1' if number == 1 else f'are {number}'}{place}"
                raise UserError(f"--metrics {choice} needs {needed} images or more, and {there}")


def summarise(chosen: Sequence[str], scores: Scores) -> dict[str, Score]:
    """Mean and variance of the chosen metrics, in the order of METRICS."""
    found = {name: metrics.summarise(column) for name, column in scores.values.items()}
    sets, number = (scores.originals, scores.reconstructions), scores.number
    if "fid" in chosen:
        if number < metrics.FID_ENOUGH:
            log.warning(
                "FID of %d images is biased: the covariance of its 2048 features needs as many "
                "images; use KID instead (--metrics kid)",
                number,
            )
        found["fid"] = Score(metrics.frechet_distance(*sets), None, number)
    if "kid" in chosen:
        size, usual = metrics.kid_subset_size(number), metrics.KID_SUBSET_SIZE
        if size < usual:
            log.info("KID takes subsets of %d images, half of all, instead of %d", size, usual)
        mean, spread = metrics.kernel_distance(*(own.vectors() for own in sets))
        found["kid"] = Score(mean, spread**2, number)
    for choice, measure_sets in NEIGHBOURS.items():
        if choice in chosen:
            shares = measure_sets(*(own.vectors() for own in sets))
            found |= {name: Score(own, None, number) for name, own in zip(CHOICES[choice], shares)}
    return {name: found[name] for name in METRICS if name in found}

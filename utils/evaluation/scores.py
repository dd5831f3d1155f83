"""Measuring: the values of each pair, and the features of both sets."""

from __future__ import annotations

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
from utils.evaluation.metrics import CHOICES, LPIPS_BACKBONES, METRICS, FeatureStatistics
from utils.evaluation.networks import Network
from utils.evaluation.pairs import Pair, batches, first_few
from utils.evaluation.schema import Score
from utils.logger import log


@dataclass(frozen=True)
class Scores:
    """The values of each pair, in the order of names, and the features of the two sets."""

    names: list[str]
    values: dict[str, list[float]]
    originals: FeatureStatistics
    reconstructions: FeatureStatistics
    skipped: dict[str, str]  # name → why the pair was not measured
    shown: Mapping[str, Shown]  # by name: the extremes of each metric, and those asked for


def measure(
    config: EvaluationConfig,
    pairs: Sequence[Pair],
    skipped: Mapping[str, str],
    networks: Mapping[str, Network],
    device: torch.device,
    named: Iterable[str] = (),
) -> Scores:
    """Measure all pairs; takes the memory of a few batches, and of the features that metrics need.

    skipped: pairs that were skipped before, name → reason. named: pairs to keep for showing,
    whatever their values. Raises UserError if too few pairs remain.
    """
    torch.backends.cudnn.allow_tf32 = False  # values of a GPU equal those of the CPU
    keep = not {"kid", "precision_recall"}.isdisjoint(config.metrics)  # they need all vectors
    cache = cache_file(config, pairs, networks, device)
    known = read_statistics(cache, len(pairs), keep=keep) if cache is not None else None
    originals, reconstructions = known or FeatureStatistics(keep=keep), FeatureStatistics(keep=keep)
    names: list[str] = []
    values: dict[str, list[float]] = {}
    skipped, kept = dict(skipped), KeptPairs(named)
    with tqdm(total=len(pairs), unit="image", disable=None, leave=False) as bar:
        for batch in batches(config, pairs):
            bar.update(len(batch.names) + len(batch.skipped))
            skipped.update(batch.skipped)
            if not batch.names:
                continue
            names.extend(batch.names)
            columns = dict(batch.values)
            if "lpips" in networks:
                x, y = (torch.from_numpy(images).to(device) for images in batch.images)
                columns["lpips"] = metrics.lpips(x, y, networks["lpips"].module)
                check_finite(torch.from_numpy(columns["lpips"]), networks["lpips"])
            if "inception" in networks:
                for statistics, images in zip((originals, reconstructions), batch.for_inception):
                    if statistics is not known:
                        pictures = torch.from_numpy(images).to(device)
                        features = metrics.features(pictures, networks["inception"].module)
                        check_finite(features, networks["inception"])
                        statistics.update(features)
            for name, column in columns.items():
                values.setdefault(name, []).extend(column.tolist())
            kept.add(batch.names, batch.images, columns)
    if cache is not None and known is None:
        write_statistics(cache, originals)
    check_number(config.metrics, len(names), skipped)
    skipped = dict(sorted(skipped.items()))
    return Scores(names, values, originals, reconstructions, skipped, kept.shown)


def check_finite(values: Tensor, network: Network) -> None:
    if not values.isfinite().all():
        raise UserError(f"the weights {network.path} are damaged: their values are not finite")


def check_pairs(
    config: EvaluationConfig, pairs: Sequence[Pair], skipped: Mapping[str, str]
) -> None:
    """Raise UserError if a metric needs more or larger images."""
    check_number(config.metrics, len(pairs), skipped)
    for choice in config.metrics:
        flags = f"--metrics {choice}"
        smallest = max(METRICS[metric].smallest_side for metric in CHOICES[choice])
        if choice == "lpips":
            flags += f" with --lpips_net {config.lpips_net}"
            smallest = LPIPS_BACKBONES[config.lpips_net]
        small = [pair.name for pair in pairs if min(pair.size) < smallest]
        if small:
            raise UserError(
                f"{flags} needs images of {smallest}×{smallest} or more; "
                f"{len(small)} of {len(pairs)} are smaller: {first_few(small)}"
            )


def check_number(chosen: Sequence[str], num_pairs: int, skipped: Mapping[str, str]) -> None:
    """Raise UserError if too few pairs remain for a choice of --metrics."""
    if num_pairs == 0:
        reason = next(iter(skipped.values()))
        raise UserError(f"none of the {len(skipped)} pairs can be measured; {reason}")
    for choice in chosen:
        needed = max(METRICS[name].smallest_set for name in CHOICES[choice])
        if num_pairs < needed:
            there = "is 1" if num_pairs == 1 else f"are {num_pairs}"
            raise UserError(f"--metrics {choice} needs {needed} images or more, and there {there}")


def summarise(chosen: Sequence[str], scores: Scores) -> dict[str, Score]:
    """Mean and variance of the chosen metrics, in the order of METRICS."""
    found = {name: metrics.summarise(column) for name, column in scores.values.items()}
    sets, number = (scores.originals, scores.reconstructions), len(scores.names)
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
    if "precision_recall" in chosen:
        shares = metrics.precision_recall(*(own.vectors() for own in sets))
        for name, share in zip(("precision", "recall"), shares):
            found[name] = Score(share, None, number)
    return {name: found[name] for name in METRICS if name in found}

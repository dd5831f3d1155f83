"""Cache of Inception's statistics of the originals, found by their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError, one_line
from utils.evaluation.config import EvaluationConfig
from utils.evaluation.metrics import FeatureStatistics, versions
from utils.evaluation.networks import Network
from utils.evaluation.pairs import Entry
from utils.files import whole_file
from utils.logger import log


def cache_file(
    config: EvaluationConfig,
    entries: Sequence[Entry],
    networks: Mapping[str, Network],
    device: torch.device,
) -> Path | None:
    """Path of the statistics of these originals; None if they are not cached.

    Its name is the SHA-256 of the settings and of the bytes of each original. Nothing is cached
    with --skip_bad_images: a skipped reconstruction takes its original along.
    """
    if not config.inception or not config.cache or config.skip_bad_images:
        return None
    weights = networks["inception"].sha256
    settings = {"protocol": config.protocol, "weights": weights, "device": device.type}
    digest = hashlib.sha256(json.dumps({**settings, **versions()}, sort_keys=True).encode())
    for original in (entry.files["original"] for entry in entries if "original" in entry.files):
        try:
            digest.update(hashlib.sha256(original.read_bytes()).digest())
        except OSError as error:
            raise UserError(f"image {original} cannot be read: {error.strerror}") from error
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = given if given.is_absolute() else Path("~/.cache").expanduser()
    return folder / "looc" / f"{digest.hexdigest()}.npz"


def read_statistics(path: Path, count: int, *, keep: bool) -> FeatureStatistics | None:
    """Statistics of count images, if keep with the vectors; None if there is no such file."""
    statistics = FeatureStatistics(keep=keep)
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        mean, scatter, vectors = arrays["mean"], arrays["scatter"], arrays.get("vectors")
        if keep and vectors is None:
            return None
        shapes = [mean.shape * 2, (count, *mean.shape)]
        found = [scatter.shape, shapes[1] if vectors is None else vectors.shape]
        if int(arrays["count"]) != count or mean.ndim != 1 or found != shapes:
            raise ValueError("its shapes do not fit")
        if not (mean.isfinite().all() and scatter.isfinite().all()):
            raise ValueError("its values are not finite")
    except FileNotFoundError:
        return None
    except Exception as error:  # as varied as the damage
        log.info("%s is damaged (%s) and computed again", path, one_line(error)[:100])
        return None
    statistics.count, statistics.mean, statistics.scatter = count, mean, scatter
    if keep and vectors is not None:
        statistics.kept = [vectors]
    return statistics


def write_statistics(path: Path, statistics: FeatureStatistics) -> None:
    """Write the file; log a warning if that fails."""
    arrays = {
        "count": np.array(statistics.count),
        "mean": statistics.mean.cpu().numpy(),
        "scatter": statistics.scatter.cpu().numpy(),
    }
    if statistics.kept is not None:
        arrays["vectors"] = statistics.vectors().numpy()
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except UserError as error:
        log.warning("%s; --no-cache does without", one_line(error))

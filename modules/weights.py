"""Safe opening of files of weights."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

CONFIG, TENSORS = "config.json", "model.safetensors"  # files of an exported checkpoint
SUFFIX, SUMS = ".safetensors", "SHA256SUMS"
ENTRY = "looc"  # of the metadata of one file: a checkpoint's entries besides the weights, as JSON
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class DigestDiffers(ValueError):
    """SHA256SUMS lists another digest than the file has."""


class Inert:
    """Stand-in for an object that is ignored; accepts any content and drops it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_weights(subject: str, path: Path, inert: tuple[str, ...] = ()) -> Mapping[Any, Any]:
    """Read the dictionary in a file of torch.save or safetensors, without executing anything.

    The folder of an exported checkpoint is read as the checkpoint is. Objects whose name begins
    with an entry of `inert` become Inert. Raises ValueError, beginning with the subject, if the
    file cannot be read, is damaged, has another SHA-256 than SHA256SUMS beside it lists, or
    contains any other object that PyTorch does not consider safe.
    """
    if is_exported(path):
        return read_exported(subject, path)
    if not path.is_file():
        folder = f"is a folder without {CONFIG} and {TENSORS}" if path.is_dir() else "is no file"
        raise ValueError(f"{subject} {folder if path.exists() else 'does not exist'}")
    try:
        with path.open("rb"):
            pass  # later errors of the system may be due to damaged content
    except OSError as error:
        raise ValueError(f"{subject} cannot be read: {error.strerror or error}") from error
    try:
        content = read_safetensors(path) if path.suffix == SUFFIX else read(path, inert)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        if "weights_only" in str(error) or "Unsupported" in str(error):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            code = f"code when opened ({named[1]})" if named else "code when opened"
            reason = f"it would execute {code}, or is not a checkpoint"
        else:
            reason = f"it is truncated or damaged ({type(error).__name__})"
        raise ValueError(f"{subject} is refused: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{subject} holds a {type(content).__name__}, not a state dict")
    return content


def is_exported(path: Path) -> bool:
    """Return whether a folder has the two files of an exported checkpoint."""
    return all((path / name).is_file() for name in (CONFIG, TENSORS))


def read_exported(subject: str, folder: Path) -> Mapping[Any, Any]:
    """Read the folder that `python -m utils.export` has written."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = type(error).__name__
        raise ValueError(f"{subject} has a {CONFIG} that is damaged ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{subject} has a {CONFIG} without settings")
    return {**content, "model": read_weights(subject, folder / TENSORS)}


def read(path: Path, inert: tuple[str, ...]) -> Any:
    ignored: list[Any] = []
    mapped = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if zipfile.is_zipfile(path):  # files of old versions of PyTorch are not
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # PyTorch does not verify checksums
                    raise zipfile.BadZipFile
                entries = archive.infolist()
            # Processes that read one file share its pages in memory.
            mapped = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            names = get_unsafe_globals_in_checkpoint(str(path)) if inert else []
            ignored = [(Inert, name) for name in names if name.startswith(inert)]
        with safe_globals(ignored):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read the tensors of a file, or the checkpoint that it is if its metadata has our entry.

    Its half-precision tensors become float32. Raises an error of any type if the file is damaged.
    """
    content = bytearray(path.read_bytes())
    listed = digests(path.parent).get(path.name)
    if listed is not None and listed != sha256(content).hexdigest():
        raise DigestDiffers
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    entries = json.loads(header.pop("__metadata__", {}).get(ENTRY, "{}"))
    data = content[start:]
    if len(data) != max((about["data_offsets"][1] for about in header.values()), default=0):
        raise ValueError
    tensors = {name: tensor_of(about, data) for name, about in header.items()}
    if not entries:
        return tensors
    full = {n: t.float() if t.dtype == torch.float16 else t for n, t in tensors.items()}
    return {**entries, "model": full}


def tensor_of(about: Mapping[str, Any], data: bytearray) -> Tensor:
    """Make a tensor of its type, shape and place in the data."""
    first, last = about["data_offsets"]
    dtype, shape = TYPES[about["dtype"]], about["shape"]
    if first == last:
        return torch.empty(0, dtype=dtype).reshape(shape)
    return torch.frombuffer(data[first:last], dtype=dtype).reshape(shape)  # a copy, aligned


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that the folder's SHA256SUMS lists, by name."""
    path = folder / SUMS
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}

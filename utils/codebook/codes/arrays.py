"""Codes as NumPy arrays with a description, for the priors of other programs.

codes.npy (N, H, W, m), labels.npy (N,) and codebook.npy lie beside names.json, the image of each
row, and codes.json, the values of the header and what the arrays mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from torch import Tensor

from modules import Autoencoder
from utils.checkpoints.digest import model_digest
from utils.codebook.codes.coder import Array
from utils.codebook.codes.files import CodeFile, Spool, complete, spooled_chunks
from utils.codebook.codes.header import Batch, CodesInfo, codes_info
from utils.distributed import first_goes_ahead, rank
from utils.errors import UserError, one_line
from utils.files import whole_file, write_json

ARRAYS = ("codes.npy", "labels.npy", "codebook.npy", "names.json", "codes.json")


class Sources(Protocol):
    """Images whose codes are saved."""

    def name(self, index: int, /) -> str: ...
    def labels(self) -> tuple[Tensor, tuple[str, ...]]: ...  # (n,), and names of the classes


def save_arrays(
    path: Path,
    spool: Spool,
    left_out: Sequence[int],
    *,
    images: Sources,
    model: Autoencoder,
    checkpoint: Path,
) -> dict[str, Any]:
    """Write ARRAYS into the folder of path from the spools of all processes, as save_codes does.

    Returns no rate: nothing is compressed.
    """
    info, spools = complete(path, spool, left_out)
    assert isinstance(info, CodesInfo)
    with first_goes_ahead():
        if rank() == 0:
            kept = sorted({*range(info.num_images)}.difference(left_out))
            write_codes(path.with_name("codes.npy"), info, spools)
            arrays = {"codebook.npy": model.quantizer.codebook.detach().float().cpu()}
            with suppress(UserError):  # they have no classes
                numbers, classes = images.labels()
                arrays["labels.npy"] = numbers[kept]
            for name, array in arrays.items():
                with whole_file(path.with_name(name)) as temporary, temporary.open("w+b") as file:
                    np.save(file, array.numpy())
            write_json(path.with_name("names.json"), [images.name(position) for position in kept])
            values = {name: value for name, value in asdict(info).items() if name in DESCRIBED}
            slots = " + slot * num_embedding" if model.config.num_codebooks > 1 else ""
            more = {
                "classes": classes if "labels.npy" in arrays else None,
                "codevector": f"codebook.npy[code{slots}]",
                "first_stage": str(checkpoint.resolve()),
                "first_stage_digest": model_digest(model),
                "decode": f"python test.py --model_name {checkpoint} --from_codes codes.npy",
            }
            write_json(path.with_name("codes.json"), {**values, **more})
    return {}


DESCRIBED = {item.name for item in fields(CodesInfo)} - {"chunk_size", "num_tables"}


def write_codes(path: Path, info: CodesInfo, spools: Sequence[Path]) -> None:
    """Write the array of all codes, a chunk at a time."""
    shape = (info.num_coded, info.height, info.width, info.slots)
    form = {"descr": info.dtype.str, "fortran_order": False, "shape": shape}
    with whole_file(path) as temporary, temporary.open("w+b") as file:
        np.lib.format.write_array_header_1_0(file, form)
        for codes in spooled_chunks(info, spools):
            file.write(codes.tobytes())


class CodeArray(CodeFile):
    """Codes (N, H, W, m) of a .npy file, saved by test.py or drawn by any prior.

    A file of the same name with .json beside it, if any, is the description that test.py wrote.
    """

    array: Array

    def __init__(self, path: Path, model: Autoencoder, batch_size: int) -> None:
        """Raises UserError naming the file if these are no codes of the model.

        batch_size: of the decoding, where there is no description.
        """
        self.model, self.batch_size = model, batch_size
        super().__init__(path)

    def _read(self, _file: IO[bytes]) -> None:
        try:
            array = self.array = np.lib.format.open_memmap(self.path, mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError("it is not a whole NumPy file of numbers") from error
        config, sides = self.model.config, array.shape[1:3]
        if array.dtype.kind not in "iu":
            raise ValueError(f"its values are {array.dtype}, not integers")
        if array.ndim != 4 or array.shape[3] != config.num_slots or sides[0] != sides[1]:
            wanted = f"(N, H, H, {config.num_slots}), as the model's"
            raise ValueError(f"its shape is {array.shape}, not {wanted}")
        if not array.size:
            raise ValueError(f"it holds no codes, its shape is {array.shape}")
        if array.min() < 0 or array.max() >= config.num_embedding:
            raise ValueError(f"its codes are not in [0, {config.num_embedding})")
        self.coder, self.info = None, self._described()
        expected = self.info.num_coded, self.info.height, self.info.width, self.info.slots
        if array.shape != expected:
            raise ValueError(f"its shape is {array.shape}, that in its .json {expected}")

    def _described(self) -> CodesInfo:
        """The header by the description, else by the shape. Raises ValueError if it is damaged."""
        try:
            values = json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8"))
            values = {name: values[name] for name in DESCRIBED}
            values["left_out"] = tuple(values["left_out"])
            return CodesInfo(**values, chunk_size=values["batch_size"])
        except FileNotFoundError:
            count, side = len(self.array), self.array.shape[1] * self.model.config.downsampling
            return codes_info(self.model, self.path.stem, side, count, self.batch_size)
        except (OSError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"its .json is damaged: {one_line(error)[:200]}") from error

    def rate(self) -> dict[str, Any]:
        return {}

    def _decode(self, chunk: int, batches: Sequence[Batch]) -> Array:
        assert isinstance(self.info, CodesInfo)
        first = chunk * self.info.chunk_size
        start = first - sum(position < first for position in self.info.left_out)
        codes = self.array[start : start + sum(len(batch.positions) for batch in batches)]
        flat: Array = codes.astype(np.int64).ravel()
        return flat

"""Named files of flags: --preset NAME or --preset FILE.

A file holds flags as typed on a command line, and comments.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modules.config import ModelConfig
from modules.quantizers.registry import QUANTIZER_FLAGS, QUANTIZERS
from modules.quantizers.spec import QuantizerSpec
from utils.errors import UserError, one_line, unknown_name

FOLDER = Path(__file__).parent
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


def preset_flags(name: str, quantizer: str | None, parse: Callable[..., Any]) -> dict[str, Any]:
    """Read the flags of a preset; with another quantiser than its own, without those of its own.

    Args:
        name: one of PRESETS, or a path.
        quantizer: the quantiser given, if any.
        parse: `parse_flags` of the script.

    Raises UserError if there is no such preset or it cannot be read.
    """
    path = FOLDER / f"{name}.txt" if name in PRESETS else Path(name)
    try:
        if not path.is_file():
            raise UserError(unknown_name("--preset", name, PRESETS))
        lines = path.read_text(encoding="utf-8").splitlines()
        words = shlex.split("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--preset {str(path)[:200]} cannot be read: {one_line(error)[:200]}"
        ) from error
    flags: dict[str, Any] = parse(argv=words, source=f"--preset {path}")
    if "preset" in flags:
        raise UserError(f"--preset {path} names another preset, {flags['preset']}")
    if quantizer in (None, flags.get("quantizer", ModelConfig.quantizer)):
        return flags
    return without_quantizer(flags, QUANTIZERS[quantizer])


def without_quantizer(flags: Mapping[str, Any], other: QuantizerSpec) -> dict[str, Any]:
    """Drop the flags of the preset's quantiser, so that another one can take its place.

    The number of codevectors stays if the other one reads it, the number of latent channels if it
    takes any.
    """
    dropped = QUANTIZER_FLAGS - (other.reads & {"num_embedding"})
    if not other.any_channels:
        dropped |= {"latent_channels"}
    return {name: value for name, value in flags.items() if name not in dropped}

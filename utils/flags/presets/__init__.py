"""Files of flags, as typed on a command line, with comments: --preset NAME or --preset FILE."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.config import ModelConfig
from modules.quantizers.registry import QUANTIZER_FLAGS, QUANTIZERS
from utils.errors import UserError, one_line, unknown_name
from utils.flags.arguments import parse_flags

FOLDER = Path(__file__).parent
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


def with_preset(flags: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """The flags given, and those of their preset that are not among them.

    Of a preset for another quantiser, what it says of that one is left out. Raises UserError where
    there is no such preset, or it cannot be read.
    """
    if "preset" not in flags:
        return dict(flags)
    name = flags["preset"]
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
    preset = parse_flags(None, *groups, argv=words, source=f"--preset {path}")
    if "preset" in preset:
        raise UserError(f"--preset {path} names another preset, {preset['preset']}")
    own = preset.get("quantizer", ModelConfig.quantizer)
    if flags.get("quantizer", own) != own:
        preset = without_quantizer(preset, flags["quantizer"])
    return {**preset, **flags}


def without_quantizer(preset: Mapping[str, Any], other: str) -> dict[str, Any]:
    """The preset's flags without what they say of its quantiser, where another takes its place.

    The number of codevectors stays where that reads it, and the channels where they may be any.
    """
    spec = QUANTIZERS[other]
    dropped = QUANTIZER_FLAGS - (spec.reads & {"num_embedding"})
    if not spec.any_channels:
        dropped |= {"latent_channels"}
    return {name: value for name, value in preset.items() if name not in dropped}

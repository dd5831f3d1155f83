"""Files of flags, as typed on a command line, with comments: --preset NAME or --preset FILE."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.arguments import parse_flags
from utils.errors import UserError, unknown_name

FOLDER = Path(__file__).parent
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


def with_preset(flags: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """The flags given, and those of their preset that are not among them.

    Raises UserError where there is no such preset, or it cannot be read.
    """
    if "preset" not in flags:
        return dict(flags)
    name = flags["preset"]
    path = FOLDER / f"{name}.txt" if name in PRESETS else Path(name)
    if not path.is_file():
        raise UserError(unknown_name("--preset", name, PRESETS))
    try:
        words = shlex.split(path.read_text(encoding="utf-8"), comments=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--preset {path} cannot be read: {error}") from error
    preset = parse_flags(None, *groups, argv=words, source=f"--preset {path}")
    if "preset" in preset:
        raise UserError(f"--preset {path} names another preset, {preset['preset']}")
    return {**preset, **flags}
